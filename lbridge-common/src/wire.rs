//! wire: map keys and values. They have a fixed layout, no implicit padding, and no `bool`, `Option` or enum:
//! a stray padding byte makes a lookup miss.
//!
//! Addresses are IPv6; IPv4 is v4-mapped (`::ffff:a.b.c.d`), so that one key serves both families. A
//! v4-mapped address in a real IPv6 packet never reaches a lookup: the kernel program ignores such packets.

use core::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Version of the layouts below and of what the maps mean; every change to either increments it. It is part
/// of the pin directory's name, so that a daemon never adopts maps that it would misread. Version 4 differs
/// from version 3 in the maps' names alone.
pub const ABI_VERSION: u32 = 4;

/// Maximum number of entries (interface, address, port, protocol) in force at the same time.
pub const MAX_ENTRIES: u32 = 131_072;
/// Maximum number of network namespaces whose localhost leads to the host.
pub const MAX_REDIRECT_NETNS: u32 = 65_536;
/// Maximum number of bridges per network namespace whose rules its localhost may lead to.
pub const BRIDGES: usize = 4;
/// Maximum number of relayed connections whose client is recorded at the same time.
pub const MAX_RELAY_PEERS: u32 = 65_536;
/// Maximum number of addresses and ports whose listeners are registered: four for each port that a rule can
/// lead to.
pub const MAX_TARGETS: u32 = 4 * 65_536;
/// Maximum number of registered listening sockets.
pub const MAX_LISTENERS: u32 = 65_536;
/// Number of sockets of one `SO_REUSEPORT` group that are registered, so that another takes over when one
/// closes. Steering to any member spreads connections over the whole group: the kernel selects among all its
/// members.
pub const SLOTS: u8 = 4;

/// Maximum number of interfaces that the daemon probes from at the same time.
pub const MAX_PROBERS: u32 = 4096;

/// Source port of the SYNs and datagrams with which the daemon probes whether a firewall lets packets
/// through. A container can choose any port, so a packet is a probe only if its source address is also in the
/// map of probers.
///
/// Probe SYNs are steered like any other, but are not counted as connections. Probe datagrams are counted on
/// arrival, and no service receives them.
pub const PROBE_PORT: u16 = 1023;

/// `IPPROTO_TCP`, in the form used by keys (include/uapi/linux/in.h).
pub const TCP: u8 = 6;
/// `IPPROTO_UDP`, in the form used by keys (include/uapi/linux/in.h).
pub const UDP: u8 = 17;

const V4_MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// An IP address as four 32-bit words in network byte order, the form used by the kernel's BPF contexts.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// The IPv4 wildcard, `0.0.0.0`.
    pub const ANY_V4: Self = Self::from_v4_word(0);
    /// The IPv6 wildcard, `::`.
    pub const ANY_V6: Self = Self([0; 4]);

    /// Converts an IPv4 address in network byte order, as in `bpf_sk_lookup.local_ip4`.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, V4_MAPPED, word])
    }

    /// Returns true if this is an IPv4 address (v4-mapped).
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == V4_MAPPED
    }

    /// Returns the last word, in network byte order: all of an IPv4 address.
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.0[3]
    }

    /// Returns true for an address in `127.0.0.0/8` and for `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.0[3].to_ne_bytes()[0] == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && u32::from_be(self.0[3]) == 1
        }
    }

    /// Returns true for `0.0.0.0` and `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.0[3] == 0 && self.0[0] == 0 && self.0[1] == 0 && (self.0[2] == 0 || self.0[2] == V4_MAPPED)
    }

    /// Returns the netmask of `prefix` bits for the family of `self`. For IPv4, the 96 bits of the v4-mapped
    /// prefix are set, too.
    #[must_use]
    pub fn mask(&self, prefix: u8) -> Self {
        let bits = u32::from(prefix) + if self.is_v4() { 96 } else { 0 };
        let ones = u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
        Self::from(Ipv6Addr::from(ones))
    }

    /// Returns true if this is the broadcast address of an IPv4 subnet with this netmask. A /31 and a /32
    /// have none (RFC 3021).
    #[inline(always)]
    pub const fn is_broadcast(&self, mask: &Self) -> bool {
        self.is_v4() && u32::from_be(!mask.0[3]) > 1 && self.0[3] | mask.0[3] == u32::MAX
    }

    /// Returns `self` with only the bits that are set in `mask`.
    #[inline(always)]
    #[must_use]
    pub const fn masked(&self, mask: &Self) -> Self {
        Self([self.0[0] & mask.0[0], self.0[1] & mask.0[1], self.0[2] & mask.0[2], self.0[3] & mask.0[3]])
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&IpAddr::from(*self), f)
    }
}

impl From<Ipv6Addr> for Address {
    fn from(ip: Ipv6Addr) -> Self {
        let b = ip.octets();
        Self(core::array::from_fn(|i| {
            u32::from_ne_bytes([b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]])
        }))
    }
}

impl From<Ipv4Addr> for Address {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(ip.octets()))
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(address.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(bytes).to_canonical()
    }
}

/// Key of an entry: the address and port that a container dials, and the interface on which the packet
/// arrives.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryKey {
    /// The host's address on the bridge.
    pub gateway: Address,
    /// The bridge's interface index; 0 if the kernel program cannot check it.
    pub ifindex: u32,
    /// The dialled port, in host byte order.
    pub port: u16,
    /// The IP protocol: [`TCP`] or [`UDP`].
    pub protocol: u16,
}

/// An entry of the kernel: the target of a dialled address and port, and the sources that may use it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The entry's own key. The kernel may reuse the memory of a removed element at once, so a value that was
    /// looked up may since belong to another key. Code that copies the value must compare this key.
    pub key: EntryKey,
    /// The network's subnet: source addresses outside it are not served.
    pub subnet: Address,
    /// The netmask of `subnet`.
    pub mask: Address,
    /// The loopback address that the service listens on.
    pub target: Address,
    /// The service's port, in host byte order. With 0 the entry leads to no service: what it admits is
    /// refused, unless it goes to a relay.
    pub target_port: u16,
    /// Flag bits: [`Entry::LISTED`], [`Entry::RELAYED`].
    pub flags: u16,
    /// Explicit padding, always 0.
    pub reserved: [u16; 2],
}

impl Entry {
    /// Flag: only sources with a [`SourceKey`] may use the entry, not the whole subnet.
    pub const LISTED: u16 = 1;
    /// Flag: connections go to the daemon's relay, whose listening socket has the entry's key in the map of
    /// relays.
    pub const RELAYED: u16 = 1 << 1;

    /// Returns true if all of `flags` are set.
    #[inline(always)]
    pub const fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// Returns the entry's IP protocol: [`TCP`] or [`UDP`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "an IP protocol's number is a byte")]
    pub const fn protocol(&self) -> u8 {
        self.key.protocol as u8
    }
}

/// An entry as the kernel's map holds it, with the kernel program's count.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CountedEntry {
    /// The entry, as the daemon has put it.
    pub entry: Entry,
    /// Number of connections steered since the entry was put. The kernel program increments it.
    pub steered: u64,
}

impl CountedEntry {
    /// All zero: the value of no key.
    pub const EMPTY: Self = Self {
        entry: Entry {
            key: EntryKey { gateway: Address([0; 4]), ifindex: 0, port: 0, protocol: 0 },
            subnet: Address([0; 4]),
            mask: Address([0; 4]),
            target: Address([0; 4]),
            target_port: 0,
            flags: 0,
            reserved: [0; 2],
        },
        steered: 0,
    };
}

/// Key of a source that may use a rule with [`Entry::LISTED`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceKey {
    /// The entry's key.
    pub entry: EntryKey,
    /// The container's address.
    pub source: Address,
}

/// Key of the packets that one of lbridge's accept rules lets through the host's firewall, by any interface:
/// an accept rule names its bridge, and the next bridge of that name has another index. No such packet may
/// reach a service unless an entry leads it there. The key is a longest-prefix match; it ends with the rule's
/// sources.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AcceptedKey {
    /// The dialled address.
    pub gateway: Address,
    /// The dialled port, in host byte order.
    pub port: u16,
    /// The IP protocol: [`TCP`] or [`UDP`].
    pub protocol: u16,
    /// The first address of the sources; in a lookup, the packet's source.
    pub source: Address,
}

impl AcceptedKey {
    /// Length of the key in bits, as used in a lookup.
    pub const BITS: u32 = Self::DIALLED_BITS + 128;

    const DIALLED_BITS: u32 = 160;

    /// Returns the number of bits that must match if the sources have the netmask `mask`.
    #[must_use]
    pub fn prefix_len(mask: &Address) -> u32 {
        let ones: u32 = mask.0.iter().map(|word| word.count_ones()).sum();
        Self::DIALLED_BITS + ones
    }

    /// Returns true if a lookup with the key `packet` finds this key, which was put with `prefix_len` bits.
    #[must_use]
    pub fn matches(&self, prefix_len: u32, packet: &Self) -> bool {
        let mask = Address::ANY_V6.mask(u8::try_from(prefix_len - Self::DIALLED_BITS).unwrap_or(128));
        *self == Self { source: packet.source.masked(&mask), ..*packet }
    }
}

/// Key of an address that a listener must be bound to for a rule to lead to it. Listeners on other addresses
/// of the port are not registered: any user of the host may listen on all of 127.0.0.0/8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetKey {
    /// The bound address: a loopback address, `0.0.0.0` or `::`.
    pub address: Address,
    /// The bound port, in host byte order.
    pub port: u16,
    /// The IP protocol: [`TCP`] or [`UDP`].
    pub protocol: u16,
}

/// Key of a registered listening socket in the host's network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerKey {
    /// The address that the socket is bound to.
    pub address: Address,
    /// The port that the socket is bound to, in host byte order.
    pub port: u16,
    /// Index of the socket among the group's registered sockets, less than [`SLOTS`].
    pub slot: u8,
    /// The IP protocol: [`TCP`] or [`UDP`].
    pub protocol: u8,
}

/// An IP address and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// The IP address; IPv4 is v4-mapped.
    pub address: Address,
    /// The port, in host byte order.
    pub port: u16,
    /// Explicit padding, always 0.
    pub reserved: u16,
}

impl Endpoint {
    /// Creates an endpoint from an address and a port in host byte order.
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> Self {
        Self { address, port, reserved: 0 }
    }
}

/// Key of a relay's connection to a service: both of its ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelayPeerKey {
    /// The relay's end. Another socket of the host may have the same address and port and be connected to
    /// another service.
    pub relay: Endpoint,
    /// The service's end of the connection.
    pub service: Endpoint,
}

/// The client behind a relayed connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RelayPeer {
    /// The entry's own key, to detect a reused element: see [`Entry::key`].
    pub key: RelayPeerKey,
    /// Cookie of the relay's socket. The entry is removed when that socket closes.
    pub cookie: u64,
    /// The container's end of the relayed connection.
    pub container: Endpoint,
    /// Explicit padding, always 0.
    pub reserved: u32,
}

/// Key of a source from which the daemon sends probes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProberKey {
    /// The source address of the probes.
    pub source: Address,
    /// The ingress interface's index; 0 if the kernel program cannot check it.
    pub ifindex: u32,
}

/// Key of an override (`--source loopback`): connections to `gateway` from a subnet look as if they came from
/// and went to loopback. The key is a longest-prefix match; it ends with the subnet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OverrideKey {
    /// The dialled address and port.
    pub gateway: Endpoint,
    /// The network's subnet; in a lookup, the container's address.
    pub peer: Address,
}

impl OverrideKey {
    /// Length of the key in bits, as used in a lookup.
    pub const BITS: u32 = Self::GATEWAY_BITS + 128;

    const GATEWAY_BITS: u32 = 160;

    /// Returns the number of bits that must match if the subnet has the netmask `mask`.
    #[must_use]
    pub fn prefix_len(mask: &Address) -> u32 {
        let ones: u32 = mask.0.iter().map(|word| word.count_ones()).sum();
        Self::GATEWAY_BITS + ones
    }

    /// Returns true if a lookup for a connection to `gateway` from `peer` finds this key, which was put with
    /// `prefix_len` bits.
    #[must_use]
    pub fn matches(&self, prefix_len: u32, gateway: &Endpoint, peer: &Address) -> bool {
        let mask = Address::ANY_V6.mask(u8::try_from(prefix_len - Self::GATEWAY_BITS).unwrap_or(128));
        self.gateway == *gateway && peer.masked(&mask) == self.peer
    }
}

/// An override: the ends that such a connection presents to the service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NameOverride {
    /// The `gateway` of the entry's key, to detect a reused element: see [`Entry::key`].
    pub gateway: Endpoint,
    /// The endpoint that `getsockname()` returns. `getpeername()` returns its address.
    pub target: Endpoint,
}

/// Key of the datagrams of a UDP service that leave with a gateway as their source: those to a subnet. The
/// key is a longest-prefix match; it ends with the subnet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplySourceKey {
    /// The loopback address and port that the service is bound to.
    pub service: Endpoint,
    /// The network's subnet; in a lookup, the container's address.
    pub peer: Address,
}

impl ReplySourceKey {
    /// Length of the key in bits, as used in a lookup.
    pub const BITS: u32 = OverrideKey::BITS;

    /// Returns the number of bits that must match if the subnet has the netmask `mask`.
    #[must_use]
    pub fn prefix_len(mask: &Address) -> u32 {
        OverrideKey::prefix_len(mask)
    }
}

/// The source address with which a service's datagrams to a subnet leave.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReplySource {
    /// The `service` of the entry's key, to detect a reused element: see [`Entry::key`].
    pub service: Endpoint,
    /// The gateway that the containers dial. Unspecified for addresses of the host itself: datagrams to them
    /// are not changed.
    pub gateway: Address,
}

/// A guest: a network namespace whose localhost may lead to the host, with the host's bridges that it is
/// attached to. Its key is the namespace's cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RedirectedNetns {
    /// The entry's own key, to detect a reused element: see [`Entry::key`].
    pub netns: u64,
    /// Interface indices in the host's namespace, in lookup order; 0 marks an unused slot.
    pub bridges: [u32; BRIDGES],
}

/// Key of a redirect: an address and port of localhost that a process in a [`RedirectedNetns`] connects to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RedirectKey {
    /// The dialled address: `127.0.0.1` or `::1`.
    pub address: Address,
    /// The bridge's interface index.
    pub ifindex: u32,
    /// The dialled port, in host byte order.
    pub port: u16,
    /// The IP protocol: [`TCP`] or [`UDP`].
    pub protocol: u16,
    /// Cookie of the one network namespace that the redirect applies to; 0 for every guest on the bridge.
    pub netns: u64,
}

/// A redirect: the gateway that the dialled address leads to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Redirect {
    /// The entry's own key, to detect a reused element: see [`Entry::key`].
    pub key: RedirectKey,
    /// The network's gateway.
    pub gateway: Endpoint,
    /// Explicit padding, always 0.
    pub reserved: u32,
}

/// An event of a listener on a targeted port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerEvent {
    /// The kind of event: one of the constants below.
    pub kind: u32,
    /// The listener's port, in host byte order.
    pub port: u32,
    /// The kernel's reason for refusing to register the listener: a negative errno, as the helper returned
    /// it; otherwise 0.
    pub error: i32,
}

impl ListenerEvent {
    /// The socket has started to listen.
    pub const LISTENING: u32 = 1;
    /// The socket has started to listen, but the kernel refused to register it.
    pub const REFUSED: u32 = 2;
    /// The socket has stopped listening.
    pub const CLOSED: u32 = 3;
}

/// Index of an outcome in [`crate::symbols::COUNTERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// A connection was given to its listener.
    Steered = 0,
    /// An entry matched, but the source is outside its network's subnet: left alone.
    ForeignSource = 1,
    /// An entry matched, but no listener is registered for it: refused.
    NoListener = 2,
    /// An entry matched, but the kernel refused every listener: refused.
    AssignFailed = 3,
    /// A listener was registered.
    Registered = 4,
    /// The kernel refused to register a listener.
    RegisterRefused = 5,
    /// An entry matched, but it does not admit the source: left alone.
    NotListed = 6,
    /// No entry admits the packet, but lbridge's accept rule lets it through the firewall: refused.
    Denied = 7,
    /// A connection that is not steered would look local to the service: refused.
    LooksLocal = 8,
    /// A connection was given to a relay.
    Relayed = 9,
}

impl Counter {
    /// The number of counters.
    pub const COUNT: u32 = 10;
}

const _: () = {
    assert!(size_of::<EntryKey>() == 24 && align_of::<EntryKey>() == 4);
    assert!(size_of::<CountedEntry>() == 88 && align_of::<CountedEntry>() == 8);
    assert!(size_of::<ListenerKey>() == 20);
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<OverrideKey>() == 36 && align_of::<OverrideKey>() == 4);
    assert!(8 * size_of::<OverrideKey>() == OverrideKey::BITS as usize);
    assert!(size_of::<NameOverride>() == 40);
    assert!(size_of::<ReplySourceKey>() == 36 && align_of::<ReplySourceKey>() == 4);
    assert!(size_of::<ReplySource>() == 36);
    assert!(size_of::<SourceKey>() == 40);
    assert!(size_of::<AcceptedKey>() == 36 && align_of::<AcceptedKey>() == 4);
    assert!(8 * size_of::<AcceptedKey>() == AcceptedKey::BITS as usize);
    assert!(size_of::<TargetKey>() == 20);
    assert!(size_of::<RelayPeerKey>() == 40 && align_of::<RelayPeerKey>() == 4);
    assert!(size_of::<RelayPeer>() == 72 && align_of::<RelayPeer>() == 8);
    assert!(size_of::<ProberKey>() == 20);
    assert!(size_of::<RedirectedNetns>() == 24 && align_of::<RedirectedNetns>() == 8);
    assert!(size_of::<RedirectKey>() == 32 && align_of::<RedirectKey>() == 8);
    assert!(size_of::<Redirect>() == 56);
    assert!(size_of::<ListenerEvent>() == 12);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_keep_their_bytes() {
        assert_eq!(Address::from(ip("172.18.0.1")).v4_word().to_ne_bytes(), [172, 18, 0, 1]);
        for text in ["172.18.0.1", "fd00::1", "0.0.0.0", "::", "::1"] {
            assert_eq!(IpAddr::from(Address::from(ip(text))), ip(text), "{text}");
        }
    }

    #[test]
    fn loopback_and_unspecified() {
        for text in ["127.0.0.1", "127.255.3.4", "::1"] {
            assert!(Address::from(ip(text)).is_loopback(), "{text}");
        }
        for text in ["128.0.0.1", "0.0.0.1", "::2", "::", "0.0.0.0"] {
            assert!(!Address::from(ip(text)).is_loopback(), "{text}");
        }
        assert!(Address::ANY_V4.is_unspecified() && Address::ANY_V6.is_unspecified());
        assert!(!Address::from(ip("::1")).is_unspecified());
        assert!(!Address::from(ip("::ffff:0:0:0")).is_unspecified());
    }

    #[test]
    fn broadcast_addresses() {
        for (address, prefix, is_broadcast) in [
            ("172.18.255.255", 16, true),
            ("172.18.0.255", 24, true),
            ("172.18.0.255", 16, false),
            ("172.18.0.0", 16, false),
            ("172.18.0.1", 31, false),
            ("172.18.0.1", 32, false),
            ("fd00::ffff:ffff:ffff:ffff", 64, false),
        ] {
            let address = Address::from(ip(address));
            assert_eq!(address.is_broadcast(&address.mask(prefix)), is_broadcast, "{address:?}/{prefix}");
        }
    }

    #[test]
    fn masks() {
        let gateway = Address::from(ip("172.18.0.1"));
        assert_eq!(IpAddr::from(gateway.masked(&gateway.mask(16))), ip("172.18.0.0"));
        assert_eq!(gateway.masked(&gateway.mask(32)), gateway);
        assert_eq!(IpAddr::from(gateway.masked(&gateway.mask(0))), ip("0.0.0.0"));
        let v6 = Address::from(ip("fd00:1:2:3::1"));
        assert_eq!(IpAddr::from(v6.masked(&v6.mask(64))), ip("fd00:1:2:3::"));
        assert_eq!(v6.masked(&v6.mask(0)), Address::ANY_V6);
    }
}

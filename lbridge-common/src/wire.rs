//! Map keys and values. Fixed layout, no implicit padding, no `bool`, `Option` or enum: a stray padding byte is a
//! lookup that misses.
//!
//! Addresses are IPv6; IPv4 is v4-mapped (`::ffff:a.b.c.d`), so that one key serves both families. A v4-mapped address
//! in a real IPv6 packet never reaches a lookup: the kernel program leaves such packets alone.

use core::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Changes with every change of a layout below or of a map's meaning. Part of the pin directory's name, so that a
/// daemon never adopts maps that it would misread.
pub const ABI_VERSION: u32 = 3;

/// Most entries (interface, address, port, protocol) in force at a time.
pub const MAX_RULES: u32 = 131_072;
/// Most namespaces whose localhost leads to the host.
pub const MAX_GUESTS: u32 = 65_536;
/// Bridges of one namespace whose rules its localhost may lead to.
pub const BRIDGES: usize = 4;
/// Most relayed connections that are named at a time.
pub const MAX_RELAY_PEERS: u32 = 65_536;
/// Most addresses and ports whose listeners are registered: four for each port that a rule can lead to.
pub const MAX_TARGETS: u32 = 4 * 65_536;
/// Most registered listening sockets.
pub const MAX_LISTENERS: u32 = 65_536;
/// Sockets of one `SO_REUSEPORT` group that are registered, so that another takes over when one closes. Steering onto
/// any member spreads connections over the whole group: the kernel selects among all of its members.
pub const SLOTS: u8 = 4;

/// Most interfaces that the daemon probes from at a time.
pub const MAX_PROBERS: u32 = 4096;

/// Source port of the daemon's own SYNs and datagrams, with which it probes whether a firewall lets packets through. A packet
/// is a probe only if its source is in the map of probers, too: a container can choose any port.
///
/// SYNs are steered like any other, but not counted as connections. The arrival of a datagram is counted, and no service
/// gets it.
pub const PROBE_PORT: u16 = 1023;

/// `IPPROTO_TCP`, as keys hold it (include/uapi/linux/in.h).
pub const TCP: u8 = 6;
/// `IPPROTO_UDP`.
pub const UDP: u8 = 17;

const V4_MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// An IP address as four 32-bit words in network byte order, as the kernel's BPF contexts hold them.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// `0.0.0.0`.
    pub const ANY_V4: Self = Self::from_v4_word(0);
    /// `::`.
    pub const ANY_V6: Self = Self([0; 4]);

    /// From an IPv4 address in network byte order, as in `bpf_sk_lookup.local_ip4`.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, V4_MAPPED, word])
    }

    /// Whether this stands for an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == V4_MAPPED
    }

    /// The last word: all of an IPv4 address, in network byte order.
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.0[3]
    }

    /// `127.0.0.0/8` or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.0[3].to_ne_bytes()[0] == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && u32::from_be(self.0[3]) == 1
        }
    }

    /// `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.0[3] == 0 && self.0[0] == 0 && self.0[1] == 0 && (self.0[2] == 0 || self.0[2] == V4_MAPPED)
    }

    /// The netmask of `prefix` bits for the family that `self` belongs to; of an IPv4 prefix the 96 bits before it too.
    #[must_use]
    pub fn mask(&self, prefix: u8) -> Self {
        let bits = u32::from(prefix) + if self.is_v4() { 96 } else { 0 };
        let ones = u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
        Self::from(Ipv6Addr::from(ones))
    }

    /// Returns true if this is the broadcast address of an IPv4 subnet with that netmask. A /31 and a /32 have none (RFC 3021).
    #[inline(always)]
    pub const fn is_broadcast(&self, mask: &Self) -> bool {
        self.is_v4() && u32::from_be(!mask.0[3]) > 1 && self.0[3] | mask.0[3] == u32::MAX
    }

    /// The bits of `self` that are set in `mask`.
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

/// What a container dials, where the packet came in: the key of a rule.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleKey {
    /// The host's address on the bridge.
    pub gateway: Address,
    /// The bridge's interface index, 0 where the kernel program cannot check it.
    pub ifindex: u32,
    /// Dialled port, host byte order.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u16,
}

/// Where a rule leads, and from where it may be used.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RuleValue {
    /// The entry's own key. The kernel may reuse a removed element's memory at once, so a value that was looked up may
    /// have become another key's; whoever copies it compares.
    pub key: RuleKey,
    /// The network's subnet: source addresses outside of it are not served.
    pub subnet: Address,
    /// Netmask of `subnet`.
    pub mask: Address,
    /// The loopback address that the service listens on.
    pub target: Address,
    /// The service's port, host byte order. 0 leads to nobody: what the entry admits is refused, unless it goes to a relay.
    pub target_port: u16,
    /// Bits: [`RuleValue::LISTED`], [`RuleValue::RELAYED`].
    pub flags: u16,
    /// Always 0.
    pub reserved: [u16; 2],
    /// Connections steered since the entry was put. Added to by the kernel program.
    pub steered: u64,
}

impl RuleValue {
    /// Only sources that have a [`SourceKey`] may use the entry, not the whole subnet.
    pub const LISTED: u16 = 1;
    /// Connections go to the daemon's relay, whose listening socket has the entry's key in the map of relays.
    pub const RELAYED: u16 = 1 << 1;

    /// Returns true if both lead the same sources to the same place.
    pub fn leads_as(&self, other: &Self) -> bool {
        let comparable = |it: &Self| Self { steered: 0, ..*it };
        comparable(self) == comparable(other)
    }

    /// Returns true if all of `flags` are set.
    #[inline(always)]
    pub const fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// [`TCP`] or [`UDP`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "an IP protocol's number is a byte")]
    pub const fn protocol(&self) -> u8 {
        self.key.protocol as u8
    }
}

/// An address that may use a rule with [`RuleValue::LISTED`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceKey {
    /// The rule's key.
    pub rule: RuleKey,
    /// The container's address.
    pub source: Address,
}

/// What an accept rule of lbridge's lets through the host's firewall, by whichever interface: a rule names its bridge, and the
/// next bridge of that name has another index. Nothing of it may reach a service that no entry leads it to. The key of a
/// longest-prefix match: the rule's sources are its end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AcceptedKey {
    /// What is dialled.
    pub gateway: Address,
    /// Dialled port, host byte order.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u16,
    /// The first of the sources; in a lookup the packet's.
    pub source: Address,
}

impl AcceptedKey {
    /// All bits, as a lookup has them.
    pub const BITS: u32 = Self::DIALLED_BITS + 128;

    const DIALLED_BITS: u32 = 160;

    /// Bits that must be the same, where the netmask of the sources is this.
    #[must_use]
    pub fn prefix_len(mask: &Address) -> u32 {
        let ones: u32 = mask.0.iter().map(|word| word.count_ones()).sum();
        Self::DIALLED_BITS + ones
    }

    /// Returns true if a lookup with the key `packet` finds this one, where `prefix_len` bits must be the same.
    #[must_use]
    pub fn matches(&self, prefix_len: u32, packet: &Self) -> bool {
        let mask = Address::ANY_V6.mask(u8::try_from(prefix_len - Self::DIALLED_BITS).unwrap_or(128));
        *self == Self { source: packet.source.masked(&mask), ..*packet }
    }
}

/// The address a listener must be bound to for a rule to lead to it. Listeners at other addresses of the port are not registered:
/// any user of the host may listen on all of 127.0.0.0/8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetKey {
    /// Bound address: a loopback address, `0.0.0.0` or `::`.
    pub address: Address,
    /// Port, host byte order.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u16,
}

/// A registered listening socket of the host's network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerKey {
    /// Address it is bound to.
    pub address: Address,
    /// Port, host byte order.
    pub port: u16,
    /// Which of the group's registered sockets, below [`SLOTS`].
    pub slot: u8,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
}

/// An address and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Address.
    pub address: Address,
    /// Port, host byte order.
    pub port: u16,
    /// Always 0.
    pub reserved: u16,
}

impl Endpoint {
    /// From its two parts.
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> Self {
        Self { address, port, reserved: 0 }
    }
}

/// A relay's connection to a service, by both of its ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelayPeerKey {
    /// The relay's end. Another socket of the host may have the same address and port, connected to another service.
    pub relay: Endpoint,
    /// The service's end.
    pub service: Endpoint,
}

/// The client behind a relayed connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RelayPeer {
    /// The entry's own key: as [`RuleValue::key`].
    pub key: RelayPeerKey,
    /// Cookie of the relay's socket. The entry goes when that socket closes.
    pub cookie: u64,
    /// The container's end.
    pub container: Endpoint,
    /// Always 0.
    pub reserved: u32,
}

/// A source that the daemon sends probes from.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProberKey {
    /// Source address.
    pub source: Address,
    /// Ingress interface, 0 where the kernel program cannot check it.
    pub ifindex: u32,
}

/// `--source loopback`: connections to `gateway` from a subnet look as if they came from and to loopback. The key of a
/// longest-prefix match: the subnet is its end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ViewKey {
    /// What is dialled.
    pub gateway: Endpoint,
    /// The network's subnet; in a lookup the container.
    pub peer: Address,
}

impl ViewKey {
    /// All bits, as a lookup has them.
    pub const BITS: u32 = Self::GATEWAY_BITS + 128;

    const GATEWAY_BITS: u32 = 160;

    /// Bits that must be the same, where the subnet's mask is this.
    #[must_use]
    pub fn prefix_len(mask: &Address) -> u32 {
        let ones: u32 = mask.0.iter().map(|word| word.count_ones()).sum();
        Self::GATEWAY_BITS + ones
    }

    /// Whether a lookup for a connection to `gateway` from `peer` finds it, where `prefix_len` bits must be the same.
    #[must_use]
    pub fn matches(&self, prefix_len: u32, gateway: &Endpoint, peer: &Address) -> bool {
        let mask = Address::ANY_V6.mask(u8::try_from(prefix_len - Self::GATEWAY_BITS).unwrap_or(128));
        self.gateway == *gateway && peer.masked(&mask) == self.peer
    }
}

/// How such connections look.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoopbackView {
    /// The key's: as [`RuleValue::key`].
    pub gateway: Endpoint,
    /// What `getsockname()` answers, and whose address `getpeername()` does.
    pub target: Endpoint,
}

/// Which of a UDP service's datagrams leave with a gateway as their source: those to a subnet. The key of a longest-prefix
/// match: the subnet is its end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplyKey {
    /// Loopback address and port that the service is bound to.
    pub service: Endpoint,
    /// The network's subnet; in a lookup the container.
    pub peer: Address,
}

impl ReplyKey {
    /// All bits, as a lookup has them.
    pub const BITS: u32 = ViewKey::BITS;

    /// Bits that must be the same, where the subnet's mask is this.
    #[must_use]
    pub fn prefix_len(mask: &Address) -> u32 {
        ViewKey::prefix_len(mask)
    }
}

/// The source that they leave with.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reply {
    /// The key's: as [`RuleValue::key`].
    pub service: Endpoint,
    /// What the containers dial; unspecified for addresses of the host itself, to which nothing is changed.
    pub gateway: Address,
}

/// The bridges of the host that a network namespace is on, whose localhost may lead to the host. Its key is the
/// namespace's cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Guest {
    /// The entry's own key: as [`RuleValue::key`].
    pub netns: u64,
    /// Interface indices in the host's namespace, in the order in which they are asked; 0 for none.
    pub bridges: [u32; BRIDGES],
}

/// What a process in a [`Guest`] dials that leads to another address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DialKey {
    /// Address that is dialled: `127.0.0.1`, `::1`.
    pub address: Address,
    /// The bridge's interface index.
    pub ifindex: u32,
    /// Port that is dialled, host byte order.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u16,
    /// Cookie of the one namespace that this is for; 0 for all on the bridge.
    pub netns: u64,
}

/// Where that leads.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dial {
    /// The entry's own key: as [`RuleValue::key`].
    pub key: DialKey,
    /// The network's gateway.
    pub gateway: Endpoint,
    /// Always 0.
    pub reserved: u32,
}

/// What happened to a listener of a targeted port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerEvent {
    /// One of the constants below.
    pub kind: u32,
    /// Port, host byte order.
    pub port: u32,
    /// Why the kernel refused to register it: a negative errno, as the helper returned it; else 0.
    pub error: i32,
}

impl ListenerEvent {
    /// It listens now.
    pub const LISTENING: u32 = 1;
    /// It listens now; the kernel refused to register it.
    pub const REFUSED: u32 = 2;
    /// It listens no more.
    pub const CLOSED: u32 = 3;
}

/// Index of an outcome in the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// A connection was given to its listener.
    Steered = 0,
    /// An entry matched, the source is outside of its network's subnet: left alone.
    ForeignSource = 1,
    /// An entry matched, no listener is registered for it: refused.
    NoListener = 2,
    /// An entry matched, the kernel refused every listener: refused.
    AssignFailed = 3,
    /// A listener was registered.
    Registered = 4,
    /// The kernel refused to register a listener.
    RegisterRefused = 5,
    /// An entry matched, which does not admit the source: left alone.
    NotListed = 6,
    /// No entry admits the packet, and lbridge's accept rule lets it through the firewall: refused.
    Denied = 7,
    /// A connection that nobody steers would look local to the service: refused.
    LooksLocal = 8,
    /// A connection was given to a relay.
    Relayed = 9,
}

impl Counter {
    /// Number of counters.
    pub const COUNT: u32 = 10;
}

const _: () = {
    assert!(size_of::<RuleKey>() == 24 && align_of::<RuleKey>() == 4);
    assert!(size_of::<RuleValue>() == 88 && align_of::<RuleValue>() == 8);
    assert!(size_of::<ListenerKey>() == 20);
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<ViewKey>() == 36 && align_of::<ViewKey>() == 4);
    assert!(8 * size_of::<ViewKey>() == ViewKey::BITS as usize);
    assert!(size_of::<LoopbackView>() == 40);
    assert!(size_of::<ReplyKey>() == 36 && align_of::<ReplyKey>() == 4);
    assert!(size_of::<Reply>() == 36);
    assert!(size_of::<SourceKey>() == 40);
    assert!(size_of::<AcceptedKey>() == 36 && align_of::<AcceptedKey>() == 4);
    assert!(8 * size_of::<AcceptedKey>() == AcceptedKey::BITS as usize);
    assert!(size_of::<TargetKey>() == 20);
    assert!(size_of::<RelayPeerKey>() == 40 && align_of::<RelayPeerKey>() == 4);
    assert!(size_of::<RelayPeer>() == 72 && align_of::<RelayPeer>() == 8);
    assert!(size_of::<ProberKey>() == 20);
    assert!(size_of::<Guest>() == 24 && align_of::<Guest>() == 8);
    assert!(size_of::<DialKey>() == 32 && align_of::<DialKey>() == 8);
    assert!(size_of::<Dial>() == 56);
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

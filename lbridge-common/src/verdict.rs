//! verdict: decides whether a connection is steered, and to which registered listener. Pure. The kernel
//! program runs all of it, and `lbridge explain` runs the same code over a copy of the maps.

use crate::wire::{Address, Endpoint, Entry, ListenerKey, SLOTS, TCP};

/// The verdict on a packet that no socket has claimed yet: a SYN, or a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No entry matches, or the host itself sent the packet: the kernel's own lookup continues as it would
    /// without lbridge.
    NotOurs,
    /// An entry matches, but the source is outside its subnet: passes like [`Verdict::NotOurs`], and is
    /// counted.
    ForeignSource,
    /// An entry matches and the source is in its subnet, but the entry does not admit it: passes, and is
    /// counted.
    NotListed,
    /// The packet would pass, but lbridge's accept rule lets it through the firewall. It may have arrived
    /// only because of that rule, so it is refused.
    Denied,
    /// The packet would pass, but the service that takes the connection would see a local peer (`--source
    /// loopback`): refused.
    LooksLocal,
    /// The packet is one of the daemon's own probe datagrams: counted for the daemon, and dropped.
    Probe,
    /// The packet goes to the relay whose listening socket has the entry's key. If there is none, it is
    /// refused.
    Relay,
    /// The packet goes to the first of [`first_candidate`]'s keys that is registered and that the kernel
    /// accepts. If there is none, it is refused: letting it pass could hand it to another service that
    /// listens on every address.
    Steer,
}

/// The map lookups of the decision. Each is made at most once, and only where its answer matters.
pub trait Lookups {
    /// Returns true if the daemon sent the packet itself, to probe the firewall.
    fn is_probe(&self) -> bool;
    /// Returns true if the entry lists the packet's source.
    fn is_listed(&self) -> bool;
    /// Returns true if one of lbridge's accept rules covers the packet's source, address and port, regardless
    /// of the ingress interface.
    fn is_accepted(&self) -> bool;
    /// Returns true if the name hooks would present a connection with these ends as a local one.
    fn looks_local(&self) -> bool;
}

/// Decides on a packet from `source` to `dialled`. `entry` is the result of the lookup of (ingress interface,
/// address, port, protocol).
#[inline(always)]
pub fn decide(
    entry: Option<&Entry>,
    source: &Address,
    dialled: &Endpoint,
    protocol: u8,
    lookups: &impl Lookups,
) -> Verdict {
    // The host sent it: for a local destination the kernel reports the interface that has the address, not
    // `lo`.
    if *source == dialled.address {
        return Verdict::NotOurs;
    }
    // Checked even if there is no entry: the daemon probes the firewall before a rule is served.
    if protocol != TCP && lookups.is_probe() {
        return Verdict::Probe;
    }
    let passes = match entry {
        None => Verdict::NotOurs,
        Some(entry) if source.masked(&entry.mask) != entry.subnet => Verdict::ForeignSource,
        Some(entry) if admits(entry, source, lookups) => {
            return if entry.has(Entry::RELAYED) { Verdict::Relay } else { Verdict::Steer };
        }
        Some(_) => Verdict::NotListed,
    };
    // Checked whatever the interface: the accept rule's bridge may have another index since the entry was
    // put.
    if lookups.is_accepted() {
        return Verdict::Denied;
    }
    // When a connection is established, `sock_ops` does not know the interface. A container on another bridge
    // that uses an address of this network would look local to any service that listens on every address.
    if protocol == TCP && lookups.looks_local() { Verdict::LooksLocal } else { passes }
}

/// Returns true if a source of the entry's subnet may use it.
#[inline(always)]
fn admits(entry: &Entry, source: &Address, lookups: &impl Lookups) -> bool {
    !source.is_broadcast(&entry.mask) && (!entry.has(Entry::LISTED) || lookups.is_listed())
}

/// Lists the bound addresses of the listeners that serve `target`, best first: the loopback address itself,
/// then the wildcards. An IPv4 connection may go to a dual-stack `[::]`; the kernel refuses it if the socket
/// is v6-only.
pub fn listening_addresses(target: &Address) -> impl Iterator<Item = Address> {
    let addresses = [Some(*target), target.is_v4().then_some(Address::ANY_V4), Some(Address::ANY_V6)];
    addresses.into_iter().flatten()
}

/// Calls `attempt` with each key under which a listener for (`target`, `port`) may be registered, best first,
/// until it returns `Some`.
///
/// The attempts are written out instead of looped: before Linux 6.3 the verifier rejects a loop whose head
/// follows a helper call ("back-edge from insn 302 to 303").
#[inline(always)]
pub fn first_candidate<R>(
    target: &Address,
    port: u16,
    protocol: u8,
    mut attempt: impl FnMut(ListenerKey) -> Option<R>,
) -> Option<R> {
    const _: () = assert!(SLOTS == 4, "as many slots as are written out below");
    macro_rules! attempts {
        ($address:expr; $($slot:literal)+) => {
            $(
                if let Some(done) = attempt(ListenerKey { address: $address, port, slot: $slot, protocol }) {
                    return Some(done);
                }
            )+
        };
    }
    attempts!(*target; 0 1 2 3);
    if target.is_v4() {
        attempts!(Address::ANY_V4; 0 1 2 3);
    }
    attempts!(Address::ANY_V6; 0 1 2 3);
    None
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;
    use crate::wire::{EntryKey, UDP};

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn rule(gateway: &str, prefix: u8) -> Entry {
        let gateway = address(gateway);
        let mask = gateway.mask(prefix);
        Entry {
            key: EntryKey { gateway, ifindex: 1, port: 80, protocol: TCP.into() },
            subnet: gateway.masked(&mask),
            mask,
            target: address("127.0.0.1"),
            target_port: 80,
            flags: 0,
            reserved: [0; 2],
        }
    }

    /// Answers of the maps; `None` where the decision must not make the lookup.
    #[derive(Clone, Copy, Default)]
    struct Answers {
        probe: Option<bool>,
        listed: Option<bool>,
        accepted: Option<bool>,
        local: Option<bool>,
    }

    impl Lookups for Answers {
        fn is_probe(&self) -> bool {
            self.probe.expect("asked whether it is a probe")
        }

        fn is_listed(&self) -> bool {
            self.listed.expect("asked whether it is listed")
        }

        fn is_accepted(&self) -> bool {
            self.accepted.expect("asked whether it is accepted")
        }

        fn looks_local(&self) -> bool {
            self.local.expect("asked whether it looks local")
        }
    }

    /// Decides on a SYN to the entry's gateway, or to 172.18.0.1 if there is no entry.
    fn syn(entry: Option<&Entry>, source: &str, answers: Answers) -> Verdict {
        let gateway = entry.map_or(address("172.18.0.1"), |entry| entry.key.gateway);
        decide(entry, &address(source), &Endpoint::new(gateway, 80), TCP, &answers)
    }

    const UNASKED: Answers = Answers { probe: None, listed: None, accepted: None, local: None };
    const NOBODY: Answers = Answers { accepted: Some(false), local: Some(false), ..UNASKED };
    const ACCEPTED: Answers = Answers { accepted: Some(true), ..UNASKED };

    #[test]
    fn the_subnet_decides() {
        let v4 = rule("172.18.0.1", 16);
        assert_eq!(syn(None, "172.18.0.2", NOBODY), Verdict::NotOurs);
        assert_eq!(syn(Some(&v4), "172.18.255.254", UNASKED), Verdict::Steer);
        assert_eq!(syn(Some(&v4), "172.18.0.1", UNASKED), Verdict::NotOurs, "the host itself");
        for foreign in ["172.19.0.2", "127.0.0.1", "fd00::2", "::"] {
            assert_eq!(syn(Some(&v4), foreign, NOBODY), Verdict::ForeignSource, "{foreign}");
        }
        let v6 = rule("fd00::1", 64);
        assert_eq!(syn(Some(&v6), "fd00::2", UNASKED), Verdict::Steer);
        assert_eq!(syn(Some(&v6), "fd01::2", NOBODY), Verdict::ForeignSource);
        assert_eq!(syn(Some(&v6), "172.18.0.2", NOBODY), Verdict::ForeignSource);
    }

    #[test]
    fn a_list_decides_within_the_subnet() {
        let (web, other) =
            (Answers { listed: Some(true), ..UNASKED }, Answers { listed: Some(false), ..NOBODY });
        for (flags, admitted) in [(0, Verdict::Steer), (Entry::RELAYED, Verdict::Relay)] {
            let entry = Entry { flags: flags | Entry::LISTED, ..rule("172.18.0.1", 16) };
            assert_eq!(syn(Some(&entry), "172.18.0.2", web), admitted, "{flags:#b}");
            assert_eq!(syn(Some(&entry), "172.18.0.3", other), Verdict::NotListed, "{flags:#b}");
            assert_eq!(syn(Some(&entry), "172.19.0.2", NOBODY), Verdict::ForeignSource, "{flags:#b}");
            assert_eq!(syn(Some(&entry), "172.18.0.1", UNASKED), Verdict::NotOurs, "the host itself");
        }
    }

    #[test]
    fn what_an_accept_rule_lets_in_must_not_pass() {
        let open = rule("172.18.0.1", 16);
        let listed = Entry { flags: Entry::LISTED, ..open };
        let other = Answers { listed: Some(false), ..ACCEPTED };
        assert_eq!(syn(None, "172.18.0.2", ACCEPTED), Verdict::Denied, "by another interface, or unserved");
        assert_eq!(syn(Some(&listed), "172.18.0.2", other), Verdict::Denied);
        assert_eq!(syn(Some(&open), "172.18.255.255", ACCEPTED), Verdict::Denied, "a broadcast address");
        assert_eq!(syn(Some(&open), "172.19.0.2", ACCEPTED), Verdict::Denied, "of an older accept rule");
        assert_eq!(syn(Some(&open), "172.18.0.2", UNASKED), Verdict::Steer, "admitted");
        assert_eq!(syn(None, "172.18.0.1", UNASKED), Verdict::NotOurs, "the host itself");
    }

    #[test]
    fn a_broadcast_address_is_no_source() {
        assert_eq!(syn(Some(&rule("172.18.0.1", 16)), "172.18.255.255", NOBODY), Verdict::NotListed);
    }

    #[test]
    fn what_passes_must_not_look_local() {
        let local = Answers { local: Some(true), listed: Some(false), ..NOBODY };
        let listed = Entry { flags: Entry::LISTED, ..rule("172.18.0.1", 16) };
        assert_eq!(syn(None, "172.18.0.2", local), Verdict::LooksLocal);
        assert_eq!(syn(Some(&listed), "172.18.0.2", local), Verdict::LooksLocal);
        assert_eq!(syn(Some(&listed), "172.19.0.2", local), Verdict::LooksLocal);
        assert_eq!(syn(None, "172.18.0.1", UNASKED), Verdict::NotOurs, "the host itself");
    }

    #[test]
    fn only_datagrams_are_probes_that_no_service_gets() {
        let entry = rule("172.18.0.1", 16);
        let gateway = Endpoint::new(entry.key.gateway, 80);
        let probe = Answers { probe: Some(true), ..UNASKED };
        let other = Answers { probe: Some(false), accepted: Some(false), ..UNASKED };
        let source = address("172.18.0.2");
        assert_eq!(decide(Some(&entry), &source, &gateway, UDP, &probe), Verdict::Probe);
        assert_eq!(decide(None, &source, &gateway, UDP, &probe), Verdict::Probe);
        assert_eq!(decide(Some(&entry), &source, &gateway, UDP, &other), Verdict::Steer);
        assert_eq!(decide(None, &source, &gateway, UDP, &other), Verdict::NotOurs);
    }

    #[test]
    fn the_loopback_address_comes_before_the_wildcards() {
        let all = |target: &str| {
            let mut keys = vec![];
            first_candidate::<()>(&address(target), 80, TCP, |key| {
                keys.push((IpAddr::from(key.address), key.slot));
                None
            });
            keys
        };
        let keys = all("127.0.0.1");
        assert_eq!(keys.len(), 12);
        assert_eq!(keys[0], ("127.0.0.1".parse().unwrap(), 0));
        assert_eq!(keys[4], ("0.0.0.0".parse().unwrap(), 0));
        assert_eq!(keys[11], ("::".parse().unwrap(), 3));
        assert_eq!(all("::1").len(), 8);
        for target in ["127.0.0.1", "::1"] {
            let mut addresses: Vec<_> = all(target).into_iter().map(|(address, _)| address).collect();
            addresses.dedup();
            assert!(listening_addresses(&address(target)).map(IpAddr::from).eq(addresses), "{target}");
        }
        let second = first_candidate(&address("::1"), 80, TCP, |key| (key.slot == 1).then_some(key.port));
        assert_eq!(second, Some(80));
    }
}

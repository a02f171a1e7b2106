//! The decision: which connection is steered, and to which registered listener. Pure. The kernel program runs all of
//! it; the planner asks for the same addresses and keys, so that it agrees on what would be found.

use crate::wire::{Address, ListenerKey, RuleValue, SLOTS};

/// What becomes of a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No rule: the kernel goes on as if lbridge were not there.
    NotOurs,
    /// A rule, but the source is outside of the rule's subnet, or none of those that it is for: as [`Verdict::NotOurs`], and
    /// counted.
    ForeignSource,
    /// To be given to the first of [`first_candidate`]'s keys that is registered and that the kernel takes. None: refused, since
    /// letting it pass could hand it to another service that listens on every address.
    Steer,
}

/// Decides on a connection from `source` for which the lookup of (ingress interface, gateway, port) gave `rule`. Whether the
/// rule lists the source is asked only where it matters.
#[inline(always)]
pub fn decide(rule: Option<&RuleValue>, source: &Address, listed: impl FnOnce() -> bool) -> Verdict {
    match rule {
        None => Verdict::NotOurs,
        // The host itself: for a local destination the kernel names the interface that has the address, not `lo`.
        Some(rule) if *source == rule.key.gateway => Verdict::NotOurs,
        Some(rule) if source.masked(&rule.mask) != rule.subnet => Verdict::ForeignSource,
        Some(rule) if rule.flags & RuleValue::LISTED != 0 && !listed() => Verdict::ForeignSource,
        Some(_) => Verdict::Steer,
    }
}

/// Bound addresses of the listeners that serve `target`, best first: the loopback address itself, then the wildcards.
/// An IPv4 connection may be given to a dual-stack `[::]`; the kernel refuses it where the socket is v6-only.
pub fn listening_addresses(target: &Address) -> impl Iterator<Item = Address> {
    let addresses = [Some(*target), target.is_v4().then_some(Address::ANY_V4), Some(Address::ANY_V6)];
    addresses.into_iter().flatten()
}

/// Offers `attempt` the keys under which a listener for (`target`, `port`) may be registered, best first, until it
/// returns something.
///
/// Written out, not a loop: before Linux 6.3 the verifier takes no loop whose head follows a helper's call ("back-edge
/// from insn 302 to 303").
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
    use crate::wire::{RuleKey, TCP};

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn rule(gateway: &str, prefix: u8) -> RuleValue {
        let gateway = address(gateway);
        let mask = gateway.mask(prefix);
        RuleValue {
            key: RuleKey { gateway, ifindex: 1, port: 80, protocol: TCP.into() },
            subnet: gateway.masked(&mask),
            mask,
            target: address("127.0.0.1"),
            target_port: 80,
            flags: 0,
            reserved: [0; 2],
            steered: 0,
        }
    }

    #[test]
    fn the_subnet_decides() {
        let decide = |rule: Option<&RuleValue>, source: &Address| decide(rule, source, || unreachable!());
        let v4 = rule("172.18.0.1", 16);
        assert_eq!(decide(None, &address("172.18.0.2")), Verdict::NotOurs);
        assert_eq!(decide(Some(&v4), &address("172.18.255.255")), Verdict::Steer);
        assert_eq!(decide(Some(&v4), &address("172.18.0.1")), Verdict::NotOurs, "the host itself");
        for foreign in ["172.19.0.2", "127.0.0.1", "fd00::2", "::"] {
            assert_eq!(decide(Some(&v4), &address(foreign)), Verdict::ForeignSource, "{foreign}");
        }
        let v6 = rule("fd00::1", 64);
        assert_eq!(decide(Some(&v6), &address("fd00::2")), Verdict::Steer);
        assert_eq!(decide(Some(&v6), &address("fd01::2")), Verdict::ForeignSource);
        assert_eq!(decide(Some(&v6), &address("172.18.0.2")), Verdict::ForeignSource);
    }

    #[test]
    fn a_list_decides_within_the_subnet() {
        let listed = RuleValue { flags: RuleValue::LISTED, ..rule("172.18.0.1", 16) };
        assert_eq!(decide(Some(&listed), &address("172.18.0.2"), || true), Verdict::Steer);
        assert_eq!(decide(Some(&listed), &address("172.18.0.3"), || false), Verdict::ForeignSource);
        assert_eq!(decide(Some(&listed), &address("172.19.0.2"), || true), Verdict::ForeignSource);
        assert_eq!(
            decide(Some(&listed), &address("172.18.0.1"), || true),
            Verdict::NotOurs,
            "the host itself"
        );
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

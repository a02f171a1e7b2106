//! Free addresses: picks unused ones in a bridge's subnet, in the subnets reserved for documentation, and for
//! the links themselves (MAC addresses).

use std::{
    collections::BTreeSet,
    hash::{BuildHasher as _, DefaultHasher, Hash as _, Hasher as _, RandomState},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::anyhow;

use super::netlink::{Neighbour, Netlink, forget};

/// The most addresses of a subnet that are probed, one after the other.
const MAX_LOOKS: usize = 64;

/// Returns an address of a gateway's subnet that nobody seems to use on that bridge; `None` if none is found.
/// Docker assigns addresses from the bottom, so the search begins at the top. An address counts as used if it
/// is in `taken`, if the host has it, or if a neighbour answers for it now. The host asks for it by ARP or
/// neighbour discovery, as it would before it sends there.
pub async fn free_address(
    bridge: u32,
    gateway: IpAddr,
    prefix: u8,
    taken: &[IpAddr],
) -> anyhow::Result<Option<IpAddr>> {
    let host = Netlink::connect()?;
    let mut used: BTreeSet<_> = host.addresses().await?.into_iter().map(|(_, ip, _)| ip).collect();
    used.extend(taken);
    used.insert(gateway);
    for neighbour in host.neighbours(bridge).await?.into_iter().filter(Neighbour::is_there) {
        if neighbour.mac == mac(neighbour.ip) {
            // An address of ours that a killed process left behind, or one in use, which will answer.
            let _ = forget(bridge, neighbour.ip);
        } else {
            used.insert(neighbour.ip);
        }
    }
    for candidate in candidates(gateway, prefix).filter(|ip| !used.contains(ip)).take(MAX_LOOKS) {
        if !host.answers(bridge, candidate).await? {
            return Ok(Some(candidate));
        }
    }
    Ok(None)
}

/// Iterates over the host addresses of a subnet, from the top.
fn candidates(gateway: IpAddr, prefix: u8) -> impl Iterator<Item = IpAddr> {
    let (bits, number): (u8, u128) = match gateway {
        IpAddr::V4(ip) => (32, u32::from(ip).into()),
        IpAddr::V6(ip) => (128, ip.into()),
    };
    let size = bits.saturating_sub(prefix);
    let last = 1_u128.checked_shl(size.into()).unwrap_or(0).wrapping_sub(1);
    let base = number & !last;
    // Skipped: the first, which is the network's (the routers' in IPv6), and the last, the broadcast address.
    // IPv6 reserves the last 128 for anycast (RFC 2526).
    let top = if gateway.is_ipv6() && size > 8 { last - 128 } else { last.saturating_sub(1) };
    (1..=top).rev().map(move |offset| match gateway {
        IpAddr::V4(_) => Ipv4Addr::from(u32::try_from(base | offset).unwrap_or_default()).into(),
        IpAddr::V6(_) => Ipv6Addr::from(base | offset).into(),
    })
}

/// Picks a /30 and a /126 of the ranges reserved for documentation that overlap with no subnet in `used`, and
/// returns the first address of each, as numbers.
pub(super) fn unused_subnets(used: &[(IpAddr, u8)]) -> anyhow::Result<(u32, u128)> {
    // TEST-NET-1, 2 and 3.
    const TEST_NETS: [Ipv4Addr; 3] =
        [Ipv4Addr::new(192, 0, 2, 0), Ipv4Addr::new(198, 51, 100, 0), Ipv4Addr::new(203, 0, 113, 0)];
    const DOCUMENTATION: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0);
    let overlaps = |first: IpAddr, length: u8| {
        used.iter().any(|(ip, prefix)| {
            let (a, b, bits): (u128, u128, u8) = match (first, ip) {
                (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a).into(), u32::from(*b).into(), 32),
                (IpAddr::V6(a), IpAddr::V6(b)) => (a.into(), (*b).into(), 128),
                _ => return false,
            };
            let common = bits.saturating_sub(length.min(*prefix));
            a.checked_shr(common.into()).unwrap_or(0) == b.checked_shr(common.into()).unwrap_or(0)
        })
    };
    let random = random();
    // Start at a random place: another process may be doing the same now.
    let start = u32::try_from(random % 64).unwrap_or(0);
    let v4 = TEST_NETS
        .into_iter()
        .flat_map(|net| (0..64).map(move |n| u32::from(net) + ((start + n) % 64) * 4))
        .find(|first| !overlaps(Ipv4Addr::from(*first).into(), 30))
        .ok_or_else(|| anyhow!("the host has addresses in all of TEST-NET-1, 2 and 3"))?;
    let v6 = (0..64)
        .map(|n| u128::from(DOCUMENTATION) | (u128::from(random.wrapping_add(n)) << 32))
        .find(|first| !overlaps(Ipv6Addr::from(*first).into(), 126));
    Ok((v4, v6.unwrap_or(DOCUMENTATION.into())))
}

/// Returns a random number, which is not secret, only unlikely to be in use elsewhere.
pub(super) fn random() -> u64 {
    RandomState::new().hash_one(())
}

/// Derives the MAC address of the veth inside from its IP address. It is locally administered, as the second
/// bit of the first byte says.
pub(super) fn mac(ip: IpAddr) -> Vec<u8> {
    // `DefaultHasher::new` has no random keys, so the result is always the same.
    let mut hasher = DefaultHasher::new();
    ip.hash(&mut hasher);
    mac_of(0x02, hasher.finish())
}

/// Makes the MAC address of the host's veth, a high one. A bridge takes the lowest MAC address of its ports
/// as its own, unless it was given one. If this one were the lowest, the bridge would change its address and
/// change it back, and containers would send to the wrong address in the meantime.
pub(super) fn host_mac(random: u64) -> Vec<u8> {
    let [.., a, b, c] = random.to_be_bytes();
    vec![0xfe, 0xff, 0xff, a, b, c]
}

fn mac_of(first: u8, rest: u64) -> Vec<u8> {
    [&[first], &rest.to_be_bytes()[..5]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(gateway: &str, prefix: u8) -> Vec<String> {
        candidates(gateway.parse().unwrap(), prefix).take(2).map(|ip| ip.to_string()).collect()
    }

    #[test]
    fn the_search_begins_at_the_top_of_the_subnet() {
        assert_eq!(first("10.7.0.1", 24), ["10.7.0.254", "10.7.0.253"]);
        assert_eq!(first("172.18.0.1", 16), ["172.18.255.254", "172.18.255.253"]);
        assert_eq!(first("10.0.0.1", 0), ["255.255.255.254", "255.255.255.253"]);
        assert_eq!(first("10.7.0.1", 30), ["10.7.0.2", "10.7.0.1"]);
        assert_eq!(first("fd07::1", 64), ["fd07::ffff:ffff:ffff:ff7f", "fd07::ffff:ffff:ffff:ff7e"]);
        assert_eq!(first("fd07::1", 126), ["fd07::2", "fd07::1"]);
    }

    #[test]
    fn the_smallest_subnets_have_no_room() {
        assert!(candidates("10.7.0.1".parse().unwrap(), 30).nth(2).is_none());
        for (gateway, prefix) in [("10.7.0.1", 31), ("10.7.0.1", 32), ("fd07::1", 127), ("fd07::1", 128)] {
            assert!(first(gateway, prefix).is_empty(), "{gateway}/{prefix}");
        }
    }

    #[test]
    fn the_lan_has_a_subnet_of_its_own() {
        let used = [("192.0.2.7".parse().unwrap(), 24), ("198.51.0.1".parse().unwrap(), 16)];
        for _ in 0..100 {
            let (v4, v6) = unused_subnets(&used).unwrap();
            assert!(Ipv4Addr::from(v4).to_string().starts_with("203.0.113."), "{v4:x}");
            assert_eq!(v4 % 4, 0);
            assert!(Ipv6Addr::from(v6).to_string().starts_with("2001:db8:"), "{v6:x}");
        }
        assert!(unused_subnets(&[("1.2.3.4".parse().unwrap(), 0)]).is_err());
    }

    #[test]
    fn the_hosts_end_never_lends_a_bridge_its_address() {
        assert_eq!(host_mac(0x0102_0304_0506_0708), [0xfe, 0xff, 0xff, 6, 7, 8]);
    }
}

//! The relay: carries what the kernel cannot steer. Imports planning.
//!
//! - [`set`]: which relays are open;
//! - [`listener`]: one of them: accepts, checks, connects;
//! - [`splice`]: moves the bytes of one connection.

pub mod listener;
pub mod set;
mod splice;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Tells the service who is behind a relayed connection, where the kernel can (name hooks).
pub trait PeerNames: Send + Sync + std::fmt::Debug {
    /// From now on the service sees `container` where it would see `relay_end`.
    fn present(&self, relay_end: SocketAddr, container: SocketAddr) -> anyhow::Result<()>;
    /// The connection is over.
    fn forget(&self, relay_end: SocketAddr);
}

/// The loopback address that a relay connects from in a container's stead: one of 127.128.0.0/9, by the container's
/// address, never one that a service trusts as 127.0.0.1.
pub fn stand_in(container: IpAddr) -> Ipv4Addr {
    let [a, b, c] = match container.to_canonical() {
        IpAddr::V4(ip) => [ip.octets()[1], ip.octets()[2], ip.octets()[3]],
        // The interface identifier's end is what differs within a network.
        IpAddr::V6(ip) => [ip.octets()[13], ip.octets()[14], ip.octets()[15]],
    };
    // 127.255.255.255 is the broadcast address of 127/8, and cannot be bound.
    let c = if (a | 0x80, b, c) == (255, 255, 255) { 254 } else { c };
    Ipv4Addr::new(127, a | 0x80, b, c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stand_in_is_never_localhost() {
        for (container, stands_in) in [
            ("172.18.0.2", "127.146.0.2"),
            ("10.0.0.1", "127.128.0.1"),
            ("10.255.255.255", "127.255.255.254"),
            ("::ffff:10.1.2.3", "127.129.2.3"),
            ("fd00::aa:1:203", "127.129.2.3"),
        ] {
            assert_eq!(stand_in(container.parse().unwrap()).to_string(), stands_in, "{container}");
        }
    }
}

//! lab: a host in a network namespace, with bridges, containers on them, and a LAN on another link.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use super::netns::NetNs;

/// A host and everything attached to it. It is removed, with all its links, when the last handle on its
/// namespaces is dropped.
#[derive(Debug)]
pub struct Lab {
    host: NetNs,
    links: AtomicU32,
}

/// A bridge of the host.
#[derive(Clone, Debug)]
pub struct Bridge {
    name: String,
    addresses: Vec<Prefix>,
}

/// An address with its prefix length: `10.7.0.1/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    address: IpAddr,
    length: u8,
}

/// Parses addresses separated by blanks: `10.7.0.1/24 fd07::1/64`.
fn prefixes(text: &str) -> Result<Vec<Prefix>> {
    text.split_whitespace()
        .map(|word| {
            let (address, length) =
                word.split_once('/').with_context(|| format!("{word}: no prefix length"))?;
            Ok(Prefix { address: address.parse()?, length: length.parse()? })
        })
        .collect()
}

impl Prefix {
    /// Returns the next address of the same network.
    fn next(self) -> Prefix {
        let address = match self.address {
            IpAddr::V4(address) => IpAddr::V4((u32::from(address) + 1).into()),
            IpAddr::V6(address) => IpAddr::V6((u128::from(address) + 1).into()),
        };
        Prefix { address, ..self }
    }

    fn assign(self, netns: &NetNs, link: &str) -> Result<()> {
        // Duplicate address detection would keep an IPv6 address unusable for a second or two.
        let nodad = if self.address.is_ipv6() { "nodad" } else { "" };
        netns.ip(&format!("addr add {}/{} dev {link} {nodad}", self.address, self.length))
    }
}

impl Bridge {
    /// Returns the interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the network in the form that lbridge's commands take.
    pub fn network(&self) -> String {
        format!("bridge:{}", self.name)
    }

    /// Returns the first address, which containers dial.
    pub fn gateway(&self) -> IpAddr {
        self.addresses[0].address
    }
}

impl Lab {
    /// Creates a host in a new namespace that forwards packets and drops none.
    pub fn new() -> Result<Lab> {
        let host = NetNs::new()?;
        host.sysctl("net/ipv4/ip_forward", "1")?;
        host.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        // A reverse path filter would drop some attacks before they reach lbridge.
        host.sysctl("net/ipv4/conf/all/rp_filter", "0")?;
        host.sysctl("net/ipv4/conf/default/rp_filter", "0")?;
        Ok(Lab::with_host(host))
    }

    /// Creates a lab around an existing namespace, and leaves its settings unchanged.
    pub fn with_host(host: NetNs) -> Lab {
        Lab { host, links: AtomicU32::new(0) }
    }

    /// Returns the host's network namespace.
    pub fn host(&self) -> &NetNs {
        &self.host
    }

    /// Adds a bridge; its addresses are separated by blanks (`10.7.0.1/24 fd07::1/64`).
    pub fn add_bridge(&self, name: &str, addresses: &str) -> Result<Bridge> {
        let bridge = Bridge { name: name.to_owned(), addresses: prefixes(addresses)? };
        self.host.ip(&format!("link add {name} type bridge"))?;
        for prefix in &bridge.addresses {
            prefix.assign(&self.host, name)?;
        }
        self.host.ip(&format!("link set {name} up"))?;
        Ok(bridge)
    }

    /// Attaches a container to a bridge: a namespace with `eth0`, and default routes to the bridge's
    /// addresses.
    pub fn container(&self, bridge: &Bridge, addresses: &str) -> Result<NetNs> {
        let netns = NetNs::new()?;
        let host_end = self.plug(&netns, &prefixes(addresses)?)?;
        self.host.ip(&format!("link set {host_end} master {}", bridge.name))?;
        for prefix in &bridge.addresses {
            default_route(&netns, prefix.address)?;
        }
        Ok(netns)
    }

    /// Adds a LAN on a link of its own, and returns the LAN host. The host has the given addresses there; the
    /// LAN host has the ones that follow them. It sends everything through the host, even packets for a
    /// bridge's gateway.
    pub fn lan(&self, host_addresses: &str) -> Result<NetNs> {
        let netns = NetNs::new()?;
        let hosts = prefixes(host_addresses)?;
        let host_end = self.plug(&netns, &hosts.iter().map(|prefix| prefix.next()).collect::<Vec<_>>())?;
        for prefix in &hosts {
            prefix.assign(&self.host, &host_end)?;
            default_route(&netns, prefix.address)?;
        }
        Ok(netns)
    }

    /// Connects `netns` to the host through its `eth0`; returns the name of the host's end.
    fn plug(&self, netns: &NetNs, addresses: &[Prefix]) -> Result<String> {
        let host_end = format!("veth{}", self.links.fetch_add(1, Ordering::Relaxed));
        // The other end is moved through a descriptor of this process, since the namespace has no name.
        let pid = std::process::id();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(netns));
        self.host.ip(&format!("link add {host_end} type veth peer name eth0 netns /proc/{pid}/fd/{fd}"))?;
        for prefix in addresses {
            prefix.assign(netns, "eth0")?;
        }
        netns.ip("link set eth0 up")?;
        self.host.ip(&format!("link set {host_end} up"))?;
        Ok(host_end)
    }
}

fn default_route(netns: &NetNs, gateway: IpAddr) -> Result<()> {
    let family = if gateway.is_ipv6() { "-6" } else { "-4" };
    // onlink: the address of a bridge need not be in the container's own subnet.
    netns.ip(&format!("{family} route replace default via {gateway} dev eth0 onlink"))
}

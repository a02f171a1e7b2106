//! Scratch namespaces: throw-away network namespaces of this process, each linked to the host by a veth pair.
//! One acts as a guest on a bridge, or as a neighbour on a link of its own, to test what can reach what.
//!
//! Only a descriptor of this process keeps such a namespace. However the process ends, the kernel closes the
//! descriptor and removes the namespace, with its veth and the host's peer.
//!
//! - [`addresses`]: picks free IP and MAC addresses;
//! - [`netlink`]: requests to rtnetlink, on the host and inside.

mod addresses;
mod netlink;

use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, bail};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoVeth, LinkAttribute, LinkMessage},
};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::time::Instant;

use super::netns;
pub use addresses::free_address;
use addresses::{host_mac, mac, random, unused_subnets};
use netlink::{Netlink, forget, request};

/// Name of the veth inside.
const INSIDE: &str = "eth0";
/// Prefix of the names of the host's veths, so that people recognize them; eight hexadecimal digits follow.
const PREFIX: &str = "lbr";

/// Returns true if a link of this name belongs to a scratch namespace.
pub(super) fn is_link(name: &str) -> bool {
    let digits = name.strip_prefix(PREFIX);
    digits.is_some_and(|digits| digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The longest wait for a bridge to forward frames from a new port. Most do at once. One with a spanning tree
/// takes twice its forward delay, which is at least 2 s, and 15 s by default.
const READY_TIMEOUT: Duration = Duration::from_secs(6);
/// The longest wait for a neighbour to answer. The kernel asks once per second.
const NEIGH_TIMEOUT: Duration = Duration::from_millis(2500);

/// A scratch namespace. Dropping it removes the link to it at once.
#[derive(Debug)]
pub struct Scratch {
    file: OwnedFd,
    link: Link,
    /// A connection to rtnetlink inside.
    inside: Netlink,
    /// Interface index of the veth inside.
    inside_index: u32,
    /// True if the namespace has an IPv6 address.
    ipv6: bool,
}

impl Scratch {
    /// Makes a namespace that is on a bridge of the host with these addresses, as a container would be.
    /// Returns when frames can pass, and when the host's own addresses on the bridge can be dialled: a bridge
    /// that had no port begins duplicate address detection for its IPv6 addresses only now.
    pub async fn on_bridge(bridge: u32, addresses: &[(IpAddr, u8)]) -> anyhow::Result<Self> {
        let host = Netlink::connect()?;
        // The same MAC for the same address: the host may remember it from the last time, and accepts no
        // other for a second.
        let first = addresses.first().map_or(Ipv6Addr::UNSPECIFIED.into(), |(ip, _)| *ip);
        let mut scratch = Self::link(&host, mac(first)).await?;
        scratch.link.known_as = addresses.iter().map(|(ip, _)| (bridge, *ip)).collect();
        for (ip, prefix) in addresses {
            scratch.add_address(*ip, *prefix).await?;
        }
        scratch.inside.up(netns::LOOPBACK.get()).await.context("cannot bring up lo in a namespace")?;
        scratch.inside.up(scratch.inside_index).await.context("cannot bring up a veth")?;
        let enslaved = LinkUnspec::new_with_index(scratch.link.index).controller(bridge).up().build();
        let enslaved = host.handle.link().change(enslaved).execute().await;
        enslaved
            .with_context(|| format!("cannot attach a veth to the bridge with interface index {bridge}"))?;
        let mut patience = Patience::new();
        // A bridge that had no port comes up with this one, and until then drops what it should send.
        while !(scratch.is_up(&host).await?
            && host.is_up(bridge).await?
            && host.forwards(scratch.link.index).await?
            && !(scratch.ipv6 && host.has_tentative_addresses(bridge).await?))
        {
            if !patience.pause().await {
                bail!(
                    "the bridge does not forward from a new port within {} s; is it down, or does its \
                     spanning tree have a long forward delay?",
                    READY_TIMEOUT.as_secs()
                );
            }
        }
        Ok(scratch)
    }

    /// Makes a neighbour of the host on a link of its own, in place of a machine on the LAN. It sends
    /// everything to the host, even packets for 127.0.0.0/8 and ::1. Its addresses come from the ranges
    /// reserved for documentation (RFC 5737, RFC 3849), from a subnet in which the host has no address.
    pub async fn beside() -> anyhow::Result<Self> {
        let host = Netlink::connect()?;
        let used: Vec<_> = host.addresses().await?.into_iter().map(|(_, ip, prefix)| (ip, prefix)).collect();
        let (v4, v6) = unused_subnets(&used)?;
        let mut scratch = Self::link(&host, mac(Ipv4Addr::from(v4).into())).await?;
        let (hosts, own) = (Ipv4Addr::from(v4 + 1), Ipv4Addr::from(v4 + 2));
        host.add_address(scratch.link.index, hosts.into(), 30).await?;
        scratch.add_address(own.into(), 30).await?;
        let (hosts6, own6) = (Ipv6Addr::from(v6 + 1), Ipv6Addr::from(v6 + 2));
        // Where IPv6 is off, nothing can arrive over it.
        let both = match host.add_address(scratch.link.index, hosts6.into(), 126).await {
            Ok(()) => scratch.add_address(own6.into(), 126).await,
            Err(error) => Err(error),
        };
        // The loopback interface stays down, so that none of its addresses are local. The kernel must be told
        // that these addresses may be reached over a wire.
        scratch
            .within(|| {
                // A new namespace inherits the reverse path filter of the machine.
                let settings = [("all", "rp_filter", "0"), (INSIDE, "rp_filter", "0")];
                let settings = settings.into_iter().chain([(INSIDE, "route_localnet", "1")]);
                settings.into_iter().try_for_each(|(interface, name, value)| {
                    fs::write(format!("/proc/sys/net/ipv4/conf/{interface}/{name}"), value)
                })
            })?
            .context("cannot set up routing in a namespace")?;
        scratch.inside.up(scratch.inside_index).await.context("cannot bring up a veth")?;
        host.up(scratch.link.index).await.context("cannot bring up a veth")?;
        scratch.route_via(hosts.into()).await?;
        if let Err(error) = both {
            tracing::debug!(error = format!("{error:#}"), "probing namespace has no IPv6");
        } else {
            scratch.route_via(hosts6.into()).await?;
        }
        let mut patience = Patience::new();
        while !scratch.is_up(&host).await? {
            if !patience.pause().await {
                bail!("a veth does not come up");
            }
        }
        scratch.meets(hosts.into()).await?;
        if scratch.ipv6 {
            scratch.meets(hosts6.into()).await?;
        }
        Ok(scratch)
    }

    /// Waits until a neighbour, usually an address of the host, has answered ARP or neighbour discovery. Only
    /// then do frames pass both ways, and only then does silence mean anything.
    pub async fn meets(&self, neighbour: IpAddr) -> anyhow::Result<()> {
        const DISCARD: u16 = 9;
        // A datagram is needed: without link-local addresses the kernel does not ask for an IPv6 neighbour by
        // itself.
        self.within(|| {
            let any = if neighbour.is_ipv4() {
                IpAddr::from(Ipv4Addr::UNSPECIFIED)
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            UdpSocket::bind((any, 0))?.send_to(&[], (neighbour, DISCARD))
        })?
        .with_context(|| format!("cannot send to {neighbour} from a namespace"))?;
        if !self.inside.learns(self.inside_index, neighbour, NEIGH_TIMEOUT).await? {
            bail!("{neighbour} does not answer neighbour requests on its own link");
        }
        Ok(())
    }

    /// Returns true if the namespace has an IPv6 address. A neighbour has none where IPv6 is off.
    pub fn has_ipv6(&self) -> bool {
        self.ipv6
    }

    /// Returns the interface index of the host's veth, on which the host receives what a neighbour sends.
    pub fn host_index(&self) -> u32 {
        self.link.index
    }

    /// Adds a default route via one of its neighbours.
    pub async fn route_via(&self, gateway: IpAddr) -> anyhow::Result<()> {
        let route = match gateway {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new()
                .gateway(ip)
                .output_interface(self.inside_index)
                .onlink()
                .build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new()
                .gateway(ip)
                .output_interface(self.inside_index)
                .onlink()
                .build(),
        };
        let added = self.inside.handle.route().add(route).execute().await;
        added.with_context(|| format!("cannot add a route via {gateway} in a namespace"))
    }

    /// Runs `work` inside, on a thread of its own. Sockets that it makes stay in the namespace; any thread
    /// can use them.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        netns::within(&self.file, work)
    }

    /// Makes the namespace and the veth pair, both ends down.
    async fn link(host: &Netlink, mac: Vec<u8>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        // The socket belongs to the namespace of the thread that makes it, and is registered with the runtime
        // here.
        let made = netns::on_a_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            let file = File::open("/proc/thread-self/ns/net").context("cannot open a network namespace")?;
            // A machine may disable IPv6 in new namespaces by default; without IPv6 there is no such file.
            let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "0");
            let _runtime = runtime.enter();
            anyhow::Ok((OwnedFd::from(file), Netlink::connect()?))
        });
        let (file, inside) = made??;
        let random = random();
        let name = format!("{PREFIX}{:08x}", random & 0xffff_ffff);
        // Before the link exists: the caller may be cancelled while it waits, and the drop must remove the
        // link.
        let mut link = Link { name: name.clone(), index: 0, known_as: vec![] };
        let peer = LinkMessageBuilder::<LinkUnspec>::new().name(INSIDE).address(mac);
        let peer = peer.setns_by_fd(file.as_raw_fd()).build();
        let pair = LinkVeth::new(&name, INSIDE)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .address(host_mac(random))
            .build();
        host.handle.link().add(pair).execute().await.context("cannot make a veth pair")?;
        link.index = host.index_of(&name).await?;
        let inside_index = inside.index_of(INSIDE).await?;
        host.without_link_local(link.index).await;
        inside.without_link_local(inside_index).await;
        // Ask a neighbour that did not answer again soon, not after a second.
        netns::within(&file, || {
            for family in ["ipv4", "ipv6"] {
                for (name, value) in [("retrans_time_ms", "50"), ("mcast_solicit", "60")] {
                    let _ = fs::write(format!("/proc/sys/net/{family}/neigh/{INSIDE}/{name}"), value);
                }
            }
        })?;
        Ok(Self { file, link, inside, inside_index, ipv6: false })
    }

    /// Returns true once both ends are up. Frames sent before are lost.
    async fn is_up(&self, host: &Netlink) -> anyhow::Result<bool> {
        Ok(host.is_up(self.link.index).await? && self.inside.is_up(self.inside_index).await?)
    }

    async fn add_address(&mut self, ip: IpAddr, prefix: u8) -> anyhow::Result<()> {
        self.inside.add_address(self.inside_index, ip, prefix).await?;
        self.ipv6 |= ip.is_ipv6();
        Ok(())
    }
}

/// The pauses between two checks of a condition, doubling up to 20 ms, until [`READY_TIMEOUT`] has passed.
struct Patience {
    limit: Instant,
    next: Duration,
}

impl Patience {
    fn new() -> Self {
        Self { limit: Instant::now() + READY_TIMEOUT, next: Duration::from_millis(1) }
    }

    /// Sleeps until the next check is due. Returns false once the time is up.
    async fn pause(&mut self) -> bool {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(Duration::from_millis(20));
        Instant::now() < self.limit
    }
}

/// The host's end of a veth pair. Dropping it removes both ends, and the host's neighbour entries for it.
#[derive(Debug)]
struct Link {
    name: String,
    index: u32,
    /// Addresses inside, each with the index of the interface that the host has seen it on.
    known_as: Vec<(u32, IpAddr)>,
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(self.name.clone()));
        // Not on the tokio runtime, which may be gone.
        if let Err(error) = request(RouteNetlinkMessage::DelLink(link)) {
            tracing::debug!(
                interface = self.name,
                error = format!("{error:#}"),
                "could not remove a veth; the kernel does with its namespace"
            );
        }
        for (interface, ip) in &self.known_as {
            // The host may have no such entry.
            let _ = forget(*interface, *ip);
        }
    }
}

//! Throw-away network namespaces of this process, each linked to the host by a veth pair: somebody on a bridge, or a
//! neighbour on a link of its own, to try what reaches whom.
//!
//! Nothing names such a namespace but a descriptor of this process. However the process ends, the kernel closes that, and
//! the namespace goes, and with its end of the link the host's end.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    hash::{BuildHasher as _, DefaultHasher, Hash as _, Hasher as _, RandomState},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use futures_util::TryStreamExt as _;
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressScope},
    link::{
        AfSpecInet6, AfSpecUnspec, BridgePortState, In6AddrGenMode, InfoBridgePort, InfoData, InfoPortData,
        InfoVeth, LinkAttribute, LinkInfo, LinkMessage, State,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::{task::JoinHandle, time::Instant};

use super::netns;

/// The end inside.
const INSIDE: &str = "eth0";
/// What the host's ends begin with, for whoever sees one.
const PREFIX: &str = "lbr";
/// How long a bridge may take to forward what comes from a new port. Most do at once; one with a spanning tree takes
/// twice its forward delay, which is 2 s at least, and 15 s unless somebody has set it.
const READY: Duration = Duration::from_secs(6);
/// How long a neighbour that is there may take to answer. The kernel asks each second.
const MEETS: Duration = Duration::from_millis(2500);
/// How long whoever has an address on a bridge may take to answer for it.
const ANSWERS: Duration = Duration::from_millis(50);
/// More addresses of a subnet are not looked at, one after the other.
const MAX_LOOKS: usize = 64;

/// A namespace. Dropping it removes the link to it at once.
#[derive(Debug)]
pub struct Scratch {
    file: OwnedFd,
    link: Link,
    /// A connection to rtnetlink inside.
    inside: Netlink,
    /// Index of the end inside.
    inside_index: u32,
    /// Whether it has an IPv6 address.
    ipv6: bool,
}

impl Scratch {
    /// On a bridge of the host, as a container would be, with these addresses. Returns when frames can pass, and when the
    /// host's own addresses there can be dialled: a bridge that had no port tests its IPv6 addresses for duplicates only now.
    pub async fn on_bridge(bridge: u32, addresses: &[(IpAddr, u8)]) -> anyhow::Result<Self> {
        let host = Netlink::connect()?;
        // The same for the same address: the host may remember it from the last time, and believes nobody else within a second.
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
        enslaved.with_context(|| format!("cannot plug a veth into the bridge with index {bridge}"))?;
        let mut patience = Patience::new();
        // A bridge that had no port comes up with this one, and drops what it is to send until it has.
        while !(scratch.is_up(&host).await?
            && host.is_up(bridge).await?
            && host.forwards(scratch.link.index).await?
            && !(scratch.ipv6 && host.has_tentative_addresses(bridge).await?))
        {
            if !patience.pause().await {
                bail!(
                    "the bridge does not forward from a new port within {} s; is it up, or has it a spanning tree with a long delay?",
                    READY.as_secs()
                );
            }
        }
        Ok(scratch)
    }

    /// A neighbour of the host on a link of its own, standing for the LAN: everything it sends goes to the host, even what is
    /// for 127.0.0.0/8 and ::1. Its addresses are of those that are kept for documentation (RFC 5737, RFC 3849), of a
    /// subnet that the host has no address in.
    pub async fn beside() -> anyhow::Result<Self> {
        let host = Netlink::connect()?;
        let used: Vec<_> = host.addresses().await?.into_iter().map(|(_, ip, prefix)| (ip, prefix)).collect();
        let (v4, v6) = unused_subnets(&used)?;
        let mut scratch = Self::link(&host, mac(Ipv4Addr::from(v4).into())).await?;
        let (hosts, own) = (Ipv4Addr::from(v4 + 1), Ipv4Addr::from(v4 + 2));
        host.add_address(scratch.link.index, hosts.into(), 30).await?;
        scratch.add_address(own.into(), 30).await?;
        let (hosts6, own6) = (Ipv6Addr::from(v6 + 1), Ipv6Addr::from(v6 + 2));
        // Where IPv6 is off nobody can come by it.
        let both = match host.add_address(scratch.link.index, hosts6.into(), 126).await {
            Ok(()) => scratch.add_address(own6.into(), 126).await,
            Err(error) => Err(error),
        };
        // The loopback interface stays down: no address of its is local then, and the kernel here has to be told that they may
        // be dialled over a wire.
        scratch
            .within(|| {
                // A namespace has the reverse path filter of the machine it is made on.
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
            tracing::debug!("a neighbour without IPv6: {error:#}");
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

    /// Waits until a neighbour, an address of the host's usually, has answered for itself, by ARP or neighbour discovery.
    /// Then frames pass both ways, and only then does silence mean anything.
    pub async fn meets(&self, neighbour: IpAddr) -> anyhow::Result<()> {
        const DISCARD: u16 = 9;
        // Something to send: without link-local addresses the kernel does not just ask for an IPv6 neighbour.
        self.within(|| {
            let any = if neighbour.is_ipv4() {
                IpAddr::from(Ipv4Addr::UNSPECIFIED)
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            UdpSocket::bind((any, 0))?.send_to(&[], (neighbour, DISCARD))
        })?
        .with_context(|| format!("cannot send to {neighbour} from a namespace"))?;
        if !self.inside.learns(self.inside_index, neighbour, MEETS).await? {
            bail!("{neighbour} does not answer for itself on its own link");
        }
        Ok(())
    }

    /// Whether it has an IPv6 address; where IPv6 is off a neighbour has none.
    pub fn has_ipv6(&self) -> bool {
        self.ipv6
    }

    /// Index of the host's end, which what is sent from beside comes in on.
    pub fn host_index(&self) -> u32 {
        self.link.index
    }

    /// Sends what is for none of its neighbours to one of them.
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

    /// Runs `work` inside, on a thread of its own. Sockets that it makes stay inside; they can be used anywhere.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        netns::within(&self.file, work)
    }

    /// Makes the namespace and the link to it, both ends down.
    async fn link(host: &Netlink, mac: Vec<u8>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        // The socket belongs to the namespace of the thread that makes it, and to the runtime here.
        let made = netns::on_a_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            let file = File::open("/proc/thread-self/ns/net").context("cannot open a network namespace")?;
            // Of new namespaces a machine may have been told that they have none; without IPv6 there is no such file.
            let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "0");
            let _runtime = runtime.enter();
            anyhow::Ok((OwnedFd::from(file), Netlink::connect()?))
        });
        let (file, inside) = made??;
        let random = random();
        let name = format!("{PREFIX}{:08x}", random & 0xffff_ffff);
        // Before there is one: whoever waits for it may be told to stop.
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
        // A neighbour that was asked a moment too early is to be asked again soon, not after a second.
        netns::within(&file, || {
            for family in ["ipv4", "ipv6"] {
                for (name, value) in [("retrans_time_ms", "50"), ("mcast_solicit", "60")] {
                    let _ = fs::write(format!("/proc/sys/net/{family}/neigh/{INSIDE}/{name}"), value);
                }
            }
        })?;
        Ok(Self { file, link, inside, inside_index, ipv6: false })
    }

    /// Frames sent before that are lost.
    async fn is_up(&self, host: &Netlink) -> anyhow::Result<bool> {
        Ok(host.is_up(self.link.index).await? && self.inside.is_up(self.inside_index).await?)
    }

    async fn add_address(&mut self, ip: IpAddr, prefix: u8) -> anyhow::Result<()> {
        self.inside.add_address(self.inside_index, ip, prefix).await?;
        self.ipv6 |= ip.is_ipv6();
        Ok(())
    }
}

/// Pauses between two looks at something that should be so soon.
struct Patience {
    limit: Instant,
    next: Duration,
}

impl Patience {
    fn new() -> Self {
        Self { limit: Instant::now() + READY, next: Duration::from_millis(1) }
    }

    /// `false` if it should have been so by now.
    async fn pause(&mut self) -> bool {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(Duration::from_millis(20));
        Instant::now() < self.limit
    }
}

/// An address of a gateway's subnet that nobody seems to use on that bridge; `None` where there is none to be had. Docker
/// gives addresses from the bottom, so the search begins at the top; an address counts as used if it is `taken`, one of the
/// host's, or if somebody has it now: the host asks for it, by ARP or neighbour discovery, as it would before it sends there.
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
            // One of ours, left by a process that was killed; or one that is in use, and will answer.
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

/// A subnet's addresses that a host may have, from the top.
fn candidates(gateway: IpAddr, prefix: u8) -> impl Iterator<Item = IpAddr> {
    let (bits, number): (u8, u128) = match gateway {
        IpAddr::V4(ip) => (32, u32::from(ip).into()),
        IpAddr::V6(ip) => (128, ip.into()),
    };
    let size = bits.saturating_sub(prefix);
    let last = 1_u128.checked_shl(size.into()).unwrap_or(0).wrapping_sub(1);
    let base = number & !last;
    // The first is the network's (the routers' in IPv6), the last one the broadcast address; IPv6 keeps the last 128 for
    // anycast (RFC 2526).
    let top = if gateway.is_ipv6() && size > 8 { last - 128 } else { last.saturating_sub(1) };
    (1..=top).rev().map(move |offset| match gateway {
        IpAddr::V4(_) => Ipv4Addr::from(u32::try_from(base | offset).unwrap_or_default()).into(),
        IpAddr::V6(_) => Ipv6Addr::from(base | offset).into(),
    })
}

/// First addresses of a /30 and a /126 kept for documentation, which overlap with none of these subnets.
fn unused_subnets(used: &[(IpAddr, u8)]) -> anyhow::Result<(u32, u128)> {
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
    // Anywhere in there: another process may do the same now.
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

/// Not secret, only unlikely to be somebody else's.
fn random() -> u64 {
    RandomState::new().hash_one(())
}

/// The address of a veth inside: a local one, as the second bit of the first byte says.
fn mac(ip: IpAddr) -> Vec<u8> {
    // Without random keys.
    let mut hasher = DefaultHasher::new();
    ip.hash(&mut hasher);
    mac_of(0x02, hasher.finish())
}

/// A bridge takes the lowest address of its ports for its own, unless it was given one. Were this one the lowest the bridge
/// would change its address, and change it back, and containers would send to the wrong one meanwhile; so it is high.
fn host_mac(random: u64) -> Vec<u8> {
    mac_of(0xfe, random)
}

fn mac_of(first: u8, rest: u64) -> Vec<u8> {
    [&[first], &rest.to_be_bytes()[..5]].concat()
}

/// The host's end of a link; goes with this, and with it the end inside, and what the host knows of it.
#[derive(Debug)]
struct Link {
    name: String,
    index: u32,
    /// Addresses, each with the interface that the host has seen it on.
    known_as: Vec<(u32, IpAddr)>,
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(self.name.clone()));
        // Not in a runtime, which may be gone.
        if let Err(error) = request(RouteNetlinkMessage::DelLink(link)) {
            // The kernel does so, a little later, when the namespace goes.
            tracing::debug!("cannot remove a veth: {error:#}");
        }
        for (interface, ip) in &self.known_as {
            // It may never have been heard of.
            let _ = forget(*interface, *ip);
        }
    }
}

/// Removes a neighbour from the host's table.
fn forget(interface: u32, ip: IpAddr) -> anyhow::Result<()> {
    let mut neighbour = NeighbourMessage::default();
    neighbour.header.ifindex = interface;
    let (family, ip) = match ip {
        IpAddr::V4(ip) => (AddressFamily::Inet, NeighbourAddress::Inet(ip)),
        IpAddr::V6(ip) => (AddressFamily::Inet6, NeighbourAddress::Inet6(ip)),
    };
    neighbour.header.family = family;
    neighbour.attributes.push(NeighbourAttribute::Destination(ip));
    request(RouteNetlinkMessage::DelNeighbour(neighbour))
}

/// Asks rtnetlink in this thread's namespace for something, and waits until it is done.
fn request(message: RouteNetlinkMessage) -> anyhow::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut message = NetlinkMessage::new(header, message.into());
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)?.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io().into()),
        _ => Ok(()),
    }
}

/// Somebody on an interface, as the host knows it.
#[derive(Debug)]
struct Neighbour {
    ip: IpAddr,
    mac: Vec<u8>,
    state: NeighbourState,
}

impl Neighbour {
    /// Whether it has answered, if not just now.
    fn is_there(&self) -> bool {
        let (asked, in_vain) = (NeighbourState::Incomplete, NeighbourState::Failed);
        ![NeighbourState::None, asked, in_vain].contains(&self.state)
    }
}

/// A connection to rtnetlink in some namespace.
#[derive(Debug)]
struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// In the namespace of this thread.
    fn connect() -> anyhow::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    async fn index_of(&self, name: &str) -> anyhow::Result<u32> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        let found = found.with_context(|| format!("cannot find {name}"))?;
        Ok(found.with_context(|| format!("cannot find {name}"))?.header.index)
    }

    async fn link(&self, index: u32) -> anyhow::Result<LinkMessage> {
        let found = self.handle.link().get().match_index(index).execute().try_next().await;
        found.context("cannot look at a veth")?.context("a veth is gone")
    }

    async fn up(&self, index: u32) -> Result<(), rtnetlink::Error> {
        self.handle.link().change(LinkUnspec::new_with_index(index).up().build()).execute().await
    }

    /// Nobody is to hear of the interface before it speaks: no link-local address, and so no routers asked for.
    async fn without_link_local(&self, index: u32) {
        let none = vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)])];
        let none = LinkAttribute::AfSpecUnspec(none);
        let link = LinkUnspec::new_with_index(index).append_extra_attribute(none).build();
        // Where IPv6 is off the kernel refuses, and there is nothing to keep quiet.
        if let Err(error) = self.handle.link().change(link).execute().await {
            tracing::debug!("a veth keeps its link-local address: {error}");
        }
    }

    /// Without duplicate address detection, which takes a second or two.
    async fn add_address(&self, index: u32, ip: IpAddr, prefix: u8) -> anyhow::Result<()> {
        let mut request = self.handle.address().add(index, ip, prefix);
        if ip.is_ipv6() {
            request.message_mut().header.flags = AddressHeaderFlags::Nodad;
        }
        request.execute().await.with_context(|| format!("cannot give a veth the address {ip}"))
    }

    /// Whether the bridge that a port belongs to lets its frames through.
    async fn forwards(&self, port: u32) -> anyhow::Result<bool> {
        let link = self.link(port).await?;
        let infos = link.attributes.iter().filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
        let ports = infos.flatten().filter_map(|info| match info {
            LinkInfo::PortData(InfoPortData::BridgePort(port)) => Some(port),
            _ => None,
        });
        let forwarding = &InfoBridgePort::State(BridgePortState::Forwarding);
        Ok(ports.flatten().any(|property| property == forwarding))
    }

    async fn is_up(&self, index: u32) -> anyhow::Result<bool> {
        let link = self.link(index).await?;
        Ok(link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::OperState(State::Up))))
    }

    /// Every address, with the index of its interface and the length of its prefix.
    async fn addresses(&self) -> anyhow::Result<Vec<(u32, IpAddr, u8)>> {
        let mut found = vec![];
        let mut addresses = self.handle.address().get().execute();
        while let Some(address) = addresses.try_next().await.context("cannot list addresses")? {
            let header = &address.header;
            for attribute in &address.attributes {
                // IPv4 has both, and the second is a peer's, if there is one.
                if let AddressAttribute::Local(ip) | AddressAttribute::Address(ip) = attribute {
                    found.push((header.index, *ip, header.prefix_len));
                }
            }
        }
        Ok(found)
    }

    async fn has_tentative_addresses(&self, index: u32) -> anyhow::Result<bool> {
        let mut tentative = false;
        let mut addresses = self.handle.address().get().execute();
        while let Some(address) = addresses.try_next().await.context("cannot list addresses")? {
            let flags = address.header.flags;
            let failed = flags.contains(AddressHeaderFlags::Dadfailed);
            let is_global = address.header.scope == AddressScope::Universe;
            tentative |= address.header.index == index
                && is_global
                && flags.contains(AddressHeaderFlags::Tentative)
                && !failed;
        }
        Ok(tentative)
    }

    /// The neighbours on that interface that the host knows of, or has asked for.
    async fn neighbours(&self, index: u32) -> anyhow::Result<Vec<Neighbour>> {
        let mut found = vec![];
        let mut neighbours = self.handle.neighbours().get().execute();
        while let Some(neighbour) = neighbours.try_next().await.context("cannot list neighbours")? {
            if neighbour.header.ifindex != index {
                continue;
            }
            let (mut ip, mut mac) = (None, vec![]);
            for attribute in neighbour.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(v4.into()),
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(v6.into()),
                    NeighbourAttribute::LinkLayerAddress(address) => mac = address,
                    _ => {}
                }
            }
            let state = neighbour.header.state;
            found.extend(ip.map(|ip| Neighbour { ip, mac, state }));
        }
        Ok(found)
    }

    /// Whether somebody on that interface answers for an address.
    async fn answers(&self, index: u32, ip: IpAddr) -> anyhow::Result<bool> {
        let ask = self.handle.neighbours().add(index, ip);
        let ask = ask.state(NeighbourState::None).flags(NeighbourFlags::Use).replace();
        ask.execute().await.context("cannot ask for a neighbour")?;
        let answers = self.learns(index, ip, ANSWERS).await?;
        if !answers {
            let _ = forget(index, ip);
        }
        Ok(answers)
    }

    /// Waits until it is known who has an address on that interface.
    async fn learns(&self, index: u32, ip: IpAddr, within: Duration) -> anyhow::Result<bool> {
        let limit = Instant::now() + within;
        loop {
            let known = self.neighbours(index).await?;
            if known.iter().any(|known| known.ip == ip && known.is_there()) {
                return Ok(true);
            }
            if Instant::now() > limit {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
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
        assert_eq!(host_mac(0x0102_0304_0506_0708), [0xfe, 1, 2, 3, 4, 5]);
    }
}

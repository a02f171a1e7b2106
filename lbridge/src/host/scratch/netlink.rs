//! rtnetlink: the requests that scratch namespaces need, on the host and inside.

use std::{net::IpAddr, time::Duration};

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressScope},
    link::{
        AfSpecInet6, AfSpecUnspec, BridgePortState, In6AddrGenMode, InfoBridgePort, InfoPortData,
        LinkAttribute, LinkInfo, LinkMessage, State,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_ROUTE};
use rtnetlink::{Handle, LinkUnspec};
use tokio::{task::JoinHandle, time::Instant};

/// The longest wait for a neighbour on a bridge to answer for its address.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(50);

/// A connection to rtnetlink in the namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Netlink {
    pub(super) handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// Connects in this thread's network namespace.
    pub(super) fn connect() -> anyhow::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    pub(super) async fn index_of(&self, name: &str) -> anyhow::Result<u32> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        let found = found.with_context(|| format!("cannot find {name}"))?;
        Ok(found.with_context(|| format!("cannot find {name}"))?.header.index)
    }

    async fn link(&self, index: u32) -> anyhow::Result<LinkMessage> {
        let found = self.handle.link().get().match_index(index).execute().try_next().await;
        found.context("cannot read the state of a veth")?.context("a veth is gone")
    }

    pub(super) async fn up(&self, index: u32) -> Result<(), rtnetlink::Error> {
        self.handle.link().change(LinkUnspec::new_with_index(index).up().build()).execute().await
    }

    /// Disables the link-local address of an interface. So nobody hears of the interface before it sends
    /// something: the kernel sends no router solicitations.
    pub(super) async fn without_link_local(&self, index: u32) {
        let none = vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)])];
        let none = LinkAttribute::AfSpecUnspec(none);
        let link = LinkUnspec::new_with_index(index).append_extra_attribute(none).build();
        // Where IPv6 is off the kernel refuses this, and sends nothing anyway.
        if let Err(error) = self.handle.link().change(link).execute().await {
            tracing::debug!(ifindex = index, %error, "could not disable a veth's link-local address");
        }
    }

    /// Adds an address to an interface. Skips duplicate address detection, which takes a second or two.
    pub(super) async fn add_address(&self, index: u32, ip: IpAddr, prefix: u8) -> anyhow::Result<()> {
        let mut request = self.handle.address().add(index, ip, prefix);
        if ip.is_ipv6() {
            request.message_mut().header.flags = AddressHeaderFlags::Nodad;
        }
        request.execute().await.with_context(|| format!("cannot give a veth the address {ip}"))
    }

    /// Returns true if the bridge forwards frames of this port.
    pub(super) async fn forwards(&self, port: u32) -> anyhow::Result<bool> {
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

    pub(super) async fn is_up(&self, index: u32) -> anyhow::Result<bool> {
        let link = self.link(index).await?;
        Ok(link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::OperState(State::Up))))
    }

    /// Lists all addresses of the namespace, each with its interface index and prefix length.
    pub(super) async fn addresses(&self) -> anyhow::Result<Vec<(u32, IpAddr, u8)>> {
        let mut found = vec![];
        let mut addresses = self.handle.address().get().execute();
        while let Some(address) = addresses.try_next().await.context("cannot list addresses")? {
            let header = &address.header;
            for attribute in &address.attributes {
                // IPv4 has both attributes; the second is the peer's address, if there is a peer.
                if let AddressAttribute::Local(ip) | AddressAttribute::Address(ip) = attribute {
                    found.push((header.index, *ip, header.prefix_len));
                }
            }
        }
        Ok(found)
    }

    pub(super) async fn has_tentative_addresses(&self, index: u32) -> anyhow::Result<bool> {
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

    /// Lists the entries of the neighbour table for an interface, including those that have not answered.
    pub(super) async fn neighbours(&self, index: u32) -> anyhow::Result<Vec<Neighbour>> {
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

    /// Asks for an address on an interface, by ARP or neighbour discovery. Returns true if a neighbour
    /// answers in time.
    pub(super) async fn answers(&self, index: u32, ip: IpAddr) -> anyhow::Result<bool> {
        let ask = self.handle.neighbours().add(index, ip);
        let ask = ask.state(NeighbourState::None).flags(NeighbourFlags::Use).replace();
        ask.execute().await.context("cannot ask for a neighbour")?;
        let answers = self.learns(index, ip, ANSWER_TIMEOUT).await?;
        if !answers {
            let _ = forget(index, ip);
        }
        Ok(answers)
    }

    /// Waits until a neighbour has answered for an address on an interface. Returns false if none has after
    /// `within`.
    pub(super) async fn learns(&self, index: u32, ip: IpAddr, within: Duration) -> anyhow::Result<bool> {
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

/// An entry of the neighbour table.
#[derive(Debug)]
pub(super) struct Neighbour {
    pub(super) ip: IpAddr,
    pub(super) mac: Vec<u8>,
    state: NeighbourState,
}

impl Neighbour {
    /// Returns true if the neighbour has answered, though perhaps not just now.
    pub(super) fn is_there(&self) -> bool {
        let (asked, in_vain) = (NeighbourState::Incomplete, NeighbourState::Failed);
        ![NeighbourState::None, asked, in_vain].contains(&self.state)
    }
}

/// Removes an entry from the neighbour table of this thread's network namespace.
pub(super) fn forget(interface: u32, ip: IpAddr) -> anyhow::Result<()> {
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

/// Sends a request to rtnetlink in this thread's network namespace, and waits until it is acknowledged.
pub(super) fn request(message: RouteNetlinkMessage) -> anyhow::Result<()> {
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

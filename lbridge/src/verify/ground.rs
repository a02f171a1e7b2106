//! ground: the places to test from: throw-away network namespaces, and those that rules name. Everything that
//! verify sends, it sends from there.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{anyhow, bail};
use futures_util::future::join_all;
use nix::net::if_::if_nameindex;
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpSocket, time::timeout};

use super::plan::{Attempt, Plan, Vantage, subnet};
use crate::{
    api::protocol::NamespaceStatus,
    host::{
        listeners,
        netns::{HostNetns, LOOPBACK, Namespace},
        scratch::{Scratch, free_address},
    },
    planning::{
        inventory::{Interface, Listener, NetnsUnavailable},
        rule::Protocol,
    },
};

/// Maximum wait for a service that should not answer. On one machine an answer takes a millisecond.
const CLOSED: Duration = Duration::from_secs(1);
/// Maximum wait for an answer that should come, even a refusal.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum time that a relay needs to find that its service is not there, and to reset a connection that it
/// has accepted.
const STAYS: Duration = Duration::from_millis(200);

/// The purpose of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Aim {
    /// To show that no socket takes it.
    Closed,
    /// To show that it is answered, even with a refusal.
    Answered,
    /// To show that a relay takes it and finds its service.
    Relayed,
}

/// The result of a connection.
#[derive(Debug, Clone)]
pub(super) enum Dialled {
    /// The connection was accepted; holds the listener that would take another one.
    Open(Option<Listener>),
    /// The connection was refused or reset.
    Refused,
    /// The address was unreachable.
    Unreachable,
    /// There was no answer in time.
    TimedOut,
    /// The connection could not be attempted; holds the reason.
    NotTried(String),
}

/// A prepared place to test from.
#[derive(Debug)]
enum Ground {
    Scratch {
        scratch: Scratch,
        /// Index of the host's interface on which its packets arrive.
        ingress: u32,
        /// The interface's subnets in which it has an address, each with that address.
        addresses: Vec<(IpAddr, IpAddr)>,
        /// The bridge that it is attached to; `None` if it is on none.
        bridge: Option<Interface>,
    },
    Namespace(Namespace),
}

/// All prepared places, or the reason why one could not be prepared.
#[derive(Debug)]
pub(super) struct Grounds(BTreeMap<Vantage, Result<Ground, String>>);

impl Grounds {
    /// Creates or opens the places that a plan needs.
    pub(super) async fn make(plan: &Plan) -> anyhow::Result<Self> {
        let host = HostNetns::open()?;
        let needed = |place: &Vantage| {
            plan.trials.iter().any(|trial| match &trial.attempt {
                Attempt::Connect { from, .. } | Attempt::Ask { from, .. } => from == place,
                Attempt::Borrow { of, at, .. } => at == place || *place == Vantage::Bridge(of.clone()),
                Attempt::Listed { at: only, .. }
                | Attempt::Foreign { at: only, .. }
                | Attempt::Wire { within: only, .. } => only == place,
                Attempt::Nothing { .. } => false,
            })
        };
        let bridges = plan.bridges.iter().map(|(name, bridge)| (Vantage::Bridge(name.clone()), Some(bridge)));
        let places: Vec<_> =
            bridges.chain([(Vantage::Lan, None)]).filter(|(place, _)| needed(place)).collect();
        let made = places.into_iter().map(async |(place, bridge)| {
            let ground = match bridge {
                Some(bridge) => on_bridge(bridge).await,
                None => beside().await,
            };
            (place, ground.map_err(|error| format!("{error:#}")))
        });
        let mut grounds: BTreeMap<_, _> = join_all(made).await.into_iter().collect();
        for (rule, namespace) in &plan.namespaces {
            let opened = open(namespace, &host).map(Ground::Namespace);
            grounds.insert(Vantage::Inside(rule.clone()), opened.map_err(|error| format!("{error:#}")));
        }
        Ok(Self(grounds))
    }

    fn get(&self, place: &Vantage) -> Result<&Ground, String> {
        match self.0.get(place) {
            Some(Ok(ground)) => Ok(ground),
            Some(Err(why)) => Err(why.clone()),
            None => Err("the bridge no longer exists".to_owned()),
        }
    }

    /// Makes a connection from a place, for the purpose `aim`.
    pub(super) async fn dial(&self, from: &Vantage, to: SocketAddr, aim: Aim) -> Dialled {
        match self.try_dial(from, to, aim).await {
            Ok(dialled) => dialled,
            Err(error) => Dialled::NotTried(format!("{error:#}")),
        }
    }

    async fn try_dial(&self, from: &Vantage, to: SocketAddr, aim: Aim) -> anyhow::Result<Dialled> {
        let ground = self.get(from).map_err(|why| anyhow!(why))?;
        let source = ground.source(to)?;
        let socket = ground.within(|| socket(source, to))??;
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(to);
        let limit = if aim == Aim::Closed { CLOSED } else { ANSWER_TIMEOUT };
        let stream = match timeout(limit, connecting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return not_connected(error),
            Err(_) => return Ok(Dialled::TimedOut),
        };
        if aim == Aim::Relayed
            && let Ok(Err(error)) = timeout(STAYS, stream.peek(&mut [0])).await
        {
            return not_connected(error);
        }
        // With another source port: a lookup with this one would find this connection first.
        let local = stream.local_addr()?;
        let other = SocketAddr::new(local.ip(), local.port() ^ 1);
        Ok(Dialled::Open(ground.lookup(Protocol::Tcp, other, to)?))
    }

    /// Returns the listener that would get a connection, if it arrived.
    pub(super) fn taker(&self, from: &Vantage, to: SocketAddr) -> Option<Listener> {
        self.asked(Protocol::Tcp, from, to).ok()?
    }

    /// Returns the socket that would get a connection or a datagram, if it arrived.
    pub(super) fn asked(
        &self,
        protocol: Protocol,
        from: &Vantage,
        to: SocketAddr,
    ) -> Result<Option<Listener>, String> {
        let ground = self.get(from)?;
        let ask = || {
            let source = ground.source(to)?.unwrap_or(documentation(to)[0]);
            ground.lookup(protocol, SocketAddr::new(source, 1), to)
        };
        ask().map_err(|error| format!("{error:#}"))
    }

    /// Returns the socket that would get a connection that arrives from `at` with the address of the
    /// namespace on `of`.
    pub(super) fn borrowed(
        &self,
        protocol: Protocol,
        of: &Vantage,
        at: &Vantage,
        to: SocketAddr,
    ) -> Result<(IpAddr, Option<Listener>), String> {
        let source = self.get(of)?.source(to).map_err(|error| format!("{error:#}"))?;
        let source = source.ok_or("no address to borrow")?;
        self.taker_of(protocol, source, at, to).map(|found| (source, found))
    }

    /// Returns the socket that would get a connection that arrives from `at` with this source address.
    pub(super) fn taker_of(
        &self,
        protocol: Protocol,
        source: IpAddr,
        at: &Vantage,
        to: SocketAddr,
    ) -> Result<Option<Listener>, String> {
        let from = SocketAddr::new(source, 1);
        let found = match at {
            Vantage::Interface { index, .. } => listeners::lookup(protocol, from, to, *index),
            at => self.get(at)?.lookup(protocol, from, to),
        };
        found.map_err(|error| format!("{error:#}"))
    }

    /// Returns the socket that would get a connection that arrives from `at` with a source address outside
    /// its network, and that address.
    pub(super) fn foreign(
        &self,
        protocol: Protocol,
        at: &Vantage,
        to: SocketAddr,
    ) -> Result<(IpAddr, Option<Listener>), String> {
        let ground = self.get(at)?;
        let own = |ip: &IpAddr| match ground {
            Ground::Scratch { bridge: Some(bridge), .. } => subnet(bridge, *ip).is_some(),
            Ground::Scratch { .. } | Ground::Namespace(_) => false,
        };
        let source = documentation(to).into_iter().find(|ip| !own(ip));
        let source = source.ok_or("every address is one of this network's")?;
        let found = ground.lookup(protocol, SocketAddr::new(source, 1), to);
        found.map(|found| (source, found)).map_err(|error| format!("{error:#}"))
    }

    /// Returns the socket that would get a connection to a namespace's localhost that arrives on an interface
    /// other than its loopback.
    pub(super) fn wire(&self, within: &Vantage, to: SocketAddr) -> Result<Option<Listener>, String> {
        let Ground::Namespace(namespace) = self.get(within)? else { return Ok(None) };
        let [source, _] = documentation(to);
        let look = || -> anyhow::Result<_> {
            for interface in &if_nameindex()? {
                if interface.index() != LOOPBACK.get()
                    && let Some(found) =
                        listeners::lookup(Protocol::Tcp, SocketAddr::new(source, 1), to, interface.index())?
                {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        };
        namespace.within(look).and_then(|found| found).map_err(|error| format!("{error:#}"))
    }
}

impl Ground {
    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        match self {
            Self::Scratch { scratch, .. } => scratch.within(work),
            Self::Namespace(namespace) => namespace.within(work),
        }
    }

    /// Returns the address to dial from, where it matters; else `None`.
    fn source(&self, to: SocketAddr) -> anyhow::Result<Option<IpAddr>> {
        let Self::Scratch { scratch, addresses, bridge, .. } = self else { return Ok(None) };
        let Some(bridge) = bridge else {
            if to.is_ipv6() && !scratch.has_ipv6() {
                bail!("IPv6 is off on new interfaces, so no probe can dial from beside the network");
            }
            return Ok(None);
        };
        // A gateway is dialled from its own subnet.
        let own = subnet(bridge, to.ip());
        let fits = |(gateway, _): &&(IpAddr, IpAddr)| match own {
            Some((own, _)) => *gateway == own,
            None => gateway.is_ipv4() == to.is_ipv4(),
        };
        match (addresses.iter().find(fits), own) {
            (Some((_, source)), _) => Ok(Some(*source)),
            (None, Some((ip, prefix))) => bail!("no free address in the subnet of {ip}/{prefix}"),
            (None, None) => bail!("no free address in the subnets of {}", bridge.name),
        }
    }

    /// Returns the socket that would get a connection or a datagram from this place.
    fn lookup(
        &self,
        protocol: Protocol,
        source: SocketAddr,
        to: SocketAddr,
    ) -> anyhow::Result<Option<Listener>> {
        match self {
            Self::Scratch { ingress, .. } => listeners::lookup(protocol, source, to, *ingress),
            Self::Namespace(namespace) => {
                namespace.within(|| listeners::lookup(protocol, source, to, LOOPBACK.get()))?
            }
        }
    }
}

/// Returns addresses that no host has (RFC 5737, RFC 3849).
fn documentation(to: SocketAddr) -> [IpAddr; 2] {
    match to {
        SocketAddr::V4(_) => [Ipv4Addr::new(192, 0, 2, 1).into(), Ipv4Addr::new(198, 51, 100, 1).into()],
        SocketAddr::V6(_) => [0, 1].map(|n| Ipv6Addr::new(0x2001, 0xdb8, n, 0, 0, 0, 0, 1).into()),
    }
}

async fn on_bridge(bridge: &Interface) -> anyhow::Result<Ground> {
    let (mut addresses, mut with_prefix) = (vec![], vec![]);
    for (gateway, prefix) in &bridge.addresses {
        let taken: Vec<_> = addresses.iter().map(|(_, own)| *own).collect();
        if let Some(own) = free_address(bridge.index, *gateway, *prefix, &taken).await? {
            addresses.push((*gateway, own));
            with_prefix.push((own, *prefix));
        }
    }
    if addresses.is_empty() {
        bail!("no free address in the subnets of {}", bridge.name);
    }
    let scratch = Scratch::on_bridge(bridge.index, &with_prefix).await?;
    for (gateway, _) in &addresses {
        scratch.meets(*gateway).await?;
    }
    for v4 in [true, false] {
        if let Some((gateway, _)) = addresses.iter().find(|(gateway, _)| gateway.is_ipv4() == v4) {
            scratch.route_via(*gateway).await?;
        }
    }
    Ok(Ground::Scratch { scratch, ingress: bridge.index, addresses, bridge: Some(bridge.clone()) })
}

async fn beside() -> anyhow::Result<Ground> {
    let scratch = Scratch::beside().await?;
    let ingress = scratch.host_index();
    Ok(Ground::Scratch { scratch, ingress, addresses: vec![], bridge: None })
}

fn open(namespace: &NamespaceStatus, host: &HostNetns) -> anyhow::Result<Namespace> {
    let opened = Namespace::at(&namespace.path, host.id);
    let opened = opened.map_err(|absence| match absence {
        NetnsUnavailable::NotThere(why) | NetnsUnavailable::Unsuitable(why) => anyhow!(why),
    })?;
    if opened.key.id.inode != namespace.inode {
        bail!("the namespace was replaced just now; try again");
    }
    Ok(opened)
}

/// Creates a socket that closes with a reset, so that nothing is left of the connection at either end when
/// the namespace is removed.
fn socket(source: Option<IpAddr>, to: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(to),
        Type::STREAM.nonblocking().cloexec(),
        Some(socket2::Protocol::TCP),
    )?;
    socket.set_linger(Some(Duration::ZERO))?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(socket)
}

fn not_connected(error: io::Error) -> anyhow::Result<Dialled> {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Ok(Dialled::Refused),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Ok(Dialled::Unreachable),
        io::ErrorKind::TimedOut => Ok(Dialled::TimedOut),
        _ => Err(anyhow::Error::new(error).context("cannot dial")),
    }
}

//! Conntrack: the flows that the kernel tracks. A firewall lets in what belongs to a known flow (`ct state
//! established accept`), so that a flow whose first packet came by an accept rule of lbridge's stays open
//! after that rule is gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use lbridge_common::wire::{AcceptedKey, Address, TCP};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, Nla as _};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Tuple},
};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};

use crate::{
    host::{listeners, netlink},
    planning::actual::Flows,
};

/// `CTA_ZONE` (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const CTA_ZONE: u16 = 18;
/// File that exists in a network namespace that tracks connections.
const IN_USE: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// Key of what an accept rule lets in, with the number of its leading bits that count.
type Key = (AcceptedKey, u32);

/// A flow that one of the keys covers.
#[derive(Debug)]
struct Flow {
    key: Key,
    /// Address and port of this host's end, as its sockets have them.
    own: SocketAddr,
    /// Address and port of the container's end.
    peer: SocketAddr,
    /// True if a socket of the host has the flow: its connection stays open, as all do when their rule is
    /// denied.
    is_open: bool,
    family: NetfilterProtoFamily,
    /// Attributes that identify the flow to the kernel.
    name: Vec<ConntrackAttribute>,
}

/// Source, destination and protocol number of a packet.
#[derive(Debug, Clone, Copy)]
struct Ends {
    source: SocketAddr,
    destination: SocketAddr,
    protocol: u8,
}

impl Ends {
    fn of(parts: &[Tuple]) -> Option<Self> {
        let (mut source, mut destination) = (None, None);
        let (mut protocol, mut source_port, mut destination_port) = (None, None, None);
        for part in parts {
            match part {
                Tuple::Ip(parts) => {
                    for part in parts {
                        match part {
                            IPTuple::SourceAddress(ip) => source = Some(*ip),
                            IPTuple::DestinationAddress(ip) => destination = Some(*ip),
                            _ => {}
                        }
                    }
                }
                Tuple::Proto(parts) => {
                    for part in parts {
                        match part {
                            ProtoTuple::Protocol(number) => protocol = Some(u8::from(*number)),
                            ProtoTuple::SourcePort(port) => source_port = Some(*port),
                            ProtoTuple::DestinationPort(port) => destination_port = Some(*port),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Some(Self {
            source: SocketAddr::new(source?, source_port?),
            destination: SocketAddr::new(destination?, destination_port?),
            protocol: protocol?,
        })
    }
}

impl Flow {
    /// Returns the flow, if one of these keys covers it. An accept rule on the input hook sees the first
    /// packet's source, and its destination after DNAT, which the answers have as their source.
    fn of(
        family: NetfilterProtoFamily,
        attributes: Vec<ConntrackAttribute>,
        keys: &BTreeSet<Key>,
    ) -> Option<Self> {
        let ends = |wanted: fn(&ConntrackAttribute) -> Option<&Vec<Tuple>>| {
            attributes.iter().find_map(wanted).and_then(|parts| Ends::of(parts))
        };
        let first = ends(|attribute| match attribute {
            ConntrackAttribute::CtaTupleOrig(parts) => Some(parts),
            _ => None,
        })?;
        let answer = ends(|attribute| match attribute {
            ConntrackAttribute::CtaTupleReply(parts) => Some(parts),
            _ => None,
        })?;
        let packet = AcceptedKey {
            gateway: answer.source.ip().into(),
            port: answer.source.port(),
            protocol: first.protocol.into(),
            source: first.source.ip().into(),
        };
        // Few keys have the same address and port.
        let least = AcceptedKey { source: Address([0; 4]), ..packet };
        let candidates = keys.range((least, 0)..).take_while(|(key, _)| {
            (key.gateway, key.port, key.protocol) == (packet.gateway, packet.port, packet.protocol)
        });
        let key = *candidates.into_iter().find(|(key, bits)| key.matches(*bits, &packet))?;
        let is_name = |attribute: &ConntrackAttribute| match attribute {
            ConntrackAttribute::CtaTupleOrig(_) => true,
            ConntrackAttribute::Other(other) => other.kind() == CTA_ZONE,
            _ => false,
        };
        let (own, peer) = (answer.source, answer.destination);
        let name = attributes.into_iter().filter(is_name).collect();
        Some(Self { key, own, peer, is_open: false, family, name })
    }

    fn is_tcp(&self) -> bool {
        self.key.0.protocol == u16::from(TCP)
    }
}

/// Counts the flows of each of these keys; keys that have none are left out.
///
/// # Errors
///
/// If the kernel tracks connections and does not list them.
pub fn flows(keys: &BTreeSet<Key>) -> io::Result<BTreeMap<Key, Flows>> {
    let mut counts: BTreeMap<Key, Flows> = BTreeMap::new();
    for flow in list(keys)? {
        let count = counts.entry(flow.key).or_default();
        if flow.is_open { count.open += 1 } else { count.forgettable += 1 }
    }
    Ok(counts)
}

/// Makes conntrack forget these keys' flows, except those of open connections.
///
/// # Errors
///
/// Those of [`flows`]; the error of the first flow that the kernel does not forget. All are tried.
pub fn forget(keys: &BTreeSet<Key>) -> io::Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let flows = list(keys)?;
    let socket = netlink::connect(NETLINK_NETFILTER)?;
    let mut failed = Ok(());
    for flow in flows.into_iter().filter(|flow| !flow.is_open) {
        match ask(&socket, flow.family, ConntrackMessage::Delete(flow.name), NLM_F_ACK, |_| {}) {
            // It has gone meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            done => failed = failed.and(done),
        }
    }
    failed
}

/// Lists the flows of these keys.
fn list(keys: &BTreeSet<Key>) -> io::Result<Vec<Flow>> {
    let mut flows: Vec<Flow> = vec![];
    for (family, is_its) in [
        (NetfilterProtoFamily::IPv4, IpAddr::is_ipv4 as fn(&IpAddr) -> bool),
        (NetfilterProtoFamily::IPv6, IpAddr::is_ipv6),
    ] {
        if !keys.iter().any(|(key, _)| is_its(&key.gateway.into())) {
            continue;
        }
        let socket = netlink::connect(NETLINK_NETFILTER)?;
        let listed = ask(&socket, family, ConntrackMessage::Get(vec![]), NLM_F_DUMP, |message| {
            if let ConntrackMessage::New(attributes) = message {
                flows.extend(Flow::of(family, attributes, keys));
            }
        });
        match listed {
            Err(_) if !Path::new(IN_USE).exists() => {}
            listed => listed?,
        }
    }
    let own: BTreeSet<_> = flows.iter().filter(|flow| flow.is_tcp()).map(|flow| flow.own).collect();
    if !own.is_empty() {
        let open = listeners::connections(&own)?;
        for flow in &mut flows {
            flow.is_open = flow.is_tcp() && open.contains(&(flow.own, flow.peer));
        }
    }
    Ok(flows)
}

fn ask(
    socket: &Socket,
    family: NetfilterProtoFamily,
    message: ConntrackMessage,
    flags: u16,
    mut each: impl FnMut(ConntrackMessage),
) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
    netlink::send(socket, NetlinkMessage::new(header, message.into()))?;
    netlink::receive(socket, |message: NetfilterMessage| {
        if let NetfilterMessageInner::Conntrack(message) = message.inner {
            each(message);
        }
    })
}

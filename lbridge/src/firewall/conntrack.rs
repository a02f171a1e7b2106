//! Flows that conntrack knows. A firewall lets in what belongs to a known flow (`ct state established accept`), so that a flow
//! whose first packet came by an accept rule of lbridge's stays open after that rule is gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use lbridge_common::wire::{AcceptedKey, TCP};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, Nla as _};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Tuple},
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::{
    host::{listeners, netlink},
    planning::reality::Flows,
};

/// `CTA_ZONE` (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const CTA_ZONE: u16 = 18;
/// There in a network namespace that tracks connections.
const IN_USE: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// Key of what an accept rule lets in, with the bits of it that count.
type Key = (AcceptedKey, u32);

/// A flow, by the ends of its first packet.
#[derive(Debug)]
struct Flow {
    key: Key,
    source: SocketAddr,
    destination: SocketAddr,
    /// A socket of the host has it: a connection that goes on, as all do when their rule is denied.
    is_open: bool,
    /// What names it to the kernel.
    name: Vec<ConntrackAttribute>,
}

impl Flow {
    /// Of these keys' flows, if it is one.
    fn of(attributes: Vec<ConntrackAttribute>, keys: &BTreeSet<Key>) -> Option<Self> {
        let is_name = |attribute: &ConntrackAttribute| match attribute {
            ConntrackAttribute::CtaTupleOrig(_) => true,
            ConntrackAttribute::Other(other) => other.kind() == CTA_ZONE,
            _ => false,
        };
        let name: Vec<_> = attributes.into_iter().filter(is_name).collect();
        let first = name.iter().find_map(|attribute| match attribute {
            ConntrackAttribute::CtaTupleOrig(parts) => Some(parts),
            _ => None,
        })?;
        let (mut source, mut destination) = (None, None);
        let (mut protocol, mut source_port, mut destination_port) = (None, None, None);
        for part in first {
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
        let (source, destination) =
            (SocketAddr::new(source?, source_port?), SocketAddr::new(destination?, destination_port?));
        let packet = AcceptedKey {
            gateway: destination.ip().into(),
            port: destination.port(),
            protocol: protocol?.into(),
            source: source.ip().into(),
        };
        let key = *keys.iter().find(|(key, bits)| key.matches(*bits, &packet))?;
        Some(Self { key, source, destination, is_open: false, name })
    }

    fn is_tcp(&self) -> bool {
        self.key.0.protocol == u16::from(TCP)
    }

    /// Removes it. One that has gone meanwhile is as good.
    fn forget(self) -> io::Result<()> {
        let family =
            if self.source.is_ipv4() { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
        match ask(family, ConntrackMessage::Delete(self.name), NLM_F_ACK, |_| {}) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            done => done,
        }
    }
}

/// How many flows there are of each of these keys; keys that have none are left out.
///
/// # Errors
///
/// If the kernel tracks connections and does not tell which.
pub fn flows(keys: &BTreeSet<Key>) -> io::Result<BTreeMap<Key, Flows>> {
    let mut counts: BTreeMap<Key, Flows> = BTreeMap::new();
    for flow in list(keys)? {
        let count = counts.entry(flow.key).or_default();
        if flow.is_open { count.open += 1 } else { count.over += 1 }
    }
    Ok(counts)
}

/// Removes a key's flows, but those of connections that are open: they go on.
///
/// # Errors
///
/// As [`flows`]; if the kernel does not remove one.
pub fn forget(keys: &BTreeSet<Key>) -> io::Result<()> {
    list(keys)?.into_iter().filter(|flow| !flow.is_open).try_for_each(Flow::forget)
}

/// The flows of these keys.
fn list(keys: &BTreeSet<Key>) -> io::Result<Vec<Flow>> {
    let mut flows: Vec<Flow> = vec![];
    for (family, is_its) in [
        (NetfilterProtoFamily::IPv4, IpAddr::is_ipv4 as fn(&IpAddr) -> bool),
        (NetfilterProtoFamily::IPv6, IpAddr::is_ipv6),
    ] {
        if !keys.iter().any(|(key, _)| is_its(&key.gateway.into())) {
            continue;
        }
        let listed = ask(family, ConntrackMessage::Get(vec![]), NLM_F_DUMP, |message| {
            if let ConntrackMessage::New(attributes) = message {
                flows.extend(Flow::of(attributes, keys));
            }
        });
        match listed {
            Err(_) if !Path::new(IN_USE).exists() => {}
            listed => listed?,
        }
    }
    let dialled: BTreeSet<_> =
        flows.iter().filter(|flow| flow.is_tcp()).map(|flow| flow.destination).collect();
    if !dialled.is_empty() {
        let open = listeners::connections(&dialled)?;
        for flow in &mut flows {
            flow.is_open = flow.is_tcp() && open.contains(&(flow.destination, flow.source));
        }
    }
    Ok(flows)
}

fn ask(
    family: NetfilterProtoFamily,
    message: ConntrackMessage,
    flags: u16,
    mut each: impl FnMut(ConntrackMessage),
) -> io::Result<()> {
    let socket = netlink::connect(NETLINK_NETFILTER)?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
    netlink::send(&socket, NetlinkMessage::new(header, message.into()))?;
    netlink::receive(&socket, |message: NetfilterMessage| {
        if let NetfilterMessageInner::Conntrack(message) = message.inner {
            each(message);
        }
    })
}

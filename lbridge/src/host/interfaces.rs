//! Interfaces: lists them and their addresses with rtnetlink, and wakes the caller when they change.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressScope},
    link::{InfoKind, LinkAttribute, LinkInfo},
};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::mpsc;

use super::scratch;
use crate::planning::inventory::Interface;

/// The pause before a broken netlink socket is replaced.
const REOPEN: Duration = Duration::from_secs(1);

/// A connection to rtnetlink.
#[derive(Debug, Clone)]
pub struct Interfaces {
    handle: Handle,
}

impl Interfaces {
    /// Connects to rtnetlink and subscribes to changes. Every change of a link or an address sends a unit to
    /// `wake`. If the channel is full a wake-up is pending already.
    pub fn connect(wake: mpsc::Sender<()>) -> anyhow::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
        tokio::spawn(connection);
        follow(wake)?;
        Ok(Self { handle })
    }

    /// Lists the interfaces of this namespace with their addresses of global scope. Leaves out link-local
    /// addresses, since nothing routes a container's connection there without naming an interface.
    pub async fn list(&self) -> anyhow::Result<Vec<Interface>> {
        let mut interfaces = BTreeMap::new();
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links.try_next().await.context("cannot list interfaces")? {
            let mut interface = Interface {
                index: link.header.index,
                name: String::new(),
                is_bridge: false,
                is_port: false,
                addresses: vec![],
            };
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => interface.name = name,
                    LinkAttribute::Controller(index) => interface.is_port = index != 0,
                    LinkAttribute::LinkInfo(infos) => {
                        interface.is_bridge =
                            infos.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Bridge)));
                    }
                    _ => {}
                }
            }
            interfaces.insert(interface.index, interface);
        }
        let mut addresses = self.handle.address().get().execute();
        while let Some(address) = addresses.try_next().await.context("cannot list addresses")? {
            let Some(interface) = interfaces.get_mut(&address.header.index) else { continue };
            if address.header.scope != AddressScope::Universe {
                continue;
            }
            // IFA_LOCAL is the interface's own where IFA_ADDRESS may be a peer's (rtnetlink(7)); IPv6 has
            // only the latter.
            let (mut local, mut other): (Option<IpAddr>, Option<IpAddr>) = (None, None);
            for attribute in &address.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => local = Some(*ip),
                    AddressAttribute::Address(ip) => other = Some(*ip),
                    _ => {}
                }
            }
            interface.addresses.extend(local.or(other).map(|ip| (ip, address.header.prefix_len)));
        }
        for interface in interfaces.values_mut() {
            // IPv4 first: containers dial it.
            interface.addresses.sort_by_key(|(ip, _)| (ip.is_ipv6(), *ip));
        }
        Ok(interfaces.into_values().collect())
    }
}

/// Lists the interfaces of this thread's network namespace over a connection of its own.
pub async fn list() -> anyhow::Result<Vec<Interface>> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let connection = tokio::spawn(connection);
    let interfaces = Interfaces { handle }.list().await;
    connection.abort();
    interfaces
}

fn is_scratch(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    use RouteNetlinkMessage::{DelLink, NewLink};
    let NetlinkPayload::InnerMessage(NewLink(link) | DelLink(link)) = &message.payload else {
        return false;
    };
    let mut names = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    });
    names.any(|name| scratch::is_link(name))
}

/// Spawns a task that sends a wake-up for every change, and replaces the socket if it breaks.
fn follow(wake: mpsc::Sender<()>) -> anyhow::Result<()> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let open = move || {
        rtnetlink::new_multicast_connection(&groups).context("cannot listen for changes of interfaces")
    };
    let mut connection = open()?;
    tokio::spawn(async move {
        loop {
            let (task, _, mut messages) = connection;
            tokio::spawn(task);
            while let Some((message, _)) = messages.next().await {
                // Links of lbridge's own scratch namespaces do not count as changes.
                if !is_scratch(&message) {
                    let _ = wake.try_send(());
                }
            }
            tracing::warn!("interface watch ended; restarting it");
            connection = loop {
                tokio::time::sleep(REOPEN).await;
                match open() {
                    Ok(connection) => break connection,
                    Err(error) => tracing::warn!(
                        error = format!("{error:#}"),
                        "interface watch failed to start; trying again"
                    ),
                }
            };
            // Changes in the meantime were not reported.
            let _ = wake.try_send(());
        }
    });
    Ok(())
}

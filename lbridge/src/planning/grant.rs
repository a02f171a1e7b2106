//! Grants: for whom an address may use an entry that is not for all of its network. [`resolve`](super::resolve) makes them; the
//! owner of the kernel's map compares each with what the engine says now, and takes back what is not so any more.

use std::net::IpAddr;

use super::{
    inventory::{Attachment, DockerNetwork, find_networks},
    rule::Network,
};

/// A container that a rule names, on the rule's network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Grant {
    /// The rule's network.
    pub network: Network,
    /// The container's name or id, as the rule has it.
    pub container: String,
}

/// The engine's networks that a rule's network can mean. None for a namespace, whose rules are for all who are inside.
pub fn networks_meant<'a>(network: &Network, known: &'a [DockerNetwork]) -> Vec<&'a DockerNetwork> {
    match network {
        Network::Docker(name) => find_networks(known, name),
        Network::Bridge(name) => {
            known.iter().filter(|network| network.bridge.as_ref() == Some(name)).collect()
        }
        Network::Container(_) | Network::Netns(_) | Network::Process(_) => vec![],
    }
}

/// The addresses that a container has on these networks; `None` if it is on none of them.
pub fn addresses_on(attachments: &[Attachment], networks: &[&DockerNetwork]) -> Option<Vec<IpAddr>> {
    let is_there = |there: &&Attachment| networks.iter().any(|network| there.is_on(network));
    let mut there = attachments.iter().filter(is_there).peekable();
    there.peek()?;
    Some(there.flat_map(|there| there.addresses.iter().copied()).collect())
}

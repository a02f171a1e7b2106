//! Grants: the containers for which an address may use an entry that is not for its whole network.
//! [`resolve`](super::resolve) makes them. The owner of the kernel's map compares each with what the engine
//! reports now, and revokes those that no longer hold.

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

/// Returns the engine's networks that a rule's network can mean. Empty for a namespace, whose rules are for
/// everybody inside.
pub fn networks_meant<'a>(network: &Network, known: &'a [DockerNetwork]) -> Vec<&'a DockerNetwork> {
    match network {
        Network::Docker(name) => find_networks(known, name),
        Network::Bridge(name) => {
            known.iter().filter(|network| network.bridge.as_ref() == Some(name)).collect()
        }
        Network::Container(_) | Network::Netns(_) | Network::Process(_) => vec![],
    }
}

/// Returns the addresses that a container has on these networks; `None` if it is on none of them.
pub fn addresses_on(attachments: &[Attachment], networks: &[&DockerNetwork]) -> Option<Vec<IpAddr>> {
    let is_there = |there: &&Attachment| networks.iter().any(|network| there.is_on(network));
    let mut there = attachments.iter().filter(is_there).peekable();
    there.peek()?;
    Some(there.flat_map(|there| there.addresses.iter().copied()).collect())
}

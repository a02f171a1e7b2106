//! One look at the host: the Inventory.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    docker::watch::{Presence, View},
    host::{interfaces::Interfaces, listeners},
    planning::{
        inventory::{DockerPresence, Inventory, ListenerKind},
        rule::{Rules, Target},
    },
};

/// Looks. `refused` are listeners, by inode, of which a closer look found that the kernel cannot be given them.
pub(super) async fn observe(
    rules: &Rules,
    interfaces: &Interfaces,
    docker: Option<&View>,
    refused: &BTreeMap<u64, ListenerKind>,
) -> anyhow::Result<Inventory> {
    let mut listeners = listeners::tcp()?;
    for listener in &mut listeners {
        if let Some(kind) = refused.get(&listener.inode) {
            listener.kind = *kind;
        }
    }
    let unix: BTreeSet<_> = rules
        .iter()
        .filter_map(|(_, rule, _)| match &rule.spec.target {
            Target::Unix(path) => Some(path.clone()),
            Target::Port(_) | Target::Address(_) => None,
        })
        .collect();
    Ok(Inventory {
        docker_networks: docker.map(|view| view.networks.clone()).unwrap_or_default(),
        docker: match docker.map(|view| &view.presence) {
            None => DockerPresence::Off,
            Some(Presence::Reachable { .. }) => DockerPresence::Reachable,
            Some(Presence::Away { .. } | Presence::Unknown) => DockerPresence::Away,
        },
        interfaces: interfaces.list().await?,
        listeners,
        unix_listeners: if unix.is_empty() { unix } else { listeners::unix(unix)? },
    })
}

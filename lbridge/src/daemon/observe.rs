//! One look at the host: the Inventory.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    docker::watch::{Presence, View},
    host::{interfaces::Interfaces, listeners, netns},
    planning::{
        inventory::{Absence, DockerPresence, Entrance, Inventory, ListenerKind, Namespace, NamespaceId},
        rule::{Network, ProcessStart, Rules, Target},
    },
};

/// Looks. `refused` are listeners, by inode, of which a closer look found that the kernel cannot be given them.
pub(super) async fn observe(
    rules: &Rules,
    interfaces: &Interfaces,
    docker: Option<&View>,
    refused: &BTreeMap<u64, ListenerKind>,
    host: NamespaceId,
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
        namespaces: namespaces(rules, docker, host),
    })
}

/// The namespaces that the rules name.
fn namespaces(
    rules: &Rules,
    docker: Option<&View>,
    host: NamespaceId,
) -> BTreeMap<Network, Result<Namespace, Absence>> {
    let mut namespaces = BTreeMap::new();
    for (_, rule, _) in rules.iter() {
        if rule.network.is_namespace() && !namespaces.contains_key(&rule.network) {
            let found = namespace(&rule.network, rule.process.as_ref(), docker, host);
            namespaces.insert(rule.network.clone(), found);
        }
    }
    namespaces
}

fn namespace(
    network: &Network,
    process: Option<&ProcessStart>,
    docker: Option<&View>,
    host: NamespaceId,
) -> Result<Namespace, Absence> {
    let (entrance, address) = match network {
        Network::Docker(_) | Network::Bridge(_) => {
            return Err(Absence::Unsuitable("it is a network of the host".to_owned()));
        }
        Network::Netns(path) => (Entrance::Path(path.clone()), None),
        Network::Process(pid) => (Entrance::Process { pid: *pid, cgroup: None }, None),
        Network::Container(name) => {
            let Some(docker) = docker else {
                let why = "the daemon runs with --no-docker; name the process instead: pid:N";
                return Err(Absence::Unsuitable(why.to_owned()));
            };
            let container = match docker.containers.get(name) {
                Some(Some(container)) => container,
                Some(None) => return Err(Absence::NotThere(format!("no container {name}"))),
                None => {
                    return Err(Absence::NotThere(format!("Docker has not told of container {name} yet")));
                }
            };
            let Some(pid) = container.pid else {
                return Err(Absence::NotThere(format!("container {name} does not run")));
            };
            (Entrance::Process { pid, cgroup: Some(container.id.clone()) }, container.address)
        }
    };
    let namespace = netns::Namespace::open(&entrance, host);
    let namespace = match network {
        // Whoever has the number now, it will not come back.
        Network::Process(pid) if netns::process_start(*pid).ok().as_ref() != process => {
            let why = format!("process {pid} has ended; `lbridge deny {network}` removes its rules");
            return Err(Absence::Unsuitable(why));
        }
        _ => namespace?,
    };
    let loopback = namespace.loopback().map_err(|error| Absence::Unsuitable(format!("{error:#}")))?;
    Ok(Namespace { key: namespace.key, loopback, address })
}

//! Observer: makes observations of the host, each an [`Inventory`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    api::protocol::ListenerUser,
    docker::view::{self, ContainerLookup, EngineStatus, View},
    host::{interfaces::Interfaces, listeners, netns, trusted, users::Users},
    planning::{
        desired::Desired,
        inventory::{
            Container, EngineAvailability, Incumbents, Inventory, ListenerKind, Namespace, NamespaceId,
            NetnsRef, NetnsUnavailable, SeenContainer,
        },
        owner::{self, Sockets},
        rule::{Network, ProcessStart, Protocol, RuleId, Rules, Target},
    },
};

/// First processes of containers, by container id and pid, as they were when first seen; `None` if there was
/// none. Pids are reused, and what is known from an engine that is away grows stale.
pub(super) type Processes = BTreeMap<(String, u32), Option<ProcessStart>>;

/// The observer of the host, and what it must remember from one observation to the next.
#[derive(Debug)]
pub(super) struct Observer {
    interfaces: Interfaces,
    /// Id of the host's network namespace.
    host: NamespaceId,
    processes: Processes,
    /// Listeners, by inode, that the kernel cannot be given; kept at most as long as they exist.
    refused: BTreeMap<u64, ListenerKind>,
    /// The services that were seen last.
    incumbents: Incumbents,
    /// Names of the users who own listeners.
    pub(super) users: Users,
}

impl Observer {
    /// Creates an observer that knows the processes of these containers.
    pub(super) fn new(interfaces: Interfaces, host: NamespaceId, seen: &[SeenContainer]) -> Self {
        let known = |seen: &SeenContainer| ((seen.id.clone(), seen.pid), Some(seen.start.clone()));
        Self {
            interfaces,
            host,
            processes: seen.iter().map(known).collect(),
            refused: BTreeMap::new(),
            incumbents: Incumbents::new(),
            users: Users::default(),
        }
    }

    /// Returns the first processes of the containers that were seen.
    pub(super) fn processes(&self) -> &Processes {
        &self.processes
    }

    /// Returns the id of the host's network namespace.
    pub(super) fn host(&self) -> NamespaceId {
        self.host
    }

    /// Notes listeners, by inode, that the kernel cannot be given.
    pub(super) fn note_refused(&mut self, mut refused: BTreeMap<u64, ListenerKind>) {
        self.refused.append(&mut refused);
    }

    /// Forgets which listeners had no room in the kernel's map: there is room again.
    pub(super) fn note_room(&mut self) {
        self.refused.retain(|_, kind| *kind != ListenerKind::NoRoom);
    }

    /// Notes which services an observation has found; the next one lets them keep their ports.
    pub(super) fn note_incumbents(&mut self, inventory: &Inventory) {
        self.incumbents.clone_from(&inventory.incumbents);
    }

    /// Observes the host, as far as `rules` need it. `aliases` are the host's other addresses that containers
    /// dial.
    pub(super) async fn observe(
        &mut self,
        rules: &Rules,
        docker: Option<&View>,
        aliases: &BTreeSet<IpAddr>,
    ) -> anyhow::Result<Inventory> {
        let mut listeners = listeners::tcp()?;
        // A kernel may lack udp_diag; that does not affect TCP.
        let (mut udp_sockets, udp_unseen) = match wants_udp(rules).then(listeners::udp) {
            None => (vec![], None),
            Some(Ok(sockets)) => (sockets, None),
            Some(Err(error)) => (vec![], Some(format!("{error:#}"))),
        };
        let mut still_there = BTreeMap::new();
        for listener in listeners.iter_mut().chain(&mut udp_sockets) {
            if let Some(kind) = self.refused.get(&listener.inode) {
                listener.kind = *kind;
                still_there.insert(listener.inode, *kind);
            }
        }
        self.refused = still_there;
        let unix: BTreeSet<_> = rules
            .iter()
            .filter_map(|(_, rule, _)| match &rule.spec.target {
                Target::Unix(path) => Some(path.clone()),
                Target::Port(_) | Target::Address(_) => None,
            })
            .collect();
        let namespaces = namespaces(rules, docker, self.host, &mut self.processes);
        let mut inventory = Inventory {
            docker_networks: docker.map(|view| view.networks.clone()).unwrap_or_default(),
            docker: match docker.map(|view| &view.presence) {
                None => EngineAvailability::Off,
                Some(EngineStatus::Reachable { .. }) => EngineAvailability::Reachable,
                Some(EngineStatus::Away { .. } | EngineStatus::Unknown) => EngineAvailability::Away,
            },
            containers: docker
                .map(|view| containers(view, rules, &self.processes, self.host))
                .unwrap_or_default(),
            host_gateways: docker.map(|view| view.host_gateways.clone()).unwrap_or_default(),
            aliases: aliases.clone(),
            container_names: docker.map(|view| view.container_names.clone()).unwrap_or_default(),
            interfaces: self.interfaces.list().await?,
            listeners,
            udp_sockets,
            udp_unseen,
            untrusted_paths: trusted::untrusted(&unix),
            unix_listeners: if unix.is_empty() { unix } else { listeners::unix(unix)? },
            namespaces,
            incumbents: Incumbents::new(),
        };
        inventory.incumbents = owner::incumbents(rules, &inventory, &self.incumbents);
        Ok(inventory)
    }

    /// Finds the owner of the listener that serves each rule.
    pub(super) async fn owners(
        &mut self,
        desired: &Desired,
        inventory: &Inventory,
    ) -> BTreeMap<RuleId, ListenerUser> {
        let sockets = Sockets::new(inventory);
        let rules = desired.outcomes.iter().map(|outcome| &outcome.rule);
        let uids: Vec<_> = rules.filter_map(|rule| Some((rule.id(), sockets.user_of(rule)?))).collect();
        self.users.look(&uids.iter().map(|(_, uid)| *uid).collect()).await;
        let named = |uid| ListenerUser { uid, name: self.users.name(uid).map(str::to_owned) };
        uids.into_iter().map(|(id, uid)| (id, named(uid))).collect()
    }
}

/// Returns every container that Docker has reported. While Docker is away, nobody reports when a container
/// ends, or which container has its address then: the address stays the container's while its process exists.
fn containers(
    docker: &View,
    rules: &Rules,
    processes: &Processes,
    host: NamespaceId,
) -> BTreeMap<String, Result<Container, String>> {
    let of_localhost = rules
        .iter()
        .filter(|(_, rule, _)| rule.options.localhost)
        .flat_map(|(_, rule, _)| &rule.options.from);
    let of_localhost: BTreeSet<&String> = of_localhost.collect();
    let reachable = matches!(docker.presence, EngineStatus::Reachable { .. });
    let lives = |id: &str, pid| {
        let known = processes.get(&(String::from(id), pid)).cloned().flatten();
        known.is_some() && netns::process_start(pid).ok() == known
    };
    let cookie = |container: &view::Container| {
        let pid = container.pid?;
        let start = processes.get(&(container.id.clone(), pid)).cloned().flatten()?;
        let entrance = NetnsRef::Process { pid, start: Some(start), container: Some(container.id.clone()) };
        // A namespace that cannot be entered has ended, or is the host's: its localhost is not redirected.
        netns::Namespace::open(&entrance, host).ok()?.cookie().ok()?
    };
    let seen = |name: &String, lookup: &ContainerLookup| match lookup {
        ContainerLookup::NotFound => None,
        ContainerLookup::Failed(why) => Some(Err(why.clone())),
        ContainerLookup::Found(container) => {
            let lives = || container.pid.is_some_and(|pid| lives(&container.id, pid));
            let running = container.running && (reachable || lives());
            let netns = of_localhost.contains(name).then(|| cookie(container)).flatten();
            Some(Ok(Container { running, attachments: container.attachments.clone(), netns }))
        }
    };
    docker.containers.iter().filter_map(|(name, lookup)| Some((name.clone(), seen(name, lookup)?))).collect()
}

/// Returns true if a rule needs UDP sockets to be observed.
pub(super) fn wants_udp(rules: &Rules) -> bool {
    rules.iter().any(|(id, ..)| id.protocol == Protocol::Udp)
}

/// Looks up the namespaces that the rules name.
fn namespaces(
    rules: &Rules,
    docker: Option<&View>,
    host: NamespaceId,
    processes: &mut Processes,
) -> BTreeMap<Network, Result<Namespace, NetnsUnavailable>> {
    // Only processes of running containers; one that was seen stays known while Docker reports it.
    let running = docker.into_iter().flat_map(|view| view.containers.values());
    let running: BTreeSet<_> = running
        .filter_map(ContainerLookup::found)
        .filter_map(|container| Some((container.id.clone(), container.pid?)))
        .collect();
    processes.retain(|process, _| running.contains(process));
    for (id, pid) in running {
        // A missing process is remembered, too: one that has this pid later is a different process.
        processes.entry((id, pid)).or_insert_with(|| netns::process_start(pid).ok());
    }
    let mut namespaces = BTreeMap::new();
    for (_, rule, _) in rules.iter() {
        if rule.network.is_namespace() && !namespaces.contains_key(&rule.network) {
            let found = namespace(&rule.network, rule.process.as_ref(), docker, host, processes);
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
    processes: &Processes,
) -> Result<Namespace, NetnsUnavailable> {
    let (entrance, address) = match network {
        Network::Docker(_) | Network::Bridge(_) => {
            return Err(NetnsUnavailable::Unsuitable("it is a network of the host".to_owned()));
        }
        Network::Netns(path) => (NetnsRef::Path(path.clone()), None),
        Network::Process(pid) => {
            (NetnsRef::Process { pid: *pid, start: process.cloned(), container: None }, None)
        }
        Network::Container(name) => {
            let Some(docker) = docker else {
                let why = "the daemon runs with --no-docker; name the process instead: pid:N";
                return Err(NetnsUnavailable::Unsuitable(why.to_owned()));
            };
            let container = match docker.containers.get(name) {
                Some(ContainerLookup::Found(container)) => container,
                Some(ContainerLookup::NotFound) => {
                    return Err(NetnsUnavailable::NotThere(format!("no container {name}")));
                }
                Some(ContainerLookup::Failed(why)) => return Err(NetnsUnavailable::Unsuitable(why.clone())),
                None => {
                    return Err(NetnsUnavailable::NotThere(format!(
                        "the engine has not reported container {name} yet"
                    )));
                }
            };
            let Some(pid) = container.pid else {
                return Err(NetnsUnavailable::NotThere(format!("container {name} is not running")));
            };
            let start = processes.get(&(container.id.clone(), pid)).cloned().flatten();
            let Some(start) = start else {
                return Err(NetnsUnavailable::NotThere(format!("container {name} is not running")));
            };
            let entrance =
                NetnsRef::Process { pid, start: Some(start), container: Some(container.id.clone()) };
            (entrance, container.address())
        }
    };
    let namespace = netns::Namespace::open(&entrance, host);
    let namespace = match network {
        // Whichever process has the pid now, the one that the rule is for will not come back.
        Network::Process(pid) if netns::process_start(*pid).ok().as_ref() != process => {
            let why = format!("process {pid} has ended; `lbridge deny {network}` removes its rules");
            return Err(NetnsUnavailable::Unsuitable(why));
        }
        _ => namespace?,
    };
    let loopback =
        namespace.loopback().map_err(|error| NetnsUnavailable::Unsuitable(format!("{error:#}")))?;
    Ok(Namespace { key: namespace.key, loopback, address })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        docker::view::Container,
        planning::rule::{Origin, PortSpec, Rule},
    };

    /// A pid that was unused when first seen belongs to a stranger later.
    #[test]
    fn a_process_that_was_gone_stays_gone() {
        let rule = Rule::new("container:c".parse().unwrap(), PortSpec::same(80));
        let rules = Rules::default().allow([rule.clone()], Origin::Cli).unwrap();
        let container =
            |pid| Container { id: "ab".repeat(32), pid: Some(pid), running: true, attachments: vec![] };
        let view = |pid| View {
            presence: EngineStatus::Unknown,
            networks: vec![],
            containers: [("c".to_owned(), ContainerLookup::Found(container(pid)))].into(),
            container_names: vec![],
            labelled: vec![],
            host_gateways: vec![],
        };
        let host = NamespaceId { device: 0, inode: 0 };
        let mut processes = Processes::new();
        let dead = 0x7fff_fff0;
        namespaces(&rules, Some(&view(dead)), host, &mut processes);
        assert_eq!(processes.get(&("ab".repeat(32), dead)), Some(&None));

        let own = std::process::id();
        let mut processes = Processes::from([(("ab".repeat(32), own), None)]);
        let found = namespaces(&rules, Some(&view(own)), host, &mut processes);
        assert_eq!(
            found[&rule.network],
            Err(NetnsUnavailable::NotThere("container c is not running".to_owned())),
            "not even looked at"
        );
    }
}

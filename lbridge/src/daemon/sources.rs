//! Source gate: the only owner of `SOURCES`, the kernel's list of addresses that may use entries which are
//! not for all of their network (`--from`). An address can be assigned again as soon as its container has
//! ended. So it leaves the list at once, whatever the loop is doing: a firewall tool that hangs, a slow disk
//! or a command must not keep it there.
//!
//! The gate compares grants with the engine's view. The loop says which containers each address is meant for
//! ([`SourceGate::want`]); the engine's view says which container has the address. At every change of either,
//! a thread of the gate's own removes the addresses that the view contradicts. Such an address cannot be
//! added, either: the loop may still be carrying out a plan made from an older view.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lbridge_common::wire::SourceKey;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::{AbortHandle, JoinSet},
};

use super::priority_thread;
use crate::{
    docker::view::{Container, View},
    host::netns::Namespace,
    kernel::maps,
    planning::{
        grant::{Grant, addresses_on, networks_meant},
        inventory::{DockerNetwork, NamespaceId, NetnsRef},
        rule::Network,
    },
};

/// First process of a container: the container's id and the process id.
type Process = (String, u32);

/// The loop's handle to the gate.
#[derive(Debug)]
pub(super) struct SourceGate {
    gate: Arc<Gate>,
    /// Sender that gives the gate's thread its work; `None` once it is used.
    follower: Option<oneshot::Sender<Follower>>,
}

#[derive(Debug)]
struct Gate {
    state: Mutex<State>,
    /// Notifies the thread that the grants have changed.
    granted: Notify,
}

#[derive(Debug)]
struct State {
    map: maps::Sources,
    /// The engine's view; `None` without an engine.
    view: Option<watch::Receiver<View>>,
    /// Addresses that the loop wants in the map, each with the containers that it is granted to.
    wanted: BTreeMap<SourceKey, Source>,
    /// First processes of containers that have ended although the engine has not reported it yet.
    ended: BTreeSet<Process>,
}

#[derive(Debug)]
struct Source {
    grants: BTreeSet<Grant>,
    /// True if the gate has removed the address since it was last added.
    revoked: bool,
}

/// Error of adding an address that the engine's view contradicts.
#[derive(Debug, thiserror::Error)]
#[error("{0} is no longer the address of a container that the rule is for")]
pub(super) struct Contradicted(IpAddr);

impl SourceGate {
    /// Starts the gate. Call this while the daemon has the privilege to raise the thread's priority. Until
    /// the loop says what it wants, the addresses that another daemon has entered stay.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub(super) fn start(map: maps::Sources) -> anyhow::Result<Self> {
        let state = State { map, view: None, wanted: BTreeMap::new(), ended: BTreeSet::new() };
        let gate = Arc::new(Gate { state: Mutex::new(state), granted: Notify::new() });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (follower, told) = oneshot::channel::<Follower>();
        priority_thread::start("sources", move || {
            if let Ok(follower) = told.blocking_recv() {
                runtime.block_on(follower.run());
            }
        })?;
        Ok(Self { gate, follower: Some(follower) })
    }

    /// Follows the engine's view from now on. `view` is `None` without an engine: then no container has an
    /// address. `host` is the network namespace of this process. `wake` wakes the loop, which tries again
    /// what failed.
    pub(super) fn follow(
        &mut self,
        view: Option<watch::Receiver<View>>,
        host: NamespaceId,
        wake: mpsc::Sender<()>,
    ) {
        let follower = self.follower.take();
        self.gate.state().view.clone_from(&view);
        if let (Some(follower), Some(view)) = (follower, view) {
            let gate = self.gate.clone();
            let _ = follower.send(Follower { gate, view, host, wake, processes: HashMap::new() });
        }
    }

    /// Sets the addresses that the loop wants, and the containers that they are granted to. Adds none, and
    /// removes those that the engine's view contradicts.
    pub(super) fn want(&self, grants: &BTreeMap<SourceKey, BTreeSet<Grant>>) {
        let mut state = self.gate.state();
        if state.want(grants) {
            self.gate.granted.notify_one();
        }
        // The loop sees an address that could not be removed at its next observation, and tries again.
        state.revoke();
    }

    /// Adds an address that the loop wants.
    ///
    /// # Errors
    ///
    /// [`Contradicted`], if no container that it is granted to has it now; otherwise the kernel's error.
    pub(super) fn add(&self, key: &SourceKey) -> anyhow::Result<()> {
        self.gate.state().add(key)
    }

    /// Removes an address that the loop does not want.
    ///
    /// # Errors
    ///
    /// If the kernel refuses the change.
    pub(super) fn remove(&self, key: &SourceKey) -> anyhow::Result<()> {
        self.gate.state().map.remove(key)
    }
}

impl Gate {
    /// Locks the state, for as long as a few lookups and changes of the map take, and never across a wait.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Replaces the grants. Returns true if they differ from the previous ones.
    fn want(&mut self, grants: &BTreeMap<SourceKey, BTreeSet<Grant>>) -> bool {
        let same = self.wanted.len() == grants.len()
            && self.wanted.iter().zip(grants).all(|((k, v), (key, grants))| k == key && v.grants == *grants);
        if same {
            return false;
        }
        let mut before = std::mem::take(&mut self.wanted);
        let source = |(key, grants): (&SourceKey, &BTreeSet<Grant>)| {
            let revoked = before.remove(key).is_some_and(|source| source.revoked);
            (*key, Source { grants: grants.clone(), revoked })
        };
        self.wanted = grants.iter().map(source).collect();
        true
    }

    fn add(&mut self, key: &SourceKey) -> anyhow::Result<()> {
        let contradicted = || Contradicted(key.source.into());
        let source = self.wanted.get(key).ok_or_else(contradicted)?;
        let view = self.view.as_ref().ok_or_else(contradicted)?.borrow();
        let holds = Holders::new(&view, &self.ended).any(key, &source.grants);
        drop(view);
        if !holds {
            return Err(contradicted().into());
        }
        self.map.add(key)?;
        if let Some(source) = self.wanted.get_mut(key) {
            source.revoked = false;
        }
        Ok(())
    }

    /// Removes every address that the view contradicts. Returns false if one could not be removed.
    fn revoke(&mut self) -> bool {
        let Some(view) = self.view.as_ref().map(|view| view.borrow()) else { return true };
        let mut holders = Holders::new(&view, &self.ended);
        let in_force = self.wanted.iter().filter(|(_, source)| !source.revoked);
        let contradicted: Vec<_> =
            in_force.filter(|(key, source)| !holders.any(key, &source.grants)).map(|(key, _)| *key).collect();
        drop(view);
        let mut done = true;
        for key in contradicted {
            match self.map.remove(&key) {
                Ok(()) => {
                    let (source, port) = (IpAddr::from(key.source), key.entry.port);
                    tracing::debug!(%source, port, "source revoked: its container has left");
                    self.wanted.entry(key).and_modify(|source| source.revoked = true);
                }
                Err(error) => {
                    tracing::warn!(
                        source = %IpAddr::from(key.source),
                        port = key.entry.port,
                        error = format!("{error:#}"),
                        "could not revoke a source; trying again"
                    );
                    done = false;
                }
            }
        }
        done
    }

    /// Lists the first processes of the running containers that something is granted to.
    fn processes(&self) -> BTreeSet<Process> {
        let Some(view) = self.view.as_ref().map(|view| view.borrow()) else { return BTreeSet::new() };
        let names: BTreeSet<&String> =
            self.wanted.values().flat_map(|source| &source.grants).map(|grant| &grant.container).collect();
        let process = |container: &Container| Some((container.id.clone(), container.pid?));
        names.into_iter().filter_map(|name| process(running(&view, name)?)).collect()
    }
}

/// Finds the container of this name, if it runs as far as the engine has reported.
fn running<'a>(view: &'a View, name: &str) -> Option<&'a Container> {
    let container = view.containers.get(name)?.found()?;
    container.running.then_some(container)
}

/// Addresses of containers in one view of the engine. Each container is looked up once for each network.
struct Holders<'a> {
    view: &'a View,
    ended: &'a BTreeSet<Process>,
    networks: HashMap<&'a Network, Vec<&'a DockerNetwork>>,
    addresses: HashMap<&'a Grant, BTreeSet<IpAddr>>,
}

impl<'a> Holders<'a> {
    fn new(view: &'a View, ended: &'a BTreeSet<Process>) -> Self {
        Self { view, ended, networks: HashMap::new(), addresses: HashMap::new() }
    }

    /// Returns true if one of these grants' containers has the address.
    fn any(&mut self, key: &SourceKey, grants: &'a BTreeSet<Grant>) -> bool {
        let address = IpAddr::from(key.source);
        grants.iter().any(|grant| self.addresses(grant).contains(&address))
    }

    fn addresses(&mut self, grant: &'a Grant) -> &BTreeSet<IpAddr> {
        let Self { view, ended, networks, addresses } = self;
        addresses.entry(grant).or_insert_with(|| {
            let networks = networks
                .entry(&grant.network)
                .or_insert_with(|| networks_meant(&grant.network, &view.networks));
            let lives = |container: &&Container| {
                container.pid.is_none_or(|pid| !ended.contains(&(container.id.clone(), pid)))
            };
            let container = running(view, &grant.container).filter(lives);
            container.and_then(|its| addresses_on(&its.attachments, networks)).into_iter().flatten().collect()
        })
    }
}

/// Work of the gate's thread: follows the engine's view, and the first processes of the containers that
/// something is granted to. The processes matter when the engine is away or reports late: a container ends
/// with its first process.
#[derive(Debug)]
struct Follower {
    gate: Arc<Gate>,
    view: watch::Receiver<View>,
    host: NamespaceId,
    wake: mpsc::Sender<()>,
    /// Watched processes, each with the handle that stops the watch.
    processes: HashMap<Process, AbortHandle>,
}

impl Follower {
    /// Runs until the sender of the engine's view is dropped.
    async fn run(mut self) {
        let mut ends = JoinSet::new();
        loop {
            self.view.mark_unchanged();
            if !self.gate.state().revoke() {
                let _ = self.wake.try_send(());
            }
            self.watch_processes(&mut ends);
            tokio::select! {
                biased;
                changed = self.view.changed() => if changed.is_err() { return },
                Some(ended) = ends.join_next() => if let Ok(process) = ended {
                    self.gate.state().ended.insert(process);
                },
                () = self.gate.granted.notified() => {}
            }
        }
    }

    fn watch_processes(&mut self, ends: &mut JoinSet<Process>) {
        let mut state = self.gate.state();
        let wanted = state.processes();
        state.ended.retain(|process| wanted.contains(process));
        drop(state);
        self.processes.retain(|process, watch| {
            let goes_on = wanted.contains(process);
            if !goes_on {
                watch.abort();
            }
            goes_on
        });
        for process in wanted {
            if self.processes.contains_key(&process) {
                continue;
            }
            let (this, (id, pid)) = (process.clone(), process.clone());
            let entrance = NetnsRef::Process { pid, start: None, container: Some(id) };
            // If the engine is on another host, or in another pid namespace, the pid belongs to some other
            // process: then only the engine's reports count.
            if let Ok(namespace) = Namespace::open(&entrance, self.host) {
                let end = async move {
                    namespace.gone().await;
                    this
                };
                let watch = ends.spawn(end);
                self.processes.insert(process, watch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lbridge_common::wire::{EntryKey, TCP};

    use super::*;
    use crate::{
        docker::view::{ContainerLookup, EngineStatus},
        planning::inventory::Attachment,
    };

    fn view() -> View {
        let network = |id: &str, name: &str, bridge: &str| DockerNetwork {
            id: id.to_owned(),
            name: name.to_owned(),
            driver: "bridge".to_owned(),
            bridge: Some(bridge.to_owned()),
            ..DockerNetwork::default()
        };
        let attachment = |network: &str, id: &str, ip: &str| Attachment {
            network: network.to_owned(),
            id: Some(id.to_owned()),
            addresses: vec![ip.parse().unwrap()],
        };
        let attachments = vec![attachment("app", "a", "172.18.0.2"), attachment("db", "d", "172.19.0.2")];
        let web = Container { id: "w".to_owned(), pid: Some(5), running: true, attachments };
        View {
            presence: EngineStatus::Unknown,
            networks: vec![network("a", "app", "br-app"), network("d", "db", "br-db")],
            containers: [
                ("web".to_owned(), ContainerLookup::Found(web)),
                ("gone".to_owned(), ContainerLookup::NotFound),
            ]
            .into(),
            container_names: vec![],
            labelled: vec![],
            host_gateways: vec![],
        }
    }

    /// Returns true if an address may use an entry that is granted to these containers on that network.
    fn holds(view: &View, ended: &BTreeSet<Process>, network: &str, containers: &[&str], ip: &str) -> bool {
        let grant = |container: &&str| Grant {
            network: network.parse().unwrap(),
            container: (*container).to_owned(),
        };
        let grants = containers.iter().map(grant).collect();
        let gateway = "172.18.0.1".parse::<IpAddr>().unwrap().into();
        let rule = EntryKey { gateway, ifindex: 7, port: 80, protocol: TCP.into() };
        let key = SourceKey { entry: rule, source: ip.parse::<IpAddr>().unwrap().into() };
        Holders::new(view, ended).any(&key, &grants)
    }

    fn is_webs(view: &View) -> bool {
        holds(view, &BTreeSet::new(), "app", &["web"], "172.18.0.2")
    }

    #[test]
    fn an_address_is_granted_for_as_long_as_the_container_has_it_there() {
        let (view, none) = (view(), BTreeSet::new());
        assert!(is_webs(&view));
        assert!(holds(&view, &none, "bridge:br-app", &["web"], "172.18.0.2"));
        assert!(holds(&view, &none, "app", &["gone", "unknown", "web"], "172.18.0.2"), "one is enough");
        assert!(!holds(&view, &none, "app", &["web"], "172.18.0.3"), "another address");
        assert!(!holds(&view, &none, "app", &["web"], "172.19.0.2"), "its address on another network");
        for container in ["gone", "unknown"] {
            assert!(!holds(&view, &none, "app", &[container], "172.18.0.2"), "{container}");
        }
        assert!(!holds(&view, &none, "bridge:br-other", &["web"], "172.18.0.2"));
        assert!(!holds(&view, &none, "app", &[], "172.18.0.2"));
    }

    #[test]
    fn what_the_engine_tells_takes_it_away() {
        let changed = |change: &dyn Fn(&mut View)| {
            let mut view = view();
            change(&mut view);
            is_webs(&view)
        };
        let web = |change: &dyn Fn(&mut Container)| {
            changed(&|view| {
                change(view.containers.get_mut("web").unwrap().found_mut().unwrap());
            })
        };
        assert!(web(&|_| {}));
        assert!(!web(&|web| web.running = false), "it has ended");
        assert!(!web(&|web| web.attachments[0].addresses.clear()), "it has left the network");
        assert!(!web(&|web| drop(web.attachments.remove(0))), "the list says so, too");
        assert!(!web(&|web| web.attachments[0].id = Some("b".to_owned())), "that was another network");
        assert!(!changed(&|view| drop(view.networks.remove(0))), "the network is gone");
        assert!(!changed(&|view| view.networks[0].id = "b".to_owned()), "it was made anew");
        assert!(!changed(&|view| view.networks[0].name = "other".to_owned()));
        assert!(
            !changed(&|view| drop(view.containers.insert("web".to_owned(), ContainerLookup::NotFound))),
            "it was renamed"
        );
        let wrong = ContainerLookup::Failed("the engine says: no".to_owned());
        assert!(!changed(&|view| drop(view.containers.insert("web".to_owned(), wrong.clone()))));
        assert!(!changed(&|view| view.containers.clear()), "nobody follows it");
    }

    #[test]
    fn a_process_that_has_ended_takes_it_away_until_there_is_another() {
        let mut view = view();
        let ended = BTreeSet::from([("w".to_owned(), 5)]);
        assert!(!holds(&view, &ended, "app", &["web"], "172.18.0.2"));
        view.containers.get_mut("web").unwrap().found_mut().unwrap().pid = Some(6);
        assert!(holds(&view, &ended, "app", &["web"], "172.18.0.2"));
    }
}

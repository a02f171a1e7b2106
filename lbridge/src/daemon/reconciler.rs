//! The loop: whatever wakes it, it looks afresh, decides, and changes what differs. One task owns the rules, the maps
//! and the relays. What it is asked is answered in [`commands`].

mod commands;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use lbridge_common::wire::{ListenerEvent, MAX_LISTENERS};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    configuration::Configuration,
    executor::{Executor, Failures},
    guests::Guests,
    handover::{self, Inherited},
    labels::Labels,
    manager::Manager,
    observe::{Processes, observe, wants_udp},
    report::{self, Report},
    sources::SourceGate,
};
use crate::{
    api::{
        events::News,
        protocol::{DockerStatus, Happening, ListenerUser},
        server::Command,
    },
    docker::{
        view::{Presence, Sighting, View},
        watch::Watcher,
    },
    firewall::Firewall,
    host::{interfaces::Interfaces, users::Users},
    kernel::{loader::Loaded, maps::Events},
    planning::{
        hooks::HookSet,
        inventory::{
            Abilities, DockerNetwork, Inventory, ListenerKind, NamespaceId, Product, SeenContainer,
            find_networks,
        },
        labels::Labelled,
        owner::Sockets,
        plan::{Step, plan},
        policy::{Policy, State},
        reality::Reality,
        resolve::resolve,
        rule::{Network, Rule, RuleId, Rules, Target},
    },
    relay::{PeerNames, set::RelaySet},
    store::Store,
};

/// A pass changes things and looks again until nothing is left to change; more rounds than this find nothing new.
const ROUNDS: usize = 12;
/// With events from everywhere a look without a reason only corrects what others changed behind our back.
const IDLE_LOOK: Duration = Duration::from_secs(60);
/// Where nothing tells of a listener that comes or goes, looking is the only way to know: without a kernel half, of a
/// Unix or UDP socket, of a namespace, and of the end of a relay's service that ran before its port was watched.
const POLL: Duration = Duration::from_millis(500);
/// Least distance between two looks that events ask for: long enough that a storm of them costs little, short enough to
/// go unnoticed.
const BREATH: Duration = Duration::from_millis(100);
/// An engine that takes longer than this to list its networks does not hold up `allow`.
const DOCKER_REFRESH: Duration = Duration::from_secs(2);

/// Owner of all that changes.
#[derive(Debug)]
pub(super) struct Reconciler {
    /// Those of `allow` and of the configuration.
    rules: Rules,
    /// And those of labels.
    labels: Labels,
    configuration: Configuration,
    store: Store,
    abilities: Abilities,
    executor: Executor,
    events: Option<Events>,
    interfaces: Interfaces,
    docker: Option<Watcher>,
    saved_networks: Vec<DockerNetwork>,
    saved_containers: Vec<SeenContainer>,
    /// What could not be saved, as was told.
    unsaved: BTreeSet<&'static str>,
    saved_labelled: Vec<Labelled>,
    /// Listeners, by inode, that the kernel cannot be given; for as long as they are there.
    refused: BTreeMap<u64, ListenerKind>,
    processes: Processes,
    last: Report,
    /// As last seen.
    inventory: Option<Inventory>,
    /// Names of the users who own listeners.
    users: Users,
    manager: Manager,
    /// What happens.
    news: News,
    /// What was told of Docker last.
    docker_told: DockerStatus,
}

impl Reconciler {
    #[expect(clippy::too_many_arguments, reason = "what it owns from now on, each of it once")]
    pub(super) fn new(
        rules: Rules,
        configuration: Configuration,
        store: Store,
        loaded: Loaded,
        interfaces: Interfaces,
        docker: Option<Watcher>,
        wake: mpsc::Sender<()>,
        guests: Option<Guests>,
        sources: Option<SourceGate>,
        host: NamespaceId,
    ) -> anyhow::Result<Self> {
        let Loaded { kernel, events, guests: _, sources: _, abilities } = loaded;
        let saved_containers = store.containers();
        let names = kernel.as_ref().filter(|_| abilities.hooks[HookSet::Names].is_ok());
        let names = names.map(|kernel| Arc::new(kernel.maps.peers.clone()) as Arc<dyn PeerNames>);
        Ok(Self {
            rules,
            labels: Labels::default(),
            configuration,
            saved_networks: store.networks(),
            processes: processes(&saved_containers),
            saved_containers,
            unsaved: BTreeSet::new(),
            saved_labelled: store.labelled(),
            store,
            executor: Executor {
                kernel,
                relays: RelaySet::new(names, wake.clone())?,
                firewall: Firewall::follow(wake.clone()),
                name_hooks_used: false,
                interface_check: abilities.steer.as_ref().is_ok_and(|steering| steering.interface_check),
                host,
                guests,
                sources,
                inherited: Inherited::take(),
                seen_flows: None,
                holders: HashMap::new(),
            },
            abilities,
            events,
            interfaces,
            docker,
            refused: BTreeMap::new(),
            last: Report::default(),
            inventory: None,
            users: Users::default(),
            manager: Manager::new(),
            news: News::new(wake),
            docker_told: DockerStatus::Off,
        })
    }

    /// Where it tells what happens.
    pub(super) fn news(&self) -> News {
        self.news.clone()
    }

    /// Makes what was found into what is wanted.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        self.pass().await?;
        // What the rules do not want any more must not stay open with nobody to accept.
        self.executor.inherited.close();
        if let Some(kernel) = &mut self.executor.kernel {
            kernel.retire_others()?;
        }
        Ok(())
    }

    /// Never returns but for an error that makes it pointless to go on.
    pub(super) async fn run(
        &mut self,
        mut commands: mpsc::Receiver<Command>,
        mut wakes: mpsc::Receiver<()>,
    ) -> anyhow::Result<()> {
        // Containers can cause wake-ups (a relay's refused connections), so looks keep a distance. Commands do not wait.
        let mut woken = false;
        // An address that a rule is for may be another container's now.
        let mut pressing = false;
        let mut looked = Instant::now();
        loop {
            self.manager.beat();
            let pause = if woken { BREATH } else { self.pause() };
            let due = looked + if pressing { Duration::ZERO } else { pause };
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return Ok(()),
                },
                _ = wakes.recv(), if !woken => woken = true,
                () = docker_changed(&mut self.docker), if !pressing => {
                    woken = true;
                    pressing = self.names_sources();
                }
                () = self.manager.next_beat() => {}
                happened = listener_changed(&mut self.events), if !woken => {
                    woken = true;
                    happened.iter().filter_map(report::happening).for_each(|what| self.news.tell(what));
                }
                () = sleep_until(due) => {
                    (woken, pressing) = (false, false);
                    if let Err(error) = self.pass().await {
                        tracing::error!("cannot look at the host, trying again: {error:#}");
                        tokio::time::sleep(POLL).await;
                    }
                    looked = Instant::now();
                }
            }
        }
    }

    /// Takes no new connections, and waits for those that are open, for `limit` at most. Where a service manager keeps
    /// sockets it gets those that listen, for the next daemon: new connections wait for that. How many were cut off.
    pub(super) async fn drain(&mut self, limit: Duration) -> usize {
        handover::keep(self.executor.relays.sockets());
        self.executor.relays.drain(limit).await
    }

    /// How long relayed connections may take to end when the daemon is stopped.
    pub(super) fn drain_timeout(&self) -> Duration {
        self.configuration.config().drain_timeout
    }

    /// One line for the log and for systemd.
    pub(super) fn summary(&self) -> String {
        let rules = self.last.rules();
        let count = |state| rules.iter().filter(|rule| rule.state == state).count();
        format!(
            "{} {}: {} steered, {} relayed, {} waiting, {} blocked",
            rules.len(),
            if rules.len() == 1 { "rule" } else { "rules" },
            count(State::Steered),
            count(State::Relayed),
            count(State::Waiting),
            count(State::Blocked)
        )
    }

    fn pause(&self) -> Duration {
        let rules = self.labels.rules(&self.rules);
        let blind = self.events.is_none() && !rules.is_empty();
        let inside = rules.iter().any(|(_, rule, _)| rule.network.is_namespace());
        let unix = self.rules.iter().any(|(_, rule, _)| matches!(rule.spec.target, Target::Unix(_)));
        let relaying = !self.last.policy.relays.is_empty();
        // What the kernel does not tell of is to be told in time, too.
        let followed = self.news.is_heard();
        // Nobody tells whether the containers that rules are for still run.
        let unsure = self.names_sources()
            && !matches!(self.docker_status(), DockerStatus::Reachable { .. } | DockerStatus::Off);
        let udp = wants_udp(self.labels.rules(&self.rules));
        let moving = blind || unix || inside || relaying || udp || followed || unsure;
        if moving { POLL } else { IDLE_LOOK }
    }

    /// Other addresses of the host that containers dial, as the configuration has them.
    fn aliases(&self) -> BTreeSet<IpAddr> {
        self.configuration.config().aliases.clone()
    }

    /// Whether some rule is for some containers of its network only, as those of their labels are.
    fn names_sources(&self) -> bool {
        self.labels.rules(&self.rules).iter().any(|(_, rule, _)| !rule.from.is_empty())
    }

    /// Has Docker tell of the containers that `rules` name, and of what `networks` mean, where that is not known yet.
    async fn ask_docker(&mut self, rules: &Rules, networks: impl Iterator<Item = &Network>) {
        let Some(docker) = &self.docker else { return };
        let known = docker.view();
        // Those of labels' rules, too, which `rules` may lack: who is not followed has no address.
        let followed = self.labels.rules(&self.rules);
        docker.want(names(rules, &known).into_iter().chain(names(followed, &known)).collect());
        let unknown = |network: &Network| match network {
            Network::Docker(name) => find_networks(&known.networks, name).is_empty(),
            Network::Container(name) => !matches!(known.containers.get(name), Some(Ok(Some(_)))),
            Network::Bridge(_) | Network::Netns(_) | Network::Process(_) => false,
        };
        // A range of ports names its network for each of them.
        let networks: BTreeSet<&Network> = networks.collect();
        let asked = rules.iter().filter(|(id, ..)| networks.contains(&id.network));
        let mut named = asked.flat_map(|(_, rule, _)| &rule.from);
        let is_unknown = |name: &String| !matches!(known.containers.get(name), Some(Ok(Some(_))));
        // The network may be so new that its event is still under way.
        if named.any(is_unknown) || networks.into_iter().any(unknown) {
            docker.refresh(DOCKER_REFRESH).await;
        }
    }

    /// Tells the service manager how things are.
    fn tell(&mut self) {
        let refused = self.configuration.refused().map_or("", |_| "; the configuration is not reloaded");
        self.manager.status(format!("{}{refused}", self.summary()));
    }

    fn docker_status(&self) -> DockerStatus {
        match self.docker.as_ref().map(|docker| docker.view().presence) {
            None => DockerStatus::Off,
            Some(Presence::Reachable { engine, version }) => DockerStatus::Reachable { engine, version },
            Some(Presence::Away { engine, since, error }) => {
                DockerStatus::Away { engine, since: Some(since), error }
            }
            Some(Presence::Unknown) => DockerStatus::Away {
                engine: Product::default(),
                since: None,
                error: "it has not answered since the daemon started".to_owned(),
            },
        }
    }

    /// Makes what is there into what is wanted, then keeps what was seen on disk: nobody is to wait for a slow one.
    async fn pass(&mut self) -> anyhow::Result<()> {
        let done = self.converge().await;
        self.remember_networks();
        self.remember_containers();
        done
    }

    /// Observe, resolve, plan, execute; until nothing is left to do, or nothing more can be done.
    async fn converge(&mut self) -> anyhow::Result<()> {
        let mut failures = Failures::default();
        let (mut rounds, mut unseen, mut asked_anew) = (0, None, false);
        loop {
            let view = self.docker.as_ref().map(Watcher::view);
            let settings = &self.configuration.config().labels;
            for what in self.labels.update(settings, view.as_ref(), &self.rules) {
                self.news.tell(what);
            }
            let rules = self.labels.rules(&self.rules);
            if let (Some(docker), Some(view)) = (&self.docker, &view) {
                docker.want(names(rules, view));
            }
            let observed = observe(
                rules,
                &self.interfaces,
                view.as_ref(),
                &self.refused,
                self.executor.host,
                &mut self.processes,
                &self.inventory.as_ref().map(|last| last.incumbents.clone()).unwrap_or_default(),
            )
            .await;
            let inventory = match (observed, &self.inventory) {
                (Ok(inventory), _) => Inventory { aliases: self.aliases(), ..inventory },
                // A rule that was denied must not stay in force for want of a look.
                (Err(error), Some(last)) => {
                    unseen = Some(error);
                    last.clone()
                }
                (Err(error), None) => return Err(error),
            };
            // Once: an engine that is away, or says the same again, will not know better at once.
            if let Some(docker) = self.docker.as_ref().filter(|_| !asked_anew && inventory.outruns_engine()) {
                asked_anew = true;
                docker.refresh(DOCKER_REFRESH).await;
                continue;
            }
            self.inventory = Some(inventory.clone());
            let sockets = || inventory.listeners.iter().chain(&inventory.udp_sockets);
            self.refused.retain(|inode, _| sockets().any(|socket| socket.inode == *inode));
            let policy = Policy {
                firewall: self.configuration.config().firewall,
                ..resolve(self.labels.rules(&self.rules), &inventory, &self.abilities)
            };
            // Before anything that may take seconds.
            let in_force = self.executor.revoke(&policy).await?;
            if let Some(guests) = &mut self.executor.guests {
                guests.want(policy.dials.keys().map(|key| key.ifindex).collect()).await;
            }
            let reality = self.executor.with_firewall(&policy, in_force).await;
            let reality = Reality { guests: self.executor.guests(), ..reality };
            if reality.registered.len() < MAX_LISTENERS as usize {
                // From the next look on.
                self.refused.retain(|_, kind| *kind != ListenerKind::NoRoom);
            }
            let steps = self.possible(plan(&policy, &reality));
            // Steps that have failed will again.
            if steps.iter().all(|step| failures.steps.contains(step)) || rounds == ROUNDS {
                let relays = policy.relays.keys();
                let relayed = relays.map(|key| (key.clone(), self.executor.relays.counts(key))).collect();
                let listeners = self.users_of(&policy, &inventory).await;
                let report = Report { policy, reality, failures, relayed, listeners };
                for change in report.changes_since(&self.last) {
                    tracing::info!("{change}");
                }
                if self.news.is_heard() {
                    report.news_since(&self.last).for_each(|what| self.news.tell(what));
                }
                self.tell_of_docker();
                self.last = report;
                self.tell();
                if let Some(kernel) = &mut self.executor.kernel {
                    kernel.keep_pinned();
                    kernel.end_strays();
                }
                return match unseen {
                    Some(error) => Err(error.context("the change is made to what was seen last")),
                    None => Ok(()),
                };
            }
            rounds += 1;
            // A round of a hundred thousand rules takes seconds; there are few of them.
            self.manager.beat();
            failures = self.executor.execute(&steps).await;
            for news in failures.since(&self.last.failures) {
                tracing::warn!("{news}");
            }
            self.refused.append(&mut failures.refused);
            for set in HookSet::ALL {
                if let Some(why) = failures.hooks[set].take() {
                    self.abilities.hooks[set] = Err(why);
                }
            }
        }
    }

    /// The owner of the listener that serves each rule.
    async fn users_of(&mut self, policy: &Policy, inventory: &Inventory) -> BTreeMap<RuleId, ListenerUser> {
        let sockets = Sockets::new(inventory);
        let rules = policy.outcomes.iter().map(|outcome| &outcome.rule);
        let uids: Vec<_> = rules.filter_map(|rule| Some((rule.id(), sockets.user_of(rule)?))).collect();
        self.users.look(&uids.iter().map(|(_, uid)| *uid).collect()).await;
        let named = |uid| ListenerUser { uid, name: self.users.name(uid).map(str::to_owned) };
        uids.into_iter().map(|(id, uid)| (id, named(uid))).collect()
    }

    /// That it answers, or does not any more; why it does not may change its words at every try.
    fn tell_of_docker(&mut self) {
        let now = self.docker_status();
        let both_away =
            matches!((&self.docker_told, &now), (DockerStatus::Away { .. }, DockerStatus::Away { .. }));
        if both_away || now == self.docker_told {
            return;
        }
        self.docker_told = now.clone();
        match now {
            DockerStatus::Off => {}
            DockerStatus::Reachable { engine, version } => {
                self.news.tell(Happening::Docker { engine, version: Some(version), error: None });
            }
            DockerStatus::Away { engine, error, .. } => {
                self.news.tell(Happening::Docker { engine, version: None, error: Some(error) });
            }
        }
    }

    /// Without a kernel half its steps have nothing to work on.
    fn possible(&self, mut steps: Vec<Step>) -> Vec<Step> {
        if self.executor.kernel.is_none() {
            steps.retain(|step| !step.is_of_kernel());
        }
        steps
    }

    /// As [`Reconciler::remember_networks`], for the containers that rules name, and their processes.
    fn remember_containers(&mut self) {
        let Some(view) = self.docker.as_ref().map(Watcher::view) else { return };
        if !matches!(view.presence, Presence::Reachable { .. }) {
            return;
        }
        let seen = |(name, sighting): (&String, &Sighting)| {
            let container = sighting.as_ref().ok()?.as_ref().filter(|container| container.running)?;
            let (id, pid) = (container.id.clone(), container.pid?);
            let start = self.processes.get(&(id.clone(), pid)).cloned().flatten()?;
            Some(SeenContainer {
                name: name.clone(),
                id,
                pid,
                start,
                attachments: container.attachments.clone(),
            })
        };
        let containers: Vec<_> = view.containers.iter().filter_map(seen).collect();
        let store = &self.store;
        let saved = keep(containers, &mut self.saved_containers, |now| store.save_containers(now));
        self.tell_unsaved("containers", saved);
    }

    /// What cannot be kept is tried again at every look; that it cannot is told when it begins, and when it ends.
    fn tell_unsaved(&mut self, what: &'static str, saved: anyhow::Result<()>) {
        match saved {
            Ok(()) => {
                if self.unsaved.remove(what) {
                    tracing::info!("the {what} last seen are kept again");
                }
            }
            Err(error) => {
                if self.unsaved.insert(what) {
                    tracing::warn!("the {what} last seen are not kept for the next start: {error:#}");
                }
            }
        }
    }

    /// Keeps networks and labels on disk as they were last seen, for a start while the engine is away.
    fn remember_networks(&mut self) {
        let Some(view) = self.docker.as_ref().map(Watcher::view) else { return };
        if !matches!(view.presence, Presence::Reachable { .. }) {
            return;
        }
        let store = &self.store;
        let networks = keep(view.networks, &mut self.saved_networks, |now| store.save_networks(now));
        let labelled = keep(view.labelled, &mut self.saved_labelled, |now| store.save_labelled(now));
        self.tell_unsaved("networks", networks);
        self.tell_unsaved("labels", labelled);
    }
}

/// Saves what is another than was saved last.
fn keep<T: PartialEq + Clone>(
    now: T,
    saved: &mut T,
    save: impl FnOnce(T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if now != *saved {
        save(now.clone())?;
        *saved = now;
    }
    Ok(())
}

/// The processes of containers that were seen, as they were.
fn processes(seen: &[SeenContainer]) -> Processes {
    seen.iter().map(|seen| ((seen.id.clone(), seen.pid), Some(seen.start.clone()))).collect()
}

/// The containers that rules name.
pub(super) fn containers(rules: &Rules) -> BTreeSet<String> {
    let name = |rule: &Rule| match &rule.network {
        Network::Container(name) => Some(name.clone()),
        _ => None,
    };
    rules.iter().flat_map(|(_, rule, _)| name(rule).into_iter().chain(rule.from.iter().cloned())).collect()
}

/// What Docker is asked for as containers: those that rules name, and what is no network, which may have been meant as one.
fn names(rules: &Rules, known: &View) -> BTreeSet<String> {
    let unknown = |rule: &Rule| match &rule.network {
        Network::Docker(name) if find_networks(&known.networks, name).is_empty() => Some(name.clone()),
        _ => None,
    };
    let mut names = containers(rules);
    names.extend(rules.iter().filter_map(|(_, rule, _)| unknown(rule)));
    names
}

async fn docker_changed(docker: &mut Option<Watcher>) {
    match docker {
        Some(docker) => docker.changed().await,
        None => std::future::pending().await,
    }
}

async fn listener_changed(events: &mut Option<Events>) -> Vec<ListenerEvent> {
    let Some(open) = events else { return std::future::pending().await };
    match open.next().await {
        Ok(happened) => {
            tracing::debug!(?happened);
            happened
        }
        Err(error) => {
            tracing::warn!("the kernel's events cannot be followed, looking every {POLL:?} instead: {error}");
            *events = None;
            vec![]
        }
    }
}

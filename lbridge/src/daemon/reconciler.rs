//! Reconciler: the loop. Whatever wakes it, it observes afresh, decides, and changes what differs. One task
//! owns the rules, the relays, and the maps but `GUESTS` and `SOURCES`. [`commands`] answers requests.

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

/// Limit on the rounds of a pass, which changes things and observes again until nothing is left to change.
/// More rounds than this find nothing new.
const ROUNDS: usize = 12;
/// Interval of passes without a reason: with events from everywhere, they only correct what others changed
/// unnoticed.
const IDLE_LOOK: Duration = Duration::from_secs(60);
/// Interval of passes while nothing reports a listener that comes or goes, so that polling is the only way:
/// without a kernel half, for a Unix or UDP socket, for a namespace, and for the end of a relay's service
/// that ran before its port was watched. Also while somebody follows events, and while the engine is away and
/// a rule is for some containers only.
const POLL: Duration = Duration::from_millis(500);
/// Least time between two passes that events ask for (debounce): long enough that a storm of events costs
/// little, short enough to be unnoticed.
const BREATH: Duration = Duration::from_millis(100);
/// Limit on waiting for an engine to list its networks, so that a slow one does not hold up `allow`.
const DOCKER_REFRESH: Duration = Duration::from_secs(2);

/// Owner of the state that the loop changes.
#[derive(Debug)]
pub(super) struct Reconciler {
    /// Rules of `allow` and of the configuration.
    rules: Rules,
    /// Rules of labels, as last derived.
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
    /// State that could not be saved and was logged as such: networks, labels or containers.
    unsaved: BTreeSet<&'static str>,
    saved_labelled: Vec<Labelled>,
    /// Listeners, by inode, that the kernel cannot be given; kept at most as long as they exist.
    refused: BTreeMap<u64, ListenerKind>,
    processes: Processes,
    last: Report,
    /// The last observation; `None` before the first.
    inventory: Option<Inventory>,
    /// Names of the users who own listeners.
    users: Users,
    manager: Manager,
    /// Channel to the subscribers to events.
    news: News,
    /// State of Docker, as last reported to subscribers.
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

    /// Returns the channel to the subscribers to events.
    pub(super) fn news(&self) -> News {
        self.news.clone()
    }

    /// Makes the first pass, then closes inherited sockets that no relay took, and removes what other
    /// versions left.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        self.pass().await?;
        // A socket that the rules no longer want must not stay open with nobody to accept.
        self.executor.inherited.close();
        if let Some(kernel) = &mut self.executor.kernel {
            kernel.retire_others()?;
        }
        Ok(())
    }

    /// Runs the loop until every sender of commands is dropped. A pass that fails is logged and tried again.
    pub(super) async fn run(
        &mut self,
        mut commands: mpsc::Receiver<Command>,
        mut wakes: mpsc::Receiver<()>,
    ) -> anyhow::Result<()> {
        // Containers can cause wake-ups (connections that a relay refuses), so passes are debounced. Commands
        // do not wait.
        let mut woken = false;
        // Set if an address that a rule is for may be another container's now.
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

    /// Stops accepting connections, and waits at most `limit` for those that are open. A service manager that
    /// keeps sockets gets the listening ones for the next daemon, and new connections wait for that. Returns
    /// the number of connections that were cut off.
    pub(super) async fn drain(&mut self, limit: Duration) -> usize {
        handover::keep(self.executor.relays.sockets());
        self.executor.relays.drain(limit).await
    }

    /// Returns how long relayed connections may take to end when the daemon stops.
    pub(super) fn drain_timeout(&self) -> Duration {
        self.configuration.config().drain_timeout
    }

    /// Returns a one-line summary, for the log and for systemd.
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
        // Changes that the kernel does not report must reach subscribers in time, too.
        let followed = self.news.is_heard();
        // While the engine is away, nobody reports whether the containers that rules are for still run.
        let unsure = self.names_sources()
            && !matches!(self.docker_status(), DockerStatus::Reachable { .. } | DockerStatus::Off);
        let udp = wants_udp(self.labels.rules(&self.rules));
        let moving = blind || unix || inside || relaying || udp || followed || unsure;
        if moving { POLL } else { IDLE_LOOK }
    }

    /// Returns the aliases of the configuration: other addresses of the host that containers dial.
    fn aliases(&self) -> BTreeSet<IpAddr> {
        self.configuration.config().aliases.clone()
    }

    /// Returns true if a rule is for only some containers of its network, as the rules of labels are.
    fn names_sources(&self) -> bool {
        self.labels.rules(&self.rules).iter().any(|(_, rule, _)| !rule.options.from.is_empty())
    }

    /// Has Docker follow the containers that `rules` name. Refreshes its view if one of them, or of
    /// `networks`, is unknown.
    async fn ask_docker(&mut self, rules: &Rules, networks: impl Iterator<Item = &Network>) {
        let Some(docker) = &self.docker else { return };
        let known = docker.view();
        // Includes the containers of label rules, which `rules` may lack: one that is not followed has no
        // address.
        let followed = self.labels.rules(&self.rules);
        docker.want(names(rules, &known).into_iter().chain(names(followed, &known)).collect());
        let unknown = |network: &Network| match network {
            Network::Docker(name) => find_networks(&known.networks, name).is_empty(),
            Network::Container(name) => !matches!(known.containers.get(name), Some(Ok(Some(_)))),
            Network::Bridge(_) | Network::Netns(_) | Network::Process(_) => false,
        };
        // A range of ports names its network once for each port.
        let networks: BTreeSet<&Network> = networks.collect();
        let asked = rules.iter().filter(|(id, ..)| networks.contains(&id.network));
        let mut named = asked.flat_map(|(_, rule, _)| &rule.options.from);
        let is_unknown = |name: &String| !matches!(known.containers.get(name), Some(Ok(Some(_))));
        // The network may be so new that its event is still under way.
        if named.any(is_unknown) || networks.into_iter().any(unknown) {
            docker.refresh(DOCKER_REFRESH).await;
        }
    }

    /// Sends the current status to the service manager.
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

    /// Makes one pass: brings actual state to desired state, then saves what was seen. Saving comes last, so
    /// that nobody waits for a slow disk.
    async fn pass(&mut self) -> anyhow::Result<()> {
        let done = self.converge().await;
        self.remember_networks();
        self.remember_containers();
        done
    }

    /// Repeats observe, resolve, plan and execute until nothing is left to do, or nothing more can be done.
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
                // A denied rule must not stay in force because an observation failed.
                (Err(error), Some(last)) => {
                    unseen = Some(error);
                    last.clone()
                }
                (Err(error), None) => return Err(error),
            };
            // Once per pass: an engine that is away, or repeats its answer, will not know better at once.
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
            // This comes before anything that may take seconds.
            let in_force = self.executor.revoke(&policy).await?;
            if let Some(guests) = &mut self.executor.guests {
                guests.want(policy.dials.keys().map(|key| key.ifindex).collect()).await;
            }
            let reality = self.executor.with_firewall(&policy, in_force).await;
            let reality = Reality { guests: self.executor.guests(), ..reality };
            if reality.registered.len() < MAX_LISTENERS as usize {
                // They are tried again from the next observation on.
                self.refused.retain(|_, kind| *kind != ListenerKind::NoRoom);
            }
            let steps = self.possible(plan(&policy, &reality));
            // Steps that have failed in this pass would fail again.
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
            // A round of a hundred thousand rules takes seconds; there are few rounds.
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

    /// Finds the owner of the listener that serves each rule.
    async fn users_of(&mut self, policy: &Policy, inventory: &Inventory) -> BTreeMap<RuleId, ListenerUser> {
        let sockets = Sockets::new(inventory);
        let rules = policy.outcomes.iter().map(|outcome| &outcome.rule);
        let uids: Vec<_> = rules.filter_map(|rule| Some((rule.id(), sockets.user_of(rule)?))).collect();
        self.users.look(&uids.iter().map(|(_, uid)| *uid).collect()).await;
        let named = |uid| ListenerUser { uid, name: self.users.name(uid).map(str::to_owned) };
        uids.into_iter().map(|(id, uid)| (id, named(uid))).collect()
    }

    /// Reports to subscribers that Docker answers, or no longer does. The error may change its words at every
    /// try, so a change of it alone is not reported.
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

    /// Drops the steps of the kernel if there is no kernel half for them.
    fn possible(&self, mut steps: Vec<Step>) -> Vec<Step> {
        if self.executor.kernel.is_none() {
            steps.retain(|step| !step.is_of_kernel());
        }
        steps
    }

    /// Saves the containers that rules name, and their processes, like [`Reconciler::remember_networks`].
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

    /// Logs that state cannot be saved, when that begins and when it ends. Saving is tried again at every
    /// pass.
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

    /// Saves networks and labels as last seen, for a start while the engine is away.
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

/// Saves a value if it differs from the one saved last.
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

/// Returns the processes of saved containers, as they were when seen.
fn processes(seen: &[SeenContainer]) -> Processes {
    seen.iter().map(|seen| ((seen.id.clone(), seen.pid), Some(seen.start.clone()))).collect()
}

/// Lists the containers that rules name.
pub(super) fn containers(rules: &Rules) -> BTreeSet<String> {
    let name = |rule: &Rule| match &rule.network {
        Network::Container(name) => Some(name.clone()),
        _ => None,
    };
    rules
        .iter()
        .flat_map(|(_, rule, _)| name(rule).into_iter().chain(rule.options.from.iter().cloned()))
        .collect()
}

/// Lists the names to ask Docker for as containers: those that rules name as such, and those that are no
/// known network, which may have been meant as containers.
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

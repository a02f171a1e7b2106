//! Reconciler: the loop. Whatever wakes it, it observes afresh, decides, and changes what differs. One task
//! owns the rules, the relays, and the maps but `REDIRECT_NETNS` and `SOURCES`. [`commands`] answers
//! requests.

mod commands;

use std::{collections::BTreeSet, time::Duration};

use lbridge_common::wire::{ListenerEvent, MAX_LISTENERS};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    configuration::Configuration,
    executor::{Executor, Failures},
    journal::Journal,
    labels::Labels,
    manager::Manager,
    memory::Memory,
    observer::{Observer, wants_udp},
    report::{self, Report},
};
use crate::{
    api::{events::EventBus, protocol::DockerStatus, server::Command},
    docker::{
        view::{ContainerLookup, EngineStatus, View},
        watch::Watcher,
    },
    kernel::maps::Events,
    planning::{
        desired::{Desired, State},
        inventory::{EngineKind, Inventory, find_networks},
        plan::plan,
        resolve::resolve,
        rule::{Network, Rule, Rules, Target},
    },
};

/// Limit on the rounds of a pass, which changes things and observes again until nothing is left to change.
/// More rounds than this find nothing new.
const MAX_ROUNDS: usize = 12;
/// Interval of passes without a reason: with events from everywhere, they only correct what others changed
/// unnoticed.
const RESYNC_INTERVAL: Duration = Duration::from_secs(60);
/// Interval of passes while nothing reports a listener that comes or goes, so that polling is the only way:
/// without a kernel half, for a Unix or UDP socket, for a namespace, and for the end of a relay's service
/// that ran before its port was watched. Also while somebody follows events, and while the engine is away and
/// a rule is for some containers only.
const FAST_RESYNC: Duration = Duration::from_millis(500);
/// Least time between two passes that events ask for (debounce): long enough that a storm of events costs
/// little, short enough to be unnoticed.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Limit on waiting for an engine to list its networks, so that a slow one does not hold up `allow`.
const DOCKER_REFRESH: Duration = Duration::from_secs(2);

/// One observation of the host, and the desired state that follows from it.
#[derive(Debug)]
struct Scene {
    inventory: Inventory,
    desired: Desired,
}

/// Owner of the state that the loop changes.
#[derive(Debug)]
pub(super) struct Reconciler {
    /// Rules of `allow` and of the configuration.
    rules: Rules,
    /// Rules of labels, as last derived.
    labels: Labels,
    configuration: Configuration,
    memory: Memory,
    executor: Executor,
    observer: Observer,
    docker: Option<Watcher>,
    manager: Manager,
    journal: Journal,
    last: Report,
    /// The last observation; `None` before the first.
    inventory: Option<Inventory>,
}

impl Reconciler {
    /// Takes ownership of everything that the loop changes. `docker` is `None` for a daemon that follows no
    /// engine.
    pub(super) fn new(
        rules: Rules,
        configuration: Configuration,
        memory: Memory,
        executor: Executor,
        observer: Observer,
        docker: Option<Watcher>,
        news: EventBus,
    ) -> Self {
        Self {
            rules,
            labels: Labels::default(),
            configuration,
            memory,
            executor,
            observer,
            docker,
            manager: Manager::new(),
            journal: Journal::new(news),
            last: Report::default(),
            inventory: None,
        }
    }

    /// Makes the first pass, then removes what other versions and an earlier daemon left.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        self.pass().await?;
        self.executor.retire_predecessors()
    }

    /// Runs the loop until every sender of commands is dropped. `events` are the kernel's; `None` if it
    /// reports none. A pass that fails is logged and tried again.
    pub(super) async fn run(
        &mut self,
        mut commands: mpsc::Receiver<Command>,
        mut wakes: mpsc::Receiver<()>,
        mut events: Option<Events>,
    ) -> anyhow::Result<()> {
        // Containers can cause wake-ups (connections that a relay refuses), so passes are debounced. Commands
        // do not wait.
        let mut woken = false;
        // Set if an address that a rule is for may be another container's now.
        let mut urgent = false;
        let mut last_pass = Instant::now();
        loop {
            self.manager.beat();
            let pause = if woken { DEBOUNCE } else { self.pause(events.is_some()) };
            let due = last_pass + if urgent { Duration::ZERO } else { pause };
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return Ok(()),
                },
                _ = wakes.recv(), if !woken => woken = true,
                () = docker_changed(&mut self.docker), if !urgent => {
                    woken = true;
                    urgent = self.has_from_rules();
                }
                () = self.manager.next_beat() => {}
                happened = listener_changed(&mut events), if !woken => {
                    woken = true;
                    self.journal.publish(happened.iter().filter_map(report::event_of));
                }
                () = sleep_until(due) => {
                    (woken, urgent) = (false, false);
                    if let Err(error) = self.pass().await {
                        tracing::error!(error = format!("{error:#}"), "reconciliation failed; trying again");
                        tokio::time::sleep(FAST_RESYNC).await;
                    }
                    last_pass = Instant::now();
                }
            }
        }
    }

    /// Ends the relays, see [`Executor::drain`].
    pub(super) async fn drain(&mut self, limit: Duration) -> usize {
        self.executor.drain(limit).await
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

    /// Logs that the rules are in force, with the number in each state.
    pub(super) fn log_ready(&self) {
        let rules = self.last.rules();
        let count = |state| rules.iter().filter(|rule| rule.state == state).count();
        tracing::info!(
            rules = rules.len(),
            steered = count(State::Steered),
            relayed = count(State::Relayed),
            waiting = count(State::Waiting),
            blocked = count(State::Blocked),
            "daemon ready"
        );
    }

    /// Returns the time until the next pass without a reason. `reported` is true if the kernel reports
    /// listeners that come and go.
    fn pause(&self, reported: bool) -> Duration {
        let rules = self.rules();
        let blind = !reported && !rules.is_empty();
        let inside = rules.iter().any(|(_, rule, _)| rule.network.is_namespace());
        let unix = rules.iter().any(|(_, rule, _)| matches!(rule.spec.target, Target::Unix(_)));
        let relaying = !self.last.desired.relays.is_empty();
        // Changes that the kernel does not report must reach subscribers in time, too.
        let followed = self.journal.has_subscribers();
        // While the engine is away, nobody reports whether the containers that rules are for still run.
        let unsure = self.has_from_rules()
            && !matches!(self.docker_status(), DockerStatus::Reachable { .. } | DockerStatus::Off);
        let udp = wants_udp(rules);
        let moving = blind || unix || inside || relaying || udp || followed || unsure;
        if moving { FAST_RESYNC } else { RESYNC_INTERVAL }
    }

    /// Returns all rules that are to be in force: those of `allow`, the configuration and labels.
    fn rules(&self) -> &Rules {
        self.labels.rules(&self.rules)
    }

    /// Returns true if a rule is for only some containers of its network, as the rules of labels are.
    fn has_from_rules(&self) -> bool {
        self.rules().iter().any(|(_, rule, _)| !rule.options.from.is_empty())
    }

    /// Has Docker follow the containers that `rules` name. Refreshes its view if one of them, or of
    /// `networks`, is unknown.
    async fn ask_docker(&mut self, rules: &Rules, networks: impl Iterator<Item = &Network>) {
        let Some(docker) = &self.docker else { return };
        let known = docker.view();
        // Includes the containers of label rules, which `rules` may lack: one that is not followed has no
        // address.
        let followed = self.rules();
        docker.want(names(rules, &known).into_iter().chain(names(followed, &known)).collect());
        let unknown = |network: &Network| match network {
            Network::Docker(name) => find_networks(&known.networks, name).is_empty(),
            Network::Container(name) => known.containers.get(name).and_then(ContainerLookup::found).is_none(),
            Network::Bridge(_) | Network::Netns(_) | Network::Process(_) => false,
        };
        // A range of ports names its network once for each port.
        let networks: BTreeSet<&Network> = networks.collect();
        let asked = rules.iter().filter(|(id, ..)| networks.contains(&id.network));
        let mut named = asked.flat_map(|(_, rule, _)| &rule.options.from);
        let is_unknown =
            |name: &String| known.containers.get(name).and_then(ContainerLookup::found).is_none();
        // The network may be so new that its event is still under way.
        if named.any(is_unknown) || networks.into_iter().any(unknown) {
            docker.refresh(DOCKER_REFRESH).await;
        }
    }

    /// Sends the current status to the service manager.
    fn tell(&mut self) {
        let refused = self.configuration.refused().map_or("", |_| "; configuration not reloaded");
        self.manager.status(format!("{}{refused}", self.summary()));
    }

    fn docker_status(&self) -> DockerStatus {
        match self.docker.as_ref().map(|docker| docker.view().presence) {
            None => DockerStatus::Off,
            Some(EngineStatus::Reachable { engine, version }) => DockerStatus::Reachable { engine, version },
            Some(EngineStatus::Away { engine, since, error }) => {
                DockerStatus::Away { engine, since: Some(since), error }
            }
            Some(EngineStatus::Unknown) => DockerStatus::Away {
                engine: EngineKind::default(),
                since: None,
                error: "it has not answered since the daemon started".to_owned(),
            },
        }
    }

    /// Makes one pass: brings actual state to desired state, then saves what was seen. Saving comes last, so
    /// that nobody waits for a slow disk.
    async fn pass(&mut self) -> anyhow::Result<()> {
        let done = self.converge().await;
        if let Some(docker) = &self.docker {
            self.memory.remember(docker.view(), self.observer.processes());
        }
        done
    }

    /// Repeats observe, resolve, plan and execute until nothing is left to do, or nothing more can be done.
    async fn converge(&mut self) -> anyhow::Result<()> {
        let mut failures = Failures::default();
        let (mut rounds, mut unseen, mut asked_anew) = (0, None, false);
        loop {
            self.follow_docker();
            let scene = match (self.look(None).await, &self.inventory) {
                (Ok(scene), _) => scene,
                // A denied rule must not stay in force because an observation failed.
                (Err(error), Some(last)) => {
                    unseen = Some(error);
                    self.scene(last.clone())
                }
                (Err(error), None) => return Err(error),
            };
            // Once per pass: an engine that is away, or repeats its answer, will not know better at once.
            let outrun = scene.inventory.outruns_engine() && !asked_anew;
            if let Some(docker) = self.docker.as_ref().filter(|_| outrun) {
                asked_anew = true;
                docker.refresh(DOCKER_REFRESH).await;
                continue;
            }
            let Scene { inventory, desired } = scene;
            self.observer.note_incumbents(&inventory);
            // This comes before anything that may take seconds.
            let in_force = self.executor.revoke(&desired).await?;
            let actual = self.executor.look(&desired, in_force).await;
            if actual.registered.len() < MAX_LISTENERS as usize {
                self.observer.note_room();
            }
            let steps = self.executor.without_kernel_steps(plan(&desired, &actual));
            // Steps that have failed in this pass would fail again.
            if steps.iter().all(|step| failures.steps.contains(step)) || rounds == MAX_ROUNDS {
                let relayed = self.executor.relayed(&desired);
                let listeners = self.observer.owners(&desired, &inventory).await;
                self.inventory = Some(inventory);
                self.conclude(Report { desired, actual, failures, relayed, listeners });
                return match unseen {
                    Some(error) => Err(error.context("the change was applied to the host as last observed")),
                    None => Ok(()),
                };
            }
            self.inventory = Some(inventory);
            rounds += 1;
            // A round of a hundred thousand rules takes seconds; there are few rounds.
            self.manager.beat();
            failures = self.executor.execute(&steps).await;
            failures.log_since(&self.last.failures);
            self.observer.note_refused(std::mem::take(&mut failures.refused));
            self.executor.give_up_hooks(&mut failures);
        }
    }

    /// Derives the rules of labels from what the engine reports now, and has it follow the containers that
    /// rules name.
    fn follow_docker(&mut self) {
        let view = self.docker.as_ref().map(Watcher::view);
        let settings = &self.configuration.config().labels;
        self.journal.publish(self.labels.update(settings, view.as_ref(), &self.rules));
        if let (Some(docker), Some(view)) = (&self.docker, &view) {
            docker.want(names(self.rules(), view));
        }
    }

    /// Observes the host as far as the rules in force need it, or those that are asked about, and resolves
    /// the rules in force.
    async fn look(&mut self, asked: Option<&Rules>) -> anyhow::Result<Scene> {
        let rules = asked.unwrap_or_else(|| self.labels.rules(&self.rules));
        let view = self.docker.as_ref().map(Watcher::view);
        let aliases = &self.configuration.config().aliases;
        let inventory = self.observer.observe(rules, view.as_ref(), aliases).await?;
        Ok(self.scene(inventory))
    }

    /// Resolves the rules in force on an observed host.
    fn scene(&self, inventory: Inventory) -> Scene {
        let firewall = self.configuration.config().firewall;
        let desired = resolve(self.rules(), &inventory, self.executor.features(), firewall);
        Scene { inventory, desired }
    }

    /// Logs and publishes what a pass has changed.
    fn conclude(&mut self, report: Report) {
        self.journal.report(&report, &self.last, self.docker_status());
        self.last = report;
        self.tell();
        self.executor.keep_pinned();
    }
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
            tracing::debug!(events = ?happened, "listeners changed");
            happened
        }
        Err(error) => {
            tracing::warn!(
                %error,
                interval = ?FAST_RESYNC,
                "could not follow the kernel's listener events; polling instead"
            );
            *events = None;
            vec![]
        }
    }
}

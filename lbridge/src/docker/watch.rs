//! Watcher: follows the engine through its events, its absence and its return. Runs on a thread of its own:
//! when a container ends its address must be revoked at once, and nothing else that the daemon does may delay
//! that.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use bollard::{Docker, errors::Error, models::EventMessage, query_parameters::EventsOptions};
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream, stream::BoxStream};
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    endings::Ended,
    engine::Engine,
    host_gateway, snapshot,
    view::{Container, ContainerLookup, EngineStatus, View},
};
use crate::planning::{
    inventory::{DockerNetwork, EngineKind, SeenContainer},
    labels::Labelled,
};

const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LAST_BACKOFF: Duration = Duration::from_secs(5);
/// The interval at which the list is read without an event (resync), in case an event was lost.
const RELIST: Duration = Duration::from_secs(60);
/// The resync interval for Podman: before 5.4 it does not report networks that come and go.
const RELIST_PODMAN: Duration = Duration::from_secs(10);
/// The first pause before the list is read again after an event, while labels are followed; each further
/// pause is twice as long. The engine reports that a container has ended before its list omits it, by as long
/// as its cleanup takes.
const LIST_LAGS: Duration = Duration::from_millis(250);
/// The margin by which the request for events goes back in time: the engine's timestamps are whole seconds.
const SINCE_BEFORE: Duration = Duration::from_secs(1);
/// The longest wait for an answer; an engine that takes longer counts as away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The most containers that are inspected at the same time.
const AT_A_TIME: usize = 8;

/// Follows the engine on a thread of its own, which ends when the watcher is dropped.
#[derive(Debug)]
pub struct Watcher {
    view: watch::Receiver<View>,
    wanted: watch::Sender<BTreeSet<String>>,
    labels: watch::Sender<bool>,
    refresh: mpsc::Sender<oneshot::Sender<()>>,
}

impl Watcher {
    /// Starts to follow the engine at `DOCKER_HOST`, or at the default socket, and the containers of these
    /// names. `last_known` and `last_seen` are the state until it answers, and so is `labelled`; labels are
    /// followed if that is `Some`.
    ///
    /// # Errors
    ///
    /// Fails if the thread or its event loop cannot be started.
    pub fn start(
        last_known: Vec<DockerNetwork>,
        containers: BTreeSet<String>,
        last_seen: Vec<SeenContainer>,
        labelled: Option<Vec<Labelled>>,
    ) -> anyhow::Result<Self> {
        let last_seen = last_seen.into_iter().map(|seen| {
            let SeenContainer { name, id, pid, attachments, .. } = seen;
            (name, ContainerLookup::Found(Container { id, pid: Some(pid), running: true, attachments }))
        });
        let (labels, follow_labels) = watch::channel(labelled.is_some());
        let unknown = View {
            presence: EngineStatus::Unknown,
            networks: last_known,
            containers: last_seen.collect(),
            container_names: vec![],
            labelled: labelled.unwrap_or_default(),
            host_gateways: host_gateway::configured_addresses(),
        };
        let (sender, view) = watch::channel(unknown);
        let (wanted, names) = watch::channel(containers);
        let (refresh, requests) = mpsc::channel(16);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::Builder::new().name("docker".to_owned());
        let work = move || runtime.block_on(follow(sender, names, follow_labels, requests));
        thread.spawn(work).context("failed to start a thread that follows the engine")?;
        Ok(Self { view, wanted, labels, refresh })
    }

    /// Returns a receiver of the view, for another task to follow.
    pub fn follow(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// Starts or stops following labels.
    pub fn follow_labels(&self, whether: bool) {
        self.labels.send_if_modified(|labels| std::mem::replace(labels, whether) != whether);
    }

    /// Follows the containers of these names from now on, and no others.
    pub fn want(&self, containers: BTreeSet<String>) {
        self.wanted.send_if_modified(|wanted| {
            let other = *wanted != containers;
            *wanted = containers;
            other
        });
    }

    /// Returns the current view.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until the view changes. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.view.changed().await.is_err() {
            // The thread never ends before this value; if it has panicked, do not spin.
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the first request to the engine has succeeded or failed, for `limit` at most.
    pub async fn first_answer(&mut self, limit: Duration) {
        let known = self.view.wait_for(|view| view.presence != EngineStatus::Unknown);
        let _ = timeout(limit, known).await;
    }

    /// Has the list read again, since an event may still be on its way, and waits until that is done, for
    /// `limit` at most.
    pub async fn refresh(&self, limit: Duration) {
        let (done, answer) = oneshot::channel();
        if self.refresh.try_send(done).is_ok() {
            let _ = timeout(limit, answer).await;
        }
    }
}

async fn follow(
    view: watch::Sender<View>,
    mut wanted: watch::Receiver<BTreeSet<String>>,
    mut labels: watch::Receiver<bool>,
    mut requests: mpsc::Receiver<oneshot::Sender<()>>,
) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let ended = session(&view, &mut wanted, &mut labels, &mut requests, &mut backoff).await;
        let Err(error) = ended else { return };
        let error = format!("{error:#}").replace('\n', " ");
        view.send_if_modified(|view| match &mut view.presence {
            EngineStatus::Away { error: known, .. } => std::mem::replace(known, error.clone()) != error,
            presence => {
                let engine = match presence {
                    EngineStatus::Reachable { engine, .. } => *engine,
                    EngineStatus::Unknown | EngineStatus::Away { .. } => EngineKind::default(),
                };
                tracing::warn!(%engine, error, "engine does not answer; rules in force stay in force");
                *presence = EngineStatus::Away { engine, since: Timestamp::now(), error };
                true
            }
        });
        // A pending refresh ends with the view as it is.
        let pause = sleep(backoff);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => break,
                request = requests.recv() => match request {
                    Some(done) => drop(done),
                    None => return,
                },
            }
        }
        backoff = (backoff * 2).min(LAST_BACKOFF);
    }
}

/// Follows the engine for as long as it answers. Returns `Ok` once the watcher is dropped.
async fn session(
    view: &watch::Sender<View>,
    wanted: &mut watch::Receiver<BTreeSet<String>>,
    labels: &mut watch::Receiver<bool>,
    requests: &mut mpsc::Receiver<oneshot::Sender<()>>,
    backoff: &mut Duration,
) -> anyhow::Result<()> {
    let docker =
        Docker::connect_with_defaults().context("no engine found (is it running, is DOCKER_HOST right?)")?;
    let engine = within(Engine::ask(&docker)).await?;
    let Engine { product, version, .. } = &engine;
    // The request for events is sent when the first event is awaited, after the list was read. So it asks for
    // events from before that; those may be in the list already, which costs one more look.
    let since = Some((Timestamp::now() - SINCE_BEFORE).as_second().to_string());
    let options = EventsOptions { since, filters: Some(Engine::events()), ..EventsOptions::default() };
    let mut events = Events::new(&docker, options, *product);
    let relist = match product {
        EngineKind::Docker => RELIST,
        EngineKind::Podman => RELIST_PODMAN,
    };
    // Read now, since the engine has just begun to answer: it reads its configuration when it starts.
    let host_gateways = host_gateway::configured_addresses();
    let mut waiting: Option<oneshot::Sender<()>> = None;
    let mut ended = Ended::default();
    let mut again = relist;
    // The time at which the look behind the current view began.
    let mut looked = Timestamp::now();
    loop {
        // Serve a refresh with this look, however many events arrive.
        waiting = waiting.or_else(|| requests.try_recv().ok());
        let (begun, names) = (Timestamp::now(), wanted.borrow_and_update().clone());
        let follows_labels = *labels.borrow_and_update();
        ended.begin_look();
        let mut stale = false;
        let look = look(&docker, &engine, names, follows_labels);
        tokio::pin!(look);
        // The engine delays requests about a container that it is starting or cleaning up; another container
        // may end in the meantime.
        let Look { networks, mut containers, container_names, labelled } = loop {
            tokio::select! {
                event = events.next(), if !events.is_broken() => {
                    stale = true;
                    if let Some(event) = event? {
                        ended.hear(&event, looked, view);
                    }
                }
                seen = &mut look => break seen?,
            }
        };
        looked = begun;
        ended.apply(&mut containers);
        *backoff = FIRST_BACKOFF;
        view.send_if_modified(|view| {
            let presence = EngineStatus::Reachable { engine: *product, version: version.clone() };
            if view.presence != presence {
                tracing::info!(engine = %product, version, "engine answers");
            }
            let host_gateways = host_gateways.clone();
            let now = View { presence, networks, containers, container_names, labelled, host_gateways };
            let changed = *view != now;
            *view = now;
            changed
        });
        if let Some(done) = waiting.take() {
            let _ = done.send(());
        }
        if stale {
            again = if follows_labels { LIST_LAGS } else { relist };
            continue;
        }
        tokio::select! {
            event = events.next() => {
                let mut next = Some(event);
                // Handle all pending events with one look.
                while let Some(event) = next {
                    let Some(event) = event? else { break };
                    ended.hear(&event, looked, view);
                    next = events.next().now_or_never();
                }
                again = if follows_labels { LIST_LAGS } else { relist };
            }
            request = requests.recv() => match request {
                Some(done) => waiting = Some(done),
                None => return Ok(()),
            },
            changed = wanted.changed() => if changed.is_err() {
                return Ok(());
            },
            changed = labels.changed() => if changed.is_err() {
                return Ok(());
            },
            () = sleep(again) => again = (again * 2).min(relist),
        }
    }
}

/// The result of one look at the engine's lists.
struct Look {
    networks: Vec<DockerNetwork>,
    containers: BTreeMap<String, ContainerLookup>,
    container_names: Vec<String>,
    labelled: Vec<Labelled>,
}

async fn look(
    docker: &Docker,
    engine: &Engine,
    names: BTreeSet<String>,
    follows_labels: bool,
) -> anyhow::Result<Look> {
    let networks = within(snapshot::networks(docker, engine)).await?;
    let sightings = names.into_iter().map(async |name| {
        let container = within(snapshot::container(docker, engine, &name)).await?;
        anyhow::Ok((name, container))
    });
    let containers: BTreeMap<_, _> = stream::iter(sightings).buffered(AT_A_TIME).try_collect().await?;
    let missing = containers.values().any(|lookup| *lookup == ContainerLookup::NotFound);
    let container_names = if missing { within(snapshot::container_names(docker)).await? } else { vec![] };
    let labelled = if follows_labels { within(snapshot::labelled(docker)).await? } else { vec![] };
    Ok(Look { networks, containers, container_names, labelled })
}

/// The stream of the engine's events.
struct Events<'a> {
    docker: &'a Docker,
    options: EventsOptions,
    product: EngineKind,
    stream: BoxStream<'static, Result<EventMessage, Error>>,
    /// The time to request the events again, after the stream broke; `None` while it works.
    again: Option<Instant>,
    pause: Duration,
}

impl<'a> Events<'a> {
    fn new(docker: &'a Docker, options: EventsOptions, product: EngineKind) -> Self {
        let stream = docker.events(Some(options.clone())).boxed();
        Self { docker, options, product, stream, again: None, pause: FIRST_BACKOFF }
    }

    fn is_broken(&self) -> bool {
        self.again.is_some()
    }

    /// Waits for the next event. `None` if Podman broke the stream off, and again after the pause when it is
    /// requested again. Cancel-safe.
    async fn next(&mut self) -> anyhow::Result<Option<EventMessage>> {
        if let Some(again) = self.again {
            sleep_until(again).await;
            self.stream = self.docker.events(Some(self.options.clone())).boxed();
            self.again = None;
            // The list shows whether the engine is there.
            return Ok(None);
        }
        match (self.stream.next().await, self.product) {
            (Some(Ok(event)), _) => {
                self.pause = FIRST_BACKOFF;
                Ok(Some(event))
            }
            // Podman 4 breaks the stream off when it reads half a line of its own log.
            (_, EngineKind::Podman) => {
                self.again = Some(Instant::now() + self.pause);
                self.pause = (self.pause * 2).min(LAST_BACKOFF);
                Ok(None)
            }
            (event, EngineKind::Docker) => {
                let event = event.context("the engine closed the stream of events")?;
                event.context("the stream of events failed").map(Some)
            }
        }
    }
}

async fn within<T>(answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(ANSWER_TIMEOUT, answer).await.context("the engine does not answer")?
}

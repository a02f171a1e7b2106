//! Follows the engine: through its events, its absence and its return.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use anyhow::Context as _;
use bollard::{Docker, query_parameters::EventsOptions};
use futures_util::StreamExt as _;
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use super::{engine::Engine, snapshot};
use crate::planning::inventory::{DockerNetwork, Product};

const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LAST_BACKOFF: Duration = Duration::from_secs(5);
/// The list is read without an event that often: an event that was lost is made up for.
const RELIST: Duration = Duration::from_secs(60);
/// Before 5.4 Podman does not tell of networks that come and go.
const RELIST_PODMAN: Duration = Duration::from_secs(10);
/// The engine's events have whole seconds.
const SINCE_BEFORE: Duration = Duration::from_secs(1);
/// An engine that takes longer to answer is as good as away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether the engine answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// Not asked yet.
    Unknown,
    /// It does.
    Reachable {
        /// Which it is.
        engine: Product,
        /// Its version.
        version: String,
    },
    /// It does not.
    Away {
        /// Which it was, when it last did.
        engine: Product,
        /// Since when.
        since: Timestamp,
        /// Why.
        error: String,
    },
}

/// What is known of the engine.
#[derive(Debug, Clone)]
pub struct View {
    /// Whether it answers.
    pub presence: Presence,
    /// Its networks; the last known while it is away.
    pub networks: Vec<DockerNetwork>,
    /// The containers that were asked for, by the name that was asked for; the last known while it is away.
    pub containers: BTreeMap<String, Sighting>,
}

/// What the engine says of a name: a container, none, or what is wrong with it.
pub type Sighting = Result<Option<Container>, String>;

/// A container as the engine describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its first process, in the engine's pid namespace, while it runs.
    pub pid: Option<u32>,
    /// Its address on the first of its networks, by name, that gives it one.
    pub address: Option<IpAddr>,
    /// Names of its networks, in order.
    pub networks: Vec<String>,
}

/// Follows the engine in a task of its own, which ends when the watcher is dropped.
#[derive(Debug)]
pub struct Watcher {
    view: watch::Receiver<View>,
    wanted: watch::Sender<BTreeSet<String>>,
    refresh: mpsc::Sender<oneshot::Sender<()>>,
}

impl Watcher {
    /// Starts to follow the engine at `DOCKER_HOST`, or at the default socket, and the containers of these names.
    /// `last_known` serves until it answers.
    pub fn start(last_known: Vec<DockerNetwork>, containers: BTreeSet<String>) -> Self {
        let unknown = View { presence: Presence::Unknown, networks: last_known, containers: BTreeMap::new() };
        let (sender, view) = watch::channel(unknown);
        let (wanted, names) = watch::channel(containers);
        let (refresh, requests) = mpsc::channel(16);
        tokio::spawn(follow(sender, names, requests));
        Self { view, wanted, refresh }
    }

    /// From now on the containers of these names are followed, too, and no others.
    pub fn want(&self, containers: BTreeSet<String>) {
        self.wanted.send_if_modified(|wanted| {
            let other = *wanted != containers;
            *wanted = containers;
            other
        });
    }

    /// What is known now.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until something else is known. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.view.changed().await.is_err() {
            // The task never ends before this; do not spin should it have panicked.
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the engine has been asked once, for `limit` at most.
    pub async fn first_answer(&mut self, limit: Duration) {
        let known = self.view.wait_for(|view| view.presence != Presence::Unknown);
        let _ = timeout(limit, known).await;
    }

    /// Has the list read again, and waits until it was, for `limit` at most: an event may still be under way.
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
    mut requests: mpsc::Receiver<oneshot::Sender<()>>,
) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let Err(error) = session(&view, &mut wanted, &mut requests, &mut backoff).await else { return };
        let error = format!("{error:#}").replace('\n', " ");
        view.send_if_modified(|view| match &mut view.presence {
            Presence::Away { error: known, .. } => std::mem::replace(known, error.clone()) != error,
            presence => {
                let engine = match presence {
                    Presence::Reachable { engine, .. } => *engine,
                    Presence::Unknown | Presence::Away { .. } => Product::default(),
                };
                tracing::warn!("{engine} is away: {error}; rules in force stay in force");
                *presence = Presence::Away { engine, since: Timestamp::now(), error };
                true
            }
        });
        // Whoever waits for a refresh gets what is known.
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

/// Follows the engine for as long as it answers. `Ok` when nobody is interested any more.
async fn session(
    view: &watch::Sender<View>,
    wanted: &mut watch::Receiver<BTreeSet<String>>,
    requests: &mut mpsc::Receiver<oneshot::Sender<()>>,
    backoff: &mut Duration,
) -> anyhow::Result<()> {
    let docker = Docker::connect_with_defaults()
        .context("no engine is found (is dockerd running, is DOCKER_HOST right?)")?;
    let engine = within(Engine::ask(&docker)).await?;
    let Engine { product, version, .. } = &engine;
    // The request for events goes out when the first is waited for, after the list was read; so it asks for those since
    // before. They may have happened already, which costs a look.
    let since = Some((Timestamp::now() - SINCE_BEFORE).as_second().to_string());
    let options = EventsOptions { since, filters: Some(Engine::events()), ..EventsOptions::default() };
    let mut events = docker.events(Some(options.clone()));
    let mut pause = FIRST_BACKOFF;
    let relist = match product {
        Product::Docker => RELIST,
        Product::Podman => RELIST_PODMAN,
    };
    let mut waiting: Option<oneshot::Sender<()>> = None;
    loop {
        let networks = within(snapshot::networks(&docker, &engine)).await?;
        let names = wanted.borrow_and_update().clone();
        let mut containers = BTreeMap::new();
        for name in names {
            let container = within(snapshot::container(&docker, &engine, &name)).await?;
            containers.insert(name, container);
        }
        *backoff = FIRST_BACKOFF;
        view.send_if_modified(|view| {
            let presence = Presence::Reachable { engine: *product, version: version.clone() };
            let changed =
                view.presence != presence || view.networks != networks || view.containers != containers;
            if view.presence != presence {
                tracing::info!("{product} {version} answers");
            }
            *view = View { presence, networks, containers };
            changed
        });
        if let Some(done) = waiting.take() {
            let _ = done.send(());
        }
        tokio::select! {
            event = events.next() => match (event, product) {
                (Some(Ok(_)), _) => pause = FIRST_BACKOFF,
                // Podman 4 breaks it off where it reads half a line of its own log. Whether it is there the list says.
                (_, Product::Podman) => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LAST_BACKOFF);
                    events = docker.events(Some(options.clone()));
                }
                (event, Product::Docker) => {
                    let event = event.context("the engine closed the stream of events")?;
                    event.context("the stream of events broke")?;
                }
            },
            request = requests.recv() => match request {
                Some(done) => waiting = Some(done),
                None => return Ok(()),
            },
            changed = wanted.changed() => if changed.is_err() {
                return Ok(());
            },
            () = sleep(relist) => {}
        }
    }
}

async fn within<T>(answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(ANSWER_TIMEOUT, answer).await.context("the engine does not answer")?
}

//! Relay set: opens, changes and closes the relays of this process. A single owner changes it: the executor,
//! or the sandbox relay.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    os::fd::{AsFd as _, BorrowedFd},
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::task::TaskTracker;

use super::{
    PeerNames,
    limits::ConnectionLimiter,
    listener::{Listener, Mode, NetnsClosed, RelayConfig, RelayContext},
    meter::Statistics,
    socket::Listening,
    workers::Workers,
};
use crate::planning::{
    desired::{RelayKey, RelaySpec},
    rule::{Network, RuleId},
};

/// Every relay of this process.
#[derive(Debug)]
pub struct RelaySet {
    relays: BTreeMap<RelayKey, Relay>,
    /// Shared by the relays of a rule and by their connections, which may outlive them.
    statistics: HashMap<RuleId, Weak<Statistics>>,
    /// The number of open connections of each network.
    networks: HashMap<Network, Weak<AtomicU32>>,
    context: RelayContext,
    workers: Workers,
}

#[derive(Debug)]
struct Relay {
    config: watch::Sender<Arc<RelayConfig>>,
    mode: watch::Sender<Mode>,
    taken: Arc<AtomicU64>,
    /// The listening socket, shared with the task.
    socket: Arc<tokio::net::TcpListener>,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    /// Returns true if the relay listens and is not about to end.
    fn is_open(&self) -> bool {
        *self.mode.borrow() == Mode::Open && !self.task.is_finished()
    }
}

/// The counters of a relay and of its rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections that this relay took since it was opened.
    pub connections: u64,
    /// Connections of its rule that were refused because a limit was reached.
    pub refused: u64,
    /// Open connections of its rule.
    pub open: u32,
    /// Bytes of its rule's connections, from the clients to the service.
    pub to_service: u64,
    /// Bytes of its rule's connections, from the service to the clients.
    pub to_client: u64,
}

impl RelaySet {
    /// Makes an empty set. Relays report their containers' names through `names`, if there is a way to.
    /// `wake` gets a unit when a connection to a service fails, or a namespace has gone.
    pub fn new(names: Option<Arc<dyn PeerNames>>, wake: mpsc::Sender<()>) -> anyhow::Result<Self> {
        let context =
            RelayContext { names, wake, places: ConnectionLimiter::new(), connections: TaskTracker::new() };
        let workers = Workers::start().context("cannot start the relays' threads")?;
        Ok(Self {
            relays: BTreeMap::new(),
            statistics: HashMap::new(),
            networks: HashMap::new(),
            context,
            workers,
        })
    }

    /// Has an open relay follow `spec` from the next connection on. Returns false if the relay does not
    /// listen.
    pub fn change(&mut self, key: &RelayKey, spec: &RelaySpec) -> bool {
        let config = self.config(spec.clone());
        let Some(relay) = self.relays.get(key).filter(|relay| !relay.task.is_finished()) else {
            return false;
        };
        relay.config.send_replace(config);
        relay.mode.send_replace(Mode::Open);
        true
    }

    /// Opens a relay on `socket`, which already listens. When `gone` completes, the relay and its connections
    /// end at once: nobody is left in the namespace.
    pub fn open(
        &mut self,
        key: &RelayKey,
        spec: RelaySpec,
        socket: Listening,
        gone: Option<impl Future<Output = ()> + Send + 'static>,
    ) -> anyhow::Result<()> {
        let (sender, config) = watch::channel(self.config(spec));
        let (mode, modes) = watch::channel(Mode::Open);
        let taken = Arc::new(AtomicU64::new(0));
        let worker = self.workers.next();
        // The socket belongs to the event loop that it is registered with.
        let on_worker = worker.enter();
        let socket = Arc::new(socket.register()?);
        drop(on_worker);
        let listener = Listener {
            socket: socket.clone(),
            dialled: key.address,
            config,
            modes,
            gone: NetnsClosed(gone.map(|gone| watch_for(gone, self.context.wake.clone()))),
            taken: taken.clone(),
            context: self.context.clone(),
        };
        let task = worker.spawn(listener.serve());
        self.relays.insert(key.clone(), Relay { config: sender, mode, taken, socket, task });
        Ok(())
    }

    fn config(&mut self, spec: RelaySpec) -> Arc<RelayConfig> {
        self.statistics.retain(|_, statistics| statistics.strong_count() > 0);
        let known = self.statistics.get(&spec.rule).and_then(Weak::upgrade);
        let statistics = known.unwrap_or_else(|| {
            self.networks.retain(|_, open| open.strong_count() > 0);
            let known = self.networks.get(&spec.rule.network).and_then(Weak::upgrade);
            let network = known.unwrap_or_default();
            self.networks.insert(spec.rule.network.clone(), Arc::downgrade(&network));
            Arc::new(Statistics::of(network))
        });
        self.statistics.insert(spec.rule.clone(), Arc::downgrade(&statistics));
        Arc::new(RelayConfig { spec, statistics })
    }

    /// Stops listening; open connections continue. If the kernel has taken over (`handed_over`), handshakes
    /// that have begun are completed first, so that none is reset.
    pub async fn close(&mut self, key: &RelayKey, handed_over: bool) {
        if handed_over {
            if let Some(relay) = self.relays.get(key) {
                relay.mode.send_replace(Mode::Lingering);
            }
        } else if let Some(relay) = self.relays.remove(key) {
            // The connections are tasks of their own. The port is free when this returns.
            relay.task.abort();
            let _ = relay.task.await;
        }
    }

    /// Lists the listening sockets of the open relays. The bool is true if the kernel's entry leads to the
    /// socket ([`RelaySpec::by_entry`]).
    pub fn sockets(&self) -> impl Iterator<Item = (&RelayKey, bool, BorrowedFd<'_>)> {
        let open = self.relays.iter().filter(|(_, relay)| relay.is_open());
        open.map(|(key, relay)| (key, relay.config.borrow().spec.by_entry, relay.socket.as_fd()))
    }

    /// Returns the socket of a relay in the set, even if the relay only lingers; `None` if the set has no
    /// such relay.
    pub fn socket(&self, key: &RelayKey) -> Option<BorrowedFd<'_>> {
        self.relays.get(key).map(|relay| relay.socket.as_fd())
    }

    /// Stops listening everywhere, after accepting the connections that wait. Returns when every connection
    /// has ended, or after `limit`, with the number of connections that are left. Those are reset when their
    /// tasks are dropped.
    pub async fn drain(&mut self, limit: Duration) -> usize {
        for relay in self.relays.values() {
            relay.mode.send_replace(Mode::Closing);
        }
        for (_, relay) in std::mem::take(&mut self.relays) {
            let _ = relay.task.await;
        }
        let connections = &self.context.connections;
        connections.close();
        let _ = timeout(limit, connections.wait()).await;
        connections.len()
    }

    /// Lists the open relays, with their specs. Forgets those that have ended.
    pub fn specs(&mut self) -> BTreeMap<RelayKey, RelaySpec> {
        self.relays.retain(|_, relay| !relay.task.is_finished());
        let open = self.relays.iter().filter(|(_, relay)| relay.is_open());
        open.map(|(key, relay)| (key.clone(), relay.config.borrow().spec.clone())).collect()
    }

    /// Lists the relays that only complete the handshakes which had begun when the kernel took over.
    pub fn lingering(&self) -> BTreeSet<RelayKey> {
        let lingering = self.relays.iter().filter(|(_, relay)| !relay.is_open() && !relay.task.is_finished());
        lingering.map(|(key, _)| key.clone()).collect()
    }

    /// Returns the counters of a relay and of its rule; zeros if the set has no such relay.
    pub fn counts(&self, key: &RelayKey) -> Counts {
        let Some(relay) = self.relays.get(key) else { return Counts::default() };
        let statistics = relay.config.borrow().statistics.clone();
        let (to_service, to_client) = statistics.bytes();
        Counts {
            connections: relay.taken.load(Ordering::Relaxed),
            refused: statistics.refused.load(Ordering::Relaxed),
            open: statistics.open.load(Ordering::Relaxed),
            to_service,
            to_client,
        }
    }
}

/// Returns a receiver that turns true when `gone` completes. Polls `gone` only for as long as there are
/// receivers.
fn watch_for(
    gone: impl Future<Output = ()> + Send + 'static,
    wake: mpsc::Sender<()>,
) -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            () = gone => {
                sender.send_replace(true);
                let _ = wake.try_send(());
                // Keep the sender, so that later receivers see the value, too.
                sender.closed().await;
            }
            () = sender.closed() => {}
        }
    });
    receiver
}

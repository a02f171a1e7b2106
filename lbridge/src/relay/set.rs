//! The relays that are open. Changed by the executor alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
};

use tokio::sync::{mpsc, watch};

use super::{
    PeerNames,
    listener::{self, Mode, Statistics, Surroundings},
};
use crate::planning::policy::{RelayKey, RelaySpec};

/// Every relay of this daemon.
#[derive(Debug)]
pub struct RelaySet {
    relays: BTreeMap<RelayKey, Relay>,
    surroundings: Surroundings,
}

#[derive(Debug)]
struct Relay {
    spec: watch::Sender<RelaySpec>,
    mode: watch::Sender<Mode>,
    statistics: Arc<Statistics>,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    /// Listening, and not about to end.
    fn is_open(&self) -> bool {
        *self.mode.borrow() == Mode::Open && !self.task.is_finished()
    }
}

impl RelaySet {
    /// Relays name their containers through `names`, where there is a way; `wake` gets a unit when a service turns out
    /// not to be there.
    pub fn new(names: Option<Arc<dyn PeerNames>>, wake: mpsc::Sender<()>) -> Self {
        let (places, places_of_one) = listener::places();
        Self { relays: BTreeMap::new(), surroundings: Surroundings { names, wake, places, places_of_one } }
    }

    /// Listens, or relays otherwise from the next connection on where it does.
    pub fn open(&mut self, key: &RelayKey, spec: RelaySpec) -> anyhow::Result<()> {
        if let Some(relay) = self.relays.get(key).filter(|relay| !relay.task.is_finished()) {
            relay.spec.send_replace(spec);
            relay.mode.send_replace(Mode::Open);
            return Ok(());
        }
        let socket = listener::bind(key)?;
        let (spec, specs) = watch::channel(spec);
        let (mode, modes) = watch::channel(Mode::Open);
        let statistics = Arc::new(Statistics::default());
        let task = tokio::spawn(listener::serve(
            socket,
            specs,
            modes,
            statistics.clone(),
            self.surroundings.clone(),
        ));
        self.relays.insert(key.clone(), Relay { spec, mode, statistics, task });
        Ok(())
    }

    /// Stops listening; connections go on. Once the kernel has taken over, what is in the middle of its handshake is
    /// completed first, so that nothing is reset.
    pub async fn close(&mut self, key: &RelayKey, handed_over: bool) {
        if handed_over {
            if let Some(relay) = self.relays.get(key) {
                relay.mode.send_replace(Mode::Lingering);
            }
        } else if let Some(relay) = self.relays.remove(key) {
            // The task owns the listening socket, not the connections. The port is free when this returns.
            relay.task.abort();
            let _ = relay.task.await;
        }
    }

    /// What is open, and what it does.
    pub fn specs(&mut self) -> BTreeMap<RelayKey, RelaySpec> {
        self.relays.retain(|_, relay| !relay.task.is_finished());
        let open = self.relays.iter().filter(|(_, relay)| relay.is_open());
        open.map(|(key, relay)| (key.clone(), relay.spec.borrow().clone())).collect()
    }

    /// Those that only complete what had begun when the kernel took over.
    pub fn lingering(&self) -> BTreeSet<RelayKey> {
        let lingering = self.relays.iter().filter(|(_, relay)| !relay.is_open() && !relay.task.is_finished());
        lingering.map(|(key, _)| key.clone()).collect()
    }

    /// Connections relayed since it was opened.
    pub fn connections(&self, key: &RelayKey) -> u64 {
        self.relays.get(key).map_or(0, |relay| relay.statistics.connections.load(Ordering::Relaxed))
    }
}

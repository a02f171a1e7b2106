//! Memory: what was last seen of the engine, saved for a start while the engine is away.

use std::collections::BTreeSet;

use super::observer::Processes;
use crate::{
    docker::view::{ContainerLookup, EngineStatus, View},
    planning::{
        inventory::{DockerNetwork, SeenContainer},
        labels::Labelled,
    },
    store::Store,
};

/// The networks, labels and containers that were last seen, as they are on disk.
#[derive(Debug)]
pub(super) struct Memory {
    store: Store,
    networks: Vec<DockerNetwork>,
    labelled: Vec<Labelled>,
    containers: Vec<SeenContainer>,
    /// State that could not be saved and was logged as such: networks, labels or containers.
    unsaved: BTreeSet<&'static str>,
}

impl Memory {
    /// Reads what the previous daemon has saved.
    pub(super) fn open(store: Store) -> Self {
        let (networks, labelled, containers) = (store.networks(), store.labelled(), store.containers());
        Self { store, networks, labelled, containers, unsaved: BTreeSet::new() }
    }

    /// Returns the state directory.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the networks that were last seen.
    pub(super) fn networks(&self) -> &[DockerNetwork] {
        &self.networks
    }

    /// Returns the labels that were last seen.
    pub(super) fn labelled(&self) -> &[Labelled] {
        &self.labelled
    }

    /// Returns the running containers that rules named and that were last seen.
    pub(super) fn containers(&self) -> &[SeenContainer] {
        &self.containers
    }

    /// Saves what the engine reports, if it differs from what is on disk. While the engine is away nothing
    /// is saved. A failure is logged once; saving is tried again at every pass.
    pub(super) fn remember(&mut self, view: View, processes: &Processes) {
        if !matches!(view.presence, EngineStatus::Reachable { .. }) {
            return;
        }
        let containers = running(&view, processes);
        let store = &self.store;
        let networks = save(view.networks, &mut self.networks, |now| store.save_networks(now));
        let labelled = save(view.labelled, &mut self.labelled, |now| store.save_labelled(now));
        let containers = save(containers, &mut self.containers, |now| store.save_containers(now));
        self.log("networks", networks);
        self.log("labels", labelled);
        self.log("containers", containers);
    }

    /// Logs that state cannot be saved, when that begins and when it ends.
    fn log(&mut self, what: &'static str, saved: anyhow::Result<()>) {
        match saved {
            Ok(()) => {
                if self.unsaved.remove(what) {
                    tracing::info!(what, "last seen state saved again");
                }
            }
            Err(error) => {
                if self.unsaved.insert(what) {
                    tracing::warn!(
                        what,
                        error = format!("{error:#}"),
                        "could not save the last seen state for the next start"
                    );
                }
            }
        }
    }
}

/// Lists the running containers that rules name, with their processes.
fn running(view: &View, processes: &Processes) -> Vec<SeenContainer> {
    let seen = |(name, lookup): (&String, &ContainerLookup)| {
        let container = lookup.found().filter(|container| container.running)?;
        let (id, pid) = (container.id.clone(), container.pid?);
        let start = processes.get(&(id.clone(), pid)).cloned().flatten()?;
        Some(SeenContainer { name: name.clone(), id, pid, start, attachments: container.attachments.clone() })
    };
    view.containers.iter().filter_map(seen).collect()
}

/// Saves a value if it differs from the one saved last.
fn save<T: PartialEq + Clone>(
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

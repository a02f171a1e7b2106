//! Guests: the only owner of `REDIRECT_NETNS`, the map of network namespaces whose localhost leads to the
//! host. It runs on a thread of its own, beside the loop: a container's process runs a fraction of a second
//! after its link appears, and the loop may be in the middle of a pass.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    time::Duration,
};

use lbridge_common::wire::{BRIDGES, RedirectedNetns};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use super::priority_thread;
use crate::{
    host::{
        guests::{BridgePorts, Found},
        netns::HostNetns,
    },
    kernel::maps,
};

/// Pause before a broken socket is replaced.
const REOPEN: Duration = Duration::from_secs(1);
/// Interval of looks without an event, which only correct what the events missed.
const RESYNC_INTERVAL: Duration = Duration::from_secs(60);
/// Pause before the first search for a namespace among all processes, which takes milliseconds. It doubles
/// after each search, up to the next constant.
const FIRST_SEARCH: Duration = Duration::from_millis(10);
const LAST_SEARCH: Duration = Duration::from_secs(5);
/// Limit on how long `allow` waits until the namespaces that exist already are entered.
const READY_TIMEOUT: Duration = Duration::from_secs(2);

/// Interface indices of bridges in the host's network namespace.
type Bridges = BTreeSet<u32>;

/// The loop's handle to the owner of the map.
#[derive(Debug)]
pub(super) struct Guests {
    wanted: watch::Sender<Option<Bridges>>,
    served: watch::Receiver<Served>,
}

/// The bridges that the map serves now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Served {
    bridges: Bridges,
    /// Number of network namespaces on each bridge, by the bridge's interface index.
    counts: BTreeMap<u32, usize>,
}

impl Guests {
    /// Starts the owner. Until it gets its first bridges, it leaves the entries of another daemon alone.
    pub(super) fn start(map: maps::Guests, host: &HostNetns) -> anyhow::Result<Self> {
        let (wanted, tasks) = watch::channel(None);
        let (told, served) = watch::channel(Served::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (home, host) = (host.file.try_clone()?, host.cookie);
        let owner = Owner { map, home, host, entered: BTreeMap::new(), crowded: false, told };
        // A container's first connection comes some dozens of milliseconds after its link.
        priority_thread::start("guests", move || runtime.block_on(owner.run(tasks)))?;
        Ok(Self { wanted, served })
    }

    /// Makes the localhost of every namespace on these bridges lead to the host, and of no other namespace.
    /// Returns once it does, or with a warning after [`READY_TIMEOUT`].
    pub(super) async fn want(&mut self, bridges: Bridges) {
        let is_news = self.wanted.send_if_modified(|wanted| {
            let is_news = wanted.as_ref() != Some(&bridges);
            *wanted = Some(bridges.clone());
            is_news
        });
        if is_news {
            let served = self.served.wait_for(|served| served.bridges == bridges);
            if timeout(READY_TIMEOUT, served).await.is_err() {
                tracing::warn!(
                    "localhost redirects are late: the containers on each bridge are not known yet; they \
                     take effect by themselves"
                );
            }
        }
    }

    /// Counts the network namespaces on each of the bridges.
    pub(super) fn counts(&self) -> BTreeMap<u32, usize> {
        self.served.borrow().counts.clone()
    }
}

struct Owner {
    map: maps::Guests,
    /// The host's network namespace.
    home: File,
    /// Cookie of the host's network namespace, if known.
    host: Option<u64>,
    /// Contents of the map, by the cookie of the namespace.
    entered: BTreeMap<u64, RedirectedNetns>,
    /// True once it was logged that a container is on too many bridges.
    crowded: bool,
    told: watch::Sender<Served>,
}

impl Owner {
    /// Runs until the loop ends.
    async fn run(mut self, mut wanted: watch::Receiver<Option<Bridges>>) {
        while let Some(bridges) = next(&mut wanted).await {
            let done = if bridges.is_empty() {
                self.nobody(&mut wanted).await
            } else {
                self.serve(&mut wanted).await
            };
            match done {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "bridge watch failed; restarting it");
                    tokio::time::sleep(REOPEN).await;
                }
            }
        }
    }

    /// Empties the map, then waits until bridges are wanted, with nothing open.
    async fn nobody(&mut self, wanted: &mut watch::Receiver<Option<Bridges>>) -> anyhow::Result<()> {
        self.entered = self.map.all()?;
        self.enter(&BTreeMap::new(), true)?;
        self.told.send_replace(Served::default());
        // An error means that the loop has ended.
        let _ = wanted.changed().await;
        Ok(())
    }

    /// Follows the wanted bridges until there are none.
    async fn serve(&mut self, wanted: &mut watch::Receiver<Option<Bridges>>) -> anyhow::Result<()> {
        self.entered = self.map.all()?;
        let mut ports = BridgePorts::follow(&self.home).await?;
        let mut search = Search::default();
        loop {
            let bridges = wanted.borrow_and_update().clone().unwrap_or_default();
            if bridges.is_empty() {
                return Ok(());
            }
            let everywhere = search.is_due();
            let found = ports.guests(&bridges, everywhere);
            search.done(&found, everywhere);
            // A namespace that was entered and is not found yet stays while a search may still find it.
            let is_all = found.unknown.is_empty() || everywhere;
            self.enter(&found.bridges, is_all)?;
            if is_all || self.told.borrow().bridges == bridges {
                self.told.send_replace(Served { counts: counts(&found), bridges });
            }
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return Ok(()) },
                changed = ports.changed() => changed?,
                () = sleep_until(search.next) => if search.for_nobody() { ports.list().await? },
            }
        }
    }

    /// Puts these namespaces into the map. With `alone`, removes all others from it.
    fn enter(&mut self, found: &BTreeMap<u64, Bridges>, alone: bool) -> anyhow::Result<()> {
        for (netns, bridges) in found.iter().filter(|(netns, _)| self.host != Some(**netns)) {
            if bridges.len() > BRIDGES && !self.crowded {
                self.crowded = true;
                tracing::warn!(
                    netns,
                    limit = BRIDGES,
                    "container is on too many networks with --localhost rules; those over the limit get no \
                     localhost redirect"
                );
            }
            let mut guest = RedirectedNetns { netns: *netns, bridges: [0; BRIDGES] };
            guest.bridges.iter_mut().zip(bridges).for_each(|(place, bridge)| *place = *bridge);
            if self.entered.get(netns) != Some(&guest) {
                self.map.put(&guest)?;
                self.entered.insert(*netns, guest);
                tracing::debug!(netns, ?bridges, "localhost redirect set");
            }
        }
        if alone {
            let gone: Vec<u64> =
                self.entered.keys().filter(|netns| !found.contains_key(netns)).copied().collect();
            for netns in gone {
                self.map.remove(netns)?;
                self.entered.remove(&netns);
            }
        }
        Ok(())
    }
}

fn counts(found: &Found) -> BTreeMap<u32, usize> {
    let mut counts = BTreeMap::new();
    for bridge in found.bridges.values().flatten() {
        *counts.entry(*bridge).or_default() += 1;
    }
    counts
}

/// Returns the wanted bridges as soon as there was a request; `None` once the loop has ended.
async fn next(wanted: &mut watch::Receiver<Option<Bridges>>) -> Option<Bridges> {
    wanted.wait_for(Option::is_some).await.ok()?.clone()
}

/// Schedule of the searches among all processes.
#[derive(Debug)]
struct Search {
    /// Numbers of the namespaces to search for; empty if all are found.
    missing: BTreeSet<i32>,
    next: Instant,
    pause: Duration,
}

impl Default for Search {
    fn default() -> Self {
        Self { missing: BTreeSet::new(), next: Instant::now() + RESYNC_INTERVAL, pause: FIRST_SEARCH }
    }
}

impl Search {
    fn for_nobody(&self) -> bool {
        self.missing.is_empty()
    }

    fn is_due(&self) -> bool {
        !self.for_nobody() && self.next <= Instant::now()
    }

    /// Updates the schedule after a look. A burst of looks neither delays the search nor hastens it.
    fn done(&mut self, found: &Found, searched: bool) {
        let now = Instant::now();
        if found.unknown.is_empty() {
            if !self.for_nobody() || self.next <= now {
                *self = Self::default();
            }
            return;
        }
        if !found.unknown.is_subset(&self.missing) {
            self.pause = FIRST_SEARCH;
            self.next = now + self.pause;
        } else if searched {
            self.pause = (self.pause * 2).min(LAST_SEARCH);
            self.next = now + self.pause;
        }
        self.missing.clone_from(&found.unknown);
    }
}

//! Limits: the number of connections that may be open at the same time, over all relays, of a network and of
//! a rule.

use std::sync::{Arc, atomic::Ordering};

use lbridge_common::wire::MAX_RELAY_PEERS;
use rustix::process::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{meter::Statistics, splice};

/// Descriptors per connection: its two sockets.
const DESCRIPTORS: usize = 2;
/// Descriptors that are reserved for pipes and for the rest of the daemon; half of all, if there are few.
const RESERVED_DESCRIPTORS: usize = 1280;

/// The places for connections, as many as the limit of open files allows.
#[derive(Debug, Clone)]
pub(super) struct ConnectionLimiter {
    free: Arc<Semaphore>,
    all: usize,
}

impl ConnectionLimiter {
    pub(super) fn new() -> Self {
        let limit = getrlimit(Resource::Nofile)
            .current
            .map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
        let reserved = RESERVED_DESCRIPTORS.min(limit / 2);
        // Pipes may take half of the reserved descriptors, at two descriptors each.
        splice::limit_pipes(reserved / 4);
        // At most as many as the kernel's map of peer names has entries.
        let all = ((limit - reserved) / DESCRIPTORS).clamp(1, MAX_RELAY_PEERS as usize);
        Self { free: Arc::new(Semaphore::new(all)), all }
    }

    /// Takes a place for a connection of the rule that `statistics` belongs to and that may have `max`
    /// connections. `None` if a limit is reached.
    pub(super) fn take(&self, statistics: &Arc<Statistics>, max: u32) -> Option<Permit> {
        let shared = self.free.clone().try_acquire_owned().ok()?;
        // A network may use what other networks leave, less one eighth, which stays free for them however
        // many rules the network has. The place taken just now does not count.
        let taken = (self.all - self.free.available_permits()).saturating_sub(1);
        let of_network = statistics.of_network.load(Ordering::Relaxed) as usize;
        let left = self.all - taken.saturating_sub(of_network);
        if of_network >= left - left / 8 {
            return None;
        }
        let counted = statistics
            .open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| (open < max).then_some(open + 1));
        counted.ok()?;
        statistics.of_network.fetch_add(1, Ordering::Relaxed);
        Some(Permit { _shared: shared, statistics: statistics.clone() })
    }
}

/// The place of one connection, freed when dropped.
pub(super) struct Permit {
    _shared: OwnedSemaphorePermit,
    statistics: Arc<Statistics>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.statistics.open.fetch_sub(1, Ordering::Relaxed);
        self.statistics.of_network.fetch_sub(1, Ordering::Relaxed);
    }
}

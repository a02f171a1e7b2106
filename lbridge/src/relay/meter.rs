//! Meter: the counters of a rule, which its relays and their connections share.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64},
    },
};

use super::{log_rate_limit::LogRateLimit, splice};

/// The counters of one rule.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    /// Open connections of the rule.
    pub(super) open: AtomicU32,
    /// Connections of the rule that were refused because a limit was reached.
    pub(super) refused: AtomicU64,
    /// Open connections of all rules of the network.
    pub(super) of_network: Arc<AtomicU32>,
    /// The time at which a failure was last logged.
    failed: Mutex<LogRateLimit>,
    traffic: Mutex<Meter>,
}

/// The byte counts of a rule's connections.
#[derive(Debug, Default)]
struct Meter {
    /// Bytes of the connections that have ended, to the service and back.
    ended: (u64, u64),
    /// Counters of the open connections, each under a number of its own.
    open: HashMap<u64, Arc<splice::Traffic>>,
    next: u64,
}

/// A connection whose bytes count for its rule; dropping it adds them to the rule's total.
pub(super) struct Metered {
    statistics: Arc<Statistics>,
    number: u64,
    /// The connection's own counters.
    pub(super) traffic: Arc<splice::Traffic>,
}

impl Drop for Metered {
    fn drop(&mut self) {
        let mut meter = self.statistics.meter();
        meter.open.remove(&self.number);
        meter.ended.0 += self.traffic.to_service();
        meter.ended.1 += self.traffic.to_client();
    }
}

impl Statistics {
    /// Makes the counters of a rule of `network`, which counts the open connections of all its rules.
    pub(super) fn of(network: Arc<AtomicU32>) -> Self {
        Self { of_network: network, ..Self::default() }
    }

    fn meter(&self) -> MutexGuard<'_, Meter> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if a failed connection is to be logged, which is at most once a minute for each rule.
    /// Counts it as logged then.
    pub(super) fn failure_is_due(&self) -> bool {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).is_over()
    }

    /// Starts counting the bytes of a new connection.
    pub(super) fn metered(self: Arc<Self>) -> Metered {
        let traffic = Arc::new(splice::Traffic::default());
        let mut meter = self.meter();
        meter.next += 1;
        let number = meter.next;
        meter.open.insert(number, traffic.clone());
        drop(meter);
        Metered { statistics: self, number, traffic }
    }

    /// Returns the bytes moved to the service and back, over all connections of the rule so far.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let meter = self.meter();
        let add = |(there, back): (u64, u64), traffic: &Arc<splice::Traffic>| {
            (there + traffic.to_service(), back + traffic.to_client())
        };
        meter.open.values().fold(meter.ended, add)
    }
}

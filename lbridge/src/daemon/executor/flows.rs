//! Flows: conntrack's flows of what accept rules let in that are gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use lbridge_common::wire::AcceptedKey;

use crate::{firewall::conntrack, planning::actual::Flows};

/// Least time between two searches for flows if all keys have open connections.
const PAUSE: Duration = Duration::from_secs(5);

/// The flows of keys that no accept rule lets in any more.
#[derive(Debug, Default)]
pub(super) struct GoneFlows {
    /// The last answer; `None` if there are no such keys.
    seen: Option<Seen>,
}

/// Last answer of conntrack about the flows of keys, and its time.
#[derive(Debug)]
struct Seen {
    at: Instant,
    flows: BTreeMap<(AcceptedKey, u32), Flows>,
    error: Option<String>,
}

impl GoneFlows {
    /// Returns the flows of what no accept rule lets in any more. While all keys have open connections,
    /// conntrack is not asked every time: its table may be long.
    pub(super) fn look(
        &mut self,
        gone: &BTreeSet<(AcceptedKey, u32)>,
    ) -> BTreeMap<(AcceptedKey, u32), Flows> {
        if gone.is_empty() {
            self.seen = None;
            return BTreeMap::new();
        }
        if let Some(seen) = &self.seen
            && seen.at.elapsed() < PAUSE
            && gone.iter().all(|key| seen.flows.get(key).is_some_and(|flows| flows.open > 0))
        {
            return seen.flows.clone();
        }
        let (flows, error) = match conntrack::flows(gone) {
            Ok(flows) => (flows, None),
            // For all that is known, they may be open.
            Err(error) => {
                let unknown = Flows { open: 1, forgettable: 0 };
                (gone.iter().map(|key| (*key, unknown)).collect(), Some(error.to_string()))
            }
        };
        if let Some(error) = &error
            && self.seen.as_ref().is_none_or(|seen| seen.error.is_none())
        {
            tracing::warn!(
                error,
                "could not list conntrack's flows; what removed accept rules let in stays refused"
            );
        }
        self.seen = Some(Seen { at: Instant::now(), flows: flows.clone(), error });
        flows
    }
}

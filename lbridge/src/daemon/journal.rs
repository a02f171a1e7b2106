//! Journal: what the log and the subscribers to events are told of the passes.

use super::report::{Report, RuleChange};
use crate::{
    api::{
        events::EventBus,
        protocol::{DockerStatus, EventKind, RuleStatus},
    },
    planning::rule::RuleId,
};

/// Limit on changes that are logged one by one; more are logged as one line.
const MAX_CHANGES: usize = 100;

/// The event bus, and what was last published about the engine.
#[derive(Debug)]
pub(super) struct Journal {
    bus: EventBus,
    docker: DockerStatus,
}

impl Journal {
    pub(super) fn new(bus: EventBus) -> Self {
        Self { bus, docker: DockerStatus::Off }
    }

    /// Returns true if at least one subscriber is connected.
    pub(super) fn has_subscribers(&self) -> bool {
        self.bus.has_subscribers()
    }

    /// Publishes events. They are built only if somebody subscribes.
    pub(super) fn publish(&self, events: impl IntoIterator<Item = EventKind>) {
        if self.bus.has_subscribers() {
            events.into_iter().for_each(|event| self.bus.publish(event));
        }
    }

    /// Logs and publishes what has changed between two passes.
    pub(super) fn report(&mut self, now: &Report, before: &Report, docker: DockerStatus) {
        let changes = now.changes_since(before);
        if changes.len() > MAX_CHANGES {
            tracing::info!(rules = changes.len(), "many rules changed; lbridge status shows each");
        } else {
            changes.iter().for_each(log);
        }
        if self.bus.has_subscribers() {
            self.publish(now.news_since(before));
        }
        self.report_docker(docker);
    }

    /// Publishes that the engine answers, or no longer does. The error may change its words at every try, so
    /// a change of it alone is not published.
    fn report_docker(&mut self, now: DockerStatus) {
        let both_away =
            matches!((&self.docker, &now), (DockerStatus::Away { .. }, DockerStatus::Away { .. }));
        if both_away || now == self.docker {
            return;
        }
        self.docker = now.clone();
        self.publish(event(now));
    }
}

fn log(change: &RuleChange) {
    match change {
        RuleChange::State(status) => {
            let RuleStatus { network, port, protocol, state, why, reasons, .. } = &**status;
            let codes: Vec<_> = reasons.iter().map(|reason| reason.code.as_str()).collect();
            tracing::info!(
                %network,
                port,
                protocol = protocol.name(),
                %state,
                reason = (!codes.is_empty()).then(|| codes.join(",")),
                why,
                "rule state changed"
            );
        }
        RuleChange::Removed { id: RuleId { network, port, protocol }, origin } => {
            tracing::info!(%network, port, protocol = protocol.name(), %origin, "rule removed");
        }
    }
}

/// Returns the event that an engine's new state is; `None` for a daemon that follows no engine.
fn event(docker: DockerStatus) -> Option<EventKind> {
    match docker {
        DockerStatus::Off => None,
        DockerStatus::Reachable { engine, version } => {
            Some(EventKind::Docker { engine, version: Some(version), error: None })
        }
        DockerStatus::Away { engine, error, .. } => {
            Some(EventKind::Docker { engine, version: None, error: Some(error) })
        }
    }
}

//! Journal: what the log and the subscribers to events are told of the passes.

use super::report::Report;
use crate::api::{
    events::EventBus,
    protocol::{DockerStatus, EventKind},
};

/// The event bus, and what was last published about the engine.
#[derive(Debug)]
pub(super) struct Journal {
    news: EventBus,
    docker: DockerStatus,
}

impl Journal {
    pub(super) fn new(news: EventBus) -> Self {
        Self { news, docker: DockerStatus::Off }
    }

    /// Returns true if at least one subscriber is connected.
    pub(super) fn has_subscribers(&self) -> bool {
        self.news.has_subscribers()
    }

    /// Publishes events. They are built only if somebody subscribes.
    pub(super) fn publish(&self, events: impl IntoIterator<Item = EventKind>) {
        if self.news.has_subscribers() {
            events.into_iter().for_each(|event| self.news.tell(event));
        }
    }

    /// Logs and publishes what has changed between two passes.
    pub(super) fn report(&mut self, now: &Report, before: &Report, docker: DockerStatus) {
        for change in now.changes_since(before) {
            tracing::info!("{change}");
        }
        if self.news.has_subscribers() {
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

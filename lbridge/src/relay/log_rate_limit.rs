//! Log rate limit: keeps frequent events from filling the log.

use std::time::Duration;

use tokio::time::Instant;

/// The interval at which a repeated event is logged.
const LOG_PAUSE: Duration = Duration::from_secs(60);

/// Limits how often a frequent event is logged; holds the time of the last log entry.
#[derive(Debug, Default)]
pub(super) struct LogRateLimit(Option<Instant>);

impl LogRateLimit {
    /// Returns true if the last log entry is at least [`LOG_PAUSE`] ago, and then counts this one as the
    /// last.
    pub(super) fn is_over(&mut self) -> bool {
        let over = self.0.is_none_or(|last| last.elapsed() >= LOG_PAUSE);
        if over {
            self.0 = Some(Instant::now());
        }
        over
    }
}

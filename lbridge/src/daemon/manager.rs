//! What the service manager is told while the daemon runs: how things are, in a line, and that the loop is alive.
//! The loop alone calls this: whoever else said that it is alive would go on saying so while it hangs.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, sleep_until};

/// What was said, and when.
#[derive(Debug)]
pub(super) struct Manager {
    /// How often to say that the loop is alive, where somebody wants to know (`WatchdogSec=`, systemd.service(5)).
    every: Option<Duration>,
    last: Instant,
    status: String,
}

impl Manager {
    pub(super) fn new() -> Self {
        // Twice in the time would do; a loop that is late once is no loop that hangs.
        let every = sd_notify::watchdog_enabled().map(|limit| limit / 3);
        Self { every, last: Instant::now(), status: String::new() }
    }

    /// The loop has come by.
    pub(super) fn beat(&mut self) {
        if self.next().is_some_and(|next| next <= Instant::now()) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            self.last = Instant::now();
        }
    }

    /// Waits until it is to come by again. Cancel-safe.
    pub(super) async fn next_beat(&self) {
        match self.next() {
            Some(next) => sleep_until(next).await,
            None => std::future::pending().await,
        }
    }

    /// How things are, if that is news.
    pub(super) fn status(&mut self, status: String) {
        if self.status != status {
            let _ = sd_notify::notify(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    fn next(&self) -> Option<Instant> {
        Some(self.last + self.every?)
    }
}

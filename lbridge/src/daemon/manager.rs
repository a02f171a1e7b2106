//! Manager: reports to the service manager, while the daemon runs, a one-line status, and that the loop is
//! alive. Only the loop calls this: any other caller would still report it alive while it hangs.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, sleep_until};

/// The last status sent, and the time of the last watchdog message.
#[derive(Debug)]
pub(super) struct Manager {
    /// Interval of watchdog messages, a third of `WatchdogSec=` (systemd.service(5)); `None` without a
    /// watchdog.
    every: Option<Duration>,
    last: Instant,
    status: String,
}

impl Manager {
    pub(super) fn new() -> Self {
        // Half the limit would do; with a third, a loop that is late once is not taken for one that hangs.
        let every = sd_notify::watchdog_enabled().map(|limit| limit / 3);
        Self { every, last: Instant::now(), status: String::new() }
    }

    /// Sends a watchdog message if one is due. The loop calls this on every turn.
    pub(super) fn beat(&mut self) {
        if self.next().is_some_and(|next| next <= Instant::now()) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            self.last = Instant::now();
        }
    }

    /// Waits until the next watchdog message is due, for ever without a watchdog. Cancel-safe.
    pub(super) async fn next_beat(&self) {
        match self.next() {
            Some(next) => sleep_until(next).await,
            None => std::future::pending().await,
        }
    }

    /// Sends the status if it has changed.
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

//! How long to wait for what should happen at once: an emulated machine gets a multiple.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Multiplies every time-out: `LBRIDGE_TEST_PATIENCE=8`.
const VARIABLE: &str = "LBRIDGE_TEST_PATIENCE";

/// `seconds`, times the machine's slowness.
pub fn seconds(seconds: u64) -> Duration {
    let factor = std::env::var(VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    Duration::from_secs(seconds * factor)
}

/// Asks again and again, until there is an answer or ten (patient) seconds are over. `Err` from `ask` ends it at
/// once; `Ok(None)` asks again.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let limit = seconds(10);
    let start = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if start.elapsed() > limit {
            bail!("waited {limit:?} in vain: {what}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

//! patience: time limits for what should happen at once; on an emulated machine they are multiplied.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Environment variable that multiplies every time-out: `LBRIDGE_TEST_PATIENCE=8`.
const VARIABLE: &str = "LBRIDGE_TEST_PATIENCE";

/// Returns `seconds`, multiplied by the machine's factor.
pub fn seconds(seconds: u64) -> Duration {
    let factor = std::env::var(VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    Duration::from_secs(seconds * factor)
}

/// Calls `ask` repeatedly until it returns a value or ten seconds, multiplied by the factor, have passed.
/// `Err` ends the wait at once; `Ok(None)` continues it.
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

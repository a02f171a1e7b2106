//! Priority threads: threads beside the loop whose work must not wait for a turn on a busy machine.

use std::thread;

use anyhow::Context as _;
use rustix::process::setpriority_process;

use crate::host::privileges;

/// The threads' nice value. Under the unit the daemon's own (`Nice=`) is higher; the threads keep that if
/// they cannot lower it.
const NICE: i32 = -15;

/// Starts a thread at a raised priority; each turn of its work must be short. Call this before the daemon
/// gives up its privileges. The thread gives up its own, and does not begin its work if it cannot.
///
/// # Errors
///
/// If the thread cannot be started.
pub(super) fn start(name: &'static str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let prepared = move || {
        raise_priority(name);
        match privileges::drop_capabilities() {
            Ok(()) => work(),
            Err(error) => {
                tracing::error!(thread = name, %error, "could not drop a thread's privileges; the thread \
                                                        ends");
            }
        }
    };
    let started = thread::Builder::new().name(name.to_owned()).spawn(prepared);
    started.map(drop).with_context(|| format!("failed to start the thread {name}"))
}

fn raise_priority(name: &str) {
    if let Err(error) = setpriority_process(None, NICE) {
        tracing::debug!(
            thread = name,
            %error,
            "could not raise a thread's priority; it may lag on a busy machine"
        );
    }
}

//! Threads beside the loop whose work must not wait for a turn on a busy machine.

use std::thread;

use anyhow::Context as _;
use rustix::process::setpriority_process;

use crate::host::privileges;

/// The threads' nice value. In the unit it is that of the daemon, or lower (`Nice=`).
const NICE: i32 = -15;

/// Starts a thread that runs before others that want to: each of its turns is short. To be called before the daemon gives up its
/// privileges; the thread gives up its own, and does not begin if it cannot.
///
/// # Errors
///
/// If there can be no more threads.
pub(super) fn start(name: &'static str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let prepared = move || {
        hurry(name);
        match privileges::give_up() {
            Ok(()) => work(),
            Err(error) => {
                tracing::error!("the thread {name} could not give up its privileges and ends: {error}");
            }
        }
    };
    let started = thread::Builder::new().name(name.to_owned()).spawn(prepared);
    started.map(drop).with_context(|| format!("failed to start the thread {name}"))
}

fn hurry(name: &str) {
    if let Err(error) = setpriority_process(None, NICE) {
        tracing::debug!(
            "could not raise the priority of the thread {name}; it may lag on a busy machine: {error}"
        );
    }
}

//! Signals: forwards signals that this process gets to the command that it runs.

use std::{
    io::PipeWriter,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    thread,
};

use anyhow::Context as _;
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

/// The signals that are forwarded: those that service managers, shells and users send to end a program or to
/// notify it. Job control's signals are not among them: they reach the process group, and the command is in
/// it.
const PASSED: [Signal; 6] =
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];

/// Blocks the signals in the calling thread until dropped. Threads that it starts from now on inherit the
/// mask.
#[derive(Debug)]
pub(super) struct Blocked {
    before: SigSet,
}

impl Blocked {
    pub(super) fn new() -> anyhow::Result<Self> {
        let signals: SigSet = PASSED.into_iter().collect();
        let before = SigSet::thread_get_mask().context("cannot read the signal mask")?;
        signals.thread_block().context("cannot block signals")?;
        Ok(Self { before })
    }

    /// Returns the signal mask as it was before.
    pub(super) fn before(&self) -> &SigSet {
        &self.before
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // Signals that arrived in the meantime are delivered now.
        let _ = self.before.thread_set_mask();
    }
}

/// A thread that forwards the signals, until this is dropped.
#[derive(Debug)]
pub(super) struct Passing {
    /// Write end of a pipe; closing it stops the thread.
    stop: Option<PipeWriter>,
    thread: Option<thread::JoinHandle<()>>,
    /// Dropped last, so that signals do not reach this process while the thread runs.
    _blocked: Blocked,
}

impl Passing {
    /// Starts the thread. Signals that arrived since they were blocked are forwarded as well.
    pub(super) fn start(blocked: Blocked, command: Arc<OwnedFd>) -> anyhow::Result<Self> {
        let signals: SigSet = PASSED.into_iter().collect();
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("cannot watch for signals")?;
        let (stopped, stop) = std::io::pipe().context("cannot create a pipe")?;
        let thread = thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                loop {
                    let mut sources = [
                        PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                        PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                    ];
                    // All signals but the fatal ones are blocked or have no handler: nothing interrupts this.
                    let _ = poll(&mut sources, PollTimeout::NONE);
                    while let Ok(Some(signal)) = signals.read_signal() {
                        // A terminal sends to every process of its foreground group: the command has it
                        // already.
                        if signal.ssi_code != libc::SI_KERNEL {
                            pass(&command, signal.ssi_signo);
                        }
                    }
                    if sources[1].any().unwrap_or(true) {
                        return;
                    }
                }
            })
            .context("cannot start a thread")?;
        Ok(Self { stop: Some(stop), thread: Some(thread), _blocked: blocked })
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pass(command: &OwnedFd, signal: u32) {
    let signal = i32::try_from(signal).ok().and_then(rustix::process::Signal::from_named_raw);
    if let Some(signal) = signal {
        // It may have ended.
        let _ = rustix::process::pidfd_send_signal(command, signal);
    }
}

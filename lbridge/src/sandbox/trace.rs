//! Trace: the ptrace(2) calls that [`launch`](super::launch) needs. nix has most of them, but no real-time
//! signals: it could neither wait for nor continue a tracee that gets one.

use std::{os::unix::process::ExitStatusExt as _, process::ExitStatus, ptr};

use nix::{
    errno::Errno,
    libc,
    sys::ptrace::{self, Options},
    unistd::Pid,
};

/// A change of a tracee's state.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    /// The tracee has stopped, until it is continued or detached.
    Stopped(Stop),
    /// The tracee has ended, with this exit status.
    Ended(ExitStatus),
}

/// The reason why a tracee stopped.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stop {
    /// An exec: a new program is loaded, and none of its instructions has run. The thread `before` called it;
    /// from now on the thread has the process's number.
    Exec {
        /// The number that the thread had before the exec.
        before: Pid,
    },
    /// The tracee has made this process or thread, which is traced as well.
    Birth(Pid),
    /// This signal, by its number, is about to be delivered.
    Signal(i32),
    /// A group stop: job control has stopped the tracee.
    Group,
    /// The tracee is new, was interrupted, or continues after a group stop.
    Trap,
}

/// The way in which [`wait`] waits for a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Block until there is a change.
    Until,
    /// Do not block: report only a change that is pending.
    Peek,
}

/// Starts to trace `pid` and all its descendants. They die with this thread: a command must not run without
/// its ports.
pub(super) fn seize(pid: Pid) -> nix::Result<()> {
    let options = Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(pid, options)
}

/// Makes a tracee that runs, or that job control has stopped, report a [`Stop`].
pub(super) fn interrupt(pid: Pid) -> nix::Result<()> {
    ptrace::interrupt(pid)
}

/// Continues a tracee after a stop. The cause of the stop takes effect: a signal is delivered, a group stop
/// lasts.
pub(super) fn go_on(pid: Pid, stop: Stop) -> nix::Result<()> {
    match stop {
        Stop::Group => request(libc::PTRACE_LISTEN, pid, 0),
        Stop::Signal(signal) => request(libc::PTRACE_CONT, pid, signal),
        Stop::Exec { .. } | Stop::Birth(_) | Stop::Trap => request(libc::PTRACE_CONT, pid, 0),
    }
}

/// Detaches a tracee after a stop. As with [`go_on`], the cause of the stop takes effect: the kernel
/// continues a group stop by itself (`__ptrace_unlink` in kernel/ptrace.c).
pub(super) fn let_go(pid: Pid, stop: Stop) -> nix::Result<()> {
    let signal = if let Stop::Signal(signal) = stop { signal } else { 0 };
    request(libc::PTRACE_DETACH, pid, signal)
}

#[cfg(target_env = "musl")]
type Request = libc::c_int;
#[cfg(not(target_env = "musl"))]
type Request = libc::c_uint;

fn request(request: Request, pid: Pid, signal: i32) -> nix::Result<()> {
    let data = ptr::without_provenance_mut::<libc::c_void>(usize::try_from(signal).unwrap_or(0));
    // SAFETY: these requests take a number, and touch no memory of this process.
    Errno::result(unsafe { libc::ptrace(request, pid.as_raw(), ptr::null_mut::<libc::c_void>(), data) })
        .map(drop)
}

/// Returns the next change, of `pid` or of any tracee or child of this thread; not of those that other
/// threads have. `None` if there is none yet and `wait` is [`Wait::Peek`].
pub(super) fn wait(pid: Option<Pid>, wait: Wait) -> nix::Result<Option<(Pid, Change)>> {
    let flags = libc::__WALL | libc::__WNOTHREAD | if wait == Wait::Peek { libc::WNOHANG } else { 0 };
    let mut status = 0;
    let changed = loop {
        // SAFETY: `status` is valid for the call.
        match Errno::result(unsafe { libc::waitpid(pid.map_or(-1, Pid::as_raw), &raw mut status, flags) }) {
            Err(Errno::EINTR) => {}
            changed => break changed?,
        }
    };
    if changed == 0 {
        return Ok(None);
    }
    let pid = Pid::from_raw(changed);
    if !libc::WIFSTOPPED(status) {
        return Ok(Some((pid, Change::Ended(ExitStatus::from_raw(status)))));
    }
    let signal = libc::WSTOPSIG(status);
    // "status>>8 == (SIGTRAP | PTRACE_EVENT_foo << 8)", ptrace(2).
    let stop = match status >> 16 {
        0 => Stop::Signal(signal),
        libc::PTRACE_EVENT_EXEC => Stop::Exec { before: message(pid).unwrap_or(pid) },
        libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => {
            message(pid).map_or(Stop::Trap, Stop::Birth)
        }
        libc::PTRACE_EVENT_STOP if signal != libc::SIGTRAP => Stop::Group,
        _ => Stop::Trap,
    };
    Ok(Some((pid, Change::Stopped(stop))))
}

/// Returns the process that an event is about; `None` if the tracee has been killed since.
fn message(pid: Pid) -> Option<Pid> {
    let message = ptrace::getevent(pid).ok()?;
    i32::try_from(message).ok().filter(|&pid| pid > 0).map(Pid::from_raw)
}

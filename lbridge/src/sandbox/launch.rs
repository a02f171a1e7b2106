//! Launch: starts a command, and holds it when its sandbox is up and its program has not run yet. Ports that
//! are opened at that moment exist before they are needed.
//!
//! The command and all its descendants are traced (ptrace(2)) until the first process appears in another
//! network namespace:
//!
//! - at an exec: the program is loaded, and none of its instructions has run;
//! - at its birth, if the loopback is up in there. Otherwise the sandbox is still being made: bubblewrap
//!   starts its child in a namespace where the child then sets up the loopback, and fails if another process
//!   has done it.
//!
//! After that nothing is traced any more, so that a debugger works inside.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::{CString, OsString, c_char},
    fs,
    io::{self, PipeReader, Read as _, Write as _},
    marker::PhantomData,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _, process::ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::ExitStatus,
    ptr,
    sync::{Arc, mpsc},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use nix::{
    errno::Errno,
    libc,
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction},
        stat::Mode,
    },
    unistd::{ForkResult, Pid, fork, geteuid},
};
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};

use super::{
    id_of, netns_of, own_netns,
    signals::{Blocked, Passing},
    trace::{self, Change, Stop, Wait},
};
use crate::planning::inventory::NamespaceId;

/// The longest time for which the held process waits until the others are detached. They stop at once, unless
/// they wait for the held one in vfork(2).
const CHILDREN_TIMEOUT: Duration = Duration::from_millis(100);
/// The longest wait for processes to stop or die when told to. Those that sleep in the kernel may take
/// longer.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// The time after which a warning says that there is no sandbox yet. A sandbox is up in milliseconds, unless
/// a person is prompted for something first.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between two checks of processes that were told to stop or die.
const POLL_INTERVAL: Duration = Duration::from_micros(100);

/// The state of a command that was started.
#[derive(Debug)]
pub enum Started {
    /// The command has made its sandbox, and is held.
    Held(Held),
    /// The command ended, and no sandbox was seen.
    Ended(ExitStatus),
}

/// The reason why a command could not be started.
#[derive(Debug, thiserror::Error)]
pub enum NotStarted {
    /// The program, by its name, was not found.
    #[error("{0}: command not found")]
    NotFound(String),
    /// The program, by its name, exists, but could not be executed.
    #[error("cannot run {0}")]
    NotExecutable(String, #[source] io::Error),
}

impl NotStarted {
    /// Returns the exit status that a shell would use ("Exit Status" in sh(1p)).
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotExecutable(..) => 126,
        }
    }
}

/// Starts a command in this process's group, with its standard streams, and returns when its sandbox is up or
/// it has ended. If the command could not be started the error is a [`NotStarted`].
///
/// SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1 and SIGUSR2 to this process are forwarded to the command, from
/// its start until [`Child::wait`] has returned. Signals from a terminal are not, since it sends them to the
/// command as well. To that end the signals are blocked in the calling thread and in those that it starts in
/// the meantime; threads that exist already must have blocked them. Other children of the calling thread are
/// reaped.
pub fn launch(command: &[OsString]) -> anyhow::Result<Started> {
    let program = command.first().context("no command")?.to_string_lossy().into_owned();
    let own = own_netns().context("cannot determine this process's network namespace")?;
    let (mut tree, mut failure) = Tree::spawn_traced(command, &program)?;
    let late = warn_if_late();
    let found = tree.watch(own)?;
    drop(late);
    if let Some((pid, netns)) = found {
        return Ok(Started::Held(Held { tree: Box::new(tree), netns, pid, _on_this_thread: PhantomData }));
    }
    let status = tree.ended.context("lost track of the command")?;
    if !tree.has_run {
        let mut errno = [0; 4];
        // If no errno arrives, the child was killed before its exec.
        if failure.read_exact(&mut errno).is_ok() {
            return Err(match Errno::from_raw(i32::from_ne_bytes(errno)) {
                Errno::ENOENT => NotStarted::NotFound(program),
                // execvp(3) also returns this if a folder of the PATH is closed to this user.
                Errno::EACCES if !program.contains('/') && !is_on_path(&program) => {
                    NotStarted::NotFound(program)
                }
                error => NotStarted::NotExecutable(program, error.into()),
            }
            .into());
        }
    }
    // Its background processes continue.
    tree.let_go(None);
    if let Some(powerless) = tree.powerless.take().filter(|_| !status.success()) {
        tracing::warn!(
            program = %powerless.display(),
            "program was traced, so it ran without its file's privileges; if it needs them, start the \
             sandbox without lbridge and use --pid"
        );
    }
    Ok(Started::Ended(status))
}

/// Starts a thread that logs a warning after [`START_TIMEOUT`], unless the returned sender is dropped before.
/// A command that makes no sandbox is in the host's network, where everything seems to work.
fn warn_if_late() -> mpsc::Sender<()> {
    let (found, wait) = mpsc::channel();
    thread::spawn(move || {
        if wait.recv_timeout(START_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!(
                "command has made no network namespace yet and runs in the host's; is --unshare-net missing?"
            );
        }
    });
    found
}

/// A command whose sandbox is up. One process inside is stopped: the first that was seen there. Dropping this
/// without [`Held::release`] kills the whole command: its program has not run, and must not run without its
/// ports.
#[derive(Debug)]
pub struct Held {
    tree: Box<Tree>,
    netns: OwnedFd,
    pid: Pid,
    /// Not `Send`: only the tracing thread may detach.
    _on_this_thread: PhantomData<*const ()>,
}

impl Held {
    /// Returns the sandbox's network namespace.
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// Returns the number (PID) of the process that is held inside.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Detaches from the command and lets it continue. Nothing of it is traced any more, except processes
    /// that do not stop; a warning names those.
    pub fn release(mut self) -> anyhow::Result<Child> {
        let left = self.tree.let_go(Some(self.pid));
        if !left.is_empty() {
            // A process that sleeps in the kernel, or the dead first thread of one.
            let left: Vec<_> = left.iter().map(ToString::to_string).collect();
            tracing::warn!(
                pids = left.join(","),
                "could not detach from processes that do not stop; they stay traced"
            );
        }
        let Tree { command, handle, passing, ended, .. } = &mut *self.tree;
        let passing = passing.take().context("signals are not forwarded to the command")?;
        Ok(Child { pid: *command, handle: handle.clone(), ended: *ended, _passing: passing })
    }
}

/// The command, no longer traced. If this is dropped the command continues, but gets no more signals, and
/// nobody waits for it.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    handle: Arc<OwnedFd>,
    ended: Option<ExitStatus>,
    _passing: Passing,
}

impl Child {
    /// Returns the command's process number (PID).
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Returns the command's pidfd: readable when it has ended, and then [`Child::wait`] returns at once.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    /// Sends a signal to the command. Does nothing if it has ended.
    pub fn send(&self, signal: Signal) -> io::Result<()> {
        let signal = rustix::process::Signal::from_named_raw(signal as i32).ok_or(Errno::EINVAL)?;
        match pidfd_send_signal(&self.handle, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Waits until the command ends, and returns its exit status. Afterwards signals are no longer forwarded.
    pub fn wait(self) -> anyhow::Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let pid = rustix::process::Pid::from_raw(self.pid.as_raw());
        loop {
            match rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()) {
                Ok(Some((_, status))) => return Ok(ExitStatus::from_raw(status.as_raw())),
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait for the command"),
            }
        }
    }
}

/// The command and all its descendants, traced by this thread. Dropping this kills those that are still
/// traced.
#[derive(Debug)]
struct Tree {
    command: Pid,
    handle: Arc<OwnedFd>,
    /// The traced processes and threads. False if one is new and has not reported a stop yet.
    tracees: BTreeMap<Pid, bool>,
    /// True once the program was found and executed.
    has_run: bool,
    ended: Option<ExitStatus>,
    /// The first program that would have more privileges if it were not traced.
    powerless: Option<PathBuf>,
    passing: Option<Passing>,
}

impl Tree {
    /// Starts the command, traced from before its first exec. Also returns the pipe on which the errno of a
    /// failed exec arrives.
    fn spawn_traced(command: &[OsString], program: &str) -> anyhow::Result<(Self, PipeReader)> {
        let arguments = command.iter().map(|argument| CString::new(argument.as_bytes()));
        let arguments: Vec<CString> =
            arguments.collect::<Result<_, _>>().context("an argument with a NUL byte in it")?;
        let pointers: Vec<*const c_char> =
            arguments.iter().map(|argument| argument.as_ptr()).chain([ptr::null()]).collect();
        let (ready, go) = io::pipe().context("cannot create a pipe")?;
        let (failure, failed) = io::pipe().context("cannot create a pipe")?;

        let ignores_children = reap_children().context("cannot reset SIGCHLD")?;
        let blocked = Blocked::new()?;
        // SAFETY: the child calls nothing but async-signal-safe functions until it runs the program.
        let pid = match unsafe { fork() }.context("cannot start a process")? {
            ForkResult::Child => {
                let [ready, go, failed] = [ready.as_raw_fd(), go.as_raw_fd(), failed.as_raw_fd()];
                run(&pointers, [ready, go, failed], blocked.before(), ignores_children)
            }
            ForkResult::Parent { child } => child,
        };
        drop((ready, failed));

        let started = trace::seize(pid).map_err(|error| match error {
            Errno::EPERM | Errno::EACCES | Errno::ENOSYS => anyhow!(
                "cannot watch {program} make its sandbox: ptrace is not permitted here ({}); start the \
                 sandbox without lbridge and use --pid",
                error.desc()
            ),
            error => anyhow::Error::new(error).context(format!("cannot watch {program} make its sandbox")),
        });
        let handle = started.and_then(|()| {
            let pid = rustix::process::Pid::from_raw(pid.as_raw()).context("no process")?;
            pidfd_open(pid, PidfdFlags::empty()).context("cannot open the command's pidfd")
        });
        let handle = match handle {
            Ok(handle) => Arc::new(handle),
            Err(error) => {
                // The child ends by itself if it never gets the byte to start.
                drop(go);
                let _ = trace::wait(Some(pid), Wait::Until);
                return Err(error);
            }
        };
        let mut tree = Self {
            command: pid,
            handle: handle.clone(),
            tracees: BTreeMap::from([(pid, true)]),
            has_run: false,
            ended: None,
            powerless: None,
            passing: None,
        };
        tree.passing = Some(Passing::start(blocked, handle)?);
        (&go).write_all(&[1]).context("cannot let the command begin")?;
        Ok((tree, failure))
    }

    /// Continues all tracees until the first process appears in a namespace other than `own`, or the command
    /// has ended. Returns that process, which stays stopped, and its namespace; `None` if the command has
    /// ended.
    fn watch(&mut self, own: NamespaceId) -> anyhow::Result<Option<(Pid, OwnedFd)>> {
        while self.ended.is_none() {
            let Some((pid, change)) =
                trace::wait(None, Wait::Until).context("cannot wait for the command")?
            else {
                continue;
            };
            let known = self.tracees.get(&pid).is_some_and(|&known| known);
            let Some(stop) = self.note(pid, change) else { continue };
            let netns = match stop {
                Stop::Exec { .. } => another_netns(pid, own),
                Stop::Trap if !known => another_netns(pid, own).filter(|_| has_loopback(pid)),
                _ => None,
            };
            if let Some(netns) = netns {
                return Ok(Some((pid, netns)));
            }
            if matches!(stop, Stop::Exec { .. }) && self.powerless.is_none() {
                self.powerless = lost_privileges(pid);
            }
            // It may have been killed; then its end is reported next.
            let _ = trace::go_on(pid, stop);
        }
        Ok(None)
    }

    /// Records a change. Returns the stop if it is one.
    fn note(&mut self, pid: Pid, change: Change) -> Option<Stop> {
        match change {
            Change::Ended(status) => {
                self.tracees.remove(&pid);
                if pid == self.command {
                    self.ended = Some(status);
                }
                None
            }
            Change::Stopped(stop) => {
                self.tracees.insert(pid, true);
                match stop {
                    Stop::Exec { before } => {
                        self.has_run = true;
                        if before != pid {
                            self.tracees.remove(&before);
                        }
                    }
                    // It may have reported itself before its parent did, or even have ended.
                    Stop::Birth(child) if is_process(child) => {
                        self.tracees.entry(child).or_insert(false);
                    }
                    _ => {}
                }
                Some(stop)
            }
        }
    }

    /// Detaches from all tracees, from the `held` one last, so that its program finds nothing traced. Returns
    /// those that could not be detached.
    fn let_go(&mut self, mut held: Option<Pid>) -> Vec<Pid> {
        let begin = Instant::now();
        let mut told = BTreeSet::new();
        loop {
            let mut moved = false;
            let others: Vec<_> = self.tracees.keys().copied().filter(|&pid| Some(pid) != held).collect();
            for &pid in &others {
                if told.insert(pid) {
                    // It may stop for another reason, or have stopped or ended: that makes no difference.
                    let _ = trace::interrupt(pid);
                }
                match trace::wait(Some(pid), Wait::Peek) {
                    Ok(Some((pid, change))) => {
                        moved = true;
                        if let Some(stop) = self.note(pid, change)
                            && trace::let_go(pid, stop).is_ok()
                        {
                            self.tracees.remove(&pid);
                        }
                    }
                    Ok(None) => {}
                    // Not a tracee of ours, or a thread that took over its process's number in an exec.
                    Err(_) => {
                        self.tracees.remove(&pid);
                    }
                }
            }
            if moved {
                continue;
            }
            if self.tracees.len() == usize::from(held.is_some()) {
                let unknown: Vec<_> = unannounced().into_iter().filter(|pid| !told.contains(pid)).collect();
                self.tracees.extend(unknown.iter().filter(|&&pid| Some(pid) != held).map(|&pid| (pid, true)));
            }
            let alone = self.tracees.len() == usize::from(held.is_some());
            if (alone || begin.elapsed() > CHILDREN_TIMEOUT)
                && let Some(pid) = held.take()
            {
                if trace::let_go(pid, Stop::Trap).is_ok() {
                    self.tracees.remove(&pid);
                }
            } else if alone || begin.elapsed() > STOP_TIMEOUT {
                return std::mem::take(&mut self.tracees).into_keys().collect();
            } else {
                sleep(POLL_INTERVAL);
            }
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let begin = Instant::now();
        while !self.tracees.is_empty() && begin.elapsed() < STOP_TIMEOUT {
            for pid in self.tracees.keys().copied().collect::<Vec<_>>() {
                match trace::wait(Some(pid), Wait::Peek) {
                    Ok(Some((pid, change))) => drop(self.note(pid, change)),
                    // The number is not reused until the process has been waited for.
                    Ok(None) => drop(kill(pid, Signal::SIGKILL)),
                    Err(_) => {
                        self.tracees.remove(&pid);
                    }
                }
            }
            sleep(POLL_INTERVAL);
        }
    }
}

/// Resets SIGCHLD to its default if it is ignored, since ignored children cannot be waited for (wait(2)).
/// Returns true if it was ignored.
fn reap_children() -> nix::Result<bool> {
    // SAFETY: an all-zero sigaction is a valid value of the C structure, which the call fills; it changes
    // nothing.
    let before = unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        Errno::result(libc::sigaction(libc::SIGCHLD, ptr::null(), &raw mut before))?;
        before.sa_sigaction
    };
    if before != libc::SIG_IGN {
        return Ok(false);
    }
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is put in.
    unsafe { sigaction(Signal::SIGCHLD, &default) }.map(|_| true)
}

/// Runs the command's process, from the fork until it executes its program.
fn run(
    arguments: &[*const c_char],
    [ready, go, failed]: [RawFd; 3],
    mask: &SigSet,
    ignores_children: bool,
) -> ! {
    let disposition = |signal, disposition| {
        // SAFETY: no handler is put in.
        let _ = unsafe { nix::sys::signal::signal(signal, disposition) };
    };
    let mut word = [0_u8; 1];
    // SAFETY: async-signal-safe calls, as behind every fork (signal-safety(7)); execvp is one in glibc and
    // musl, where it allocates nothing. The pointers are to memory that lives as long as this process, the
    // last one is null.
    unsafe {
        // So that the read returns if the parent ends.
        libc::close(go);
        if libc::read(ready, word.as_mut_ptr().cast(), 1) == 1 {
            // As std's Command does: Rust's runtime ignores it.
            disposition(Signal::SIGPIPE, SigHandler::SigDfl);
            if ignores_children {
                // Restore the disposition.
                disposition(Signal::SIGCHLD, SigHandler::SigIgn);
            }
            let _ = mask.thread_set_mask();
            libc::execvp(arguments[0], arguments.as_ptr());
            let errno = Errno::last_raw();
            libc::write(failed, (&raw const errno).cast(), size_of_val(&errno));
        }
        libc::_exit(127)
    }
}

/// Opens the network namespace of a stopped tracee; `None` if it is `own`. Tracees that may not be inspected
/// are programs that their users may run and not read: those are no sandboxes.
fn another_netns(pid: Pid, own: NamespaceId) -> Option<OwnedFd> {
    let netns = netns_of(pid).ok()?;
    (id_of(&netns).ok()? != own).then(|| netns.into())
}

/// Returns true if the loopback of the tracee's network namespace is up: then the kernel has a route for its
/// address.
fn has_loopback(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/net/fib_trie")).is_ok_and(|routes| routes.contains("127.0.0.1"))
}

/// Returns the program that a tracee is about to run, if its file would give it privileges that it does not
/// get while an unprivileged process traces it (execve(2)).
fn lost_privileges(pid: Pid) -> Option<PathBuf> {
    let (own, link) = (geteuid(), format!("/proc/{pid}/exe"));
    if own.is_root() {
        return None;
    }
    let file = fs::metadata(&link).ok()?;
    let setuid = file.mode() & Mode::S_ISUID.bits() != 0 && file.uid() != own.as_raw();
    let capable = || rustix::fs::getxattr(&link, "security.capability", &mut [0_u8; 64]).is_ok();
    if setuid || capable() { fs::read_link(&link).ok() } else { None }
}

fn is_on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Returns true if a process or thread has this number.
fn is_process(pid: Pid) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Lists the processes that this one traces. Only so does it find children whose parents were killed before
/// they could report them.
fn unannounced() -> Vec<Pid> {
    let own = format!("TracerPid:\t{}\n", std::process::id());
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw));
    let is_traced = |pid: &Pid| {
        fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| status.contains(&own))
    };
    pids.filter(is_traced).collect()
}

//! sandbox: private namespaces to run a process in, so that nothing of it reaches the machine or outlives it.
//!
//! Inside are a network namespace of its own with the loopback up, a tmpfs on `/run`, fresh `/proc` and
//! `/sys`, a private root of cgroup2 on `/sys/fs/cgroup` and a private bpffs on `/sys/fs/bpf`. Three
//! processes make it:
//!
//! ```text
//! outside   makes a cgroup, starts the next, forwards signals, removes the cgroup and the shared folder
//!  └ door   unshares the namespaces, starts the next, forwards signals, passes on the exit status
//!     └ init   PID 1 inside: mounts, starts the command, reaps every process that dies
//!        └ the command
//! ```
//!
//! Door and init are the current program, started again: a program that uses this module calls [`hook`] first
//! thing in `main`. Each dies with its parent, and with init dies everything inside.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, process, thread};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// Environment variable of door and init: the cgroup to live in.
const DOOR: &str = "LBRIDGE_SANDBOX_CGROUP";
/// Environment variable of the command inside: the folder that both sides see.
const INSIDE: &str = "LBRIDGE_SANDBOX_FOLDER";
/// Prefix of the names of cgroups and folders: `lbridge-sandbox.PID.…`.
const PREFIX: &str = "lbridge-sandbox.";
/// Signals that a terminal or a service manager sends.
const SIGNALS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// A process in a sandbox, seen from outside.
#[derive(Debug)]
struct Sandbox {
    door: process::Child,
    cgroup: PathBuf,
    folder: tempfile::TempDir,
}

/// The doors that are open; `None` once the process is being stopped.
static OPEN: Mutex<Option<Vec<Pid>>> = Mutex::new(Some(Vec::new()));

fn open() -> MutexGuard<'static, Option<Vec<Pid>>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does the work of the door and of init, and never returns there. Call it before anything else in `main`.
pub fn hook() {
    let Some(cgroup) = env::var_os(DOOR) else { return };
    let status = door(Path::new(&cgroup)).unwrap_or_else(|error| {
        eprintln!("sandbox: {error:#}");
        125
    });
    process::exit(status);
}

/// Returns true if this process is inside a sandbox.
pub fn is_inside() -> bool {
    env::var_os(INSIDE).is_some()
}

/// Returns the folder under the system's temporary folder that is the same inside and outside, and removed in
/// the end. Only works inside.
pub fn shared_folder() -> Result<PathBuf> {
    env::var_os(INSIDE).map(PathBuf::from).context("not inside a sandbox")
}

/// The cgroup2 root inside.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The bpffs inside.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Enters a sandbox; returns only inside. The current program is started again there, with the same
/// arguments; this process waits for it, cleans up and exits with its status. SIGINT, SIGTERM, SIGHUP and
/// SIGQUIT are passed to the program inside. Call [`hook`] before.
pub fn enter() -> Result<()> {
    if is_inside() {
        return Ok(());
    }
    forward_signals(OnSignal::Forward)?;
    let mut command = Command::new(env::current_exe().context("find the current program")?);
    command.args(env::args_os().skip(1));
    let mut sandbox = Sandbox::start(&command, Stdio::inherit(), Stdio::inherit(), Stdio::inherit())?;
    let status = sandbox.door.wait();
    sandbox.remove();
    process::exit(exit_code(status.context("wait for the sandbox")?));
}

/// Runs a command in a sandbox of its own, for `limit` at most. Returns its output and status; the status is
/// `None` if the limit was reached and it was killed. Of `command` only the program, arguments, environment
/// and working folder are used. Call [`hook`] at the start of `main` and [`kill_on_signals`] before the first
/// run.
pub fn run(command: &Command, limit: Duration, capture: bool) -> Result<(Option<ExitStatus>, Output)> {
    let out = || if capture { Stdio::piped() } else { Stdio::inherit() };
    let mut sandbox = Sandbox::start(command, Stdio::null(), out(), out())?;
    let stdout = collect(sandbox.door.stdout.take());
    let stderr = collect(sandbox.door.stderr.take());
    let status = sandbox.wait(limit);
    sandbox.remove();
    let join = |thread: thread::JoinHandle<Vec<u8>>| thread.join().unwrap_or_default();
    let status = status?;
    let output = Output { status: status.unwrap_or_default(), stdout: join(stdout), stderr: join(stderr) };
    Ok((status, output))
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // If reading fails, show what was read before.
            drop(pipe.read_to_end(&mut bytes));
        }
        bytes
    })
}

/// From now on, a signal to this process ends every sandbox, removes what belongs to it and then ends the
/// process. Must be called while the process has one thread.
pub fn kill_on_signals() -> Result<()> {
    forward_signals(OnSignal::KillAll)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum OnSignal {
    Forward,
    KillAll,
}

fn forward_signals(reaction: OnSignal) -> Result<()> {
    let signals: SigSet = SIGNALS.into_iter().collect();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        loop {
            let Ok((signal, from_terminal)) = next_signal(&signals) else { continue };
            let mut open = open();
            match reaction {
                // A terminal signals every process of its foreground group, including the one inside.
                OnSignal::Forward if from_terminal => {}
                OnSignal::Forward => open.iter().flatten().for_each(|&door| send(door, signal)),
                OnSignal::KillAll => {
                    for door in open.take().unwrap_or_default() {
                        send(door, Signal::SIGKILL);
                    }
                    sweep(true);
                    process::exit(128 + signal as i32);
                }
            }
        }
    })?;
    Ok(())
}

/// Waits for one of `signals`, which must be blocked. The flag is true if a terminal sent it.
fn next_signal(signals: &SigSet) -> Result<(Signal, bool)> {
    // SAFETY: an all-zero siginfo_t is a valid value of the C structure.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    let number = unsafe { libc::sigwaitinfo(signals.as_ref(), &raw mut info) };
    Ok((Signal::try_from(Errno::result(number)?)?, info.si_code == libc::SI_KERNEL))
}

/// Signals a process that may already have ended.
fn send(process: Pid, signal: Signal) {
    kill(process, signal).ok();
}

impl Sandbox {
    fn start(command: &Command, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Result<Sandbox> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep(false);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroup = cgroup2_mount()?.join(format!("{PREFIX}{}.{number}", process::id()));
        let folder = temporary_folder()?;
        fs::create_dir(&cgroup).with_context(|| format!("make {} (needs root)", cgroup.display()))?;

        let mut door = Command::new(env::current_exe().context("find the current program")?);
        door.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => door.env(name, value),
                None => door.env_remove(name),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            door.current_dir(folder);
        }
        door.env(DOOR, &cgroup).env(INSIDE, folder.path()).stdin(stdin).stdout(stdout).stderr(stderr);
        // SAFETY: prctl is a plain system call.
        unsafe {
            door.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
        }

        let mut open = open();
        let started = match open.as_mut() {
            None => Err(anyhow::anyhow!("stopped by a signal")),
            Some(open) => door.spawn().context("start the sandbox").inspect(|door| open.push(pid_of(door))),
        };
        drop(open);
        match started {
            Ok(door) => Ok(Sandbox { door, cgroup, folder }),
            Err(error) => {
                remove_cgroup(&cgroup);
                Err(error)
            }
        }
    }

    /// Waits for the end; kills the process and returns `None` if that takes longer than `limit`.
    fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.door.try_wait()? {
                return Ok(Some(status));
            }
            if start.elapsed() > limit {
                self.door.kill()?;
                self.door.wait()?;
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes what a sandbox that has ended left outside.
    fn remove(self) {
        if let Some(open) = open().as_mut() {
            open.retain(|&door| door != pid_of(&self.door));
        }
        remove_cgroup(&self.cgroup);
        if let Err(error) = self.folder.close() {
            eprintln!("sandbox: remove the shared folder: {error}");
        }
    }
}

/// Creates a temporary folder that is removed at the latest with this process, or by the next one that uses
/// this module.
pub fn temporary_folder() -> Result<tempfile::TempDir> {
    let prefix = format!("{PREFIX}{}.", process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir().context("make a temporary folder")
}

/// Returns the mount point of cgroup2; on hybrid hosts that is not `/sys/fs/cgroup`.
pub fn cgroup2_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .map(|fields| PathBuf::from(fields[1]))
        .context("cgroup2 is not mounted")
}

/// Removes a cgroup and its children; their processes are dying.
fn remove_cgroup(cgroup: &Path) {
    let start = Instant::now();
    while let Err(error) = remove_tree(cgroup) {
        if start.elapsed() > Duration::from_secs(5) {
            eprintln!("sandbox: remove {}: {error}", cgroup.display());
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn remove_tree(cgroup: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

/// Removes what processes left that were killed before they could clean up; if `ending`, also what this
/// process owns.
fn sweep(ending: bool) {
    let owner = |name: &std::ffi::OsStr| name.to_str()?.strip_prefix(PREFIX)?.split('.').next()?.parse().ok();
    let list = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let gone = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
    for entry in cgroup2_mount().into_iter().flat_map(|mount| list(&mount)) {
        let Some(pid) = owner(&entry.file_name()) else { continue };
        if ending && pid == process::id() {
            remove_cgroup(&entry.path());
        } else if gone(pid) {
            // Fails if it is still in use, which is right.
            drop(remove_tree(&entry.path()));
        }
    }
    for entry in list(&env::temp_dir()) {
        if owner(&entry.file_name()).is_some_and(|pid| gone(pid) || (ending && pid == process::id())) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

fn pid_of(child: &process::Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Runs the door: unshares, starts init, and waits.
fn door(cgroup: &Path) -> Result<i32> {
    let signals: SigSet = SIGNALS.into_iter().chain([Signal::SIGCHLD]).collect();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)?;
    unshare(
        CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWUTS,
    )
    .context("make namespaces (needs root)")?;
    // SAFETY: this process has a single thread: the hook runs before anything could start another.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => tend(child, &signals),
        ForkResult::Child => {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            init(cgroup, &signals)
        }
    }
}

/// Forwards signals to `child` and reaps every process that dies, until `child` does; returns its exit
/// status.
fn tend(child: Pid, signals: &SigSet) -> Result<i32> {
    loop {
        let (signal, from_terminal) = next_signal(signals)?;
        if signal != Signal::SIGCHLD {
            if !from_terminal {
                send(child, signal);
            }
            continue;
        }
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(code),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => return Ok(128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => bail!("wait: {error}"),
            }
        }
    }
}

/// Runs PID 1 inside the sandbox.
fn init(cgroup: &Path, signals: &SigSet) -> Result<i32> {
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("enter {}", cgroup.display()))?;
    unshare(CloneFlags::CLONE_NEWCGROUP).context("make a cgroup namespace")?;
    private_mounts()?;
    fs::write("/proc/sys/kernel/hostname", "lbridge-lab")?;
    loopback_up()?;

    let mut arguments = env::args_os().skip(1);
    let program: OsString = arguments.next().context("no command for the sandbox")?;
    let mut command = Command::new(&program);
    command.args(arguments).env_remove(DOOR);
    let signals_of_child = *signals;
    // SAFETY: sigprocmask is async-signal-safe and the set lives in the closure.
    unsafe {
        command.pre_exec(move || {
            pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&signals_of_child), None)?;
            Ok(())
        });
    }
    let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
    tend(pid_of(&child), signals)
}

fn private_mounts() -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    let fresh = |kind: &str, target: &str| {
        mount(Some(kind), target, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("mount {kind} on {target}"))
    };
    fresh("proc", "/proc")?;
    umount2("/sys", MntFlags::MNT_DETACH).context("detach the host's /sys")?;
    fresh("sysfs", "/sys")?;
    fresh("cgroup2", CGROUP_ROOT)?;
    fresh("bpf", BPFFS)?;
    fresh("tmpfs", "/run")?;
    fs::create_dir("/run/lock")?;
    // The root of a cgroup tree that delegates controllers must not have processes.
    let init = Path::new(CGROUP_ROOT).join("init");
    fs::create_dir(&init)?;
    fs::write(init.join("cgroup.procs"), "0")?;
    Ok(())
}

fn loopback_up() -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is a valid value of the C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING)?;
    // SAFETY: the request outlives the call, and SIOCSIFFLAGS takes an ifreq.
    let result =
        unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS, &request) };
    Errno::result(result).context("set the loopback up")?;
    Ok(())
}

/// Makes a folder of the machine writable inside the sandbox; nothing is written outside.
pub fn shadow(folder: &str) -> Result<()> {
    let layers = Path::new("/run/shadow").join(folder.trim_start_matches('/'));
    let (upper, work) = (layers.join("upper"), layers.join("work"));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let options = format!("lowerdir={folder},upperdir={},workdir={}", upper.display(), work.display());
    mount(Some("overlay"), folder, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("shadow {folder}"))
}

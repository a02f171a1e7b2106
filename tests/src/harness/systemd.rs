//! systemd: Debian's real systemd as PID 1 of a host of its own, inside a [`sandbox`]: with its own pid,
//! mount, network, uts, ipc and cgroup namespaces, over a copy-on-write view of the machine's root file
//! system.
//!
//! ```text
//! the test, in a sandbox
//!  └ systemd   PID 1 of its namespaces: the current program, started again, mounts and becomes it
//!     └ services
//! ```
//!
//! The root of its cgroups is the sandbox's, so that what the test runs in this host's network namespace
//! counts as the host's. Its processes are not visible from inside, though: code that wants to take their
//! sockets cannot. Only one systemd can run at a time. Dropping the handle kills PID 1, and with it
//! everything inside; the sandbox removes the rest.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::{env, thread};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::unistd::{chdir, pivot_root, setsid};
use tempfile::TempDir;

use super::daemon::{self, Output};
use super::logs::Log;
use super::netns::NetNs;
use super::suite::Need;
use super::{patience, sandbox};

/// Path of systemd's program on Debian.
const SYSTEMD: &str = "/lib/systemd/systemd";
/// Path at which units find the built `lbridge`.
pub const LBRIDGE: &str = "/usr/local/bin/lbridge";
/// The requirements of this module, in addition to those of every suite.
pub const NEEDS: [Need; 3] = [Need::Program("nsenter"), Need::Program("systemctl"), Need::Program(SYSTEMD)];
/// Environment variable of the process that becomes systemd: the folder for its root.
const BECOME: &str = "LBRIDGE_SYSTEMD_FOLDER";
/// Environment variable, set if the root is not the machine's with the built `lbridge` in it: the lower layer
/// of the root.
const LOWER: &str = "LBRIDGE_SYSTEMD_LOWER";

/// A booted systemd. Everything inside ends when this is dropped.
#[derive(Debug)]
pub struct Systemd {
    init: Child,
    journal: Option<Child>,
    netns: NetNs,
    log: Log,
    folder: TempDir,
}

/// Turns the process that should become systemd into it, and never returns there. Call it early in `main`,
/// after [`sandbox::hook`].
pub fn hook() {
    let Some(folder) = env::var_os(BECOME) else { return };
    let error = match become_systemd(Path::new(&folder)) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    eprintln!("systemd: {error:#}");
    process::exit(125);
}

impl Systemd {
    /// Starts systemd; returns when it is up. The units of the machine's administrator are absent.
    pub fn boot() -> Result<Systemd> {
        Systemd::boot_over(None)
    }

    /// Like [`Systemd::boot`], over another root file system, or over the machine's (`/`) without the built
    /// `lbridge` in it.
    pub fn boot_root(lower: &Path) -> Result<Systemd> {
        Systemd::boot_over(Some(lower))
    }

    fn boot_over(lower: Option<&Path>) -> Result<Systemd> {
        ensure!(sandbox::is_inside(), "systemd needs a sandbox around it");
        let folder = tempfile::Builder::new().prefix("systemd.").tempdir_in("/run")?;
        let log = Log::new("systemd");
        let mut command = Command::new(env::current_exe().context("find the current program")?);
        command.env(BECOME, folder.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(lower) = lower {
            command.env(LOWER, lower);
        }
        // The next child of a thread that has unshared its pid namespace is PID 1 of the new one.
        let spawned = thread::scope(|scope| {
            let spawn = || {
                unshare(CloneFlags::CLONE_NEWPID).context("make a pid namespace (needs root)")?;
                command.spawn().context("start systemd")
            };
            scope.spawn(spawn).join()
        });
        let mut init = spawned.map_err(|_| anyhow!("the thread that starts systemd panicked"))??;
        init.stdout.take().into_iter().for_each(|pipe| log.follow(pipe));
        init.stderr.take().into_iter().for_each(|pipe| log.follow(pipe));
        // From here on it is killed if anything fails.
        let mut systemd = Systemd { init, journal: None, netns: NetNs::current()?, log, folder };
        systemd.wait_until_up()?;
        systemd.netns = NetNs::of_process(systemd.init.id())?;
        systemd.netns.ip("link set lo up")?;
        systemd.follow_journal()?;
        Ok(systemd)
    }

    fn wait_until_up(&mut self) -> Result<()> {
        patience::until("systemd is up", || {
            if let Some(status) = self.init.try_wait()? {
                bail!("systemd ended: {status}: {}", self.log.text());
            }
            let state = self.systemctl(&["is-system-running"])?.stdout;
            // Degraded: something of the machine's failed to start, which does not concern the test.
            Ok(matches!(state.trim(), "running" | "degraded").then_some(()))
        })
    }

    /// Copies the journal to the log of the test, which is printed if the test fails.
    fn follow_journal(&mut self) -> Result<()> {
        let mut command = self.command("journalctl");
        command.args(["--follow", "--no-tail", "--quiet", "--output=short-monotonic", "--no-hostname"]);
        let mut journal = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let log = Log::new("journal");
        journal.stdout.take().into_iter().for_each(|pipe| log.follow(pipe));
        self.journal = Some(journal);
        Ok(())
    }

    /// Returns the host's network namespace.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// Returns a path by which this process can open a path inside.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        Path::new("/proc")
            .join(self.init.id().to_string())
            .join("root")
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// Returns the network namespace of a process, given its pid inside.
    pub fn netns_of(&self, pid: &str) -> Result<NetNs> {
        NetNs::at(&self.path(format!("/proc/{pid}/ns/net")))
    }

    /// Returns the outer pid of a process, given its pid inside.
    pub fn seen_from_outside(&self, inside: u32) -> Result<i32> {
        let pid_namespace = |path: PathBuf| fs::read_link(path.join("ns/pid")).ok();
        let of_systemd = pid_namespace(format!("/proc/{}", self.init.id()).into());
        let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path());
        let found = processes.filter(|path| pid_namespace(path.clone()) == of_systemd).find(|path| {
            let status = fs::read_to_string(path.join("status")).unwrap_or_default();
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            numbers.and_then(|numbers| numbers.split_whitespace().last()) == Some(&inside.to_string())
        });
        let number = found.as_ref().and_then(|path| path.file_name()?.to_str()?.parse().ok());
        number.with_context(|| format!("no process is {inside} inside"))
    }

    /// Creates a command that will run inside, in every namespace, with an empty standard input.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        // Not in its cgroup: what the test starts must not count as systemd's.
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd=/"]);
        command.args(["--target", &self.init.id().to_string(), "--"]).arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a command inside to completion.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let output = self.command(program).args(arguments).output();
        Ok(output.with_context(|| format!("run {program} beside systemd"))?.into())
    }

    /// Runs a shell command inside, which must succeed; returns its output.
    pub fn shell(&self, command: &str) -> Result<String> {
        let output = self.run("sh", &["-c", command])?;
        ensure!(output.status == 0, "{command}: {output:?}");
        Ok(output.stdout)
    }

    /// Lists files and folders below `inside` that are new or have changed since the boot.
    pub fn written(&self, inside: &str) -> Result<BTreeSet<PathBuf>> {
        fn list(upper: &Path, folder: &Path, into: &mut BTreeSet<PathBuf>) -> Result<()> {
            for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
                let entry = entry?;
                into.insert(Path::new("/").join(entry.path().strip_prefix(upper)?));
                if entry.file_type()?.is_dir() {
                    list(upper, &entry.path(), into)?;
                }
            }
            Ok(())
        }
        let upper = self.folder.path().join("upper");
        let folder = upper.join(inside.trim_start_matches('/'));
        let mut written = BTreeSet::new();
        if folder.is_dir() {
            list(&upper, &folder, &mut written)?;
        }
        Ok(written)
    }

    /// Writes a unit and makes it known to systemd. Replaces an existing one.
    pub fn install_unit(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.path("/etc/systemd/system").join(name), text)
            .with_context(|| format!("write {name}"))?;
        self.must(&["daemon-reload"]).map(drop)
    }

    /// Runs `systemctl` inside and returns its output.
    pub fn systemctl(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.run("systemctl", arguments)?;
        self.log.note(&format!("[harness] systemctl {} -> {output:?}", arguments.join(" ")));
        Ok(output)
    }

    /// Runs `systemctl …`, which must succeed.
    pub fn must(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.systemctl(arguments)?;
        ensure!(output.status == 0, "systemctl {arguments:?}: {output:?}");
        Ok(output)
    }

    /// Returns a property of a unit, as `systemctl show` prints it.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let output = self.run("systemctl", &["show", "--value", "--property", name, unit])?;
        ensure!(output.status == 0, "systemctl show {unit}: {output:?}");
        Ok(output.stdout.trim_end().to_owned())
    }

    /// Waits until a property of a unit has this value.
    pub fn wait_for_property(&self, unit: &str, name: &str, value: &str) -> Result<()> {
        let mut last = String::new();
        patience::until(&format!("{unit}: {name}={value}"), || {
            last = self.property(unit, name)?;
            Ok((last == value).then_some(()))
        })
        .with_context(|| format!("last: {last:?}"))
    }

    /// Returns what a unit has logged so far.
    pub fn journal(&self, unit: &str) -> Result<String> {
        // What systemd has read from the unit's pipe may not have been written yet.
        self.run("journalctl", &["--sync"])?;
        let output = self.run("journalctl", &["--quiet", "--output=cat", "--unit", unit])?;
        ensure!(output.status == 0, "journalctl: {output:?}");
        Ok(output.stdout)
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // When PID 1 ends, the kernel kills every process of its namespace before the wait returns.
        for process in [Some(&mut self.init), self.journal.as_mut()].into_iter().flatten() {
            drop(process.kill());
            drop(process.wait());
        }
    }
}

/// Prepares PID 1 and executes systemd in it.
fn become_systemd(folder: &Path) -> Result<std::convert::Infallible> {
    // In the root cgroup, where a container's first process is; systemd makes a group of its own and moves
    // there.
    fs::write(Path::new(sandbox::CGROUP_ROOT).join("cgroup.procs"), "0").context("enter the root cgroup")?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )
    .context("make namespaces")?;
    let root = folder.join("root");
    let lower = env::var_os(LOWER).map(PathBuf::from);
    overlay(lower.as_deref().unwrap_or(Path::new("/")), folder, &root)?;
    kernel_file_systems(&root)?;
    devices(&root)?;
    bare(&root)?;
    let lbridge = root.join(LBRIDGE.trim_start_matches('/'));
    if lower.is_none() {
        File::create(&lbridge)?;
        bind(&daemon::binary()?, &lbridge)?;
    }

    chdir(&root)?;
    pivot_root(".", ".").context("change the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("detach the old root")?;
    chdir("/")?;
    // Like container managers: services with mounts of their own must see what is mounted later (`ip netns
    // add`).
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none)
        .context("share mounts with services")?;
    // It must not receive a terminal's signals, and blocked signals would stay blocked for every service.
    setsid().context("start a session")?;
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    give_up_capabilities()?;
    let mut command = Command::new(SYSTEMD);
    command.args(["--system", "--unit=basic.target", "--show-status=no"]).env_clear();
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    // Like container managers: systemd then leaves the clock, the console and so on alone.
    command.env("container", "lbridge-tests").env("TERM", "dumb");
    Err(std::os::unix::process::CommandExt::exec(&mut command)).context("become systemd")
}

fn mount_new(kind: &str, at: &Path, flags: MsFlags, options: &str) -> Result<()> {
    fs::create_dir_all(at)?;
    mount(Some(kind), at, Some(kind), flags, Some(options))
        .with_context(|| format!("mount {kind} on {}", at.display()))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("bind {} to {}", from.display(), to.display()))
}

fn read_only(at: &Path) -> Result<()> {
    let none: Option<&str> = None;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, at, none, flags, none).with_context(|| format!("make {} read-only", at.display()))
}

/// Mounts a root file system; writes go to `folder`, a tmpfs.
fn overlay(lower: &Path, folder: &Path, root: &Path) -> Result<()> {
    let (upper, work) = (folder.join("upper"), folder.join("work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let (lower, upper, work) = (lower.display(), upper.display(), work.display());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    mount_new("overlay", root, MsFlags::empty(), &options)
}

/// Mounts the kernel's file systems. Only those that belong to the namespaces are writable.
fn kernel_file_systems(root: &Path) -> Result<()> {
    let at = |path: &str| root.join(path);
    mount_new("proc", &at("proc"), MsFlags::empty(), "")?;
    bind(&at("proc/sys"), &at("proc/sys"))?;
    bind(&at("proc/sys/net"), &at("proc/sys/net"))?;
    read_only(&at("proc/sys"))?;
    // If the kernel has it.
    if at("proc/sysrq-trigger").exists() {
        bind(&at("proc/sysrq-trigger"), &at("proc/sysrq-trigger"))?;
        read_only(&at("proc/sysrq-trigger"))?;
    }
    fs::write("/proc/sys/kernel/hostname", "lbridge-systemd")?;
    mount_new("sysfs", &at("sys"), MsFlags::empty(), "")?;
    read_only(&at("sys"))?;
    let mount_there = |kind: &str, path: &str| {
        let none: Option<&str> = None;
        mount(Some(kind), &at(path), Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("mount {kind} on {path}"))
    };
    mount_there("cgroup2", "sys/fs/cgroup")?;
    mount_there("bpf", "sys/fs/bpf")?;
    mount_new("tmpfs", &at("run"), MsFlags::empty(), "mode=755")?;
    mount_new("tmpfs", &at("tmp"), MsFlags::empty(), "mode=1777")
}

fn devices(root: &Path) -> Result<()> {
    let dev = root.join("dev");
    mount_new("tmpfs", &dev, MsFlags::empty(), "mode=755")?;
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        File::create(dev.join(name))?;
        bind(&Path::new("/dev").join(name), &dev.join(name))?;
    }
    mount_new("devpts", &dev.join("pts"), MsFlags::empty(), "newinstance,ptmxmode=666,mode=620")?;
    mount_new("tmpfs", &dev.join("shm"), MsFlags::empty(), "mode=1777")?;
    let links = [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ];
    for (name, target) in links {
        symlink(target, dev.join(name))?;
    }
    Ok(())
}

/// Removes what the machine's administrator has set up: units, mounts, an installed lbridge's files.
fn bare(root: &Path) -> Result<()> {
    let absent = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    let etc = root.join("etc");
    for folder in [etc.join("systemd/system"), etc.join("lbridge"), root.join("var/lib/lbridge")] {
        absent(fs::remove_dir_all(&folder))?;
    }
    for file in ["fstab", "crypttab"] {
        absent(fs::remove_file(etc.join(file)))?;
    }
    // On machines that are images in the making, this file forbids packages to start services.
    absent(fs::remove_file(root.join("usr/sbin/policy-rc.d")))?;
    absent(fs::remove_file(root.join(LBRIDGE.trim_start_matches('/'))))?;
    fs::create_dir_all(etc.join("systemd/system"))?;
    // Without a machine id this would be a first boot, which enables units.
    absent(fs::remove_file(etc.join("machine-id")))?;
    fs::write(etc.join("machine-id"), "1bd1dce0000000000000000000000001\n")?;
    Ok(())
}

/// Drops capabilities over the machine as a whole that no service here needs.
fn give_up_capabilities() -> Result<()> {
    // CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_TIME, CAP_AUDIT_CONTROL, CAP_SYSLOG
    // (include/uapi/linux/capability.h).
    for capability in [16, 17, 25, 30, 34] {
        // SAFETY: prctl is a plain system call.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        nix::errno::Errno::result(result).with_context(|| format!("give up capability {capability}"))?;
    }
    Ok(())
}

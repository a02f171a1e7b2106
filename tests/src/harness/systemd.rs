//! Debian's real systemd as PID 1 of a host of its own, inside a [`sandbox`]: its own pid, mount, network, uts, ipc and
//! cgroup namespaces, over a copy-on-write view of the machine's root file system.
//!
//! ```text
//! the test, in a sandbox
//!  └ systemd   PID 1 of its namespaces: the current program, started again, mounts and becomes it
//!     └ services
//! ```
//!
//! The root of its cgroups is the sandbox', so that what the test runs in this host's network namespace is noticed as the
//! host's. Its processes are not seen from inside, though: who wants to take sockets from them cannot. One at a time.
//! With the handle goes PID 1, and with that everything inside; the sandbox removes the rest.

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

/// Where Debian has it.
const SYSTEMD: &str = "/lib/systemd/systemd";
/// Where units find the built `lbridge`.
pub const LBRIDGE: &str = "/usr/local/bin/lbridge";
/// What this module needs of a machine.
pub const NEEDS: [Need; 7] = [
    Need::Root,
    Need::Cgroup2,
    Need::Lbridge,
    Need::Program("ip"),
    Need::Program("nsenter"),
    Need::Program("systemctl"),
    Need::Program(SYSTEMD),
];
/// Set for the process that becomes systemd: the folder for its root.
const BECOME: &str = "LBRIDGE_SYSTEMD_FOLDER";
/// Set as well where it is not to be the machine's root, with the built `lbridge` in it: what lies below.
const LOWER: &str = "LBRIDGE_SYSTEMD_LOWER";

/// A booted systemd.
#[derive(Debug)]
pub struct Systemd {
    init: Child,
    journal: Option<Child>,
    netns: NetNs,
    log: Log,
    folder: TempDir,
}

/// To be called early in `main`, after [`sandbox::hook`]: in the process that becomes systemd it never returns.
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
    /// Starts systemd, and returns when it is up. No unit of the machine's administrator is there.
    pub fn boot() -> Result<Systemd> {
        Systemd::boot_over(None)
    }

    /// As [`Systemd::boot`], over another root file system, or over the machine's (`/`) without the built `lbridge` in it.
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
        // From here on it is ended if anything fails.
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
            // Degraded: something of the machine's failed to start, which is no business of the test.
            Ok(matches!(state.trim(), "running" | "degraded").then_some(()))
        })
    }

    /// For the log of a test that fails.
    fn follow_journal(&mut self) -> Result<()> {
        let mut command = self.command("journalctl");
        command.args(["--follow", "--no-tail", "--quiet", "--output=short-monotonic", "--no-hostname"]);
        let mut journal = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let log = Log::new("journal");
        journal.stdout.take().into_iter().for_each(|pipe| log.follow(pipe));
        self.journal = Some(journal);
        Ok(())
    }

    /// Its network namespace.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// A path inside, as this process can open it.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        Path::new("/proc")
            .join(self.init.id().to_string())
            .join("root")
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// The network namespace of a process, by its number inside.
    pub fn netns_of(&self, pid: &str) -> Result<NetNs> {
        NetNs::at(&self.path(format!("/proc/{pid}/ns/net")))
    }

    /// The number, here, of a process that has this one inside.
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

    /// A command that will run inside, in every namespace, with nothing on its standard input.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        // Not into its cgroup: what the test starts is none of systemd's.
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd=/"]);
        command.args(["--target", &self.init.id().to_string(), "--"]).arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a command inside, to its end.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let output = self.command(program).args(arguments).output();
        Ok(output.with_context(|| format!("run {program} beside systemd"))?.into())
    }

    /// Runs a shell command inside, which must succeed; what it printed.
    pub fn shell(&self, command: &str) -> Result<String> {
        let output = self.run("sh", &["-c", command])?;
        ensure!(output.status == 0, "{command}: {output:?}");
        Ok(output.stdout)
    }

    /// Files and folders below `inside` that are not as they were before it was booted, or new.
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

    /// Writes a unit and has it known. One that is there already is replaced.
    pub fn install_unit(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.path("/etc/systemd/system").join(name), text)
            .with_context(|| format!("write {name}"))?;
        self.must(&["daemon-reload"]).map(drop)
    }

    /// `systemctl …`.
    pub fn systemctl(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.run("systemctl", arguments)?;
        self.log.note(&format!("[harness] systemctl {} -> {output:?}", arguments.join(" ")));
        Ok(output)
    }

    /// `systemctl …`, which must succeed.
    pub fn must(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.systemctl(arguments)?;
        ensure!(output.status == 0, "systemctl {arguments:?}: {output:?}");
        Ok(output)
    }

    /// A property of a unit, as `systemctl show` tells it.
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

    /// What a unit said so far.
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
        // With PID 1 the kernel ends every process of its namespace, before the wait is over.
        for process in [Some(&mut self.init), self.journal.as_mut()].into_iter().flatten() {
            drop(process.kill());
            drop(process.wait());
        }
    }
}

/// PID 1 before it is systemd.
fn become_systemd(folder: &Path) -> Result<std::convert::Infallible> {
    // In the root, where a container's first process is; systemd makes a group of its own and goes there.
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
    // As container managers do: what is mounted later (`ip netns add`) is to be seen by services with mounts of their own.
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none)
        .context("share mounts with services")?;
    // A terminal's signals are not for it, and what is blocked would stay blocked for every service.
    setsid().context("start a session")?;
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    give_up_capabilities()?;
    let mut command = Command::new(SYSTEMD);
    command.args(["--system", "--unit=basic.target", "--show-status=no"]).env_clear();
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    // As container managers do: it leaves the clock, the console and the like alone.
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

/// A root file system; what is written goes to `folder`, a tmpfs.
fn overlay(lower: &Path, folder: &Path, root: &Path) -> Result<()> {
    let (upper, work) = (folder.join("upper"), folder.join("work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let (lower, upper, work) = (lower.display(), upper.display(), work.display());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    mount_new("overlay", root, MsFlags::empty(), &options)
}

/// Writable are only those that belong to the namespaces.
fn kernel_file_systems(root: &Path) -> Result<()> {
    let at = |path: &str| root.join(path);
    mount_new("proc", &at("proc"), MsFlags::empty(), "")?;
    bind(&at("proc/sys"), &at("proc/sys"))?;
    bind(&at("proc/sys/net"), &at("proc/sys/net"))?;
    read_only(&at("proc/sys"))?;
    // Where the kernel has it.
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

/// Takes away what the machine's administrator has set up: units, mounts, an installed lbridge's files.
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
    // It forbids packages to start services, on machines that are images in the making.
    absent(fs::remove_file(root.join("usr/sbin/policy-rc.d")))?;
    absent(fs::remove_file(root.join(LBRIDGE.trim_start_matches('/'))))?;
    fs::create_dir_all(etc.join("systemd/system"))?;
    // Without one it would be a first boot, which enables units.
    absent(fs::remove_file(etc.join("machine-id")))?;
    fs::write(etc.join("machine-id"), "1bd1dce0000000000000000000000001\n")?;
    Ok(())
}

/// Capabilities over the machine as a whole that no service here has a use for.
fn give_up_capabilities() -> Result<()> {
    // CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_TIME, CAP_AUDIT_CONTROL, CAP_SYSLOG (include/uapi/linux/capability.h).
    for capability in [16, 17, 25, 30, 34] {
        // SAFETY: prctl is a plain system call.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        nix::errno::Errno::result(result).with_context(|| format!("give up capability {capability}"))?;
    }
    Ok(())
}

//! A host, a user who is nobody in particular, and that user's sandboxes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result};
use lbridge_tests::harness::daemon::{Output, binary};
use lbridge_tests::harness::logs::Log;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::find_program;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Nobody in particular.
pub(crate) const USER: u32 = 54_321;

/// A host with a service on 127.0.0.1:8080, and a user with a copy of the program.
pub(crate) struct Scene {
    pub(crate) host: NetNs,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) log: Log,
}

impl Scene {
    pub(crate) fn new() -> Result<Scene> {
        let folder = tempfile::tempdir_in("/run")?;
        // The build's folder may be closed to others.
        fs::copy(binary()?, folder.path().join("lbridge"))?;
        let busybox = find_program("busybox").context("no busybox")?;
        fs::create_dir(folder.path().join("bin"))?;
        for applet in ["nc", "timeout"] {
            symlink(&busybox, folder.path().join("bin").join(applet))?;
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777))?;
        Ok(Scene { host: NetNs::new()?, folder, log: Log::new("lbridge relay") })
    }

    pub(crate) fn service(&self, name: &str, address: &str) -> Result<Service> {
        Service::start(&self.host, name, address)
    }

    /// A command of the user, on the host.
    pub(crate) fn user(&self, program: impl AsRef<Path>) -> Command {
        self.somebody(program, USER)
    }

    pub(crate) fn somebody(&self, program: impl AsRef<Path>, user: u32) -> Command {
        let mut command = self.host.command("setpriv");
        command.args(["--reuid", &user.to_string(), "--regid", &user.to_string(), "--clear-groups", "--"]);
        let path = format!("{}:{}", self.folder.path().join("bin").display(), env_path());
        command.arg(program.as_ref()).stdin(Stdio::null()).current_dir("/").env("PATH", path);
        command.env_remove("LBRIDGE_LOG");
        command
    }

    /// `lbridge relay …` of the user.
    pub(crate) fn relay(&self, arguments: &[&str]) -> Command {
        let mut command = self.user(self.folder.path().join("lbridge"));
        command.arg("relay").args(arguments);
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Result<Output> {
        let child = self.relay(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        self.finish(child)
    }

    /// Waits for the process and returns its output; kills it if that takes too long.
    pub(crate) fn finish(&self, child: Child) -> Result<Output> {
        let pid = Pid::from_raw(child.id().cast_signed());
        let collector = thread::spawn(move || child.wait_with_output());
        let waited = patience::until("lbridge relay ends", || Ok(collector.is_finished().then_some(())));
        if waited.is_err() {
            kill(pid, Signal::SIGKILL)?;
        }
        let output = Output::from(collector.join().map_err(|_| anyhow::anyhow!("collector"))??);
        self.log.note(&format!("{output:?}"));
        waited.map(|()| output)
    }

    /// A relay in the background, killed when it is dropped.
    pub(crate) fn start(&self, arguments: &[&str]) -> Result<Background> {
        let mut child = self.relay(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdout.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        child.stderr.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        Ok(Background(child))
    }

    /// A sandbox of the user that does nothing; the process is the one that the user has started.
    pub(crate) fn sandbox(&self, user: u32) -> Result<(Background, NetNs)> {
        let mut command = self.somebody("bwrap", user);
        let child = command.args(BWRAP).args(["sleep", "1000000"]).spawn().context("start bwrap")?;
        let outer = Background(child);
        let netns = patience::until("the sandbox is up", || {
            let inner = children_of(outer.0.id())?.into_iter().next();
            let up = inner.filter(|pid| {
                command_of(*pid).is_ok_and(|name| name.trim() == "sleep" || name.trim() == "bwrap")
            });
            let Some(pid) = up else { return Ok(None) };
            let netns = NetNs::of_process(pid)?;
            Ok((!is_same(&netns, &self.host)? && netns.ip_output("addr show lo")?.contains("127.0.0.1"))
                .then_some(netns))
        })?;
        Ok((outer, netns))
    }
}

pub(crate) const BWRAP: [&str; 9] =
    ["--unshare-net", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--die-with-parent"];

fn env_path() -> String {
    std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned())
}

pub(crate) fn children_of(pid: u32) -> Result<Vec<u32>> {
    let mut children = vec![];
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        if parent == Some(pid) {
            children.push(child);
        }
    }
    Ok(children)
}

fn command_of(pid: u32) -> Result<String> {
    Ok(fs::read_to_string(format!("/proc/{pid}/comm"))?)
}

pub(crate) fn is_same(one: &NetNs, other: &NetNs) -> Result<bool> {
    let inode = |netns: &NetNs| nix::sys::stat::fstat(netns).map(|stat| stat.st_ino);
    Ok(inode(one)? == inode(other)?)
}

pub(crate) struct Background(pub(crate) Child);

impl Background {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }

    /// The exit status, once it has ended by itself.
    pub(crate) fn wait(&mut self) -> Result<i32> {
        let status = patience::until("it ends", || Ok(self.0.try_wait()?))?;
        Ok(status.code().unwrap_or(-1))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

//! Server programs in the host's namespace, and client programs in the container's.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::logs::Log;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// A server that runs until this goes.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
}

impl Server {
    /// Starts it and waits until it listens.
    pub(crate) fn start(name: &str, mut command: Command, host: &NetNs, on: SocketAddr) -> Result<Server> {
        let log = Log::new(name);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // In a group of its own, so that what it starts ends with it.
        let mut child = command.process_group(0).spawn().with_context(|| format!("start {name}"))?;
        child.stdout.take().into_iter().for_each(|pipe| log.follow(pipe));
        child.stderr.take().into_iter().for_each(|pipe| log.follow(pipe));
        let mut server = Server { child };
        patience::until(&format!("{name} listens on {on}"), || {
            if let Some(status) = server.child.try_wait()? {
                bail!("{name} ended: {status}");
            }
            Ok(host.listens(on)?.then_some(()))
        })?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let group = Pid::from_raw(-self.child.id().cast_signed());
        kill(group, Signal::SIGKILL).ok();
        drop(self.child.wait());
    }
}

/// A folder that goes with the sandbox, owned by `nobody`: some servers do not run as root.
pub(crate) fn folder() -> Result<TempDir> {
    const NOBODY: u32 = 65534;
    let folder = tempfile::Builder::new().prefix("server.").tempdir_in("/run")?;
    std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
    Ok(folder)
}

/// A program as `nobody` in the host's namespace. With System V memory of its own, which would outlive a
/// program that is killed.
pub(crate) fn as_nobody(host: &NetNs, program: impl AsRef<Path>) -> Command {
    let mut command = host.command("unshare");
    command.args(["--ipc", "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"]);
    command.arg(program.as_ref()).current_dir("/");
    command
}

/// Runs a command to its end; its output, whatever its status.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))
}

/// Runs a command, which must succeed; what it printed.
pub(crate) fn printed(command: &mut Command) -> Result<Vec<u8>> {
    let output = output(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {said}", output.status);
    Ok(output.stdout)
}

/// As [`printed`], as text without the last newline.
pub(crate) fn line(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8(printed(command)?)?.trim_end().to_owned())
}

/// The bytes of a command's standard input.
pub(crate) fn file_of(folder: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = folder.join(name);
    std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

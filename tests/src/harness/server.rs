//! server: server programs in the host's namespace, and client programs that run to their end.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use super::logs::Log;
use super::netns::NetNs;
use super::patience;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// A server program that runs until this is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
}

impl Server {
    /// Starts the program in a process group of its own and waits until it listens on that address.
    pub fn start(name: &str, mut command: Command, host: &NetNs, on: SocketAddr) -> Result<Server> {
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

/// Creates a folder that goes with the sandbox, owned by `nobody`: some servers do not run as root.
pub fn folder() -> Result<TempDir> {
    const NOBODY: u32 = 65534;
    let folder = tempfile::Builder::new().prefix("server.").tempdir_in("/run")?;
    std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
    Ok(folder)
}

/// Creates a command that runs a program as `nobody` in the host's namespace. It has System V memory of its
/// own, which would outlive a program that is killed.
pub fn as_nobody(host: &NetNs, program: impl AsRef<Path>) -> Command {
    let mut command = host.command("unshare");
    command.args(["--ipc", "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"]);
    command.arg(program.as_ref()).current_dir("/");
    command
}

/// Runs a command to its end; returns its output, whatever its status.
pub fn output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))
}

/// Runs a command, which must succeed; returns what it printed.
pub fn printed(command: &mut Command) -> Result<Vec<u8>> {
    let output = output(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {said}", output.status);
    Ok(output.stdout)
}

/// Like [`printed`], as text without the last newline.
pub fn line(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8(printed(command)?)?.trim_end().to_owned())
}

/// Writes the bytes of a command's standard input to a file in `folder`; returns its path.
pub fn file_of(folder: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = folder.join(name);
    std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

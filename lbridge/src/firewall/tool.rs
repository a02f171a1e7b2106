//! Tool: runs a program of a firewall, such as `nft`, and says why it could not be run.

use std::{env, ffi::OsString, io, process::Stdio, time::Duration};

use rustix::{
    io::Errno,
    process::{Signal, getpid, getppid, set_parent_process_death_signal},
};
use tokio::io::AsyncWriteExt as _;

/// Limit on the run time of a firewall's tool.
const TOOL_TIMEOUT: Duration = Duration::from_secs(10);

/// Reason why something could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Problem {
    #[error("{0} is not installed")]
    Missing(&'static str),
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

/// Returns the folders to look for the tools in, with some that a shell may lack, as after `su` without `-`.
fn tools_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    path
}

/// Runs a firewall's tool to its end, and returns what it prints.
pub(super) async fn run(program: &'static str, arguments: &[&str]) -> Result<String, Problem> {
    run_with(program, arguments, "").await
}

/// Runs a tool like [`run`], with `input` as its standard input.
pub(super) async fn run_with(
    program: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<String, Problem> {
    let failed = |why: String| Problem::Failed(anyhow::anyhow!("{program} failed: {why}"));
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).env("LC_ALL", "C").env("PATH", tools_path()).kill_on_drop(true);
    // A tool that outlives a killed daemon would put an accept rule that nobody knows of.
    let daemon = getpid();
    let end_with_it = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() == Some(daemon) { Ok(()) } else { Err(Errno::CANCELED.into()) }
    };
    // SAFETY: prctl() and getppid() are async-signal-safe.
    unsafe { command.pre_exec(end_with_it) };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(input.as_bytes()).await {
                // Its standard error says what it does not like.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                written => written?,
            }
        }
        child.wait_with_output().await
    };
    let output = match tokio::time::timeout(TOOL_TIMEOUT, output).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => return Err(Problem::Missing(program)),
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed("it did not finish in time".to_owned())),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().find(|line| !line.starts_with('#')).unwrap_or_default();
        return Err(failed(first.to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

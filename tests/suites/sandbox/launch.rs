//! Commands that are caught while they make their sandbox: their ports are there when the program begins, and
//! nothing else of lbridge is.

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::binary;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Set where this program is started again, to connect.
pub(crate) const ROLE: &str = "LBRIDGE_SANDBOX_ROLE";
/// The port inside.
const PORT: u16 = 5432;
/// Nobody in particular.
const USER: u32 = 65534;
/// As users run it.
const BWRAP: &str = "bwrap --unshare-net --ro-bind / / --dev /dev --proc /proc";

pub(crate) fn tests() -> Vec<Test> {
    tests![
        ports_are_there_at_once,
        nothing_is_left_traced,
        commands_end_as_without,
        every_signal_is_passed_on,
        a_command_is_killable_while_it_starts,
        a_forbidden_trace_says_so: [Need::Program("strace")],
    ]
}

fn addresses() -> [SocketAddr; 2] {
    [(Ipv4Addr::LOCALHOST, PORT).into(), (Ipv6Addr::LOCALHOST, PORT).into()]
}

/// Runs inside: dials each service, and exits with the number of connections that failed.
pub(crate) fn connect() -> i32 {
    addresses().iter().filter(|address| TcpStream::connect(address).is_err()).map(|_| 1).sum()
}

/// Where a user may run this program, and lbridge.
fn programs() -> Result<[&'static str; 2]> {
    let paths = ["/run/program", "/run/lbridge"];
    for (path, original) in paths.iter().zip([env::current_exe()?, binary()?]) {
        if !fs::exists(path)? {
            fs::copy(original, path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(paths)
}

/// `lbridge relay` by a user. Words are separated by blanks, `CONNECT` is what connects to the port.
fn relayed(words: &str) -> Result<Command> {
    static SERVICE: OnceLock<Service> = OnceLock::new();
    if SERVICE.get().is_none() {
        let address = format!("127.0.0.1:{PORT}");
        drop(SERVICE.set(Service::start(&NetNs::current()?, "host's", &address)?));
    }
    let [program, lbridge] = programs()?;
    let connect = format!("env {ROLE}=connect {program}");
    let mut command = Command::new(lbridge);
    command.args(["relay", &PORT.to_string(), "--"]);
    command.args(words.replace("CONNECT", &connect).split_whitespace());
    command.uid(USER).gid(USER).current_dir("/").env_remove("LBRIDGE_LOG");
    Ok(command)
}

fn shell(before: &str, script: &str) -> Result<Command> {
    let connect = format!("env {ROLE}=connect {}", programs()?[0]);
    let mut command = relayed(before)?;
    command.args(["sh", "-c", &script.replace("CONNECT", &connect)]);
    Ok(command)
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{command:?}: {output:?}");
    Ok(())
}

fn ports_are_there_at_once() -> Result<()> {
    for sandbox in [
        BWRAP,
        "bwrap --unshare-all --ro-bind / / --dev /dev --proc /proc",
        "bwrap --unshare-net --unshare-pid --ro-bind / / --dev /dev --proc /proc",
        "bwrap --unshare-net --unshare-user --uid 0 --ro-bind / / --dev /dev --proc /proc",
        "bwrap --unshare-net --unshare-user --disable-userns --ro-bind / / --dev /dev --proc /proc",
        "bwrap --unshare-net --unshare-pid --as-pid-1 --ro-bind / / --dev /dev --proc /proc",
        "bwrap --ro-bind / / --dev /dev --proc /proc bwrap --unshare-net --ro-bind / / --dev /dev",
        "unshare -rn",
        "unshare -rn --fork --pid --mount-proc",
        "unshare -Urn setpriv --no-new-privs",
    ] {
        for _ in 0..10 {
            succeed(&mut relayed(&format!("{sandbox} CONNECT"))?)?;
        }
        succeed(&mut shell("", &format!("true | {sandbox} CONNECT; exit $?"))?)?;
    }
    Ok(())
}

fn nothing_is_left_traced() -> Result<()> {
    let script =
        "grep -q 'TracerPid:.0' /proc/self/status && ! grep -L 'TracerPid:.0' /proc/[0-9]*/status | grep .";
    for sandbox in [BWRAP, "unshare -rn", "bwrap --unshare-all --ro-bind / / --proc /proc"] {
        succeed(&mut shell(sandbox, script)?)?;
        // Others wait and are being made meanwhile.
        let busy = format!(
            "sleep 60 & first=$!; i=0; while [ $i -lt 100 ]; do (:) & i=$((i+1)); done; (while :; do (:); \
             done) & last=$!; {sandbox} sh -c 'CONNECT'; status=$?; grep -L 'TracerPid:.0' \
             /proc/[0-9]*/status; kill $first $last; exit $status"
        );
        let output = shell("", &busy)?.output()?;
        ensure!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    }
    let list = "ls /proc/self/fd";
    let with = shell(BWRAP, list)?.output()?;
    let mut without = Command::new("bwrap");
    without.args(BWRAP.split_whitespace().skip(1)).args(["sh", "-c", list]).uid(USER).gid(USER);
    let without = without.output()?;
    ensure!(with.stdout == without.stdout && !with.stdout.is_empty(), "{with:?}, {without:?}");
    Ok(())
}

fn commands_end_as_without() -> Result<()> {
    for (words, status) in [
        ("true", 0),
        ("false", 1),
        ("no-such-command", 127),
        ("/etc/passwd", 126),
        ("unshare -rn false", 1),
        ("bwrap --unshare-net --no-such-option", 1),
        ("bwrap --unshare-net --ro-bind / / no-such-command", 1),
    ] {
        let output = relayed(words)?.output()?;
        ensure!(output.status.code() == Some(status), "{words}: {output:?}");
    }
    for (script, status) in [("kill -9 $$", 137), ("exit 7", 7), ("unshare -rn true; exit 8", 8)] {
        let output = shell("", script)?.output()?;
        ensure!(output.status.code() == Some(status), "{script}: {output:?}");
    }
    Ok(())
}

/// Starts a command and waits for the first line that it writes.
fn started(mut command: Command) -> Result<Child> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.as_mut().context("no output")?;
    BufReader::new(stdout).read_line(&mut line)?;
    ensure!(!line.is_empty(), "{command:?}: {:?}", child.wait());
    Ok(child)
}

fn send(child: &Child, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(child.id().cast_signed()), signal)?)
}

fn every_signal_is_passed_on() -> Result<()> {
    for (signal, name) in [
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGQUIT, "QUIT"),
        (Signal::SIGUSR1, "USR1"),
        (Signal::SIGUSR2, "USR2"),
    ] {
        let script = format!("trap 'exit 9' {name}; echo; while :; do sleep 0.01; done");
        let mut child = started(shell("unshare -rn", &script)?)?;
        send(&child, signal)?;
        let status = child.wait()?;
        ensure!(status.code() == Some(9), "{signal}: {status}");
    }
    // One that is not caught ends the command.
    let mut child = started(shell("unshare -rn", "echo; exec sleep 60")?)?;
    send(&child, Signal::SIGTERM)?;
    ensure!(child.wait()?.code() == Some(128 + 15));
    Ok(())
}

fn a_command_is_killable_while_it_starts() -> Result<()> {
    let mut child = started(shell("", "echo; exec sleep 60")?)?;
    send(&child, Signal::SIGTERM)?;
    ensure!(child.wait()?.code() == Some(128 + 15));
    // If this process is killed, so is what it traced.
    let mut child = started(shell("", "echo; exec sleep 61")?)?;
    child.kill()?;
    child.wait()?;
    let begin = Instant::now();
    while running("sleep\x0061")? {
        ensure!(begin.elapsed() < Duration::from_secs(5), "it goes on");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Returns true if a process has this command line, or this at the end of it.
fn running(end: &str) -> Result<bool> {
    let lines = fs::read_dir("/proc")?
        .flatten()
        .map(|entry| fs::read(entry.path().join("cmdline")).unwrap_or_default());
    Ok(lines.into_iter().any(|line| {
        line.trim_ascii_end().strip_suffix(b"\0").is_some_and(|line| line.ends_with(end.as_bytes()))
    }))
}

/// Where something else traces already.
fn a_forbidden_trace_says_so() -> Result<()> {
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", programs()?[1], "relay", "5432", "--", "true"]);
    let output = command.uid(USER).gid(USER).current_dir("/").output()?;
    let error = String::from_utf8(output.stderr)?;
    ensure!(
        output.status.code() == Some(1) && error.contains("--pid") && error.lines().count() == 1,
        "{error}"
    );
    Ok(())
}

//! Tests of who may speak to the daemon, with the commands or with the control API.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{self, Daemon, Options, Output};
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{patience, sandbox};
use lbridge_tests::tests;
use nix::sys::signal::Signal;

use crate::{one_line, state};

pub(crate) fn tests() -> Vec<Test> {
    const SETPRIV: Need = Need::Program("setpriv");
    const CURL: Need = Need::Program("curl");
    tests![
        daemon_without_privilege_is_refused: [SETPRIV],
        command_without_privilege_is_refused: [SETPRIV],
        members_of_the_group_are_served: [SETPRIV],
        a_daemon_that_ends_before_it_answers_is_not_reachable,
        api_over_curl: [CURL],
        api_refuses_others: [CURL, SETPRIV],
        api_validates_what_it_gets: [CURL],
    ]
}

/// The program where every user can execute it.
fn public_binary() -> Result<PathBuf> {
    let folder = Path::new("/run/bin");
    fs::create_dir_all(folder)?;
    let path = folder.join("lbridge");
    fs::copy(daemon::binary()?, &path)?;
    Ok(path)
}

/// As nobody, with these supplementary groups.
fn as_nobody(groups: &str, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", groups]).arg(program).current_dir("/");
    command
}

fn output_of(command: &mut Command) -> Result<Output> {
    Ok(command.output().with_context(|| format!("{command:?}"))?.into())
}

/// It takes the request and is killed: no answer that could not be understood, and not known what has come of
/// it.
fn a_daemon_that_ends_before_it_answers_is_not_reachable() -> Result<()> {
    let mut scene = Scene::new()?;
    for arguments in [&["status"][..], &["allow", "bridge:lab0", "8080"]] {
        scene.daemon.signal(Signal::SIGSTOP)?;
        let mut command = scene.daemon.command()?;
        let asks = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let socket = scene.daemon.socket().display().to_string();
        let of_daemon = format!("/proc/{}/net/unix", scene.daemon.pid().context("it runs")?);
        patience::until("it is connected", || {
            let sockets = fs::read_to_string(&of_daemon)?;
            Ok((sockets.matches(&socket).count() > 1).then_some(()))
        })?;
        scene.daemon.kill9()?;
        let output = asks.wait_with_output()?.into();
        let line = one_line(&output, 3)?;
        ensure!(line.contains("ended before it answered") && line.contains("lbridge status"), "{line}");
        scene.daemon.restart()?;
    }
    Ok(())
}

fn daemon_without_privilege_is_refused() -> Result<()> {
    let program = public_binary()?;
    let folder = Path::new("/run/nobody");
    fs::create_dir(folder)?;
    nix::unistd::chown(folder, Some(65534.into()), Some(65534.into()))?;
    let mut command = as_nobody("--clear-groups", &program);
    command.args(["run", "--no-docker", "--socket", "/run/nobody/sock", "--state-dir", "/run/nobody/state"]);
    command.args(["--config", "/run/nobody/none.toml", "--cgroup", sandbox::CGROUP_ROOT]);
    let output = output_of(&mut command)?;
    let line = one_line(&output, 1)?;
    ensure!(line.contains("root"), "says what is needed: {line}");
    ensure!(!folder.join("sock").exists(), "a socket is left");
    Ok(())
}

/// A scene whose socket every user can get at, as far as the folders go.
fn public_scene() -> Result<Scene> {
    let folder = PathBuf::from("/run/public");
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    Scene::with(V4, Options { folder: Some(folder), ..Options::default() })
}

fn command_without_privilege_is_refused() -> Result<()> {
    let program = public_binary()?;
    let scene = public_scene()?;
    let before = state(&scene.daemon)?;
    for arguments in [["status"].as_slice(), &["allow", "bridge:lab0", "8080"]] {
        let mut command = as_nobody("--clear-groups", &program);
        let output = output_of(command.args(arguments).env("LBRIDGE_SOCKET", scene.daemon.socket()))?;
        let line = one_line(&output, 1)?;
        ensure!(line.contains("root") || line.contains("group"), "says who may: {line}");
    }
    // A socket whose mode somebody widened is still not for everybody.
    fs::set_permissions(scene.daemon.socket(), fs::Permissions::from_mode(0o666))?;
    let mut command = as_nobody("--clear-groups", &program);
    command.args(["allow", "bridge:lab0", "8080"]).env("LBRIDGE_SOCKET", scene.daemon.socket());
    one_line(&output_of(&mut command)?, 1)?;
    ensure!(state(&scene.daemon)? == before);
    let mode = fs::metadata(scene.daemon.state_dir())?.permissions().mode();
    ensure!(mode & 0o022 == 0, "others may write the state: {mode:o}");
    Ok(())
}

fn with_group() -> Result<()> {
    sandbox::shadow("/etc")?;
    let groups = fs::read_to_string("/etc/group")?;
    let mut lines: Vec<_> = groups.lines().filter(|line| !line.starts_with("lbridge:")).collect();
    lines.push("lbridge:x:4242:\n");
    Ok(fs::write("/etc/group", lines.join("\n"))?)
}

fn members_of_the_group_are_served() -> Result<()> {
    with_group()?;
    let program = public_binary()?;
    let scene = public_scene()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let mut command = as_nobody("--groups=4242", &program);
    command.args(["allow", "bridge:lab0", "8080"]).env("LBRIDGE_SOCKET", scene.daemon.socket());
    let output = output_of(&mut command)?;
    ensure!(output.status == 0 && output.stdout.contains("steered"), "{output:?}");
    scene.served(8080, "service")?;
    let mut command = as_nobody("--groups=4243", &program);
    command.args(["deny", "bridge:lab0", "8080"]).env("LBRIDGE_SOCKET", scene.daemon.socket());
    one_line(&output_of(&mut command)?, 1)?;
    scene.served(8080, "service").map(drop)
}

/// The answer's status and body.
fn curl(daemon: &Daemon, mut command: Command, arguments: &[&str]) -> Result<(String, String)> {
    command.args(["--silent", "--show-error", "--max-time", "5", "--write-out", "\n%{http_code}"]);
    command.arg("--unix-socket").arg(daemon.socket()).args(arguments);
    let output = output_of(&mut command)?;
    ensure!(output.status == 0, "{output:?}");
    let (body, status) = output.stdout.rsplit_once('\n').context("a status")?;
    Ok((status.to_owned(), body.to_owned()))
}

fn api_over_curl() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let (status, body) = curl(&scene.daemon, Command::new("curl"), &["http://localhost/v1/status"])?;
    let body: serde_json::Value = serde_json::from_str(&body)?;
    ensure!(status == "200", "{status} {body}");
    let mut told = scene.daemon.status()?;
    // Whatever counts may have gone on.
    let mut body = body;
    body["kernel"]["counters"].take();
    told["kernel"]["counters"].take();
    ensure!(body == told, "the CLI tells what the API tells: {body}");
    let explain = |question: &str| {
        let json = "Content-Type: application/json";
        let arguments = ["--data-binary", question, "--header", json, "http://localhost/v1/explain"];
        curl(&scene.daemon, Command::new("curl"), &arguments)
    };
    let (status, body) = explain(r#"{"network":"bridge:lab0","port":8080}"#)?;
    let body: serde_json::Value = serde_json::from_str(&body)?;
    ensure!(status == "200" && body["ways"][0]["fate"] == "steered", "{status} {body}");
    for question in ["", "{", r#"{"network":"bridge:lab0","port":0}"#, r#"{"network":"bridge:a/b","port":1}"#]
    {
        let (status, body) = explain(question)?;
        ensure!(status.starts_with('4'), "{question} -> {status} {body}");
    }
    let (status, _) = curl(&scene.daemon, Command::new("curl"), &["http://localhost/nothing/here"])?;
    ensure!(status.starts_with('4'), "{status}");
    Ok(())
}

fn api_refuses_others() -> Result<()> {
    let scene = public_scene()?;
    // The file's mode first, then what the peer is.
    let refused = output_of(
        as_nobody("--clear-groups", Path::new("curl"))
            .args(["--silent", "--unix-socket"])
            .arg(scene.daemon.socket())
            .arg("http://localhost/v1/status"),
    )?;
    ensure!(refused.status != 0 && refused.stdout.is_empty(), "{refused:?}");
    fs::set_permissions(scene.daemon.socket(), fs::Permissions::from_mode(0o666))?;
    let nobody = as_nobody("--clear-groups", Path::new("curl"));
    let (status, body) = curl(&scene.daemon, nobody, &["http://localhost/v1/status"])?;
    ensure!(status == "403" && !body.contains("rules"), "{status} {body}");
    let (status, _) = curl(&scene.daemon, Command::new("curl"), &["http://localhost/v1/status"])?;
    ensure!(status == "200", "{status}");
    Ok(())
}

/// Whoever speaks HTTP instead of using the commands gets no more than they do.
fn api_validates_what_it_gets() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let before = state(&scene.daemon)?;
    let rule = |rule: &str| format!(r#"{{"rules":[{{"network":"bridge:lab0","port":"8080"}},{rule}]}}"#);
    let bodies = [
        String::new(),
        "{".to_owned(),
        "[]".to_owned(),
        "null".to_owned(),
        "{\"rules\": 5}".to_owned(),
        rule(r#"{"network":"bridge:lab0","port":"0"}"#),
        rule(r#"{"network":"bridge:lab0","port":8081}"#),
        rule(r#"{"network":"bridge:lab0","port":"81=10.0.0.1:80"}"#),
        rule(r#"{"network":"bridge:a/b","port":"81"}"#),
        rule(r#"{"network":"","port":"81"}"#),
        rule(r#"{"network":"bridge:lab0","port":"81","source":"nobody"}"#),
        rule(r#"{"network":"bridge:lab0","port":"81","sauce":"loopback"}"#),
        "[".repeat(100_000),
    ];
    for body in &bodies {
        let file = tempfile::NamedTempFile::new_in("/run")?;
        fs::write(file.path(), body)?;
        let data = format!("@{}", file.path().display());
        let json = "Content-Type: application/json";
        let arguments = ["--data-binary", &data, "--header", json, "http://localhost/v1/allow"];
        let (status, answer) = curl(&scene.daemon, Command::new("curl"), &arguments)?;
        ensure!(status.starts_with('4'), "{body:.80} -> {status} {answer}");
        ensure!(state(&scene.daemon)? == before, "{body:.80} changed {before:?}");
    }
    let (status, _) = curl(&scene.daemon, Command::new("curl"), &["http://localhost/v1/allow"])?;
    ensure!(status == "405", "GET is not POST: {status}");
    scene.refused(8080)
}

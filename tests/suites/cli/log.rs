//! Output that nobody takes, and text from elsewhere in it: a closed pipe, one that nobody reads, a full
//! disk; names that would begin a line of the log. What is served goes on, and commands say what they could
//! not do, once.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, PipeReader, Read, Write, pipe};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Connection};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::{one_line, state};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        the_daemon_goes_on_when_nobody_takes_its_log,
        the_daemon_goes_on_while_nobody_reads_its_log,
        what_a_full_disk_took_away_is_told_once_there_is_room,
        a_start_that_fails_ends_although_nobody_takes_what_it_says,
        a_relay_in_the_foreground_goes_on_when_nobody_takes_its_log,
        commands_whose_output_nobody_takes,
        names_from_elsewhere_write_no_lines,
        the_api_refuses_what_the_commands_refuse,
    ]
}

/// As after `| head -1`.
fn closed_pipe() -> Result<File> {
    let (reader, writer) = pipe()?;
    drop(reader);
    Ok(OwnedFd::from(writer).into())
}

fn full_device() -> Result<File> {
    OpenOptions::new().write(true).open("/dev/full").context("open /dev/full")
}

/// A pipe with room for one page.
fn small_pipe() -> Result<(PipeReader, File)> {
    let (reader, writer) = pipe()?;
    // SAFETY: the descriptor is open; the argument is a number.
    nix::errno::Errno::result(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) })?;
    Ok((reader, OwnedFd::from(writer).into()))
}

/// A relay at port 9090 with a connection, on which the daemon's life depends.
fn relayed(scene: &Scene) -> Result<(Service, Connection)> {
    let service = scene.service("relayed", "127.0.0.1:9090")?;
    scene.allow(&["9090", "--path", "relay"])?;
    let mut open = client::connect(&scene.container, scene.gateway(9090))?;
    open.echo(b"open")?;
    Ok((service, open))
}

fn with_stderr(stderr: File, env: &[(&str, &str)]) -> Result<Scene> {
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Scene::with(V4, Options { stderr: Some(Arc::new(stderr)), env, ..Options::default() })
}

fn the_daemon_goes_on_when_nobody_takes_its_log() -> Result<()> {
    // As systemd starts it, and by hand.
    for (journal, stderr) in [(false, closed_pipe()?), (true, closed_pipe()?), (false, full_device()?)] {
        let env: &[_] = if journal { &[("JOURNAL_STREAM", "9:1")] } else { &[] };
        let mut scene = with_stderr(stderr, env)?;
        let (_service, mut open) = relayed(&scene)?;
        let output = scene.daemon.cli(&["allow", "bridge:lab0", "8080"])?;
        ensure!(output.status == 0 && output.stdout.contains("waiting"), "{output:?}");
        // Every change of a state is a line of the log.
        let service = scene.service("service", "127.0.0.1:8080")?;
        scene.wait_for(8080, "steered")?;
        scene.served(8080, "service")?;
        service.stop();
        scene.wait_for(8080, "waiting")?;
        scene.daemon.signal(Signal::SIGHUP)?;
        scene.deny(&["8080"])?;
        open.echo(b"still open")?;
        ensure!(scene.daemon.is_running()?);
        drop(open);
        let status = scene.daemon.terminate()?;
        ensure!(status.success(), "{status}");
    }
    Ok(())
}

/// The log is read late, and is complete but for the lines that the gap counts.
fn the_daemon_goes_on_while_nobody_reads_its_log() -> Result<()> {
    let (reader, stderr) = small_pipe()?;
    let mut scene = with_stderr(stderr, &[("LBRIDGE_LOG", "trace")])?;
    let (_service, mut open) = relayed(&scene)?;
    // More than waits: a megabyte. Every request and every look says a lot.
    for _ in 0..60 {
        scene.allow(&["20000-20090"])?;
        scene.deny(&["20000-20090"])?;
        open.echo(b"still open")?;
    }
    ensure!(scene.daemon.is_running()?);

    let mut lines = BufReader::new(reader).lines();
    let mut before = 0;
    let gap = loop {
        let line = lines.next().context("the log ended without a gap")??;
        if line.contains(" lost here: ") {
            break line;
        }
        before += 1;
    };
    ensure!(before > 100, "what had been said before is there: {before} lines, then {gap}");
    ensure!(
        gap.contains("  WARN ") && gap.ends_with(" log lines were lost here: nobody read standard error"),
        "{gap}"
    );
    let lost: u64 =
        gap.split("WARN ").nth(1).and_then(|rest| rest.split(' ').next()).context("a number")?.parse()?;
    ensure!(lost > 0, "{gap}");

    // It is read from now on, to the end: nothing is missing any more, the last line least of all.
    let rest = thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>());
    scene.allow(&["7000"])?;
    drop(open);
    let status = scene.daemon.terminate()?;
    ensure!(status.success(), "{status}");
    drop(scene);
    let rest = rest.join().map_err(|_| anyhow::anyhow!("the reader"))?;
    let place = |words: &str| {
        let place = rest.iter().rposition(|line| line.contains(words));
        place.with_context(|| format!("no {words} in {} lines", rest.len()))
    };
    let waiting = "rule state changed network=bridge:lab0 port=7000 protocol=tcp state=waiting";
    ensure!(place(waiting)? < place("daemon stopped; steered rules stay in force")?);
    Ok(())
}

/// A file system of 64 KiB.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Result<SmallDisk> {
        use nix::mount::{MsFlags, mount};
        let folder = tempfile::tempdir_in("/run")?;
        mount(Some("none"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
        Ok(SmallDisk(folder))
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.path("filler"))?;
        while file.write(&[0; 4096]).is_ok() {}
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn what_a_full_disk_took_away_is_told_once_there_is_room() -> Result<()> {
    let disk = SmallDisk::new()?;
    let log = disk.path("log");
    let file = OpenOptions::new().create(true).append(true).open(&log)?;
    let mut scene = with_stderr(file, &[])?;
    let (_service, mut open) = relayed(&scene)?;
    patience::until("the log begins", || {
        Ok(fs::read_to_string(&log)?.contains("port=9090 protocol=tcp state=relayed").then_some(()))
    })?;
    disk.fill()?;
    // What is left of the page that the log ends in takes some.
    scene.allow(&["20000-20060"])?;
    scene.deny(&["20000-20060"])?;
    let full = patience::until("the disk is full", || {
        let text = fs::read_to_string(&log)?;
        Ok((text.len() % 4096 == 0).then_some(text))
    })?;
    ensure!(!full.contains("lost here"), "{full}");
    open.echo(b"still open")?;

    fs::remove_file(disk.path("filler"))?;
    scene.allow(&["7000"])?;
    drop(open);
    ensure!(scene.daemon.terminate()?.success());
    let text = fs::read_to_string(&log)?;
    let lines: Vec<_> = text.lines().collect();
    let gap = lines.iter().position(|line| line.contains(" lost here: ")).with_context(|| text.clone())?;
    let words = "log lines were lost here: standard error could not be written to (No space left on device)";
    ensure!(lines[gap].ends_with(words), "{}", lines[gap]);
    let lost: usize = lines[gap]
        .split("WARN ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .context("a number")?
        .parse()?;
    // 61 ports, each told twice; the line before the gap may be torn, and counts as lost.
    let waiting = "state=waiting reason=nothing_listens why=\"nothing listens on 127.0.0.1:20";
    let told = lines[..gap].iter().filter(|line| line.contains(waiting));
    let whole = told.filter(|line| line.ends_with('"')).count();
    let removed = |line: &&&str| {
        line.contains("rule removed network=bridge:lab0 port=20") && line.ends_with(" origin=cli")
    };
    let denied = lines[..gap].iter().filter(removed).count();
    ensure!(whole + denied + lost == 122, "{whole} and {denied} were written, {lost} lost:\n{text}");
    let rest = lines[gap..].join("\n");
    ensure!(
        rest.contains("port=7000 protocol=tcp state=waiting") && rest.contains("daemon stopped; "),
        "{rest}"
    );
    Ok(())
}

fn a_start_that_fails_ends_although_nobody_takes_what_it_says() -> Result<()> {
    let lab = Lab::new()?;
    let (_reader, stuck) = small_pipe()?;
    // Full already.
    stuck.try_clone().and_then(|mut file| file.write_all(&[b'x'; 4096]))?;
    for stderr in [closed_pipe()?, full_device()?, stuck] {
        let stderr = Some(Arc::new(stderr));
        let mut daemon =
            Daemon::prepare(lab.host(), Options { stderr, config: "[".to_owned(), ..Options::default() })?;
        let error = daemon.restart().err().context("it cannot start")?.to_string();
        ensure!(error.ends_with("exit status: 1"), "{error}");
    }
    Ok(())
}

/// Killed when this goes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn a_relay_in_the_foreground_goes_on_when_nobody_takes_its_log() -> Result<()> {
    let lab = Lab::new()?;
    let daemon = Daemon::prepare(lab.host(), Options::default())?;
    let (_reader, stuck) = small_pipe()?;
    stuck.try_clone().and_then(|mut file| file.write_all(&[b'x'; 4096]))?;
    for stderr in [closed_pipe()?, full_device()?, stuck] {
        let inside = NetNs::new()?;
        let process = Running(inside.command("sleep").arg("1000000").spawn()?);
        let mut command = daemon.command()?;
        command.args(["relay", "--pid", &process.0.id().to_string(), "8080"]).stderr(stderr);
        let mut relay = Running(command.spawn()?);
        let served = |name: &str| {
            patience::until(&format!("{name} is served"), || {
                Ok(client::served_by(&inside, "127.0.0.1:8080".parse()?, name).ok())
            })
        };
        // What comes and goes is told.
        for name in ["first", "second", "third"] {
            let service = Service::start(lab.host(), name, "127.0.0.1:8080")?;
            served(name)?;
            service.stop();
            patience::until("the port is closed", || {
                Ok(client::refused(&inside, "127.0.0.1:8080".parse()?).ok())
            })?;
        }
        ensure!(relay.0.try_wait()?.is_none(), "the relay has ended");
        kill(Pid::from_raw(relay.0.id().cast_signed()), Signal::SIGTERM)?;
        let status = patience::until("the relay ends", || Ok(relay.0.try_wait()?))?;
        ensure!(status.success(), "{status}");
    }
    Ok(())
}

/// Runs a command with these for standard output and error; what it said on the latter, if that is `None`.
fn run(
    daemon: &Daemon,
    arguments: &[&str],
    stdout: File,
    stderr: Option<File>,
) -> Result<(ExitStatus, String)> {
    let mut command = daemon.command()?;
    command.args(arguments).stdout(stdout).stderr(stderr.map_or_else(Stdio::piped, Stdio::from));
    let mut child = Running(command.spawn()?);
    let mut said = String::new();
    if let Some(mut stderr) = child.0.stderr.take() {
        stderr.read_to_string(&mut said)?;
    }
    let status = patience::until(&format!("{arguments:?} ends"), || Ok(child.0.try_wait()?))?;
    Ok((status, said))
}

fn commands_whose_output_nobody_takes() -> Result<()> {
    let scene = Scene::new()?;
    let daemon = &scene.daemon;
    let config = daemon.config().display().to_string();
    let state_dir = daemon.state_dir().display().to_string();
    let bpffs = daemon.bpffs().display().to_string();
    let paths = ["--config", &config, "--state-dir", &state_dir];
    let check = [&["check-config"], paths.as_slice()].concat();
    let doctor =
        [&["doctor", "--bpffs", &bpffs, "--cgroup", "/sys/fs/cgroup/none"], paths.as_slice()].concat();
    let commands: &[&[&str]] = &[
        &["allow", "bridge:lab0", "8080"],
        &["allow", "bridge:lab0", "8080", "--json"],
        &["list"],
        &["list", "--json"],
        &["status"],
        &["status", "--json"],
        &["reload"],
        &["reload", "--json"],
        &["explain", "bridge:lab0", "8080"],
        &["explain", "bridge:lab0", "8080", "--json"],
        &["events"],
        &["events", "--json"],
        &["top", "--interval", "10ms"],
        &["top", "--interval", "10ms", "--json"],
        &["top", "--once", "--interval", "10ms"],
        &check,
        &["completions", "bash"],
        &["completions", "zsh"],
        &["--help"],
        &["--version"],
        &["help", "relay"],
        &["deny", "bridge:lab0", "8080"],
    ];
    for arguments in commands {
        // Denied last, and again.
        if arguments[0] == "deny" {
            scene.allow(&["8080"])?;
        }
        let (status, said) = run(daemon, arguments, full_device()?, None)?;
        ensure!(status.code() == Some(1), "{arguments:?} with a full disk: {status} {said}");
        let words = "lbridge: cannot write to standard output: No space left on device";
        ensure!(said.lines().count() == 1 && said.starts_with(words), "{arguments:?}: {said}");
        if arguments[0] == "deny" {
            scene.allow(&["8080"])?;
        }
        let (status, said) = run(daemon, arguments, closed_pipe()?, None)?;
        ensure!(status.code() == Some(0) && said.is_empty(), "{arguments:?} as with head: {status} {said}");
        if arguments[0] == "deny" {
            scene.allow(&["8080"])?;
        }
        let (status, _) = run(daemon, arguments, full_device()?, Some(full_device()?))?;
        ensure!(status.code() == Some(1), "{arguments:?} with nothing to write to: {status}");
    }
    ensure!(scene.daemon.status()?["rules"] == json!([]), "it was denied all the same");
    // With problems of its own to tell, which is its exit status.
    for (stdout, lines) in [(full_device()?, 1), (closed_pipe()?, 0)] {
        let (status, said) = run(daemon, &doctor, stdout, None)?;
        ensure!(status.code() == Some(1) && said.lines().count() == lines, "{status} {said}");
    }
    // What went wrong keeps its exit status.
    for (arguments, wanted) in [(["allow", "bridge:lab0", "0"], 2), (["deny", "bridge:lab0", "1"], 4)] {
        for stderr in [full_device()?, closed_pipe()?] {
            let (status, _) = run(daemon, &arguments, full_device()?, Some(stderr))?;
            ensure!(status.code() == Some(wanted), "{arguments:?}: {status}");
        }
    }
    Ok(())
}

/// Text of others: it begins a line, acts on a terminal, and turns what follows around.
const HOSTILE: &str = "x\n<0>y\u{1b}[2J\u{9b}\u{202e}\u{2028}\u{61c}z";

/// Returns true if the text has a character that may not be in a line of the log.
fn acts(text: &str) -> bool {
    text.chars().any(|c| c.is_control() || "\u{202e}\u{2028}\u{61c}".contains(c))
}

fn names_from_elsewhere_write_no_lines() -> Result<()> {
    let folder = tempfile::tempdir_in("/run")?;
    // It answers everything with an error of its own words.
    let engine = folder.path().join("engine.sock");
    let listener = UnixListener::bind(&engine)?;
    thread::spawn(move || {
        let body = json!({ "message": HOSTILE }).to_string();
        let head = format!(
            "HTTP/1.1 500 No\r\nContent-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        );
        for mut stream in listener.incoming().map_while(Result::ok) {
            drop(stream.read(&mut [0; 4096]));
            drop(write!(stream, "{head}Connection: close\r\n\r\n{body}"));
        }
    });
    let env = vec![("DOCKER_HOST".to_owned(), format!("unix://{}", engine.display()))];
    let mut scene = Scene::with(V4, Options { docker: true, env, ..Options::default() })?;
    let mut events = scene.daemon.command()?.args(["events"]).stdout(Stdio::piped()).spawn().map(Running)?;
    let mut lines = BufReader::new(events.0.stdout.take().context("a pipe")?).lines();
    ensure!(lines.next().context("a first line")??.contains("following"));
    // The name of a process is its program's, 15 bytes of it.
    let program = folder.path().join("x\n<0>y\u{1b}\u{202e}z");
    fs::copy("/usr/bin/socat", &program)?;
    let mut command = scene.container.command(&program);
    command.args(["TCP-LISTEN:9090,bind=127.0.0.1,reuseaddr", "STDOUT"]).stdin(Stdio::null());
    let holder = Running(command.spawn()?);
    patience::until("it listens", || Ok(scene.container.listens("127.0.0.1:9090".parse()?)?.then_some(())))?;
    let _service = scene.service("service", "127.0.0.1:9090")?;
    let inside = format!("pid:{}", holder.0.id());
    let allowed = scene.daemon.allow(&[&inside, "9090"])?;
    ensure!(allowed.stdout.contains(r"in use by x\n<0>y"), "{allowed:?}");

    // A setting's name is whatever is between quotes.
    let key: Vec<_> = HOSTILE.chars().map(|c| format!("\\U{:08X}", u32::from(c))).collect();
    let key = key.concat();
    fs::write(scene.daemon.config(), format!("\"{key}\" = 1\n"))?;
    let refused = scene.daemon.cli(&["reload"])?;
    let line = one_line(&refused, 1)?;
    ensure!(!acts(line) && line.contains(r"\u{202e}"), "{line:?}");

    let status = scene.daemon.cli(&["status"])?;
    ensure!(status.stdout.lines().all(|line| !acts(line)), "{:?}", status.stdout);
    ensure!(
        status.stdout.contains(r"\u{202e}") && status.stdout.contains(r"in use by x\n<0>y"),
        "{}",
        status.stdout
    );
    let explained = scene.daemon.cli(&["explain", &inside, "9090"])?.stdout;
    ensure!(explained.contains(r"x\n<0>y") && explained.lines().all(|line| !acts(line)), "{explained:?}");
    let checked =
        scene.daemon.command()?.arg("check-config").arg("--config").arg(scene.daemon.config()).output()?;
    ensure!(!acts(String::from_utf8(checked.stderr)?.trim_end()), "check-config");
    // Programs are told what it is, in characters that act on nothing.
    let json = scene.daemon.cli(&["status", "--json"])?.stdout;
    ensure!(json.lines().all(|line| !acts(line)), "{json:?}");
    let status: serde_json::Value = serde_json::from_str(&json)?;
    let error = status["docker"]["error"].as_str().context("an error")?;
    ensure!(error.contains("\u{1b}[2J\u{9b}\u{202e}\u{2028}\u{61c}z"), "nothing is lost: {error:?}");

    let blocked = lines.find(|line| line.as_ref().map_or(true, |line| line.contains("blocked")));
    let blocked = blocked.context("an event")??;
    ensure!(!acts(&blocked) && blocked.contains(r"in use by x\n<0>y"), "{blocked:?}");
    ensure!(scene.daemon.terminate()?.success());
    let log = scene.daemon.log();
    let said: Vec<_> =
        log.lines().filter(|line| line.contains("not reloaded") || line.contains("in use by")).collect();
    ensure!(said.len() >= 2 && log.lines().all(|line| !line.starts_with("<0>")), "{log:?}");
    ensure!(said.iter().all(|line| !acts(line)), "{said:?}");
    Ok(())
}

fn the_api_refuses_what_the_commands_refuse() -> Result<()> {
    let mut scene = Scene::new()?;
    let before = state(&scene.daemon)?;
    let rule = |field: &str, value: serde_json::Value| {
        let mut rule = json!({ "network": "bridge:lab0", "port": "8080" });
        rule[field] = value;
        json!({ "rules": [{ "network": "bridge:lab0", "port": "8081" }, rule] })
    };
    let forged = "web\n<0>2026-01-01T00:00:00Z ERROR forged";
    for text in [forged, "web\r", "web\u{1b}[2J", "web\u{7f}", "web\u{9b}"] {
        for body in [
            rule("from", json!([text])),
            rule("comment", json!(text)),
            rule("network", json!(text)),
            rule("network", json!(format!("container:{text}"))),
            rule("network", json!(format!("netns:/run/{text}"))),
            rule("port", json!(format!("80=unix:/run/{text}"))),
        ] {
            let answer = scene.daemon.post("/v1/allow", &body)?;
            ensure!(answer.starts_with("HTTP/1.1 400 "), "{body}: {answer}");
            let (_, error) = answer.split_once("\r\n\r\n").context("a body")?;
            let error: serde_json::Value = serde_json::from_str(error)?;
            let message = error["message"].as_str().context("a message")?;
            ensure!(error["code"] == "usage" && message.len() > 10 && !acts(message), "{body}: {error}");
            ensure!(state(&scene.daemon)? == before, "{body} changed {before:?}");
        }
    }
    // What the commands do not take for a name at all, and what they take for two.
    for name in ["", "a b", "a/b", "a,b", "a:b"] {
        let answer = scene.daemon.post("/v1/allow", &rule("from", json!([name])))?;
        ensure!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains("is not a container"),
            "{name:?}: {answer}"
        );
    }
    for resource in ["/v1/deny", "/v1/explain"] {
        let answer = scene.daemon.post(resource, &json!({ "network": forged, "ports": [1], "port": 1 }))?;
        ensure!(answer.starts_with("HTTP/1.1 400 "), "{resource}: {answer}");
    }
    // In the file it is refused with the place.
    let config = "[[rule]]\nnetwork = \"bridge:lab0\"\nport = 8080\ncomment = \"two\\nlines\"\n";
    fs::write(scene.daemon.config(), config)?;
    let reloaded = scene.daemon.cli(&["reload"])?;
    let line = one_line(&reloaded, 1)?;
    ensure!(line.contains("lbridge.toml:1:1: ") && line.contains("one line of text"), "{line}");
    ensure!(state(&scene.daemon)? == before);
    // And what is a name, is one.
    let answer = scene.daemon.post("/v1/allow", &rule("from", json!(["web-1", "0123456789ab"])))?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    ensure!(scene.daemon.terminate()?.success());
    let log = scene.daemon.log();
    ensure!(log.contains(r#"the comment \"two\nlines\""#) && !log.contains("\n<0>"), "{log}");
    Ok(())
}

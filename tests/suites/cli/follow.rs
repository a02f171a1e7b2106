//! The commands that run until they are interrupted: `events` and `top`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::Daemon;
use lbridge_tests::harness::follow::Follow;
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        events_tell_what_happens,
        events_tell_what_the_kernel_does_not,
        events_over_curl: [Need::Program("curl")],
        slow_subscribers_are_told_what_they_missed,
        subscribers_are_limited_and_go_without_a_trace,
        events_end_with_the_daemon_and_with_the_reader,
        top_counts_connections_and_bytes,
        top_leaves_the_terminal_as_it_was,
    ]
}

fn follow(daemon: &Daemon, arguments: &[&str]) -> Result<Follow> {
    let mut command = daemon.command()?;
    command.args(arguments);
    Follow::start(command)
}

/// Waits for an event with these fields.
fn event(events: &mut Follow, fields: &[(&str, Value)]) -> Result<Value> {
    events.until(&format!("{fields:?}"), |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        fields.iter().all(|(name, value)| event[*name] == *value).then_some(event)
    })
}

fn state(port: u16, state: &str) -> [(&'static str, Value); 4] {
    [
        ("event", "state".into()),
        ("network", "bridge:lab0".into()),
        ("port", port.into()),
        ("state", state.into()),
    ]
}

fn events_tell_what_happens() -> Result<()> {
    let scene = Scene::new()?;
    let mut events = follow(&scene.daemon, &["events", "--json"])?;
    let mut lines = follow(&scene.daemon, &["events"])?;
    event(&mut events, &[("event", "following".into())])?;
    // Another look than the one that it asks for may notice a listener first.
    let mut listeners = follow(&scene.daemon, &["events", "--json"])?;
    event(&mut listeners, &[("event", "following".into())])?;
    lines.until("a first line", |line| line.contains("following lbridge").then_some(()))?;
    scene.allow(&["8080"])?;
    let by = [("event", "allowed".into()), ("port", 8080.into()), ("uid", 0.into())];
    let allowed = event(&mut events, &by)?;
    ensure!(allowed["at"].is_string(), "{allowed}");
    let waiting = event(&mut events, &state(8080, "waiting"))?;
    ensure!(waiting["reasons"][0]["code"] == "nothing_listens", "{waiting}");
    ensure!(waiting["why"] == "nothing listens on 127.0.0.1:8080", "{waiting}");
    let service = scene.service("service", "127.0.0.1:8080")?;
    event(&mut listeners, &[("event", "listening".into()), ("port", 8080.into())])?;
    event(&mut events, &state(8080, "steered"))?;
    service.stop();
    event(&mut listeners, &[("event", "closed".into()), ("port", 8080.into())])?;
    event(&mut events, &state(8080, "waiting"))?;

    let _service = scene.service("relayed", "127.0.0.1:9090")?;
    scene.allow(&["9090", "--max-connections", "1"])?;
    let held = client::connect(&scene.container, scene.gateway(9090))?;
    scene.refused(9090)?;
    scene.refused(9090)?;
    let refused = event(&mut events, &[("event", "refused".into()), ("port", 9090.into())])?;
    ensure!(refused["connections"].as_u64().is_some_and(|count| count == 1 || count == 2), "{refused}");
    drop(held);

    scene.deny(&["8080"])?;
    event(&mut events, &[("event", "denied".into()), ("port", 8080.into()), ("uid", 0.into())])?;
    for words in ["bridge:lab0 8080: allowed by root", "8080: steered", "8080: denied by root"] {
        lines.until(words, |line| line.contains(words).then_some(()))?;
    }
    events.signal(Signal::SIGINT)?;
    events.wait().map(drop)
}

/// The end of a service that listened before its rule was made.
fn events_tell_what_the_kernel_does_not() -> Result<()> {
    let lab = Lab::new()?;
    // Without IPv6 nothing else happens, of which the daemon would be told, and look.
    lab.host().sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
    lab.add_bridge("lab0", "10.7.0.1/24")?;
    let services = ["127.0.0.1:8080", "127.0.0.1:8081"].map(|at| Service::start(lab.host(), "earlier", at));
    let daemon = Daemon::start(lab.host())?;
    daemon.allow(&["bridge:lab0", "8080-8081"])?;
    let mut events = follow(&daemon, &["events", "--json"])?;
    event(&mut events, &[("event", "following".into())])?;
    // The first may be noticed by the look that a new subscriber causes.
    for service in services {
        let service = service?;
        let port = service.address().port();
        service.stop();
        event(&mut events, &state(port, "waiting"))?;
    }
    Ok(())
}

fn events_over_curl() -> Result<()> {
    let scene = Scene::new()?;
    let mut command = Command::new("curl");
    command.args(["--silent", "--no-buffer", "--unix-socket"]).arg(scene.daemon.socket());
    command.arg("http://localhost/v1/events");
    let mut events = Follow::start(command)?;
    event(&mut events, &[("event", "following".into())])?;
    scene.allow(&["8080"])?;
    event(&mut events, &state(8080, "waiting")).map(drop)
}

/// Asks for events, and has seen the first.
fn subscribe(daemon: &Daemon) -> Result<(UnixStream, String)> {
    let mut stream = UnixStream::connect(daemon.socket())?;
    stream.set_read_timeout(Some(patience::seconds(5)))?;
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: lbridge\r\n\r\n")?;
    let mut text = String::new();
    while !text.contains('}') {
        let mut buffer = [0; 4096];
        let length = stream.read(&mut buffer)?;
        ensure!(length > 0, "closed after {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    Ok((stream, text))
}

fn slow_subscribers_are_told_what_they_missed() -> Result<()> {
    let scene = Scene::new()?;
    let (mut slow, _) = subscribe(&scene.daemon)?;
    // Two events each: more than the socket and the buffer hold.
    scene.allow(&["20000-23999"])?;
    scene.deny(&["20000-23999"])?;
    scene.allow(&["8080"])?;
    ensure!(scene.daemon.status()?["rules"].as_array().map(Vec::len) == Some(1), "nobody was waited for");
    let mut text = String::new();
    let mut buffer = vec![0; 65536];
    while !(text.contains("\"event\":\"missed\"")
        && text.contains("\"port\":8080,\"protocol\":\"tcp\",\"state\""))
    {
        let length = slow.read(&mut buffer).with_context(|| format!("after {} bytes", text.len()))?;
        ensure!(length > 0, "closed after {} bytes", text.len());
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    let missed = text.split("\"event\":\"missed\",\"events\":").nth(1).context("a number")?;
    let missed: u64 = missed.split('}').next().context("a number")?.parse()?;
    ensure!(missed > 0, "{missed}");
    Ok(())
}

fn subscribers_are_limited_and_go_without_a_trace() -> Result<()> {
    let scene = Scene::new()?;
    let pid = scene.daemon.pid().context("a daemon")?;
    let descriptors = || Ok::<_, std::io::Error>(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count());
    scene.daemon.status()?;
    let before = descriptors()?;
    for _ in 0..3 {
        let mut all = Vec::new();
        let refused = loop {
            let (stream, text) = subscribe(&scene.daemon)?;
            if text.contains("too many subscribers") {
                break text;
            }
            all.push(stream);
            ensure!(all.len() < 1000, "there is no limit");
        };
        ensure!(refused.starts_with("HTTP/1.1 500"), "{refused}");
        ensure!(all.len() > 8, "only {} may follow", all.len());
        let output = scene.daemon.cli(&["events"])?;
        ensure!(output.status == 1 && output.stderr.contains("too many subscribers"), "{output:?}");
        drop(all);
        // Nothing happens meanwhile that they could be told.
        patience::until("they are forgotten", || Ok((descriptors()? <= before).then_some(())))?;
    }
    Ok(())
}

fn events_end_with_the_daemon_and_with_the_reader() -> Result<()> {
    let mut scene = Scene::new()?;
    let mut command = scene.daemon.command()?;
    let mut child = command.arg("events").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut reader = child.stdout.take().context("a pipe")?;
    ensure!(reader.read(&mut [0; 1])? == 1);
    drop(reader);
    scene.allow(&["8080"])?;
    let status = patience::until("nobody reads", || Ok(child.try_wait()?))?;
    ensure!(status.success(), "as with head: {status}");

    for kill in [false, true] {
        let mut command = scene.daemon.command()?;
        command.arg("events").stderr(Stdio::piped());
        let mut events = Follow::start(command)?;
        events.until("a first line", |line| line.contains("following").then_some(()))?;
        if kill {
            scene.daemon.kill9()?;
        } else {
            scene.daemon.terminate()?;
        }
        let status = events.wait()?;
        ensure!(status.code() == Some(3), "no daemon any more: {status}");
        scene.daemon.restart()?;
    }
    Ok(())
}

fn top_counts_connections_and_bytes() -> Result<()> {
    let scene = Scene::new()?;
    let _steered = scene.service("steered", "127.0.0.1:8080")?;
    let _relayed = scene.service("relayed", "127.0.0.1:9090")?;
    scene.allow(&["8080", "8081"])?;
    scene.allow(&["9090", "--path", "relay"])?;
    let mut top = follow(&scene.daemon, &["top", "--json", "--interval", "100ms"])?;
    let mut rule = |port: u16, wanted: &dyn Fn(&Value) -> bool| {
        top.until(&format!("the load of port {port}"), |line| {
            let look: Value = serde_json::from_str(line).ok()?;
            let rule = look["rules"].as_array()?.iter().find(|rule| rule["port"] == port)?;
            wanted(rule).then(|| rule.clone())
        })
    };
    rule(8080, &|rule| rule["connections"] == 0 && rule["per_second"] == 0.0)?;
    for _ in 0..3 {
        scene.served(8080, "steered")?;
    }
    let load = rule(8080, &|rule| rule["per_second"].as_f64().is_some_and(|rate| rate > 0.0))?;
    ensure!(load["state"] == "steered" && load["relayed"].is_null(), "{load}");
    rule(8080, &|rule| rule["connections"] == 3 && rule["per_second"] == 0.0)?;

    let mut held = client::connect(&scene.container, scene.gateway(9090))?;
    held.echo(&vec![7; 100_000])?;
    let is_open = |rule: &Value| rule["relayed"]["open"] == 1;
    rule(9090, &|rule| is_open(rule) && rule["relayed"]["to_service"] == 100_000)?;
    held.echo(b"more")?;
    drop(held);
    let load = rule(9090, &|rule| rule["relayed"]["open"] == 0)?;
    ensure!(load["relayed"]["to_service"] == 100_004, "what has ended counts: {load}");
    ensure!(load["relayed"]["to_client"].as_u64().is_some_and(|bytes| bytes > 100_004), "{load}");
    drop(top);

    let once = scene.daemon.cli(&["top", "--once", "--interval", "10ms"])?;
    ensure!(once.status == 0 && !once.stdout.contains('\u{1b}'), "{once:?}");
    for words in ["CONN/S", "bridge:lab0", "97.6 KiB"] {
        ensure!(once.stdout.contains(words), "{words} in {}", once.stdout);
    }
    ensure!(scene.daemon.cli(&["top", "--interval", "0s"])?.status == 2);
    Ok(())
}

fn top_leaves_the_terminal_as_it_was() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.allow(&["8080"])?;
    for daemon_ends in [false, true] {
        let (mut ours, theirs) = terminal()?;
        let mut command = scene.daemon.command()?;
        command.args(["top", "--interval", "10ms"]).stdin(theirs.try_clone()?).stdout(theirs);
        let mut top = command.stderr(Stdio::piped()).spawn()?;
        drop(command);
        let mut text = String::new();
        let mut read = |text: &mut String| -> std::io::Result<usize> {
            let mut buffer = [0; 4096];
            let length = ours.read(&mut buffer)?;
            text.push_str(&String::from_utf8_lossy(&buffer[..length]));
            Ok(length)
        };
        while text.matches("bridge:lab0").count() < 3 {
            read(&mut text)?;
        }
        ensure!(text.starts_with("\u{1b}[?1049h"), "the terminal's other screen: {text:?}");
        if daemon_ends {
            scene.daemon.terminate()?;
        } else {
            kill(Pid::from_raw(top.id().cast_signed()), Signal::SIGINT)?;
        }
        // EIO once the other end is closed.
        while read(&mut text).is_ok_and(|length| length > 0) {}
        let status = top.wait()?;
        ensure!(status.code() == Some(if daemon_ends { 3 } else { 0 }), "{status}");
        ensure!(text.ends_with("\u{1b}[?7h\u{1b}[?25h\u{1b}[?1049l"), "as it was: {text:?}");
    }
    Ok(())
}

/// Both ends of a pseudo-terminal.
pub(crate) fn terminal() -> Result<(File, OwnedFd)> {
    let (mut ours, mut theirs) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: the descriptors are written, the other arguments may be null.
    let done = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, none, none.cast(), none.cast()) };
    nix::errno::Errno::result(done).context("openpty")?;
    // SAFETY: the kernel has just made these for us.
    Ok(unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) })
}

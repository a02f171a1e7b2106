//! Tests of Redis over the relay.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{io::Read, thread};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;
use tempfile::TempDir;

use lbridge_tests::harness::server::{self, Server};

/// Debian's redis-tools has the server under this name; it goes by how it is called.
const SERVER: &str = "redis-check-rdb";

pub(crate) fn tests() -> Vec<Test> {
    tests![
        protected_mode_keeps_containers_out: [Need::Program(SERVER), Need::Program("redis-cli")],
        a_hundred_thousand_pipelined_commands: [Need::Program(SERVER), Need::Program("redis-cli")],
        blocked_pop_and_subscription_wait_and_are_woken: [Need::Program(SERVER), Need::Program("redis-cli")],
    ]
}

struct Redis {
    _server: Server,
    folder: TempDir,
}

impl Redis {
    fn start(scene: &Scene, options: &[&str]) -> Result<Redis> {
        let folder = server::folder()?;
        let mut command = scene.lab.host().command(SERVER);
        command.arg0("redis-server").args(["--bind", "127.0.0.1", "--port", "6379", "--save", ""]);
        command.arg("--dir").arg(folder.path()).args(options);
        let server = Server::start("redis", command, scene.lab.host(), "127.0.0.1:6379".parse()?)?;
        Ok(Redis { _server: server, folder })
    }
}

/// Behind a rule that shows the container, without the protected mode.
fn open_to_containers() -> Result<(Scene, Redis)> {
    let scene = Scene::new()?;
    let redis = Redis::start(&scene, &["--protected-mode", "no"])?;
    scene.allow(&["6379", "--path", "relay"])?;
    scene.must_be(6379, "relayed")?;
    Ok((scene, redis))
}

/// `redis-cli` in the container.
fn cli(scene: &Scene, port: u16, arguments: &[&str]) -> Command {
    let mut command = scene.container.command("redis-cli");
    command.args(["-h", &scene.gateway(port).ip().to_string(), "-p", &port.to_string()]).args(arguments);
    command
}

fn protected_mode_keeps_containers_out() -> Result<()> {
    let scene = Scene::new()?;
    let _redis = Redis::start(&scene, &[])?;
    scene.allow(&["6379", "--path", "relay"])?;
    scene.must_be(6379, "relayed")?;
    let denied = server::output(&mut cli(&scene, 6379, &["ping"]))?;
    let said = String::from_utf8_lossy(&denied.stdout);
    // It says so and closes at once; the command that comes in meanwhile makes that a reset.
    ensure!(!said.contains("PONG"), "{denied:?}");
    ensure!(said.contains("DENIED") || !denied.stderr.is_empty(), "{denied:?}");
    let mut silent = lbridge_tests::harness::client::dial(
        &scene.container,
        None,
        scene.gateway(6379),
        patience::seconds(5),
    )?;
    silent.set_read_timeout(Some(patience::seconds(5)))?;
    let mut all = String::new();
    silent.read_to_string(&mut all)?;
    ensure!(all.starts_with("-DENIED Redis is running in protected mode"), "{all}");

    scene.allow(&["16379=6379", "--path", "relay", "--source", "loopback"])?;
    let served = server::line(&mut cli(&scene, 16379, &["ping"]))?;
    ensure!(served == "PONG", "{served}");
    Ok(())
}

fn a_hundred_thousand_pipelined_commands() -> Result<()> {
    const COMMANDS: usize = 100_000;
    let (scene, redis) = open_to_containers()?;
    let mut commands = String::new();
    for number in 0..COMMANDS {
        let (key, value) = (format!("key:{number}"), "x".repeat(number % 97));
        let (k, v) = (key.len(), value.len());
        write!(commands, "*3\r\n$3\r\nSET\r\n${k}\r\n{key}\r\n${v}\r\n{value}\r\n")?;
    }
    let file = server::file_of(redis.folder.path(), "commands", commands.as_bytes())?;
    let piped = cli(&scene, 6379, &["--pipe"]).stdin(File::open(&file)?).output()?;
    let said = String::from_utf8_lossy(&piped.stdout);
    ensure!(said.contains(&format!("errors: 0, replies: {COMMANDS}")), "{piped:?}");
    ensure!(server::line(&mut cli(&scene, 6379, &["dbsize"]))? == COMMANDS.to_string());
    for number in [0, 96, 4711, COMMANDS - 1] {
        let value = server::line(&mut cli(&scene, 6379, &["get", &format!("key:{number}")]))?;
        ensure!(value == "x".repeat(number % 97), "key:{number} is {value:?}");
    }

    let mut benchmark = scene.container.command("redis-benchmark");
    benchmark.args(["-h", "10.7.0.1", "-p", "6379", "-P", "64", "-n", "100000", "-c", "20", "-q"]);
    let report = server::line(benchmark.args(["-t", "set,get,lrange_100"]))?;
    let rates: Vec<_> =
        report.split(['\r', '\n']).filter(|line| line.contains("requests per second")).collect();
    ensure!(rates.iter().any(|rate| rate.starts_with("GET")), "{report}");
    Ok(())
}

fn spawn(command: &mut Command) -> Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start redis-cli")
}

fn blocked_pop_and_subscription_wait_and_are_woken() -> Result<()> {
    let (scene, _redis) = open_to_containers()?;
    let say = |arguments: &[&str]| server::line(&mut cli(&scene, 6379, arguments));
    let until = |what: &str, arguments: &[&str], answer: &str| {
        patience::until(what, || Ok(say(arguments)?.lines().any(|line| line == answer).then_some(())))
    };

    let popping = spawn(&mut cli(&scene, 6379, &["blpop", "queue", "0"]))?;
    until("a client blocks", &["info", "clients"], "blocked_clients:1")?;
    thread::sleep(Duration::from_secs(1));
    let pushed = Instant::now();
    say(&["rpush", "queue", "work"])?;
    let popped = popping.wait_with_output()?;
    ensure!(popped.stdout == b"queue\nwork\n", "{popped:?}");
    ensure!(pushed.elapsed() < patience::seconds(1), "only after {:?}", pushed.elapsed());

    let mut subscriber = spawn(&mut cli(&scene, 6379, &["subscribe", "news"]))?;
    until("a client subscribes", &["pubsub", "numsub", "news"], "1")?;
    let mut publisher = cli(&scene, 6379, &[]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let mut said = String::new();
    (0..1000).try_for_each(|number| writeln!(said, "publish news {number}"))?;
    std::io::Write::write_all(&mut publisher.stdin.take().context("no pipe")?, said.as_bytes())?;
    ensure!(publisher.wait()?.success());
    let mut heard = subscriber.stdout.take().context("no pipe")?;
    let mut expected = "subscribe\nnews\n1\n".to_owned();
    (0..1000).try_for_each(|number| writeln!(expected, "message\nnews\n{number}"))?;
    let mut text = vec![0; expected.len()];
    heard.read_exact(&mut text).context("not all was heard")?;
    ensure!(text == expected.as_bytes(), "{}", String::from_utf8_lossy(&text));
    // A subscriber that is killed is gone for the server, too.
    subscriber.kill()?;
    subscriber.wait()?;
    until("nobody subscribes", &["pubsub", "numsub", "news"], "0")
}

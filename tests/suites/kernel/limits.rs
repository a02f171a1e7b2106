//! Tests of what a rule asks of its relay: limits, the PROXY protocol; and how a daemon stops.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::service::{self, Answer, Service};
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::sys::signal::Signal;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        connections_over_the_limit_are_refused_and_counted,
        the_limit_is_the_rules_not_the_gateways,
        an_idle_connection_is_reset,
        the_proxy_protocol_tells_who_connects,
        what_only_a_relay_can_do_is_refused_to_steer,
        a_stop_lets_connections_end,
        a_stop_does_not_wait_for_ever,
        a_second_signal_stops_at_once,
    ]
}

fn service_8080(scene: &Scene) -> Result<Service> {
    scene.service("limited", "127.0.0.1:8080")
}

fn refusals(scene: &Scene, port: u16) -> Result<u64> {
    let rule = scene.daemon.rule("bridge:lab0", port)?.context("no such rule")?;
    rule["refused"].as_u64().context("no count of refusals")
}

fn connections_over_the_limit_are_refused_and_counted() -> Result<()> {
    let scene = Scene::new()?;
    let _service = service_8080(&scene)?;
    scene.allow(&["8080", "--max-connections", "2"])?;
    let state = scene.must_be(8080, "relayed")?;
    state.must_be_because("needs_relay")?;
    let first = client::connect(&scene.container, scene.gateway(8080))?;
    let _second = client::connect(&scene.container, scene.gateway(8080))?;
    for _ in 0..3 {
        scene.refused(8080)?;
    }
    ensure!(refusals(&scene, 8080)? == 3, "counted");
    let told = scene.daemon.log().matches("too many connections").count();
    ensure!(told == 1, "told once, not {told} times");
    drop(first);
    scene.soon_served(8080, "limited").map(drop)
}

fn the_limit_is_the_rules_not_the_gateways() -> Result<()> {
    let scene = Scene::with(("10.7.0.1/24 fd07::1/64", "10.7.0.2/24 fd07::2/64"), Options::default())?;
    let _service = service_8080(&scene)?;
    scene.allow(&["8080", "--max-connections", "1"])?;
    let _four = client::connect(&scene.container, "10.7.0.1:8080".parse()?)?;
    client::refused(&scene.container, "[fd07::1]:8080".parse()?)
}

fn an_idle_connection_is_reset() -> Result<()> {
    let scene = Scene::new()?;
    let _service = service_8080(&scene)?;
    scene.allow(&["8080", "--idle-timeout", "1s"])?;
    let mut busy = client::connect(&scene.container, scene.gateway(8080))?;
    let idle = client::connect(&scene.container, scene.gateway(8080))?;
    let started = Instant::now();
    let watch = thread::spawn(move || {
        let over = idle.must_be_over();
        (over, started.elapsed())
    });
    while !watch.is_finished() {
        busy.echo(b"not idle")?;
        thread::sleep(Duration::from_millis(100));
        ensure!(started.elapsed() < patience::seconds(10), "the idle one goes on and on");
    }
    let (over, after) = watch.join().map_err(|_| anyhow::anyhow!("panicked"))?;
    over?;
    ensure!(after > Duration::from_millis(700), "after {after:?}: too early");
    busy.echo(b"still here")
}

/// A service that sends back what it gets shows the header to its client.
fn the_proxy_protocol_tells_who_connects() -> Result<()> {
    let scene = Scene::new()?;
    let options =
        service::Options { answer: Answer::SilentEcho, ..service::Options::new("told", "127.0.0.1:8080")? };
    let _service = scene.service_with(&options)?;
    scene.allow(&["8080", "--proxy-protocol", "v1"])?;
    let mut stream = dial(&scene, 8080)?;
    let expected =
        format!("PROXY TCP4 10.7.0.2 10.7.0.1 {} 8080\r\n", stream.local_addr()?.port()).into_bytes();
    let mut header = vec![0; expected.len()];
    stream.read_exact(&mut header)?;
    ensure!(header == expected, "{:?}", String::from_utf8_lossy(&header));

    scene.allow(&["8081=8080", "--proxy-protocol", "v2"])?;
    let mut stream = dial(&scene, 8081)?;
    let port = stream.local_addr()?.port().to_be_bytes();
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    // Signature, version 2 and PROXY, TCP over IPv4, 12 bytes: addresses, ports (section 2.2 of the
    // protocol's text).
    let fixed = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\x0a\x07\x00\x02\x0a\x07\x00\x01";
    ensure!(
        header[..24] == *fixed && header[24..26] == port && header[26..] == 8081_u16.to_be_bytes(),
        "{header:?}"
    );
    Ok(())
}

fn dial(scene: &Scene, port: u16) -> Result<TcpStream> {
    let stream = client::dial(&scene.container, None, scene.gateway(port), patience::seconds(5))?;
    stream.set_read_timeout(Some(patience::seconds(5)))?;
    Ok(stream)
}

fn what_only_a_relay_can_do_is_refused_to_steer() -> Result<()> {
    let scene = Scene::new()?;
    for option in [["--max-connections", "5"], ["--idle-timeout", "5m"], ["--proxy-protocol", "v1"]] {
        let output =
            scene.daemon.cli(&["allow", "bridge:lab0", "8080", "--path", "steer", option[0], option[1]])?;
        ensure!(output.status == 2 && output.stderr.contains("only a relay"), "{output:?}");
    }
    for option in [
        ["--max-connections", "0"],
        ["--max-connections", "-1"],
        ["--idle-timeout", "0s"],
        ["--idle-timeout", "soon"],
        ["--idle-timeout", "-5s"],
        ["--proxy-protocol", "v3"],
    ] {
        let output = scene.daemon.cli(&["allow", "bridge:lab0", "8080", option[0], option[1]])?;
        ensure!(output.status == 2 && output.stderr.lines().count() == 1, "{option:?}: {output:?}");
    }
    ensure!(scene.daemon.rule("bridge:lab0", 8080)?.is_none(), "nothing is kept");
    Ok(())
}

fn draining(timeout: &str) -> Result<(Scene, Service)> {
    let config = format!("drain_timeout = \"{timeout}\"\n");
    let scene = Scene::with(V4, Options { config, ..Options::default() })?;
    let service = service_8080(&scene)?;
    scene.allow(&["8080", "--path", "relay"])?;
    Ok((scene, service))
}

fn a_stop_lets_connections_end() -> Result<()> {
    let (mut scene, _service) = draining("1m")?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    scene.daemon.signal(Signal::SIGTERM)?;
    patience::until("no new connection is taken", || {
        Ok(matches!(client::attempt(&scene.container, scene.gateway(8080)), Attempt::Refused(_))
            .then_some(()))
    })?;
    open.echo(b"still here")?;
    ensure!(scene.daemon.is_running()?, "it waits");
    open.finish()?;
    let status = scene.daemon.wait_for_end()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

fn a_stop_does_not_wait_for_ever() -> Result<()> {
    let (mut scene, _service) = draining("500ms")?;
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    let started = Instant::now();
    scene.daemon.signal(Signal::SIGTERM)?;
    let status = scene.daemon.wait_for_end()?;
    ensure!(status.success() && started.elapsed() >= Duration::from_millis(500), "{:?}", started.elapsed());
    let cut_off = open.stream().read(&mut [0]).map_err(|error| error.kind());
    ensure!(cut_off == Err(ErrorKind::ConnectionReset), "cut off, not finished: {cut_off:?}");
    ensure!(scene.daemon.log().contains("relayed_cut_off=1"), "says so");
    Ok(())
}

fn a_second_signal_stops_at_once() -> Result<()> {
    let (mut scene, _service) = draining("10m")?;
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    scene.daemon.signal(Signal::SIGTERM)?;
    thread::sleep(Duration::from_millis(200));
    ensure!(scene.daemon.is_running()?, "it waits");
    scene.daemon.signal(Signal::SIGTERM)?;
    scene.daemon.wait_for_end()?;
    open.must_be_over()
}

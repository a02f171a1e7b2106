//! What systemd is told, and what it does to the daemon.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::systemd::Systemd;
use lbridge_tests::harness::traffic::Traffic;
use lbridge_tests::tests;

use crate::{RELAY_8080, Scene, UNIT, Unit};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        nothing_reaches_the_machine,
        start_returns_when_rules_are_in_force,
        a_start_that_fails_is_told,
        stop_leaves_nothing_listening,
        a_stop_may_take_as_long_as_the_drain,
        steered_connections_do_not_notice_a_restart: [Need::RegistersAlone],
        steered_connections_do_not_notice_a_kill: [Need::RegistersAlone],
        relays_come_back_after_a_kill,
    ]
}

fn nothing_reaches_the_machine() -> Result<()> {
    let files = ["/etc/lbridge-tests", "/usr/lbridge-tests", "/tmp/lbridge-tests", "/dev/lbridge-tests"];
    let systemd = Systemd::boot()?;
    for file in files {
        fs::write(systemd.path(file), "gone with systemd")?;
        ensure!(!Path::new(file).exists(), "{file} is the machine's");
    }
    for file in
        ["/proc/sys/kernel/panic", "/proc/sysrq-trigger", "/sys/kernel/uevent_seqnum", "/sys/power/state"]
    {
        let written = fs::OpenOptions::new().write(true).open(systemd.path(file));
        ensure!(written.is_err(), "{file} can be written");
    }
    let pid_1 = |kind: &str| systemd.run("readlink", &[&format!("/proc/1/ns/{kind}")]);
    for kind in ["pid", "mnt", "net", "uts", "ipc", "cgroup"] {
        let own = fs::read_link(format!("/proc/self/ns/{kind}"))?;
        ensure!(pid_1(kind)?.stdout.trim() != own.to_string_lossy(), "{kind}: the test's");
    }
    ensure!(systemd.run("ls", &["/sys/fs/bpf"])?.stdout.replace("maps.debug\nprogs.debug\n", "").is_empty());
    drop(systemd);
    // init, and this one.
    let processes = fs::read_dir("/proc")?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
    ensure!(processes.count() == 2, "systemd is gone, and what it started");
    Ok(())
}

fn start_returns_when_rules_are_in_force() -> Result<()> {
    let scene = Scene::prepare(Unit::default(), RELAY_8080)?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.systemd.must(&["start", UNIT])?;
    scene.served(8080, "relayed")?;
    ensure!(scene.systemd.journal(UNIT)?.contains("ready: 1 rules: 0 steered, 1 relayed"), "its last words");
    let status = scene.systemd.must(&["status", "--no-pager", "--full", UNIT])?.stdout;
    ensure!(status.contains("Active: active (running)"), "{status}");
    ensure!(status.contains("ready: 1 rules"), "{status}");
    scene.systemd.must(&["stop", UNIT])?;
    ensure!(scene.property("ActiveState")? == "inactive" && scene.property("Result")? == "success");
    ensure!(scene.property("ExecMainStatus")? == "0" && scene.property("NRestarts")? == "0");
    ensure!(scene.systemd.journal(UNIT)?.contains("stopped; what the kernel steers stays in force"));
    ensure!(scene.cli(&["status"])?.status == 3, "no daemon");
    Ok(())
}

fn a_start_that_fails_is_told() -> Result<()> {
    let scene = Scene::prepare(Unit::default(), "[[rule]\n")?;
    let output = scene.systemd.systemctl(&["start", UNIT])?;
    ensure!(output.status == 1, "{output:?}");
    ensure!(scene.systemd.journal(UNIT)?.contains("/etc/lbridge/lbridge.toml"), "says which file");
    scene.configure("")?;
    // Restart=on-failure.
    scene.wait_for("ActiveState", "active")
}

/// systemd gets the sockets on every stop, since the daemon cannot know what comes next, and closes them if nothing does.
fn stop_leaves_nothing_listening() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    ensure!(scene.listens(8080)?);
    scene.systemd.must(&["stop", UNIT])?;
    patience::until("systemd closes the sockets", || Ok((!scene.listens(8080)?).then_some(())))?;
    scene.refused(8080)?;
    ensure!(scene.property("NFileDescriptorStore")? == "0");
    scene.systemd.must(&["start", UNIT])?;
    scene.served(8080, "relayed").map(drop)
}

fn a_stop_may_take_as_long_as_the_drain() -> Result<()> {
    let unit = Unit { stop: "500ms", ..Unit::default() };
    let scene = Scene::prepare(unit, "drain_timeout = \"2s\"\n")?;
    scene.systemd.must(&["start", UNIT])?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    let start = Instant::now();
    scene.systemd.must(&["stop", UNIT])?;
    ensure!(start.elapsed().as_secs() >= 2, "after {:?}", start.elapsed());
    ensure!(scene.property("Result")? == "success", "not killed: {}", scene.property("Result")?);
    open.must_be_over()
}

/// The rule first: the kernel notes the socket. A daemon that comes later would have to take it from its process, which
/// it does not see.
fn steered(scene: &Scene) -> Result<Service> {
    scene.lbridge(&["allow", "bridge:lab0", "8080", "--path", "steer"])?;
    let service = scene.service("steered", "127.0.0.1:8080")?;
    scene.served(8080, "steered")?;
    Ok(service)
}

fn steered_connections_do_not_notice_a_restart() -> Result<()> {
    let scene = Scene::new()?;
    let _service = steered(&scene)?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    let traffic = Traffic::start(&scene.container, scene.gateway(8080), "steered");
    for _ in 0..3 {
        traffic.flows(50)?;
        scene.restart()?;
        open.echo(b"still here")?;
    }
    scene.systemd.must(&["stop", UNIT])?;
    traffic.flows(50)?;
    scene.systemd.must(&["start", UNIT])?;
    traffic.flows(50)?;
    open.echo(b"still here")?;
    traffic.all_served()
}

fn steered_connections_do_not_notice_a_kill() -> Result<()> {
    let scene = Scene::new()?;
    let _service = steered(&scene)?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    let traffic = Traffic::start(&scene.container, scene.gateway(8080), "steered");
    for kills in 1..=3 {
        traffic.flows(50)?;
        kill(&scene)?;
        ensure!(scene.property("NRestarts")? == kills.to_string());
        open.echo(b"still here")?;
    }
    traffic.flows(50)?;
    traffic.all_served()
}

/// What is killed gives no sockets to anybody: refused is who comes meanwhile, and nobody for longer.
fn relays_come_back_after_a_kill() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    kill(&scene)?;
    open.must_be_over()?;
    scene.served(8080, "relayed")?;

    let traffic = Traffic::start(&scene.container, scene.gateway(8080), "relayed");
    traffic.flows(20)?;
    kill(&scene)?;
    traffic.flows(20)?;
    // Refused or reset, at once: what hangs is neither.
    let failures = traffic.failures()?;
    let at_once =
        |text: &String| text.contains("refused") || text.contains("reset") || text.contains("closed before");
    ensure!(failures.iter().all(at_once), "{failures:?}");
    let last = client::attempt(&scene.container, scene.gateway(8080));
    ensure!(matches!(last, Attempt::Served(_)), "{last:?}");
    Ok(())
}

/// Kills the daemon, and waits for the next.
fn kill(scene: &Scene) -> Result<()> {
    let before = scene.main_pid()?;
    scene.systemd.must(&["kill", "--signal=KILL", UNIT])?;
    scene.wait_for_another(before)
}

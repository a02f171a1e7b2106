//! Tests of what systemd is told, and what it does to the daemon.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::systemd::Systemd;
use lbridge_tests::harness::traffic::Traffic;
use lbridge_tests::tests;
use nix::sys::ptrace;
use nix::sys::signal::{self, Signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::{RELAY_8080, Scene, UNIT, Unit, join};

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
        systemctl_reload_tells_what_is_wrong,
        the_status_is_told_as_it_changes,
        a_daemon_that_is_stopped_is_replaced: [Need::RegistersAlone],
        a_loop_that_hangs_is_replaced,
        a_journal_that_hangs_holds_nothing_up,
        a_loop_without_work_is_alive,
        a_drain_may_take_longer_than_the_watchdog_waits,
        docker_may_come_later: [
            Need::Program("dockerd"),
            Need::Program("docker"),
            Need::File("/bin/busybox")
        ],
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
    ensure!(
        scene.systemd.journal(UNIT)?.contains("daemon ready rules=1 steered=0 relayed=1 "),
        "its last words"
    );
    // The journal has the time, and the severity.
    let journal = scene.systemd.journal(UNIT)?;
    ensure!(journal.lines().any(|line| line.starts_with("daemon ready ")), "{journal}");
    let serious =
        scene.systemd.shell(&format!("journalctl --quiet --output=cat --unit={UNIT} --priority=warning"))?;
    ensure!(!serious.contains("daemon ready "), "{serious}");
    let status = scene.systemd.must(&["status", "--no-pager", "--full", UNIT])?.stdout;
    ensure!(status.contains("Active: active (running)"), "{status}");
    ensure!(status.contains("daemon ready rules=1 "), "{status}");
    scene.systemd.must(&["stop", UNIT])?;
    ensure!(scene.property("ActiveState")? == "inactive" && scene.property("Result")? == "success");
    ensure!(scene.property("ExecMainStatus")? == "0" && scene.property("NRestarts")? == "0");
    ensure!(scene.systemd.journal(UNIT)?.contains("daemon stopped; steered rules stay in force"));
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

/// systemd gets the sockets on every stop, since the daemon cannot know what comes next, and closes them if
/// nothing does.
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

/// The rule first: the kernel notes the socket. A daemon that comes later would have to take it from its
/// process, which it does not see.
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

/// A daemon that is killed gives no sockets to anybody: refused is who comes meanwhile, and nobody for
/// longer.
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

fn systemctl_reload_tells_what_is_wrong() -> Result<()> {
    let scene = Scene::with(RELAY_8080)?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    let mut open =
        patience::until("relayed", || Ok(client::connect(&scene.container, scene.gateway(8080)).ok()))?;
    let pid = scene.main_pid()?;
    scene.configure(&format!("{RELAY_8080}[[rule]]\nnetwork = \"bridge:lab0\"\nport = \"8081=8080\"\n"))?;
    scene.systemd.must(&["reload", UNIT])?;
    scene.lbridge(&["deny", "bridge:lab0", "8080"]).expect_err("it is the file's");
    ensure!(scene.systemd.journal(UNIT)?.contains("added    bridge:lab0 8081: "), "what has changed");

    scene.configure("[[rule]]\nnetwork = \"bridge:lab0\"\nprot = 80\n")?;
    let output = scene.systemd.systemctl(&["reload", UNIT])?;
    ensure!(output.status == 1, "{output:?}");
    let status = scene.systemd.run("systemctl", &["status", "--no-pager", "--full", UNIT])?.stdout;
    ensure!(
        status.contains("/etc/lbridge/lbridge.toml:3:1: ") && status.contains("active (running)"),
        "{status}"
    );
    ensure!(status.contains("; configuration not reloaded\""), "{status}");
    ensure!(scene.lbridge(&["status"])?.stdout.contains("config   not reloaded since "));

    scene.configure(RELAY_8080)?;
    scene.systemd.must(&["kill", "--kill-who=main", "--signal=HUP", UNIT])?;
    scene.wait_for("StatusText", "1 rule: 0 steered, 1 relayed, 0 waiting, 0 blocked")?;
    open.echo(b"still here")?;
    ensure!(scene.main_pid()? == pid && scene.property("ActiveState")? == "active");
    Ok(())
}

fn the_status_is_told_as_it_changes() -> Result<()> {
    let scene = Scene::new()?;
    scene.wait_for("StatusText", "0 rules: 0 steered, 0 relayed, 0 waiting, 0 blocked")?;
    scene.lbridge(&["allow", "bridge:lab0", "8080", "--path", "relay"])?;
    scene.wait_for("StatusText", "1 rule: 0 steered, 0 relayed, 1 waiting, 0 blocked")?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.wait_for("StatusText", "1 rule: 0 steered, 1 relayed, 0 waiting, 0 blocked")
}

/// With a watchdog that does not let the test wait.
fn watched(config: &str) -> Result<Scene> {
    let scene = Scene::prepare(Unit { watchdog: "3s", ..Unit::default() }, config)?;
    scene.systemd.must(&["start", UNIT])?;
    Ok(scene)
}

fn replaced_by_the_watchdog(scene: &Scene, before: u32) -> Result<()> {
    scene.wait_for_another(before)?;
    ensure!(scene.property("NRestarts")? == "1");
    let journal = scene.systemd.run("journalctl", &["--quiet", "--unit", UNIT])?.stdout;
    ensure!(journal.contains("Watchdog timeout"), "{journal}");
    Ok(())
}

fn a_daemon_that_is_stopped_is_replaced() -> Result<()> {
    let scene = watched("")?;
    let _service = steered(&scene)?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    let traffic = Traffic::start(&scene.container, scene.gateway(8080), "steered");
    let before = scene.main_pid()?;
    scene.systemd.must(&["kill", "--signal=STOP", UNIT])?;
    replaced_by_the_watchdog(&scene, before)?;
    open.echo(b"still here")?;
    traffic.flows(50)?;
    traffic.all_served()
}

/// The thread of the loop is held, as by a lock that nobody gives back; every other goes on.
/// Whoever hangs is the journal, and not the daemon: nothing is replaced, and what the journal has lost is
/// told there.
fn a_journal_that_hangs_holds_nothing_up() -> Result<()> {
    const JOURNAL: &str = "systemd-journald.service";
    let unit = Unit { watchdog: "3s", ..Unit::default() };
    let scene = Scene::prepare(unit, "")?;
    let says_much = "[Service]\nEnvironment=LBRIDGE_LOG=trace\nLogRateLimitIntervalSec=0\n";
    scene.drop_in(UNIT, "log.conf", says_much)?;
    scene.systemd.must(&["daemon-reload"])?;
    scene.systemd.must(&["start", UNIT])?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    let pid = scene.main_pid()?;
    let journal = scene.systemd.seen_from_outside(scene.systemd.property(JOURNAL, "MainPID")?.parse()?)?;
    signal::kill(Pid::from_raw(journal), Signal::SIGSTOP)?;
    // More than socket and queue hold; and for longer than the watchdog waits.
    let begun = Instant::now();
    let mut rounds = 0;
    while rounds < 60 || begun.elapsed() < patience::seconds(4) {
        scene.lbridge(&["allow", "bridge:lab0", "20000-20090"])?;
        scene.lbridge(&["deny", "bridge:lab0", "20000-20090"])?;
        open.echo(b"still open")?;
        rounds += 1;
    }
    signal::kill(Pid::from_raw(journal), Signal::SIGCONT)?;
    ensure!(scene.main_pid()? == pid && scene.property("NRestarts")? == "0", "the daemon was replaced");
    patience::until("the journal tells what it has lost", || {
        let warnings = format!("journalctl --quiet --output=cat --unit={UNIT} --priority=warning");
        Ok(scene.systemd.shell(&warnings)?.contains(" log lines were lost here: ").then_some(()))
    })?;
    scene.lbridge(&["allow", "bridge:lab0", "7000"])?;
    open.echo(b"still open")?;
    drop(open);
    scene.systemd.must(&["stop", UNIT])?;
    ensure!(
        scene.systemd.journal(UNIT)?.contains("daemon stopped; steered rules stay in force"),
        "its last words"
    );
    Ok(())
}

fn a_loop_that_hangs_is_replaced() -> Result<()> {
    let scene = watched("")?;
    let before = scene.main_pid()?;
    let main_thread = Pid::from_raw(scene.systemd.seen_from_outside(before)?);
    ptrace::seize(main_thread, ptrace::Options::empty())?;
    ptrace::interrupt(main_thread)?;
    waitpid(main_thread, None)?;
    // Its end is told to us first; systemd hears of it when we have.
    let end = thread::spawn(move || waitpid(main_thread, None));
    replaced_by_the_watchdog(&scene, before)?;
    ensure!(matches!(join(end)?, Ok(WaitStatus::Signaled(..))));
    Ok(())
}

fn a_loop_without_work_is_alive() -> Result<()> {
    let scene = watched("")?;
    let mut seen = BTreeSet::new();
    patience::until("signs of life, and again", || {
        seen.insert(scene.property("WatchdogTimestampMonotonic")?);
        Ok((seen.len() > 4).then_some(()))
    })?;
    ensure!(scene.property("NRestarts")? == "0");
    Ok(())
}

/// systemd does not watch a unit that stops.
fn a_drain_may_take_longer_than_the_watchdog_waits() -> Result<()> {
    let scene = watched("drain_timeout = \"5s\"\n")?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let _open = client::connect(&scene.container, scene.gateway(8080))?;
    let start = Instant::now();
    scene.systemd.must(&["stop", UNIT])?;
    ensure!(start.elapsed().as_secs() >= 5, "after {:?}", start.elapsed());
    ensure!(scene.property("Result")? == "success", "{}", scene.property("Result")?);
    Ok(())
}

/// An order, no need: lbridge is up without Docker, and serves its containers when it has come.
fn docker_may_come_later() -> Result<()> {
    let scene = Scene::prepare(Unit { docker: true, ..Unit::default() }, "")?;
    // What it writes goes with the sandbox.
    let text = "[Service]\nType=notify\nDelegate=yes\nKillSignal=SIGKILL\n\
                ExecStart=dockerd --data-root /run/docker-data --exec-opt native.cgroupdriver=cgroupfs \
                --iptables=false --ip6tables=false --bridge=none\n";
    scene.systemd.install_unit("docker.service", text)?;
    scene.systemd.must(&["start", UNIT])?;
    ensure!(scene.systemd.property("docker.service", "ActiveState")? == "inactive", "not started by lbridge");
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let output = scene.lbridge(&["allow", "container:alone", "8080"])?;
    ensure!(output.stdout.contains("waiting"), "{output:?}");

    scene.systemd.must(&["start", "docker.service"])?;
    scene.systemd.shell("tar -C / -c bin/busybox | docker import - lab")?;
    scene.systemd.shell(
        "docker run --detach --stop-timeout 0 --name alone --network none lab /bin/busybox sleep 1000",
    )?;
    let pid = scene.systemd.shell("docker inspect --format '{{.State.Pid}}' alone")?;
    let netns = scene.systemd.netns_of(pid.trim())?;
    patience::until("the container is served", || {
        Ok(client::served_by(&netns, "127.0.0.1:8080".parse()?, "host's").ok())
    })?;
    scene.systemd.must(&["stop", "docker.service"])?;
    ensure!(scene.property("ActiveState")? == "active", "not stopped with it");
    Ok(())
}

//! Another configuration for a daemon that runs, and a look at one without a daemon.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::{Options, Output};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;

use crate::one_line;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        what_changed_is_applied_and_told,
        what_is_unchanged_goes_on,
        a_file_of_no_use_changes_nothing_and_is_told,
        a_rule_that_contradicts_allow_is_refused,
        rules_of_allow_are_untouched,
        sighup_reloads,
        a_terminal_that_goes_ends_the_daemon,
        check_config_needs_no_daemon,
        every_thread_gives_up_what_it_does_not_need,
    ]
}

fn rule(port: &str, more: &str) -> String {
    format!("[[rule]]\nnetwork = \"bridge:lab0\"\nport = {port}\n{more}\n")
}

fn start(config: &str) -> Result<Scene> {
    Scene::with(V4, Options { config: config.to_owned(), ..Options::default() })
}

fn configure(scene: &Scene, config: &str) -> Result<()> {
    Ok(fs::write(scene.daemon.config(), config)?)
}

fn reload(scene: &Scene) -> Result<Output> {
    scene.daemon.cli(&["reload"])
}

fn what_changed_is_applied_and_told() -> Result<()> {
    let scene = start(&[rule("8080", ""), rule("8081", ""), rule("8082", "comment = \"a\"")].concat())?;
    let services = ["8080", "8081", "8082", "8083"];
    let _services: Vec<_> = services
        .iter()
        .map(|port| scene.service(port, &format!("127.0.0.1:{port}")))
        .collect::<Result<_>>()?;
    scene.soon_served(8080, "8080")?;
    let output = reload(&scene)?;
    ensure!(output.status == 0 && output.stdout == "nothing has changed\n", "{output:?}");

    let rules = [rule("8080", ""), rule("\"8081=8083\"", ""), rule("8083", "path = \"relay\"")];
    configure(&scene, &format!("drain_timeout = \"1m\"\n{}", rules.concat()))?;
    let output = reload(&scene)?;
    let told = [
        "added    bridge:lab0 8083: 10.7.0.1:8083 -> 127.0.0.1:8083 relayed (as the rule asks)",
        "changed  bridge:lab0 8081: 10.7.0.1:8081 -> 127.0.0.1:8083 steered",
        "removed  bridge:lab0 8082; open connections go on",
        "changed  drain_timeout: 1m, was 5s",
    ];
    ensure!(output.status == 0 && output.stdout.lines().eq(told), "{}", output.stdout);
    for (port, service) in [(8080, "8080"), (8081, "8083"), (8083, "8083")] {
        scene.served(port, service)?;
    }
    scene.refused(8082)?;

    configure(&scene, "")?;
    let output = scene.daemon.cli(&["reload", "--json"])?;
    let told: serde_json::Value = serde_json::from_str(&output.stdout)?;
    ensure!(told["removed"].as_array().is_some_and(|removed| removed.len() == 3), "{told}");
    ensure!(told["settings"][0]["now"] == "5s", "{told}");
    scene.refused(8080)
}

fn what_is_unchanged_goes_on() -> Result<()> {
    let scene = start(&[rule("8080", "path = \"relay\""), rule("8081", "")].concat())?;
    let _relayed = scene.service("relayed", "127.0.0.1:8080")?;
    let _steered = scene.service("steered", "127.0.0.1:8081")?;
    scene.soon_served(8080, "relayed")?;
    scene.soon_served(8081, "steered")?;
    let mut open = [8080, 8081].map(|port| client::connect(&scene.container, scene.gateway(port)));
    let served = |port| -> Result<u64> {
        let rule = scene.daemon.rule("bridge:lab0", port)?.context("the rule")?;
        rule["gateways"][0]["connections"].as_u64().context("a count")
    };
    let before = [served(8080)?, served(8081)?];
    ensure!(before.iter().all(|count| *count >= 2), "{before:?}");
    let more = [rule("8080", "path = \"relay\""), rule("8081", "comment = \"other\""), rule("8082", "")];
    configure(&scene, &more.concat())?;
    ensure!(reload(&scene)?.status == 0);
    for connection in &mut open {
        connection.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?.echo(b"still here")?;
    }
    ensure!([served(8080)?, served(8081)?] == before, "counters go on");
    ensure!(scene.daemon.rule("bridge:lab0", 8081)?.context("the rule")?["comment"] == "other");
    Ok(())
}

fn a_file_of_no_use_changes_nothing_and_is_told() -> Result<()> {
    let scene = start(&rule("8080", ""))?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.soon_served(8080, "service")?;
    let mut since = None;
    for (text, place, words) in [
        (rule("8081", "sauce = 1"), ":4:1: ", "write source"),
        ("[[rule]".to_owned(), ":1:", ""),
        ([rule("8081", ""), rule("\"8081=82\"", "")].concat(), ":5:1: ", "remove one"),
    ] {
        let before = crate::state(&scene.daemon)?;
        configure(&scene, &text)?;
        let output = reload(&scene)?;
        let line = one_line(&output, 1)?;
        ensure!(line.contains(&format!("lbridge.toml{place}")) && line.contains(words), "{line}");
        ensure!(crate::state(&scene.daemon)? == before, "{text} changed something");
        scene.served(8080, "service")?;
        let status = scene.daemon.status()?;
        let refused = &status["refused_reload"];
        ensure!(refused["error"].as_str().is_some_and(|error| error.contains(place)), "{refused}");
        let first = since.get_or_insert_with(|| refused["since"].clone());
        ensure!(*first == refused["since"], "since the first of them");
        let status = scene.daemon.cli(&["status"])?.stdout;
        let told = |line: &str| line.starts_with("config   not reloaded since ") && line.contains(place);
        ensure!(status.lines().any(told), "{status}");
        scene.daemon.wait_for_log("configuration not reloaded")?;
    }
    configure(&scene, &rule("8080", ""))?;
    ensure!(reload(&scene)?.status == 0);
    ensure!(scene.daemon.status()?["refused_reload"].is_null());
    ensure!(!scene.daemon.cli(&["status"])?.stdout.contains("not reloaded"));
    Ok(())
}

fn a_rule_that_contradicts_allow_is_refused() -> Result<()> {
    let scene = start("")?;
    scene.allow(&["8080", "--source", "loopback"])?;
    configure(&scene, &[rule("8081", ""), rule("8080", "")].concat())?;
    let output = reload(&scene)?;
    let line = one_line(&output, 4)?;
    ensure!(line.contains("lbridge.toml:5:1: ") && line.contains("lbridge deny bridge:lab0 8080"), "{line}");
    ensure!(scene.daemon.rule("bridge:lab0", 8081)?.is_none(), "nothing of it");
    scene.deny(&["8080"])?;
    ensure!(reload(&scene)?.status == 0);
    ensure!(scene.daemon.rule("bridge:lab0", 8080)?.context("the rule")?["origin"] == "config");
    Ok(())
}

/// One that the file has as well is theirs again once the file has it no more; a restart in between is no
/// different.
fn rules_of_allow_are_untouched() -> Result<()> {
    let mut scene = start("")?;
    scene.allow(&["8080"])?;
    scene.allow(&["8081"])?;
    let origin = |scene: &Scene, port| -> Result<Option<String>> {
        Ok(scene.daemon.rule("bridge:lab0", port)?.and_then(|rule| Some(rule["origin"].as_str()?.to_owned())))
    };
    for restart in [false, true] {
        configure(&scene, &rule("8080", ""))?;
        ensure!(reload(&scene)?.status == 0);
        ensure!(origin(&scene, 8080)?.as_deref() == Some("config"));
        // Saved meanwhile.
        scene.allow(&["8082"])?;
        scene.deny(&["8082"])?;
        if restart {
            scene.daemon.restart()?;
        }
        configure(&scene, "")?;
        ensure!(reload(&scene)?.status == 0);
        for port in [8080, 8081] {
            ensure!(origin(&scene, port)?.as_deref() == Some("cli"), "{port}, restart: {restart}");
        }
    }
    Ok(())
}

fn sighup_reloads() -> Result<()> {
    let mut scene = start("")?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    configure(&scene, &rule("8080", ""))?;
    scene.daemon.signal(Signal::SIGHUP)?;
    scene.soon_served(8080, "service")?;
    configure(&scene, "[[rule]\n")?;
    scene.daemon.signal(Signal::SIGHUP)?;
    patience::until("the error is told", || {
        Ok((!scene.daemon.status()?["refused_reload"].is_null()).then_some(()))
    })?;
    ensure!(scene.daemon.is_running()?);
    scene.served(8080, "service").map(drop)
}

/// Nobody could stop it with ^C any more.
fn a_terminal_that_goes_ends_the_daemon() -> Result<()> {
    let mut scene = Scene::new()?;
    // A host has one.
    scene.daemon.terminate()?;
    let folder = tempfile::tempdir_in("/run")?;
    let terminal = nix::pty::openpty(None, None)?;
    for end in [&terminal.master, &terminal.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    let mut command = scene.daemon.command()?;
    command.arg("run").arg("--no-docker").arg("--state-dir").arg(folder.path().join("state"));
    command.arg("--socket").arg(folder.path().join("socket")).arg("--config").arg(folder.path().join("none"));
    command.args(["--bpffs", "/sys/fs/bpf/other", "--cgroup", "/sys/fs/cgroup"]);
    let slave = terminal.slave.as_raw_fd();
    // SAFETY: both are plain system calls, and the descriptor is open in the child.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            nix::errno::Errno::result(libc::ioctl(slave, libc::TIOCSCTTY, 0))?;
            Ok(())
        });
    }
    let mut daemon = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    drop(terminal.slave);
    patience::until("it runs", || Ok(folder.path().join("socket").exists().then_some(())))?;
    let answers = || -> Result<Option<()>> {
        let mut status = scene.daemon.command()?;
        status.env("LBRIDGE_SOCKET", folder.path().join("socket")).arg("status");
        Ok(status.output()?.status.success().then_some(()))
    };
    patience::until("it answers", answers)?;
    drop(terminal.master);
    let status = patience::until("it ends", || Ok(daemon.try_wait()?))?;
    ensure!(status.success(), "{status}");
    Ok(())
}

fn check_config_needs_no_daemon() -> Result<()> {
    let mut scene = start("")?;
    scene.allow(&["8080", "--source", "loopback"])?;
    scene.daemon.terminate()?;
    let (config, state) = (scene.daemon.config(), scene.daemon.state_dir());
    let (config, state) = (config.to_str().context("path")?, state.to_str().context("path")?);
    let check = || scene.daemon.cli(&["check-config", "--config", config, "--state-dir", state]);
    for (text, said) in [
        (String::new(), "no rules, drain_timeout 5s, firewall manage"),
        (rule("1", ""), "1 rule, drain_timeout 5s, firewall manage"),
        (
            format!("drain_timeout = \"90s\"\n{}", rule("\"1-3\"", "")),
            "3 rules, drain_timeout 1m 30s, firewall manage",
        ),
    ] {
        configure(&scene, &text)?;
        let output = check()?;
        ensure!(output.status == 0 && output.stdout == format!("{config}: {said}\n"), "{output:?}");
    }
    for (text, place) in [(rule("0", ""), ":3:8: "), (rule("8080", ""), ":1:1: ")] {
        configure(&scene, &text)?;
        let output = check()?;
        let line = one_line(&output, 1)?;
        ensure!(line.contains(&format!("{config}{place}")), "{line}");
    }
    fs::remove_file(config)?;
    let output = check()?;
    ensure!(
        output.status == 0 && output.stdout.contains("does not exist, which is not an error"),
        "{output:?}"
    );
    ensure!(!fs::exists(config)?, "nothing is made");
    Ok(())
}

/// Started with all of them, as by hand.
fn every_thread_gives_up_what_it_does_not_need() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080", "--path", "relay"])?;
    scene.served(8080, "service")?;
    // CAP_DAC_OVERRIDE, NET_BIND_SERVICE, NET_ADMIN, NET_RAW, SYS_PTRACE, SYS_ADMIN
    // (include/uapi/linux/capability.h).
    let kept = [1, 10, 12, 13, 19, 21].iter().fold(0_u64, |kept, number| kept | 1 << number);
    let pid = scene.daemon.pid().context("a daemon")?;
    let mut threads = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        for (name, wanted) in [("CapEff", kept), ("CapPrm", kept), ("CapInh", 0)] {
            let set = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
            let set = u64::from_str_radix(set.context("a line of capabilities")?, 16)?;
            ensure!(set == wanted, "{name} {set:x} should be {wanted:x}: {status}");
        }
        threads += 1;
    }
    ensure!(threads > 2, "the API's, and relays'");
    Ok(())
}

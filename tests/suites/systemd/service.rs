//! `lbridge service`: the unit that it writes, and that nothing of it is left.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::Output;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::systemd;
use lbridge_tests::tests;

use crate::{Scene, UNIT};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        install_runs_it_and_purge_leaves_nothing: [Need::RegistersAlone],
        install_again_changes_what_is_different,
        a_program_that_others_can_change_is_refused,
        units_of_others_are_left_alone,
        cleanup_refuses_while_a_daemon_runs: [Need::RegistersAlone],
        an_error_says_what_is_left_to_do,
    ]
}

const UNIT_FILE: &str = "/etc/systemd/system/lbridge.service";

/// A host without a unit for lbridge. This one's is for tests alone: Docker is not followed.
fn scene() -> Result<Scene> {
    let scene = Scene::bare()?;
    let text = format!("[Service]\nExecStart=\nExecStart={} run --no-docker\n", systemd::LBRIDGE);
    scene.drop_in(UNIT, "tests.conf", &text)?;
    Ok(scene)
}

fn command(scene: &Scene, arguments: &[&str]) -> Result<Output> {
    scene.cli(&[&["service"], arguments].concat())
}

fn refused(output: &Output, words: &[&str]) -> Result<()> {
    ensure!(
        output.status == 1 && output.stdout.is_empty() && output.stderr.lines().count() == 1,
        "{output:?}"
    );
    ensure!(words.iter().all(|word| output.stderr.contains(word)), "{words:?} in {output:?}");
    Ok(())
}

fn install_runs_it_and_purge_leaves_nothing() -> Result<()> {
    let scene = scene()?;
    let said = scene.lbridge(&["service", "install"])?.stdout;
    for word in ["wrote /etc/lbridge/lbridge.toml", UNIT_FILE, "enabled", "started"] {
        ensure!(said.contains(word), "{word} in {said}");
    }
    ensure!(scene.property("ActiveState")? == "active" && scene.property("UnitFileState")? == "enabled");
    let unit = fs::read_to_string(scene.systemd.path(UNIT_FILE))?;
    for line in [" run\n", " reload\n"].map(|command| format!("={}{command}", systemd::LBRIDGE)) {
        ensure!(unit.contains(&line), "{line} in {unit}");
    }
    scene.lbridge(&["allow", "bridge:lab0", "8080"])?;
    let service = scene.service("service", "127.0.0.1:8080")?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    scene.systemd.must(&["reload", UNIT])?;

    let said = scene.lbridge(&["service", "uninstall"])?.stdout;
    ensure!(said.contains("/sys/fs/bpf/lbridge") && said.contains(UNIT_FILE), "{said}");
    scene.refused(8080)?;
    open.echo(b"still here")?;
    let exists = |path: &str| scene.systemd.path(path).exists();
    ensure!(exists("/var/lib/lbridge/rules.toml") && exists("/etc/lbridge/lbridge.toml"), "these stay");
    for path in [
        UNIT_FILE,
        "/sys/fs/bpf/lbridge",
        "/run/lbridge",
        "/etc/systemd/system/multi-user.target.wants/lbridge.service",
    ] {
        ensure!(!exists(path), "{path} is left");
    }

    scene.lbridge(&["service", "install"])?;
    service.stop();
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.served(8080, "service")?;
    scene.lbridge(&["service", "uninstall", "--purge"])?;
    for path in [
        "/var/lib/lbridge",
        "/etc/lbridge",
        UNIT_FILE,
        "/etc/systemd/system/lbridge.service.d",
        "/sys/fs/bpf/lbridge",
    ] {
        ensure!(!exists(path), "{path} is left");
    }
    scene.refused(8080)?;
    ensure!(scene.property("LoadState")? == "not-found");
    let said = scene.lbridge(&["service", "uninstall", "--purge"])?.stdout;
    ensure!(said == "nothing had to be changed\n", "{said}");
    Ok(())
}

fn install_again_changes_what_is_different() -> Result<()> {
    let scene = scene()?;
    scene.configure("drain_timeout = \"1s\"\n")?;
    ensure!(!scene.lbridge(&["service", "install"])?.stdout.contains("lbridge.toml"), "there is one");
    let first = scene.main_pid()?;
    let said = scene.lbridge(&["service", "install"])?.stdout;
    ensure!(said == "nothing had to be changed\n" && scene.main_pid()? == first, "{said}");

    // An older lbridge wrote another.
    let path = scene.systemd.path(UNIT_FILE);
    let unit = fs::read_to_string(&path)?;
    fs::write(&path, unit.replace("LimitNOFILE=", "LimitNOFILE=1"))?;
    let said = scene.lbridge(&["service", "install"])?.stdout;
    ensure!(said.contains("wrote") && said.contains("restarted") && scene.main_pid()? != first, "{said}");
    ensure!(fs::read_to_string(&path)? == unit);

    // Another program, at another place.
    let second = scene.main_pid()?;
    scene.systemd.run("cp", &[systemd::LBRIDGE, "/usr/bin/lbridge"])?;
    let text = "[Service]\nExecStart=\nExecStart=/usr/bin/lbridge run --no-docker\n";
    scene.drop_in(UNIT, "tests.conf", text)?;
    let output = scene.systemd.run("/usr/bin/lbridge", &["service", "install"])?;
    ensure!(output.status == 0 && output.stdout.contains("restarted"), "{output:?}");
    let third = scene.main_pid()?;
    ensure!(third != second && fs::read_to_string(&path)?.contains("ExecStart=/usr/bin/lbridge run\n"));

    // The same place, another file.
    scene.systemd.shell("cp /usr/bin/lbridge /usr/bin/new; mv /usr/bin/new /usr/bin/lbridge")?;
    let output = scene.systemd.run("/usr/bin/lbridge", &["service", "install"])?;
    ensure!(output.stdout == "restarted lbridge.service\n" && scene.main_pid()? != third, "{output:?}");
    Ok(())
}

fn a_program_that_others_can_change_is_refused() -> Result<()> {
    let scene = scene()?;
    let at = |path: &str| scene.systemd.path(path);
    for folder in ["/opt/own", "/opt/group", "/opt/fine", "/opt/a b"] {
        fs::create_dir_all(at(folder))?;
    }
    chown(at("/opt/own"), Some(1000), None)?;
    fs::set_permissions(at("/opt/group"), fs::Permissions::from_mode(0o775))?;
    for (folder, word) in
        [("/tmp", "/tmp,"), ("/opt/own", "/opt/own,"), ("/opt/group", "/opt/group,"), ("/opt/a b", "quoted")]
    {
        let program = format!("{folder}/lbridge");
        fs::copy(at(systemd::LBRIDGE), at(&program))?;
        let output = scene.systemd.run(&program, &["service", "install"])?;
        refused(&output, &[word, "/usr/local/bin"])?;
        ensure!(!at(UNIT_FILE).exists(), "{folder}");
    }
    fs::copy(at(systemd::LBRIDGE), at("/opt/fine/lbridge"))?;
    chown(at("/opt/fine/lbridge"), Some(1000), None)?;
    refused(&scene.systemd.run("/opt/fine/lbridge", &["service", "install"])?, &["/opt/fine/lbridge,"])
}

fn units_of_others_are_left_alone() -> Result<()> {
    let scene = scene()?;
    let package = scene.systemd.path("/usr/lib/systemd/system/lbridge.service");
    fs::write(&package, crate::PACKAGED)?;
    refused(&command(&scene, &["install"])?, &["package", "systemctl enable --now"])?;
    refused(&command(&scene, &["uninstall"])?, &["package"])?;
    fs::remove_file(&package)?;
    let own = scene.systemd.path(UNIT_FILE);
    fs::write(&own, crate::PACKAGED)?;
    for name in ["install", "uninstall"] {
        refused(&command(&scene, &[name])?, &[UNIT_FILE, "remove it"])?;
    }
    ensure!(fs::read_to_string(&own)? == crate::PACKAGED);
    for command in ["install", "uninstall", "cleanup"] {
        let user = ["--reuid=65534", "--clear-groups", systemd::LBRIDGE, "service", command];
        refused(&scene.systemd.run("setpriv", &user)?, &["root"])?;
    }
    Ok(())
}

/// As a package does when it is removed, in the wrong order and in the right one.
fn cleanup_refuses_while_a_daemon_runs() -> Result<()> {
    let scene = Scene::new()?;
    scene.lbridge(&["allow", "bridge:lab0", "8080"])?;
    let service = scene.service("service", "127.0.0.1:8080")?;
    refused(&command(&scene, &["cleanup"])?, &["stop it first"])?;
    scene.served(8080, "service")?;
    scene.systemd.must(&["kill", "--signal=STOP", UNIT])?;
    refused(&command(&scene, &["cleanup"])?, &["stop it first"])?;
    scene.systemd.must(&["kill", "--signal=CONT", UNIT])?;
    scene.systemd.must(&["stop", UNIT])?;
    scene.served(8080, "service").context("in force without the daemon")?;
    let said = scene.lbridge(&["service", "cleanup"])?.stdout;
    ensure!(said.contains("detached"), "{said}");
    scene.refused(8080)?;
    ensure!(!scene.systemd.path("/sys/fs/bpf/lbridge").exists());
    ensure!(scene.systemd.path("/var/lib/lbridge/rules.toml").exists(), "rules are not its business");
    ensure!(scene.lbridge(&["service", "cleanup"])?.stdout == "nothing had to be changed\n");
    scene.systemd.must(&["start", UNIT])?;
    service.stop();
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.served(8080, "service").map(drop)
}

fn an_error_says_what_is_left_to_do() -> Result<()> {
    let scene = scene()?;
    scene.configure("[[rule]\n")?;
    let output = command(&scene, &["install"])?;
    refused(&output, &["systemctl start", "journalctl", "left to do: start the unit"])?;
    scene.configure("")?;
    scene.lbridge(&["service", "install"])?;
    ensure!(scene.property("ActiveState")? == "active");
    // What cannot be removed, after the unit was stopped.
    let other = scene.systemd.path("/sys/fs/bpf/lbridge/v99");
    fs::create_dir(&other)?;
    let busy = scene.systemd.run("mount", &["-t", "tmpfs", "none", "/sys/fs/bpf/lbridge/v99"])?;
    ensure!(busy.status == 0, "{busy:?}");
    let output = command(&scene, &["uninstall"])?;
    refused(&output, &["v99", "left to do: remove what the daemon left", "remove the unit"])?;
    ensure!(scene.systemd.path(UNIT_FILE).exists());
    scene.systemd.run("umount", &["/sys/fs/bpf/lbridge/v99"])?;
    scene.lbridge(&["service", "uninstall"])?;
    ensure!(!scene.systemd.path(UNIT_FILE).exists() && !scene.systemd.path("/sys/fs/bpf/lbridge").exists());
    Ok(())
}

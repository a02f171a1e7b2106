//! Findings of the doctor that only Docker gives cause for.

use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Scene, Tested};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        containers_that_dial_docker0_are_told,
        an_engine_of_another_host_is_told,
        ports_that_the_engine_only_keeps_are_told,
    ]
}

/// The address that Docker calls the host is served, unless something is in the way there.
fn containers_that_dial_docker0_are_told() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let host = ["--add-host", "host.docker.internal:host-gateway"];
    let misled = scene.engine.run("app", &[&host, ["--name", "misled"].as_slice()].concat())?;
    // Its host-gateway is its gateway.
    scene.engine.run("bridge", &host)?;
    let right = format!("host.docker.internal:{}", network.gateway);
    scene.engine.run("app", &["--add-host", &right, "--name", "told"])?;
    scene.daemon.allow(&["bridge", "8080"])?;
    scene.daemon.allow(&["app", "8080"])?;
    let rule = scene.daemon.rule("bridge", 8080)?.context("the rule")?;
    let docker0: IpAddr = rule["gateways"][0]["address"].as_str().context("an address")?.parse()?;
    let hosts = scene.engine.exec(&misled, &["cat", "/etc/hosts"])?.stdout;
    ensure!(hosts.contains(&docker0.to_string()), "that is what Docker does: {hosts}");
    let report = Report::of(&scene.daemon)?;
    ensure!(report.must("host-gateway", "warning").is_err(), "{report:?}");

    // A firewall that lets them dial their gateway alone, and that lbridge is to leave alone.
    scene.daemon.deny(&["bridge", "8080"])?;
    scene.daemon.deny(&["app", "8080"])?;
    let drops = format!("ip daddr {docker0} tcp dport 8080 drop");
    scene.host.shell(&format!(
        "nft 'table ip walled {{ chain input {{ type filter hook input priority 0; {drops}; }}; }}'"
    ))?;
    fs::write(scene.daemon.config(), "firewall = \"off\"\n")?;
    scene.daemon.cli(&["reload"])?;
    scene.daemon.allow(&["app", "8080"])?;
    let finding = Report::of(&scene.daemon)?.must("host-gateway", "warning")?;
    for says in ["misled", "8080", "host.docker.internal", &docker0.to_string()] {
        ensure!(finding.text.contains(says), "{says}: {finding:?}");
    }
    ensure!(!finding.text.contains("told"), "{finding:?}");
    let option = format!("--network app --add-host host.docker.internal:{}", network.gateway);
    ensure!(finding.remedy[0].contains(&option), "{finding:?}");
    scene.served(&misled, network.at(8080), "service").map(drop)
}

/// The engine's bridges are in another network namespace than the doctor.
fn an_engine_of_another_host_is_told() -> Result<()> {
    let engine = Tested::start()?;
    let daemon = Daemon::prepare(&NetNs::new()?, Options { docker: true, ..Options::default() })?;
    let finding = Report::of(&daemon)?.must("docker", "warning")?;
    ensure!(finding.text.contains("none of its bridges is on this host"), "{finding:?}");
    drop(engine);
    Ok(())
}

/// Without the userland proxy the engine listens on published ports, and accepts nobody.
fn ports_that_the_engine_only_keeps_are_told() -> Result<()> {
    let mut engine = Tested::prepare(false)?;
    fs::create_dir_all("/etc/docker")?;
    fs::write("/etc/docker/daemon.json", "{\"userland-proxy\": false}")?;
    engine.up()?;
    engine.import_image()?;
    let scene = Scene::with(engine)?;
    scene.engine.create_network("app", &[])?;
    scene.engine.run("app", &["--publish", "127.0.0.1:8080:80"])?;
    scene.daemon.allow(&["app", "8080"])?;
    let report = Report::of(&scene.daemon)?;
    let finding = report.must("docker-proxy", "warning")?;
    ensure!(finding.text.contains("dockerd") && finding.text.contains("app 8080"), "{finding:?}");
    // That is how the engine does without.
    report.must("route_localnet", "warning").map(drop)
}

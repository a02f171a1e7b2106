//! The doctor and the importer beside a real engine.

use std::fs;

use anyhow::{Result, ensure};
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::sandbox;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Scene, Tested};

pub(crate) fn tests() -> Vec<Test> {
    tests![a_healthy_host_is_told_so, an_engine_that_is_away_is_told, import_names_the_engines_networks,]
}

fn a_healthy_host_is_told_so() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&container, network.at(8080), "service")?;
    let report = Report::of(&scene.daemon)?;
    ensure!(report.status == 0 && report.complaints().is_empty(), "{report:?}");
    ensure!(report.must("docker", "ok")?.text.contains(&scene.engine.socket()), "{report:?}");
    Ok(())
}

fn an_engine_that_is_away_is_told() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    Report::of(&scene.daemon)?.must("docker", "note")?;
    scene.daemon.allow(&["app", "8080"])?;
    let finding = Report::of(&scene.daemon)?.must("docker", "problem")?;
    ensure!(finding.remedy == [format!("systemctl start {}", Tested::UNIT)], "{finding:?}");
    scene.engine.up()?;
    scene.wait_for_engine("reachable")?;
    Report::of(&scene.daemon)?.must("docker", "ok").map(drop)
}

/// No systemd is needed to read its units.
fn import_names_the_engines_networks() -> Result<()> {
    let mut scene = Scene::lasting()?;
    let network = scene.engine.create_network("app", &[])?;
    scene.engine.run("app", &[])?;
    let gateway = network.gateway;
    // Goes with the test.
    sandbox::shadow("/etc")?;
    fs::create_dir_all("/etc/systemd/system")?;
    let unit = format!("[Service]\nExecStart=socat TCP-LISTEN:80,bind={gateway},fork TCP:127.0.0.1:8080\n");
    fs::write("/etc/systemd/system/socat-app.service", unit)?;
    fs::create_dir_all("/etc/ufw")?;
    let bridge = &network.bridge;
    let tuple = format!("### tuple ### allow tcp 80 {gateway} any 0.0.0.0/0 in_{bridge}\n");
    fs::write("/etc/ufw/user.rules", tuple)?;

    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    let said = scene.daemon.cli(&["import"])?.stdout;
    ensure!(said.contains(&format!("{} does not answer", Tested::PRODUCT)), "{said}");
    scene.engine.up()?;
    scene.wait_for_engine("reachable")?;
    let said = scene.daemon.cli(&["import", "--yes"])?.stdout;
    ensure!(said.starts_with(&format!("app 80: {gateway}:80 -> 127.0.0.1:8080")), "{said}");
    let delete = format!("  ufw delete allow in on {bridge} to {gateway} port 80 proto tcp\n");
    ensure!(said.ends_with(&delete), "{said}");
    scene.must_be("app", 80, "waiting")
}

//! Networks as only Podman has them.

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::Scene;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        the_hosts_name_is_the_gateway,
        networks_without_a_bridge_are_blocked,
        a_published_port_is_only_kept,
    ]
}

/// With root's Podman `host.containers.internal` is what a rule's containers dial.
fn the_hosts_name_is_the_gateway() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    let hosts = scene.engine.exec(&container, &["cat", "/etc/hosts"])?.stdout;
    let line = hosts.lines().find(|line| line.contains("host.containers.internal")).context("the name")?;
    ensure!(line.starts_with(&network.gateway.to_string()), "{hosts}");
    let dial = "echo over and out | timeout 5 nc host.containers.internal 8080";
    let output = scene.engine.exec(&container, &["sh", "-c", dial])?;
    ensure!(output.stdout.contains("over and out"), "{output:?}");
    Ok(())
}

/// Of macvlan Podman names the parent, which is the way to the LAN.
fn networks_without_a_bridge_are_blocked() -> Result<()> {
    let scene = Scene::new()?;
    scene.host.ip("link add lan type bridge")?;
    scene.host.ip("address add 192.0.2.1/24 dev lan")?;
    scene.host.ip("link set lan up")?;
    let parent = ["--driver", "macvlan", "--opt", "parent=lan", "--subnet", "192.0.2.0/24"];
    scene.engine.cli(&[&["network", "create"], parent.as_slice(), &["vlan"]].concat())?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["vlan", "8080"])?;
    let state = scene.daemon.rule_state("vlan", 8080)?;
    ensure!(state.state == "blocked", "{state:?}");
    state.must_be_because("driver_without_bridge")?;
    Ok(())
}

/// Unlike Docker's proxy, Podman's conmon accepts nobody on a published port, which the host reaches by NAT.
/// The rule has nowhere to lead, and the doctor says so.
fn a_published_port_is_only_kept() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    let inside = scene.engine.run("app", &[])?;
    scene.engine.create_network("web", &[])?;
    let web = scene.engine.run("web", &["--publish", "127.0.0.1:8080:80"])?;
    let server = Service::start(&scene.engine.netns(&web)?, "published", "0.0.0.0:80")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.not_served(&inside, app.at(8080))?;
    ensure!(server.accepted() == 0, "it got through: then say so in the guide");
    let finding = Report::of(&scene.daemon)?.must("docker-proxy", "warning")?;
    ensure!(finding.text.contains("conmon") && finding.text.contains("app 8080"), "{finding:?}");
    ensure!(finding.remedy[0].starts_with("podman network connect"), "{finding:?}");
    Ok(())
}

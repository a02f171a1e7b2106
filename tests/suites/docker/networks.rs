//! Networks as only Docker has them.

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::Scene;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        bridge_with_a_name_of_its_own_is_served,
        port_published_on_loopback_is_served,
        thousands_of_ports_take_seconds,
        name_that_is_the_id_of_another,
        networks_without_a_bridge_are_blocked,
    ]
}

fn bridge_with_a_name_of_its_own_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let named = &["--opt", "com.docker.network.bridge.name=ownbridge"];
    let network = scene.engine.create_network("named", named)?;
    let container = scene.engine.run("named", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["named", "8080"])?;
    scene.served(&container, network.at(8080), "service")?;
    let rule = scene.daemon.rule("named", 8080)?.context("the rule")?;
    ensure!(rule["gateways"][0]["interface"] == "ownbridge", "{rule}");
    Ok(())
}

/// Not as many minutes: the command itself gives up after half of one.
fn thousands_of_ports_take_seconds() -> Result<()> {
    let scene = Scene::new()?;
    scene.engine.create_network("app", &[])?;
    scene.daemon.allow(&["app", "20000-29999"])?;
    scene.daemon.deny(&["app", "20000-29999"]).map(drop)
}

fn networks_without_a_bridge_are_blocked() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    for network in ["host", "none"] {
        scene.daemon.allow(&[network, "8080"])?;
        let state = scene.daemon.rule_state(network, 8080)?;
        ensure!(state.state == "blocked", "{network}: {state:?}");
        state.must_be_because(if network == "host" { "host_network" } else { "driver_without_bridge" })?;
    }
    Ok(())
}

/// A port that another container publishes on the host's localhost is a service like any other: for the
/// allowed network, and for no other.
fn port_published_on_loopback_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    let other = scene.engine.create_network("other", &[])?;
    scene.engine.create_network("web", &[])?;
    let inside = scene.engine.run("app", &[])?;
    let outside = scene.engine.run("other", &[])?;
    let web = scene.engine.run("web", &["--publish", "127.0.0.1:8080:80"])?;
    let _server = Service::start(&scene.engine.netns(&web)?, "published", "0.0.0.0:80")?;
    for container in [&inside, &outside] {
        scene.refused(container, app.at(8080))?;
    }
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, "steered")?;
    scene.served(&inside, app.at(8080), "published")?;
    scene.refused(&outside, app.at(8080))?;
    scene.refused(&outside, other.at(8080))?;
    scene.daemon.deny(&["app", "8080"])?;
    scene.refused(&inside, app.at(8080))
}

/// Podman refuses such a name. Docker itself takes a name for a name before it takes it for the beginning of
/// an id.
fn name_that_is_the_id_of_another() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let victim = scene.engine.create_network("victim", &[])?;
    let name = &victim.id[..12];
    let named = scene.engine.create_network(name, &[])?;
    let of_victim = scene.engine.run(&victim.id, &[])?;
    let of_named = scene.engine.run(&named.id, &[])?;
    scene.daemon.allow(&[name, "8080"])?;
    scene.served(&of_named, named.at(8080), "service")?;
    scene.refused(&of_victim, victim.at(8080))?;
    scene.refused(&of_victim, named.at(8080))
}

//! A swarm of one: containers on overlay networks reach the host over docker_gwbridge, and over nothing else.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::engine::{Container, Engine};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::Scene;

pub(crate) fn tests() -> Vec<Test> {
    tests![containers_of_overlay_networks_are_served, tasks_of_services_are_served]
}

const GATEWAY_NETWORK: &str = "docker_gwbridge";

/// A scene with a swarm, whose only node is this.
fn swarm() -> Result<Scene> {
    let scene = Scene::new()?;
    // What it tells other nodes must be an address of the host.
    scene.host.ip("link add node type veth peer name wire")?;
    scene.host.ip("address add 192.0.2.1/24 dev node")?;
    scene.host.ip("link set node up")?;
    scene.host.ip("link set wire up")?;
    scene.engine.cli(&["swarm", "init", "--advertise-addr", "192.0.2.1"])?;
    Ok(scene)
}

fn containers_of_overlay_networks_are_served() -> Result<()> {
    let scene = swarm()?;
    scene.engine.cli(&["network", "create", "--driver", "overlay", "--attachable", "over"])?;
    let inside = scene.engine.run("over", &["--name", "inside"])?;
    scene.engine.create_network("other", &[])?;
    let outside = scene.engine.run("other", &[])?;
    let gateway = scene.engine.network(GATEWAY_NETWORK)?;
    let service = scene.service("service", "127.0.0.1:8080")?;
    scene.refused(&inside, gateway.at(8080))?;
    scene.daemon.allow(&[GATEWAY_NETWORK, "8080"])?;
    scene.must_be(GATEWAY_NETWORK, 8080, "steered")?;
    scene.refused(&outside, gateway.at(8080))?;
    ensure!(service.accepted() == 0);
    scene.served(&inside, gateway.at(8080), "service")?;
    scene.refused(&inside, gateway.at(8081))?;

    // The overlay has no end on the host.
    scene.daemon.allow(&["over", "8080"])?;
    let state = scene.daemon.rule_state("over", 8080)?;
    ensure!(state.state == "blocked", "{state:?}");
    state.must_be_because("driver_without_bridge")?;
    scene.daemon.deny(&[GATEWAY_NETWORK, "8080"])?;
    scene.daemon.allow(&["container:inside", "8080"])?;
    scene.refused(&inside, gateway.at(8080))?;
    scene.served(&inside, SocketAddr::from(([127, 0, 0, 1], 8080)), "service").map(drop)
}

/// And go on to be when the task is replaced.
fn tasks_of_services_are_served() -> Result<()> {
    let scene = swarm()?;
    scene.engine.cli(&["network", "create", "--driver", "overlay", "over"])?;
    let service = ["service", "create", "--detach", "--quiet", "--name", "web", "--network", "over"];
    scene.engine.cli(&[&service, ["lab", "sleep", "1000000"].as_slice()].concat())?;
    let task = || {
        patience::until("a task runs", || {
            let ids = scene.engine.cli(&["ps", "--quiet", "--no-trunc", "--filter", "name=web."])?;
            Ok(ids.lines().next().map(|id| Container { id: id.to_owned() }))
        })
    };
    let first = task().context("the first")?;
    let gateway = scene.engine.network(GATEWAY_NETWORK)?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&[GATEWAY_NETWORK, "8080"])?;
    scene.served(&first, gateway.at(8080), "service")?;
    scene.engine.remove(&first)?;
    let next = task().context("its successor")?;
    ensure!(next.id != first.id);
    scene.served(&next, gateway.at(8080), "service").map(drop)
}

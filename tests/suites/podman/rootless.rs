//! A user's Podman: its networks are in namespaces of the user's, whatever the host's are called; its
//! containers can be named.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;

use super::{Scene, Tested};

const MAPS: Need = Need::Program("newuidmap");
const SLIRP: Need = Need::Program("slirp4netns");
const SETPRIV: Need = Need::Program("setpriv");

pub(crate) fn tests() -> Vec<Test> {
    tests![
        containers_of_a_user_are_served: [MAPS, SETPRIV, SLIRP],
        a_bridge_of_the_same_name_is_none_of_the_users: [MAPS, SETPRIV],
        a_container_without_a_cgroup_is_not_believed: [MAPS, SETPRIV],
    ]
}

fn localhost() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}

fn containers_of_a_user_are_served() -> Result<()> {
    let scene = Scene::with(Tested::rootless()?)?;
    let service = scene.service("host's", "127.0.0.1:8080")?;
    for (network, name) in [("none", "alone"), ("slirp4netns", "slirp"), ("podman", "bridged")] {
        let split = ["--cgroups", "split", "--name", name];
        let container = scene.engine.run(network, &split).context(network)?;
        scene.refused(&container, localhost())?;
        let rule = format!("container:{name}");
        scene.daemon.allow(&[&rule, "8080"])?;
        let greeting = scene.served(&container, localhost(), "host's").context(network)?;
        // What a user's engine says of addresses is not shown to services, which may know another by that
        // one.
        ensure!(!greeting.peer.ip().to_string().starts_with("10."), "{greeting:?}");
        let dial = "echo over and out | timeout 5 nc 127.0.0.1 8080";
        let said = scene.engine.exec(&container, &["sh", "-c", dial])?;
        ensure!(said.stdout.contains("over and out"), "{said:?}");
        scene.engine.cli(&["restart", "--time", "0", name])?;
        scene.daemon.wait_for_state(&rule, 8080, "relayed")?;
        scene.served(&container, localhost(), "host's").context("after a restart")?;
        scene.daemon.deny(&[&rule, "8080"])?;
        scene.refused(&container, localhost())?;
    }
    ensure!(service.accepted() > 0);
    Ok(())
}

/// podman0 here may be root's.
fn a_bridge_of_the_same_name_is_none_of_the_users() -> Result<()> {
    let podman = Tested::rootless()?;
    let network = podman.network("podman")?;
    let scene = Scene::with(podman)?;
    let lab = Lab::with_host(scene.host.clone());
    let bridge = lab.add_bridge(&network.bridge, &format!("{}/16", network.gateway))?;
    let container = lab.container(&bridge, "10.88.0.77/16")?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["podman", "8080"])?;
    let state = scene.daemon.rule_state("podman", 8080)?;
    ensure!(state.state == "blocked", "{state:?}");
    ensure!(state.why.as_deref().is_some_and(|why| why.contains("bridge (rootless)")), "{state:?}");
    client::refused(&container, network.at(8080))?;
    let finding = Report::of(&scene.daemon)?.must("docker", "warning")?;
    ensure!(finding.text.contains("it is rootless"), "{finding:?}");
    ensure!(finding.remedy == ["lbridge allow container:NAME PORT"], "{finding:?}");
    // Who is named by the bridge is root's.
    scene.daemon.allow(&[&format!("bridge:{}", network.bridge), "8081=8080"])?;
    client::served_by(&container, SocketAddr::new(network.gateway, 8081), "service").map(drop)
}

/// Then there is nothing but a user's word for whose process it is.
fn a_container_without_a_cgroup_is_not_believed() -> Result<()> {
    let scene = Scene::with(Tested::rootless_without_cgroup()?)?;
    let container = scene.engine.run("none", &["--name", "bare"])?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    scene.daemon.allow(&["container:bare", "8080"])?;
    let state = scene.daemon.rule_state("container:bare", 8080)?;
    ensure!(state.state == "blocked", "{state:?}");
    ensure!(
        state.why.as_deref().is_some_and(|why| why.contains("does not belong to this container")),
        "{state:?}"
    );
    // Root can name the process.
    let pid = scene.engine.pid(&container)?;
    scene.daemon.allow(&[&format!("pid:{pid}"), "8080"])?;
    scene.served(&container, localhost(), "host's").map(drop)
}

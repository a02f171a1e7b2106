//! Localhost inside Podman's containers.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lbridge_tests::harness::podman::Container;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Scene, at};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_container_without_network_is_served,
        a_container_that_restarts_is_followed,
        the_service_sees_what_podman_says_of_the_container,
        a_container_in_the_hosts_namespace_is_blocked,
    ]
}

const LOCALHOST: &str = "127.0.0.1:8080";

fn localhost() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}

/// With the container's own program.
fn asks_localhost(scene: &Scene, container: &Container) -> Result<String> {
    let dial = "echo over and out | timeout 5 nc 127.0.0.1 8080";
    Ok(scene.podman.exec(container, &["sh", "-c", dial])?.stdout)
}

fn a_container_without_network_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let alone = scene.podman.run("none", &["--name", "alone"])?;
    let other = scene.podman.run("none", &["--name", "other"])?;
    let _service = scene.service("host's", LOCALHOST)?;
    ensure!(asks_localhost(&scene, &alone)?.is_empty(), "out of reach without a rule");
    let output = scene.daemon.allow(&["container:alone", "8080"])?;
    ensure!(output.stdout.contains("relayed (on localhost inside)"), "{output:?}");
    let said = asks_localhost(&scene, &alone)?;
    ensure!(said.contains("host's") && said.contains("over and out"), "{said:?}");
    ensure!(asks_localhost(&scene, &other)?.is_empty(), "no other container");
    scene.daemon.deny(&["container:alone", "8080"])?;
    ensure!(asks_localhost(&scene, &alone)?.is_empty(), "out of reach again");
    Ok(())
}

/// By the events that Podman sends: its word for a container's end is its own.
fn a_container_that_restarts_is_followed() -> Result<()> {
    let scene = Scene::new()?;
    let alone = scene.podman.run("none", &["--name", "alone"])?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    for _ in 0..3 {
        scene.podman.podman(&["stop", "--time", "0", "alone"])?;
        scene.daemon.wait_for_state("container:alone", 8080, "waiting")?;
        scene.podman.podman(&["start", "alone"])?;
        scene.daemon.wait_for_state("container:alone", 8080, "relayed")?;
        scene.served(&alone, localhost(), "host's")?;
    }
    // Another of the same name.
    scene.podman.remove(&alone)?;
    scene.daemon.wait_for_state("container:alone", 8080, "waiting")?;
    let again = scene.podman.run("none", &["--name", "alone"])?;
    scene.daemon.wait_for_state("container:alone", 8080, "relayed")?;
    scene.served(&again, localhost(), "host's").map(drop)
}

fn the_service_sees_what_podman_says_of_the_container() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.podman.create_network("app", &[])?;
    let container = scene.podman.run("app", &["--name", "named"])?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:named", "8080"])?;
    let greeting = scene.served(&container, localhost(), "host's")?;
    ensure!(greeting.peer.ip() == scene.address(&container, &network)?, "{greeting:?}");
    // By its id, and what the rule opens is nothing else.
    scene.refused(&container, at(&network, 8080))?;
    scene.daemon.deny(&["container:named", "8080"])?;
    scene.daemon.allow(&[&format!("container:{}", &container.id[..12]), "8080"])?;
    scene.served(&container, localhost(), "host's").map(drop)
}

fn a_container_in_the_hosts_namespace_is_blocked() -> Result<()> {
    let scene = Scene::new()?;
    scene.podman.run("host", &["--name", "host"])?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:host", "8080"])?;
    let state = scene.daemon.rule_state("container:host", 8080)?;
    ensure!(state.state == "blocked", "{state:?}");
    ensure!(
        state.why.as_deref().is_some_and(|why| why.contains("host's own network namespace")),
        "{state:?}"
    );
    Ok(())
}

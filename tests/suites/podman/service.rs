//! Podman's service comes and goes, since containers do not need it: what is in force stays. And what is said
//! of it.

use anyhow::{Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Scene, at};

pub(crate) fn tests() -> Vec<Test> {
    tests![podman_is_called_so, service_restarts, daemon_restarts_while_the_service_is_away]
}

fn podman_is_called_so() -> Result<()> {
    let mut scene = Scene::new()?;
    // A bridge that is not there yet is as it should be.
    scene.podman.create_network("app", &[])?;
    let version = scene.podman.podman(&["version", "--format", "{{.Client.Version}}"])?;
    let status = scene.daemon.status()?;
    ensure!(status["docker"]["engine"] == "podman" && status["docker"]["version"] == *version, "{status:#}");
    let human = scene.daemon.cli(&["status"])?.stdout;
    ensure!(human.contains(&format!("\nPodman   {version} answers\n")), "{human}");
    let report = Report::of(&scene.daemon)?;
    let finding = report.must("docker", "ok")?;
    ensure!(finding.text.starts_with(&format!("Podman {version} answers at unix://")), "{finding:?}");

    scene.podman.down()?;
    scene.wait_for_podman("away")?;
    let human = scene.daemon.cli(&["status"])?.stdout;
    ensure!(human.contains("\nPodman   away since 20"), "{human}");
    scene.daemon.allow(&["app", "8080"])?;
    let finding = Report::of(&scene.daemon)?.must("docker", "problem")?;
    ensure!(finding.remedy == ["systemctl start podman.socket"], "{finding:?}");
    Ok(())
}

fn service_restarts() -> Result<()> {
    let mut scene = Scene::new()?;
    let network = scene.podman.create_network("app", &[])?;
    let container = scene.podman.run("app", &[])?;
    let alone = scene.podman.run("none", &["--name", "alone"])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    let inside = "127.0.0.1:8080".parse()?;
    let mut connection = client::connect(&scene.podman.netns(&container)?, at(&network, 8080))?;
    for _ in 0..2 {
        scene.podman.down()?;
        scene.wait_for_podman("away")?;
        scene.must_be("app", 8080, "steered")?;
        connection.echo(b"without a service")?;
        scene.served(&container, at(&network, 8080), "service")?;
        scene.served(&alone, inside, "service")?;
        scene.refused(&container, at(&network, 8081))?;
        scene.podman.up()?;
        scene.wait_for_podman("reachable")?;
        scene.must_be("app", 8080, "steered")?;
        connection.echo(b"and with it again")?;
        scene.served(&alone, inside, "service")?;
    }
    // What comes while it is away is served once it can say whose it is.
    scene.podman.down()?;
    scene.wait_for_podman("away")?;
    scene.podman.podman(&["restart", "--time", "0", &container.id])?;
    scene.daemon.wait_for_state("app", 8080, "waiting")?;
    scene.refused(&container, at(&network, 8080))?;
    scene.podman.up()?;
    scene.daemon.wait_for_state("app", 8080, "steered")?;
    scene.served(&container, at(&network, 8080), "service").map(drop)
}

fn daemon_restarts_while_the_service_is_away() -> Result<()> {
    let mut scene = Scene::new()?;
    let network = scene.podman.create_network("app", &[])?;
    let container = scene.podman.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.podman.down()?;
    for kill in [false, true] {
        if kill {
            scene.daemon.kill9()?;
        }
        scene.daemon.restart()?;
        scene.wait_for_podman("away")?;
        scene.must_be("app", 8080, "steered")?;
        scene.served(&container, at(&network, 8080), "service")?;
    }
    scene.podman.up()?;
    scene.wait_for_podman("reachable")?;
    scene.must_be("app", 8080, "steered")?;
    scene.served(&container, at(&network, 8080), "service").map(drop)
}

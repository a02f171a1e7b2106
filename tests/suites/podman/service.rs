//! Podman's service, which its containers do not need.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::{Test, find_program};
use lbridge_tests::tests;
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Scene;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        podman_is_called_so,
        containers_restart_while_the_service_is_away,
        a_container_that_is_not_cleaned_up_has_ended,
    ]
}

fn podman_is_called_so() -> Result<()> {
    let mut scene = Scene::new()?;
    // A bridge that is not there yet is as it should be.
    scene.engine.create_network("app", &[])?;
    let version = scene.engine.cli(&["version", "--format", "{{.Client.Version}}"])?;
    let status = scene.daemon.status()?;
    ensure!(status["docker"]["engine"] == "podman" && status["docker"]["version"] == *version, "{status:#}");
    let human = scene.daemon.cli(&["status"])?.stdout;
    ensure!(human.contains(&format!("\nPodman   {version} answers\n")), "{human}");
    let report = Report::of(&scene.daemon)?;
    let finding = report.must("docker", "ok")?;
    ensure!(finding.text.starts_with(&format!("Podman {version} answers at unix://")), "{finding:?}");

    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    let human = scene.daemon.cli(&["status"])?.stdout;
    ensure!(human.contains("\nPodman   away since 20"), "{human}");
    scene.daemon.allow(&["app", "8080"])?;
    let finding = Report::of(&scene.daemon)?.must("docker", "problem")?;
    ensure!(finding.remedy == ["systemctl start podman.socket"], "{finding:?}");
    Ok(())
}

/// Containers that start while the service is away are served once it can name the network of the bridge.
fn containers_restart_while_the_service_is_away() -> Result<()> {
    let mut scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    scene.engine.cli(&["restart", "--time", "0", &container.id])?;
    scene.daemon.wait_for_state("app", 8080, "waiting")?;
    scene.refused(&container, network.at(8080))?;
    scene.engine.up()?;
    scene.daemon.wait_for_state("app", 8080, "steered")?;
    scene.served(&container, network.at(8080), "service").map(drop)
}

/// Until it has cleaned up after a container, Podman gives it a status that Docker does not have; for ever if
/// nothing does.
fn a_container_that_is_not_cleaned_up_has_ended() -> Result<()> {
    let scene = Scene::new()?;
    let alone = scene.engine.run("none", &["--name", "alone"])?;
    let other = scene.engine.run("none", &["--name", "other"])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    scene.daemon.allow(&["container:other", "8080"])?;
    let localhost = "127.0.0.1:8080".parse()?;
    scene.served(&alone, localhost, "service")?;
    let conmon = scene.engine.cli(&["inspect", "--format", "{{.State.ConmonPid}}", "alone"])?;
    let pid = scene.engine.pid(&alone)?.cast_signed();
    // What conmon starts in order to clean up does nothing.
    let (podman, none) = (find_program("podman").context("no podman")?, None::<&str>);
    mount(find_program("true").as_ref(), &podman, none, MsFlags::MS_BIND, none)?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    let conmon = Path::new("/proc").join(conmon);
    patience::until("conmon has ended", || Ok((!conmon.exists()).then_some(())))?;
    umount(&podman)?;
    scene.daemon.wait_for_state("container:alone", 8080, "waiting")?;
    let status = scene.engine.cli(&["inspect", "--format", "{{.State.Status}}", "alone"])?;
    ensure!(status == "stopped", "{status}");
    // A command has Podman asked about both.
    scene.daemon.allow(&["container:alone", "8081=8080"])?;
    ensure!(scene.engine_state()?.0 == "reachable", "{}", scene.daemon.log());
    scene.must_be("container:alone", 8081, "waiting")?;
    scene.served(&other, localhost, "service").map(drop)
}

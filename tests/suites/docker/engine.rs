//! An Engine that restarts as only Docker's does, and a daemon that cannot keep what it hears of it.

use anyhow::{Result, ensure};
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::mount::{MsFlags, mount, umount};

use super::Scene;

pub(crate) fn tests() -> Vec<Test> {
    tests![engine_restarts_and_ends_its_containers, what_cannot_be_kept_is_told_once]
}

/// A disk that is full, or read-only: rules in force stay, none is made, and the log is not what fills it.
fn what_cannot_be_kept_is_told_once() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    let (none, state) = (None::<&str>, scene.daemon.state_dir());
    mount(Some(&state), &state, none, MsFlags::MS_BIND, none)?;
    mount(none, &state, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)?;
    scene.engine.create_network("later", &[])?;
    let told = |words: &str| scene.daemon.log().matches(words).count();
    let unsaved = "could not save the last seen state for the next start what=networks";
    patience::until("it is told", || Ok((told(unsaved) > 0).then_some(())))?;
    // Each of these looks again, and tries.
    for name in ["one", "two", "three"] {
        scene.engine.create_network(name, &[])?;
        patience::until("it is seen", || {
            let seen = scene.daemon.status()?["docker_networks"].to_string();
            Ok(seen.contains(&format!("\"{name}\"")).then_some(()))
        })?;
    }
    ensure!(told(unsaved) == 1, "{} times", told(unsaved));
    let refused = scene.daemon.cli(&["allow", "later", "8080"])?;
    ensure!(refused.status == 1 && scene.daemon.rule("later", 8080)?.is_none(), "{refused:?}");
    scene.served(&container, app.at(8080), "service")?;
    umount(&state)?;
    scene.engine.create_network("four", &[])?;
    patience::until("it is told", || {
        Ok((told("last seen state saved again what=networks") == 1).then_some(()))
    })?;
    scene.daemon.allow(&["later", "8080"]).map(drop)
}

fn engine_restarts_and_ends_its_containers() -> Result<()> {
    let mut scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &["--restart", "always"])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&container, network.at(8080), "service")?;
    for _ in 0..2 {
        scene.engine.restart()?;
        scene.wait_for_engine("reachable")?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, network.at(8080), "service")?;
    }
    Ok(())
}

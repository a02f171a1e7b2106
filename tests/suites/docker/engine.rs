//! An engine that comes, goes, and comes again: what is in force stays, and what it says is followed.

use anyhow::{Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::docker::Engine;
use lbridge_tests::harness::follow::Follow;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::mount::{MsFlags, mount, umount};

use super::{Scene, at};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        events_tell_of_the_engine,
        engine_restarts_with_live_containers,
        engine_restarts_and_ends_its_containers,
        daemon_restarts_while_the_engine_is_away,
        daemon_is_there_before_the_engine,
        what_cannot_be_kept_is_told_once,
    ]
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
    let unsaved = "the networks last seen are not kept";
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
    scene.served(&container, at(&app, 8080), "service")?;
    umount(&state)?;
    scene.engine.create_network("four", &[])?;
    patience::until("it is told", || Ok((told("the networks last seen are kept again") == 1).then_some(())))?;
    scene.daemon.allow(&["later", "8080"]).map(drop)
}

fn events_tell_of_the_engine() -> Result<()> {
    let mut scene = Scene::new()?;
    let mut command = scene.daemon.command()?;
    command.args(["events", "--json"]);
    let mut events = Follow::start(command)?;
    let mut event = |what: &str, field: &str| {
        events.until(field, |line| {
            let event: serde_json::Value = serde_json::from_str(line).ok()?;
            (event["event"] == what && event[field].is_string()).then_some(())
        })
    };
    event("following", "version")?;
    scene.engine.down()?;
    event("docker", "error")?;
    scene.engine.up()?;
    event("docker", "version")
}

fn engine_restarts_with_live_containers() -> Result<()> {
    let mut scene = Scene::with(Engine::start_with(true)?)?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    let netns = scene.engine.netns(&container)?;
    let mut connection = client::connect(&netns, at(&network, 8080))?;

    scene.engine.down()?;
    scene.wait_for_docker("away")?;
    let (_, since) = scene.docker_state()?;
    ensure!(since.as_deref().is_some_and(|since| since.starts_with("20")), "away since when: {since:?}");
    let human = scene.daemon.cli(&["status"])?;
    ensure!(human.stdout.contains("away since 20"), "{human:?}");
    scene.must_be("app", 8080, "steered")?;
    connection.echo(b"without an Engine")?;
    client::served_by(&netns, at(&network, 8080), "service")?;
    client::refused(&netns, at(&network, 8081))?;
    // Rules can be made and taken back meanwhile.
    scene.daemon.allow(&["app", "8081=8080"])?;
    client::served_by(&netns, at(&network, 8081), "service")?;
    scene.daemon.deny(&["app", "8081"])?;
    client::refused(&netns, at(&network, 8081))?;

    scene.engine.up()?;
    scene.wait_for_docker("reachable")?;
    scene.must_be("app", 8080, "steered")?;
    connection.echo(b"and with it again")?;
    scene.served(&container, at(&network, 8080), "service")?;
    // It follows the new Engine.
    let later = scene.engine.create_network("later", &[])?;
    scene.daemon.allow(&["later", "8080"])?;
    let container = scene.engine.run("later", &[])?;
    scene.served(&container, at(&later, 8080), "service").map(drop)
}

fn engine_restarts_and_ends_its_containers() -> Result<()> {
    let mut scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &["--restart", "always"])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&container, at(&network, 8080), "service")?;
    for _ in 0..2 {
        scene.engine.restart()?;
        scene.wait_for_docker("reachable")?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, at(&network, 8080), "service")?;
    }
    Ok(())
}

fn daemon_restarts_while_the_engine_is_away() -> Result<()> {
    let mut scene = Scene::with(Engine::start_with(true)?)?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let netns = scene.engine.netns(&container)?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.engine.down()?;
    for kill in [false, true] {
        if kill {
            scene.daemon.kill9()?;
        }
        scene.daemon.restart()?;
        ensure!(scene.docker_state()?.0 == "away");
        client::served_by(&netns, at(&network, 8080), "service")?;
        scene.must_be("app", 8080, "steered")?;
    }
    scene.engine.up()?;
    scene.wait_for_docker("reachable")?;
    scene.must_be("app", 8080, "steered")?;
    client::served_by(&netns, at(&network, 8080), "service").map(drop)
}

fn daemon_is_there_before_the_engine() -> Result<()> {
    let mut scene = Scene::with(Engine::prepare(false)?)?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    ensure!(scene.docker_state()?.0 == "away");
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, "waiting")?;
    scene.engine.up()?;
    scene.engine.import_image()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.wait_for_state("app", 8080, "steered")?;
    scene.served(&container, at(&network, 8080), "service").map(drop)
}

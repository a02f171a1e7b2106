//! An engine that comes, goes, and comes again: what is in force stays, and what it says is followed.

use anyhow::{Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::follow::Follow;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Scene, Tested};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        events_tell_of_the_engine,
        engine_restarts_with_live_containers,
        daemon_restarts_while_the_engine_is_away,
        daemon_is_there_before_the_engine,
    ]
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
    let mut scene = Scene::lasting()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let alone = scene.engine.run("none", &["--name", "alone"])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    let (netns, inside) = (scene.engine.netns(&container)?, scene.engine.netns(&alone)?);
    let localhost = "127.0.0.1:8080".parse()?;
    let mut connection = client::connect(&netns, network.at(8080))?;

    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    let (_, since) = scene.engine_state()?;
    ensure!(since.as_deref().is_some_and(|since| since.starts_with("20")), "away since when: {since:?}");
    let human = scene.daemon.cli(&["status"])?;
    ensure!(human.stdout.contains("away since 20"), "{human:?}");
    scene.must_be("app", 8080, "steered")?;
    connection.echo(b"without an engine")?;
    client::served_by(&netns, network.at(8080), "service")?;
    client::served_by(&inside, localhost, "service")?;
    client::refused(&netns, network.at(8081))?;
    // Rules can be made and taken back meanwhile.
    scene.daemon.allow(&["app", "8081=8080"])?;
    client::served_by(&netns, network.at(8081), "service")?;
    scene.daemon.deny(&["app", "8081"])?;
    client::refused(&netns, network.at(8081))?;

    scene.engine.up()?;
    scene.wait_for_engine("reachable")?;
    scene.must_be("app", 8080, "steered")?;
    connection.echo(b"and with it again")?;
    scene.served(&container, network.at(8080), "service")?;
    scene.served(&alone, localhost, "service")?;
    // It follows the new engine.
    let later = scene.engine.create_network("later", &[])?;
    scene.daemon.allow(&["later", "8080"])?;
    let container = scene.engine.run("later", &[])?;
    scene.daemon.wait_for_state("later", 8080, "steered")?;
    scene.served(&container, later.at(8080), "service").map(drop)
}

fn daemon_restarts_while_the_engine_is_away() -> Result<()> {
    let mut scene = Scene::lasting()?;
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
        ensure!(scene.engine_state()?.0 == "away");
        client::served_by(&netns, network.at(8080), "service")?;
        scene.must_be("app", 8080, "steered")?;
    }
    scene.engine.up()?;
    scene.wait_for_engine("reachable")?;
    scene.must_be("app", 8080, "steered")?;
    client::served_by(&netns, network.at(8080), "service").map(drop)
}

fn daemon_is_there_before_the_engine() -> Result<()> {
    let mut engine = Tested::start()?;
    engine.down()?;
    let mut scene = Scene::with(engine)?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    ensure!(scene.engine_state()?.0 == "away");
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, "waiting")?;
    scene.engine.up()?;
    scene.wait_for_engine("reachable")?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.wait_for_state("app", 8080, "steered")?;
    scene.served(&container, network.at(8080), "service").map(drop)
}

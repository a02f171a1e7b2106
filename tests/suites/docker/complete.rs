//! Completion beside a real engine: its networks, and the containers on one of them.

use anyhow::{Result, ensure};
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::Scene;

pub(crate) fn tests() -> Vec<Test> {
    tests![networks_and_containers_of_the_engine_are_offered]
}

fn networks_and_containers_of_the_engine_are_offered() -> Result<()> {
    let scene = Scene::new()?;
    for network in ["app", "db", "two words", "$(id)"] {
        scene.engine.create_network(network, &[])?;
    }
    for (name, network) in [("web", "app"), ("worker", "app"), ("elsewhere", "db")] {
        scene.engine.run(network, &["--name", name])?;
    }
    // One that does not run can be named, too.
    scene.engine.cli(&["stop", "worker"])?;
    let offered = |words: &[&str]| -> Result<Vec<String>> {
        let output = scene.daemon.cli(&[&["complete", "--", "lbridge"], words].concat())?;
        ensure!(output.status == 0 && output.stderr.is_empty(), "{words:?}: {output:?}");
        Ok(output.stdout.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect())
    };
    patience::until("the daemon knows the networks", || {
        Ok(offered(&["allow", "d"])?.contains(&"db".to_owned()).then_some(()))
    })?;
    // Bridges of the engine's networks go by the networks' names.
    let networks = offered(&["allow", ""])?;
    ensure!(networks == ["app", "bridge", "db", "host", "none"], "{networks:?}");
    for (words, expected) in [
        (["allow", "app", "80", "--from", ""], ["web", "worker"].as_slice()),
        (["allow", "app", "80", "--from", "wo"], &["worker"]),
        (["allow", "app", "80", "--from", "web,"], &["web,worker"]),
        (["allow", "db", "80", "--json", "--from=e"], &["--from=elsewhere"]),
        (["allow", "nowhere", "80", "--from", ""], &[]),
    ] {
        let containers = offered(&words)?;
        ensure!(containers == expected, "{words:?}: {containers:?}");
    }
    Ok(())
}

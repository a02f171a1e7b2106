//! Tests of what a network is called: names, ids, and words that were chosen to deceive.

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Scene, Tested, WITHOUT_CONTAINERS};

pub(crate) fn tests() -> Vec<Test> {
    tests![names_that_mean_something_else, network_named_by_id, hostile_names]
}

fn names_that_mean_something_else() -> Result<()> {
    let scene = Scene::new()?;
    scene.engine.create_network("app_net", &[])?;
    scene.engine.run("app_net", &["--name", "db"])?;
    let container = "db is a container: allow the port for container:db, or for its network app_net";
    // By who is asked, none of which has heard of the name before.
    let explained = scene.daemon.cli(&["explain", "db", "5432"])?;
    ensure!(explained.status == 0 && explained.stdout.contains(container), "{explained:?}");
    let allowed = scene.daemon.allow(&["db", "5432"])?;
    ensure!(allowed.stdout.contains(container), "{allowed:?}");
    let status = scene.daemon.cli(&["status"])?;
    ensure!(status.stdout.contains(container), "{status:?}");
    let allowed = scene.daemon.allow(&["ap_net", "80"])?;
    ensure!(allowed.stdout.contains("did you mean app_net?"), "{allowed:?}");
    // It is a network after all.
    scene.engine.create_network("db", &[])?;
    scene.engine.run("db", &[])?;
    scene.daemon.wait_for_state("db", 5432, "waiting")?;
    patience::until("the network is found", || {
        let state = scene.daemon.rule_state("db", 5432)?;
        Ok(state.must_be_because("nothing_listens").ok())
    })
}

fn network_named_by_id() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let short = &network.id[..12];
    scene.daemon.allow(&[&network.id, "8080"])?;
    scene.daemon.allow(&[short, "8081=8080"])?;
    scene.must_be(&network.id, 8080, "steered")?;
    scene.must_be(short, 8081, "steered")?;
    scene.served(&container, network.at(8080), "service")?;
    scene.served(&container, network.at(8081), "service")?;
    // An id names this network, not the next one of its name.
    scene.engine.remove(&container)?;
    scene.engine.remove_network("app")?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.wait_for_state(short, 8081, "waiting")?;
    scene.refused(&container, network.at(8081))
}

/// Names that the Engine takes: they are arguments, JSON, TOML and text on a terminal, and nothing else.
fn hostile_names() -> Result<()> {
    const NAMES: &[&str] = &[
        "a.b_c-d",
        "docker0",
        "a=b",
        "#hash",
        "q\"uo'te",
        "back\\slash",
        "[[rule]]",
        "$(reboot)",
        "%s%n",
        "grün",
        "8080",
        "..",
    ];
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let mut made = Vec::new();
    for name in NAMES {
        // Newer Engines refuse some of them.
        let Ok(network) = scene.engine.create_network(name, &[]) else { continue };
        let output = scene.daemon.allow(&[name, "8080", "--comment", name])?;
        // One of the gateway, and one of what all containers call the host.
        let lines = if Tested::HOST_GATEWAY_IS_SHARED { 2 } else { 1 };
        ensure!(output.stdout.lines().count() == lines, "{lines} lines: {output:?}");
        scene.must_be(name, 8080, WITHOUT_CONTAINERS).with_context(|| format!("name {name:?}"))?;
        made.push((name, network));
    }
    ensure!(!made.is_empty(), "the engine takes none of these names");
    // Through the rules file and back.
    scene.daemon.restart()?;
    for (name, network) in &made {
        let container = scene.engine.run(&network.id, &[])?;
        scene.daemon.wait_for_state(name, 8080, "steered")?;
        scene.served(&container, network.at(8080), "service").with_context(|| format!("name {name:?}"))?;
        scene.engine.remove(&container)?;
        scene.daemon.deny(&[name, "8080"])?;
    }
    let rules = scene.daemon.status()?["rules"].as_array().map(Vec::len);
    ensure!(rules == Some(0), "{rules:?} rules are left");

    // Names that no rule takes, or that mean something else: refused in one line, and the id still does.
    for name in ["bridge:lab0", "with blank", "sla/sh", "new\nline", "\u{1b}[31mred"] {
        let Ok(network) = scene.engine.create_network(name, &[]) else { continue };
        let output = scene.daemon.cli(&["allow", name, "8080"])?;
        if name != "bridge:lab0" && output.status != 0 {
            ensure!(output.status == 2 && output.stderr.lines().count() == 1, "{name:?}: {output:?}");
        }
        ensure!(
            !output.stderr.contains('\u{1b}') && !output.stdout.contains('\u{1b}'),
            "{name:?}: {output:?}"
        );
        scene.daemon.allow(&[&network.id, "8080"])?;
        scene.must_be(&network.id, 8080, WITHOUT_CONTAINERS).with_context(|| format!("name {name:?}"))?;
        let human = scene.daemon.cli(&["status"])?;
        ensure!(human.status == 0 && !human.stdout.contains('\u{1b}'), "{human:?}");
    }
    Ok(())
}

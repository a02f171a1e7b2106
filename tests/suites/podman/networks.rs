//! Podman's networks: rules by name and by bridge. A bridge comes with the first container, goes with the
//! last, and its name is the next network's.

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Scene, at};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        container_reaches_loopback_service,
        the_hosts_name_is_the_gateway,
        bridge_is_served_by_its_own_name,
        default_network_is_served_by_both_names,
        container_of_another_network_is_refused,
        lan_is_refused,
        rule_waits_for_its_network,
        network_is_made_anew,
        successor_of_a_network_inherits_nothing,
        successor_inherits_nothing_while_the_daemon_is_dead,
        container_stops_and_starts,
        container_changes_networks,
        networks_without_a_bridge_are_blocked,
        every_network_is_tried_by_verify,
    ]
}

/// The main job, with the container's own program.
fn container_reaches_loopback_service() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.podman.create_network("app", &[])?;
    let container = scene.podman.run("app", &[])?;
    let _service = scene.service("loopback only", "127.0.0.1:8080")?;
    let dial = format!("echo over and out | timeout 5 nc {} 8080", network.gateway);
    let output = scene.podman.exec(&container, &["sh", "-c", &dial])?;
    ensure!(output.stdout.is_empty(), "out of reach without a rule: {output:?}");

    scene.daemon.allow(&["app", "8080"])?;
    let output = scene.podman.exec(&container, &["sh", "-c", &dial])?;
    ensure!(output.stdout.contains("loopback only") && output.stdout.contains("over and out"), "{output:?}");
    scene.must_be("app", 8080, "steered")?;
    let greeting = scene.served(&container, at(&network, 8080), "loopback only")?;
    ensure!(greeting.peer.ip() == scene.address(&container, &network)?, "{greeting:?}");
    let rule = scene.daemon.rule("app", 8080)?.context("the rule")?;
    ensure!(rule["gateways"][0]["interface"] == *network.bridge, "{rule}");

    // By its id, too.
    scene.daemon.deny(&["app", "8080"])?;
    scene.refused(&container, at(&network, 8080))?;
    scene.daemon.allow(&[&network.id[..12], "8080"])?;
    scene.served(&container, at(&network, 8080), "loopback only").map(drop)
}

/// With root's Podman `host.containers.internal` is what a rule's containers dial.
fn the_hosts_name_is_the_gateway() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.podman.create_network("app", &[])?;
    let container = scene.podman.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    let hosts = scene.podman.exec(&container, &["cat", "/etc/hosts"])?.stdout;
    let line = hosts.lines().find(|line| line.contains("host.containers.internal")).context("the name")?;
    ensure!(line.starts_with(&network.gateway.to_string()), "{hosts}");
    let dial = "echo over and out | timeout 5 nc host.containers.internal 8080";
    let output = scene.podman.exec(&container, &["sh", "-c", dial])?;
    ensure!(output.stdout.contains("over and out"), "{output:?}");
    Ok(())
}

fn bridge_is_served_by_its_own_name() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.podman.create_network("app", &[])?;
    let rule = format!("bridge:{}", network.bridge);
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&[&rule, "8080"])?;
    scene.must_be(&rule, 8080, "waiting")?;
    let container = scene.podman.run("app", &[])?;
    scene.daemon.wait_for_state(&rule, 8080, "steered")?;
    scene.served(&container, at(&network, 8080), "service")?;
    scene.daemon.allow(&["app", "8081=8080"])?;
    scene.served(&container, at(&network, 8081), "service").map(drop)
}

/// Podman calls it podman, and bridge where it speaks as Docker.
fn default_network_is_served_by_both_names() -> Result<()> {
    let scene = Scene::new()?;
    let container = scene.podman.run("podman", &[])?;
    let network = scene.podman.network("podman")?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    for name in ["podman", "bridge"] {
        scene.daemon.allow(&[name, "8080"])?;
        scene.must_be(name, 8080, "steered")?;
        scene.served(&container, at(&network, 8080), "service")?;
        scene.daemon.deny(&[name, "8080"])?;
    }
    scene.refused(&container, at(&network, 8080))
}

fn container_of_another_network_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.podman.create_network("app", &[])?;
    scene.podman.create_network("other", &[])?;
    let inside = scene.podman.run("app", &[])?;
    let outside = [scene.podman.run("other", &[])?, scene.podman.run("podman", &[])?];
    let steered = scene.service("steered", "127.0.0.1:8080")?;
    let relayed = scene.service("relayed", "127.0.0.1:9090")?;
    // On the gateway itself, which every network can dial.
    let _control = scene.service("control", &at(&app, 7070).to_string())?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090", "--path", "relay"])?;
    for container in &outside {
        scene.served(container, at(&app, 7070), "control")?;
        scene.refused(container, at(&app, 8080))?;
        client::not_served(&scene.podman.netns(container)?, None, at(&app, 9090))?;
    }
    ensure!(steered.accepted() == 0 && relayed.accepted() == 0);
    scene.served(&inside, at(&app, 8080), "steered")?;
    scene.served(&inside, at(&app, 9090), "relayed").map(drop)
}

fn lan_is_refused() -> Result<()> {
    // Before Podman, which takes the next free names for links of its own.
    let lan = Lab::with_host(NetNs::current()?).lan("192.0.2.1/24")?;
    let scene = Scene::new()?;
    let app = scene.podman.create_network("app", &[])?;
    let inside = scene.podman.run("app", &[])?;
    let steered = scene.service("steered", "127.0.0.1:8080")?;
    let relayed = scene.service("relayed", "127.0.0.1:9090")?;
    let _control = scene.service("control", &at(&app, 7070).to_string())?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090", "--path", "relay"])?;
    client::served_by(&lan, at(&app, 7070), "control")?;
    client::refused(&lan, at(&app, 8080))?;
    client::not_served(&lan, None, at(&app, 9090))?;
    ensure!(steered.accepted() == 0 && relayed.accepted() == 0);
    scene.served(&inside, at(&app, 8080), "steered")?;
    scene.served(&inside, at(&app, 9090), "relayed").map(drop)
}

/// Podman 4 tells nobody of a new network, and its bridge comes later.
fn rule_waits_for_its_network() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["later", "8080"])?;
    scene.must_be("later", 8080, "waiting")?;
    let network = scene.podman.create_network("later", &[])?;
    // The command has Podman asked anew.
    scene.daemon.allow(&["later", "8081"])?;
    let state = scene.daemon.rule_state("later", 8080)?;
    let says = "it comes with the network's first container";
    ensure!(state.why.as_deref().is_some_and(|why| why.contains(says)), "{state:?}");
    let container = scene.podman.run("later", &[])?;
    scene.daemon.wait_for_state("later", 8080, "steered")?;
    scene.served(&container, at(&network, 8080), "service").map(drop)
}

const OLD_SUBNET: &[&str] = &["--subnet", "10.50.0.0/24", "--gateway", "10.50.0.1"];

fn network_is_made_anew() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let first = scene.podman.create_network("app", OLD_SUBNET)?;
    let mut container = scene.podman.run("app", &[])?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&container, at(&first, 8080), "service")?;
    for subnet in [["--subnet", "10.51.0.0/24"].as_slice(), OLD_SUBNET] {
        scene.podman.remove(&container)?;
        scene.podman.podman(&["network", "rm", "app"])?;
        scene.daemon.wait_for_state("app", 8080, "waiting")?;
        let again = scene.podman.create_network("app", subnet)?;
        ensure!(again.id != first.id);
        container = scene.podman.run("app", &[])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, at(&again, 8080), "service")?;
    }
    Ok(())
}

/// Same subnet, same gateway, same bridge's name, another network: none of the old rules, not for a moment.
fn successor_of_a_network_inherits_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let services = [scene.service("steered", "127.0.0.1:8080")?, scene.service("relayed", "127.0.0.1:9090")?];
    let network = scene.podman.create_network("app", OLD_SUBNET)?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090", "--path", "relay"])?;
    for _ in 0..3 {
        let container = scene.podman.run("app", &[])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, at(&network, 8080), "steered")?;
        scene.daemon.wait_for_state("app", 9090, "relayed")?;
        scene.served(&container, at(&network, 9090), "relayed")?;
        let before = services.each_ref().map(Service::accepted);
        scene.podman.remove(&container)?;
        scene.podman.podman(&["network", "rm", "app"])?;

        let rogue = scene.podman.create_network("rogue", OLD_SUBNET)?;
        ensure!((&rogue.gateway, &rogue.bridge) == (&network.gateway, &network.bridge), "{rogue:?}");
        // From its first instruction on.
        let dials = format!("while :; do echo | nc {0} 8080; echo | nc {0} 9090; done", rogue.gateway);
        let fixed = ["run", "--detach", "--network", "rogue", "--stop-timeout", "0", "localhost/lab"];
        scene.podman.podman(&[&fixed, ["sh", "-c", &dials].as_slice()].concat())?;
        let container = scene.podman.run("rogue", &[])?;
        scene.refused(&container, at(&rogue, 8080))?;
        client::not_served(&scene.podman.netns(&container)?, None, at(&rogue, 9090))?;
        scene.daemon.wait_for_state("app", 8080, "waiting")?;
        let after = services.each_ref().map(Service::accepted);
        ensure!(before == after, "rogue was served: {before:?}, {after:?}");

        scene.podman.podman(&["network", "rm", "--force", "--time", "0", "rogue"])?;
        scene.podman.create_network("app", OLD_SUBNET)?;
    }
    Ok(())
}

fn successor_inherits_nothing_while_the_daemon_is_dead() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let network = scene.podman.create_network("app", OLD_SUBNET)?;
    let container = scene.podman.run("app", &[])?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.kill9()?;
    scene.served(&container, at(&network, 8080), "service")?;
    scene.podman.remove(&container)?;
    scene.podman.podman(&["network", "rm", "app"])?;
    let rogue = scene.podman.create_network("rogue", OLD_SUBNET)?;
    ensure!(rogue.bridge == network.bridge, "{rogue:?}");
    let container = scene.podman.run("rogue", &[])?;
    scene.refused(&container, at(&network, 8080))?;
    // Nobody there who could say whose the bridge is: what is remembered is not believed of another
    // interface.
    scene.podman.down()?;
    scene.daemon.restart()?;
    scene.must_be("app", 8080, "waiting")?;
    scene.refused(&container, at(&network, 8080))?;
    scene.podman.up()?;
    scene.wait_for_podman("reachable")?;
    scene.must_be("app", 8080, "waiting")?;
    scene.refused(&container, at(&network, 8080))
}

fn container_stops_and_starts() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.podman.create_network("app", &[])?;
    let container = scene.podman.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    for _ in 0..3 {
        scene.served(&container, at(&network, 8080), "service")?;
        scene.podman.podman(&["stop", "--time", "0", &container.id])?;
        let state = scene.daemon.wait_for_state("app", 8080, "waiting")?;
        state.must_be_because("no_interface")?;
        scene.podman.podman(&["start", &container.id])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
    }
    scene.served(&container, at(&network, 8080), "service").map(drop)
}

/// The bridge comes with a container that runs already.
fn container_changes_networks() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.podman.create_network("app", &[])?;
    scene.podman.create_network("other", &[])?;
    let container = scene.podman.run("other", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, "waiting")?;
    for _ in 0..2 {
        client::not_served(&scene.podman.netns(&container)?, None, at(&app, 8080))?;
        scene.podman.podman(&["network", "connect", "app", &container.id])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, at(&app, 8080), "service")?;
        scene.podman.podman(&["network", "disconnect", "app", &container.id])?;
        scene.daemon.wait_for_state("app", 8080, "waiting")?;
    }
    Ok(())
}

/// Of macvlan Podman names the parent, which is the way to the LAN.
fn networks_without_a_bridge_are_blocked() -> Result<()> {
    let scene = Scene::new()?;
    scene.host.ip("link add lan type bridge")?;
    scene.host.ip("address add 192.0.2.1/24 dev lan")?;
    scene.host.ip("link set lan up")?;
    let parent = ["--driver", "macvlan", "--opt", "parent=lan", "--subnet", "192.0.2.0/24"];
    scene.podman.podman(&[&["network", "create"], parent.as_slice(), &["vlan"]].concat())?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["vlan", "8080"])?;
    let state = scene.daemon.rule_state("vlan", 8080)?;
    ensure!(state.state == "blocked", "{state:?}");
    state.must_be_because("driver_without_bridge")?;
    Ok(())
}

fn every_network_is_tried_by_verify() -> Result<()> {
    let scene = Scene::new()?;
    scene.podman.create_network("app", &[])?;
    scene.podman.create_network("other", &[])?;
    scene.podman.run("app", &[])?;
    scene.podman.run("other", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    let output = scene.daemon.cli(&["verify"])?;
    ensure!(output.status == 0 && output.stdout.contains("all as they should be"), "{output:?}");
    ensure!(output.stdout.contains("other"), "{output:?}");
    Ok(())
}

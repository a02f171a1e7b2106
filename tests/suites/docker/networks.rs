//! Networks of an engine: rules by name, steered.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::docker::Network;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::{self, Service};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;

use super::{Scene, address, at};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        container_reaches_loopback_service,
        container_of_another_network_is_refused,
        explain_foretells_what_containers_meet,
        internal_network_is_served,
        default_bridge_is_served,
        bridge_with_a_name_of_its_own_is_served,
        port_published_on_loopback_is_served,
        thousands_of_ports_take_seconds,
        ipv6_network_is_served,
        mptcp_listener_is_relayed: [Need::Mptcp],
        rule_waits_for_its_network,
        network_is_made_anew,
        successor_of_a_network_inherits_nothing,
        successor_inherits_nothing_while_the_daemon_is_dead,
        container_restarts,
        container_changes_networks,
        networks_without_a_bridge_are_blocked,
        every_network_is_tried_by_verify,
        firewall_is_left_to_docker,
    ]
}

/// The main job, with the container's own program.
fn container_reaches_loopback_service() -> Result<()> {
    let scene = Scene::new()?;
    ensure!(scene.docker_state()? == ("reachable".to_owned(), None));
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("loopback only", "127.0.0.1:8080")?;
    let dial = format!("echo over and out | timeout 5 nc {} 8080", network.gateway);
    let output = scene.engine.exec(&container, &["sh", "-c", &dial])?;
    ensure!(output.stdout.is_empty(), "out of reach without a rule: {output:?}");

    scene.daemon.allow(&["app", "8080"])?;
    let output = scene.engine.exec(&container, &["sh", "-c", &dial])?;
    ensure!(output.stdout.contains("loopback only") && output.stdout.contains("over and out"), "{output:?}");
    scene.must_be("app", 8080, "steered")?;
    let greeting = scene.served(&container, at(&network, 8080), "loopback only")?;
    ensure!(greeting.peer.ip().to_string() == address(&scene, &container, &network)?, "{greeting:?}");
    ensure!(greeting.accept == greeting.peer, "{greeting:?}");

    scene.daemon.allow(&["app", "8081=8080", "--source", "loopback"])?;
    let greeting = scene.served(&container, at(&network, 8081), "loopback only")?;
    ensure!(
        greeting.peer.ip().to_string() == "127.0.0.1" && greeting.accept == greeting.peer,
        "{greeting:?}"
    );

    scene.daemon.deny(&["app", "8080", "8081"])?;
    scene.refused(&container, at(&network, 8080))
}

fn container_of_another_network_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    scene.engine.create_network("other", &[])?;
    let inside = scene.engine.run("app", &[])?;
    let outside = [scene.engine.run("other", &[])?, scene.engine.run("bridge", &[])?];
    let steered = scene.service("steered", "127.0.0.1:8080")?;
    let relayed = scene.service("relayed", "127.0.0.1:9090")?;
    // On the gateway itself: Docker's own firewall lets every network dial it.
    let _control = scene.service("control", &at(&app, 7070).to_string())?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090", "--path", "relay"])?;
    for container in &outside {
        scene.served(container, at(&app, 7070), "control")?;
        scene.refused(container, at(&app, 8080))?;
        client::not_served(&scene.engine.netns(container)?, None, at(&app, 9090))?;
    }
    ensure!(steered.accepted() == 0 && relayed.accepted() == 0);
    scene.served(&inside, at(&app, 8080), "steered")?;
    scene.served(&inside, at(&app, 9090), "relayed")?;
    Ok(())
}

fn explain_foretells_what_containers_meet() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    let other = scene.engine.create_network("other", &[])?;
    let inside = scene.engine.run("app", &[])?;
    let outside = scene.engine.run("other", &[])?;
    let sealed = scene.engine.run("none", &["--name", "agent"])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["container:agent", "8080"])?;
    let explained = |network: &str, port: &str| -> Result<serde_json::Value> {
        let output = scene.daemon.cli(&["explain", "--json", network, port])?;
        ensure!(output.status == 0, "{output:?}");
        Ok(serde_json::from_str(&output.stdout)?)
    };
    let steered = explained("app", "8080")?;
    ensure!(steered["ways"][0]["fate"] == "steered", "{steered:#}");
    let network = steered["steps"][0]["text"].as_str().context("a text")?;
    let bridge = format!("br-{}", &app.id[..12]);
    for word in [&app.id[..12], &bridge, &app.gateway.to_string()] {
        ensure!(network.contains(word), "{word} in {network}");
    }
    scene.served(&inside, at(&app, 8080), "service")?;
    let by_id = explained(&app.id, "8080")?;
    ensure!(by_id["ways"][0]["fate"] == "steered", "an id means the same network: {by_id:#}");

    let refused = explained("other", "8080")?;
    ensure!(refused["ways"][0]["fate"] == "refused", "{refused:#}");
    ensure!(refused["steps"][1]["text"].as_str().is_some_and(|text| text.contains("nearest: app 8080")));
    scene.refused(&outside, at(&other, 8080))?;

    let relayed = explained("container:agent", "8080")?;
    ensure!(relayed["ways"][0]["fate"] == "relayed", "{relayed:#}");
    scene.served(&sealed, "127.0.0.1:8080".parse()?, "service")?;
    // Nobody has ever asked Docker about this one.
    let unruled = format!("container:{}", outside.id);
    let refused = explained(&unruled, "8080")?;
    ensure!(refused["ways"][0]["fate"] == "refused", "{refused:#}");
    scene.refused(&outside, "127.0.0.1:8080".parse()?)?;

    let nowhere = explained("to-come", "8080")?;
    ensure!(nowhere["outcome"].as_str().is_some_and(|text| text.contains("no Docker network to-come")));
    for (network, word) in [("none", "driver null"), ("host", "where localhost is the host's")] {
        let no_bridge = explained(network, "8080")?;
        ensure!(no_bridge["outcome"].as_str().is_some_and(|text| text.contains(word)), "{no_bridge:#}");
    }
    Ok(())
}

fn internal_network_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("sealed", &["--internal"])?;
    let container = scene.engine.run("sealed", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["sealed", "8080"])?;
    scene.must_be("sealed", 8080, "steered")?;
    scene.served(&container, at(&network, 8080), "service")?;
    scene.refused(&container, at(&network, 8081))
}

fn default_bridge_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let container = scene.engine.run("bridge", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["bridge", "8080"])?;
    scene.must_be("bridge", 8080, "steered")?;
    let rule = scene.daemon.rule("bridge", 8080)?.context("the rule")?;
    ensure!(rule["gateways"][0]["interface"] == "docker0", "{rule}");
    let gateway = rule["gateways"][0]["address"].as_str().context("an address")?.parse()?;
    scene.served(&container, SocketAddr::new(gateway, 8080), "service")?;
    Ok(())
}

fn bridge_with_a_name_of_its_own_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let named = &["--opt", "com.docker.network.bridge.name=ownbridge"];
    let network = scene.engine.create_network("named", named)?;
    let container = scene.engine.run("named", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["named", "8080"])?;
    scene.served(&container, at(&network, 8080), "service")?;
    let rule = scene.daemon.rule("named", 8080)?.context("the rule")?;
    ensure!(rule["gateways"][0]["interface"] == "ownbridge", "{rule}");
    Ok(())
}

/// Not as many minutes: the command itself gives up after half of one.
fn thousands_of_ports_take_seconds() -> Result<()> {
    let scene = Scene::new()?;
    scene.engine.create_network("app", &[])?;
    scene.daemon.allow(&["app", "20000-39999"])?;
    scene.daemon.deny(&["app", "20000-39999"]).map(drop)
}

/// A port that another container publishes on the host's localhost is a service like any other: for the
/// allowed network, and for no other.
fn port_published_on_loopback_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    let other = scene.engine.create_network("other", &[])?;
    scene.engine.create_network("web", &[])?;
    let inside = scene.engine.run("app", &[])?;
    let outside = scene.engine.run("other", &[])?;
    let web = scene.engine.run("web", &["--publish", "127.0.0.1:8080:80"])?;
    let _server = Service::start(&scene.engine.netns(&web)?, "published", "0.0.0.0:80")?;
    for container in [&inside, &outside] {
        scene.refused(container, at(&app, 8080))?;
    }
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, "steered")?;
    scene.served(&inside, at(&app, 8080), "published")?;
    scene.refused(&outside, at(&app, 8080))?;
    scene.refused(&outside, at(&other, 8080))?;
    scene.daemon.deny(&["app", "8080"])?;
    scene.refused(&inside, at(&app, 8080))
}

fn ipv6_network_is_served() -> Result<()> {
    let scene = Scene::new()?;
    scene.engine.create_network("six", &["--ipv6", "--subnet", "fd00:6::/64", "--gateway", "fd00:6::1"])?;
    let container = scene.engine.run("six", &[])?;
    let _six = scene.service("six", "[::1]:8080")?;
    scene.daemon.allow(&["six", "8080"])?;
    let to = "[fd00:6::1]:8080".parse()?;
    // Docker does not switch duplicate address detection off; the container's address may take a moment.
    let netns = scene.engine.netns(&container)?;
    patience::until("the container's IPv6 address is usable", || {
        Ok((!netns.ip_output("-6 addr show tentative")?.contains("fd00:6")).then_some(()))
    })?;
    let greeting = scene.served(&container, to, "six")?;
    ensure!(greeting.peer.ip().to_string().starts_with("fd00:6::"), "{greeting:?}");
    let rule = scene.daemon.rule("six", 8080)?.context("the rule")?;
    let gateways = rule["gateways"].as_array().context("gateways")?;
    let six =
        gateways.iter().find(|gateway| gateway["address"] == "fd00:6::1").context("the IPv6 gateway")?;
    ensure!(six["state"] == "steered", "{rule}");
    Ok(())
}

/// Docker's NAT and connection tracking are on the relay's way.
fn mptcp_listener_is_relayed() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let options = service::Options { mptcp: true, ..service::Options::new("go", "127.0.0.1:8080")? };
    let _service = Service::start_with(&scene.host, &options)?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, "relayed")?;
    let greeting = scene.served(&container, at(&network, 8080), "go")?;
    ensure!(greeting.peer.ip().to_string() == address(&scene, &container, &network)?, "{greeting:?}");
    Ok(())
}

fn rule_waits_for_its_network() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["later", "8080"])?;
    let state = scene.daemon.rule_state("later", 8080)?;
    ensure!(state.state == "waiting", "{state:?}");
    state.must_be_because("no_such_network")?;
    let network = scene.engine.create_network("later", &[])?;
    let container = scene.engine.run("later", &[])?;
    scene.daemon.wait_for_state("later", 8080, "steered")?;
    scene.served(&container, at(&network, 8080), "service")?;
    Ok(())
}

/// Of a network that names its subnet the Engine tells the gateway only if that was named, too.
const OLD_SUBNET: &[&str] = &["--subnet", "10.50.0.0/24", "--gateway", "10.50.0.1"];

fn network_is_made_anew() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let first = scene.engine.create_network("app", OLD_SUBNET)?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&container, at(&first, 8080), "service")?;
    for subnet in [["--subnet", "10.51.0.0/24", "--gateway", "10.51.0.1"].as_slice(), OLD_SUBNET] {
        let container = scene.engine.docker(&["ps", "--quiet"])?;
        scene.engine.docker(&["rm", "--force", &container])?;
        scene.engine.remove_network("app")?;
        scene.daemon.wait_for_state("app", 8080, "waiting")?;
        let again = scene.engine.create_network("app", subnet)?;
        ensure!(again.id != first.id);
        let container = scene.engine.run("app", &[])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, at(&again, 8080), "service")?;
    }
    Ok(())
}

/// Same subnet, same gateway, another name: none of the old rules.
fn successor_of_a_network_inherits_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let (network, _) = replace_network(&scene, || Ok(()))?;
    let container = scene.engine.run("rogue", &[])?;
    scene.refused(&container, at(&network, 8080))?;
    client::not_served(&scene.engine.netns(&container)?, None, at(&network, 9090))?;
    scene.daemon.wait_for_state("app", 8080, "waiting").map(drop)
}

/// Removes `app`, which has rules for 8080 (steered) and 9090 (relayed), and makes `rogue` on the same
/// subnet.
fn replace_network(scene: &Scene, before: impl FnOnce() -> Result<()>) -> Result<(Network, [Service; 2])> {
    let services = [scene.service("steered", "127.0.0.1:8080")?, scene.service("relayed", "127.0.0.1:9090")?];
    let network = scene.engine.create_network("app", OLD_SUBNET)?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090", "--path", "relay"])?;
    scene.served(&container, at(&network, 8080), "steered")?;
    scene.served(&container, at(&network, 9090), "relayed")?;
    before()?;
    scene.engine.remove(&container)?;
    scene.engine.remove_network("app")?;
    let rogue = scene.engine.create_network("rogue", OLD_SUBNET)?;
    ensure!(rogue.gateway == network.gateway, "{rogue:?} after {network:?}");
    Ok((rogue, services))
}

fn successor_inherits_nothing_while_the_daemon_is_dead() -> Result<()> {
    let mut scene = Scene::new()?;
    let _services = [scene.service("steered", "127.0.0.1:8080")?, scene.service("other", "127.0.0.1:8081")?];
    let network = scene.engine.create_network("app", OLD_SUBNET)?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&container, at(&network, 8080), "steered")?;
    scene.daemon.kill9()?;
    scene.served(&container, at(&network, 8080), "steered")?;
    scene.engine.remove(&container)?;
    scene.engine.remove_network("app")?;
    scene.engine.create_network("rogue", OLD_SUBNET)?;
    let container = scene.engine.run("rogue", &[])?;
    // The entry names the interface that has gone.
    scene.refused(&container, at(&network, 8080))?;
    scene.daemon.restart()?;
    scene.must_be("app", 8080, "waiting")?;
    scene.refused(&container, at(&network, 8080))
}

fn container_restarts() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    for _ in 0..2 {
        scene.served(&container, at(&network, 8080), "service")?;
        scene.engine.docker(&["restart", "--time", "0", &container.id])?;
    }
    scene.served(&container, at(&network, 8080), "service")?;
    scene.must_be("app", 8080, "steered")
}

fn container_changes_networks() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    scene.engine.create_network("other", &[])?;
    let container = scene.engine.run("other", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.refused(&container, at(&app, 8080))?;
    scene.engine.docker(&["network", "connect", "app", &container.id])?;
    scene.served(&container, at(&app, 8080), "service")?;
    scene.engine.docker(&["network", "disconnect", "app", &container.id])?;
    scene.refused(&container, at(&app, 8080))
}

fn networks_without_a_bridge_are_blocked() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    for network in ["host", "none"] {
        scene.daemon.allow(&[network, "8080"])?;
        let state = scene.daemon.rule_state(network, 8080)?;
        ensure!(state.state == "blocked", "{network}: {state:?}");
        state.must_be_because(if network == "host" { "host_network" } else { "driver_without_bridge" })?;
    }
    Ok(())
}

/// Also those that no rule names, a container that does not run among them.
fn every_network_is_tried_by_verify() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &["--internal"])?;
    let named = &["--opt", "com.docker.network.bridge.name=ownbridge"];
    let other = scene.engine.create_network("other", named)?;
    let container = scene.engine.run("app", &[])?;
    scene.engine.run("none", &["--name", "lonely"])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090=8080", "--path", "relay"])?;
    scene.daemon.allow(&["container:lonely", "8080"])?;
    let output = scene.daemon.cli(&["verify", "--json"])?;
    ensure!(output.status == 0, "{output:?}");
    let report: serde_json::Value = serde_json::from_str(&output.stdout)?;
    let checks = report["checks"].as_array().context("no checks")?;
    let has = |from: &str, to: SocketAddr, expected: &str| {
        let to = to.to_string();
        ensure!(
            checks.iter().any(|c| c["from"] == from && c["to"] == *to && c["expected"] == expected),
            "{from} -> {to}: {checks:#?}"
        );
        Ok(())
    };
    has("app", at(&app, 8080), "open")?;
    has("app", at(&app, 9090), "open")?;
    has("container:lonely", "127.0.0.1:8080".parse()?, "open")?;
    for from in ["bridge", "other", "the LAN"] {
        has(from, at(&app, 8080), "closed")?;
    }
    has("app", at(&other, 8080), "closed")?;
    has("other", at(&other, 8080), "closed")?;
    scene.served(&container, at(&app, 8080), "service").map(drop)
}

fn firewall_is_left_to_docker() -> Result<()> {
    let scene = Scene::new()?;
    let rules = || -> Result<Vec<String>> {
        let mut all = Vec::new();
        for program in ["iptables-save", "ip6tables-save"] {
            let output = scene.host.command(program).output()?;
            // Without comments, which hold the time, and without counters.
            let lines = String::from_utf8_lossy(&output.stdout).into_owned();
            let rules = lines.lines().filter(|line| !line.starts_with('#'));
            all.extend(rules.map(|line| line.split(" [").next().unwrap_or_default().to_owned()));
        }
        Ok(all)
    };
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let before = rules()?;
    ensure!(before.iter().any(|line| line.contains("DOCKER")), "Docker's own rules: {before:?}");
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "8081=8080", "--path", "relay"])?;
    scene.served(&container, at(&network, 8080), "service")?;
    scene.served(&container, at(&network, 8081), "service")?;
    ensure!(rules()? == before, "rules in force");
    scene.daemon.deny(&["app", "8080", "8081"])?;
    ensure!(rules()? == before, "rules removed");
    Ok(())
}

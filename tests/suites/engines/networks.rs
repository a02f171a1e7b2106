//! Networks of an engine: rules by name, steered.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::engine::{Container, Engine};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::service::{self, Service};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{client, patience};
use lbridge_tests::tests;

use super::{IMAGE, Scene, Tested, WITHOUT_CONTAINERS};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        container_reaches_loopback_service,
        bridge_is_served_by_its_own_name,
        default_network_is_served,
        container_of_another_network_is_refused,
        lan_is_refused,
        explain_foretells_what_containers_meet,
        internal_network_is_served,
        ipv6_network_is_served,
        mptcp_listener_is_relayed: [Need::Mptcp],
        rule_waits_for_its_network,
        network_is_made_anew,
        successor_of_a_network_inherits_nothing,
        successor_inherits_nothing_while_the_daemon_is_dead,
        container_stops_and_starts,
        container_changes_networks,
        every_network_is_tried_by_verify,
        firewall_is_left_to_the_engine,
    ]
}

/// Docker reports the gateway of a network that names its subnet only if that was named, too.
const OLD_SUBNET: &[&str] = &["--subnet", "10.50.0.0/24", "--gateway", "10.50.0.1"];

/// The main job, with the container's own program.
fn container_reaches_loopback_service() -> Result<()> {
    let scene = Scene::new()?;
    ensure!(scene.engine_state()? == ("reachable".to_owned(), None));
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
    let greeting = scene.served(&container, network.at(8080), "loopback only")?;
    ensure!(greeting.peer.ip().to_string() == scene.address(&container, &network)?, "{greeting:?}");
    ensure!(greeting.accept == greeting.peer, "{greeting:?}");
    let rule = scene.daemon.rule("app", 8080)?.context("the rule")?;
    ensure!(rule["gateways"][0]["interface"] == *network.bridge, "{rule}");

    scene.daemon.allow(&["app", "8081=8080", "--source", "loopback"])?;
    let greeting = scene.served(&container, network.at(8081), "loopback only")?;
    ensure!(
        greeting.peer.ip().to_string() == "127.0.0.1" && greeting.accept == greeting.peer,
        "{greeting:?}"
    );

    scene.daemon.deny(&["app", "8080", "8081"])?;
    scene.refused(&container, network.at(8080))
}

fn bridge_is_served_by_its_own_name() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let rule = format!("bridge:{}", network.bridge);
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&[&rule, "8080"])?;
    scene.must_be(&rule, 8080, WITHOUT_CONTAINERS)?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.wait_for_state(&rule, 8080, "steered")?;
    scene.served(&container, network.at(8080), "service")?;
    scene.daemon.allow(&["app", "8081=8080"])?;
    scene.served(&container, network.at(8081), "service").map(drop)
}

/// By the engine's name for it, and by that of Docker's API.
fn default_network_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let container = scene.engine.run(Tested::DEFAULT_NETWORK, &[])?;
    let network = scene.engine.network(Tested::DEFAULT_NETWORK)?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    for name in [Tested::DEFAULT_NETWORK, "bridge"] {
        scene.daemon.allow(&[name, "8080"])?;
        scene.must_be(name, 8080, "steered")?;
        let rule = scene.daemon.rule(name, 8080)?.context("the rule")?;
        ensure!(rule["gateways"][0]["interface"] == Tested::DEFAULT_BRIDGE, "{rule}");
        scene.served(&container, network.at(8080), "service")?;
        scene.daemon.deny(&[name, "8080"])?;
    }
    scene.refused(&container, network.at(8080))
}

fn internal_network_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("sealed", &["--internal"])?;
    let container = scene.engine.run("sealed", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["sealed", "8080"])?;
    scene.must_be("sealed", 8080, "steered")?;
    scene.served(&container, network.at(8080), "service")?;
    scene.refused(&container, network.at(8081))
}

fn rule_waits_for_its_network() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["later", "8080"])?;
    let state = scene.daemon.rule_state("later", 8080)?;
    ensure!(state.state == "waiting", "{state:?}");
    state.must_be_because("no_such_network")?;
    let network = scene.engine.create_network("later", &[])?;
    if !Tested::TELLS_OF_NETWORKS {
        // A command has the engine asked.
        scene.daemon.allow(&["later", "8081"])?;
    }
    let state = scene.daemon.wait_for_state("later", 8080, WITHOUT_CONTAINERS)?;
    if !Tested::BRIDGE_WITHOUT_CONTAINERS {
        let says = "it comes with the network's first container";
        ensure!(state.why.as_deref().is_some_and(|why| why.contains(says)), "{state:?}");
    }
    let container = scene.engine.run("later", &[])?;
    scene.daemon.wait_for_state("later", 8080, "steered")?;
    scene.served(&container, network.at(8080), "service").map(drop)
}

fn network_is_made_anew() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let first = scene.engine.create_network("app", OLD_SUBNET)?;
    let mut container = scene.engine.run("app", &[])?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&container, first.at(8080), "service")?;
    for subnet in [["--subnet", "10.51.0.0/24", "--gateway", "10.51.0.1"].as_slice(), OLD_SUBNET] {
        scene.engine.remove(&container)?;
        scene.engine.remove_network("app")?;
        scene.daemon.wait_for_state("app", 8080, "waiting")?;
        let again = scene.engine.create_network("app", subnet)?;
        ensure!(again.id != first.id);
        container = scene.engine.run("app", &[])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, again.at(8080), "service")?;
    }
    Ok(())
}

/// Same subnet, same gateway, with Podman the same bridge's name, another network: none of the old rules, not
/// for a moment.
fn successor_of_a_network_inherits_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let services = [scene.service("steered", "127.0.0.1:8080")?, scene.service("relayed", "127.0.0.1:9090")?];
    let network = scene.engine.create_network("app", OLD_SUBNET)?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090", "--path", "relay"])?;
    for _ in 0..3 {
        let container = scene.engine.run("app", &[])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, network.at(8080), "steered")?;
        scene.daemon.wait_for_state("app", 9090, "relayed")?;
        scene.served(&container, network.at(9090), "relayed")?;
        let before = services.each_ref().map(Service::accepted);
        scene.engine.remove(&container)?;
        scene.engine.remove_network("app")?;

        let rogue = scene.engine.create_network("rogue", OLD_SUBNET)?;
        ensure!(rogue.gateway == network.gateway, "{rogue:?} after {network:?}");
        ensure!((rogue.bridge == network.bridge) == Tested::REUSES_BRIDGE_NAMES, "{rogue:?}");
        // From its first instruction on.
        let dials = format!("while :; do echo | nc {0} 8080; echo | nc {0} 9090; done", rogue.gateway);
        let fixed = ["run", "--detach", "--network", "rogue", "--stop-timeout", "0", IMAGE];
        let dialler = Container { id: scene.engine.cli(&[&fixed[..], &["sh", "-c", &dials]].concat())? };
        let container = scene.engine.run("rogue", &[])?;
        scene.refused(&container, rogue.at(8080))?;
        scene.not_served(&container, rogue.at(9090))?;
        scene.daemon.wait_for_state("app", 8080, "waiting")?;
        let after = services.each_ref().map(Service::accepted);
        ensure!(before == after, "rogue was served: {before:?}, {after:?}");

        scene.engine.remove(&container)?;
        scene.engine.remove(&dialler)?;
        scene.engine.remove_network("rogue")?;
        scene.engine.create_network("app", OLD_SUBNET)?;
    }
    Ok(())
}

fn successor_inherits_nothing_while_the_daemon_is_dead() -> Result<()> {
    let mut scene = Scene::lasting()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let network = scene.engine.create_network("app", OLD_SUBNET)?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&container, network.at(8080), "service")?;
    scene.daemon.kill9()?;
    scene.served(&container, network.at(8080), "service")?;
    scene.engine.remove(&container)?;
    scene.engine.remove_network("app")?;
    let rogue = scene.engine.create_network("rogue", OLD_SUBNET)?;
    ensure!((rogue.bridge == network.bridge) == Tested::REUSES_BRIDGE_NAMES, "{rogue:?}");
    let netns = scene.engine.netns(&scene.engine.run("rogue", &[])?)?;
    // The entry names the interface that has gone.
    client::refused(&netns, network.at(8080))?;
    // Nobody there who could say whose the bridge is: what is remembered is not believed of another
    // interface.
    scene.engine.down()?;
    scene.daemon.restart()?;
    scene.must_be("app", 8080, "waiting")?;
    client::refused(&netns, network.at(8080))?;
    scene.engine.up()?;
    scene.wait_for_engine("reachable")?;
    scene.must_be("app", 8080, "waiting")?;
    client::refused(&netns, network.at(8080))
}

fn container_stops_and_starts() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    for _ in 0..3 {
        scene.served(&container, network.at(8080), "service")?;
        scene.engine.cli(&["stop", "--time", "0", &container.id])?;
        let state = scene.daemon.wait_for_state("app", 8080, WITHOUT_CONTAINERS)?;
        if !Tested::BRIDGE_WITHOUT_CONTAINERS {
            state.must_be_because("no_interface")?;
        }
        scene.engine.cli(&["start", &container.id])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
    }
    scene.served(&container, network.at(8080), "service")?;
    scene.engine.cli(&["restart", "--time", "0", &container.id])?;
    scene.daemon.wait_for_state("app", 8080, "steered")?;
    scene.served(&container, network.at(8080), "service").map(drop)
}

/// With Podman the bridge comes with a container that runs already.
fn container_changes_networks() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    scene.engine.create_network("other", &[])?;
    let container = scene.engine.run("other", &[])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, WITHOUT_CONTAINERS)?;
    for _ in 0..2 {
        scene.not_served(&container, app.at(8080))?;
        scene.engine.cli(&["network", "connect", "app", &container.id])?;
        scene.daemon.wait_for_state("app", 8080, "steered")?;
        scene.served(&container, app.at(8080), "service")?;
        scene.engine.cli(&["network", "disconnect", "app", &container.id])?;
        scene.daemon.wait_for_state("app", 8080, WITHOUT_CONTAINERS)?;
    }
    scene.not_served(&container, app.at(8080))
}

/// Also those that no rule names, a container without a network among them.
fn every_network_is_tried_by_verify() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &["--internal"])?;
    let other = scene.engine.create_network("other", &[])?;
    let container = scene.engine.run("app", &[])?;
    for network in ["other", Tested::DEFAULT_NETWORK] {
        scene.engine.run(network, &[])?;
    }
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
    has("app", app.at(8080), "open")?;
    has("app", app.at(9090), "open")?;
    has("container:lonely", "127.0.0.1:8080".parse()?, "open")?;
    for from in [Tested::DEFAULT_NETWORK, "other", "the LAN"] {
        has(from, app.at(8080), "closed")?;
    }
    has("app", other.at(8080), "closed")?;
    has("other", other.at(8080), "closed")?;
    scene.served(&container, app.at(8080), "service").map(drop)
}

fn firewall_is_left_to_the_engine() -> Result<()> {
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
    ensure!(before.iter().any(|line| line.starts_with("-A")), "the engine's own rules: {before:?}");
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "8081=8080", "--path", "relay"])?;
    scene.served(&container, network.at(8080), "service")?;
    scene.served(&container, network.at(8081), "service")?;
    ensure!(rules()? == before, "rules in force");
    scene.daemon.deny(&["app", "8080", "8081"])?;
    ensure!(rules()? == before, "rules removed");
    Ok(())
}

fn container_of_another_network_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    scene.engine.create_network("other", &[])?;
    let inside = scene.engine.run("app", &[])?;
    let outside = [scene.engine.run("other", &[])?, scene.engine.run(Tested::DEFAULT_NETWORK, &[])?];
    let steered = scene.service("steered", "127.0.0.1:8080")?;
    let relayed = scene.service("relayed", "127.0.0.1:9090")?;
    // On the gateway itself, which every network can dial: no engine's firewall forbids it.
    let _control = scene.service("control", &app.at(7070).to_string())?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090", "--path", "relay"])?;
    for container in &outside {
        scene.served(container, app.at(7070), "control")?;
        scene.refused(container, app.at(8080))?;
        scene.not_served(container, app.at(9090))?;
    }
    ensure!(steered.accepted() == 0 && relayed.accepted() == 0);
    scene.served(&inside, app.at(8080), "steered")?;
    scene.served(&inside, app.at(9090), "relayed")?;
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
    for word in [&app.id[..12], &app.bridge, &app.gateway.to_string()] {
        ensure!(network.contains(word), "{word} in {network}");
    }
    scene.served(&inside, app.at(8080), "service")?;
    let by_id = explained(&app.id, "8080")?;
    ensure!(by_id["ways"][0]["fate"] == "steered", "an id means the same network: {by_id:#}");

    let refused = explained("other", "8080")?;
    ensure!(refused["ways"][0]["fate"] == "refused", "{refused:#}");
    ensure!(refused["steps"][1]["text"].as_str().is_some_and(|text| text.contains("nearest: app 8080")));
    scene.refused(&outside, other.at(8080))?;

    let relayed = explained("container:agent", "8080")?;
    ensure!(relayed["ways"][0]["fate"] == "relayed", "{relayed:#}");
    scene.served(&sealed, "127.0.0.1:8080".parse()?, "service")?;
    // Nobody has ever asked Docker about this one.
    let unruled = format!("container:{}", outside.id);
    let refused = explained(&unruled, "8080")?;
    ensure!(refused["ways"][0]["fate"] == "refused", "{refused:#}");
    scene.refused(&outside, "127.0.0.1:8080".parse()?)?;

    let nowhere = explained("to-come", "8080")?;
    ensure!(
        nowhere["outcome"].as_str().is_some_and(|text| text.contains("the engine has no network to-come"))
    );
    for (network, word) in [("none", "driver null"), ("host", "their localhost is the host's")] {
        let word = if Tested::LISTS_HOST_AND_NONE { word } else { "the engine has no network" };
        let no_bridge = explained(network, "8080")?;
        ensure!(no_bridge["outcome"].as_str().is_some_and(|text| text.contains(word)), "{no_bridge:#}");
    }
    Ok(())
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

/// The engine's NAT and connection tracking are on the relay's way.
fn mptcp_listener_is_relayed() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let container = scene.engine.run("app", &[])?;
    let options = service::Options { mptcp: true, ..service::Options::new("go", "127.0.0.1:8080")? };
    let _service = Service::start_with(&scene.host, &options)?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, "relayed")?;
    let greeting = scene.served(&container, network.at(8080), "go")?;
    ensure!(greeting.peer.ip().to_string() == scene.address(&container, &network)?, "{greeting:?}");
    Ok(())
}

fn lan_is_refused() -> Result<()> {
    // Before the engine, of which Podman takes the next free names for links of its own.
    let lan = Lab::with_host(NetNs::current()?).lan("192.0.2.1/24")?;
    let scene = Scene::new()?;
    let app = scene.engine.create_network("app", &[])?;
    let inside = scene.engine.run("app", &[])?;
    let steered = scene.service("steered", "127.0.0.1:8080")?;
    let relayed = scene.service("relayed", "127.0.0.1:9090")?;
    let _control = scene.service("control", &app.at(7070).to_string())?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.daemon.allow(&["app", "9090", "--path", "relay"])?;
    client::served_by(&lan, app.at(7070), "control")?;
    client::refused(&lan, app.at(8080))?;
    client::not_served(&lan, None, app.at(9090))?;
    ensure!(steered.accepted() == 0 && relayed.accepted() == 0);
    scene.served(&inside, app.at(8080), "steered")?;
    scene.served(&inside, app.at(9090), "relayed").map(drop)
}

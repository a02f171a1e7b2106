//! `host.docker.internal`: other addresses of the host that containers take for it.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::engine::{Container, Engine, Network};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use serde_json::Value;

use super::{Scene, Tested};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        host_docker_internal_is_served,
        nobody_else_is_served_there,
        networks_have_rules_of_their_own_there,
        what_listens_there_is_overridden_for_the_network_alone,
        docker_may_be_told_another_address,
        an_alias_of_the_configuration_is_served,
        a_firewall_is_opened_for_it,
        what_is_said_of_it,
        the_services_peer_may_be_local,
    ]
}

const ADD_HOST: &[&str] = &["--add-host", "host.docker.internal:host-gateway"];

/// Two networks with a container each, one of Docker's own network, and what they call the host.
struct Stage {
    scene: Scene,
    app: Network,
    inside: Container,
    other: Container,
    own: Container,
    alias: IpAddr,
}

impl Stage {
    fn new() -> Result<Stage> {
        Stage::with(Scene::new()?)
    }

    fn with(scene: Scene) -> Result<Stage> {
        let app = scene.engine.create_network("app", &[])?;
        scene.engine.create_network("other", &[])?;
        let [inside, other, own] =
            ["app", "other", "bridge"].map(|network| scene.engine.run(network, ADD_HOST));
        let (inside, other, own) = (inside?, other?, own?);
        let hosts = scene.engine.exec(&inside, &["cat", "/etc/hosts"])?.stdout;
        let line =
            hosts.lines().find(|line| line.contains("host.docker.internal")).context("no such name")?;
        let alias = line.split_whitespace().next().context("no address")?.parse()?;
        Ok(Stage { scene, app, inside, other, own, alias })
    }

    fn to(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.alias, port)
    }

    /// With the container's own program, by the name.
    fn asks(&self, container: &Container, port: u16) -> Result<String> {
        let dial = format!("echo hello | timeout 5 nc host.docker.internal {port}");
        Ok(self.scene.engine.exec(container, &["sh", "-c", &dial])?.stdout)
    }

    /// Returns the entry of `status` for the alias.
    fn told(&self, network: &str, port: u16) -> Result<Option<Value>> {
        let rule = self.scene.daemon.rule(network, port)?.context("the rule")?;
        let gateways = rule["gateways"].as_array().context("gateways")?;
        Ok(gateways.iter().find(|gateway| gateway["alias"].is_string()).cloned())
    }
}

fn host_docker_internal_is_served() -> Result<()> {
    let stage = Stage::new()?;
    let scene = &stage.scene;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    ensure!(stage.asks(&stage.inside, 8080)?.is_empty(), "without a rule nobody is there");
    for more in [&[][..], &["--path", "relay"]] {
        scene.daemon.allow(&[&["app", "8080"], more].concat())?;
        ensure!(stage.asks(&stage.inside, 8080)?.contains("service"));
        let greeting = scene.served(&stage.inside, stage.to(8080), "service")?;
        ensure!(!greeting.peer.ip().is_loopback(), "{greeting:?}");
        scene.served(&stage.inside, stage.app.at(8080), "service")?;
        // By one network's rule one network.
        for container in [&stage.other, &stage.own] {
            client::not_served(&scene.engine.netns(container)?, None, stage.to(8080))?;
        }
        scene.daemon.deny(&["app", "8080"])?;
        scene.refused(&stage.inside, stage.to(8080))?;
    }
    Ok(())
}

fn nobody_else_is_served_there() -> Result<()> {
    let stage = Stage::new()?;
    let scene = &stage.scene;
    let service = scene.service("service", "127.0.0.1:8080")?;
    let _control = scene.service("control", &stage.to(7070).to_string())?;
    let lan = NetNs::new()?;
    lan.ip(&format!("link add lan type veth peer name uplink netns {}", std::process::id()))?;
    scene.host.ip("addr add 203.0.113.1/24 dev uplink")?;
    scene.host.ip("link set uplink up")?;
    lan.ip("addr add 203.0.113.2/24 dev lan")?;
    lan.ip("link set lan up")?;
    lan.ip("route add default via 203.0.113.1")?;
    scene.daemon.allow(&["app", "8080"])?;
    for from in [&lan, &scene.engine.netns(&stage.other)?, &scene.engine.netns(&stage.own)?, &scene.host] {
        client::served_by(from, stage.to(7070), "control")?;
        client::refused(from, stage.to(8080))?;
    }
    ensure!(service.accepted() == 0);
    scene.served(&stage.inside, stage.to(8080), "service")?;
    scene.daemon.allow(&["bridge", "8080"])?;
    scene.served(&stage.own, stage.to(8080), "service")?;
    scene.refused(&stage.other, stage.to(8080))?;
    let output = scene.daemon.cli(&["verify", "app", "8080"])?;
    ensure!(output.status == 0, "{output:?}");
    Ok(())
}

fn networks_have_rules_of_their_own_there() -> Result<()> {
    let stage = Stage::new()?;
    let scene = &stage.scene;
    let _one = scene.service("one", "127.0.0.1:8081")?;
    let _two = scene.service("two", "127.0.0.1:8082")?;
    for path in ["steer", "relay"] {
        scene.daemon.allow(&["app", "80=8081", "--path", path])?;
        scene.daemon.allow(&["other", "80=8082", "--path", path])?;
        scene.served(&stage.inside, stage.to(80), "one")?;
        scene.served(&stage.other, stage.to(80), "two")?;
        client::not_served(&scene.engine.netns(&stage.own)?, None, stage.to(80))?;
        scene.daemon.deny(&["app", "80"])?;
        client::not_served(&scene.engine.netns(&stage.inside)?, None, stage.to(80))?;
        scene.served(&stage.other, stage.to(80), "two")?;
        scene.daemon.deny(&["other", "80"])?;
    }
    Ok(())
}

fn what_listens_there_is_overridden_for_the_network_alone() -> Result<()> {
    let stage = Stage::new()?;
    let scene = &stage.scene;
    let _own = scene.service("docker0's", &stage.to(8080).to_string())?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.served(&stage.inside, stage.to(8080), "docker0's")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.served(&stage.inside, stage.to(8080), "service")?;
    scene.served(&stage.other, stage.to(8080), "docker0's")?;
    scene.served(&stage.own, stage.to(8080), "docker0's")?;
    client::served_by(&scene.host, stage.to(8080), "docker0's")?;
    scene.daemon.deny(&["app", "8080"])?;
    scene.served(&stage.inside, stage.to(8080), "docker0's")?;
    // A relay does not need the port either.
    scene.daemon.allow(&["app", "8080", "--path", "relay"])?;
    scene.must_be("app", 8080, "relayed")?;
    let told = stage.told("app", 8080)?.context("an alias")?;
    ensure!(told["state"] == "relayed", "{told}");
    for to in [stage.app.at(8080), stage.to(8080)] {
        scene.served(&stage.inside, to, "service")?;
    }
    scene.served(&stage.other, stage.to(8080), "docker0's")?;
    client::served_by(&scene.host, stage.to(8080), "docker0's").map(drop)
}

fn docker_may_be_told_another_address() -> Result<()> {
    let host = NetNs::current()?;
    host.ip("link add extra type bridge")?;
    host.ip("addr add 10.99.0.1/32 dev extra")?;
    host.ip("link set extra up")?;
    let mut engine = Tested::prepare(false)?;
    fs::create_dir_all("/etc/docker")?;
    fs::write("/etc/docker/daemon.json", "{\"host-gateway-ip\": \"10.99.0.1\"}")?;
    engine.up()?;
    engine.import_image()?;
    let stage = Stage::with(Scene::with(engine)?)?;
    let scene = &stage.scene;
    ensure!(stage.alias.to_string() == "10.99.0.1", "{}", stage.alias);
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    ensure!(stage.asks(&stage.inside, 8080)?.contains("service"));
    scene.refused(&stage.other, stage.to(8080))?;
    client::refused(&scene.host, stage.to(8080))
}

fn an_alias_of_the_configuration_is_served() -> Result<()> {
    let stage = Stage::new()?;
    let scene = &stage.scene;
    scene.host.ip("link add extra type bridge")?;
    scene.host.ip("addr add 10.99.0.1/32 dev extra")?;
    scene.host.ip("link set extra up")?;
    let to = "10.99.0.1:8080".parse()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.refused(&stage.inside, to)?;
    fs::write(scene.daemon.config(), "aliases = [\"10.99.0.1\", \"192.0.2.9\"]\n")?;
    let output = scene.daemon.cli(&["reload"])?;
    ensure!(output.stdout.contains("aliases: [\"10.99.0.1\", \"192.0.2.9\"], was []"), "{output:?}");
    scene.served(&stage.inside, to, "service")?;
    scene.refused(&stage.other, to)?;
    fs::write(scene.daemon.config(), "")?;
    scene.daemon.cli(&["reload"])?;
    scene.refused(&stage.inside, to)
}

fn a_firewall_is_opened_for_it() -> Result<()> {
    let stage = Stage::new()?;
    let scene = &stage.scene;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let iptables = |arguments: &str| -> Result<String> {
        let output = scene.host.command("iptables").args(arguments.split_whitespace()).output()?;
        ensure!(output.status.success(), "iptables {arguments}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    iptables("-P INPUT DROP")?;
    scene.daemon.allow(&["app", "8080"])?;
    scene.must_be("app", 8080, "steered")?;
    scene.served(&stage.inside, stage.to(8080), "service")?;
    scene.served(&stage.inside, stage.app.at(8080), "service")?;
    let bridge = format!("br-{}", &stage.app.id[..12]);
    let rules = iptables("-S INPUT")?;
    ensure!(rules.contains(&format!("-d {}/32 -i {bridge}", stage.alias)), "{rules}");
    scene.daemon.deny(&["app", "8080"])?;
    let rules = iptables("-S INPUT")?;
    ensure!(!rules.contains("lbridge"), "{rules}");
    Ok(())
}

fn what_is_said_of_it() -> Result<()> {
    let stage = Stage::new()?;
    let scene = &stage.scene;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let output = scene.daemon.allow(&["app", "8080"])?;
    let named = format!("{} as host.docker.internal -> 127.0.0.1:8080 steered", stage.to(8080));
    ensure!(output.stdout.contains(&named), "{output:?}");
    let told = stage.told("app", 8080)?.context("an alias")?;
    ensure!(told["alias"] == "host-gateway" && told["state"] == "steered", "{told}");
    let dialled = format!("{} as host.docker.internal", stage.to(8080));
    ensure!(scene.daemon.cli(&["status"])?.stdout.contains(&dialled));
    let output = scene.daemon.cli(&["explain", "--json", "app", "8080"])?;
    let explained: Value = serde_json::from_str(&output.stdout)?;
    let ways = explained["ways"].as_array().context("ways")?;
    let way =
        ways.iter().find(|way| way["dialled"] == stage.to(8080).to_string()).context("the alias' way")?;
    ensure!(way["fate"] == "steered", "{explained:#}");
    scene.daemon.allow(&["bridge", "8080"])?;
    ensure!(stage.told("bridge", 8080)?.is_none(), "it is that network's own gateway");
    Ok(())
}

fn the_services_peer_may_be_local() -> Result<()> {
    let stage = Stage::new()?;
    let scene = &stage.scene;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080", "--source", "loopback"])?;
    scene.daemon.allow(&["other", "8080"])?;
    let greeting = scene.served(&stage.inside, stage.to(8080), "service")?;
    ensure!(greeting.peer.ip().is_loopback(), "{greeting:?}");
    let greeting = scene.served(&stage.other, stage.to(8080), "service")?;
    ensure!(!greeting.peer.ip().is_loopback(), "another network, another view: {greeting:?}");
    Ok(())
}

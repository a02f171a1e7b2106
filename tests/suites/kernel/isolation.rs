//! Reachable from exactly the allowed network, and nothing else of the host is touched.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::daemon::Daemon;
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Test, find_program};
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        other_bridge_is_refused,
        other_bridge_is_refused_by_relay,
        lan_is_refused,
        lan_is_refused_by_relay,
        lan_is_refused_ipv6,
        spoofed_source_outside_the_subnet_is_not_served,
        spoofed_source_outside_the_subnet_is_not_served_by_relay,
        spoofed_source_from_another_bridge_is_not_served,
        spoofed_source_from_the_lan_is_not_served,
        listener_of_another_namespace_is_never_used,
        the_host_itself_is_not_served,
        the_host_itself_is_not_served_by_relay,
        without_docker_a_rule_for_containers_is_for_nobody,
        firewall_sysctls_and_routes_are_untouched,
    ]
}

/// A scene with a steered port 8080 and a relayed port 9090, both served, and a control: a service on the
/// gateway itself, which everybody who has a route reaches.
struct Open {
    scene: Scene,
    services: [Service; 2],
    _control: Service,
}

const STEERED: u16 = 8080;
const RELAYED: u16 = 9090;
const CONTROL: u16 = 7070;

impl Open {
    fn new() -> Result<Open> {
        let scene = Scene::new()?;
        let services =
            [scene.service("steered", "127.0.0.1:8080")?, scene.service("relayed", "127.0.0.1:9090")?];
        let control = scene.service("control", "10.7.0.1:7070")?;
        scene.allow(&["8080"])?;
        scene.allow(&["9090", "--path", "relay"])?;
        scene.must_be(STEERED, "steered")?;
        scene.must_be(RELAYED, "relayed")?;
        scene.served(STEERED, "steered")?;
        scene.served(RELAYED, "relayed")?;
        Ok(Open { scene, services, _control: control })
    }

    fn gateway(&self, port: u16) -> SocketAddr {
        self.scene.gateway(port)
    }

    /// Nobody but the container came through, and it still does.
    fn nobody_else_was_served(&self) -> Result<()> {
        ensure!(self.services.iter().all(|service| service.accepted() == 1), "somebody reached a service");
        self.scene.served(STEERED, "steered")?;
        self.scene.served(RELAYED, "relayed")?;
        Ok(())
    }
}

/// ECONNREFUSED at once, after the control has shown that there is a way.
fn refused_though_routed(open: &Open, from: &NetNs, port: u16) -> Result<()> {
    client::served_by(from, open.gateway(CONTROL), "control").context("the control")?;
    client::refused(from, open.gateway(port))?;
    open.nobody_else_was_served()
}

fn neighbour(open: &Open) -> Result<NetNs> {
    let bridge = open.scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    open.scene.lab.container(&bridge, "10.8.0.2/24")
}

fn other_bridge_is_refused() -> Result<()> {
    let open = Open::new()?;
    refused_though_routed(&open, &neighbour(&open)?, STEERED)
}

/// A relay may let the kernel refuse or be silent (its listener is bound to the bridge), but never serves.
fn not_served_though_routed(open: &Open, from: &NetNs, port: u16) -> Result<()> {
    client::served_by(from, open.gateway(CONTROL), "control").context("the control")?;
    client::not_served(from, None, open.gateway(port))?;
    open.nobody_else_was_served()
}

fn other_bridge_is_refused_by_relay() -> Result<()> {
    let open = Open::new()?;
    not_served_though_routed(&open, &neighbour(&open)?, RELAYED)
}

fn lan_is_refused() -> Result<()> {
    let open = Open::new()?;
    refused_though_routed(&open, &open.scene.lab.lan("192.0.2.1/24")?, STEERED)
}

fn lan_is_refused_by_relay() -> Result<()> {
    let open = Open::new()?;
    not_served_though_routed(&open, &open.scene.lab.lan("192.0.2.1/24")?, RELAYED)
}

fn lan_is_refused_ipv6() -> Result<()> {
    let scene = Scene::v6()?;
    let service = scene.service("six", "[::1]:8080")?;
    let _control = scene.service("control", "[fd07::1]:7070")?;
    scene.allow(&["8080"])?;
    let lan = scene.lab.lan("2001:db8::1/64")?;
    client::served_by(&lan, scene.gateway(CONTROL), "control")?;
    client::refused(&lan, scene.gateway(8080))?;
    ensure!(service.accepted() == 0);
    scene.served(8080, "six")?;
    Ok(())
}

/// The kernel names the bridge as the ingress interface of the host's own connections, and their source is in
/// its subnet.
fn the_host_itself_is_not_served() -> Result<()> {
    let open = Open::new()?;
    refused_though_routed(&open, open.scene.lab.host(), STEERED)
}

fn the_host_itself_is_not_served_by_relay() -> Result<()> {
    let open = Open::new()?;
    not_served_though_routed(&open, open.scene.lab.host(), RELAYED)
}

/// A container of the right bridge with an address that is not of its network, and a host with a route back,
/// so that a handshake could complete.
fn without_docker_a_rule_for_containers_is_for_nobody() -> Result<()> {
    let open = Open::new()?;
    for path in ["steer", "relay"] {
        open.scene.allow(&["6060=8080", "--from", "web", "--path", path])?;
        open.scene.must_be(6060, "blocked")?;
        client::refused(&open.scene.container, open.gateway(6060))?;
        open.scene.deny(&["6060"])?;
    }
    Ok(())
}

fn with_foreign_address(open: &Open) -> Result<std::net::IpAddr> {
    let foreign = "198.51.100.7";
    open.scene.container.ip(&format!("addr add {foreign}/32 dev lo"))?;
    open.scene.lab.host().ip(&format!("route add {foreign} via 10.7.0.2 dev lab0"))?;
    let foreign = foreign.parse()?;
    let attempt = client::attempt_from(&open.scene.container, Some(foreign), open.gateway(CONTROL));
    ensure!(matches!(attempt, Attempt::Served(_)), "the control: {attempt:?}");
    Ok(foreign)
}

fn spoofed_source_outside_the_subnet_is_not_served() -> Result<()> {
    let open = Open::new()?;
    let foreign = with_foreign_address(&open)?;
    client::not_served(&open.scene.container, Some(foreign), open.gateway(STEERED))?;
    open.nobody_else_was_served()
}

fn spoofed_source_outside_the_subnet_is_not_served_by_relay() -> Result<()> {
    let open = Open::new()?;
    let foreign = with_foreign_address(&open)?;
    client::not_served(&open.scene.container, Some(foreign), open.gateway(RELAYED))?;
    open.nobody_else_was_served()
}

/// The right subnet, but by the wrong interface: replies go elsewhere, so nobody can be served; nor may a
/// service see half a connection.
fn spoofed_source_from_another_bridge_is_not_served() -> Result<()> {
    let open = Open::new()?;
    let neighbour = neighbour(&open)?;
    neighbour.ip("addr add 10.7.0.77/32 dev lo")?;
    for port in [STEERED, RELAYED] {
        client::not_served(&neighbour, Some("10.7.0.77".parse()?), open.gateway(port))?;
    }
    open.nobody_else_was_served()
}

fn spoofed_source_from_the_lan_is_not_served() -> Result<()> {
    let open = Open::new()?;
    let lan = open.scene.lab.lan("192.0.2.1/24")?;
    lan.ip("addr add 10.7.0.77/32 dev lo")?;
    for port in [STEERED, RELAYED] {
        client::not_served(&lan, Some("10.7.0.77".parse()?), open.gateway(port))?;
    }
    open.nobody_else_was_served()
}

/// Listeners of the same port in other namespaces, the container's own included.
fn listener_of_another_namespace_is_never_used() -> Result<()> {
    let scene = Scene::new()?;
    let elsewhere = NetNs::new()?;
    let early = Service::start(&elsewhere, "foreign", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let late = Service::start(&scene.container, "container's own", "127.0.0.1:8080")?;
    let wildcard = Service::start(&NetNs::new()?, "wildcard", "0.0.0.0:8080")?;
    scene.must_be(8080, "waiting")?;
    scene.refused(8080)?;

    let service = scene.service("host", "127.0.0.1:8080")?;
    scene.soon_served(8080, "host")?;
    // Started while the host's one is registered.
    let later = Service::start(&NetNs::new()?, "later", "127.0.0.1:8080")?;
    for _ in 0..8 {
        scene.served(8080, "host")?;
    }
    service.stop();
    scene.refused(8080)?;
    scene.wait_for(8080, "waiting")?;
    scene.refused(8080)?;
    ensure!([early, late, wildcard, later].iter().all(|service| service.accepted() == 0));

    // The relay dials in the host's namespace as well.
    scene.deny(&["8080"])?;
    scene.allow(&["8080", "--path", "relay"])?;
    scene.must_be(8080, "waiting")?;
    scene.refused(8080)
}

fn firewall_sysctls_and_routes_are_untouched() -> Result<()> {
    let lab = Lab::new()?;
    let container = lab.container(&lab.add_bridge("lab0", "10.7.0.1/24")?, "10.7.0.2/24")?;
    let _steered = Service::start(lab.host(), "steered", "127.0.0.1:8080")?;
    let _relayed = Service::start(lab.host(), "relayed", "127.0.0.1:9090")?;
    let before = Snapshot::take(lab.host())?;
    let mut daemon = Daemon::start(lab.host())?;
    daemon.allow(&["bridge:lab0", "8080", "--source", "loopback"])?;
    daemon.allow(&["bridge:lab0", "9090", "--path", "relay"])?;
    client::served_by(&container, "10.7.0.1:8080".parse()?, "steered")?;
    client::served_by(&container, "10.7.0.1:9090".parse()?, "relayed")?;
    before.compare(&Snapshot::take(lab.host())?).context("rules in force")?;
    daemon.deny(&["bridge:lab0", "8080", "9090"])?;
    before.compare(&Snapshot::take(lab.host())?).context("rules removed")?;
    daemon.terminate()?;
    before.compare(&Snapshot::take(lab.host())?).context("the daemon gone")
}

/// The host's network settings.
struct Snapshot(BTreeMap<String, String>);

impl Snapshot {
    fn take(host: &NetNs) -> Result<Snapshot> {
        let mut all = BTreeMap::new();
        host.run(|| read_tree(Path::new("/proc/sys/net"), &mut all).context("read /proc/sys/net"))?;
        ensure!(all.len() > 100, "sysctls were read");
        for arguments in ["rule", "-6 rule", "route show table all", "-6 route show table all"] {
            let text = host.ip_output(arguments)?;
            // What the kernel adds by itself as links get ready does not count.
            let own = |line: &&str| {
                line.contains("proto kernel") || line.contains("fe80::") || line.contains("ff00::")
            };
            let rest: Vec<_> = text.lines().filter(|line| !own(line)).collect();
            all.insert(format!("ip {arguments}"), rest.join("\n"));
        }
        for command in [["nft", "list", "ruleset"].as_slice(), &["iptables-save"], &["ip6tables-save"]] {
            if find_program(command[0]).is_some() {
                let output = host.command(command[0]).args(&command[1..]).output()?;
                let text = String::from_utf8_lossy(&output.stdout);
                let rules = text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
                all.insert(command.join(" "), rules);
            }
        }
        Ok(Snapshot(all))
    }

    fn compare(&self, now: &Snapshot) -> Result<()> {
        let names = self.0.keys().chain(now.0.keys());
        let differs = |name: &&String| self.0.get(*name) != now.0.get(*name);
        let changed: Vec<_> =
            names.filter(differs).map(|name| (name, self.0.get(name), now.0.get(name))).collect();
        ensure!(changed.is_empty(), "changed: {changed:#?}");
        Ok(())
    }
}

fn read_tree(folder: &Path, all: &mut BTreeMap<String, String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            read_tree(&path, all)?;
        } else if let Ok(text) = fs::read_to_string(&path)
            // A count and random numbers, not settings.
            && !path.ends_with("nf_conntrack_count")
            && !path.ends_with("stable_secret")
        {
            all.insert(path.display().to_string(), text);
        }
    }
    Ok(())
}

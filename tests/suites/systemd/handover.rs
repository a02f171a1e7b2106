//! A restart: systemd keeps the relays' listening sockets, so that whoever connects meanwhile waits, and is
//! served.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Connection};
use lbridge_tests::harness::kernel;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::harness::traffic::Traffic;
use lbridge_tests::tests;

use crate::{RELAY_8080, Scene, UNIT, Unit, join};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        no_connection_is_refused_by_a_restart,
        without_a_store_connections_are_refused,
        open_connections_end_by_themselves_and_new_ones_wait,
        open_connections_go_on_until_the_drain_is_over,
        a_stop_sends_away_who_waits,
        a_daemon_killed_while_it_drains_has_handed_over,
        a_start_that_fails_loses_no_socket,
        more_sockets_than_fit_into_a_message_are_handed_over,
        a_rule_denied_later_closes_its_port,
        a_rule_taken_from_the_configuration_closes_its_port,
        a_rule_gone_during_the_restart_closes_its_port,
        a_rule_changed_during_the_restart_is_the_new_one,
        a_bridge_made_again_during_the_restart_is_served,
        a_process_that_ended_during_the_restart_leaves_nothing,
        localhost_inside_a_container_is_handed_over,
        localhost_inside_a_named_namespace_is_handed_over,
        sockets_at_one_address_are_told_apart,
        a_bridge_does_not_get_anothers_socket,
    ]
}

fn no_connection_is_refused_by_a_restart() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let traffic = Traffic::start(&scene.container, scene.gateway(8080), "relayed");
    for _ in 0..5 {
        traffic.flows(50)?;
        scene.restart()?;
    }
    traffic.flows(50)?;
    traffic.all_served()
}

/// Otherwise the test before would prove nothing.
fn without_a_store_connections_are_refused() -> Result<()> {
    let scene = Scene::prepare(Unit { store: 0, ..Unit::default() }, "")?;
    scene.systemd.must(&["start", UNIT])?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let traffic = Traffic::start(&scene.container, scene.gateway(8080), "relayed");
    for _ in 0..3 {
        traffic.flows(50)?;
        scene.restart()?;
    }
    traffic.flows(50)?;
    let failures = traffic.failures()?;
    ensure!(failures.iter().any(|text| text.contains("refused")), "{failures:?}");
    Ok(())
}

/// Connected, but nobody has accepted it yet.
struct Waiting(TcpStream);

impl Waiting {
    fn connect(netns: &NetNs, to: SocketAddr) -> Result<Waiting> {
        let stream = client::dial(netns, None, to, patience::seconds(5)).context("connect meanwhile")?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        let early = stream.peek(&mut [0]).map_err(|error| error.kind());
        ensure!(early == Err(ErrorKind::WouldBlock), "nobody should have answered: {early:?}");
        Ok(Waiting(stream))
    }

    fn served(self, service: &str) -> Result<()> {
        let mut connection = Connection::greeted(self.0)?;
        ensure!(connection.greeting.service == service, "{:?}", connection.greeting);
        connection.echo(b"there and back")
    }

    /// Reset, since what it waited for is not there any more.
    fn sent_away(self) -> Result<()> {
        self.0.set_read_timeout(Some(patience::seconds(5)))?;
        let end = self.0.peek(&mut [0]).map_err(|error| error.kind());
        ensure!(end == Err(ErrorKind::ConnectionReset), "{end:?}");
        Ok(())
    }
}

fn open_connections_end_by_themselves_and_new_ones_wait() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    let restart = scene.begin_restart("1")?;
    let waiting = Waiting::connect(&scene.container, scene.gateway(8080))?;
    open.echo(b"still here")?;
    ensure!(open.finish()?.is_empty());
    restart.wait()?;
    waiting.served("relayed")?;
    scene.served(8080, "relayed").map(drop)
}

fn open_connections_go_on_until_the_drain_is_over() -> Result<()> {
    let scene = Scene::with("drain_timeout = \"2s\"\n")?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    open.echo(b"here")?;
    let start = Instant::now();
    let in_use = thread::spawn(move || {
        while open.echo(b"still here").is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
        start.elapsed()
    });
    let restart = scene.begin_restart("1")?;
    let waiting = Waiting::connect(&scene.container, scene.gateway(8080))?;
    restart.wait()?;
    let lasted = join(in_use)?;
    ensure!(lasted >= Duration::from_secs(2), "{lasted:?}");
    waiting.served("relayed")
}

/// The daemon cannot know that no start follows. Who comes while it drains waits in vain, but not for longer.
fn a_stop_sends_away_who_waits() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    scene.systemd.must(&["--no-block", "stop", UNIT])?;
    scene.wait_for("NFileDescriptorStore", "1")?;
    let waiting = Waiting::connect(&scene.container, scene.gateway(8080))?;
    open.finish()?;
    waiting.sent_away()?;
    scene.wait_for("ActiveState", "inactive")?;
    scene.refused(8080)
}

fn a_daemon_killed_while_it_drains_has_handed_over() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    let restart = scene.begin_restart("1")?;
    let waiting = Waiting::connect(&scene.container, scene.gateway(8080))?;
    scene.systemd.must(&["kill", "--signal=KILL", UNIT])?;
    restart.wait()?;
    open.must_be_over()?;
    waiting.served("relayed")
}

fn a_start_that_fails_loses_no_socket() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    scene.configure("[[rule]\n")?;
    let output = scene.systemd.systemctl(&["restart", UNIT])?;
    ensure!(output.status == 1, "{output:?}");
    ensure!(scene.property("NFileDescriptorStore")? == "1", "kept for the next attempt");
    let waiting = Waiting::connect(&scene.container, scene.gateway(8080))?;
    scene.configure("")?;
    scene.wait_for("ActiveState", "active")?;
    waiting.served("relayed")?;
    scene.wait_for("NFileDescriptorStore", "0")
}

fn more_sockets_than_fit_into_a_message_are_handed_over() -> Result<()> {
    const PORTS: std::ops::Range<u16> = 9000..9300;
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    let ports: Vec<String> = PORTS.map(|port| format!("{port}=8080")).collect();
    let mut arguments = vec!["allow", "bridge:lab0", "--path", "relay"];
    arguments.extend(ports.iter().map(String::as_str));
    scene.lbridge(&arguments)?;
    let open = client::connect(&scene.container, scene.gateway(PORTS.start))?;
    let restart = scene.begin_restart(&PORTS.len().to_string())?;
    let waiting = PORTS
        .map(|port| client::dial(&scene.container, None, scene.gateway(port), patience::seconds(5)))
        .collect::<std::io::Result<Vec<_>>>()?;
    open.finish()?;
    restart.wait()?;
    waiting.into_iter().try_for_each(|stream| Connection::greeted(stream)?.echo(b"there and back"))
}

fn a_rule_denied_later_closes_its_port() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    for _ in 0..2 {
        scene.restart()?;
        scene.served(8080, "relayed")?;
    }
    scene.lbridge(&["deny", "bridge:lab0", "8080"])?;
    ensure!(!scene.listens(8080)?);
    scene.refused(8080)?;
    scene.restart()?;
    scene.refused(8080)
}

fn a_rule_taken_from_the_configuration_closes_its_port() -> Result<()> {
    let scene = Scene::with(RELAY_8080)?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    patience::until("relayed", || Ok(scene.served(8080, "relayed").ok()))?;
    scene.configure("")?;
    scene.restart()?;
    ensure!(!scene.listens(8080)?);
    scene.refused(8080)
}

/// Nobody who came meanwhile is left to wait for ever.
fn a_rule_gone_during_the_restart_closes_its_port() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    let restart = scene.begin_restart("1")?;
    let waiting = Waiting::connect(&scene.container, scene.gateway(8080))?;
    fs::remove_file(scene.systemd.path("/var/lib/lbridge/rules.toml"))?;
    open.finish()?;
    restart.wait()?;
    ensure!(!scene.listens(8080)?);
    waiting.sent_away()?;
    scene.refused(8080)
}

fn a_rule_changed_during_the_restart_is_the_new_one() -> Result<()> {
    let rule = |port: &str, path: &str| {
        format!("[[rule]]\nnetwork = \"bridge:lab0\"\nport = \"{port}\"\npath = \"{path}\"\n")
    };
    let scene = Scene::with(&rule("8080", "relay"))?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    let other = scene.service("other", "127.0.0.1:8081")?;
    patience::until("relayed", || Ok(scene.served(8080, "relayed").ok()))?;

    // Another service: who waits gets that one.
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    let restart = scene.begin_restart("1")?;
    let waiting = Waiting::connect(&scene.container, scene.gateway(8080))?;
    scene.configure(&rule("8080=8081", "relay"))?;
    open.finish()?;
    restart.wait()?;
    waiting.served("other")?;

    // Steered: the kernel needs no socket there.
    scene.configure(&rule("8080=8081", "steer"))?;
    scene.restart()?;
    ensure!(!scene.listens(8080)?, "the relay's socket is closed");
    if kernel::registers_listeners_alone() {
        other.stop();
        let _third = scene.service("third", "127.0.0.1:8081")?;
        scene.served(8080, "third")?;
    }
    Ok(())
}

/// By the same name, with the same address: a socket that is bound to the one before is of no use.
fn a_bridge_made_again_during_the_restart_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let open = client::connect(&scene.container, scene.gateway(8080))?;
    let restart = scene.begin_restart("1")?;
    scene.lab.host().ip("link del lab0")?;
    let bridge = scene.lab.add_bridge("lab0", "10.7.0.1/24")?;
    let container = scene.lab.container(&bridge, "10.7.0.3/24")?;
    // Its peer is out of reach: it ends by force.
    scene.systemd.must(&["kill", "--signal=KILL", UNIT])?;
    drop(open);
    restart.wait()?;
    client::served_by(&container, scene.gateway(8080), "relayed").map(drop)
}

/// A process inside with a network of its own, and that.
fn apart(scene: &Scene) -> Result<(String, NetNs)> {
    let text = "[Service]\nExecStart=sleep infinity\nPrivateNetwork=yes\n";
    scene.systemd.install_unit("apart.service", text)?;
    scene.systemd.must(&["start", "apart.service"])?;
    let pid = scene.systemd.property("apart.service", "MainPID")?;
    // Started is for systemd what has been forked.
    let netns = patience::until("a network of its own", || {
        let netns = scene.systemd.netns_of(&pid)?;
        let links = netns.ip_output("-brief link")?;
        Ok((links.lines().count() == 1 && links.contains("LOOPBACK,UP")).then_some(netns))
    })?;
    Ok((format!("pid:{pid}"), netns))
}

fn localhost_inside_a_container_is_handed_over() -> Result<()> {
    let scene = Scene::new()?;
    let (network, netns) = apart(&scene)?;
    survives_inside(&scene, &network, &netns)
}

fn localhost_inside_a_named_namespace_is_handed_over() -> Result<()> {
    let scene = Scene::new()?;
    let netns = named(&scene, "apart")?;
    survives_inside(&scene, "netns:/run/netns/apart", &netns)
}

fn named(scene: &Scene, name: &str) -> Result<NetNs> {
    for arguments in [format!("netns add {name}"), format!("-netns {name} link set lo up")] {
        let output = scene.systemd.run("ip", &arguments.split(' ').collect::<Vec<_>>())?;
        ensure!(output.status == 0, "ip {arguments}: {output:?}");
    }
    NetNs::at(&scene.systemd.path("/run/netns").join(name))
}

/// Two bridges with the same gateway, two namespaces: each has its own service, before and after.
fn sockets_at_one_address_are_told_apart() -> Result<()> {
    let scene = Scene::new()?;
    let bridge = scene.lab.add_bridge("lab1", "10.7.0.1/24")?;
    let (one, two) = (named(&scene, "one")?, named(&scene, "two")?);
    let inside = "127.0.0.1:8080".parse()?;
    let places = [
        ("bridge:lab0", "8080=9000", scene.container.clone(), scene.gateway(8080), "bridge-0"),
        (
            "bridge:lab1",
            "8080=9001",
            scene.lab.container(&bridge, "10.7.0.3/24")?,
            scene.gateway(8080),
            "bridge-1",
        ),
        ("netns:/run/netns/one", "8080=9002", one.clone(), inside, "inside-1"),
        ("netns:/run/netns/one", "8081=9004", one, "127.0.0.1:8081".parse()?, "inside-1, beside"),
        ("netns:/run/netns/two", "8080=9003", two, inside, "inside-2"),
    ];
    let mut services = vec![];
    for (network, port, _, _, service) in &places {
        let (_, target) = port.split_once('=').unwrap_or_default();
        services.push(scene.service(service, &format!("127.0.0.1:{target}"))?);
        scene.lbridge(&["allow", network, port, "--path", "relay"])?;
    }
    for _ in 0..3 {
        for (network, _, netns, to, service) in &places {
            client::served_by(netns, *to, service).with_context(|| (*network).to_owned())?;
        }
        let open = client::connect(&scene.container, scene.gateway(8080))?;
        // Inside, `[::1]` has one, too.
        let restart = scene.begin_restart("8")?;
        let waiting = places
            .iter()
            .map(|(_, _, netns, to, _)| Waiting::connect(netns, *to))
            .collect::<Result<Vec<_>>>()?;
        open.finish()?;
        restart.wait()?;
        for (waiting, (_, _, _, _, service)) in waiting.into_iter().zip(&places) {
            waiting.served(service)?;
        }
    }
    Ok(())
}

/// 127.0.0.1 and `[::1]` inside: two sockets.
fn survives_inside(scene: &Scene, network: &str, netns: &NetNs) -> Result<()> {
    let _service = scene.service("inside", "127.0.0.1:8080")?;
    scene.lbridge(&["allow", network, "8080"])?;
    let (four, six) = ("127.0.0.1:8080".parse()?, "[::1]:8080".parse()?);
    let traffic = [four, six].map(|to| Traffic::start(netns, to, "inside"));
    for _ in 0..3 {
        traffic.iter().try_for_each(|traffic| traffic.flows(30))?;
        scene.restart()?;
    }
    traffic.iter().try_for_each(|traffic| traffic.flows(30))?;
    traffic.into_iter().try_for_each(Traffic::all_served)?;

    let mut open = client::connect(netns, four)?;
    let restart = scene.begin_restart("2")?;
    let waiting = [Waiting::connect(netns, four)?, Waiting::connect(netns, six)?];
    open.echo(b"still here")?;
    open.finish()?;
    restart.wait()?;
    waiting.into_iter().try_for_each(|waiting| waiting.served("inside"))?;

    scene.lbridge(&["deny", network, "8080"])?;
    client::refused(netns, four)?;
    client::refused(netns, six)
}

/// The namespace lives on for as long as systemd has a socket in it.
fn a_process_that_ended_during_the_restart_leaves_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("inside", "127.0.0.1:8080")?;
    let (network, netns) = apart(&scene)?;
    scene.lbridge(&["allow", &network, "8080"])?;
    let four = "127.0.0.1:8080".parse()?;
    let _open = client::connect(&netns, four)?;
    let restart = scene.begin_restart("2")?;
    let waiting = Waiting::connect(&netns, four)?;
    scene.systemd.must(&["stop", "apart.service"])?;
    restart.wait()?;
    waiting.sent_away()?;
    client::refused(&netns, four)
}

/// Whichever systemd passes on first: of two rules once the one, once the other is gone.
fn a_bridge_does_not_get_anothers_socket() -> Result<()> {
    let rule = |bridge: &str, port: &str| {
        format!("[[rule]]\nnetwork = \"bridge:{bridge}\"\nport = \"{port}\"\npath = \"relay\"\n")
    };
    let rules = [rule("lab0", "8080=9000"), rule("lab1", "8080=9001")];
    let both = format!("drain_timeout = \"1m\"\n{}", rules.concat());
    let scene = Scene::prepare(Unit::default(), &both)?;
    let bridge = scene.lab.add_bridge("lab1", "10.7.0.1/24")?;
    let containers = [scene.container.clone(), scene.lab.container(&bridge, "10.7.0.3/24")?];
    let names = ["one", "two"];
    let _services = [scene.service("one", "127.0.0.1:9000")?, scene.service("two", "127.0.0.1:9001")?];
    scene.systemd.must(&["start", UNIT])?;
    let to = scene.gateway(8080);
    for stays in [0, 1] {
        for (container, name) in containers.iter().zip(names) {
            client::served_by(container, to, name)?;
        }
        let open = client::connect(&scene.container, to)?;
        let restart = scene.begin_restart("2")?;
        let served = Waiting::connect(&containers[stays], to)?;
        let sent_away = Waiting::connect(&containers[1 - stays], to)?;
        scene.configure(&rules[stays])?;
        open.finish()?;
        restart.wait()?;
        served.served(names[stays])?;
        sent_away.sent_away()?;
        scene.configure(&both)?;
        scene.restart()?;
    }
    Ok(())
}

//! UDP: a container's datagrams reach a service on the host's loopback, and what it answers comes from the
//! gateway.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::kernel;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::pins;
use lbridge_tests::harness::scene::{self, Scene};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::udp::{Echo, ask_from, refused, served_by, silent};
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        unconnected_and_connected_clients_are_answered: [Need::TellsInterfaces],
        ipv6_is_answered: [Need::TellsInterfaces],
        wildcard_service_is_answered: [Need::TellsInterfaces],
        explicit_loopback_address: [Need::TellsInterfaces],
        tcp_and_udp_of_one_port_are_two_rules: [Need::TellsInterfaces],
        service_that_is_down_refuses_at_once: [Need::TellsInterfaces],
        restarted_service_is_found: [Need::TellsInterfaces],
        group_goes_on_without_a_member: [Need::TellsInterfaces],
        goes_on_without_the_daemon: [Need::TellsInterfaces],
        another_bridge_and_the_lan_are_refused: [Need::TellsInterfaces],
        false_sources_are_not_served: [Need::TellsInterfaces],
        socket_of_another_namespace_is_never_used: [Need::TellsInterfaces],
        the_host_is_left_alone: [Need::TellsInterfaces],
        another_port_is_refused: [Need::TellsInterfaces],
        hooks_are_there_while_they_are_needed: [Need::TellsInterfaces],
        probes_do_not_reach_the_service: [Need::TellsInterfaces],
        other_ports_cannot_be_led_to,
        udp_rules_are_verified: [Need::TellsInterfaces],
        udp_is_explained: [Need::TellsInterfaces],
        udp_is_nothing_for_a_sandbox,
        older_kernels_block_it,
    ]
}

fn served(scene: &Scene, port: u16, service: &str) -> Result<()> {
    served_by(&scene.container, scene.container_ip, scene.gateway(port), service)
}

fn soon_served(scene: &Scene, port: u16, service: &str) -> Result<()> {
    patience::until(&format!("{service} serves"), || Ok(served(scene, port, service).ok()))
}

fn unconnected_and_connected_clients_are_answered() -> Result<()> {
    let scene = Scene::new()?;
    let _service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    refused(&scene.container, scene.gateway(53))?;
    scene.allow(&["53/udp"])?;
    let state = scene.must_be(53, "steered")?;
    ensure!(state.why.is_none(), "{state:?}");
    served(&scene, 53, "dns")?;
    let rule = scene.daemon.rule("bridge:lab0", 53)?.context("the rule")?;
    ensure!(rule["protocol"] == "udp" && rule["gateways"][0]["connections"] == 2, "{rule}");
    scene.deny(&["53/udp"])?;
    refused(&scene.container, scene.gateway(53))
}

fn ipv6_is_answered() -> Result<()> {
    let scene = Scene::v6()?;
    let _service = Echo::start(scene.lab.host(), "six", "[::1]:53")?;
    scene.allow(&["53/udp"])?;
    scene.must_be(53, "steered")?;
    served(&scene, 53, "six")?;
    scene.deny(&["53/udp"])?;
    refused(&scene.container, scene.gateway(53))
}

/// It would be reached without a rule, too; with one it still is, and answers with the source that was
/// dialled.
fn wildcard_service_is_answered() -> Result<()> {
    for address in ["0.0.0.0:53", "[::]:53"] {
        let scene = Scene::new()?;
        let _service = Echo::start(scene.lab.host(), "wild", address)?;
        scene.allow(&["53/udp"])?;
        scene.must_be(53, "steered")?;
        let (text, from) = ask_from(&scene.container, None, scene.gateway(53), true, patience::seconds(2))??;
        ensure!(text.starts_with("wild ") && from == scene.gateway(53), "{text} from {from}");
    }
    Ok(())
}

fn explicit_loopback_address() -> Result<()> {
    let scene = Scene::new()?;
    let _decoy = Echo::start(scene.lab.host(), "decoy", "127.0.0.1:53")?;
    let _service = Echo::start(scene.lab.host(), "stub", "127.0.0.53:53")?;
    scene.allow(&["53=127.0.0.53:53/udp"])?;
    scene.must_be(53, "steered")?;
    served(&scene, 53, "stub")
}

fn tcp_and_udp_of_one_port_are_two_rules() -> Result<()> {
    let scene = Scene::new()?;
    let _udp = Echo::start(scene.lab.host(), "udp", "127.0.0.1:53")?;
    let _tcp = scene.service("tcp", "127.0.0.1:53")?;
    scene.allow(&["53/udp"])?;
    scene.refused(53)?;
    served(&scene, 53, "udp")?;
    scene.allow(&["53"])?;
    scene.served(53, "tcp")?;
    scene.deny(&["53/udp", "53"])?;
    scene.refused(53)?;
    refused(&scene.container, scene.gateway(53))?;

    // What a relay has carried is TCP's.
    scene.allow(&["53", "--path", "relay"])?;
    scene.allow(&["53/udp"])?;
    for _ in 0..3 {
        scene.served(53, "tcp")?;
    }
    served(&scene, 53, "udp")?;
    let status = scene.daemon.status()?;
    let rules = status["rules"].as_array().context("rules")?;
    let told = |protocol: &str| {
        let rule = rules.iter().find(|rule| rule["protocol"] == protocol).context("the rule")?;
        let connections = rule["gateways"][0]["connections"].as_u64().context("a number")?;
        anyhow::Ok((rule["state"].as_str().unwrap_or_default().to_owned(), connections))
    };
    ensure!(told("udp")? == ("steered".to_owned(), 2), "{status:#}");
    let (state, connections) = told("tcp")?;
    ensure!(state == "relayed" && connections >= 3, "{status:#}");
    scene.deny(&["53/udp"])?;
    scene.served(53, "tcp")?;
    refused(&scene.container, scene.gateway(53))
}

fn service_that_is_down_refuses_at_once() -> Result<()> {
    let scene = Scene::new()?;
    scene.allow(&["53/udp"])?;
    let state = scene.must_be(53, "waiting")?;
    state.must_be_because("nothing_listens")?;
    refused(&scene.container, scene.gateway(53))?;
    let _service = Echo::start(scene.lab.host(), "late", "127.0.0.1:53")?;
    soon_served(&scene, 53, "late")?;
    scene.wait_for(53, "steered").map(drop)
}

fn restarted_service_is_found() -> Result<()> {
    let scene = Scene::new()?;
    scene.allow(&["53/udp"])?;
    for name in ["first", "second", "third"] {
        let service = Echo::start(scene.lab.host(), name, "127.0.0.1:53")?;
        soon_served(&scene, 53, name)?;
        drop(service);
        refused(&scene.container, scene.gateway(53))?;
        scene.wait_for(53, "waiting")?;
    }
    Ok(())
}

fn group_goes_on_without_a_member() -> Result<()> {
    let scene = Scene::new()?;
    let member = || Echo::start(scene.lab.host(), "group", "127.0.0.1:53");
    let mut group = vec![member()?, member()?, member()?];
    scene.allow(&["53/udp"])?;
    for _ in 0..40 {
        served(&scene, 53, "group")?;
    }
    ensure!(group.iter().all(|member| member.received() > 0), "the kernel spreads over the group");
    while group.len() > 1 {
        drop(group.remove(0));
        for _ in 0..10 {
            served(&scene, 53, "group")?;
        }
    }
    Ok(())
}

fn goes_on_without_the_daemon() -> Result<()> {
    let mut scene = Scene::new()?;
    let service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    scene.allow(&["53/udp"])?;
    served(&scene, 53, "dns")?;
    scene.daemon.kill9()?;
    served(&scene, 53, "dns")?;
    scene.daemon.restart()?;
    scene.must_be(53, "steered")?;
    served(&scene, 53, "dns")?;
    // Nobody registers a socket that is made meanwhile; the next daemon does.
    scene.daemon.kill9()?;
    drop(service);
    let _service = Echo::start(scene.lab.host(), "again", "127.0.0.1:53")?;
    refused(&scene.container, scene.gateway(53))?;
    scene.daemon.restart()?;
    served(&scene, 53, "again")
}

fn another_bridge_and_the_lan_are_refused() -> Result<()> {
    let scene = Scene::new()?;
    let service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    let _control = Echo::start(scene.lab.host(), "control", "10.7.0.1:70")?;
    scene.allow(&["53/udp"])?;
    let bridge = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let neighbour = scene.lab.container(&bridge, "10.8.0.2/24")?;
    let lan = scene.lab.lan("192.0.2.1/24")?;
    for (who, ip) in [(&neighbour, "10.8.0.2"), (&lan, "192.0.2.2")] {
        served_by(who, ip.parse()?, scene.gateway(70), "control").context("the control")?;
        refused(who, scene.gateway(53))?;
    }
    refused(&neighbour, "10.8.0.1:53".parse()?)?;
    ensure!(service.received() == 0, "somebody else's datagram arrived");
    served(&scene, 53, "dns")
}

/// There is no handshake: a datagram with a borrowed source must not even arrive.
fn false_sources_are_not_served() -> Result<()> {
    let scene = Scene::new()?;
    let service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    let control = Echo::start(scene.lab.host(), "control", "10.7.0.1:70")?;
    scene.allow(&["53/udp"])?;
    let bridge = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let neighbour = scene.lab.container(&bridge, "10.8.0.2/24")?;
    let lan = scene.lab.lan("192.0.2.1/24")?;
    for who in [&neighbour, &lan] {
        who.ip("addr add 10.7.0.77/32 dev lo")?;
        silent(who, Some("10.7.0.77".parse()?), scene.gateway(70))?;
        silent(who, Some("10.7.0.77".parse()?), scene.gateway(53))?;
    }
    ensure!(control.received() == 2, "the control saw the borrowed source: {}", control.received());
    // Nor one from the right bridge that is none of its network's.
    scene.container.ip("addr add 198.51.100.7/32 dev lo")?;
    silent(&scene.container, Some("198.51.100.7".parse()?), scene.gateway(53))?;
    ensure!(service.received() == 0, "a datagram with a false source arrived");
    served(&scene, 53, "dns")
}

fn socket_of_another_namespace_is_never_used() -> Result<()> {
    let scene = Scene::new()?;
    let elsewhere = NetNs::new()?;
    let _foreign = Echo::start(&elsewhere, "foreign", "127.0.0.1:53")?;
    let _own = Echo::start(&scene.container, "container's own", "127.0.0.1:53")?;
    scene.allow(&["53/udp"])?;
    scene.must_be(53, "waiting")?;
    refused(&scene.container, scene.gateway(53))?;
    let _service = Echo::start(scene.lab.host(), "host", "127.0.0.1:53")?;
    soon_served(&scene, 53, "host")?;
    // A container's own localhost is its own.
    let (text, from) =
        ask_from(&scene.container, None, "127.0.0.1:53".parse()?, true, patience::seconds(2))??;
    ensure!(text.starts_with("container's own") && from.ip().is_loopback(), "{text} from {from}");
    Ok(())
}

/// Traffic that works without lbridge works the same with it.
fn the_host_is_left_alone() -> Result<()> {
    let scene = Scene::new()?;
    let host = scene.lab.host();
    let _service = Echo::start(host, "dns", "127.0.0.1:53")?;
    host.ip("addr add 10.7.0.9/24 dev lab0")?;
    scene.allow(&["53/udp"])?;
    // A local client, whatever address it has, is answered from where it has asked.
    for source in ["127.0.0.1", "127.0.0.9", "10.7.0.1", "10.7.0.9"] {
        let to: SocketAddr = "127.0.0.1:53".parse()?;
        let answer = ask_from(host, Some(source.parse()?), to, true, patience::seconds(2))?;
        let (text, from) = answer.with_context(|| format!("from {source}"))?;
        ensure!(text == format!("dns {source} ping") && from == to, "{text} from {from}");
    }
    refused(host, scene.gateway(53))?;
    // The service's own traffic to the container, from another port of loopback, is refused as ever.
    let socket = host.run(|| Ok(UdpSocket::bind("127.0.0.1:5300")?))?;
    let sent = socket.send_to(b"x", SocketAddr::new(scene.container_ip, 9));
    ensure!(sent.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)), "{sent:?}");
    served(&scene, 53, "dns")
}

fn another_port_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let _one = Echo::start(scene.lab.host(), "one", "127.0.0.1:53")?;
    let two = Echo::start(scene.lab.host(), "two", "127.0.0.1:54")?;
    scene.allow(&["53/udp"])?;
    served(&scene, 53, "one")?;
    refused(&scene.container, scene.gateway(54))?;
    ensure!(two.received() == 0);
    Ok(())
}

fn hooks_are_there_while_they_are_needed() -> Result<()> {
    let scene = Scene::new()?;
    let _service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    let hooks = || -> Result<usize> {
        let files = pins::files(scene.daemon.bpffs())?;
        let is_reply = |file: &std::path::PathBuf| {
            file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("link_reply"))
        };
        Ok(files.into_iter().filter(is_reply).count())
    };
    ensure!(hooks()? == 0, "no rule, no hook");
    scene.allow(&["53/udp"])?;
    ensure!(hooks()? == 2, "both families'");
    served(&scene, 53, "dns")?;
    scene.deny(&["53/udp"])?;
    ensure!(hooks()? == 0, "denied, detached");
    for (map, entries) in pins::entries(scene.daemon.bpffs())? {
        ensure!(entries == 0 || map == "COUNTERS", "{map} has {entries} entries");
    }
    Ok(())
}

fn probes_do_not_reach_the_service() -> Result<()> {
    let scene = Scene::new()?;
    let service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    scene.allow(&["53/udp"])?;
    let status = scene.daemon.status()?;
    ensure!(status["firewall"]["untried"].is_null(), "{status}");
    ensure!(service.received() == 0, "the daemon's own datagrams are kept from it");
    // But a client may use that port.
    let socket = scene.container.run(|| Ok(UdpSocket::bind("0.0.0.0:1023")?))?;
    socket.set_read_timeout(Some(patience::seconds(2)))?;
    socket.send_to(b"ping", scene.gateway(53))?;
    let (length, from) = socket.recv_from(&mut [0; 100])?;
    ensure!(length > 0 && from == scene.gateway(53));
    Ok(())
}

fn other_ports_cannot_be_led_to() -> Result<()> {
    let scene = Scene::new()?;
    let refused = scene.daemon.cli(&["allow", "bridge:lab0", "53=5353/udp"])?;
    ensure!(refused.status == 2 && refused.stderr.contains("same port number"), "{refused:?}");
    Ok(())
}

/// They are given rules of interface 0, so that the source is all that there is to check.
fn older_kernels_block_it() -> Result<()> {
    let scene = Scene::with(scene::V4, Options::default())?;
    let _service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    scene.allow(&["53/udp"])?;
    if kernel::has_ingress_ifindex() {
        return scene.must_be(53, "steered").map(drop);
    }
    let state = scene.must_be(53, "blocked")?;
    state.must_be_because("udp_needs_interface")?;
    refused(&scene.container, scene.gateway(53))
}

fn udp_rules_are_verified() -> Result<()> {
    let scene = Scene::new()?;
    scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    scene.allow(&["53/udp"])?;
    scene.allow(&["54/udp"])?;
    let output = scene.daemon.cli(&["verify"])?;
    ensure!(output.status == 0, "{}", output.stdout);
    ensure!(output.stdout.contains("bridge:lab0 53/udp  bridge:lab0"), "{}", output.stdout);
    ensure!(service.received() == 0, "nothing is sent");
    ensure!(scene.daemon.cli(&["verify", "bridge:lab0", "53/udp"])?.status == 0);
    ensure!(scene.daemon.cli(&["verify", "bridge:lab0", "53"])?.status == 4, "TCP's rule is another");

    let _open = Echo::start(scene.lab.host(), "open", "0.0.0.0:54")?;
    let output = scene.daemon.cli(&["verify", "bridge:lab0", "54/udp"])?;
    ensure!(output.status == 1 && output.stdout.contains("listens on all addresses: "), "{}", output.stdout);
    Ok(())
}

fn udp_is_explained() -> Result<()> {
    let scene = Scene::new()?;
    let _service = Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?;
    scene.allow(&["53/udp"])?;
    let said = scene.daemon.cli(&["explain", "bridge:lab0", "53/udp"])?.stdout;
    for part in [
        "a datagram was sent and counted",
        "map ENTRIES has (lab0, 10.7.0.1, 53/udp)",
        "datagrams from bridge:lab0 to 10.7.0.1:53 are steered to ",
    ] {
        ensure!(said.contains(part), "{part}: {said}");
    }
    let said = scene.daemon.cli(&["explain", "bridge:lab0", "53"])?.stdout;
    ensure!(said.contains("no rule for bridge:lab0 53; nearest: bridge:lab0 53/udp"), "{said}");
    for command in ["status", "list"] {
        let said = scene.daemon.cli(&[command])?.stdout;
        ensure!(said.contains("53/udp"), "{said}");
    }
    Ok(())
}

fn udp_is_nothing_for_a_sandbox() -> Result<()> {
    let scene = Scene::new()?;
    let refused = scene.daemon.cli(&["relay", "53/udp", "--", "true"])?;
    ensure!(refused.status == 2 && refused.stderr.contains("UDP"), "{refused:?}");
    Ok(())
}

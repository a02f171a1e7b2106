//! The main job: a container reaches a service on the host's loopback, without a process in between.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Connection};
use lbridge_tests::harness::kernel;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;
use nix::sys::socket::{self, SockaddrStorage};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        container_reaches_loopback_service,
        source_loopback_shows_a_local_peer,
        unlisted_port_is_refused,
        port_is_remapped,
        remap_reaches_a_wildcard_listener,
        target_address_is_explicit,
        range_of_ports,
        each_network_has_its_own_targets,
        ipv6_gateway_is_steered_to_ipv6_loopback,
        ipv6_source_loopback_shows_a_local_peer,
        mptcp_client_is_served: [Need::Mptcp],
        rules_come_and_go_while_connections_run,
        deny_removes_map_entries,
        bridge_goes_and_comes_back,
        gateway_address_changes,
        status_counts_connections,
        a_container_cannot_hide_behind_the_probes_port,
    ]
}

fn container_reaches_loopback_service() -> Result<()> {
    let scene = Scene::new()?;
    let service = scene.service("postgres", "127.0.0.1:8080")?;
    scene.refused(8080)?;
    scene.allow(&["8080"])?;
    let state = scene.must_be(8080, "steered")?;
    ensure!(state.why.is_none(), "nothing to explain: {state:?}");

    let greeting = scene.served(8080, "postgres")?;
    ensure!(greeting.accept.ip() == scene.container_ip, "accept() sees the container: {greeting:?}");
    ensure!(greeting.peer == greeting.accept, "getpeername() sees the container: {greeting:?}");
    ensure!(greeting.local == scene.gateway(8080), "getsockname() is what was dialled: {greeting:?}");
    ensure!(service.accepted() == 1, "one connection, the container's own: {}", service.accepted());
    ensure!(!scene.lab.host().listens("10.7.0.1:8080".parse()?)?, "nothing listens on the gateway");
    Ok(())
}

fn source_loopback_shows_a_local_peer() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("redis", "127.0.0.1:6379")?;
    let _plain = scene.service("plain", "127.0.0.1:6380")?;
    scene.allow(&["6379", "--source", "loopback"])?;
    scene.allow(&["6380"])?;
    scene.must_be(6379, "steered")?;

    let greeting = scene.served(6379, "redis")?;
    ensure!(greeting.accept.ip().to_string() == "127.0.0.1", "accept(): {greeting:?}");
    ensure!(greeting.peer.ip().to_string() == "127.0.0.1", "getpeername(): {greeting:?}");
    ensure!(greeting.local.to_string() == "127.0.0.1:6379", "getsockname(): {greeting:?}");
    ensure!(greeting.accept.port() == greeting.peer.port(), "{greeting:?}");

    // Opt-in is per rule.
    let greeting = scene.served(6380, "plain")?;
    ensure!(
        greeting.accept.ip() == scene.container_ip && greeting.peer.ip() == scene.container_ip,
        "{greeting:?}"
    );
    // And a local client stays what it is.
    let greeting = client::served_by(scene.lab.host(), "127.0.0.1:6380".parse()?, "plain")?;
    ensure!(
        greeting.peer.ip().is_loopback() && greeting.local.to_string() == "127.0.0.1:6380",
        "{greeting:?}"
    );
    Ok(())
}

fn unlisted_port_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let _one = scene.service("one", "127.0.0.1:8080")?;
    let two = scene.service("two", "127.0.0.1:8081")?;
    scene.allow(&["8080"])?;
    scene.served(8080, "one")?;
    scene.refused(8081)?;
    scene.refused(8079)?;
    ensure!(two.accepted() == 0);
    Ok(())
}

fn port_is_remapped() -> Result<()> {
    let scene = Scene::new()?;
    let _target = scene.service("target", "127.0.0.1:15432")?;
    let _decoy = scene.service("decoy", "127.0.0.1:5432")?;
    scene.allow(&["5432=15432"])?;
    scene.must_be(5432, "steered")?;
    let greeting = scene.served(5432, "target")?;
    ensure!(greeting.peer.ip() == scene.container_ip, "{greeting:?}");
    // The target's own port was not opened.
    scene.refused(15432)
}

fn remap_reaches_a_wildcard_listener() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("wildcard", "0.0.0.0:3000")?;
    scene.allow(&["80=3000", "81=127.0.0.1:3000"])?;
    scene.must_be(80, "steered")?;
    scene.must_be(81, "steered")?;
    scene.served(80, "wildcard")?;
    scene.served(81, "wildcard")?;
    Ok(())
}

fn target_address_is_explicit() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("explicit", "127.0.0.1:3000")?;
    let _other = scene.service("other", "127.0.0.2:3000")?;
    scene.allow(&["80=127.0.0.1:3000", "81=127.0.0.2:3000"])?;
    scene.served(80, "explicit")?;
    scene.served(81, "other")?;
    scene.must_be(80, "steered")?;
    scene.must_be(81, "steered")?;
    Ok(())
}

fn range_of_ports() -> Result<()> {
    let scene = Scene::new()?;
    let _first = scene.service("first", "127.0.0.1:8000")?;
    let _last = scene.service("last", "127.0.0.1:8010")?;
    let _beyond = scene.service("beyond", "127.0.0.1:8011")?;
    scene.allow(&["8000-8010"])?;
    scene.served(8000, "first")?;
    scene.served(8010, "last")?;
    scene.must_be(8005, "waiting")?;
    scene.refused(8005)?;
    scene.refused(8011)?;
    scene.deny(&["8000-8010"])?;
    scene.refused(8000)?;
    scene.refused(8010)
}

/// The same port number, two networks, two services.
fn each_network_has_its_own_targets() -> Result<()> {
    let scene = Scene::new()?;
    let second = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let neighbour = scene.lab.container(&second, "10.8.0.2/24")?;
    let _one = scene.service("one", "127.0.0.1:3001")?;
    let _two = scene.service("two", "127.0.0.1:3002")?;
    scene.allow(&["80=3001"])?;
    scene.daemon.allow(&["bridge:lab1", "80=3002"])?;
    scene.served(80, "one")?;
    let greeting = client::served_by(&neighbour, "10.8.0.1:80".parse()?, "two")?;
    ensure!(greeting.peer.ip().to_string() == "10.8.0.2", "{greeting:?}");
    // Neither reaches the other's service by the other's gateway.
    client::refused(&neighbour, scene.gateway(80))?;
    client::refused(&scene.container, "10.8.0.1:80".parse()?)
}

fn ipv6_gateway_is_steered_to_ipv6_loopback() -> Result<()> {
    let scene = Scene::v6()?;
    let service = scene.service("six", "[::1]:8080")?;
    scene.allow(&["8080"])?;
    scene.must_be(8080, "steered")?;
    let greeting = scene.served(8080, "six")?;
    ensure!(greeting.accept.ip() == scene.container_ip, "{greeting:?}");
    ensure!(greeting.peer == greeting.accept && greeting.local == scene.gateway(8080), "{greeting:?}");
    scene.refused(8081)?;
    service.stop();
    scene.refused(8080)
}

fn ipv6_source_loopback_shows_a_local_peer() -> Result<()> {
    let scene = Scene::v6()?;
    let _service = scene.service("six", "[::1]:8080")?;
    scene.allow(&["8080", "--source", "loopback"])?;
    scene.must_be(8080, "steered")?;
    let greeting = scene.served(8080, "six")?;
    ensure!(greeting.accept.ip().to_string() == "::1", "accept(): {greeting:?}");
    ensure!(greeting.peer.ip().to_string() == "::1", "getpeername(): {greeting:?}");
    ensure!(greeting.local.to_string() == "[::1]:8080", "getsockname(): {greeting:?}");
    Ok(())
}

/// A client that asks for MPTCP falls back to TCP with a service that has only that.
fn mptcp_client_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("plain", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let mut connection = Connection::greeted(client::dial_mptcp(&scene.container, scene.gateway(8080))?)?;
    ensure!(connection.greeting.service == "plain");
    connection.echo(b"over MPTCP or not")
}

fn rules_come_and_go_while_connections_run() -> Result<()> {
    let scene = Scene::new()?;
    let _one = scene.service("one", "127.0.0.1:8080")?;
    let _two = scene.service("two", "127.0.0.1:8081")?;
    scene.allow(&["8080"])?;
    let mut early = client::connect(&scene.container, scene.gateway(8080))?;
    scene.allow(&["8081"])?;
    early.echo(b"another rule was added")?;
    let mut second = client::connect(&scene.container, scene.gateway(8081))?;
    scene.deny(&["8080"])?;
    // In force on return: no new connection, while those there are go on.
    scene.refused(8080)?;
    early.echo(b"the rule was removed")?;
    second.echo(b"another rule was removed")?;
    scene.served(8081, "two")?;
    scene.allow(&["8080"])?;
    scene.served(8080, "one")?;
    early.echo(b"and added again")?;
    ensure!(early.finish()?.is_empty(), "ends as the peers want");
    Ok(())
}

/// Whatever `allow` puts into pinned maps, `deny` takes away.
fn deny_removes_map_entries() -> Result<()> {
    use lbridge_tests::harness::pins;

    let scene = Scene::new()?;
    let _one = scene.service("one", "127.0.0.1:8080")?;
    let _two = scene.service("two", "127.0.0.1:8081")?;
    let before = pins::entries(scene.daemon.bpffs())?;
    ensure!(!before.is_empty(), "maps are pinned under {}", scene.daemon.bpffs().display());
    scene.allow(&["8080", "8090-8099"])?;
    scene.allow(&["8081", "--source", "loopback"])?;
    let during = pins::entries(scene.daemon.bpffs())?;
    let total = |entries: &std::collections::BTreeMap<String, usize>| entries.values().sum::<usize>();
    ensure!(total(&during) > total(&before) + 12, "entries and listeners: {before:?}, then {during:?}");
    scene.served(8080, "one")?;
    scene.deny(&["8080", "8081", "8090-8099"])?;
    let after = pins::entries(scene.daemon.bpffs())?;
    ensure!(after == before, "as before: {before:?}, then {during:?}, then {after:?}");
    ensure!(scene.daemon.rule("bridge:lab0", 8080)?.is_none(), "no rule is left");
    Ok(())
}

fn bridge_goes_and_comes_back() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.lab.host().ip("link del lab0")?;
    let state = scene.wait_for(8080, "waiting")?;
    state.must_be_because("no_interface")?;
    // The new one has another interface index.
    let bridge = scene.lab.add_bridge("lab0", "10.7.0.1/24")?;
    let container = scene.lab.container(&bridge, "10.7.0.3/24")?;
    scene.wait_for(8080, "steered")?;
    let greeting = client::served_by(&container, scene.gateway(8080), "service")?;
    ensure!(greeting.peer.ip().to_string() == "10.7.0.3", "{greeting:?}");
    Ok(())
}

fn gateway_address_changes() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.served(8080, "service")?;
    scene.lab.host().ip("addr add 10.9.0.1/24 dev lab0")?;
    scene.lab.host().ip("addr del 10.7.0.1/24 dev lab0")?;
    scene.container.ip("addr add 10.9.0.2/24 dev eth0")?;
    let new = "10.9.0.1:8080".parse()?;
    lbridge_tests::harness::patience::until("the rule follows the address", || {
        let rule = scene.daemon.rule("bridge:lab0", 8080)?.context("the rule")?;
        let gateways = rule["gateways"].as_array().context("gateways")?;
        let follows =
            gateways.iter().any(|gateway| gateway["address"] == "10.9.0.1" && gateway["state"] == "steered");
        Ok((follows && !gateways.iter().any(|gateway| gateway["address"] == "10.7.0.1")).then_some(()))
    })?;
    let greeting = client::served_by(&scene.container, new, "service")?;
    ensure!(greeting.local == new, "{greeting:?}");
    Ok(())
}

fn status_counts_connections() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let connections = || -> Result<u64> {
        let rule = scene.daemon.rule("bridge:lab0", 8080)?.context("the rule")?;
        let gateway =
            rule["gateways"].as_array().context("gateways")?.iter().find(|one| one["address"] == "10.7.0.1");
        let gateway = gateway.context("a gateway 10.7.0.1")?;
        ensure!(gateway["interface"] == "lab0", "{gateway}");
        gateway["connections"].as_u64().context("a number of connections")
    };
    ensure!(connections()? == 0);
    for _ in 0..3 {
        scene.served(8080, "service")?;
    }
    ensure!(connections()? == 3, "three connections, not {}", connections()?);
    let status = scene.daemon.status()?;
    ensure!(status["kernel"]["path"] == "steer", "{status}");
    let interface_check = kernel::has_ingress_ifindex();
    ensure!(status["kernel"]["interface_check"] == interface_check, "{status}");
    Ok(())
}

/// The daemon's own probes are not counted; whoever uses their source port is.
fn a_container_cannot_hide_behind_the_probes_port() -> Result<()> {
    const PROBE_PORT: u16 = 1023;
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let connections = || -> Result<u64> {
        let rule = scene.daemon.rule("bridge:lab0", 8080)?.context("the rule")?;
        rule["gateways"][0]["connections"].as_u64().context("a count")
    };
    ensure!(connections()? == 0, "the daemon's probes are not counted");
    let _stream = scene.container.run(|| {
        let fd = kernel::stream_socket(false, false)?;
        socket::bind(
            fd.as_raw_fd(),
            &SockaddrStorage::from(SocketAddr::new(scene.container_ip, PROBE_PORT)),
        )?;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(scene.gateway(8080)))?;
        Ok(fd)
    })?;
    ensure!(connections()? == 1, "a connection from port {PROBE_PORT} counts");
    Ok(())
}

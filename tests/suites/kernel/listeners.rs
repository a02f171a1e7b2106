//! Services of every kind, and services that come and go.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::service::{Options, Service};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{client, kernel, patience, pins};
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        service_that_is_down_refuses_and_is_served_again,
        service_restarts_while_the_daemon_is_dead: [Need::RegistersAlone],
        service_starts_after_the_rule,
        reuse_port_group_hands_over,
        reuse_port_group_is_spread,
        loopback_listener_comes_before_wildcard,
        wildcard_takes_over_from_loopback,
        dual_stack_wildcard_is_steered,
        v6_only_wildcard_is_not_mistaken,
        ipv6_loopback_is_relayed_for_ipv4,
        mptcp_listener_is_relayed: [Need::Mptcp],
        listener_moves_between_mptcp_and_tcp: [Need::Mptcp],
        a_local_users_listeners_take_no_room,
        a_full_map_is_relayed: [Need::WholeSystem],
    ]
}

/// On kernels that cannot do it alone the daemon has to notice first.
fn served_at_once(scene: &Scene, port: u16, service: &str) -> Result<()> {
    if kernel::registers_listeners_alone() {
        scene.served(port, service)?;
    } else {
        scene.soon_served(port, service)?;
    }
    Ok(())
}

fn service_that_is_down_refuses_and_is_served_again() -> Result<()> {
    let scene = Scene::new()?;
    let first = scene.service("first", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let mut connection = client::connect(&scene.container, scene.gateway(8080))?;
    first.stop();
    let start = Instant::now();
    scene.refused(8080)?;
    ensure!(start.elapsed() < patience::seconds(1), "refused only after {:?}", start.elapsed());
    let state = scene.wait_for(8080, "waiting")?;
    ensure!(
        state.why.as_deref().is_some_and(|why| why.contains("127.0.0.1:8080")),
        "says what is missing: {state:?}"
    );
    scene.refused(8080)?;
    connection.echo(b"the listener has gone, the connection has not")?;

    for name in ["second", "third", "fourth"] {
        let service = scene.service(name, "127.0.0.1:8080")?;
        served_at_once(&scene, 8080, name)?;
        scene.wait_for(8080, "steered")?;
        service.stop();
        scene.refused(8080)?;
    }
    Ok(())
}

fn service_restarts_while_the_daemon_is_dead() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.service("first", "127.0.0.1:8080")?;
    scene.allow(&["8080", "8081"])?;
    scene.daemon.kill9()?;
    scene.served(8080, "first")?;
    first.stop();
    scene.refused(8080)?;
    let _second = scene.service("second", "127.0.0.1:8080")?;
    scene.served(8080, "second")?;
    // One that never ran while the daemon did, and one that no rule names.
    let _third = scene.service("third", "127.0.0.1:8081")?;
    let _unlisted = scene.service("unlisted", "127.0.0.1:8082")?;
    scene.served(8081, "third")?;
    scene.refused(8082)?;
    scene.daemon.restart()?;
    scene.must_be(8080, "steered")?;
    scene.must_be(8081, "steered")?;
    scene.served(8080, "second")?;
    scene.served(8081, "third")?;
    Ok(())
}

fn service_starts_after_the_rule() -> Result<()> {
    let scene = Scene::new()?;
    scene.allow(&["8080"])?;
    scene.must_be(8080, "waiting")?;
    scene.refused(8080)?;
    let _service = scene.service("late", "127.0.0.1:8080")?;
    served_at_once(&scene, 8080, "late")?;
    scene.wait_for(8080, "steered")?;
    Ok(())
}

fn group(scene: &Scene, size: usize, address: &str) -> Result<Vec<Service>> {
    let options = Options { reuse_port: true, ..Options::new("group", address)? };
    (0..size).map(|_| scene.service_with(&options)).collect()
}

/// Members leave one by one, in the order they came and then in the opposite one; connects go on until the
/// last.
fn reuse_port_group_hands_over() -> Result<()> {
    let scene = Scene::new()?;
    scene.allow(&["8080"])?;
    for oldest_first in [true, false] {
        let mut members = group(&scene, 4, "127.0.0.1:8080")?;
        served_at_once(&scene, 8080, "group")?;
        while !members.is_empty() {
            for _ in 0..4 {
                served_at_once(&scene, 8080, "group").with_context(|| {
                    format!("{} members are left, oldest first: {oldest_first}", members.len())
                })?;
            }
            members.remove(if oldest_first { 0 } else { members.len() - 1 }).stop();
        }
        scene.refused(8080)?;
        scene.wait_for(8080, "waiting")?;
    }
    // A member that joins a group which was there before the rule.
    let mut members = group(&scene, 1, "127.0.0.1:8081")?;
    scene.allow(&["8081"])?;
    members.extend(group(&scene, 1, "127.0.0.1:8081")?);
    members.remove(0).stop();
    served_at_once(&scene, 8081, "group")?;
    scene.wait_for(8081, "steered")?;
    Ok(())
}

/// The kernel goes on to choose within the group that the assigned listener is in.
fn reuse_port_group_is_spread() -> Result<()> {
    let scene = Scene::new()?;
    let members = group(&scene, 4, "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let rounds = 80;
    for _ in 0..rounds {
        scene.served(8080, "group")?;
    }
    let counts: Vec<_> = members.iter().map(Service::accepted).collect();
    ensure!(counts.iter().sum::<usize>() == rounds, "{counts:?}");
    // By chance a member gets less than 5 of 80 once in 100,000 runs.
    ensure!(counts.iter().all(|&count| count >= 5), "spread over the members: {counts:?}");
    Ok(())
}

/// Two services on one port: whoever bound the loopback address itself is meant.
fn loopback_listener_comes_before_wildcard() -> Result<()> {
    let scene = Scene::new()?;
    let on = |name: &str, address: &str| -> Result<Service> {
        scene.service_with(&Options { reuse_port: true, ..Options::new(name, address)? })
    };
    let _wildcard = on("wildcard", "0.0.0.0:3000")?;
    let _loopback = on("loopback", "127.0.0.1:3000")?;
    scene.allow(&["80=3000"])?;
    for _ in 0..4 {
        scene.served(80, "loopback")?;
    }
    Ok(())
}

fn wildcard_takes_over_from_loopback() -> Result<()> {
    let scene = Scene::new()?;
    let on = |name: &str, address: &str| -> Result<Service> {
        scene.service_with(&Options { reuse_port: true, ..Options::new(name, address)? })
    };
    scene.allow(&["80=3000"])?;
    let _wildcard = on("wildcard", "0.0.0.0:3000")?;
    let loopback = on("loopback", "127.0.0.1:3000")?;
    served_at_once(&scene, 80, "loopback")?;
    loopback.stop();
    served_at_once(&scene, 80, "wildcard")?;
    let _again = on("again", "127.0.0.1:3000")?;
    if kernel::registers_listeners_alone() {
        scene.served(80, "again")?;
    }
    Ok(())
}

fn dual_stack_wildcard_is_steered() -> Result<()> {
    let scene = Scene::with(("10.7.0.1/24 fd07::1/64", "10.7.0.2/24 fd07::2/64"), daemon_options())?;
    let _service = scene.service("dual", "[::]:3000")?;
    scene.allow(&["80=3000"])?;
    scene.must_be(80, "steered")?;
    let greeting = client::served_by(&scene.container, "10.7.0.1:80".parse()?, "dual")?;
    ensure!(greeting.peer.ip().to_canonical().to_string() == "10.7.0.2", "{greeting:?}");
    ensure!(greeting.accept.ip().to_canonical().to_string() == "10.7.0.2", "{greeting:?}");
    let greeting = client::served_by(&scene.container, "[fd07::1]:80".parse()?, "dual")?;
    ensure!(greeting.peer.ip().to_string() == "fd07::2", "{greeting:?}");

    // A dual-stack socket has another structure to be told of a loopback peer.
    scene.allow(&["81=3000", "--source", "loopback"])?;
    let greeting = client::served_by(&scene.container, "10.7.0.1:81".parse()?, "dual")?;
    for end in [greeting.accept, greeting.peer, greeting.local] {
        ensure!(end.ip().to_canonical().to_string() == "127.0.0.1", "{greeting:?}");
    }
    let greeting = client::served_by(&scene.container, "[fd07::1]:81".parse()?, "dual")?;
    for end in [greeting.accept, greeting.peer, greeting.local] {
        ensure!(end.ip().to_string() == "::1", "{greeting:?}");
    }
    Ok(())
}

fn daemon_options() -> lbridge_tests::harness::daemon::Options {
    lbridge_tests::harness::daemon::Options::default()
}

/// It listens on every IPv6 address, but an IPv4 connection must not be given to it.
fn v6_only_wildcard_is_not_mistaken() -> Result<()> {
    let scene = Scene::with(("10.7.0.1/24 fd07::1/64", "10.7.0.2/24 fd07::2/64"), daemon_options())?;
    let six = scene.service_with(&Options { v6_only: true, ..Options::new("six", "[::]:3000")? })?;
    scene.allow(&["80=3000"])?;
    client::served_by(&scene.container, "[fd07::1]:80".parse()?, "six")?;
    // The port has no IPv4 service, the IPv6 one is the only one that can be meant.
    let greeting = client::served_by(&scene.container, "10.7.0.1:80".parse()?, "six")?;
    ensure!(greeting.local.ip().is_ipv6(), "{greeting:?}");
    let rule = scene.daemon.rule("bridge:lab0", 80)?.context("the rule")?;
    let state_of = |address: &str| {
        let gateways = rule["gateways"].as_array().into_iter().flatten();
        gateways
            .filter(|gateway| gateway["address"] == address)
            .map(|gateway| gateway["state"].clone())
            .next()
    };
    ensure!(state_of("fd07::1").is_some_and(|state| state == "steered"), "{rule}");
    ensure!(state_of("10.7.0.1").is_some_and(|state| state == "relayed"), "{rule}");

    // With an IPv4 service beside it each family gets its own.
    let _four = scene.service("four", "127.0.0.1:3000")?;
    patience::until("IPv4 moves to its own service", || {
        let attempt = client::attempt(&scene.container, "10.7.0.1:80".parse()?);
        Ok(matches!(attempt, client::Attempt::Served(greeting) if greeting.service == "four").then_some(()))
    })?;
    client::served_by(&scene.container, "[fd07::1]:80".parse()?, "six")?;
    six.stop();
    client::served_by(&scene.container, "10.7.0.1:80".parse()?, "four")?;
    Ok(())
}

fn ipv6_loopback_is_relayed_for_ipv4() -> Result<()> {
    let scene = Scene::with(V4, daemon_options())?;
    let service = scene.service("six", "[::1]:8080")?;
    scene.allow(&["8080", "80=[::1]:8080"])?;
    for port in [8080, 80] {
        let state = scene.must_be(port, "relayed")?;
        state.must_be_because("family_mismatch")?;
        let greeting = scene.served(port, "six")?;
        // Not a local client, whatever the address family.
        ensure!(greeting.peer.ip().to_canonical() == scene.container_ip, "{greeting:?}");
        ensure!(greeting.accept.ip().to_canonical() == scene.container_ip, "{greeting:?}");
    }
    service.stop();
    scene.wait_for(8080, "waiting")?;
    scene.refused(8080)
}

fn mptcp(name: &str) -> Result<Options> {
    Ok(Options { mptcp: true, ..Options::new(name, "127.0.0.1:8080")? })
}

fn mptcp_listener_is_relayed() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service_with(&mptcp("ollama")?)?;
    scene.allow(&["8080"])?;
    let state = scene.must_be(8080, "relayed")?;
    state.must_be_because("mptcp")?;
    let greeting = scene.served(8080, "ollama")?;
    ensure!(greeting.accept.ip() == scene.container_ip, "accept() sees the container: {greeting:?}");
    ensure!(greeting.peer.ip() == scene.container_ip, "getpeername() sees the container: {greeting:?}");
    // A client that offers MPTCP itself.
    let stream = client::dial_mptcp(&scene.container, scene.gateway(8080))?;
    ensure!(client::Connection::greeted(stream)?.greeting.service == "ollama");
    Ok(())
}

/// The service is restarted with and without `GODEBUG=multipathtcp=0`.
fn listener_moves_between_mptcp_and_tcp() -> Result<()> {
    let scene = Scene::new()?;
    scene.allow(&["8080"])?;
    for round in 0..2 {
        let name = format!("mptcp {round}");
        let service = scene.service_with(&mptcp(&name)?)?;
        scene.wait_for(8080, "relayed")?;
        scene.served(8080, &name)?;
        let mut relayed = client::connect(&scene.container, scene.gateway(8080))?;
        service.stop();
        let name = format!("tcp {round}");
        let service = scene.service(&name, "127.0.0.1:8080")?;
        scene.wait_for(8080, "steered")?;
        scene.served(8080, &name)?;
        relayed.echo(b"a relayed connection outlives the move")?;
        service.stop();
    }
    Ok(())
}

fn registered(scene: &Scene) -> Result<usize> {
    let maps = pins::entries(scene.daemon.bpffs())?;
    let listeners = maps.iter().find(|(name, _)| name.ends_with("LISTENERS"));
    listeners.map(|(_, entries)| *entries).context("no map of listeners")
}

/// Any user may listen on every address of 127.0.0.0/8.
fn a_local_users_listeners_take_no_room() -> Result<()> {
    let scene = Scene::new()?;
    let before = scene.service("before", "127.9.0.1:8080")?;
    scene.allow(&["8080"])?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.soon_served(8080, "service")?;
    let flood = (0..500_u16).map(|number| {
        let [high, low] = number.to_be_bytes();
        scene.lab.host().run(|| Ok(TcpListener::bind((Ipv4Addr::new(127, 8, high, low), 8080))?))
    });
    let _flood = flood.collect::<Result<Vec<_>>>()?;
    scene.must_be(8080, "steered")?;
    ensure!(registered(&scene)? == 1, "{} are registered", registered(&scene)?);
    ensure!(before.accepted() == 0);
    // An address that a rule names is registered.
    scene.allow(&["9090=127.9.0.1:8080"])?;
    scene.served(9090, "before")?;
    ensure!(registered(&scene)? == 2);
    Ok(())
}

/// With every place taken, a service that starts is served all the same.
fn a_full_map_is_relayed() -> Result<()> {
    /// As many as fill the map with what no look clears away: slots of addresses that are watched.
    const PORTS: u16 = 66;
    const FIRST: u16 = 8000;
    let scene = Scene::new()?;
    scene.allow(&["8000-8065"])?;
    // To remove one slot, the kernel searches all that its socket has: they are spread over many sockets.
    let bind = |_| Ok(TcpListener::bind("127.0.0.1:0")?);
    let sockets = scene.lab.host().run(|| (0..256).map(bind).collect::<Result<Vec<_>>>())?;
    let map = pins::Map::named(scene.daemon.bpffs(), "LISTENERS")?;
    let v4 = |ip: [u8; 4]| [&[0; 10][..], &[0xff, 0xff], &ip].concat();
    let addresses = [v4([127, 0, 0, 1]), v4([0; 4]), vec![0; 16], [&[0; 15][..], &[1]].concat()];
    let mut full = false;
    'fill: for port in FIRST..FIRST + PORTS {
        for address in &addresses {
            // Those that the program itself uses come last.
            for slot in (0..=255_u8).rev() {
                let key = [&address[..], &port.to_ne_bytes(), &[slot, 6]].concat();
                let socket = u32::try_from(sockets[usize::from(slot)].as_raw_fd())?.to_ne_bytes();
                full = port > FIRST && map.put(&key, &socket).is_err();
                if full {
                    break 'fill;
                }
            }
        }
    }
    ensure!(full, "the map has {} entries", registered(&scene)?);
    let _service = scene.service("crowded out", "127.0.0.1:8000")?;
    scene.wait_for(FIRST, "relayed")?;
    scene.served(FIRST, "crowded out")?;
    // There is room again.
    scene.deny(&["8001-8065"])?;
    scene.wait_for(FIRST, "steered")?;
    scene.served(FIRST, "crowded out").map(drop)
}

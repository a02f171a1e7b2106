//! IPv4 and IPv6 on one bridge: who dials what, which listener answers, which way. The table of
//! `docs/data-path.md`, tried.

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::Options as DaemonOptions;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::{Options, Service};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::udp::{self, Echo};
use lbridge_tests::harness::{kernel, patience};
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        every_listener_from_either_family,
        the_loopback_address_comes_first,
        a_target_address_has_a_family,
        another_users_listener_of_the_other_family_gets_nothing,
        so_it_is_with_mptcp: [Need::Mptcp],
        a_wildcard_of_another_user_gets_nothing,
        while_the_service_restarts_another_user_gets_nothing,
        of_two_people_the_one_on_ipv4_is_the_service,
        another_users_udp_socket_gets_nothing: [Need::TellsInterfaces],
        a_namespace_is_led_to_the_same_service,
    ]
}

const BOTH: (&str, &str) = ("10.7.0.1/24 fd07::1/64", "10.7.0.2/24 fd07::2/64");
const V4: &str = "10.7.0.1";
const V6: &str = "fd07::1";

/// An address that a service listens on, whether for IPv6 alone, and the way that each family takes: `None`
/// is refused.
struct Case {
    listens: &'static str,
    v6_only: bool,
    v4: Option<&'static str>,
    v6: Option<&'static str>,
}

const fn case(
    listens: &'static str,
    v6_only: bool,
    v4: Option<&'static str>,
    v6: Option<&'static str>,
) -> Case {
    Case { listens, v6_only, v4, v6 }
}

const CASES: [Case; 5] = [
    case("127.0.0.1", false, Some("steered"), Some("relayed")),
    case("[::1]", false, Some("relayed"), Some("steered")),
    case("0.0.0.0", false, Some("steered"), Some("relayed")),
    case("[::]", false, Some("steered"), Some("steered")),
    case("[::]", true, Some("relayed"), Some("steered")),
];

fn scene() -> Result<Scene> {
    Scene::with(BOTH, DaemonOptions::default())
}

fn service(scene: &Scene, listens: &str, port: u16, v6_only: bool) -> Result<Service> {
    let address = format!("{listens}:{port}");
    scene.service_with(&Options { v6_only, ..Options::new(&address, &address)? })
}

/// Checks what `status` says of the gateway, and what happens to who dials it.
fn takes(scene: &Scene, gateway: &str, port: u16, service: &str, way: Option<&str>) -> Result<()> {
    let status = scene.daemon.status()?;
    let rules = status["rules"].as_array().context("rules")?;
    let rule = rules.iter().find(|rule| rule["port"] == port).context("the rule")?;
    let gateways = rule["gateways"].as_array().context("gateways")?;
    let told = gateways.iter().find(|it| it["address"] == gateway).context("the gateway")?;
    ensure!(told["state"] == way.unwrap_or("waiting"), "{gateway} {port}: {told:#}");
    let to = std::net::SocketAddr::new(gateway.parse()?, port);
    if way.is_none() {
        return client::refused(&scene.container, to);
    }
    let greeting = client::served_by(&scene.container, to, service)?;
    let shown = if gateway == V4 { "10.7.0.2" } else { "fd07::2" };
    // An IPv4 socket cannot be shown an IPv6 peer: it is shown a stand-in, which is no local client's address
    // either.
    let peer = greeting.peer.ip();
    let stand_in = peer.is_loopback() && peer.to_string() != "127.0.0.1" && peer.to_string() != "::1";
    ensure!(peer.to_canonical().to_string() == shown || (way == Some("relayed") && stand_in), "{greeting:?}");
    Ok(())
}

fn every_listener_from_either_family() -> Result<()> {
    let scene = scene()?;
    for (port, case) in (8000..).zip(&CASES) {
        let name = format!("{}:{port}", case.listens);
        let _service = service(&scene, case.listens, port, case.v6_only)?;
        scene.allow(&[&port.to_string()])?;
        takes(&scene, V4, port, &name, case.v4).with_context(|| format!("IPv4 to {name}"))?;
        takes(&scene, V6, port, &name, case.v6).with_context(|| format!("IPv6 to {name}"))?;
    }
    Ok(())
}

/// Each family has its own, where both are listened on.
fn the_loopback_address_comes_first() -> Result<()> {
    let scene = scene()?;
    let _four = service(&scene, "127.0.0.1", 8080, false)?;
    let _six = service(&scene, "[::1]", 8080, false)?;
    let _any = service(&scene, "0.0.0.0", 8080, false);
    scene.allow(&["8080"])?;
    takes(&scene, V4, 8080, "127.0.0.1:8080", Some("steered"))?;
    takes(&scene, V6, 8080, "[::1]:8080", Some("steered"))
}

/// A rule that names an address of one family leads there and nowhere else, from both.
fn a_target_address_has_a_family() -> Result<()> {
    let scene = scene()?;
    let four = service(&scene, "127.0.0.1", 3000, false)?;
    let _six = service(&scene, "[::1]", 3000, false)?;
    scene.allow(&["80=127.0.0.1:3000", "81=[::1]:3000"])?;
    takes(&scene, V4, 80, "127.0.0.1:3000", Some("steered"))?;
    takes(&scene, V6, 80, "127.0.0.1:3000", Some("relayed"))?;
    takes(&scene, V4, 81, "[::1]:3000", Some("relayed"))?;
    takes(&scene, V6, 81, "[::1]:3000", Some("steered"))?;
    four.stop();
    takes(&scene, V4, 80, "none", None)?;
    takes(&scene, V6, 80, "none", None)
}

/// A person's uid; the services of these tests are root's.
const MALLORY: u32 = 1001;

/// A listener of somebody else's, for IPv6 alone where it can be.
fn stranger(scene: &Scene, listens: &str, port: u16) -> Result<Service> {
    let address = format!("{listens}:{port}");
    let options = Options { v6_only: true, uid: Some(MALLORY), ..Options::new("mallory's", &address)? };
    scene.service_with(&options)
}

/// Why a gateway is in its state.
fn why(scene: &Scene, port: u16, gateway: &str) -> Result<String> {
    let rule = scene.daemon.rule("bridge:lab0", port)?.context("the rule")?;
    let gateways = rule["gateways"].as_array().context("gateways")?;
    let told = gateways.iter().find(|it| it["address"] == gateway).context("the gateway")?;
    Ok(told["why"].as_str().unwrap_or_default().to_owned())
}

fn gets_nothing(address: &str) -> String {
    format!("{address} belongs to another user (uid {MALLORY}) and gets nothing")
}

fn another_users_listener_of_the_other_family_gets_nothing() -> Result<()> {
    let scene = scene()?;
    for (port, (own, others, v4, v6)) in (8000..).zip([
        ("127.0.0.1", "[::1]", "steered", "relayed"),
        ("0.0.0.0", "[::1]", "steered", "relayed"),
        ("[::1]", "127.0.0.1", "relayed", "steered"),
    ]) {
        let name = format!("{own}:{port}");
        let listens = || scene.service_with(&Options { reuse_port: true, ..Options::new(&name, &name)? });
        // A group is one service, too.
        let _group = [listens()?, listens()?];
        // Whoever came first, and whether the rule was there.
        if port == 8001 {
            scene.allow(&[&port.to_string()])?;
        }
        let mallory = stranger(&scene, others, port)?;
        scene.allow(&[&port.to_string()])?;
        for _ in 0..3 {
            takes(&scene, V4, port, &name, Some(v4)).with_context(|| format!("IPv4 to {name}"))?;
            takes(&scene, V6, port, &name, Some(v6)).with_context(|| format!("IPv6 to {name}"))?;
        }
        ensure!(mallory.accepted() == 0, "mallory got {} connections", mallory.accepted());
        let (told, _) = if v4 == "relayed" { (V4, V6) } else { (V6, V4) };
        let why = why(&scene, port, told)?;
        ensure!(why.contains(&gets_nothing(&format!("{others}:{port}"))), "{why}");
        let explained = scene.daemon.cli(&["explain", "bridge:lab0", &port.to_string()])?.stdout;
        ensure!(explained.contains(&gets_nothing(&format!("{others}:{port}"))), "{explained}");
    }
    Ok(())
}

fn so_it_is_with_mptcp() -> Result<()> {
    let scene = scene()?;
    for (port, mptcp) in [(8000, true), (8001, false)] {
        let name = format!("127.0.0.1:{port}");
        let _service = scene.service_with(&Options { mptcp, ..Options::new(&name, &name)? })?;
        let options =
            Options { mptcp: !mptcp, uid: Some(MALLORY), ..Options::new("m", &format!("[::1]:{port}"))? };
        let mallory = scene.service_with(&options)?;
        scene.allow(&[&port.to_string()])?;
        takes(&scene, V4, port, &name, Some(if mptcp { "relayed" } else { "steered" }))?;
        takes(&scene, V6, port, &name, Some("relayed"))?;
        ensure!(mallory.accepted() == 0, "mallory got {} connections", mallory.accepted());
    }
    Ok(())
}

/// A relay cannot listen beside it, and without one it would get what is dialled at the gateway.
fn a_wildcard_of_another_user_gets_nothing() -> Result<()> {
    let scene = scene()?;
    let six = std::net::SocketAddr::new(V6.parse()?, 8000);
    for own in ["127.0.0.1", "0.0.0.0"] {
        let name = format!("{own}:8000");
        let service = service(&scene, own, 8000, false)?;
        let mallory = stranger(&scene, "[::]", 8000)?;
        client::served_by(&scene.container, six, "mallory's").context("the control: there is no rule")?;
        let before = mallory.accepted();
        scene.allow(&["8000", "81=8000"])?;
        takes(&scene, V4, 8000, &name, Some("steered"))?;
        // A relay that the kernel's entry leads to needs no port; before Linux 5.17 it cannot have it.
        let by_entry = kernel::has_ingress_ifindex();
        let state = scene.must_be(8000, if by_entry { "relayed" } else { "blocked" })?;
        ensure!(state.why.is_some_and(|why| why.contains(&gets_nothing("[::]:8000"))));
        if by_entry {
            takes(&scene, V6, 8000, &name, Some("relayed"))?;
        } else {
            client::refused(&scene.container, six)?;
            let explained = scene.daemon.cli(&["explain", "bridge:lab0", "8000"])?.stdout;
            ensure!(explained.contains(&format!("refused: a relay cannot listen on {six}")), "{explained}");
        }
        // The other dialled port is free.
        takes(&scene, V4, 81, &name, Some("steered"))?;
        takes(&scene, V6, 81, &name, Some("relayed"))?;
        ensure!(mallory.accepted() == before, "mallory got {}", mallory.accepted() - before);
        // Once that listener is gone the service has both.
        mallory.stop();
        scene.wait_for(8000, "relayed")?;
        takes(&scene, V6, 8000, &name, Some("relayed"))?;
        scene.deny(&["8000", "81"])?;
        service.stop();
    }
    Ok(())
}

fn while_the_service_restarts_another_user_gets_nothing() -> Result<()> {
    let scene = scene()?;
    let four = std::net::SocketAddr::new(V4.parse()?, 8000);
    let six = std::net::SocketAddr::new(V6.parse()?, 8000);
    let name = "127.0.0.1:8000";
    for listens in ["[::1]", "[::]"] {
        let mut own = service(&scene, "127.0.0.1", 8000, false)?;
        scene.allow(&["8000"])?;
        takes(&scene, V6, 8000, name, Some("relayed"))?;
        own.stop();
        // As soon as the port is free: before the daemon looks, or when it has closed its relay.
        let come = || Ok(stranger(&scene, listens, 8000).ok());
        let mallory = patience::until("mallory listens", come)?;
        for round in 0..3 {
            let waiting = || Ok((scene.must_be(8000, "waiting").is_ok()).then_some(()));
            for _ in 0..20 {
                client::refused(&scene.container, four)?;
                client::refused(&scene.container, six)?;
            }
            patience::until("the rule waits", waiting)?;
            let why = why(&scene, 8000, V4)?;
            ensure!(why.contains("if that is the service now, deny the rule and allow it again"), "{why}");
            own = service(&scene, "127.0.0.1", 8000, false)?;
            scene.soon_served(8000, name).with_context(|| format!("round {round}"))?;
            own.stop();
        }
        ensure!(mallory.accepted() == 0, "mallory got {} connections", mallory.accepted());
        // The remedy, as it is told.
        scene.deny(&["8000"])?;
        scene.allow(&["8000"])?;
        client::served_by(&scene.container, six, "mallory's")?;
        scene.deny(&["8000"])?;
    }
    Ok(())
}

fn of_two_people_the_one_on_ipv4_is_the_service() -> Result<()> {
    const ALICE: u32 = 1000;
    let scene = scene()?;
    let options = Options { uid: Some(ALICE), ..Options::new("alice's", "127.0.0.1:8000")? };
    let alice = scene.service_with(&options)?;
    let mallory = stranger(&scene, "[::1]", 8000)?;
    scene.allow(&["8000"])?;
    takes(&scene, V4, 8000, "alice's", Some("steered"))?;
    takes(&scene, V6, 8000, "alice's", Some("relayed"))?;
    ensure!(mallory.accepted() == 0);
    let rule = scene.daemon.rule("bridge:lab0", 8000)?.context("the rule")?;
    for gateway in rule["gateways"].as_array().context("gateways")? {
        ensure!(gateway["listener_user"]["uid"] == ALICE, "{gateway}");
    }
    // A service of the system's comes before both.
    alice.stop();
    let _system = service(&scene, "0.0.0.0", 8000, false)?;
    scene.soon_served(8000, "0.0.0.0:8000")?;
    takes(&scene, V6, 8000, "0.0.0.0:8000", Some("relayed"))?;
    ensure!(mallory.accepted() == 0);
    // A rule that names an address means whoever listens there.
    scene.allow(&["81=[::1]:8000"])?;
    takes(&scene, V6, 81, "mallory's", Some("steered"))
}

fn another_users_udp_socket_gets_nothing() -> Result<()> {
    let scene = scene()?;
    let host = scene.lab.host();
    let _service = Echo::start(host, "dns", "127.0.0.1:5300")?;
    let four = std::net::SocketAddr::new(V4.parse()?, 5300);
    let six = std::net::SocketAddr::new(V6.parse()?, 5300);
    scene.allow(&["5300/udp"])?;
    for listens in ["[::1]:5300", "[::]:5300"] {
        let mallory = Echo::start_as(host, MALLORY, "mallory's", listens)?;
        // Nothing tells of a UDP socket: it is looked for.
        let noticed = || Ok(why(&scene, 5300, V6)?.contains(&gets_nothing(listens)).then_some(()));
        patience::until("status tells of mallory's", noticed)?;
        udp::served_by(&scene.container, "10.7.0.2".parse()?, four, "dns")?;
        let before = mallory.received();
        for _ in 0..3 {
            udp::refused(&scene.container, six)?;
        }
        ensure!(mallory.received() == before, "mallory got {}", mallory.received() - before);
        scene.must_be(5300, "blocked")?;
    }
    Ok(())
}

fn a_namespace_is_led_to_the_same_service() -> Result<()> {
    let scene = scene()?;
    let _service = service(&scene, "127.0.0.1", 8000, false)?;
    let mallory = stranger(&scene, "[::1]", 8000)?;
    let inside = NetNs::new()?;
    let mut sleeper = inside.command("sleep").arg("1000000").spawn()?;
    let network = format!("pid:{}", sleeper.id());
    let reached = scene.daemon.allow(&[&network, "8000"]).and_then(|_| {
        client::served_by(&inside, "127.0.0.1:8000".parse()?, "127.0.0.1:8000")?;
        client::served_by(&inside, "[::1]:8000".parse()?, "127.0.0.1:8000")
    });
    sleeper.kill()?;
    sleeper.wait()?;
    reached?;
    ensure!(mallory.accepted() == 0, "mallory got {} connections", mallory.accepted());
    Ok(())
}

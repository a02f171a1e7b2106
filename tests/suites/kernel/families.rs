//! IPv4 and IPv6 on one bridge: who dials what, which listener answers, which way. The table of `docs/data-path.md`, tried.

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::Options as DaemonOptions;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::{Options, Service};
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![every_listener_from_either_family, the_loopback_address_comes_first, a_target_address_has_a_family]
}

const BOTH: (&str, &str) = ("10.7.0.1/24 fd07::1/64", "10.7.0.2/24 fd07::2/64");
const V4: &str = "10.7.0.1";
const V6: &str = "fd07::1";

/// An address that a service listens on, whether for IPv6 alone, and the way that each family takes: `None` is refused.
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

/// What `status` says of the gateway, and what happens to who dials it.
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
    // An IPv4 socket cannot be shown an IPv6 peer: it is shown a stand-in, which is no local client's address either.
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

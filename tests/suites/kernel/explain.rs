//! `lbridge explain`: what it says must be what a client then meets.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Attempt, Greeting};
use lbridge_tests::harness::daemon::Daemon;
use lbridge_tests::harness::links::Link;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::{Options, Service};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{kernel, patience, pins};
use lbridge_tests::tests;
use serde_json::Value;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        steered_waiting_and_denied,
        steered_over_ipv6_and_only_there,
        loopback_peer_is_foretold,
        relayed_with_its_reason: [Need::Mptcp],
        relay_peers_are_foretold,
        other_network_is_refused,
        foreign_source_and_the_host_itself,
        wildcard_listener_answers_without_a_rule,
        service_on_the_gateway_is_overridden_by_a_rule,
        entry_behind_the_daemons_back,
        detached_programs,
        namespace_with_and_without_a_relay,
        networks_that_are_not_there,
        says_it_in_lines,
    ]
}

/// `lbridge explain --json`.
fn explained(daemon: &Daemon, arguments: &[&str]) -> Result<Value> {
    let output = daemon.cli(&[&["explain", "--json"], arguments].concat())?;
    ensure!(output.status == 0, "explain {arguments:?}: {output:?}");
    serde_json::from_str(&output.stdout).with_context(|| format!("not JSON: {}", output.stdout))
}

/// The way to the first address that can be dialled.
fn first_way(explanation: &Value) -> Result<&Value> {
    explanation["ways"].get(0).with_context(|| format!("no way: {explanation}"))
}

/// The text of a way's step.
fn text<'a>(way: &'a Value, stage: &str) -> Result<&'a str> {
    let steps = way["steps"].as_array().context("steps")?;
    let step = steps.iter().find(|step| step["stage"] == stage);
    step.and_then(|step| step["text"].as_str()).with_context(|| format!("no step {stage}: {way}"))
}

/// Returns what `explain` foretells of the container's connection, and who answers it, if anybody: the two
/// agree.
fn comes_true(scene: &Scene, port: u16) -> Result<(Value, Option<Greeting>)> {
    let source = scene.container_ip.to_string();
    let explanation = explained(&scene.daemon, &["bridge:lab0", &port.to_string(), "--source", &source])?;
    let greeting = meets(&explanation, &scene.container, None, scene.gateway(port))?;
    Ok((explanation, greeting))
}

fn meets(
    explanation: &Value,
    from: &NetNs,
    source: Option<IpAddr>,
    to: SocketAddr,
) -> Result<Option<Greeting>> {
    let ways = explanation["ways"].as_array().context("ways")?;
    let way = ways.iter().find(|way| way["dialled"] == to.to_string()).context("a way to the address")?;
    let fate = way["fate"].as_str().context("a fate")?;
    match (fate, client::attempt_from(from, source, to)) {
        ("steered" | "relayed" | "passed", Attempt::Served(greeting)) => {
            if let Ok(peer) = text(way, "peer") {
                let sees = format!("sees {} as its peer", greeting.peer.ip().to_canonical());
                ensure!(peer.contains(&sees), "{peer}, but: {greeting:?}");
            }
            Ok(Some(greeting))
        }
        ("refused", Attempt::Refused(_)) => Ok(None),
        (_, came) => anyhow::bail!("foretold: {explanation:#}, but: {came:?}"),
    }
}

/// The fate that is foretold, and comes true.
fn fate(scene: &Scene, port: u16, expected: &str) -> Result<Value> {
    let (explanation, _) = comes_true(scene, port)?;
    ensure!(first_way(&explanation)?["fate"] == expected, "{expected} expected: {explanation:#}");
    Ok(explanation)
}

fn steered_waiting_and_denied() -> Result<()> {
    let scene = Scene::new()?;
    let explanation = fate(&scene, 8080, "refused")?;
    ensure!(
        explanation["outcome"].as_str().is_some_and(|o| o.contains("there is no rule")),
        "{explanation:#}"
    );
    scene.allow(&["8080"])?;
    let explanation = fate(&scene, 8080, "refused")?;
    ensure!(explanation["remedy"] == "start a service on 127.0.0.1:8080", "{explanation:#}");

    let service = scene.service("service", "127.0.0.1:8080")?;
    // Before Linux 5.15 the daemon registers it.
    scene.wait_for(8080, "steered")?;
    let explanation = fate(&scene, 8080, "steered")?;
    let way = first_way(&explanation)?;
    let own = format!("(process {})", std::process::id());
    ensure!(text(way, "listener")?.contains(&own), "names who listens: {explanation:#}");
    let interface = if kernel::has_ingress_ifindex() { "lab0" } else { "any interface" };
    ensure!(text(way, "lookup")?.contains(&format!("({interface}, 10.7.0.1, 8080)")), "{explanation:#}");
    ensure!(text(way, "source")?.contains("10.7.0.0/24"), "{explanation:#}");
    ensure!(explanation["remedy"].as_str().is_some_and(|r| r.contains("lbridge deny bridge:lab0 8080")));
    // The default source is one of the subnet, too.
    let explanation = explained(&scene.daemon, &["bridge:lab0", "8080"])?;
    ensure!(first_way(&explanation)?["fate"] == "steered", "{explanation:#}");

    service.stop();
    fate(&scene, 8080, "refused")?;
    scene.allow(&["8070", "8082"])?;
    scene.deny(&["8080"])?;
    let explanation = fate(&scene, 8080, "refused")?;
    let rule = text(&explanation, "rule")?;
    ensure!(rule.contains("nearest: bridge:lab0 8082, bridge:lab0 8070"), "{rule}");
    Ok(())
}

fn steered_over_ipv6_and_only_there() -> Result<()> {
    let both = ("10.7.0.1/24 fd07::1/64", "10.7.0.2/24 fd07::2/64");
    let lab = lbridge_tests::harness::lab::Lab::new()?;
    let bridge = lab.add_bridge("lab0", both.0)?;
    let container = lab.container(&bridge, both.1)?;
    let daemon = Daemon::start(lab.host())?;
    let _service = Service::start(lab.host(), "six", "[::1]:8080")?;
    daemon.allow(&["bridge:lab0", "8080=[::1]:8080", "--path", "steer"])?;
    let explanation = explained(&daemon, &["bridge:lab0", "8080"])?;
    ensure!(explanation["ways"].as_array().map(Vec::len) == Some(2), "{explanation:#}");
    meets(&explanation, &container, None, "10.7.0.1:8080".parse()?)?;
    let greeting = meets(&explanation, &container, None, "[fd07::1]:8080".parse()?)?;
    ensure!(greeting.is_some_and(|greeting| greeting.service == "six"), "{explanation:#}");
    // A v6-only wildcard listener is registered, and no IPv4 connection is given to it.
    let wildcard = Options { v6_only: true, ..Options::new("wildcard", "[::]:9090")? };
    let _wildcard = Service::start_with(lab.host(), &wildcard)?;
    daemon.allow(&["bridge:lab0", "9090=127.0.0.1:9090"])?;
    let explanation = explained(&daemon, &["bridge:lab0", "9090"])?;
    meets(&explanation, &container, None, "10.7.0.1:9090".parse()?).map(drop)
}

fn loopback_peer_is_foretold() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("redis", "127.0.0.1:6379")?;
    scene.allow(&["6379", "--source", "loopback"])?;
    let (explanation, greeting) = comes_true(&scene, 6379)?;
    let greeting = greeting.context("a greeting")?;
    ensure!(greeting.peer.ip().to_string() == "127.0.0.1", "{greeting:?}");
    ensure!(text(first_way(&explanation)?, "peer")?.contains("itself as 127.0.0.1:6379"), "{explanation:#}");
    Ok(())
}

fn relayed_with_its_reason() -> Result<()> {
    let scene = Scene::new()?;
    let mptcp = Options { mptcp: true, ..Options::new("ollama", "127.0.0.1:11434")? };
    let service = scene.service_with(&mptcp)?;
    scene.allow(&["11434"])?;
    let explanation = fate(&scene, 11434, "relayed")?;
    ensure!(explanation["outcome"].as_str().is_some_and(|o| o.contains("MPTCP")), "{explanation:#}");
    service.stop();
    scene.wait_for(11434, "waiting")?;
    fate(&scene, 11434, "refused").map(drop)
}

fn relay_peers_are_foretold() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let _six = scene.service("six", "[::1]:9090")?;
    scene.allow(&["8080", "--path", "relay"])?;
    scene.allow(&["81=8080", "--path", "relay", "--source", "loopback"])?;
    scene.allow(&["9090"])?;
    for port in [8080, 81, 9090] {
        fate(&scene, port, "relayed").with_context(|| format!("port {port}"))?;
    }
    Ok(())
}

fn other_network_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let other = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let outsider = scene.lab.container(&other, "10.8.0.2/24")?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.allow(&["8081=8080", "--path", "relay"])?;
    for port in ["8080", "8081"] {
        let explanation = explained(&scene.daemon, &["bridge:lab1", port])?;
        let rule = text(&explanation, "rule")?;
        ensure!(rule.contains("nearest: bridge:lab0 808"), "{rule}");
        let to = SocketAddr::new("10.8.0.1".parse()?, port.parse()?);
        ensure!(meets(&explanation, &outsider, None, to)?.is_none(), "{explanation:#}");
    }
    fate(&scene, 8080, "steered").map(drop)
}

fn foreign_source_and_the_host_itself() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.allow(&["8081=8080", "--path", "relay"])?;
    let foreign: IpAddr = "198.51.100.7".parse()?;
    scene.container.ip(&format!("addr add {foreign}/32 dev lo"))?;
    scene.lab.host().ip(&format!("route add {foreign} via 10.7.0.2 dev lab0"))?;
    for port in [8080_u16, 8081] {
        let question = ["bridge:lab0", &port.to_string(), "--source", "198.51.100.7"];
        let explanation = explained(&scene.daemon, &question)?;
        let met = meets(&explanation, &scene.container, Some(foreign), scene.gateway(port))?;
        ensure!(met.is_none(), "{explanation:#}");
        let explanation =
            explained(&scene.daemon, &["bridge:lab0", &port.to_string(), "--source", "10.7.0.1"])?;
        let met = meets(&explanation, scene.lab.host(), Some("10.7.0.1".parse()?), scene.gateway(port))?;
        ensure!(met.is_none(), "{explanation:#}");
    }
    // Left alone, it goes to whoever listens there anyway.
    scene.deny(&["8081"])?;
    let _anybody = scene.service("anybody", "10.7.0.1:8080")?;
    let explanation = explained(&scene.daemon, &["bridge:lab0", "8080", "--source", "198.51.100.7"])?;
    let met = meets(&explanation, &scene.container, Some(foreign), scene.gateway(8080))?;
    ensure!(met.is_some_and(|greeting| greeting.service == "anybody"), "{explanation:#}");
    Ok(())
}

fn wildcard_listener_answers_without_a_rule() -> Result<()> {
    let scene = Scene::new()?;
    let wildcard = scene.service("wildcard", "0.0.0.0:8080")?;
    let explanation = fate(&scene, 8080, "passed")?;
    let host = text(first_way(&explanation)?, "host")?;
    ensure!(host.contains("0.0.0.0:8080"), "names the listener: {host}");
    wildcard.stop();
    fate(&scene, 8080, "refused")?;
    let _dual = scene.service("dual", "[::]:8080")?;
    fate(&scene, 8080, "passed")?;
    let v6_only = Options { v6_only: true, ..Options::new("v6 only", "[::]:8081")? };
    let _v6_only = scene.service_with(&v6_only)?;
    fate(&scene, 8081, "refused").map(drop)
}

fn service_on_the_gateway_is_overridden_by_a_rule() -> Result<()> {
    let scene = Scene::new()?;
    let _gateway = scene.service("on the gateway", "10.7.0.1:8080")?;
    let (_, greeting) = comes_true(&scene, 8080)?;
    ensure!(greeting.is_some_and(|greeting| greeting.service == "on the gateway"));
    scene.allow(&["8080"])?;
    fate(&scene, 8080, "refused").context("waiting, and nobody else is to be reached")?;
    let _loopback = scene.service("loopback", "127.0.0.1:8080")?;
    scene.wait_for(8080, "steered")?;
    let (_, greeting) = comes_true(&scene, 8080)?;
    ensure!(greeting.is_some_and(|greeting| greeting.service == "loopback"));
    Ok(())
}

/// `EntryKey` and `Entry` of lbridge-common/src/wire.rs, for an IPv4 gateway.
fn entry(gateway: [u8; 4], ifindex: u32, port: u16, target_port: u16) -> (Vec<u8>, Vec<u8>) {
    let v4 = |address: [u8; 4]| [&[0; 10], [0xff; 2].as_slice(), &address].concat();
    let mut key = [v4(gateway), ifindex.to_ne_bytes().to_vec(), port.to_ne_bytes().to_vec()].concat();
    // By TCP.
    key.extend(6_u16.to_ne_bytes());
    let [a, b, c, _] = gateway;
    let mask = [[0xff; 15].as_slice(), &[0]].concat();
    let mut value = [key.clone(), v4([a, b, c, 0]), mask, v4([127, 0, 0, 1])].concat();
    value.extend(target_port.to_ne_bytes());
    value.extend([0; 6 + 8]);
    (key, value)
}

fn entry_behind_the_daemons_back() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let other = scene.service("other", "127.0.0.1:9090")?;
    scene.allow(&["8080"])?;
    let index = scene.lab.host().ip_output("-o link show lab0")?;
    let checked = kernel::has_ingress_ifindex();
    let index = if checked { index.split(':').next().unwrap_or_default().parse()? } else { 0 };
    let (key, value) = entry([10, 7, 0, 1], index, 7777, 8080);
    // A look for another reason may come in between, and put things right.
    let explain_entry = |port: u16, key: &[u8], value: &[u8], expected: &str| {
        patience::until("an explanation before the daemon's next pass", || {
            pins::put(scene.daemon.bpffs(), "ENTRIES", key, value)?;
            let Ok((explanation, _)) = comes_true(&scene, port) else { return Ok(None) };
            Ok((first_way(&explanation)?["fate"] == expected).then_some(explanation))
        })
    };
    let explanation = explain_entry(7777, &key, &value, "steered")?;
    ensure!(text(first_way(&explanation)?, "lookup")?.contains("somebody else has added it"));
    // One that leads elsewhere than its rule: to a port whose listeners nobody registers.
    let (key, value) = entry([10, 7, 0, 1], index, 8080, 9090);
    let explanation = explain_entry(8080, &key, &value, "refused")?;
    let lookup = text(first_way(&explanation)?, "lookup")?;
    ensure!(lookup.contains("to 127.0.0.1:9090") && lookup.contains("asks for 127.0.0.1:8080"), "{lookup}");
    ensure!(other.accepted() == 0);

    // The next look corrects both; explaining did not.
    scene.daemon.status()?;
    fate(&scene, 7777, "refused")?;
    fate(&scene, 8080, "steered").map(drop)
}

fn detached_programs() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    fate(&scene, 8080, "steered")?;
    let pinned = pins::files(scene.daemon.bpffs())?;
    let link = pinned.iter().find(|path| path.ends_with("link_steer")).context("no link is pinned")?;
    // A look for another reason may come in between, and attach it again: the scene's interfaces, for one,
    // are told of for some seconds, until the last of their addresses is there.
    let explanation = patience::until("an explanation before the daemon's next pass", || {
        Link::pinned(link)?.detach()?;
        Ok(fate(&scene, 8080, "refused").ok())
    })?;
    ensure!(text(first_way(&explanation)?, "lookup")?.contains("detached"), "{explanation:#}");
    Ok(())
}

fn namespace_with_and_without_a_relay() -> Result<()> {
    let scene = Scene::new()?;
    let inside = NetNs::new()?;
    inside.ip("link set lo up")?;
    let mut sleeper = inside.command("sleep").arg("1000").spawn()?;
    let result = (|| {
        let network = format!("pid:{}", sleeper.id());
        let to: SocketAddr = "127.0.0.1:8080".parse()?;
        let told = |fate: &str| -> Result<Value> {
            let explanation = explained(&scene.daemon, &[&network, "8080"])?;
            let ways = explanation["ways"].as_array().context("ways")?;
            let way = ways.iter().find(|way| way["dialled"] == to.to_string()).context("127.0.0.1")?;
            ensure!(way["fate"] == fate, "{fate} expected: {explanation:#}");
            let met = meets(&explanation, &inside, None, to)?;
            ensure!(met.is_some() == (fate != "refused"), "{explanation:#}");
            Ok(explanation)
        };
        told("refused").context("no rule")?;
        let own = Service::start(&inside, "own", "127.0.0.1:8080")?;
        told("passed").context("no rule, and somebody listens inside")?;
        own.stop();
        let service = scene.service("service", "127.0.0.1:8080")?;
        scene.daemon.allow(&[&network, "8080"])?;
        let explanation = told("relayed")?;
        ensure!(
            explanation["outcome"]
                .as_str()
                .is_some_and(|o| o.contains("a namespace's localhost is always relayed"))
        );
        service.stop();
        scene.daemon.wait_for_state(&network, 8080, "waiting")?;
        told("refused").map(drop).context("waiting")
    })();
    sleeper.kill()?;
    sleeper.wait()?;
    result
}

fn networks_that_are_not_there() -> Result<()> {
    let scene = Scene::new()?;
    scene.daemon.allow(&["bridge:later", "8080"])?;
    for (network, word) in [
        ("bridge:later", "no interface later"),
        ("bridge:never", "no interface never"),
        ("bridge:lo", "lo is not a bridge"),
        ("app_net", "--no-docker"),
        ("container:agent", "--no-docker"),
        ("netns:/run/netns/none", "/run/netns/none"),
        ("pid:2147483000", "no such process"),
    ] {
        let explanation = explained(&scene.daemon, &[network, "8080"])?;
        ensure!(explanation["ways"].as_array().is_some_and(Vec::is_empty), "{explanation:#}");
        let said = explanation["outcome"].as_str().context("an outcome")?;
        ensure!(said.contains(word), "{word} in {explanation:#}");
        ensure!(explanation["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{explanation:#}");
    }
    Ok(())
}

fn says_it_in_lines() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let before = pins::entries(scene.daemon.bpffs())?;
    let output = scene.daemon.cli(&["explain", "bridge:lab0", "8080", "--source", "10.7.0.2"])?;
    ensure!(output.status == 0 && output.stderr.is_empty(), "{output:?}");
    for words in ["+ network", "+ rule", "10.7.0.2 dials 10.7.0.1:8080", "+ listener  127.0.0.1:8080"] {
        ensure!(output.stdout.contains(words), "{words} in {}", output.stdout);
    }
    let last = output.stdout.lines().last().context("a last line")?;
    ensure!(last.contains("are steered to") && last.ends_with("takes it back"), "{last}");
    let output = scene.daemon.cli(&["explain", "bridge:lab0", "8081"])?;
    ensure!(output.status == 0 && output.stdout.contains("lbridge allow bridge:lab0 8081"), "{output:?}");
    for bad in [["bridge:lab0", "0"], ["bridge:lab0", "8000-8010"], ["bridge:lab0", "80=81"], ["", "80"]] {
        let output = scene.daemon.cli(&[&["explain"], bad.as_slice()].concat())?;
        ensure!(output.status == 2 && output.stderr.lines().count() == 1, "{bad:?}: {output:?}");
    }
    ensure!(pins::entries(scene.daemon.bpffs())? == before, "explaining changes nothing");
    Ok(())
}

//! `lbridge verify`: passes where all is well, and finds each hole that is made on purpose.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::{Daemon, Options, Output, binary};
use lbridge_tests::harness::lab::{Bridge, Lab};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::pins;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Suite, Test};
use lbridge_tests::tests;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn main() {
    Suite::new(&[], tests()).main()
}

fn tests() -> Vec<Test> {
    const IPTABLES: Need = Need::Program("iptables");
    tests![
        all_is_well,
        one_rule_is_verified_alone,
        a_service_on_all_addresses_is_found,
        a_service_on_another_address_is_found,
        an_entry_for_another_bridge_is_found,
        an_entry_for_an_uplink_is_found,
        an_entry_for_a_bridge_without_rules_is_found,
        an_entry_for_any_source_is_found,
        an_entry_that_leads_elsewhere_is_found,
        a_stranger_in_the_relays_place_is_found,
        a_firewall_before_the_gateway_is_found: [IPTABLES],
        a_firewall_before_the_service_proves_nothing: [IPTABLES],
        what_cannot_be_tried_is_not_verified,
        silence_proves_nothing: [Need::Program("nft")],
        a_neighbour_with_the_highest_address_is_left_alone,
        interrupted_it_leaves_nothing,
        refusals: [Need::Program("setpriv")],
    ]
}

/// Two bridges, a link to elsewhere, and services that are reached in every way.
struct Stage {
    lab: Lab,
    bridges: [Bridge; 2],
    /// On the first bridge.
    container: NetNs,
    daemon: Daemon,
    services: Vec<Service>,
    inside: Child,
    _elsewhere: NetNs,
}

const PLAIN: u16 = 8080;
const REMAPPED: u16 = 80;
const RELAYED: u16 = 9090;
const WAITING: u16 = 7000;

impl Stage {
    fn new() -> Result<Stage> {
        Stage::with(Options::default())
    }

    fn with(options: Options) -> Result<Stage> {
        let lab = Lab::new()?;
        let bridges =
            [lab.add_bridge("lab0", "10.7.0.1/24 fd07::1/64")?, lab.add_bridge("lab1", "10.8.0.1/24")?];
        let container = lab.container(&bridges[0], "10.7.0.2/24 fd07::2/64")?;
        let elsewhere = lab.lan("203.0.113.1/24")?;
        let daemon = Daemon::start_with(lab.host(), options)?;
        // A sandbox of somebody's.
        let inside = container.command("sleep").arg("1000000").stdin(Stdio::null()).spawn()?;
        let services = [("plain", "127.0.0.1:8080"), ("remapped", "127.0.0.1:3000"), ("six", "[::1]:6000")];
        let services = services.map(|(name, address)| Service::start(lab.host(), name, address));
        let services = services.into_iter().collect::<Result<Vec<_>>>()?;
        daemon.allow(&["bridge:lab0", "8080"])?;
        daemon.allow(&["bridge:lab0", "80=3000"])?;
        daemon.allow(&["bridge:lab0", "6000"])?;
        daemon.allow(&["bridge:lab0", "7000"])?;
        daemon.allow(&["bridge:lab1", "8080", "--source", "loopback"])?;
        daemon.allow(&["bridge:lab1", "9090=8080", "--path", "relay"])?;
        daemon.allow(&[&format!("pid:{}", inside.id()), "8080"])?;
        Ok(Stage { lab, bridges, container, daemon, services, inside, _elsewhere: elsewhere })
    }

    fn host(&self) -> &NetNs {
        self.lab.host()
    }

    /// `lbridge verify --json`, which must end so.
    fn verify(&self, arguments: &[&str], status: i32) -> Result<Vec<Value>> {
        checks(&self.daemon.cli(&[&["verify", "--json"], arguments].concat())?, status)
    }

    /// The pinned map of entries, and the key of the entry for a port on the first bridge's IPv4 gateway.
    fn entries(&self) -> Result<pins::Map> {
        let files = pins::files(self.daemon.bpffs())?;
        let path = files.iter().find(|path| path.ends_with("ENTRIES")).context("no ENTRIES")?;
        pins::Map::open(path)
    }

    fn ifindex(&self, name: &str) -> Result<u32> {
        let text = self.host().ip_output(&format!("-o link show dev {name}"))?;
        Ok(text.split(':').next().context("an index")?.trim().parse()?)
    }

    fn links(&self) -> Result<String> {
        self.host().ip_output("-o -br link")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop(self.inside.kill());
        drop(self.inside.wait());
    }
}

/// Of a `verify --json` that must end so.
fn checks(output: &Output, status: i32) -> Result<Vec<Value>> {
    ensure!(output.status == status, "exit status {status} expected: {output:?}");
    let report: Value = serde_json::from_str(&output.stdout).context("JSON")?;
    ensure!(report["verified"] == (status == 0), "{report}");
    Ok(report["checks"].as_array().context("no checks")?.clone())
}

/// `struct entry_key`: the gateway as an IPv6 address, the interface, the port.
fn key(gateway: Ipv4Addr, ifindex: u32, port: u16) -> Vec<u8> {
    let gateway = gateway.to_ipv6_mapped().octets();
    [&gateway[..], &ifindex.to_ne_bytes(), &port.to_ne_bytes(), &6_u16.to_ne_bytes()].concat()
}

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 1);

/// `lbridge verify --json bridge:lab0 8080`, which must fail, while there is an entry that no rule asks for.
/// The daemon would correct it whenever it looks, so it stands still, and the command is told what it
/// answered before.
fn verify_with(stage: &Stage, map: &pins::Map, key: &[u8], value: &[u8]) -> Result<Vec<Value>> {
    let folder = tempfile::tempdir_in("/run")?;
    let socket = folder.path().join("lbridge.sock");
    let answer = stage.daemon.raw_answer("/v1/status")?;
    let answering = answer_once(&socket, answer, stage.daemon.socket())?;
    let output = stage.daemon.paused(|| {
        map.put(key, value)?;
        let mut command = stage.daemon.command()?;
        command.env("LBRIDGE_SOCKET", &socket).args(["verify", "--json", "bridge:lab0", "8080"]);
        Ok(Output::from(command.output()?))
    })?;
    let checks = checks(&output, 1)?;
    answering.join().map_err(|_| anyhow::anyhow!("a panic"))??;
    Ok(checks)
}

/// Answers one request, whatever it is; whoever dials then, to see whose process it is, reaches `daemon`.
fn answer_once(socket: &Path, answer: Vec<u8>, daemon: PathBuf) -> Result<JoinHandle<Result<()>>> {
    let listener = UnixListener::bind(socket)?;
    let socket = socket.to_owned();
    Ok(thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        while !lines.next().context("half a request")??.is_empty() {}
        fs::remove_file(&socket)?;
        symlink(daemon, &socket)?;
        Ok(stream.write_all(&answer)?)
    }))
}

fn text<'a>(check: &'a Value, field: &str) -> &'a str {
    check[field].as_str().unwrap_or_default()
}

/// Those that failed, each as `FROM -> TO: WHY`.
fn failures(checks: &[Value]) -> Vec<String> {
    let failed = checks.iter().filter(|check| check["verdict"] == "failed");
    failed.map(|c| format!("{} -> {}: {}", text(c, "from"), text(c, "to"), text(c, "why"))).collect()
}

fn must_contain(failures: &[String], beginning: &str, why: &str) -> Result<()> {
    let found = failures.iter().any(|failure| failure.starts_with(beginning) && failure.contains(why));
    ensure!(found, "no failure {beginning} ... {why}: {failures:#?}");
    Ok(())
}

fn all_is_well() -> Result<()> {
    let stage = Stage::new()?;
    let neighbours = |stage: &Stage| -> Result<Vec<String>> {
        let text = stage.host().ip_output("neigh show nud reachable nud stale nud delay nud probe")?;
        Ok(text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
    };
    client::served_by(&stage.container, "10.7.0.1:8080".parse()?, "plain")?;
    let links = stage.links()?;
    let checks = stage.verify(&[], 0)?;
    ensure!(stage.links()?.lines().count() == links.lines().count(), "{links} became {}", stage.links()?);
    let routes = stage.host().ip_output("route show table all")?;
    ensure!(!["192.0.2.", "2001:db8", "lbr"].iter().any(|trace| routes.contains(trace)), "{routes}");
    ensure!(
        neighbours(&stage)?
            .iter()
            .all(|ip| ip.ends_with(".2") || ip.ends_with("::2") || ip.starts_with("fe80"))
    );

    for check in &checks {
        let fields: Vec<_> = check.as_object().context("an object")?.keys().map(String::as_str).collect();
        ensure!(
            fields == ["expected", "found", "from", "network", "port", "protocol", "to", "verdict", "why"],
            "{check}"
        );
    }
    let has = |network: &str, from: &str, to: &str, expected: &str| -> Result<()> {
        let is_it =
            |c: &&Value| text(c, "network") == network && text(c, "from") == from && text(c, "to") == to;
        let check = checks.iter().find(is_it).with_context(|| format!("{from} -> {to}: {checks:#?}"))?;
        ensure!(check["expected"] == expected && check["verdict"] == "ok", "{check}");
        Ok(())
    };
    for to in ["10.7.0.1:8080", "[fd07::1]:8080", "10.7.0.1:80", "[fd07::1]:6000", "10.7.0.1:6000"] {
        has("bridge:lab0", "bridge:lab0", to, "open")?;
        has("bridge:lab0", "the LAN", to, "closed")?;
    }
    has("bridge:lab0", "bridge:lab0", "10.7.0.1:7000", "refused")?;
    has("bridge:lab0", "bridge:lab0", "10.7.0.1:3000", "closed")?;
    has("bridge:lab0", "bridge:lab0", "203.0.113.1:8080", "closed")?;
    has("bridge:lab0", "bridge:lab1", "10.7.0.1:8080", "closed")?;
    has("bridge:lab0", "bridge:lab1", "10.8.0.1:80", "closed")?;
    has("bridge:lab0", "the LAN", "127.0.0.1:3000", "closed")?;
    has("bridge:lab0", "bridge:lab0, as 192.0.2.1", "10.7.0.1:8080", "closed")?;
    has("bridge:lab0", "bridge:lab1, as 10.7.0.254", "10.7.0.1:8080", "closed")?;
    has("bridge:lab1", "bridge:lab1", "10.8.0.1:9090", "open")?;
    let inside = format!("pid:{}", stage.inside.id());
    has(&inside, &inside, "127.0.0.1:8080", "open")?;
    has(&inside, &inside, "[::1]:8080", "open")?;
    // Whoever dials was somebody else than those who may.
    ensure!(stage.services.iter().all(|service| service.accepted() > 0));

    let output = stage.daemon.cli(&["verify"])?;
    ensure!(output.status == 0 && output.stdout.starts_with("RULE "), "{output:?}");
    ensure!(output.stdout.lines().last().is_some_and(|line| line.starts_with("Verified: ")), "{output:?}");
    Ok(())
}

fn one_rule_is_verified_alone() -> Result<()> {
    let stage = Stage::new()?;
    // Another rule's hole is not this one's.
    let _hole = Service::start(stage.host(), "open", "0.0.0.0:7000")?;
    let checks = stage.verify(&["bridge:lab0", "8080"], 0)?;
    ensure!(checks.iter().all(|check| check["network"] == "bridge:lab0" && check["port"] == PLAIN));
    stage.verify(&["bridge:lab0", "7000"], 1).map(drop)
}

fn a_service_on_all_addresses_is_found() -> Result<()> {
    let mut stage = Stage::new()?;
    // The remapped one, so that it is behind a rule all the same.
    stage.services.swap_remove(1).stop();
    let _open = Service::start(stage.host(), "open", "0.0.0.0:3000")?;
    // To those who dial IPv6.
    stage.daemon.wait_for_state("bridge:lab0", REMAPPED, "relayed")?;
    let failures = failures(&stage.verify(&["bridge:lab0", "80"], 1)?);
    let why = "listens on all addresses";
    must_contain(&failures, "the LAN -> 203.0.113.1:3000", why)?;
    must_contain(&failures, "the LAN -> 10.7.0.1:3000", why)?;
    must_contain(&failures, "bridge:lab1 -> 10.8.0.1:3000", why)?;
    must_contain(&failures, "bridge:lab0 -> 10.7.0.1:3000", why)?;
    must_contain(&failures, "the LAN", &format!("process {}", std::process::id()))?;
    ensure!(
        failures.iter().all(|failure| failure.contains(":3000: ")),
        "the rule itself is sound: {failures:#?}"
    );
    Ok(())
}

fn a_service_on_another_address_is_found() -> Result<()> {
    let stage = Stage::new()?;
    let _open = Service::start(stage.host(), "open", "203.0.113.1:8080")?;
    let failures = failures(&stage.verify(&["bridge:lab0", "8080"], 1)?);
    must_contain(&failures, "the LAN -> 203.0.113.1:8080", "listens there")?;
    must_contain(&failures, "bridge:lab0 -> 203.0.113.1:8080", "listens there")
}

fn an_entry_for_another_bridge_is_found() -> Result<()> {
    let stage = Stage::new()?;
    let map = stage.entries()?;
    let mut value = map.get(&key(GATEWAY, stage.ifindex("lab0")?, PLAIN))?;
    // Any source, and the gateway of the first for those on the second.
    let alien = key(GATEWAY, stage.ifindex("lab1")?, PLAIN);
    value[..24].copy_from_slice(&alien);
    value[24..56].fill(0);
    let checks = verify_with(&stage, &map, &alien, &value)?;
    let failures = failures(&checks);
    must_contain(&failures, "bridge:lab1 -> 10.7.0.1:8080", "given to")?;
    must_contain(&failures, "bridge:lab1, as 10.7.0.254 -> 10.7.0.1:8080", "no rule says so")?;
    ensure!(failures.len() == 2, "{failures:#?}");
    stage.verify(&["bridge:lab0", "8080"], 0).context("the daemon corrects it").map(drop)
}

/// No packet can be made to come in by an uplink: an entry for one is read, not dialled.
fn an_entry_for_an_uplink_is_found() -> Result<()> {
    let stage = Stage::new()?;
    let map = stage.entries()?;
    let mut value = map.get(&key(GATEWAY, stage.ifindex("lab0")?, PLAIN))?;
    // The second veth is the link to elsewhere.
    let alien = key(GATEWAY, stage.ifindex("veth1")?, PLAIN);
    value[..24].copy_from_slice(&alien);
    let checks = verify_with(&stage, &map, &alien, &value)?;
    let failures = failures(&checks);
    must_contain(&failures, "veth1, as 10.7.0.254 -> 10.7.0.1:8080", "no rule says so")?;
    ensure!(failures.len() == 1, "{failures:#?}");
    Ok(())
}

/// Virtual machines', say.
fn an_entry_for_a_bridge_without_rules_is_found() -> Result<()> {
    let stage = Stage::new()?;
    stage.lab.add_bridge("virbr0", "10.9.0.1/24")?;
    stage.verify(&["bridge:lab0", "8080"], 0)?;
    let map = stage.entries()?;
    let mut value = map.get(&key(GATEWAY, stage.ifindex("lab0")?, PLAIN))?;
    let alien = key(GATEWAY, stage.ifindex("virbr0")?, PLAIN);
    value[..24].copy_from_slice(&alien);
    value[24..56].fill(0);
    let checks = verify_with(&stage, &map, &alien, &value)?;
    let failures = failures(&checks);
    must_contain(&failures, "virbr0, as 10.7.0.254 -> 10.7.0.1:8080", "no rule says so")?;
    ensure!(failures.len() == 1, "{failures:#?}");
    Ok(())
}

fn an_entry_for_any_source_is_found() -> Result<()> {
    let stage = Stage::new()?;
    let map = stage.entries()?;
    let own = key(GATEWAY, stage.ifindex("lab0")?, PLAIN);
    let mut value = map.get(&own)?;
    value[24..56].fill(0);
    let checks = verify_with(&stage, &map, &own, &value)?;
    let failures = failures(&checks);
    must_contain(&failures, "bridge:lab0, as 192.0.2.1 -> 10.7.0.1:8080", "given to")?;
    ensure!(failures.len() == 1, "{failures:#?}");
    Ok(())
}

fn an_entry_that_leads_elsewhere_is_found() -> Result<()> {
    let stage = Stage::new()?;
    let map = stage.entries()?;
    let own = key(GATEWAY, stage.ifindex("lab0")?, PLAIN);
    let mut value = map.get(&own)?;
    value[72..74].copy_from_slice(&3000_u16.to_ne_bytes());
    let checks = verify_with(&stage, &map, &own, &value)?;
    let failures = failures(&checks);
    must_contain(
        &failures,
        "bridge:lab0 -> 10.7.0.1:8080",
        "on 127.0.0.1:3000, not to the service on 127.0.0.1:8080",
    )
}

fn a_stranger_in_the_relays_place_is_found() -> Result<()> {
    let stage = Stage::new()?;
    stage.daemon.wait_for_state("bridge:lab1", RELAYED, "relayed")?;
    stage.verify(&["bridge:lab1", "9090"], 0)?;
    stage.daemon.deny(&["bridge:lab1", "9090"])?;
    let _stranger = Service::start(stage.host(), "stranger", "10.8.0.1:9090")?;
    let output = stage.daemon.cli(&["allow", "bridge:lab1", "9090=8080", "--path", "relay"])?;
    // The network's own containers get the relay, whoever has the port; others get the stranger.
    ensure!(output.stdout.contains("relayed"), "{output:?}");
    let checks = stage.verify(&["bridge:lab1", "9090"], 1)?;
    ensure!(checks.iter().all(|check| check["verdict"] != "unverified"), "{checks:#?}");
    must_contain(&failures(&checks), "the LAN -> 10.8.0.1:9090", "listens there")
}

fn a_firewall_before_the_gateway_is_found() -> Result<()> {
    let stage = Stage::with(Options { config: "firewall = \"off\"\n".to_owned(), ..Options::default() })?;
    let add = |port: u16, verdict: &str| {
        let rule = format!("-A INPUT -i lab0 -p tcp --dport {port} -j {verdict}");
        let status = stage.host().command("iptables").args(rule.split(' ')).status()?;
        ensure!(status.success(), "iptables");
        Ok(())
    };
    add(PLAIN, "DROP")?;
    add(WAITING, "DROP")?;
    add(REMAPPED, "REJECT")?;
    // Known to the daemon, which leaves it alone; a service that rejects by ICMP is as good as one that
    // drops.
    for port in ["8080", "7000", "80"] {
        let checks = stage.verify(&["bridge:lab0", port], 1)?;
        let blocked = checks.iter().any(|check| {
            check["to"] == format!("10.7.0.1:{port}")
                && check["verdict"] == "unverified"
                && check["why"].as_str().is_some_and(|why| why.contains("firewall iptables drops it"))
        });
        ensure!(blocked, "{port}: {checks:#?}");
    }
    Ok(())
}

fn a_firewall_before_the_service_proves_nothing() -> Result<()> {
    let stage = Stage::new()?;
    let _open = Service::start(stage.host(), "open", "203.0.113.1:8080")?;
    let rule = ["-A", "INPUT", "!", "-i", "lab0", "-p", "tcp", "--dport", "8080", "-j", "DROP"];
    ensure!(stage.host().command("iptables").args(rule).status()?.success(), "iptables");
    let checks = stage.verify(&["bridge:lab0", "8080"], 1)?;
    let lan = checks.iter().find(|c| text(c, "from") == "the LAN" && text(c, "to") == "203.0.113.1:8080");
    let lan = lan.context("no check")?;
    ensure!(lan["found"] == "timed-out" && lan["verdict"] == "unverified", "{lan}");
    ensure!(text(lan, "why").contains("only a firewall"), "{lan}");
    Ok(())
}

fn what_cannot_be_tried_is_not_verified() -> Result<()> {
    let stage = Stage::new()?;
    let unverified = |checks: Vec<Value>| -> Vec<String> {
        let them = checks.into_iter().filter(|check| check["verdict"] == "unverified");
        them.map(|check| text(&check, "why").to_owned()).collect()
    };
    stage.lab.add_bridge("small", "10.9.0.1/31")?;
    stage.daemon.allow(&["bridge:small", "8080"])?;
    let whys = unverified(stage.verify(&["bridge:small", "8080"], 1)?);
    ensure!(!whys.is_empty() && whys.iter().all(|why| why.contains("no free address")), "{whys:?}");
    stage.daemon.deny(&["bridge:small", "8080"])?;

    stage.daemon.allow(&["bridge:none", "8080"])?;
    let whys = unverified(stage.verify(&["bridge:none", "8080"], 1)?);
    ensure!(whys == ["there is no interface none"], "{whys:?}");
    stage.daemon.deny(&["bridge:none", "8080"])?;

    stage.daemon.allow(&["bridge:lab0", "81=[::1]:6000", "--path", "steer"])?;
    let whys = unverified(stage.verify(&["bridge:lab0", "81"], 1)?);
    ensure!(whys.len() == 1 && whys[0].starts_with("blocked: "), "{whys:?}");
    let output = stage.daemon.cli(&["verify", "bridge:lab0", "81"])?;
    ensure!(output.stdout.contains("NOT verified: 1 of"), "{output:?}");
    Ok(())
}

/// Where no frames pass nobody answers, whatever is open.
fn silence_proves_nothing() -> Result<()> {
    let stage = Stage::new()?;
    let deaf = "table arp deaf { chain in { type filter hook input priority 0; iifname lab1 drop; }; }";
    ensure!(stage.host().command("nft").arg(deaf).status()?.success(), "nft");
    let checks = stage.verify(&["bridge:lab0", "8080"], 1)?;
    let from_there: Vec<_> = checks.iter().filter(|check| text(check, "from") == "bridge:lab1").collect();
    let untried = |check: &&Value| check["verdict"] == "unverified" && check["found"] == "not-tried";
    ensure!(!from_there.is_empty() && from_there.iter().all(untried), "{from_there:#?}");
    let why = "10.8.0.1 does not answer neighbour requests on its own link";
    ensure!(from_there.iter().all(|check| text(check, "why") == why), "{from_there:#?}");
    Ok(())
}

/// The host does not know it yet; it is asked for.
fn a_neighbour_with_the_highest_address_is_left_alone() -> Result<()> {
    let stage = Stage::new()?;
    let container = stage.lab.container(&stage.bridges[0], "10.7.0.254/24")?;
    let checks = stage.verify(&["bridge:lab0", "8080"], 0)?;
    let borrowed = |ip: &str| checks.iter().any(|check| text(check, "from").ends_with(&format!("as {ip}")));
    ensure!(borrowed("10.7.0.253") && !borrowed("10.7.0.254"), "{checks:#?}");
    client::served_by(&container, "10.7.0.1:8080".parse()?, "plain").map(drop)
}

fn interrupted_it_leaves_nothing() -> Result<()> {
    let stage = Stage::new()?;
    let before = stage.links()?.lines().count();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let mut command = stage.daemon.command()?;
        command.arg("verify").stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn()?;
        // Localhost over the wire is never answered, so it is at it for a second.
        patience::until("it is at it", || Ok((stage.links()?.matches("lbr").count() == 3).then_some(())))?;
        kill(Pid::from_raw(child.id().cast_signed()), signal)?;
        let output = Output::from(child.wait_with_output()?);
        ensure!(output.stdout.is_empty(), "{output:?}");
        if signal != Signal::SIGKILL {
            ensure!(output.status == 1 && output.stderr.starts_with("lbridge: interrupted"), "{output:?}");
            ensure!(stage.links()?.lines().count() == before, "{signal}: {}", stage.links()?);
        }
        patience::until(&format!("all is gone after {signal}"), || {
            Ok((stage.links()?.lines().count() == before).then_some(()))
        })?;
        let routes = stage.host().ip_output("route show table all")?;
        ensure!(!routes.contains("192.0.2.") && !routes.contains("lbr"), "{routes}");
    }
    stage.verify(&[], 0).map(drop)
}

fn refusals() -> Result<()> {
    let lab = Lab::new()?;
    lab.add_bridge("lab0", "10.7.0.1/24")?;
    let mut daemon = Daemon::start(lab.host())?;
    let one_line = |output: &Output, status: i32, words: &str| {
        let said = output.stdout.is_empty() && output.stderr.lines().count() == 1;
        ensure!(
            output.status == status && said && output.stderr.contains(words),
            "{status} {words}: {output:?}"
        );
        Ok(())
    };
    let output = daemon.cli(&["verify"])?;
    ensure!(output.status == 0 && output.stdout.starts_with("No rules."), "{output:?}");
    one_line(&daemon.cli(&["verify", "bridge:lab0", "80"])?, 4, "no rule for bridge:lab0 80")?;
    one_line(&daemon.cli(&["verify", "bridge:lab0"])?, 2, "<PORT>")?;
    // The folder of the build may be closed to others.
    let public = tempfile::tempdir_in("/run")?;
    let program = public.path().join("lbridge");
    fs::copy(binary()?, &program)?;
    fs::set_permissions(public.path(), fs::Permissions::from_mode(0o755))?;
    let mut command = lab.host().command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program).arg("verify");
    one_line(&command.current_dir("/").output()?.into(), 1, "sudo")?;
    // Rules mean nothing in another namespace.
    let elsewhere = NetNs::new()?;
    let mut command = elsewhere.command(binary()?);
    let output = command.arg("verify").env("LBRIDGE_SOCKET", daemon.socket()).output()?.into();
    one_line(&output, 1, "nsenter --net=/proc/")?;
    daemon.terminate()?;
    one_line(&daemon.cli(&["verify"])?, 3, "no lbridge daemon")
}

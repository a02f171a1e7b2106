//! One decision: what the kernel program does with a SYN, what `verdict::decide` says, and what `lbridge
//! explain` foretells, over maps and packets that nobody has thought of.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use lbridge::planning::actual::Actual;
use lbridge::planning::desired::{
    BindScope, Clients, Desired, RelayKey, RelaySpec, Service as RelayedTo, Subnet,
};
use lbridge::planning::explain::{Fate, Known, Question, explain};
use lbridge::planning::firewall::{Opening, ProbeResult};
use lbridge::planning::hooks::PerHookSet;
use lbridge::planning::inventory::{Interface, Inventory, KernelFeatures, Listener, ListenerKind, Steering};
use lbridge::planning::rule::{Protocol, RuleId, Source};
use lbridge_common::verdict::{Lookups, Verdict, decide};
use lbridge_common::wire::{
    self, AcceptedKey, Address, Endpoint, EntryKey, ListenerKey, NameOverride, OverrideKey, SourceKey, TCP,
};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::pins::Map;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;
use nix::net::if_::if_nametoindex;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

pub(crate) fn tests() -> Vec<Test> {
    tests![kernel_and_explanation_decide_alike: [Need::TellsInterfaces]]
}

/// Number of maps and packets that are tried.
const CASES: u32 = 400;

/// The port that is dialled.
const PORT: u16 = 80;
const GATEWAY: &str = "10.7.0.1";
/// The service that entries lead to, registered.
const SERVICE: &str = "127.0.0.1:8080";
/// Where nobody listens.
const NOBODY: &str = "127.0.0.1:8081";
/// The relay's socket.
const RELAY: &str = "127.64.0.1:61000";

/// From where a SYN comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Lab0,
    Lab1,
    Host,
}

/// The content of the maps, and a SYN.
#[derive(Clone, Debug)]
struct Case {
    entry: Option<Entry>,
    listed: bool,
    /// Length of the accept rule's prefix around the source.
    accepted: Option<u8>,
    view: Option<u8>,
    relay: bool,
    from: From,
    source: &'static str,
}

#[derive(Clone, Debug)]
struct Entry {
    bridge: From,
    subnet: (&'static str, u8),
    target: &'static str,
    flags: u16,
}

fn cases() -> impl Strategy<Value = Case> {
    let packet = prop_oneof![
        4 => Just((From::Lab0, "10.7.0.2")),
        1 => Just((From::Lab0, "10.7.0.7")),
        1 => Just((From::Lab0, "198.51.100.7")),
        1 => Just((From::Lab1, "10.8.0.2")),
        1 => Just((From::Lab1, "10.7.0.9")),
        1 => Just((From::Host, GATEWAY)),
    ];
    // 10.7.0.7 is the broadcast address of the second.
    let subnet = prop_oneof![
        3 => Just(("10.7.0.0", 24)),
        3 => Just(("10.7.0.0", 29)),
        1 => Just(("10.8.0.0", 24)),
        1 => Just(("0.0.0.0", 0)),
    ];
    let flag =
        |flag: u16, weight| prop::bool::weighted(weight).prop_map(move |set| if set { flag } else { 0 });
    let flags = (flag(wire::Entry::LISTED, 0.5), flag(wire::Entry::RELAYED, 0.3))
        .prop_map(|(listed, relayed)| listed | relayed);
    let bridge = prop_oneof![3 => Just(From::Lab0), 1 => Just(From::Lab1)];
    let target = prop_oneof![3 => Just(SERVICE), 1 => Just(NOBODY)];
    let entry = (bridge, subnet, target, flags).prop_map(|(bridge, subnet, target, flags)| Entry {
        bridge,
        subnet,
        target,
        flags,
    });
    let entry = prop::option::weighted(0.85, entry);
    let prefix = |weight| prop::option::weighted(weight, select(vec![0_u8, 24, 32]));
    (entry, any::<bool>(), prefix(0.4), prefix(0.2), any::<bool>(), packet).prop_map(
        |(entry, listed, accepted, view, relay, (from, source))| Case {
            entry,
            listed,
            accepted,
            view,
            relay,
            from,
            source,
        },
    )
}

fn ip(text: &str) -> Result<IpAddr> {
    text.parse().with_context(|| format!("address {text}"))
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::new(address.ip().into(), address.port())
}

/// The bytes of a key or a value, as the kernel has them.
fn bytes<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: the types of `wire` are integers without padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// A host with everything that a decision can lead to.
struct Stage {
    scene: Scene,
    elsewhere: NetNs,
    indices: [u32; 2],
    rules: Map,
    sources: Map,
    accepted: Map,
    views: Map,
    relays: Map,
    relay: std::net::TcpListener,
    _services: [Service; 2],
}

impl Stage {
    fn new() -> Result<Stage> {
        let mut scene = Scene::new()?;
        let host = scene.lab.host().clone();
        let lab1 = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
        let elsewhere = scene.lab.container(&lab1, "10.8.0.2/24 10.7.0.9/32")?;
        elsewhere.ip("route add 10.7.0.1 via 10.8.0.1")?;
        host.ip("route add 10.7.0.9 via 10.8.0.2")?;
        scene.container.ip("addr add 10.7.0.7/32 dev lo")?;
        scene.container.ip("addr add 198.51.100.7/32 dev lo")?;
        host.ip("route add 198.51.100.7 via 10.7.0.2")?;
        let services = [scene.service("service", SERVICE)?, scene.service("everybody's", "0.0.0.0:80")?];
        // Registers the service.
        scene.allow(&["9999=8080"])?;
        scene.served(9999, "service")?;
        let relay = host.run(|| Ok(std::net::TcpListener::bind(RELAY)?))?;
        relay.set_nonblocking(true)?;
        let bpffs = scene.daemon.bpffs().to_owned();
        let find = |name| Map::named(&bpffs, name);
        let (rules, sources, accepted) = (find("ENTRIES")?, find("SOURCES")?, find("ACCEPTED")?);
        let (views, relays) = (find("NAME_OVERRIDES")?, find("RELAYS")?);
        let indices = host.run(|| Ok([if_nametoindex("lab0")?, if_nametoindex("lab1")?]))?;
        // Nobody corrects what follows.
        scene.daemon.kill9()?;
        Ok(Stage {
            scene,
            elsewhere,
            indices,
            rules,
            sources,
            accepted,
            views,
            relays,
            relay,
            _services: services,
        })
    }

    fn index(&self, from: From) -> u32 {
        // The kernel names the bridge that has the address for what the host itself sends there.
        self.indices[usize::from(from == From::Lab1)]
    }

    fn key(&self, from: From) -> Result<EntryKey> {
        let (gateway, ifindex) = (ip(GATEWAY)?.into(), self.index(from));
        Ok(EntryKey { gateway, ifindex, port: PORT, protocol: TCP.into() })
    }

    fn maps(&self, case: &Case) -> Result<Maps> {
        let source = Address::from(ip(case.source)?);
        let dialled = Endpoint::new(ip(GATEWAY)?.into(), PORT);
        let mut maps = Maps { actual: Actual::default(), entry: None, source, dialled };
        if let Some(entry) = &case.entry {
            let key = self.key(entry.bridge)?;
            let (base, prefix) = entry.subnet;
            let base = Address::from(ip(base)?);
            let target = endpoint(entry.target.parse()?);
            let value = wire::Entry {
                key,
                subnet: base,
                mask: base.mask(prefix),
                target: target.address,
                target_port: target.port,
                flags: entry.flags,
                reserved: [0; 2],
            };
            maps.actual.kernel.entries.insert(key, value);
            if case.listed {
                maps.actual.kernel.sources.insert(SourceKey { entry: key, source });
            }
            if case.relay {
                maps.actual.relay_sockets.insert(key);
            }
        }
        if let Some(prefix) = case.accepted {
            let mask = source.mask(prefix);
            let key = AcceptedKey {
                gateway: dialled.address,
                port: PORT,
                protocol: TCP.into(),
                source: source.masked(&mask),
            };
            maps.actual.accepted.insert((key, AcceptedKey::prefix_len(&mask)));
        }
        if let Some(prefix) = case.view {
            let mask = source.mask(prefix);
            let key = OverrideKey { gateway: dialled, peer: source.masked(&mask) };
            let view = NameOverride { gateway: dialled, target: endpoint(SERVICE.parse()?) };
            maps.actual.kernel.overrides.insert((key, OverrideKey::prefix_len(&mask)), view);
        }
        // What the kernel program looks up.
        maps.entry = maps.actual.kernel.entries.get(&self.key(case.from)?).copied();
        Ok(maps)
    }

    /// Makes the kernel's maps hold these, and nothing else; or takes them away.
    fn write(&self, maps: &Maps, put: bool) -> Result<()> {
        let relay = u32::try_from(std::os::fd::AsRawFd::as_raw_fd(&self.relay))?;
        let write =
            |map: &Map, key: &[u8], value: &[u8]| if put { map.put(key, value) } else { map.remove(key) };
        let actual = &maps.actual;
        for (key, value) in &actual.kernel.entries {
            let value = wire::CountedEntry { entry: *value, steered: 0 };
            write(&self.rules, bytes(key), bytes(&value))?;
        }
        for key in &actual.kernel.sources {
            write(&self.sources, bytes(key), &[1])?;
        }
        for (key, bits) in &actual.accepted {
            write(&self.accepted, &[&bits.to_ne_bytes(), bytes(key)].concat(), &[1])?;
        }
        for ((key, bits), view) in &actual.kernel.overrides {
            write(&self.views, &[&bits.to_ne_bytes(), bytes(key)].concat(), bytes(view))?;
        }
        for key in &actual.relay_sockets {
            write(&self.relays, bytes(key), &relay.to_ne_bytes())?;
        }
        Ok(())
    }

    /// Sends a SYN, and looks who answers it.
    fn dial(&self, case: &Case) -> Result<Fate> {
        let netns = match case.from {
            From::Lab0 => &self.scene.container,
            From::Lab1 => &self.elsewhere,
            From::Host => self.scene.lab.host(),
        };
        let to = SocketAddr::new(ip(GATEWAY)?, PORT);
        let stream = client::dial(netns, Some(ip(case.source)?), to, std::time::Duration::from_secs(2));
        let by_relay = self.relay.accept().is_ok();
        drop(stream);
        if by_relay {
            return Ok(Fate::Relayed);
        }
        match client::attempt_from(netns, Some(ip(case.source)?), to) {
            Attempt::Served(greeting) if greeting.service == "service" => Ok(Fate::Steered),
            Attempt::Served(greeting) if greeting.service == "everybody's" => Ok(Fate::Passed),
            Attempt::Refused(_) => Ok(Fate::Refused),
            other => bail!("{other:?}"),
        }
    }

    /// Returns what `lbridge explain` says, for a SYN of the network that the gateway is of.
    fn explained(&self, case: &Case, maps: &Maps) -> Result<Fate> {
        let mut actual = maps.actual.clone();
        let (gateway, source) = (ip(GATEWAY)?, ip(case.source)?);
        let listener = |address: &str, inode| -> Result<Listener> {
            let (single_family, bound_interface, kind) = (true, 0, ListenerKind::Tcp);
            Ok(Listener { address: address.parse()?, inode, uid: 0, single_family, bound_interface, kind })
        };
        let interface = |name: &str, index, ip, prefix| Interface {
            index,
            name: name.to_owned(),
            is_bridge: true,
            is_port: false,
            addresses: vec![(ip, prefix)],
        };
        let inventory = Inventory {
            interfaces: vec![
                interface("lab0", self.indices[0], gateway, 24),
                interface("lab1", self.indices[1], "10.8.0.1".parse()?, 24),
            ],
            listeners: vec![listener(SERVICE, 1)?, listener("0.0.0.0:80", 2)?],
            ..Inventory::default()
        };
        let features = KernelFeatures {
            steer: Ok(Steering { interface_check: true, kernel_registers: true }),
            hooks: PerHookSet::from_fn(|_| Ok(())),
        };
        let service = endpoint(SERVICE.parse()?);
        actual.registered =
            [ListenerKey { address: service.address, port: service.port, slot: 0, protocol: TCP }].into();
        let dialled = SocketAddr::new(gateway, PORT);
        let opening = Opening::new("lab0", (gateway, 24), gateway, Protocol::Tcp, PORT);
        actual.firewall_state.probe_results = [(opening, ProbeResult::Open)].into();
        let place = BindScope::Bridge { interface: "lab0".to_owned(), ifindex: self.indices[0] };
        if case.relay {
            let spec = RelaySpec {
                rule: RuleId { network: "bridge:lab0".parse()?, port: PORT, protocol: Protocol::Tcp },
                service: RelayedTo::Tcp(SERVICE.parse()?),
                source: Source::Container,
                clients: Clients::Subnet(Subnet::of("0.0.0.0".parse()?, 0)),
                by_entry: true,
                proxy_protocol: None,
                max_connections: 1,
                idle_timeout: None,
            };
            actual.relays = [(RelayKey { address: dialled, place }, spec)].into();
        }
        let network = "bridge:lab0".parse()?;
        let question = Question { network, port: PORT, protocol: Protocol::Tcp, source: Some(source) };
        let known = Known {
            inventory: &inventory,
            features: &features,
            desired: &Desired::default(),
            actual: &actual,
            relay_failures: &BTreeMap::new(),
            entry_failures: &BTreeMap::new(),
            holders: &BTreeMap::new(),
            inside: &[],
        };
        let explanation = explain(&question, &known);
        let [way] = &explanation.ways[..] else { bail!("one way: {explanation:?}") };
        Ok(way.fate)
    }
}

/// The maps of a case, and what the decision asks of them.
struct Maps {
    actual: Actual,
    entry: Option<wire::Entry>,
    source: Address,
    dialled: Endpoint,
}

impl Lookups for Maps {
    fn is_probe(&self) -> bool {
        false
    }

    fn is_listed(&self) -> bool {
        let key = |entry: wire::Entry| SourceKey { entry: entry.key, source: self.source };
        self.entry.is_some_and(|entry| self.actual.kernel.sources.contains(&key(entry)))
    }

    fn is_accepted(&self) -> bool {
        let Endpoint { address: gateway, port, .. } = self.dialled;
        let packet = AcceptedKey { gateway, port, protocol: TCP.into(), source: self.source };
        self.actual.accepted.iter().any(|(key, bits)| key.matches(*bits, &packet))
    }

    fn looks_local(&self) -> bool {
        let mut views = self.actual.kernel.overrides.keys();
        views.any(|(key, bits)| key.matches(*bits, &self.dialled, &self.source))
    }
}

/// Returns the fate that a verdict leads to where the host has a service of its own at the dialled port.
fn decided(case: &Case, maps: &Maps) -> Fate {
    let serves = |case: &Case| case.entry.as_ref().is_some_and(|entry| entry.target == SERVICE);
    match decide(maps.entry.as_ref(), &maps.source, &maps.dialled, TCP, maps) {
        Verdict::NotOurs | Verdict::ForeignSource | Verdict::NotListed => Fate::Passed,
        Verdict::Relay if case.relay => Fate::Relayed,
        Verdict::Steer if serves(case) => Fate::Steered,
        Verdict::Denied | Verdict::LooksLocal | Verdict::Probe | Verdict::Relay | Verdict::Steer => {
            Fate::Refused
        }
    }
}

fn agrees(stage: &Stage, case: &Case) -> Result<()> {
    let maps = stage.maps(case)?;
    stage.write(&maps, true)?;
    let seen = stage.dial(case);
    stage.write(&maps, false)?;
    let (seen, decided) = (seen?, decided(case, &maps));
    ensure!(seen == decided, "the kernel: {seen:?}, the decision: {decided:?}");
    if case.from == From::Lab0 {
        let explained = stage.explained(case, &maps)?;
        ensure!(seen == explained, "the kernel: {seen:?}, the explanation: {explained:?}");
    }
    Ok(())
}

fn kernel_and_explanation_decide_alike() -> Result<()> {
    let stage = Stage::new()?;
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let mut fates: BTreeMap<String, u32> = BTreeMap::new();
    let seen = std::cell::RefCell::new(&mut fates);
    let outcome = TestRunner::new(config).run(&cases(), |case| {
        let fate = stage.maps(&case).map(|maps| decided(&case, &maps));
        *seen.borrow_mut().entry(format!("{:?}", fate.ok())).or_default() += 1;
        agrees(&stage, &case).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    if let Err(error) = outcome {
        bail!("{error}");
    }
    ensure!(fates.len() == 4 && fates.values().all(|count| *count > 5), "every fate was met: {fates:?}");
    Ok(())
}

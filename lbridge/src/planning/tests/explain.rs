use std::collections::{BTreeMap, BTreeSet};

use lbridge_common::wire::Entry;

use super::{Host, br_app, in_force};
use crate::planning::{
    actual::Actual,
    desired::RelayKey,
    explain::{
        Answer::{No, Note, Yes},
        Explanation, Fate, Known, Question, Stage, explain, listeners_of_interest,
    },
    firewall::{FirewallState, ProbeResult},
    hooks::HookSet,
    inventory::{EngineAvailability, Listener, ListenerKind, NetnsUnavailable, Steering},
    rule::{DatapathChoice, Protocol, Source},
};

impl Host {
    /// Returns the actual state once everything in the desired state is in force.
    fn in_force(&self) -> Actual {
        let desired = self.desired();
        let probe_results =
            desired.openings.keys().map(|opening| (opening.clone(), ProbeResult::Open)).collect();
        in_force(&desired, FirewallState { probe_results, ..FirewallState::default() })
    }

    fn explain(&self, network: &str, port: u16) -> Explanation {
        self.explain_with(network, port, None, &self.in_force(), &[])
    }

    fn explain_with(
        &self,
        network: &str,
        port: u16,
        source: Option<&str>,
        actual: &Actual,
        inside: &[Listener],
    ) -> Explanation {
        let source = source.map(|source| source.parse().unwrap());
        let question =
            Question { network: network.parse().unwrap(), port, protocol: Protocol::default(), source };
        let known = Known {
            inventory: &self.inventory,
            features: &self.features,
            desired: &self.desired(),
            actual,
            relay_failures: &BTreeMap::new(),
            entry_failures: &BTreeMap::new(),
            holders: &BTreeMap::new(),
            inside,
        };
        let interest = listeners_of_interest(&question, &known);
        let holders = interest.into_iter().map(|inode| (inode, format!("process {inode}"))).collect();
        explain(&question, &Known { holders: &holders, ..known })
    }
}

fn fates(explanation: &Explanation) -> Vec<String> {
    let fate = |fate: Fate| format!("{fate:?}").to_lowercase();
    explanation.ways.iter().map(|way| format!("{} {}", way.dialled, fate(way.fate))).collect()
}

fn text(explanation: &Explanation, stage: Stage) -> &str {
    let all = explanation.steps.iter().chain(explanation.ways.iter().flat_map(|way| &way.steps));
    all.filter(|step| step.stage == stage).map(|step| step.text.as_str()).next().unwrap_or_default()
}

#[test]
fn a_steered_connection_step_by_step() {
    let host = Host::new().listens("127.0.0.1:5432").allow("app", "5432");
    let told = host.explain("app", 5432);
    assert_eq!(fates(&told), ["172.18.0.1:5432 steered"]);
    let stages = |told: &Explanation| -> Vec<_> {
        told.ways[0].steps.iter().map(|step| (step.stage, step.verdict)).collect()
    };
    assert_eq!(
        stages(&told),
        [
            (Stage::Arrival, Note),
            (Stage::Firewall, Yes),
            (Stage::Lookup, Yes),
            (Stage::Source, Yes),
            (Stage::Listener, Yes),
            (Stage::Peer, Note)
        ]
    );
    assert_eq!(text(&told, Stage::Rule), "app 5432 -> 127.0.0.1:5432, made by lbridge allow");
    assert!(
        text(&told, Stage::Network).ends_with("its bridge br-app (interface 7), the gateway 172.18.0.1/16")
    );
    assert_eq!(text(&told, Stage::Source), "172.18.0.2 is in 172.18.0.0/16");
    assert_eq!(
        told.ways[0].steps[4].details,
        [
            "127.0.0.1:5432: process 1000, registered",
            "0.0.0.0:5432: nothing listens",
            "[::]:5432: nothing listens"
        ]
    );
    assert_eq!(told.remedy, "`lbridge deny app 5432` takes it back");
    let other = host.explain("app", 5433);
    assert_eq!(
        stages(&other),
        [(Stage::Arrival, Note), (Stage::Firewall, Note), (Stage::Lookup, No), (Stage::Host, No)]
    );
}

#[test]
fn what_is_registered_counts_not_what_listens() {
    let host = Host::new().listens("127.0.0.1:80").listens("0.0.0.0:80").allow("app", "80");
    let mut actual = host.in_force();
    assert!(text(&host.explain("app", 80), Stage::Listener).starts_with("127.0.0.1:80"));
    actual.registered.retain(|key| key.address == lbridge_common::wire::Address::ANY_V4);
    let told = host.explain_with("app", 80, None, &actual, &[]);
    assert!(text(&told, Stage::Listener).starts_with("0.0.0.0:80"));
    actual.registered = BTreeSet::new();
    let told = host.explain_with("app", 80, None, &actual, &[]);
    assert_eq!(
        fates(&told),
        ["172.18.0.1:80 refused"],
        "an entry keeps the packet from the wildcard listener"
    );
    assert_eq!(
        told.outcome,
        "connections from app to 172.18.0.1:80 are refused: no listener for 127.0.0.1:80 is registered"
    );
}

#[test]
fn a_v6_only_wildcard_takes_no_ipv4() {
    let mut host = Host::new().listens("[::]:80").allow("app", "80");
    let dual = host.in_force();
    assert_eq!(fates(&host.explain_with("app", 80, None, &dual, &[])), ["172.18.0.1:80 steered"]);
    host.inventory.listeners[0].single_family = true;
    let told = host.explain_with("app", 80, None, &dual, &[]);
    assert_eq!(fates(&told), ["172.18.0.1:80 refused"]);
    assert_eq!(told.ways[0].steps[4].details[2], "[::]:80: process 1000 (IPv6 only), registered");
}

#[test]
fn each_family_goes_its_own_way() {
    let host = Host::new()
        .network("dual", "br-dual")
        .bridge("br-dual", 9, &["172.20.0.1/16", "fd00::1/64"])
        .listens("[::1]:80")
        .allow("dual", "80");
    let told = host.explain("dual", 80);
    assert_eq!(fates(&told), ["172.20.0.1:80 relayed", "[fd00::1]:80 steered"]);
    assert_eq!(told.remedy, "`lbridge deny dual 80` takes it back", "said once");
    let one = host.explain_with("dual", 80, Some("fd00::77"), &host.in_force(), &[]);
    assert_eq!(fates(&one), ["[fd00::1]:80 steered"]);
    let none = Host::new().explain_with("app", 80, Some("fd00::77"), &Actual::default(), &[]);
    assert!(none.ways.is_empty() && none.outcome.contains("no gateway of the source's family"));
}

#[test]
fn sources_that_are_left_alone() {
    let host = Host::new().listens("127.0.0.1:80").allow("app", "80");
    for source in ["172.19.0.2", "172.18.0.1"] {
        let told = host.explain_with("app", 80, Some(source), &host.in_force(), &[]);
        assert_eq!(fates(&told), ["172.18.0.1:80 refused"], "{source}");
        assert_eq!(told.remedy, "only the network's own containers are served");
    }
    let relayed = Host::new().listens("127.0.0.1:80");
    let relayed = relayed.allow_with("app", "80", Source::Container, DatapathChoice::Relay);
    let told = relayed.explain_with("app", 80, Some("172.19.0.2"), &relayed.in_force(), &[]);
    assert_eq!(fates(&told), ["172.18.0.1:80 refused"]);
    assert!(text(&told, Stage::Source).starts_with("172.19.0.2 is not in 172.18.0.0/16"));
    // Before Linux 5.17 the relay's socket is bound to the gateway, and it checks who comes.
    let mut direct = relayed;
    direct.features.steer = Ok(Steering { interface_check: false, kernel_registers: false });
    let told = direct.explain_with("app", 80, Some("172.19.0.2"), &direct.in_force(), &[]);
    assert_eq!(fates(&told), ["172.18.0.1:80 refused"]);
    assert!(text(&told, Stage::Relay).ends_with("is none of its network's containers: reset"));
}

#[test]
fn without_a_rule_the_host_answers_if_it_listens() {
    let closed = Host::new().listens("127.0.0.1:80").explain("app", 80);
    assert_eq!(fates(&closed), ["172.18.0.1:80 refused"]);
    assert_eq!(closed.remedy, "`lbridge allow app 80` opens it");
    let open = Host::new().listens("[::]:80").listens("0.0.0.0:80").explain("app", 80);
    assert_eq!(fates(&open), ["172.18.0.1:80 passed"]);
    assert_eq!(
        open.outcome,
        "connections from app to 172.18.0.1:80 reach process 1001 on 0.0.0.0:80, not by lbridge"
    );
    let gateway = Host::new().listens("0.0.0.0:80").listens("172.18.0.1:80").explain("app", 80);
    assert!(gateway.outcome.contains("process 1001 on 172.18.0.1:80"), "{}", gateway.outcome);
    let mut elsewhere = Host::new().listens("0.0.0.0:80");
    elsewhere.inventory.listeners[0].bound_interface = 3;
    assert_eq!(fates(&elsewhere.explain("app", 80)), ["172.18.0.1:80 refused"]);
    elsewhere.inventory.listeners[0].bound_interface = 7;
    assert_eq!(fates(&elsewhere.explain("app", 80)), ["172.18.0.1:80 passed"]);
}

#[test]
fn nearest_rules_are_named() {
    let host = Host::new().network("db", "br-db").bridge("br-db", 8, &["172.19.0.1/16"]);
    let host = host.allow("app", "5432").allow("db", "5432").allow("db", "80").allow("app", "8080");
    assert_eq!(
        text(&host.explain("db", 5433), Stage::Rule),
        "no rule for db 5433; nearest: db 5432, app 5432, db 80"
    );
    let remapped = Host::new().allow("app", "8000").allow("app", "81=3000");
    assert_eq!(
        text(&remapped.explain("app", 3000), Stage::Rule),
        "no rule for app 3000; nearest: app 81=3000, app 8000",
        "the one that leads there comes first"
    );
    assert_eq!(text(&Host::new().explain("app", 1), Stage::Rule), "no rule for app 1");
}

#[test]
fn another_name_of_the_bridge() {
    let host = Host::new().listens("127.0.0.1:80").allow("bridge:br-app", "80");
    let told = host.explain("app", 80);
    assert_eq!(fates(&told), ["172.18.0.1:80 steered"]);
    assert!(text(&told, Stage::Rule).ends_with("which means the same bridge"));
    assert_eq!(told.remedy, "`lbridge deny bridge:br-app 80` takes it back");
}

#[test]
fn relays_and_what_services_see() {
    let mptcp = Host::new().listens_as("127.0.0.1:80", ListenerKind::Mptcp).allow("app", "80");
    let told = mptcp.explain("app", 80);
    assert_eq!(fates(&told), ["172.18.0.1:80 relayed"]);
    assert!(told.outcome.contains("relayed to 127.0.0.1:80 (the service listens with MPTCP"));
    assert_eq!(text(&told, Stage::Peer), "the service sees 172.18.0.2 as its peer");
    let mut actual = mptcp.in_force();
    actual.kernel.hooks[HookSet::Names] = false;
    let told = mptcp.explain_with("app", 80, None, &actual, &[]);
    assert!(text(&told, Stage::Peer).starts_with("the service sees 127.146.0.2 as its peer"));
    actual.lingering = std::mem::take(&mut actual.relays).into_keys().collect();
    let told = mptcp.explain_with("app", 80, None, &actual, &[]);
    assert_eq!(fates(&told), ["172.18.0.1:80 refused"]);
    assert!(text(&told, Stage::Relay).contains("not open: the daemon's next pass opens it"));

    let local = Host::new().listens("127.0.0.1:80");
    let local = local.allow_with("app", "81=80", Source::Loopback, DatapathChoice::Auto);
    let told = local.explain("app", 81);
    assert!(
        text(&told, Stage::Peer).starts_with("the service sees 127.0.0.1 as its peer, which it may trust")
    );
}

#[test]
fn what_should_be_and_what_is_differ() {
    let host = Host::new().listens("127.0.0.1:80").allow("app", "80");
    let mut actual = host.in_force();
    let (key, value) = actual.kernel.entries.pop_first().unwrap();
    let told = host.explain_with("app", 80, None, &actual, &[]);
    assert!(text(&told, Stage::Lookup).ends_with("which the rule asks for: the daemon's next pass adds it"));
    let other = Entry { key: lbridge_common::wire::EntryKey { port: 81, ..key }, ..value };
    actual.kernel.entries.insert(key, other);
    let told = host.explain_with("app", 80, None, &actual, &[]);
    assert!(text(&told, Stage::Lookup).contains("belongs to another key"), "as the kernel program compares");
    assert_eq!(fates(&told), ["172.18.0.1:80 refused"]);

    let mut unruled = Host::new().listens("127.0.0.1:80");
    unruled.inventory.interfaces.clone_from(&host.inventory.interfaces);
    let told = unruled.explain_with("app", 80, None, &host.in_force(), &[]);
    assert_eq!(fates(&told), ["172.18.0.1:80 steered"]);
    assert!(text(&told, Stage::Lookup).contains("somebody else has added it"));

    let mut actual = host.in_force();
    actual.detached = true;
    assert_eq!(fates(&host.explain_with("app", 80, None, &actual, &[])), ["172.18.0.1:80 refused"]);
}

#[test]
fn namespaces() {
    let host = Host::new().namespace("netns:/run/x", 42, &["127.0.0.1", "::1"]).listens("127.0.0.1:80");
    let own = |address: &str| Host::new().listens(address).inventory.listeners;
    let told = host.explain_with("netns:/run/x", 80, None, &Actual::default(), &own("0.0.0.0:80"));
    assert_eq!(fates(&told), ["127.0.0.1:80 passed", "[::1]:80 refused"]);
    let told = host.allow("netns:/run/x", "80").explain("netns:/run/x", 80);
    assert_eq!(fates(&told), ["127.0.0.1:80 relayed", "[::1]:80 relayed"]);
    assert!(text(&told, Stage::Peer).contains("127.128.0.42 as its peer, which stands for"));
    let gone = Host::new()
        .no_namespace("netns:/run/x", NetnsUnavailable::NotThere("/run/x is not there".to_owned()));
    assert!(gone.explain("netns:/run/x", 80).outcome.ends_with("/run/x is not there"));
}

#[test]
fn networks_that_cannot_be_dialled_from() {
    let told = Host::new().allow("later", "80").explain("later", 80);
    assert!(told.ways.is_empty());
    assert_eq!(told.outcome, "no container of later can dial port 80: the engine has no network later");
    assert!(told.remedy.starts_with("`docker network create later`"));
    let mut away = Host::new();
    away.inventory.docker = EngineAvailability::Away;
    assert!(
        text(&away.explain("app", 80), Stage::Network).ends_with("as last seen: the engine does not answer")
    );
    let mut bare = Host::new();
    bare.inventory.interfaces[0].addresses.clear();
    assert!(bare.explain("app", 80).ways.is_empty());
}

/// A /32 has no other address: whatever the source, it is foreign.
#[test]
fn a_subnet_of_one() {
    let host = Host::new()
        .bridge("br-one", 9, &["10.0.0.1/32"])
        .listens("127.0.0.1:80")
        .allow("bridge:br-one", "80");
    assert_eq!(fates(&host.explain("bridge:br-one", 80)), ["10.0.0.1:80 refused"]);
}

#[test]
fn an_old_kernel_knows_no_interface() {
    let mut host = Host::new().listens("127.0.0.1:80").allow("app", "80");
    host.features.steer.as_mut().unwrap().interface_check = false;
    let told = host.explain("app", 80);
    assert!(text(&told, Stage::Lookup).starts_with("map ENTRIES has (any interface, 172.18.0.1, 80)"));
    host.features.steer = Err("no sk_lookup".to_owned());
    host.features.hooks[HookSet::Names] = Err("none".to_owned());
    let told = host.explain("app", 80);
    assert_eq!(text(&told, Stage::Lookup), "the kernel does not steer: no sk_lookup");
    assert_eq!(fates(&told), ["172.18.0.1:80 relayed"]);
    assert!(
        host.in_force()
            .relays
            .contains_key(&RelayKey { address: "172.18.0.1:80".parse().unwrap(), place: br_app() })
    );
}

#[test]
fn a_firewall_comes_first() {
    let host = Host::new().listens("127.0.0.1:80").allow("app", "80");
    let mut actual = host.in_force();
    let opening = host.desired().openings.into_keys().next().unwrap();
    actual.firewall_state.probe_results.insert(opening.clone(), ProbeResult::Dropped);
    let told = host.explain_with("app", 80, None, &actual, &[]);
    assert_eq!(fates(&told), ["172.18.0.1:80 dropped"]);
    assert_eq!(told.outcome, "connections from app to 172.18.0.1:80 time out: a firewall drops them");
    assert_eq!(told.remedy, actual.firewall_state.why_dropped(&opening));
    assert!(told.ways[0].steps.iter().all(|step| step.stage < Stage::Lookup), "it gets no further");

    let told = host.explain_with("app", 81, None, &host.in_force(), &[]);
    assert_eq!(text(&told, Stage::Firewall), "not tested if a firewall drops it");
}

/// A rule of the container's network leads its localhost to the gateway.
#[test]
fn localhost_inside_may_lead_to_a_gateway() {
    let host = Host::new().listens("127.0.0.1:80").allow("app", "80").with_localhost("app", 80);
    let host =
        host.container("web", &[("app", &["172.18.0.2"])]).container("far", &[("db", &["172.19.0.2"])]);
    let host = ["web", "far"].into_iter().zip(7..).fold(host, |host, (name, inode)| {
        host.namespace(&format!("container:{name}"), inode, &["127.0.0.1"])
    });
    let led = host.explain("container:web", 80);
    assert_eq!(led.ways[0].fate, Fate::Steered);
    assert_eq!(led.outcome, "connections from inside to 127.0.0.1:80 are led to 172.18.0.1:80");
    assert_eq!(led.remedy, "`lbridge explain app 80` says what becomes of them there");
    assert_eq!(host.explain("container:web", 81).ways[0].fate, Fate::Refused);
    assert_eq!(host.explain("container:far", 80).ways[0].fate, Fate::Refused);
}

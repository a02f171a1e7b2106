use lbridge_common::{
    verdict::{first_candidate, listening_addresses},
    wire::{Address, Entry, ListenerKey, SLOTS, TCP, TargetKey},
};
use proptest::prelude::*;

use super::Host;
use crate::planning::{
    actual::Actual,
    desired::{BindScope, Clients, Desired},
    firewall::{FirewallMode, ProbeResult},
    hooks::HookSet,
    inventory::{ListenerKind, Steering},
    plan::{Step, plan, revocations},
    resolve::resolve,
    rule::{DatapathChoice, Source},
};

/// The kernel and the relay set, as far as a step can tell. Panics where a step breaks the order that it
/// relies on.
fn carry_out(actual: &mut Actual, steps: &[Step]) {
    for step in steps {
        match step {
            Step::AddTarget(target) => assert!(actual.kernel.targets.insert(*target)),
            Step::RemoveTarget(target) => {
                let is_of = |key: &ListenerKey| target_of(key) == *target;
                assert!(!actual.registered.iter().any(is_of), "a forgotten listener");
                assert!(actual.kernel.targets.remove(target));
            }
            Step::AttachHooks(set) => actual.kernel.hooks[*set] = true,
            Step::DetachHooks(set) => {
                let unneeded = match set {
                    HookSet::Names => actual.kernel.overrides.is_empty(),
                    HookSet::Connect => actual.kernel.redirects.is_empty(),
                    HookSet::Replies => actual.kernel.reply_sources.is_empty(),
                };
                assert!(unneeded, "{set:?} is still needed");
                actual.kernel.hooks[*set] = false;
            }
            Step::PutOverride(endpoint, names) => {
                assert!(actual.kernel.hooks[HookSet::Names], "hooks come first");
                actual.kernel.overrides.insert(*endpoint, *names);
            }
            Step::RemoveOverride(endpoint) => assert!(actual.kernel.overrides.remove(endpoint).is_some()),
            Step::PutReplySource(key, reply) => {
                assert!(actual.kernel.hooks[HookSet::Replies], "hooks come first");
                actual.kernel.reply_sources.insert(*key, *reply);
            }
            Step::RemoveReplySource(key) => assert!(actual.kernel.reply_sources.remove(key).is_some()),
            Step::Register { key, .. } => {
                assert!(actual.kernel.targets.contains(&target_of(key)), "watched first");
                assert!(key.slot < SLOTS);
                assert!(actual.registered.insert(*key), "a slot that is taken");
            }
            Step::Unregister(key) => {
                let is_it = |candidate: ListenerKey| (candidate == *key).then_some(());
                let named =
                    |e: &Entry| first_candidate(&e.target, e.target_port, e.protocol(), is_it).is_some();
                let named = actual.kernel.entries.values().any(named);
                assert!(!named, "an entry goes before its listener");
                assert!(actual.registered.remove(key));
            }
            Step::PutEntry(key, value) => {
                if value.has(Entry::RELAYED) {
                    assert!(actual.relay_sockets.contains(key), "a relay listens before its entry");
                } else if value.target_port != 0 {
                    for address in listening_addresses(&value.target) {
                        let (port, protocol) = (value.target_port, key.protocol);
                        assert!(actual.kernel.targets.contains(&TargetKey { address, port, protocol }));
                    }
                }
                actual.kernel.entries.insert(*key, *value);
            }
            Step::RemoveEntry(key) => assert!(actual.kernel.entries.remove(key).is_some()),
            Step::AddSource(key) => {
                assert!(actual.kernel.sources.insert(*key));
            }
            Step::RemoveSource(key) => assert!(actual.kernel.sources.remove(key)),
            Step::AddAccepted(key) => assert!(actual.accepted.insert(*key)),
            Step::RemoveAccepted(key) => assert!(actual.accepted.remove(key)),
            Step::ForgetFlows(_) => panic!("no accept rule let anything in"),
            Step::PutRedirect(key, redirect) => {
                assert!(actual.kernel.hooks[HookSet::Connect], "hooks come first");
                actual.kernel.redirects.insert(*key, *redirect);
            }
            Step::RemoveRedirect(key) => assert!(actual.kernel.redirects.remove(key).is_some()),
            Step::OpenRelay(key, spec) => {
                actual.lingering.remove(key);
                actual.relay_sockets.extend(key.entry().filter(|_| spec.by_entry));
                actual.relays.insert(key.clone(), spec.clone());
            }
            Step::CloseRelay { key, handed_over } => {
                assert!(actual.relays.remove(key).is_some() || actual.lingering.remove(key));
                if *handed_over {
                    actual.lingering.insert(key.clone());
                }
                // The kernel removes a socket that closes, and refuses what an entry leads to it.
                key.entry().map(|entry| actual.relay_sockets.remove(&entry));
            }
            Step::Attach => actual.detached = false,
            // This host has no firewall; `super::firewall` has some.
            Step::Probe(openings) => {
                let open = openings.keys().map(|opening| (opening.clone(), ProbeResult::Open));
                actual.firewall_state.probe_results.extend(open);
            }
            Step::Accept { .. } | Step::RemoveAccept { .. } => panic!("nothing denies"),
        }
    }
}

fn target_of(key: &ListenerKey) -> TargetKey {
    TargetKey { address: key.address, port: key.port, protocol: key.protocol.into() }
}

fn listener() -> impl Strategy<Value = (&'static str, u16, ListenerKind, u32)> {
    let kinds = [ListenerKind::Tcp, ListenerKind::Mptcp, ListenerKind::Refused(22)];
    (
        prop::sample::select(vec!["127.0.0.1", "0.0.0.0", "[::1]", "[::]", "10.1.1.1"]),
        80..84_u16,
        prop::sample::select(kinds.to_vec()),
        prop::sample::select(vec![0, 33, 1000, 1001]),
    )
}

const NETWORKS: [&str; 9] =
    ["app", "dual", "bridge:br-app", "bridge:br-dual", "bridge", "gone", "container:c", "netns:/c", "pid:9"];

fn rule() -> impl Strategy<Value = (&'static str, u16, u16, Source, DatapathChoice, Vec<&'static str>, bool)>
{
    (
        prop::sample::select(NETWORKS.to_vec()),
        80..84_u16,
        80..84_u16,
        prop::sample::select(vec![Source::Container, Source::Loopback]),
        prop::sample::select(vec![DatapathChoice::Auto, DatapathChoice::Steer, DatapathChoice::Relay]),
        prop::sample::subsequence(vec!["c", "d"], 0..=2),
        any::<bool>(),
    )
}

prop_compose! {
    fn host()(
        listeners in prop::collection::vec(listener(), 0..8),
        rules in prop::collection::btree_map((0..5_u8, 80..84_u16), rule(), 0..8),
        interface_check in any::<bool>(),
        v6_only in any::<bool>(),
        docker0 in any::<bool>(),
        steers in prop::bool::weighted(0.9),
        names in prop::bool::weighted(0.9),
        containers in prop::collection::btree_map(prop::sample::select(vec!["c", "d"]), 2..5_u8, 0..3),
        connects in prop::bool::weighted(0.9),
        udp in prop::collection::vec(
            (prop::sample::select(NETWORKS[..6].to_vec()), 80..84_u16, any::<bool>()),
            0..3,
        ),
        inside in prop::collection::vec(
            (prop::sample::select(NETWORKS[6..].to_vec()), 1..3_u64, any::<bool>()),
            0..3,
        ),
    ) -> Host {
        let mut host = Host::new()
            .network("dual", "br-dual")
            .bridge("br-dual", 9, &["172.20.0.1/16", "fd00::1/64"]);
        if docker0 {
            host = host.network("bridge", "docker0").bridge("docker0", 3, &["172.17.0.1/16"]);
        }
        for (address, port, kind, uid) in listeners {
            let address = format!("{address}:{port}");
            host = host.listens_as(&address, kind).owned_by(&address, uid);
        }
        host = if v6_only { host.v6_only() } else { host };
        for (network, inode, v6) in inside {
            host = host.namespace(network, inode, if v6 { &["127.0.0.1", "::1"] } else { &["127.0.0.1"] });
        }
        let mut seen = std::collections::BTreeSet::new();
        for (network, port, target, source, path, from, localhost) in rules.into_values() {
            let refused = path == DatapathChoice::Steer && NETWORKS[6..].contains(&network);
            if !refused && seen.insert((network, port)) {
                let inside = NETWORKS[6..].contains(&network);
                let from = if inside { vec![] } else { from };
                host = host.allow_for(network, &format!("{port}={target}"), source, path, &from);
                if localhost && !inside {
                    host = host.with_localhost(network, port);
                }
            }
        }
        for (container, last) in containers {
            let (app, dual) = (format!("172.18.0.{last}"), format!("172.20.0.{last}"));
            let dual6 = format!("fd00::{last}");
            host = host.container(container, &[("app", &[&app]), ("dual", &[&dual, &dual6])]);
        }
        for (network, port, takes) in udp {
            host = host.allow(network, &format!("{port}/udp"));
            host = if takes { host.takes_datagrams(&format!("127.0.0.1:{port}")) } else { host };
        }
        let steering = steers.then_some(Steering { interface_check, kernel_registers: true });
        host.features.steer = steering.ok_or_else(|| "none".to_owned());
        host.features.hooks[HookSet::Connect] = if connects { Ok(()) } else { Err("none".to_owned()) };
        host.features.hooks[HookSet::Names] = if names && steers { Ok(()) } else { Err("none".to_owned()) };
        host
    }
}

proptest! {
    #[test]
    fn a_plan_carried_out_leaves_nothing_to_plan(before in host(), after in host()) {
        let mut actual = Actual::default();
        for host in [&before, &after] {
            // Whoever restarted meanwhile is registered no more.
            actual.registered.clear();
            actual.detached = true;
            let desired = host.desired();
            // What takes access away may be carried out on its own before.
            let mut in_two = actual.clone();
            carry_out(&mut in_two, &revocations(&desired, &actual));
            prop_assert_eq!(revocations(&desired, &in_two), vec![]);
            let steps = plan(&desired, &in_two);
            carry_out(&mut in_two, &steps);
            let steps = plan(&desired, &actual);
            carry_out(&mut actual, &steps);
            for actual in [&mut in_two, &mut actual] {
                // The firewall is tried for a relay that is bound to the gateway once that is open.
                let steps = plan(&desired, actual);
                prop_assert!(steps.iter().all(|step| matches!(step, Step::Probe(_))), "{:?}", steps);
                carry_out(actual, &steps);
            }
            prop_assert_eq!(&in_two, &actual);
            prop_assert_eq!(plan(&desired, &actual), vec![]);
            prop_assert_eq!(&actual.kernel.entries, &desired.kernel.entries);
            prop_assert_eq!(&actual.kernel.sources, &desired.kernel.sources);
            prop_assert!(desired.grants.keys().eq(&desired.kernel.sources), "a source that is nobody's");
            prop_assert_eq!(&actual.relays, &desired.relays);
            prop_assert_eq!(&actual.kernel.redirects, &desired.kernel.redirects);
            let steered = desired.kernel.entries.iter().filter(|(_, value)| !value.has(Entry::RELAYED));
            for (entry, value) in steered {
                // Without an interface another network's entry may be there, which leaves these alone.
                let takes = |ip: std::net::IpAddr| {
                    let own = entry.ifindex != 0 || Address::from(ip).masked(&value.mask) == value.subnet;
                    own && Address::from(ip).is_v4() == value.subnet.is_v4()
                };
                let relayed = desired.relays.iter().any(|(k, spec)| {
                    let of_network = match &spec.clients {
                        Clients::Subnet(subnet) => takes(subnet.base.into()),
                        Clients::Listed(listed) => listed.iter().any(|ip| takes(*ip)),
                        Clients::Inside(_) => false,
                    };
                    let meets = |ifindex| [0, ifindex].contains(&entry.ifindex);
                    matches!(k.place, BindScope::Bridge { ifindex, .. } if meets(ifindex))
                        && Address::from(k.address.ip()) == entry.gateway
                        && k.address.port() == entry.port
                        && of_network
                        && entry.protocol == u16::from(TCP)
                });
                prop_assert!(!relayed, "an entry would take the relay's connections");
            }
        }
        let steps = plan(&Desired::default(), &actual);
        carry_out(&mut actual, &steps);
        // Knowledge, and harmless.
        actual.firewall_state.probe_results.clear();
        prop_assert_eq!(actual, Actual::default(), "nothing is left behind");
    }

    #[test]
    fn the_order_of_what_is_observed_does_not_matter(
        host in host(),
        turn in any::<usize>(),
        reverse in any::<bool>(),
    ) {
        let mut shuffled = host.inventory.clone();
        shuffled.interfaces.rotate_left(turn % host.inventory.interfaces.len());
        if reverse {
            shuffled.docker_networks.reverse();
        }
        let desired = resolve(&host.rules, &shuffled, &host.features, FirewallMode::default());
        prop_assert_eq!(desired, host.desired());
    }
}

use lbridge_common::{
    verdict::{first_candidate, listening_addresses},
    wire::{Address, Entry, ListenerKey, SLOTS, TCP, TargetKey},
};
use proptest::prelude::*;

use super::Host;
use crate::planning::{
    firewall::Passage,
    hooks::HookSet,
    inventory::{ListenerKind, Steering},
    plan::{Step, plan, revocations},
    policy::{Clients, Place, Policy},
    reality::Reality,
    resolve::resolve,
    rule::{PathChoice, Source},
};

/// The kernel and the relay set, as far as a step can tell. Panics where a step breaks the order that it
/// relies on.
fn carry_out(reality: &mut Reality, steps: &[Step]) {
    for step in steps {
        match step {
            Step::AddTarget(target) => assert!(reality.kernel.targets.insert(*target)),
            Step::RemoveTarget(target) => {
                let is_of = |key: &ListenerKey| target_of(key) == *target;
                assert!(!reality.registered.iter().any(is_of), "a forgotten listener");
                assert!(reality.kernel.targets.remove(target));
            }
            Step::AttachHooks(set) => reality.kernel.hooks[*set] = true,
            Step::DetachHooks(set) => {
                let unneeded = match set {
                    HookSet::Names => reality.kernel.views.is_empty(),
                    HookSet::Connect => reality.kernel.dials.is_empty(),
                    HookSet::Replies => reality.kernel.replies.is_empty(),
                };
                assert!(unneeded, "{set:?} is still needed");
                reality.kernel.hooks[*set] = false;
            }
            Step::PutView(endpoint, view) => {
                assert!(reality.kernel.hooks[HookSet::Names], "hooks come first");
                reality.kernel.views.insert(*endpoint, *view);
            }
            Step::RemoveView(endpoint) => assert!(reality.kernel.views.remove(endpoint).is_some()),
            Step::PutReply(key, reply) => {
                assert!(reality.kernel.hooks[HookSet::Replies], "hooks come first");
                reality.kernel.replies.insert(*key, *reply);
            }
            Step::RemoveReply(key) => assert!(reality.kernel.replies.remove(key).is_some()),
            Step::Register { key, .. } => {
                assert!(reality.kernel.targets.contains(&target_of(key)), "watched first");
                assert!(key.slot < SLOTS);
                assert!(reality.registered.insert(*key), "a slot that is taken");
            }
            Step::Unregister(key) => {
                let is_it = |candidate: ListenerKey| (candidate == *key).then_some(());
                let named =
                    |e: &Entry| first_candidate(&e.target, e.target_port, e.protocol(), is_it).is_some();
                let named = reality.kernel.entries.values().any(named);
                assert!(!named, "an entry goes before its listener");
                assert!(reality.registered.remove(key));
            }
            Step::PutEntry(key, value) => {
                if value.has(Entry::RELAYED) {
                    assert!(reality.relay_sockets.contains(key), "a relay listens before its entry");
                } else if value.target_port != 0 {
                    for address in listening_addresses(&value.target) {
                        let (port, protocol) = (value.target_port, key.protocol);
                        assert!(reality.kernel.targets.contains(&TargetKey { address, port, protocol }));
                    }
                }
                reality.kernel.entries.insert(*key, *value);
            }
            Step::RemoveEntry(key) => assert!(reality.kernel.entries.remove(key).is_some()),
            Step::AddSource(key) => {
                assert!(reality.kernel.sources.insert(*key));
            }
            Step::RemoveSource(key) => assert!(reality.kernel.sources.remove(key)),
            Step::AddAccepted(key) => assert!(reality.accepted.insert(*key)),
            Step::RemoveAccepted(key) => assert!(reality.accepted.remove(key)),
            Step::ForgetFlows(_) => panic!("no accept rule let anything in"),
            Step::PutDial(key, dial) => {
                assert!(reality.kernel.hooks[HookSet::Connect], "hooks come first");
                reality.kernel.dials.insert(*key, *dial);
            }
            Step::RemoveDial(key) => assert!(reality.kernel.dials.remove(key).is_some()),
            Step::OpenRelay(key, spec) => {
                reality.lingering.remove(key);
                reality.relay_sockets.extend(key.entry().filter(|_| spec.by_entry));
                reality.relays.insert(key.clone(), spec.clone());
            }
            Step::CloseRelay { key, handed_over } => {
                assert!(reality.relays.remove(key).is_some() || reality.lingering.remove(key));
                if *handed_over {
                    reality.lingering.insert(key.clone());
                }
                // The kernel removes a socket that closes, and refuses what an entry leads to it.
                key.entry().map(|entry| reality.relay_sockets.remove(&entry));
            }
            Step::Attach => reality.detached = false,
            // This host has no firewall; `super::firewall` has some.
            Step::Probe(openings) => {
                let open = openings.keys().map(|opening| (opening.clone(), Passage::Open));
                reality.filtering.passages.extend(open);
            }
            Step::Accept { .. } | Step::Unaccept { .. } => panic!("nothing denies"),
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

fn rule() -> impl Strategy<Value = (&'static str, u16, u16, Source, PathChoice, Vec<&'static str>, bool)> {
    (
        prop::sample::select(NETWORKS.to_vec()),
        80..84_u16,
        80..84_u16,
        prop::sample::select(vec![Source::Container, Source::Loopback]),
        prop::sample::select(vec![PathChoice::Auto, PathChoice::Steer, PathChoice::Relay]),
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
            let refused = path == PathChoice::Steer && NETWORKS[6..].contains(&network);
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
        let steering = Steering { interface_check, kernel_registers: true };
        host.abilities.steer = if steers { Ok(steering) } else { Err("none".to_owned()) };
        host.abilities.hooks[HookSet::Connect] = if connects { Ok(()) } else { Err("none".to_owned()) };
        host.abilities.hooks[HookSet::Names] = if names && steers { Ok(()) } else { Err("none".to_owned()) };
        host
    }
}

proptest! {
    #[test]
    fn a_plan_carried_out_leaves_nothing_to_plan(before in host(), after in host()) {
        let mut reality = Reality::default();
        for host in [&before, &after] {
            // Whoever restarted meanwhile is registered no more.
            reality.registered.clear();
            reality.detached = true;
            let policy = host.policy();
            // What takes access away may be carried out on its own before.
            let mut in_two = reality.clone();
            carry_out(&mut in_two, &revocations(&policy, &reality));
            prop_assert_eq!(revocations(&policy, &in_two), vec![]);
            let steps = plan(&policy, &in_two);
            carry_out(&mut in_two, &steps);
            let steps = plan(&policy, &reality);
            carry_out(&mut reality, &steps);
            for reality in [&mut in_two, &mut reality] {
                // The firewall is tried for a relay that is bound to the gateway once that is open.
                let steps = plan(&policy, reality);
                prop_assert!(steps.iter().all(|step| matches!(step, Step::Probe(_))), "{:?}", steps);
                carry_out(reality, &steps);
            }
            prop_assert_eq!(&in_two, &reality);
            prop_assert_eq!(plan(&policy, &reality), vec![]);
            prop_assert_eq!(&reality.kernel.entries, &policy.kernel.entries);
            prop_assert_eq!(&reality.kernel.sources, &policy.kernel.sources);
            prop_assert!(policy.grants.keys().eq(&policy.kernel.sources), "a source that is nobody's");
            prop_assert_eq!(&reality.relays, &policy.relays);
            prop_assert_eq!(&reality.kernel.dials, &policy.kernel.dials);
            let steered = policy.kernel.entries.iter().filter(|(_, value)| !value.has(Entry::RELAYED));
            for (entry, value) in steered {
                // Without an interface another network's entry may be there, which leaves these alone.
                let takes = |ip: std::net::IpAddr| {
                    let own = entry.ifindex != 0 || Address::from(ip).masked(&value.mask) == value.subnet;
                    own && Address::from(ip).is_v4() == value.subnet.is_v4()
                };
                let relayed = policy.relays.iter().any(|(k, spec)| {
                    let of_network = match &spec.clients {
                        Clients::Subnet(subnet) => takes(subnet.base.into()),
                        Clients::Listed(listed) => listed.iter().any(|ip| takes(*ip)),
                        Clients::Inside(_) => false,
                    };
                    matches!(k.place, Place::Bridge { ifindex, .. } if [0, ifindex].contains(&entry.ifindex))
                        && Address::from(k.address.ip()) == entry.gateway
                        && k.address.port() == entry.port
                        && of_network
                        && entry.protocol == u16::from(TCP)
                });
                prop_assert!(!relayed, "an entry would take the relay's connections");
            }
        }
        let steps = plan(&Policy::default(), &reality);
        carry_out(&mut reality, &steps);
        // Knowledge, and harmless.
        reality.filtering.passages.clear();
        prop_assert_eq!(reality, Reality::default(), "nothing is left behind");
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
        let policy = resolve(&host.rules, &shuffled, &host.abilities);
        prop_assert_eq!(policy, host.policy());
    }
}

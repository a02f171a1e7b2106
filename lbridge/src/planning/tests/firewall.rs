use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use proptest::prelude::*;

use super::Host;
use crate::planning::{
    firewall::{
        Accepted, Backend, Chain, Denial, Family, FirewallKind, FirewallMode, FirewallState, InputChain,
        Opening, ProbeResult, ProbeRoute,
    },
    plan::{Step, firewall::accept_rules},
    rule::Protocol,
};

/// More rounds than the daemon makes.
const ROUNDS: usize = 12;

fn opening(gateway: &str, port: u16) -> Opening {
    let gateway: IpAddr = gateway.parse().unwrap();
    let prefix = if gateway.is_ipv4() { 16 } else { 64 };
    Opening::new("br-app", (gateway, prefix), gateway, Protocol::Tcp, port)
}

fn chain(family: Family, table: &str) -> Chain {
    Chain { backend: Backend::Nft, family, table: table.to_owned(), name: "input".to_owned() }
}

/// A host whose chains all deny what lbridge has not accepted in them, first.
#[derive(Debug, Clone, Default)]
struct World {
    chains: Vec<Chain>,
    /// Rules in each chain, the first one first: lbridge's, or somebody's that drops all.
    rules: BTreeMap<Chain, Vec<Option<Opening>>>,
    probe_results: BTreeMap<Opening, ProbeResult>,
    needed: BTreeSet<Opening>,
    /// Something drops that no chain shows.
    xdp: bool,
}

impl World {
    fn new(chains: &[Chain]) -> Self {
        let rules = chains.iter().map(|chain| (chain.clone(), vec![None])).collect();
        Self { chains: chains.to_vec(), rules, ..Self::default() }
    }

    fn lets_through(&self, opening: &Opening) -> bool {
        let accepts = |chain: &Chain| {
            let first =
                self.rules[chain].iter().find(|rule| rule.is_none() || rule.as_ref() == Some(opening));
            !matches!(first, Some(None))
        };
        let in_the_way = self.chains.iter().filter(|chain| chain.family.meets(opening.gateway));
        !self.xdp && in_the_way.into_iter().all(accepts)
    }

    fn seen(&self) -> FirewallState {
        let mut accepts: BTreeMap<_, Accepted> = BTreeMap::new();
        for (chain, rules) in &self.rules {
            for (index, rule) in rules.iter().enumerate() {
                let Some(opening) = rule else { continue };
                let first = rules[..index].iter().all(Option::is_some);
                accepts
                    .entry((chain.clone(), opening.clone()))
                    .or_insert(Accepted { copies: 0, first })
                    .copies += 1;
            }
        }
        let denies = |chain: &Chain| InputChain {
            chain: chain.clone(),
            denial: Denial::Policy,
            firewall: FirewallKind::Nftables,
        };
        FirewallState {
            chains: self.chains.iter().map(denies).collect(),
            accepts,
            probe_results: self.probe_results.clone(),
            needed: self.needed.clone(),
            unreadable: None,
            failed: false,
        }
    }

    fn carry_out(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                Step::Accept { chain, opening } => {
                    let rules = self.rules.get_mut(chain).unwrap();
                    rules.retain(|rule| rule.as_ref() != Some(opening));
                    rules.insert(0, Some(opening.clone()));
                    self.probe_results.remove(opening);
                }
                Step::RemoveAccept { chain, opening } => {
                    self.rules.get_mut(chain).unwrap().retain(|rule| rule.as_ref() != Some(opening));
                }
                Step::Probe(openings) => {
                    for opening in openings.keys() {
                        let open = self.lets_through(opening);
                        if !open {
                            self.needed.insert(opening.clone());
                        }
                        let passage = if open { ProbeResult::Open } else { ProbeResult::Dropped };
                        self.probe_results.insert(opening.clone(), passage);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// As the daemon's pass does.
    fn settle(&mut self, openings: &[Opening], mode: FirewallMode) {
        let openings: BTreeMap<_, _> =
            openings.iter().map(|opening| (opening.clone(), ProbeRoute { ifindex: 7, via: None })).collect();
        for _ in 0..ROUNDS {
            let steps = accept_rules(&openings, mode, &self.seen());
            if steps.is_empty() {
                return;
            }
            self.carry_out(&steps);
        }
        panic!("it does not come to an end: {self:?}");
    }

    fn own(&self) -> Vec<Opening> {
        self.rules.values().flatten().flatten().cloned().collect()
    }

    /// The kernel tells of a change: nothing that was tried still counts.
    fn changed(&mut self, change: impl FnOnce(&mut Self)) {
        change(self);
        self.probe_results.clear();
    }
}

#[test]
fn what_a_rule_opens_is_an_opening() {
    let host = Host::new().bridge("br-6", 9, &["fd00::1/64"]).allow("app", "80").allow("bridge:br-6", "81");
    let openings: Vec<_> = host.desired().openings.into_iter().collect();
    let v6 = Opening { interface: "br-6".to_owned(), ..opening("fd00::1", 81) };
    assert_eq!(
        openings,
        [
            (v6, ProbeRoute { ifindex: 9, via: None }),
            (opening("172.18.0.1", 80), ProbeRoute { ifindex: 7, via: None })
        ]
    );
    // Two rules for one address; and a namespace has no bridge.
    let host =
        Host::new().allow("app", "80").allow("bridge:br-app", "80").namespace("netns:/c", 3, &["127.0.0.1"]);
    let host = host.allow("netns:/c", "80").allow("gone", "80");
    assert_eq!(host.desired().openings.into_keys().collect::<Vec<_>>(), [opening("172.18.0.1", 80)]);
}

#[test]
fn nothing_is_put_where_nothing_is_dropped() {
    let mut world = World::new(&[chain(Family::Ip6, "filter")]);
    world.settle(&[opening("172.18.0.1", 80)], FirewallMode::Manage);
    assert_eq!(world.own(), []);
}

#[test]
fn what_is_dropped_is_accepted_once_and_until_it_is_denied() {
    let (one, two) = (opening("172.18.0.1", 80), opening("172.18.0.1", 81));
    let mut world = World::new(&[chain(Family::Inet, "filter"), chain(Family::Ip6, "filter")]);
    world.settle(&[one.clone(), two.clone()], FirewallMode::Manage);
    assert_eq!(world.own().len(), 2);
    assert!(world.lets_through(&one) && world.lets_through(&two));
    world.settle(std::slice::from_ref(&two), FirewallMode::Manage);
    assert_eq!(world.own(), [two]);
    world.settle(&[], FirewallMode::Manage);
    assert_eq!(world.own(), []);
}

#[test]
fn a_rule_that_somebody_removes_comes_back() {
    let one = opening("172.18.0.1", 80);
    let filter = chain(Family::Inet, "filter");
    let mut world = World::new(std::slice::from_ref(&filter));
    world.settle(std::slice::from_ref(&one), FirewallMode::Manage);
    // Without a probe that would have to time out first.
    world.changed(|world| drop(world.rules.insert(filter.clone(), vec![None])));
    let openings = [(one.clone(), ProbeRoute { ifindex: 7, via: None })].into();
    let steps = accept_rules(&openings, FirewallMode::Manage, &world.seen());
    assert!(matches!(&steps[..], [Step::Accept { .. }]), "{steps:?}");
    world.settle(std::slice::from_ref(&one), FirewallMode::Manage);
    assert!(world.lets_through(&one));
    // A ruleset that was saved with it, and restored behind what drops: twice, and where it does not count.
    world.changed(|world| drop(world.rules.insert(filter, vec![None, Some(one.clone()), Some(one.clone())])));
    world.settle(std::slice::from_ref(&one), FirewallMode::Manage);
    assert_eq!(world.own(), std::slice::from_ref(&one));
    assert!(world.lets_through(&one));
    // The firewall is gone.
    world.changed(|world| *world = World { needed: world.needed.clone(), ..World::default() });
    world.settle(std::slice::from_ref(&one), FirewallMode::Manage);
    assert_eq!(world.own(), []);
}

#[test]
fn off_touches_nothing_but_what_was_lbridges() {
    let one = opening("172.18.0.1", 80);
    let mut world = World::new(&[chain(Family::Ip, "filter")]);
    world.settle(std::slice::from_ref(&one), FirewallMode::Off);
    assert_eq!(world.own(), []);
    assert_eq!(world.probe_results[&one], ProbeResult::Dropped);
    world.settle(std::slice::from_ref(&one), FirewallMode::Manage);
    assert_eq!(world.own().len(), 1);
    world.settle(std::slice::from_ref(&one), FirewallMode::Off);
    assert_eq!(world.own(), []);
}

#[test]
fn what_no_chain_drops_is_said() {
    let one = opening("172.18.0.1", 80);
    let mut world = World { xdp: true, ..World::new(&[chain(Family::Inet, "f"), chain(Family::Ip, "g")]) };
    world.settle(std::slice::from_ref(&one), FirewallMode::Manage);
    assert_eq!(world.probe_results[&one], ProbeResult::Dropped);
    world.chains.clear();
    assert!(world.seen().why_dropped(&one).contains("XDP"));
}

#[test]
fn the_remedy_can_be_typed() {
    let one = opening("172.18.0.1", 80);
    let seen = |backend, firewall| FirewallState {
        chains: vec![InputChain {
            chain: Chain { backend, ..chain(Family::Ip, "t") },
            denial: Denial::Rule,
            firewall,
        }],
        ..FirewallState::default()
    };
    for (backend, firewall, remedy) in [
        (
            Backend::IptablesNft,
            FirewallKind::Ufw,
            "ufw allow in on br-app from 172.18.0.0/16 to 172.18.0.1 port 80 proto tcp",
        ),
        (
            Backend::IptablesLegacy,
            FirewallKind::Iptables,
            "iptables-legacy -I INPUT -i br-app -s 172.18.0.0/16 -d 172.18.0.1 -p tcp --dport 80 -j ACCEPT",
        ),
        (
            Backend::Nft,
            FirewallKind::Nftables,
            "nft insert rule ip t input iifname br-app ip saddr 172.18.0.0/16 ip daddr 172.18.0.1 tcp dport \
             80 accept",
        ),
        (
            Backend::Nft,
            FirewallKind::Firewalld,
            "--add-rich-rule='rule family=\"ipv4\" source address=\"172.18.0.0/16\" destination \
             address=\"172.18.0.1\"",
        ),
    ] {
        let why = seen(backend, firewall).why_dropped(&one);
        assert!(why.contains(remedy) && why.starts_with(&format!("firewall {firewall} drops it")), "{why}");
    }
}

/// To a firewall or to the shell that it is pasted into.
#[test]
fn a_remedy_has_no_name_that_means_more() {
    let mut seen = FirewallState {
        chains: vec![InputChain {
            chain: Chain { backend: Backend::Nft, ..chain(Family::Inet, "t") },
            denial: Denial::Policy,
            firewall: FirewallKind::Nftables,
        }],
        ..FirewallState::default()
    };
    for name in ["br*", "br+", "$(id)", "a;id", "a&", "-x"] {
        let one = Opening { interface: name.to_owned(), ..opening("172.18.0.1", 80) };
        let why = seen.why_dropped(&one);
        assert!(why.contains("by hand") && !why.contains(name), "{why}");
        name.clone_into(&mut seen.chains[0].chain.table);
        let why = seen.why_dropped(&opening("172.18.0.1", 80));
        assert!(why.contains("by hand") && !why.contains(name), "{why}");
        seen.chains[0].chain.table = "t".to_owned();
    }
}

#[test]
fn a_name_that_means_more_is_no_plain_name() {
    for (name, plain) in [
        ("br-4f1c2d3e4a5b", true),
        ("docker0", true),
        ("br_a.1", true),
        ("br*", false),
        ("br+", false),
        ("@s", false),
        ("!br", false),
        ("-i", false),
        ("", false),
    ] {
        assert_eq!(
            Opening { interface: name.to_owned(), ..opening("10.0.0.1", 1) }.has_plain_name(),
            plain,
            "{name}"
        );
    }
}

fn chains() -> impl Strategy<Value = Vec<Chain>> {
    let all = vec![
        chain(Family::Ip, "a"),
        chain(Family::Inet, "b"),
        chain(Family::Ip6, "c"),
        chain(Family::Ip, "d"),
    ];
    prop::sample::subsequence(all, 0..=4).prop_shuffle()
}

proptest! {
    #[test]
    fn it_settles_with_everything_open_and_nothing_too_many(
        chains in chains(),
        wanted in prop::collection::vec((any::<bool>(), 80..83_u16), 0..4),
        then in prop::collection::vec((any::<bool>(), 80..83_u16), 0..4),
        flush in any::<bool>(),
    ) {
        let openings = |list: &[(bool, u16)]| -> Vec<_> {
            list.iter().map(|(v4, port)| opening(if *v4 { "172.18.0.1" } else { "fd00::1" }, *port)).collect()
        };
        let mut world = World::new(&chains);
        for list in [&wanted, &then] {
            let openings = openings(list);
            world.needed.retain(|opening| openings.contains(opening));
            world.settle(&openings, FirewallMode::Manage);
            prop_assert!(openings.iter().all(|opening| world.lets_through(opening)));
            prop_assert!(world.own().iter().all(|opening| openings.contains(opening)));
            for rules in world.rules.values() {
                let ours: Vec<_> = rules.iter().flatten().collect();
                prop_assert_eq!(ours.len(), ours.iter().collect::<BTreeSet<_>>().len());
            }
            if flush {
                world.changed(|world| {
                    world.rules.values_mut().for_each(|rules| rules.retain(Option::is_none));
                });
            }
        }
    }
}

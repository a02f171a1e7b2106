//! What an accept rule lets in is for its rule alone: the plan has an entry refuse everybody else first, and for as long.

use lbridge_common::wire::{RuleKey, RuleValue};

use super::{Host, relay_sockets};
use crate::planning::{
    firewall::{Accepted, Chain, Denial, Family, Filtering, InputChain, Keeper, Opening, Passage, Through},
    inventory::{Interface, Steering},
    plan::{Step, plan},
    policy::Policy,
    reality::Reality,
    rule::{PathChoice, Source},
};

fn chain(through: Through) -> Chain {
    Chain { through, family: Family::Inet, table: "filter".to_owned(), name: "input".to_owned() }
}

/// A firewall that drops what a policy needs, with these accept rules.
fn dropping(through: Through, policy: &Policy, accepts: &[Opening]) -> Filtering {
    let passage = |opening: &Opening| {
        if accepts.contains(opening) { Passage::Open } else { Passage::Dropped }
    };
    Filtering {
        chains: vec![InputChain {
            chain: chain(through),
            denial: Denial::Policy,
            firewall: Keeper::Nftables,
        }],
        accepts: accepts
            .iter()
            .map(|opening| ((chain(through), opening.clone()), Accepted { copies: 1, first: true }))
            .collect(),
        passages: policy.openings.keys().map(|opening| (opening.clone(), passage(opening))).collect(),
        ..Filtering::default()
    }
}

/// A policy in force behind a firewall.
fn in_force(policy: &Policy, filtering: Filtering) -> Reality {
    Reality {
        filtering,
        targets: policy.targets.clone(),
        entries: policy.entries.clone(),
        sources: policy.sources.clone(),
        relay_sockets: relay_sockets(policy),
        relays: policy.relays.clone(),
        registered: policy.listeners.keys().copied().collect(),
        name_hooks: policy.name_hooks,
        ..Reality::default()
    }
}

fn entries_put(steps: &[Step]) -> Vec<(RuleKey, u16)> {
    let put = |step: &Step| match step {
        Step::PutEntry(key, value) => Some((*key, value.flags)),
        _ => None,
    };
    steps.iter().filter_map(put).collect()
}

fn opening(policy: &Policy) -> Opening {
    policy.openings.keys().next().unwrap().clone()
}

#[test]
fn an_entry_is_exclusive_before_the_accept_rule_is_put() {
    for (path, flags) in [(PathChoice::Auto, 0), (PathChoice::Relay, RuleValue::RELAYED)] {
        let host = Host::new().listens("127.0.0.1:80").allow_with("app", "80", Source::Container, path);
        let policy = host.policy();
        let mut reality = in_force(&policy, dropping(Through::Nft, &policy, &[]));
        reality.entries.values_mut().for_each(|entry| entry.steered = 7);
        let steps = plan(&policy, &reality);
        let [Step::PutEntry(key, value), Step::Accept { .. }] = &steps[..] else { panic!("{steps:?}") };
        assert_eq!(value.flags, flags | RuleValue::EXCLUSIVE);
        assert_eq!(value.steered, 7, "what was counted stays");
        // It stays so for as long as the accept rule is there, and no longer.
        reality.entries.insert(*key, *value);
        reality.filtering = dropping(Through::Nft, &policy, &[opening(&policy)]);
        assert_eq!(plan(&policy, &reality), []);
        reality.filtering.accepts.clear();
        reality.filtering.chains.clear();
        assert_eq!(entries_put(&plan(&policy, &reality)), [(*key, flags)]);
    }
}

#[test]
fn where_there_is_no_entry_one_admits_nobody() {
    let waits = Host::new().allow_with("app", "80", Source::Container, PathChoice::Relay);
    let policy = waits.policy();
    assert!(policy.entries.is_empty());
    let steps = plan(&policy, &in_force(&policy, dropping(Through::Nft, &policy, &[])));
    let key = opening(&policy).entry(7);
    assert_eq!(entries_put(&steps), [(key, RuleValue::CLOSED | RuleValue::EXCLUSIVE)]);
    assert!(matches!(steps.last(), Some(Step::Accept { .. })));

    // Denied, and the accept rule is still there: nobody gets in until it is gone.
    let steered = Host::new().listens("127.0.0.1:80").allow("app", "80").policy();
    let denied = Host::new().listens("127.0.0.1:80").policy();
    let mut reality = in_force(&steered, dropping(Through::Nft, &steered, &[opening(&steered)]));
    let steps = plan(&denied, &reality);
    assert_eq!(entries_put(&steps), [(key, RuleValue::CLOSED | RuleValue::EXCLUSIVE)]);
    assert!(steps.iter().any(|step| matches!(step, Step::Unaccept { .. })));
    assert!(!steps.iter().any(|step| matches!(step, Step::RemoveEntry(_))));
    for step in &steps {
        if let Step::PutEntry(key, value) = step {
            reality.entries.insert(*key, *value);
        }
    }
    reality.filtering.accepts.clear();
    assert!(plan(&denied, &reality).contains(&Step::RemoveEntry(key)));
}

/// A rich rule names no interface. What is answered goes to the bridge, so that only datagrams are of use to others.
#[test]
fn behind_firewalld_every_interface_has_an_entry() {
    let mut host = Host::new().bridge("br-other", 9, &["172.19.0.1/16"]).listens("127.0.0.1:80");
    let interface = |name: &str, index, is_port| Interface {
        index,
        name: name.to_owned(),
        is_bridge: false,
        is_port,
        addresses: vec![],
    };
    host.inventory.interfaces.extend([interface("lo", 1, false), interface("eth0", 2, false)]);
    host.inventory.interfaces.push(interface("veth1", 12, true));
    let host = host.allow("app", "80").takes_datagrams("127.0.0.1:53").allow("app", "53/udp");
    let policy = host.policy();
    let steps = plan(&policy, &in_force(&policy, dropping(Through::Firewalld, &policy, &[])));
    let closed = RuleValue::CLOSED | RuleValue::EXCLUSIVE;
    let put: Vec<_> =
        entries_put(&steps).into_iter().map(|(key, flags)| (key.ifindex, key.port, flags)).collect();
    let own = RuleValue::EXCLUSIVE;
    assert_eq!(put, [(2, 53, closed), (7, 53, own), (7, 80, own), (9, 53, closed)]);
}

/// A listing that fails says nothing of what is there.
#[test]
fn what_cannot_be_read_may_be_there() {
    let policy = Host::new().listens("127.0.0.1:80").allow("app", "80").policy();
    for (wanted, flags) in
        [(&policy, RuleValue::EXCLUSIVE), (&Policy::default(), RuleValue::CLOSED | RuleValue::EXCLUSIVE)]
    {
        let unread = Filtering { unreadable: Some("it takes too long".to_owned()), ..Filtering::default() };
        let mut reality = in_force(&policy, unread);
        reality.entries.values_mut().for_each(|entry| entry.flags |= RuleValue::EXCLUSIVE);
        for step in plan(wanted, &reality) {
            match step {
                Step::PutEntry(key, value) => drop(reality.entries.insert(key, value)),
                Step::RemoveEntry(key) => drop(reality.entries.remove(&key)),
                _ => {}
            }
        }
        assert!(reality.entries.values().all(|entry| entry.flags == flags) && reality.entries.len() == 1);
    }
}

/// Older versions named no subnet.
#[test]
fn an_accept_rule_for_everybody_is_replaced() {
    let policy = Host::new().listens("127.0.0.1:80").allow("app", "80").policy();
    let older = Opening { sources: "0.0.0.0/0".parse().unwrap(), ..opening(&policy) };
    let mut filtering = dropping(Through::Nft, &policy, std::slice::from_ref(&older));
    filtering.passages.values_mut().for_each(|passage| *passage = Passage::Open);
    let steps = plan(&policy, &in_force(&policy, filtering));
    let [Step::PutEntry(..), Step::Accept { opening: put, .. }, Step::Unaccept { opening: removed, .. }] =
        &steps[..]
    else {
        panic!("{steps:?}")
    };
    assert_eq!((put, removed), (&opening(&policy), &older));
}

/// Without an entry nothing would keep what comes through from the host's other services.
#[test]
fn a_relay_without_an_entry_is_let_in_only_while_it_listens() {
    let mut host = Host::new().allow_with("app", "80", Source::Container, PathChoice::Relay);
    host.abilities.steer = Ok(Steering { interface_check: false, kernel_registers: true });
    assert!(host.policy().openings.is_empty());
    let policy = host.listens("127.0.0.1:80").policy();
    let mut reality = in_force(&policy, dropping(Through::Nft, &policy, &[]));
    let steps = plan(&policy, &reality);
    assert!(matches!(&steps[..], [Step::Accept { .. }]), "no entry shuts out the relay's clients: {steps:?}");
    // One that could not be opened, and one that is not open any more.
    reality.relays.clear();
    assert!(matches!(&plan(&policy, &reality)[..], [Step::OpenRelay(..)]));
    reality.filtering = dropping(Through::Nft, &policy, &[opening(&policy)]);
    assert!(plan(&policy, &reality).iter().any(|step| matches!(step, Step::Unaccept { .. })));
}

//! An accept rule lets traffic in for its own rule alone: the plan has the kernel refuse everybody else
//! first, and for as long.

use super::{Host, in_force};
use crate::planning::{
    firewall::{Accepted, Chain, Denial, Family, Filtering, InputChain, Keeper, Opening, Passage, Through},
    inventory::Steering,
    plan::{Step, plan},
    policy::Policy,
    reality::{Flows, Reality},
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

fn opening(policy: &Policy) -> Opening {
    policy.openings.keys().next().unwrap().clone()
}

#[test]
fn strangers_are_refused_before_the_accept_rule_is_put() {
    for path in [PathChoice::Auto, PathChoice::Relay] {
        let host = Host::new().listens("127.0.0.1:80").allow_with("app", "80", Source::Container, path);
        let policy = host.policy();
        let accepted = opening(&policy).accepted();
        let mut reality = in_force(&policy, dropping(Through::Nft, &policy, &[]));
        let steps = plan(&policy, &reality);
        let [Step::AddAccepted(added), Step::Accept { .. }] = &steps[..] else { panic!("{steps:?}") };
        assert_eq!(*added, accepted);
        // They are for as long as the accept rule is there, and no longer.
        reality = in_force(&policy, dropping(Through::Nft, &policy, &[opening(&policy)]));
        assert_eq!(plan(&policy, &reality), []);
        reality.filtering.accepts.clear();
        reality.filtering.chains.clear();
        assert_eq!(plan(&policy, &reality), [Step::RemoveAccepted(accepted)]);
    }
}

#[test]
fn what_is_denied_is_refused_until_its_accept_rule_is_gone() {
    let steered = Host::new().listens("127.0.0.1:80").allow("app", "80").policy();
    let denied = Host::new().listens("127.0.0.1:80").policy();
    let (key, accepted) = (opening(&steered).entry(7), opening(&steered).accepted());
    let mut reality = in_force(&steered, dropping(Through::Nft, &steered, &[opening(&steered)]));
    let steps = plan(&denied, &reality);
    assert!(steps.contains(&Step::RemoveEntry(key)));
    assert!(steps.iter().any(|step| matches!(step, Step::Unaccept { .. })));
    assert!(!steps.contains(&Step::RemoveAccepted(accepted)), "only once it is seen that it is gone");
    reality.filtering.accepts.clear();
    assert!(plan(&denied, &reality).contains(&Step::RemoveAccepted(accepted)));
}

/// A firewall lets in what belongs to a flow that it has let in before.
#[test]
fn what_conntrack_knows_is_refused_until_it_is_forgotten() {
    let steered = Host::new().listens("127.0.0.1:80").allow("app", "80").policy();
    let denied = Host::new().listens("127.0.0.1:80").policy();
    let accepted = opening(&steered).accepted();
    let mut reality = in_force(&steered, dropping(Through::Nft, &steered, &[opening(&steered)]));
    reality.filtering.accepts.clear();
    for (flows, planned) in [
        (Flows { open: 0, forgettable: 0 }, &[Step::RemoveAccepted(accepted)][..]),
        (
            Flows { open: 0, forgettable: 2 },
            &[Step::ForgetFlows([accepted].into()), Step::RemoveAccepted(accepted)],
        ),
        (Flows { open: 1, forgettable: 2 }, &[]),
    ] {
        reality.flows = [(accepted, flows)].into();
        let steps = plan(&denied, &reality);
        let of_accepted = |step: &&Step| matches!(step, Step::ForgetFlows(_) | Step::RemoveAccepted(_));
        assert!(steps.iter().filter(of_accepted).eq(planned), "{flows:?}: {steps:?}");
    }
}

/// Accept rules that name the same sources, whichever the chain or the bridge, are one thing to the kernel.
#[test]
fn two_accept_rules_are_refused_as_one() {
    let policy = Host::new().listens("127.0.0.1:80").allow("app", "80").policy();
    let older = Opening { interface: "br-old".to_owned(), ..opening(&policy) };
    let mut reality = in_force(&policy, dropping(Through::Nft, &policy, &[opening(&policy), older.clone()]));
    assert_eq!(reality.accepted.len(), 1);
    let steps = plan(&policy, &reality);
    assert_eq!(steps, [Step::Unaccept { chain: chain(Through::Nft), opening: older.clone() }]);
    reality.filtering.accepts.remove(&(chain(Through::Nft), older));
    assert_eq!(plan(&policy, &reality), []);
}

/// A listing that fails says nothing of what is there.
#[test]
fn what_cannot_be_read_may_be_there() {
    let policy = Host::new().listens("127.0.0.1:80").allow("app", "80").policy();
    let accepted = opening(&policy).accepted();
    for wanted in [&policy, &Policy::default()] {
        let unread = Filtering { failed: true, ..Filtering::default() };
        let reality = Reality { accepted: [accepted].into(), ..in_force(&policy, unread) };
        let steering = policy.steering;
        let steps = plan(&Policy { steering, ..wanted.clone() }, &reality);
        assert!(!steps.contains(&Step::RemoveAccepted(accepted)), "{steps:?}");
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
    let [
        Step::AddAccepted(added),
        Step::Accept { opening: put, .. },
        Step::Unaccept { opening: removed, .. },
    ] = &steps[..]
    else {
        panic!("{steps:?}")
    };
    assert_eq!((*added, put, removed), (opening(&policy).accepted(), &opening(&policy), &older));
}

/// A relay that is bound to the gateway has no entry that admits its clients; nothing else would keep what
/// comes through from the host's other services.
#[test]
fn a_relay_without_an_entry_is_let_in_only_while_it_listens() {
    let mut host = Host::new().allow_with("app", "80", Source::Container, PathChoice::Relay);
    host.abilities.steer = Ok(Steering { interface_check: false, kernel_registers: true });
    let policy = host.listens("127.0.0.1:80").policy();
    let mut reality = in_force(&policy, dropping(Through::Nft, &policy, &[]));
    let steps = plan(&policy, &reality);
    assert!(matches!(&steps[..], [Step::Accept { .. }]), "the relay's clients are not refused: {steps:?}");
    // One that could not be opened, and one that is not open any more.
    reality.relays.clear();
    assert!(matches!(&plan(&policy, &reality)[..], [Step::OpenRelay(..)]));
    reality.filtering = dropping(Through::Nft, &policy, &[opening(&policy)]);
    assert!(plan(&policy, &reality).iter().any(|step| matches!(step, Step::Unaccept { .. })));
}

/// Where the kernel does not steer there is no map to tell.
#[test]
fn without_steering_the_kernel_is_told_nothing() {
    let mut host = Host::new().listens("127.0.0.1:80").allow("app", "80");
    host.abilities.steer = Err("Linux 4.19".to_owned());
    let policy = host.policy();
    let filtering = dropping(Through::Nft, &policy, &[opening(&policy)]);
    let reality = Reality { accepted: [].into(), ..in_force(&policy, filtering) };
    assert_eq!(plan(&policy, &reality), []);
}

//! An accept rule lets traffic in for its own rule alone: the plan has the kernel refuse everybody else
//! first, and for as long.

use super::{Host, in_force};
use crate::planning::{
    actual::{Actual, Flows},
    desired::Desired,
    firewall::{
        Accepted, Backend, Chain, Denial, Family, FirewallKind, FirewallState, InputChain, Opening,
        ProbeResult,
    },
    inventory::Steering,
    plan::{Step, plan},
    rule::{DatapathChoice, Source},
};

fn chain(backend: Backend) -> Chain {
    Chain { backend, family: Family::Inet, table: "filter".to_owned(), name: "input".to_owned() }
}

/// A firewall that drops what a desired state needs, with these accept rules.
fn dropping(backend: Backend, desired: &Desired, accepts: &[Opening]) -> FirewallState {
    let passage = |opening: &Opening| {
        if accepts.contains(opening) { ProbeResult::Open } else { ProbeResult::Dropped }
    };
    FirewallState {
        chains: vec![InputChain {
            chain: chain(backend),
            denial: Denial::Policy,
            firewall: FirewallKind::Nftables,
        }],
        accepts: accepts
            .iter()
            .map(|opening| ((chain(backend), opening.clone()), Accepted { copies: 1, first: true }))
            .collect(),
        probe_results: desired.openings.keys().map(|opening| (opening.clone(), passage(opening))).collect(),
        ..FirewallState::default()
    }
}

fn opening(desired: &Desired) -> Opening {
    desired.openings.keys().next().unwrap().clone()
}

#[test]
fn strangers_are_refused_before_the_accept_rule_is_put() {
    for path in [DatapathChoice::Auto, DatapathChoice::Relay] {
        let host = Host::new().listens("127.0.0.1:80").allow_with("app", "80", Source::Container, path);
        let desired = host.desired();
        let accepted = opening(&desired).accepted();
        let mut actual = in_force(&desired, dropping(Backend::Nft, &desired, &[]));
        let steps = plan(&desired, &actual);
        let [Step::AddAccepted(added), Step::Accept { .. }] = &steps[..] else { panic!("{steps:?}") };
        assert_eq!(*added, accepted);
        // They are for as long as the accept rule is there, and no longer.
        actual = in_force(&desired, dropping(Backend::Nft, &desired, &[opening(&desired)]));
        assert_eq!(plan(&desired, &actual), []);
        actual.firewall_state.accepts.clear();
        actual.firewall_state.chains.clear();
        assert_eq!(plan(&desired, &actual), [Step::RemoveAccepted(accepted)]);
    }
}

#[test]
fn what_is_denied_is_refused_until_its_accept_rule_is_gone() {
    let steered = Host::new().listens("127.0.0.1:80").allow("app", "80").desired();
    let denied = Host::new().listens("127.0.0.1:80").desired();
    let (key, accepted) = (opening(&steered).entry(7), opening(&steered).accepted());
    let mut actual = in_force(&steered, dropping(Backend::Nft, &steered, &[opening(&steered)]));
    let steps = plan(&denied, &actual);
    assert!(steps.contains(&Step::RemoveEntry(key)));
    assert!(steps.iter().any(|step| matches!(step, Step::RemoveAccept { .. })));
    assert!(!steps.contains(&Step::RemoveAccepted(accepted)), "only once it is seen that it is gone");
    actual.firewall_state.accepts.clear();
    assert!(plan(&denied, &actual).contains(&Step::RemoveAccepted(accepted)));
}

/// A firewall lets in what belongs to a flow that it has let in before.
#[test]
fn what_conntrack_knows_is_refused_until_it_is_forgotten() {
    let steered = Host::new().listens("127.0.0.1:80").allow("app", "80").desired();
    let denied = Host::new().listens("127.0.0.1:80").desired();
    let accepted = opening(&steered).accepted();
    let mut actual = in_force(&steered, dropping(Backend::Nft, &steered, &[opening(&steered)]));
    actual.firewall_state.accepts.clear();
    for (flows, planned) in [
        (Flows { open: 0, forgettable: 0 }, &[Step::RemoveAccepted(accepted)][..]),
        (
            Flows { open: 0, forgettable: 2 },
            &[Step::ForgetFlows([accepted].into()), Step::RemoveAccepted(accepted)],
        ),
        (Flows { open: 1, forgettable: 2 }, &[]),
    ] {
        actual.flows = [(accepted, flows)].into();
        let steps = plan(&denied, &actual);
        let of_accepted = |step: &&Step| matches!(step, Step::ForgetFlows(_) | Step::RemoveAccepted(_));
        assert!(steps.iter().filter(of_accepted).eq(planned), "{flows:?}: {steps:?}");
    }
}

/// Accept rules that name the same sources, whichever the chain or the bridge, are one thing to the kernel.
#[test]
fn two_accept_rules_are_refused_as_one() {
    let desired = Host::new().listens("127.0.0.1:80").allow("app", "80").desired();
    let older = Opening { interface: "br-old".to_owned(), ..opening(&desired) };
    let mut actual =
        in_force(&desired, dropping(Backend::Nft, &desired, &[opening(&desired), older.clone()]));
    assert_eq!(actual.accepted.len(), 1);
    let steps = plan(&desired, &actual);
    assert_eq!(steps, [Step::RemoveAccept { chain: chain(Backend::Nft), opening: older.clone() }]);
    actual.firewall_state.accepts.remove(&(chain(Backend::Nft), older));
    assert_eq!(plan(&desired, &actual), []);
}

/// A listing that fails says nothing of what is there.
#[test]
fn what_cannot_be_read_may_be_there() {
    let desired = Host::new().listens("127.0.0.1:80").allow("app", "80").desired();
    let accepted = opening(&desired).accepted();
    for wanted in [&desired, &Desired::default()] {
        let unread = FirewallState { failed: true, ..FirewallState::default() };
        let actual = Actual { accepted: [accepted].into(), ..in_force(&desired, unread) };
        let steering = desired.steering;
        let steps = plan(&Desired { steering, ..wanted.clone() }, &actual);
        assert!(!steps.contains(&Step::RemoveAccepted(accepted)), "{steps:?}");
    }
}

/// Older versions named no subnet.
#[test]
fn an_accept_rule_for_everybody_is_replaced() {
    let desired = Host::new().listens("127.0.0.1:80").allow("app", "80").desired();
    let older = Opening { sources: "0.0.0.0/0".parse().unwrap(), ..opening(&desired) };
    let mut firewall_state = dropping(Backend::Nft, &desired, std::slice::from_ref(&older));
    firewall_state.probe_results.values_mut().for_each(|passage| *passage = ProbeResult::Open);
    let steps = plan(&desired, &in_force(&desired, firewall_state));
    let [
        Step::AddAccepted(added),
        Step::Accept { opening: put, .. },
        Step::RemoveAccept { opening: removed, .. },
    ] = &steps[..]
    else {
        panic!("{steps:?}")
    };
    assert_eq!((*added, put, removed), (opening(&desired).accepted(), &opening(&desired), &older));
}

/// A relay that is bound to the gateway has no entry that admits its clients; nothing else would keep what
/// comes through from the host's other services.
#[test]
fn a_relay_without_an_entry_is_let_in_only_while_it_listens() {
    let mut host = Host::new().allow_with("app", "80", Source::Container, DatapathChoice::Relay);
    host.features.steer = Ok(Steering { interface_check: false, kernel_registers: true });
    let desired = host.listens("127.0.0.1:80").desired();
    let mut actual = in_force(&desired, dropping(Backend::Nft, &desired, &[]));
    let steps = plan(&desired, &actual);
    assert!(matches!(&steps[..], [Step::Accept { .. }]), "the relay's clients are not refused: {steps:?}");
    // One that could not be opened, and one that is not open any more.
    actual.relays.clear();
    assert!(matches!(&plan(&desired, &actual)[..], [Step::OpenRelay(..)]));
    actual.firewall_state = dropping(Backend::Nft, &desired, &[opening(&desired)]);
    assert!(plan(&desired, &actual).iter().any(|step| matches!(step, Step::RemoveAccept { .. })));
}

/// Where the kernel does not steer there is no map to tell.
#[test]
fn without_steering_the_kernel_is_told_nothing() {
    let mut host = Host::new().listens("127.0.0.1:80").allow("app", "80");
    host.features.steer = Err("Linux 4.19".to_owned());
    let desired = host.desired();
    let firewall_state = dropping(Backend::Nft, &desired, &[opening(&desired)]);
    let actual = Actual { accepted: [].into(), ..in_force(&desired, firewall_state) };
    assert_eq!(plan(&desired, &actual), []);
}

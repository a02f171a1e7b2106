//! Firewall: the steps that change accept rules, and the traffic that the kernel must refuse because of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use lbridge_common::wire::{AcceptedKey, Address, TCP};

use super::Step;
use crate::planning::{
    actual::Actual,
    desired::{BindScope, Clients, Desired, RelayKey, RelaySpec},
    firewall::{Chain, FirewallMode, FirewallState, Opening, Place, ProbeResult, ProbeRoute},
};

/// Returns the steps that bring the firewall's accept rules to the desired state. What they let in and no
/// entry admits is refused by the kernel first, and for as long as an accept rule or a flow that it let in
/// exists.
pub(super) fn steps(desired: &Desired, actual: &Actual) -> Vec<Step> {
    let rules = accept_rules(&guarded(desired, actual), desired.firewall, &actual.firewall_state);
    let accepted = accepted(desired, actual, &rules);
    let mut steps: Vec<_> = accepted.difference(&actual.accepted).copied().map(Step::AddAccepted).collect();
    // A flow that conntrack knows passes without an accept rule, and would reach a service that listens on
    // every address.
    let flows = |key| actual.flows.get(key).copied().unwrap_or_default();
    // While a flow is open, its key stays. The first look after its end finds that it may be forgotten.
    let gone: Vec<_> = actual.accepted.difference(&accepted).filter(|key| flows(*key).open == 0).collect();
    let known: BTreeSet<_> =
        gone.iter().copied().filter(|key| flows(*key).forgettable > 0).copied().collect();
    steps.extend((!known.is_empty()).then_some(Step::ForgetFlows(known)));
    steps.extend(gone.into_iter().copied().map(Step::RemoveAccepted));
    steps.extend(rules);
    steps
}

/// Returns the steps that let through what is needed, and take back what is not. `openings` are all that
/// rules want. An opening that was just accepted is not known to pass any more, so the next round tries it.
/// An accept rule that is no longer wanted goes after the one that takes its place.
pub(in crate::planning) fn accept_rules(
    openings: &BTreeMap<Opening, ProbeRoute>,
    mode: FirewallMode,
    seen: &FirewallState,
) -> Vec<Step> {
    let wanted = |opening: &Opening| mode == FirewallMode::Manage && openings.contains_key(opening);
    let mut steps = vec![];
    let places: BTreeSet<_> = seen.accepts.keys().map(|(_, accepted)| accepted.place()).collect();
    let mut unknown = BTreeMap::new();
    for (opening, link) in openings {
        let result = seen.probe_results.get(opening);
        match next_accept(opening, result, seen, &places).filter(|_| wanted(opening)) {
            Some(chain) => steps.push(Step::Accept { chain, opening: opening.clone() }),
            None if result.is_none() => drop(unknown.insert(opening.clone(), *link)),
            None => {}
        }
    }
    let unwanted = seen.accepts.keys().filter(|(_, opening)| !wanted(opening));
    steps.extend(
        unwanted
            .map(|(chain, opening)| Step::RemoveAccept { chain: chain.clone(), opening: opening.clone() }),
    );
    if !unknown.is_empty() {
        steps.push(Step::Probe(unknown));
    }
    steps
}

/// Returns the chain that must get an accept rule next: none has one though it is needed, or those that are
/// there were not enough, or a chain has several copies.
fn next_accept(
    opening: &Opening,
    result: Option<&ProbeResult>,
    seen: &FirewallState,
    accepted: &BTreeSet<Place<'_>>,
) -> Option<Chain> {
    let of = |chain: &Chain| seen.accepts.get(&(chain.clone(), opening.clone()));
    let chains = || seen.in_the_way_of(opening).map(|chain| &chain.chain);
    // An accept rule for another subnet of the same bridge, as older versions put it, says that one is
    // needed.
    let is_needed = || seen.needed.contains(opening) || accepted.contains(&opening.place());
    // Somebody restored a ruleset that was saved with ours in it.
    let doubled = chains().find(|chain| of(chain).is_some_and(|accepted| accepted.copies > 1));
    let none = || !chains().any(|chain| of(chain).is_some());
    let lacking = || chains().find(|chain| !of(chain).is_some_and(|accepted| accepted.first));
    let next = match result {
        _ if doubled.is_some() => doubled,
        Some(ProbeResult::Dropped) => lacking(),
        _ if is_needed() && none() => lacking(),
        _ => None,
    };
    next.cloned()
}

/// Returns the traffic that the kernel must refuse unless an entry admits it: what lbridge's accept rules let
/// in, now or by a step of `firewall`.
fn accepted(desired: &Desired, actual: &Actual, firewall: &[Step]) -> BTreeSet<(AcceptedKey, u32)> {
    if desired.steering.is_none() {
        return BTreeSet::new();
    }
    let planned = firewall
        .iter()
        .filter_map(|step| if let Step::Accept { opening, .. } = step { Some(opening) } else { None });
    let mut accepted = actual.firewall_state.accepted();
    accepted.extend(planned.map(Opening::accepted));
    // A rule that could not be read may still be there.
    if actual.firewall_state.failed {
        accepted.extend(&actual.accepted);
    }
    // No entry admits the clients of a relay that is bound to the gateway: once it listens, they are not
    // refused.
    let bound: Vec<_> = desired.relays.iter().filter(|(key, spec)| is_bound(key, spec)).collect();
    let is_served = |(key, bits): &(AcceptedKey, u32)| {
        key.protocol == u16::from(TCP)
            && bound.iter().any(|(relay, spec)| {
                let (gateway, port) = (Address::from(relay.address.ip()), relay.address.port());
                let client = |source| AcceptedKey { gateway, port, source, ..*key };
                actual.relays.contains_key(relay)
                    && match &spec.clients {
                        Clients::Subnet(subnet) => key.matches(*bits, &client(subnet.base)),
                        Clients::Listed(listed) => {
                            listed.iter().any(|ip| key.matches(*bits, &client((*ip).into())))
                        }
                        Clients::Inside(_) => false,
                    }
            })
    };
    accepted.retain(|key| !is_served(key));
    accepted
}

/// Returns true if a relay listens on the gateway itself.
fn is_bound(key: &RelayKey, spec: &RelaySpec) -> bool {
    !spec.by_entry && matches!(key.place, BindScope::Bridge { .. })
}

/// Returns the openings for which a firewall may let packets in now. Leaves out those of a relay without an
/// entry that is not open: what comes through would reach the host's other services.
fn guarded(desired: &Desired, actual: &Actual) -> BTreeMap<Opening, ProbeRoute> {
    let is_checked = desired.steering.is_some_and(|steering| steering.interface_check);
    let is_guarded = |(opening, link): &(&Opening, &ProbeRoute)| {
        let entry = opening.entry(if is_checked { link.ifindex } else { 0 });
        is_checked
            || desired.kernel.entries.contains_key(&entry)
            || actual.relays.contains_key(&bound_relay(opening, link.ifindex))
    };
    let openings = desired.openings.iter().filter(is_guarded);
    openings.map(|(opening, link)| (opening.clone(), *link)).collect()
}

/// Returns the key of the relay that is bound to the address and port of an opening.
fn bound_relay(opening: &Opening, ifindex: u32) -> RelayKey {
    let place = BindScope::Bridge { interface: opening.interface.clone(), ifindex };
    RelayKey { address: SocketAddr::new(opening.gateway, opening.port), place }
}

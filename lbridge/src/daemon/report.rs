//! Report: desired state compared with actual state, for `status`, the log and events. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use lbridge_common::wire::{Address, Entry, ListenerEvent, SourceKey};

use super::executor::Failures;
use crate::{
    api::protocol::{
        DialStatus, EventKind, FirewallStatus, GatewayStatus, ListenerUser, NamespaceStatus, ReasonStatus,
        RuleStatus,
    },
    planning::{
        actual::Actual,
        desired::{
            BindScope, Clients, Desired, GatewayOutcome, Outcome, RedirectOutcome, RelayKey, RelaySpec,
            RuleOutcome, State,
        },
        firewall::ProbeResult,
        hooks::HookSet,
        inventory::{NamespaceKey, NetnsRef},
        reason::Reason,
        rule::{Origin, Rule, RuleId, Rules},
    },
    relay::set::Counts,
};

/// A change of a rule between two passes.
#[derive(Debug)]
pub(super) enum RuleChange {
    /// The rule is new, or its state has changed.
    State(Box<RuleStatus>),
    /// The rule is no longer in force: it was denied, left out of the configuration, or no label asks for it.
    Removed {
        /// Identity of the rule.
        id: RuleId,
        /// Origin that the rule had.
        origin: Origin,
    },
}

/// Result of the last pass.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Desired state, as resolved from the rules.
    pub(super) desired: Desired,
    /// Actual state, as last read back.
    pub(super) actual: Actual,
    /// Failures of the steps that were carried out last.
    pub(super) failures: Failures,
    /// Connection and byte counts of each relay.
    pub(super) relayed: BTreeMap<RelayKey, Counts>,
    /// The owner of the listener that serves each rule.
    pub(super) listeners: BTreeMap<RuleId, ListenerUser>,
}

impl Report {
    /// Lists the status of every rule, in order.
    pub(super) fn rules(&self) -> Vec<RuleStatus> {
        self.desired.outcomes.iter().map(|outcome| self.rule(outcome)).collect()
    }

    /// Lists the rules whose state has changed, and those that are new or gone.
    pub(super) fn changes_since(&self, before: &Self) -> Vec<RuleChange> {
        let changes = self.states_since(before);
        // Made once, and only if something is gone: thousands of rules may be denied at a time.
        let origins: BTreeMap<RuleId, Origin> = if changes.iter().any(|(_, now)| now.is_none()) {
            before.desired.outcomes.iter().map(|outcome| (outcome.rule.id(), outcome.origin)).collect()
        } else {
            BTreeMap::new()
        };
        let origin = |id: &RuleId| origins.get(id).copied().unwrap_or(Origin::Cli);
        let change = |(id, now): (RuleId, Option<RuleStatus>)| match now {
            Some(status) => RuleChange::State(Box::new(status)),
            None => RuleChange::Removed { origin: origin(&id), id },
        };
        changes.into_iter().map(change).collect()
    }

    /// Lists the changes of [`Report::changes_since`] for subscribers to events, without the rules that are
    /// gone; then the connections that relays refused.
    pub(super) fn news_since(&self, before: &Self) -> impl Iterator<Item = EventKind> {
        let states = self.states_since(before).into_iter().filter_map(|(id, now)| {
            let RuleId { network, port, protocol } = id;
            let RuleStatus { state, why, reasons, .. } = now?;
            Some(EventKind::State { network, port, protocol, state, why, reasons })
        });
        let refused = self.desired.outcomes.iter().filter_map(|outcome| {
            let connections = self.counts(outcome).refused.saturating_sub(before.counts(outcome).refused);
            let RuleId { network, port, protocol } = outcome.rule.id();
            (connections > 0).then_some(EventKind::Refused { network, port, protocol, connections })
        });
        states.chain(refused)
    }

    /// Lists the rules whose state has changed, with the new status; `None` for those that are gone. Compares
    /// states only: a reason may contain text of others' choice, and change at every moment.
    fn states_since(&self, before: &Self) -> Vec<(RuleId, Option<RuleStatus>)> {
        if self.desired.outcomes == before.desired.outcomes && self.failures.steps == before.failures.steps {
            return vec![];
        }
        let states = before.rules().into_iter().map(|rule| (rule.id(), rule.state));
        let mut before: BTreeMap<RuleId, State> = states.collect();
        let mut changes = vec![];
        for rule in self.rules() {
            let id = rule.id();
            if before.remove(&id) != Some(rule.state) {
                changes.push((id, Some(rule)));
            }
        }
        changes.sort_by(|(a, _), (b, _)| a.cmp(b));
        changes.extend(before.into_keys().map(|id| (id, None)));
        changes
    }

    /// Returns the counts of the rule's relays, which count together.
    fn counts(&self, outcome: &RuleOutcome) -> Counts {
        let mut counts = outcome.gateways.iter().filter_map(|gateway| self.relayed.get(gateway.relay()?));
        counts.next().copied().unwrap_or_default()
    }

    /// Returns the state of the host's firewall, which stands in front of the rules.
    pub(super) fn firewall(&self) -> FirewallStatus {
        let firewall_state = &self.actual.firewall_state;
        let untried = firewall_state.probe_results.iter().find_map(|(opening, result)| match result {
            ProbeResult::Unknown(why) => Some(format!("{opening}: {why}")),
            ProbeResult::Open | ProbeResult::Dropped => None,
        });
        FirewallStatus {
            mode: self.desired.firewall,
            firewalls: firewall_state.firewall_kinds().iter().map(ToString::to_string).collect(),
            accept_rules: firewall_state.accepts.values().map(|accepted| accepted.copies).sum(),
            unreadable: firewall_state.unreadable.clone(),
            untried,
        }
    }

    fn rule(&self, outcome: &RuleOutcome) -> RuleStatus {
        let gateways: Vec<_> =
            outcome.gateways.iter().map(|gateway| self.gateway(gateway, &outcome.rule)).collect();
        let dials: Vec<_> = outcome.redirects.iter().map(|dial| self.dial(dial, &gateways)).collect();
        let (state, why, reasons) = if let Some(without) = &outcome.without_gateway {
            (without.state, without.why(), told(without))
        } else {
            // An alias does not count: its clients can dial the gateway, too.
            let gateways = gateways.iter().filter(|g| g.alias.is_none());
            let gateways = gateways.map(|g| (g.state, &g.why, &g.reasons));
            let dials = dials.iter().map(|dial| (dial.state, &dial.why, &dial.reasons));
            let states: Vec<_> = gateways.chain(dials).collect();
            let worst = states.into_iter().rev().max_by_key(|(state, ..)| *state);
            let none = (State::Waiting, None, vec![]);
            worst.map_or(none, |(state, why, reasons)| (state, why.clone(), reasons.clone()))
        };
        let rule = &outcome.rule;
        let counts = self.counts(outcome);
        RuleStatus {
            refused: counts.refused,
            open: counts.open,
            to_service: counts.to_service,
            to_client: counts.to_client,
            network: rule.network.clone(),
            port: rule.spec.port,
            target: rule.spec.target.to_string(),
            protocol: rule.spec.protocol,
            options: rule.options.clone(),
            origin: outcome.origin,
            state,
            why,
            reasons,
            gateways,
            dials,
        }
    }

    /// Returns the status of a dial: the status of its gateway, if the dial's entries and hooks are in place.
    fn dial(&self, meant: &RedirectOutcome, gateways: &[GatewayStatus]) -> DialStatus {
        let entries = meant.keys.iter().all(|key| self.actual.kernel.redirects.contains_key(key));
        let there = self.actual.kernel.hooks[HookSet::Connect] && entries;
        let gateway = gateways.iter().find(|gateway| Some(gateway.address) == meant.gateway);
        let of = |outcome: &Outcome| (outcome.state, outcome.why(), told(outcome));
        let (state, why, reasons) = match gateway {
            _ if meant.outcome.state != State::Steered => of(&meant.outcome),
            Some(gateway) if there => (gateway.state, gateway.why.clone(), gateway.reasons.clone()),
            _ => of(&Outcome::because(State::Blocked, Reason::LocalhostEntryMissing)),
        };
        DialStatus {
            address: meant.address.ip(),
            interface: meant.interface.clone(),
            gateway: meant.gateway,
            containers: self.actual.whose_localhost(meant),
            state,
            why,
            reasons,
        }
    }

    /// Returns `outcome`, or a blocked one if the firewall drops the packets to the gateway.
    fn through_firewall(&self, meant: &GatewayOutcome, outcome: Outcome) -> Outcome {
        let Some(opening) = meant.opening.as_ref().filter(|_| outcome.state != State::Blocked) else {
            return outcome;
        };
        let firewall_state = &self.actual.firewall_state;
        // An opening that was dropped, and for which no accept rule could be put, is not probed again.
        let dropped = match firewall_state.probe_results.get(opening) {
            Some(result) => *result == ProbeResult::Dropped,
            None => self.failures.openings.contains_key(opening),
        };
        if !dropped {
            return outcome;
        }
        let mut reasons = vec![Reason::FirewallDrops(firewall_state.why_dropped(opening))];
        reasons.extend(self.failures.openings.get(opening).cloned().map(Reason::Failed));
        Outcome { state: State::Blocked, reasons }
    }

    fn gateway(&self, meant: &GatewayOutcome, rule: &Rule) -> GatewayStatus {
        let entry = meant.entry_key.and_then(|key| self.actual.kernel.entries.get(&key));
        let relayed = self.actual.relays.get(&meant.relay_key);
        let reached =
            relayed.is_some_and(|spec| !spec.by_entry || entry.is_some_and(|it| self.actual.serves(it)));
        let blocked = |failure: Option<&String>, otherwise: Reason| {
            Outcome::because(State::Blocked, failure.cloned().map_or(otherwise, Reason::Failed))
        };
        let observed = match (meant.outcome.state, entry) {
            (State::Waiting | State::Blocked, _) => meant.outcome.clone(),
            (State::Steered, _) if self.actual.detached => blocked(None, Reason::Detached),
            (State::Steered, Some(entry))
                if !sources(&self.desired.kernel.sources, entry)
                    .is_subset(&sources(&self.actual.kernel.sources, entry)) =>
            {
                let failure = self.failures.entries.get(&entry.key);
                blocked(failure, Reason::SourcesMissing)
            }
            (State::Steered, Some(entry)) if self.actual.serves(entry) => meant.outcome.clone(),
            (State::Steered, Some(entry)) => {
                let failure = self.failures.listeners.get(&entry.target_port);
                blocked(failure, Reason::ListenerUnregistered)
            }
            (State::Steered, None) => {
                let failure = meant.entry_key.and_then(|key| self.failures.entries.get(&key));
                blocked(failure, Reason::EntryMissing)
            }
            (State::Relayed, _) if self.actual.detached && relayed.is_some_and(|relay| relay.by_entry) => {
                blocked(None, Reason::Detached)
            }
            (State::Relayed, _) if reached => meant.outcome.clone(),
            (State::Relayed, _) => {
                let of_entry = meant.entry_key.and_then(|key| self.failures.entries.get(&key));
                let failure = self.failures.relays.get(&meant.relay_key).or(of_entry);
                blocked(failure, Reason::RelayClosed)
            }
        };
        let observed = self.through_firewall(meant, observed);
        let steered = meant.entry_key.and_then(|key| self.actual.steered.get(&key)).copied();
        let by_relay = meant.relay().and_then(|key| self.relayed.get(key)).copied().unwrap_or_default();
        GatewayStatus {
            address: meant.relay_key.address.ip(),
            interface: meant.relay_key.place.interface().to_owned(),
            namespace: match &meant.relay_key.place {
                BindScope::Bridge { .. } => None,
                BindScope::Namespace(key) => Some(namespace(key)),
            },
            alias: meant.alias,
            sources: match (meant.relay().and_then(|key| self.actual.relays.get(key)), entry) {
                (Some(RelaySpec { clients: Clients::Listed(listed), .. }), _) => Some(listed.clone()),
                (None, Some(entry)) if entry.has(Entry::LISTED) => {
                    Some(sources(&self.actual.kernel.sources, entry))
                }
                _ => None,
            },
            listener_user: matches!(observed.state, State::Steered | State::Relayed)
                .then(|| self.listeners.get(&rule.id()).cloned())
                .flatten(),
            state: observed.state,
            why: observed.why(),
            reasons: told(&observed),
            connections: steered.unwrap_or_default() + by_relay.connections,
        }
    }
}

/// Converts the reasons of an outcome to those of the control API.
fn told(outcome: &Outcome) -> Vec<ReasonStatus> {
    outcome.reasons.iter().map(Into::into).collect()
}

/// Lists the addresses in `known` that may use an entry which is not for all.
fn sources(known: &BTreeSet<SourceKey>, entry: &Entry) -> BTreeSet<IpAddr> {
    let of_words = |words| SourceKey { entry: entry.key, source: Address(words) };
    let of_entry = known.range(of_words([0; 4])..=of_words([u32::MAX; 4]));
    of_entry.map(|key| key.source.into()).collect()
}

fn namespace(key: &NamespaceKey) -> NamespaceStatus {
    let path = match &key.entrance {
        NetnsRef::Process { pid, .. } => format!("/proc/{pid}/ns/net").into(),
        NetnsRef::Path(path) => path.clone(),
    };
    NamespaceStatus { path, inode: key.id.inode }
}

/// Lists the rules that were made and removed, with the user who did so.
pub(super) fn changed_by(before: &Rules, now: &Rules, uid: Option<u32>) -> impl Iterator<Item = EventKind> {
    let ids = |rules: &Rules| -> BTreeSet<RuleId> { rules.iter().map(|(id, ..)| id.clone()).collect() };
    let (before, now) = (ids(before), ids(now));
    let made: Vec<_> = now.difference(&before).cloned().collect();
    let removed: Vec<_> = before.difference(&now).cloned().collect();
    let allowed =
        move |RuleId { network, port, protocol }| EventKind::Allowed { network, port, protocol, uid };
    let denied = move |RuleId { network, port, protocol }| EventKind::Denied { network, port, protocol, uid };
    made.into_iter().map(allowed).chain(removed.into_iter().map(denied))
}

/// Converts the kernel's event of a listener; `None` if its kind or port is invalid.
pub(super) fn event_of(event: &ListenerEvent) -> Option<EventKind> {
    let port = u16::try_from(event.port).ok()?;
    match event.kind {
        ListenerEvent::LISTENING => Some(EventKind::Listening { port }),
        ListenerEvent::REFUSED => {
            let error = io::Error::from_raw_os_error(event.error.saturating_neg()).to_string();
            Some(EventKind::Unregistered { port, error })
        }
        ListenerEvent::CLOSED => Some(EventKind::Closed { port }),
        _ => None,
    }
}

//! What `status` says: what is meant, held against what is in force. Pure.

use std::collections::BTreeMap;

use super::executor::Failures;
use crate::{
    api::protocol::{GatewayStatus, RuleStatus},
    planning::{
        policy::{GatewayOutcome, Outcome, Policy, RelayKey, RuleOutcome, State},
        reality::Reality,
    },
    relay::set::Counts,
};

/// What became of the last pass.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// What is meant.
    pub(super) policy: Policy,
    /// What is in force.
    pub(super) reality: Reality,
    /// What failed on the way.
    pub(super) failures: Failures,
    /// What each relay has done.
    pub(super) relayed: BTreeMap<RelayKey, Counts>,
}

impl Report {
    /// Every rule, in order.
    pub(super) fn rules(&self) -> Vec<RuleStatus> {
        self.policy.outcomes.iter().map(|outcome| self.rule(outcome)).collect()
    }

    fn rule(&self, outcome: &RuleOutcome) -> RuleStatus {
        let gateways: Vec<_> = outcome.gateways.iter().map(|gateway| self.gateway(gateway)).collect();
        let (state, why) = if let Some(without) = &outcome.without_gateway {
            (without.state, without.why.clone())
        } else {
            let worst = gateways.iter().rev().max_by_key(|g| g.state);
            worst.map_or((State::Waiting, None), |worst| (worst.state, worst.why.clone()))
        };
        let rule = &outcome.rule;
        RuleStatus {
            network: rule.network.clone(),
            port: rule.spec.port,
            target: rule.spec.target.to_string(),
            source: rule.source,
            path: rule.path,
            comment: rule.comment.clone(),
            origin: outcome.origin,
            state,
            why,
            gateways,
        }
    }

    fn gateway(&self, meant: &GatewayOutcome) -> GatewayStatus {
        let entry = meant.rule_key.and_then(|key| self.reality.entries.get(&key));
        let relayed = self.reality.relays.contains_key(&meant.relay_key);
        let blocked = |failure: Option<&String>, what: &str| {
            Outcome::because(State::Blocked, failure.map_or(what, String::as_str))
        };
        let observed = match (meant.outcome.state, entry) {
            (State::Waiting | State::Blocked, _) => meant.outcome.clone(),
            (State::Steered, _) if self.reality.detached => {
                blocked(None, "the kernel programs are detached, their pins are gone; restart the daemon")
            }
            (State::Steered, Some(entry)) if self.reality.serves(entry) => meant.outcome.clone(),
            (State::Steered, Some(entry)) => {
                let failure = self.failures.listeners.get(&entry.target_port);
                blocked(failure, "its listener is not registered; the daemon's log may say why")
            }
            (State::Steered, None) => {
                let failure = meant.rule_key.and_then(|key| self.failures.entries.get(&key));
                blocked(failure, "the kernel has no entry for it; the daemon's log may say why")
            }
            (State::Relayed, _) if relayed => meant.outcome.clone(),
            (State::Relayed, _) => {
                let failure = self.failures.relays.get(&meant.relay_key);
                blocked(failure, "its relay is not open; the daemon's log may say why")
            }
        };
        let by_relay = self.relayed.get(&meant.relay_key).copied().unwrap_or_default();
        GatewayStatus {
            address: meant.relay_key.address.ip(),
            interface: meant.relay_key.place.interface().to_owned(),
            state: observed.state,
            why: observed.why,
            connections: entry.map_or(0, |entry| entry.steered) + by_relay.connections,
            refused: by_relay.refused,
        }
    }
}

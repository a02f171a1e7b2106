//! What `status` says: what is meant, held against what is in force. Pure.

use std::collections::BTreeMap;

use lbridge_common::wire::RuleKey;

use super::executor::Failures;
use crate::{
    api::protocol::{GatewayStatus, RuleStatus},
    planning::{
        policy::{GatewayOutcome, Outcome, Policy, RelayKey, RuleOutcome, State},
        reality::Reality,
    },
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
    /// Connections of each relay.
    pub(super) relayed: BTreeMap<RelayKey, u64>,
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
        let entry = self.reality.entries.get(&meant.key);
        let relay = self.relay_key(meant);
        let observed = match meant.outcome.state {
            State::Waiting | State::Blocked => meant.outcome.clone(),
            State::Steered => match entry {
                Some(entry) if self.reality.serves(entry) => meant.outcome.clone(),
                Some(_) => {
                    Outcome::because(State::Blocked, self.other_failure("its listener is not registered"))
                }
                None => Outcome::because(State::Blocked, self.entry_failure(&meant.key)),
            },
            State::Relayed => match &relay {
                Some(_) => meant.outcome.clone(),
                None => Outcome::because(State::Blocked, self.relay_failure(meant)),
            },
        };
        let relayed = relay.as_ref().and_then(|key| self.relayed.get(key)).copied().unwrap_or(0);
        GatewayStatus {
            address: meant.gateway.ip(),
            interface: meant.interface.clone(),
            state: observed.state,
            why: observed.why,
            connections: entry.map_or(0, |entry| entry.steered) + relayed,
        }
    }

    fn relay_key(&self, meant: &GatewayOutcome) -> Option<RelayKey> {
        let mut open = self.reality.relays.keys();
        open.find(|key| key.gateway == meant.gateway && key.interface == meant.interface).cloned()
    }

    fn relay_failure(&self, meant: &GatewayOutcome) -> String {
        let mut failed = self.failures.relays.iter();
        let failure =
            failed.find(|(key, _)| key.gateway == meant.gateway && key.interface == meant.interface);
        failure.map_or_else(|| self.other_failure("its relay is not open"), |(_, text)| text.clone())
    }

    fn entry_failure(&self, key: &RuleKey) -> String {
        let failure = self.failures.entries.get(key).cloned();
        failure.unwrap_or_else(|| self.other_failure("the kernel has no entry for it"))
    }

    fn other_failure(&self, what: &str) -> String {
        match self.failures.others.first() {
            Some(failure) => format!("{what}: {failure}"),
            None => what.to_owned(),
        }
    }
}

//! Load: computes from two samples of `status` how busy each rule is, for `lbridge top`.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    api::protocol::RuleStatus,
    planning::{
        desired::State,
        rule::{Network, Protocol, RuleId},
    },
};

/// One sample of all rules.
#[derive(Debug, Serialize)]
pub(super) struct Look {
    /// The time of the sample.
    pub(super) at: Timestamp,
    /// The load of each rule, the busiest first.
    pub(super) rules: Vec<Load>,
}

/// The load of a rule.
#[derive(Debug, Serialize)]
pub(super) struct Load {
    /// The rule's network.
    pub(super) network: Network,
    /// The rule's dialled port.
    pub(super) port: u16,
    /// The rule's IP protocol.
    pub(super) protocol: Protocol,
    /// The rule's state.
    pub(super) state: State,
    /// New connections per second since the previous sample.
    pub(super) per_second: f64,
    /// Number of connections since the entry was put or the relay opened.
    pub(super) connections: u64,
    /// The counts that only relays have; `None` if nothing was relayed.
    pub(super) relayed: Option<Relayed>,
}

/// The load of a rule's relays.
#[derive(Debug, Serialize)]
pub(super) struct Relayed {
    /// Number of connections that are open now.
    pub(super) open: u32,
    /// Bytes moved to the service.
    pub(super) to_service: u64,
    /// Bytes moved to the client.
    pub(super) to_client: u64,
}

/// The number of connections of each rule in one sample.
pub(super) type Counts = BTreeMap<RuleId, u64>;

fn connections(rule: &RuleStatus) -> u64 {
    rule.gateways.iter().map(|gateway| gateway.connections).sum()
}

/// Returns the number of connections of each rule so far.
pub(super) fn counts(rules: &[RuleStatus]) -> Counts {
    rules.iter().map(|rule| (rule.id(), connections(rule))).collect()
}

/// Computes the load since `before`, over `time`. A rule that is not in `before` was just made.
pub(super) fn look(rules: Vec<RuleStatus>, before: &Counts, time: Duration, at: Timestamp) -> Look {
    let load = |rule: RuleStatus| {
        let connections = connections(&rule);
        let id = rule.id();
        // A new entry starts its count at 0.
        let since = before.get(&id).filter(|then| **then <= connections).copied().unwrap_or(0);
        let new = u32::try_from(connections - since).unwrap_or(u32::MAX);
        let has_relayed =
            rule.state == State::Relayed || rule.open > 0 || rule.to_service > 0 || rule.to_client > 0;
        Load {
            network: id.network,
            port: id.port,
            protocol: id.protocol,
            state: rule.state,
            per_second: f64::from(new) / time.as_secs_f64(),
            connections,
            relayed: has_relayed.then_some(Relayed {
                open: rule.open,
                to_service: rule.to_service,
                to_client: rule.to_client,
            }),
        }
    };
    let mut rules: Vec<_> = rules.into_iter().map(load).collect();
    // Rules with the same load stay in their order.
    rules.sort_by(|a, b| b.per_second.total_cmp(&a.per_second));
    Look { at, rules }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::protocol::GatewayStatus;

    fn rule(port: u16, connections: u64) -> RuleStatus {
        let gateway = GatewayStatus {
            address: "172.18.0.1".parse().unwrap(),
            namespace: None,
            sources: None,
            listener_user: None,
            alias: None,
            interface: "br-app".to_owned(),
            state: State::Steered,
            why: None,
            reasons: vec![],
            connections,
        };
        RuleStatus::example("app", port, "", vec![gateway])
    }

    #[test]
    fn the_busiest_come_first() {
        let before = counts(&[rule(80, 10), rule(81, 10), rule(82, 100)]);
        let now = vec![rule(80, 10), rule(81, 30), rule(82, 4), rule(83, 0)];
        let look = look(now, &before, Duration::from_secs(2), Timestamp::UNIX_EPOCH);
        let seen: Vec<_> = look.rules.iter().map(|rule| (rule.port, rule.per_second)).collect();
        // The entry of 82 was put again.
        assert_eq!(seen, [(81, 10.0), (82, 2.0), (80, 0.0), (83, 0.0)]);
        assert!(look.rules.iter().all(|rule| rule.relayed.is_none()));
    }
}

//! Sources: the containers that can use a gateway under a rule for some containers, and why others cannot.

use std::{collections::BTreeSet, net::IpAddr};

use lbridge_common::wire::{EntryKey, SourceKey};

use super::Resolver;
use crate::planning::{
    desired::{Outcome, State, Subnet},
    grant::{Grant, addresses_on, networks_meant},
    hint,
    inventory::{DockerNetwork, EngineAvailability},
    reason::Reason,
    rule::{Network, Rule},
};

/// The sources that can use one gateway, of the containers that a rule is for.
#[derive(Default)]
pub(super) struct Sources {
    /// Addresses of the containers that can use the gateway.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Each of these addresses, with the container that it belongs to.
    grants: Vec<(IpAddr, Grant)>,
    /// Names of the containers that can use the gateway.
    served: Vec<String>,
    /// The reasons why the other containers cannot.
    missing: Vec<Reason>,
}

impl Sources {
    /// Returns the grants of the addresses that may use the entry of this key.
    pub(super) fn grants(&self, rule: EntryKey) -> impl Iterator<Item = (SourceKey, Grant)> {
        self.grants
            .iter()
            .map(move |(ip, grant)| (SourceKey { entry: rule, source: (*ip).into() }, grant.clone()))
    }

    /// Adds the containers that are served, and those that are missing, to the outcome. If no container is
    /// served, the rule waits.
    pub(super) fn told(self, outcome: Outcome) -> Outcome {
        if outcome.state == State::Blocked {
            return outcome;
        }
        let state = if self.served.is_empty() { State::Waiting } else { outcome.state };
        let mut reasons = if state == outcome.state { outcome.reasons } else { vec![] };
        reasons.extend((!self.served.is_empty()).then_some(Reason::ForContainers(self.served)));
        reasons.extend(self.missing);
        Outcome { state, reasons }
    }
}

impl Resolver<'_> {
    /// Returns the engine's networks that a rule for some containers can mean; empty for a rule for all.
    pub(super) fn networks_of(
        &self,
        network: &Network,
        from: &BTreeSet<String>,
    ) -> Result<Vec<&DockerNetwork>, Outcome> {
        let networks = &self.inventory.docker_networks;
        match network {
            _ if from.is_empty() => Ok(vec![]),
            Network::Bridge(name) => {
                let on_bridge = networks_meant(network, networks);
                let (state, reason) = match self.inventory.docker {
                    _ if !on_bridge.is_empty() => return Ok(on_bridge),
                    EngineAvailability::Off => (State::Blocked, Reason::FromWithoutEngine),
                    EngineAvailability::Away => (State::Waiting, Reason::FromWhileEngineAway(name.clone())),
                    EngineAvailability::Reachable => {
                        (State::Blocked, Reason::FromOnForeignBridge(name.clone()))
                    }
                };
                Err(Outcome::because(state, reason))
            }
            _ => Ok(networks_meant(network, networks)),
        }
    }

    /// Returns the sources of a rule at one gateway: its containers' addresses in the gateway's subnet.
    pub(super) fn sources(&self, rule: &Rule, gateway: IpAddr, subnet: Subnet) -> Sources {
        let networks = self.networks_of(&rule.network, &rule.options.from).unwrap_or_default();
        let mut sources = Sources::default();
        for name in &rule.options.from {
            let addresses = self.addresses(name, &rule.network, &networks).and_then(|addresses| {
                let fits = |ip: &IpAddr| subnet.contains(*ip) && *ip != gateway;
                let here: Vec<_> = addresses.into_iter().filter(fits).collect();
                let none = || Reason::ContainerWithoutAddress { name: name.clone(), gateway };
                if here.is_empty() { Err(none()) } else { Ok(here) }
            });
            match addresses {
                Ok(addresses) => {
                    sources.served.push(name.clone());
                    let grant = Grant { network: rule.network.clone(), container: name.clone() };
                    sources.grants.extend(addresses.iter().map(|ip| (*ip, grant.clone())));
                    sources.addresses.extend(addresses);
                }
                Err(reason) => sources.missing.push(reason),
            }
        }
        sources
    }

    /// Returns the addresses of a container on these networks, or the reason why it has none.
    pub(super) fn addresses(
        &self,
        name: &str,
        meant: &Network,
        networks: &[&DockerNetwork],
    ) -> Result<Vec<IpAddr>, Reason> {
        let name = || name.to_owned();
        let container = match (self.inventory.containers.get(&name()), self.inventory.docker) {
            (Some(Ok(container)), _) => container,
            (Some(Err(error)), _) => {
                return Err(Reason::ContainerError { name: name(), error: error.clone() });
            }
            (None, EngineAvailability::Reachable) => {
                let hint = hint::unknown_container(&name(), self.inventory);
                return Err(Reason::NoSuchContainer { name: name(), hint });
            }
            (None, _) => return Err(Reason::ContainerUnseen(name())),
        };
        if !container.running {
            return Err(Reason::ContainerStopped(name()));
        }
        addresses_on(&container.attachments, networks).ok_or_else(|| {
            let on = container.attachments.iter().map(|there| there.network.clone()).collect();
            Reason::ContainerElsewhere { name: name(), network: meant.clone(), on }
        })
    }
}

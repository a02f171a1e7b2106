//! Rules for some containers: who of them can use a gateway, and why others cannot.

use std::{collections::BTreeSet, net::IpAddr};

use lbridge_common::wire::{RuleKey, SourceKey};

use super::Resolver;
use crate::planning::{
    grant::{Grant, addresses_on, networks_meant},
    hint,
    inventory::{DockerNetwork, DockerPresence},
    policy::{Outcome, State, Subnet},
    rule::{Network, Rule},
};

/// Who of those that a rule is for can use it at one gateway.
#[derive(Default)]
pub(super) struct Sources {
    /// Their addresses.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Which container each address is of.
    grants: Vec<(IpAddr, Grant)>,
    /// Their names.
    served: Vec<String>,
    /// Why others cannot.
    missing: Vec<String>,
}

impl Sources {
    /// The grants of those addresses that may use the entry of this key.
    pub(super) fn grants(&self, rule: RuleKey) -> impl Iterator<Item = (SourceKey, Grant)> {
        self.grants.iter().map(move |(ip, grant)| (SourceKey { rule, source: (*ip).into() }, grant.clone()))
    }

    /// With whom it is for; and if there is nobody, it waits for them.
    pub(super) fn told(self, outcome: Outcome) -> Outcome {
        if outcome.state == State::Blocked {
            return outcome;
        }
        let state = if self.served.is_empty() { State::Waiting } else { outcome.state };
        let why = outcome.why.filter(|_| state == outcome.state);
        let served = (!self.served.is_empty()).then(|| format!("for {}", self.served.join(", ")));
        let why: Vec<_> = why.into_iter().chain(served).chain(self.missing).collect();
        Outcome::because(state, why.join("; "))
    }
}

impl Resolver<'_> {
    /// The engine's networks that a rule for some containers can mean; none where it is for all.
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
                let (state, why) = match self.inventory.docker {
                    _ if !on_bridge.is_empty() => return Ok(on_bridge),
                    DockerPresence::Off => (
                        State::Blocked,
                        "the daemon runs with --no-docker, and knows no container's address".to_owned(),
                    ),
                    DockerPresence::Away => (
                        State::Waiting,
                        format!("Docker is away, and no network of its on {name} was seen before"),
                    ),
                    DockerPresence::Reachable => (
                        State::Blocked,
                        format!(
                            "{name} is no Docker network's bridge, so Docker knows no container's address there"
                        ),
                    ),
                };
                Err(Outcome::because(state, format!("{why}; leave --from out")))
            }
            _ => Ok(networks_meant(network, networks)),
        }
    }

    /// The addresses of the containers that a rule is for, of those that a gateway's subnet has.
    pub(super) fn sources(&self, rule: &Rule, gateway: IpAddr, subnet: Subnet) -> Sources {
        let networks = self.networks_of(&rule.network, &rule.from).unwrap_or_default();
        let mut sources = Sources::default();
        for name in &rule.from {
            let addresses = self.addresses(name, &rule.network, &networks).and_then(|addresses| {
                let fits = |ip: &IpAddr| subnet.contains(*ip) && *ip != gateway;
                let here: Vec<_> = addresses.into_iter().filter(fits).collect();
                let family = if gateway.is_ipv4() { "IPv4" } else { "IPv6" };
                let none = || format!("container {name} has no {family} address beside {gateway}");
                if here.is_empty() { Err(none()) } else { Ok(here) }
            });
            match addresses {
                Ok(addresses) => {
                    sources.served.push(name.clone());
                    let grant = Grant { network: rule.network.clone(), container: name.clone() };
                    sources.grants.extend(addresses.iter().map(|ip| (*ip, grant.clone())));
                    sources.addresses.extend(addresses);
                }
                Err(why) => sources.missing.push(why),
            }
        }
        sources
    }

    /// The addresses of a container on one of these networks, or why it has none.
    pub(super) fn addresses(
        &self,
        name: &str,
        meant: &Network,
        networks: &[&DockerNetwork],
    ) -> Result<Vec<IpAddr>, String> {
        let container = match (self.inventory.containers.get(name), self.inventory.docker) {
            (Some(Ok(container)), _) => container,
            (Some(Err(why)), _) => return Err(format!("container {name}: {why}")),
            (None, DockerPresence::Reachable) => {
                return Err(format!("no container {name}{}", hint::unknown_container(name, self.inventory)));
            }
            (None, _) => return Err(format!("Docker is away, and container {name} was not seen before")),
        };
        if !container.running {
            return Err(format!("container {name} does not run"));
        }
        addresses_on(&container.attachments, networks).ok_or_else(|| {
            let on: Vec<_> = container.attachments.iter().map(|there| there.network.as_str()).collect();
            let on = if on.is_empty() { String::new() } else { format!(", but on {}", on.join(" and ")) };
            format!("container {name} is not on {meant}{on}")
        })
    }
}

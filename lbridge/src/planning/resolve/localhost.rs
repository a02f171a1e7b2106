//! Localhost: leads the containers' own localhost to a gateway, under rules that say so.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lbridge_common::wire::{Endpoint, Redirect, RedirectKey, TCP};

use super::Resolver;
use crate::planning::{
    desired::{BindScope, GatewayOutcome, Outcome, RedirectOutcome, State},
    hooks::HookSet,
    reason::Reason,
    rule::Rule,
};

impl Resolver<'_> {
    /// Leads the port of the containers' localhost to the network's gateways: 127.0.0.1 to an IPv4 gateway,
    /// ::1 to the gateway that serves best, since most sockets for IPv6 take IPv4 as well.
    pub(super) fn localhost(&mut self, rule: &Rule, gateways: &[GatewayOutcome]) -> Vec<RedirectOutcome> {
        self.desired.kernel.hooks[HookSet::Connect] |= self.features.hooks[HookSet::Connect].is_ok();
        // Every gateway of a rule is on the same bridge.
        let Some(BindScope::Bridge { interface, ifindex }) = gateways.first().map(|g| &g.relay_key.place)
        else {
            return vec![];
        };
        let served = |gateway: &&GatewayOutcome| gateway.outcome.state != State::Blocked;
        let is_v4 = |gateway: &GatewayOutcome| gateway.relay_key.address.is_ipv4();
        let v4 = gateways.iter().filter(served).find(|gateway| is_v4(gateway));
        let best = gateways.iter().filter(served).min_by_key(|g| (g.outcome.state, is_v4(g)));
        let ways = [(IpAddr::from(Ipv4Addr::LOCALHOST), v4), (Ipv6Addr::LOCALHOST.into(), best)];
        ways.into_iter()
            .filter(|(ip, _)| ip.is_ipv6() || gateways.iter().any(is_v4))
            .map(|(ip, gateway)| {
                let gateway = gateway.map(|gateway| gateway.relay_key.address.ip());
                let (protocol, port) = (u16::from(TCP), rule.spec.port);
                let key =
                    |netns| RedirectKey { address: ip.into(), ifindex: *ifindex, port, protocol, netns };
                let keys: Vec<_> = self.namespaces_of(rule).into_iter().map(key).collect();
                let outcome = self.redirect(&keys, gateway);
                let (address, interface) = (SocketAddr::new(ip, port), interface.clone());
                RedirectOutcome { address, keys, gateway, interface, ifindex: *ifindex, outcome }
            })
            .collect()
    }

    /// Returns the cookies of the network namespaces whose localhost a rule is about; 0 stands for every
    /// namespace on the bridge.
    fn namespaces_of(&self, rule: &Rule) -> BTreeSet<u64> {
        if rule.options.from.is_empty() {
            return [0].into();
        }
        let networks = self.networks_of(&rule.network, &rule.options.from).unwrap_or_default();
        let is_there = |name: &&String| self.addresses(name, &rule.network, &networks).is_ok();
        let container = |name| self.inventory.containers.get(name)?.as_ref().ok()?.netns;
        rule.options.from.iter().filter(is_there).filter_map(container).collect()
    }

    fn redirect(&mut self, keys: &[RedirectKey], gateway: Option<IpAddr>) -> Outcome {
        if let Err(why) = &self.features.hooks[HookSet::Connect] {
            return Outcome::because(State::Blocked, Reason::NoConnectHooks(why.clone()));
        }
        let Some(gateway) = gateway else {
            return Outcome::because(State::Blocked, Reason::NoGatewayServed);
        };
        if keys.is_empty() {
            return Outcome::because(State::Waiting, Reason::NoContainerThere);
        }
        for key in keys {
            let gateway = Endpoint::new(gateway.into(), key.port);
            self.desired.kernel.redirects.insert(*key, Redirect { key: *key, gateway, reserved: 0 });
        }
        self.desired.kernel.hooks[HookSet::Names] |= self.features.hooks[HookSet::Names].is_ok();
        Outcome::steered()
    }
}

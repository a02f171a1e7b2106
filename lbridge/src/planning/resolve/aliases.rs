//! Aliases: other addresses of the host that containers dial, beside the gateways.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::Resolver;
use crate::planning::{
    desired::{Alias, GatewayOutcome, RuleOutcome, State},
    inventory::{DEFAULT_NETWORK, Interface},
    rule::Protocol,
};

impl Resolver<'_> {
    /// Adds the other addresses of the host that the containers may dial. The rule's state stays the same if
    /// an alias cannot be served.
    pub(super) fn add_aliases(&mut self, of: &mut RuleOutcome) {
        // A UDP service answers a network from one address, the gateway.
        let is_udp = of.rule.spec.protocol == Protocol::Udp;
        if of.gateways.is_empty() || of.rule.network.is_namespace() || is_udp {
            return;
        }
        let Ok(bridge) = self.bridge(&of.rule.network).cloned() else { return };
        for (ip, alias) in self.aliases(&bridge) {
            // The first of the bridge's own addresses that could be dialled as well: an entry has one subnet.
            let serves = |own: &&(IpAddr, u8)| {
                let is_it = |gateway: &&GatewayOutcome| gateway.relay_key.address.ip() == own.0;
                own.0.is_ipv4() == ip.is_ipv4()
                    && of.gateways.iter().find(is_it).is_some_and(|g| g.outcome.state != State::Blocked)
            };
            if let Some(own) = bridge.addresses.iter().find(serves) {
                of.gateways.push(self.gateway(&of.rule, &bridge, *own, Some((ip, alias))));
            }
        }
    }

    /// Returns the addresses of other interfaces by which this bridge's containers know the host.
    fn aliases(&self, bridge: &Interface) -> BTreeMap<IpAddr, Alias> {
        let inventory = self.inventory;
        let mut networks = inventory.docker_networks.iter();
        let mut aliases: BTreeMap<_, _> = inventory.aliases.iter().map(|ip| (*ip, Alias::Setting)).collect();
        if networks.clone().any(|network| network.bridge.as_ref() == Some(&bridge.name)) {
            let default = networks.find(|network| network.name == DEFAULT_NETWORK);
            let default = default.and_then(|network| inventory.interface(network.bridge.as_ref()?));
            let its = default.iter().flat_map(|docker0| docker0.addresses.iter().map(|(ip, _)| *ip));
            let told = inventory.host_gateways.iter().copied();
            aliases.extend(its.chain(told).map(|ip| (ip, Alias::HostGateway)));
        }
        let others =
            inventory.interfaces.iter().filter(|other| other.name != "lo" && other.name != bridge.name);
        let theirs: BTreeSet<_> =
            others.flat_map(|other| other.addresses.iter().map(|(ip, _)| *ip)).collect();
        let own = |ip: &IpAddr| bridge.addresses.iter().any(|(own, _)| own == ip);
        aliases.retain(|ip, _| theirs.contains(ip) && !own(ip));
        aliases
    }
}

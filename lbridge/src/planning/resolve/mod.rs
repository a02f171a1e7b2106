//! Resolve: decides for each rule and each address that can be dialled, given what was observed.
//!
//! - `bridge`: which bridge a network is;
//! - `sources`: whom of it a rule is for;
//! - `way`: how what is dialled can be served, given who listens;
//! - `localhost`, `aliases`: what else leads to a gateway.

mod aliases;
mod bridge;
mod localhost;
mod sources;
mod way;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lbridge_common::{
    verdict::listening_addresses,
    wire::{
        Address, Endpoint, ListenerKey, LoopbackView, Reply, ReplyKey, RuleKey, RuleValue, SourceKey,
        TargetKey, ViewKey,
    },
};

use self::way::{Way, is_suitable};
use super::{
    firewall::{Link, Opening},
    hooks::HookSet,
    inventory::{Abilities, Absence, Interface, Inventory, Namespace, NamespaceId},
    owner::{Sockets, loopback},
    policy::{
        Alias, Clients, GatewayOutcome, Outcome, Place, Policy, RelayKey, RelaySpec, RuleOutcome, Service,
        State, Subnet, stand_in_for,
    },
    reason::Reason,
    rule::{DEFAULT_CONNECTIONS, Network, Origin, Protocol, Rule, RuleId, Rules, Source, Target},
};

/// Decides for each rule and gateway.
pub fn resolve(rules: &Rules, inventory: &Inventory, abilities: &Abilities) -> Policy {
    let mut resolver = Resolver::new(inventory, abilities);
    for (_, rule, origin) in rules.iter() {
        let outcome = resolver.rule(rule, origin);
        resolver.policy.outcomes.push(outcome);
    }
    // What is some network's gateway is that first.
    let mut outcomes = std::mem::take(&mut resolver.policy.outcomes);
    for outcome in &mut outcomes {
        resolver.add_aliases(outcome);
    }
    resolver.policy.outcomes = outcomes;
    let wanted = std::mem::take(&mut resolver.registered).into_iter();
    resolver.policy.listeners = wanted.map(|(key, inodes)| (key, inodes.into_iter().collect())).collect();
    resolver.policy.steering = abilities.steer.as_ref().ok().copied();
    resolver.policy
}

/// The bridge that a network is, or what keeps its rules from being served.
pub(super) fn bridge_of(
    network: &Network,
    inventory: &Inventory,
    abilities: &Abilities,
) -> Result<Interface, Outcome> {
    Resolver::new(inventory, abilities).bridge(network).cloned()
}

/// Where a service has to listen for a rule to lead to it.
fn targets(rule: &Rule) -> impl Iterator<Item = TargetKey> {
    let protocol = rule.spec.protocol.number().into();
    let (addresses, port) = match &rule.spec.target {
        Target::Port(port) => (vec![loopback(true), loopback(false)], *port),
        Target::Address(address) => (vec![address.ip()], address.port()),
        Target::Unix(_) => (vec![], 0),
    };
    let bound = addresses.into_iter().flat_map(|ip| listening_addresses(&ip.into()).collect::<Vec<_>>());
    bound.map(move |address| TargetKey { address, port, protocol })
}

struct Resolver<'a> {
    inventory: &'a Inventory,
    abilities: &'a Abilities,
    policy: Policy,
    sockets: Sockets<'a>,
    /// What `policy.listeners` is to hold, each socket once.
    registered: BTreeMap<ListenerKey, BTreeSet<u64>>,
    /// Addresses that a rule has, whatever becomes of it: the first in order, not the first whose service is up. A
    /// namespace is one, whichever way leads there.
    claimed: BTreeMap<(SocketAddr, Protocol, Claim), RuleId>,
}

/// Whose an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    Bridge(u32),
    Namespace(NamespaceId),
}

/// No socket is bound to port 0: what meets an entry that leads there is refused.
const NOBODY: Endpoint = Endpoint::new(Address::ANY_V6, 0);

impl<'a> Resolver<'a> {
    fn new(inventory: &'a Inventory, abilities: &'a Abilities) -> Self {
        Self {
            inventory,
            abilities,
            policy: Policy::default(),
            sockets: Sockets::new(inventory),
            registered: BTreeMap::new(),
            claimed: BTreeMap::new(),
        }
    }
}

impl Resolver<'_> {
    fn rule(&mut self, rule: &Rule, origin: Origin) -> RuleOutcome {
        self.policy.targets.extend(targets(rule));
        let (gateways, without_gateway) =
            if rule.network.is_namespace() { self.in_namespace(rule) } else { self.on_bridge(rule) };
        let dials = if rule.localhost { self.localhost(rule, &gateways) } else { vec![] };
        RuleOutcome { rule: rule.clone(), origin, gateways, without_gateway, dials }
    }

    fn on_bridge(&mut self, rule: &Rule) -> (Vec<GatewayOutcome>, Option<Outcome>) {
        match self.bridge(&rule.network) {
            Err(outcome) => (vec![], Some(outcome)),
            Ok(bridge) if bridge.addresses.is_empty() => {
                (vec![], Some(Outcome::because(State::Waiting, Reason::NoGateway(bridge.name.clone()))))
            }
            Ok(bridge) => {
                if let Err(outcome) = self.networks_of(&rule.network, &rule.from) {
                    return (vec![], Some(outcome));
                }
                let bridge = bridge.clone();
                let own = bridge.addresses.iter();
                let gateways = own.map(|own| self.gateway(rule, &bridge, *own, None)).collect();
                (gateways, None)
            }
        }
    }

    fn in_namespace(&mut self, rule: &Rule) -> (Vec<GatewayOutcome>, Option<Outcome>) {
        let inventory = self.inventory;
        let without = |state, reason| (vec![], Some(Outcome::because(state, reason)));
        match inventory.namespaces.get(&rule.network) {
            None => without(State::Waiting, Reason::NotLookedAt),
            Some(Err(Absence::NotThere(why))) => without(State::Waiting, Reason::NoNamespace(why.clone())),
            Some(Err(Absence::Unsuitable(why))) => {
                without(State::Blocked, Reason::UnsuitableNamespace(why.clone()))
            }
            Some(Ok(namespace)) if namespace.loopback.is_empty() => {
                without(State::Waiting, Reason::LoopbackDown)
            }
            Some(Ok(namespace)) => {
                let inside = namespace.loopback.iter();
                (inside.map(|ip| self.inside(rule, namespace, *ip)).collect(), None)
            }
        }
    }

    fn inside(&mut self, rule: &Rule, namespace: &Namespace, ip: IpAddr) -> GatewayOutcome {
        let relay_key = RelayKey {
            address: SocketAddr::new(ip, rule.spec.port),
            place: Place::Namespace(namespace.key.clone()),
        };
        let claim = Claim::Namespace(namespace.key.id);
        let way = self.way(rule, relay_key.address, claim, " in that namespace");
        let told = namespace.address.unwrap_or_else(|| stand_in_for(namespace.key.id).into());
        let outcome = self.outcome(rule, way, &relay_key, None, Clients::Inside(told));
        GatewayOutcome { relay_key, rule_key: None, opening: None, alias: None, outcome }
    }

    /// At one of a bridge's own addresses, or at another one of the host's that its containers dial as well.
    fn gateway(
        &mut self,
        rule: &Rule,
        bridge: &Interface,
        (own, prefix): (IpAddr, u8),
        alias: Option<(IpAddr, Alias)>,
    ) -> GatewayOutcome {
        let (interface, index) = (bridge.name.as_str(), bridge.index);
        let ip = alias.map_or(own, |(ip, _)| ip);
        let gateway = SocketAddr::new(ip, rule.spec.port);
        let subnet = Subnet::of(own, prefix);
        let opening = Opening::new(interface, (own, prefix), ip, rule.spec.protocol, rule.spec.port);
        let rule_key = opening.entry(if self.checks_interface() { index } else { 0 });
        let place = Place::Bridge { interface: interface.to_owned(), ifindex: index };
        let relay_key = RelayKey { address: gateway, place };
        let mut way = self.way(rule, gateway, Claim::Bridge(index), "");
        // Without the interface an alias is one for all networks.
        if alias.is_some() && !self.checks_interface() {
            way = match way {
                Way::Refuse(outcome) => Way::None(outcome),
                Way::Kernel(..) if self.policy.entries.contains_key(&rule_key) => {
                    let taken = Reason::AliasTaken { alias: gateway, gateway: own };
                    Way::None(Outcome::because(State::Blocked, taken))
                }
                way => way,
            };
        }
        let kernel = (rule_key, subnet);
        let outcome = if rule.from.is_empty() {
            self.outcome(rule, way, &relay_key, Some(kernel), Clients::Subnet(subnet))
        } else {
            let sources = self.sources(rule, own, subnet);
            let clients = Clients::Listed(sources.addresses.clone());
            let is_refused = matches!(way, Way::Refuse(_));
            let outcome = self.outcome(rule, way, &relay_key, Some(kernel), clients);
            // Of a rule that is blocked nothing is in force but what refuses; the key may be another's.
            if outcome.state != State::Blocked || is_refused {
                for (key, grant) in sources.grants(rule_key) {
                    if self.policy.sources.contains(&key) {
                        self.policy.grants.entry(key).or_default().insert(grant);
                    }
                }
            }
            sources.told(outcome)
        };
        // While a service is down its clients are to be refused at once, so that the way has to be open then, too. But only where
        // an entry, or a relay that listens, keeps what comes through from the host's other services.
        let is_guarded = self.checks_interface()
            || self.policy.entries.contains_key(&rule_key)
            || self.policy.relays.contains_key(&relay_key);
        if outcome.state != State::Blocked && is_guarded {
            let via = alias.map(|_| own);
            self.policy.openings.insert(opening.clone(), Link { ifindex: index, via });
        }
        let alias = alias.map(|(_, alias)| alias);
        GatewayOutcome { relay_key, rule_key: Some(rule_key), opening: Some(opening), alias, outcome }
    }

    /// Returns true if the kernel steers, and tells by which interface a packet came in.
    fn checks_interface(&self) -> bool {
        self.abilities.steer.as_ref().is_ok_and(|steering| steering.interface_check)
    }

    /// Notes a kernel entry for these clients; the addresses and netmasks that it serves.
    fn put_entry(
        &mut self,
        key: RuleKey,
        subnet: Subnet,
        clients: &Clients,
        target: Endpoint,
        mut flags: u16,
    ) -> Vec<(Address, Address)> {
        let mut served = vec![(subnet.base, subnet.mask)];
        if let Clients::Listed(listed) = clients {
            flags |= RuleValue::LISTED;
            let listed: Vec<Address> = listed.iter().copied().map(Address::from).collect();
            self.policy.sources.extend(listed.iter().map(|source| SourceKey { rule: key, source: *source }));
            served = listed.into_iter().map(|ip| (ip, Address([u32::MAX; 4]))).collect();
        }
        let (Subnet { base: subnet, mask }, Endpoint { address: target, port: target_port, .. }) =
            (subnet, target);
        let entry = RuleValue { key, subnet, mask, target, target_port, flags, reserved: [0; 2], steered: 0 };
        self.policy.entries.insert(key, entry);
        served
    }

    /// Notes what a way needs to be in force.
    fn outcome(
        &mut self,
        rule: &Rule,
        way: Way,
        relay_key: &RelayKey,
        kernel: Option<(RuleKey, Subnet)>,
        clients: Clients,
    ) -> Outcome {
        match (way, kernel) {
            (Way::None(outcome), _) | (Way::Refuse(outcome), None) => outcome,
            (Way::Refuse(outcome), Some((rule_key, subnet))) => {
                self.put_entry(rule_key, subnet, &clients, NOBODY, 0);
                outcome
            }
            (Way::Kernel(..), None) => Outcome::because(State::Blocked, Reason::NoBridgeLeads),
            (Way::Kernel(target, outcome), Some((rule_key, subnet))) => {
                if rule.spec.protocol == Protocol::Udp
                    && let Err(blocked) = self.replies(target, rule_key.gateway, subnet)
                {
                    return blocked;
                }
                let served = self.put_entry(rule_key, subnet, &clients, target, 0);
                self.register(rule, target);
                if rule.source == Source::Loopback {
                    // Those that are served alone: whoever takes the connections of others is not to take them for local ones.
                    let gateway = Endpoint::new(rule_key.gateway, rule_key.port);
                    let view = LoopbackView { gateway, target };
                    let key = |(peer, mask)| (ViewKey { gateway, peer }, ViewKey::prefix_len(&mask));
                    self.policy.views.extend(served.into_iter().map(|peer| (key(peer), view)));
                    self.policy.hooks[HookSet::Names] = true;
                }
                outcome
            }
            // Nobody to listen for.
            (Way::Relay(_, reasons), _) if clients == Clients::Listed(BTreeSet::new()) => {
                Outcome { state: State::Relayed, reasons }
            }
            (Way::Relay(service, reasons), kernel) => {
                let kernel = kernel.filter(|_| self.checks_interface());
                if let Some((rule_key, subnet)) = kernel {
                    self.put_entry(rule_key, subnet, &clients, NOBODY, RuleValue::RELAYED);
                }
                // Without hooks a relay shows an address of its own instead, see `relay::stand_in`.
                self.policy.hooks[HookSet::Names] |= rule.source == Source::Container
                    && matches!(service, Service::Tcp(_))
                    && self.abilities.hooks[HookSet::Names].is_ok();
                let spec = RelaySpec {
                    rule: rule.id(),
                    service,
                    source: rule.source,
                    clients,
                    by_entry: kernel.is_some(),
                    proxy_protocol: rule.proxy_protocol,
                    max_connections: rule.max_connections.map_or(DEFAULT_CONNECTIONS, Into::into),
                    idle_timeout: rule.idle_timeout,
                };
                self.policy.relays.insert(relay_key.clone(), spec);
                Outcome { state: State::Relayed, reasons }
            }
        }
    }

    /// What a UDP service sends to the subnet is to leave with the gateway as its source. Not what it sends to the host itself.
    fn replies(&mut self, service: Endpoint, gateway: Address, subnet: Subnet) -> Result<(), Outcome> {
        let key = |peer, mask: &Address| (ReplyKey { service, peer }, ReplyKey::prefix_len(mask));
        let to_subnet = key(subnet.base, &subnet.mask);
        // The hook that chooses the source does not know what its receiver has dialled.
        if let Some(first) = self.policy.replies.get(&to_subnet).filter(|first| first.gateway != gateway) {
            let only = Reason::OneAnswerAddress(first.gateway.into());
            return Err(Outcome::because(State::Blocked, only));
        }
        self.policy.replies.insert(to_subnet, Reply { service, gateway });
        self.policy.hooks[HookSet::Replies] = true;
        let own = self.inventory.interfaces.iter().flat_map(|interface| &interface.addresses);
        for (ip, _) in own.filter(|(ip, _)| subnet.contains(*ip)) {
            let to_host = key((*ip).into(), &Address([u32::MAX; 4]));
            self.policy.replies.insert(to_host, Reply { service, gateway: Address::ANY_V6 });
        }
        Ok(())
    }

    /// Has the listeners of a rule's service registered that an entry may name.
    fn register(&mut self, rule: &Rule, target: Endpoint) {
        let (protocol, is_its) = (rule.spec.protocol, self.sockets.of_service(rule));
        let addresses: Vec<_> = listening_addresses(&target.address).collect();
        for listener in self.sockets.on(protocol, target.port) {
            let address = Address::from(listener.address.ip());
            let suitable = is_suitable(listener.kind) && listener.bound_interface == 0;
            if suitable && is_its(listener) && addresses.contains(&address) {
                let key = ListenerKey { address, port: target.port, slot: 0, protocol: protocol.number() };
                self.registered.entry(key).or_default().insert(listener.inode);
            }
        }
    }
}

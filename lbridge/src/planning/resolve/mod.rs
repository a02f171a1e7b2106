//! Resolve: decides, for each rule and each address that can be dialled, how it is served, given the
//! inventory.
//!
//! - `bridge`: the bridge that a network is;
//! - `sources`: the containers that a rule is for;
//! - `datapath`: the datapath that serves what is dialled, given who listens;
//! - `localhost`, `aliases`: the other addresses that lead to a gateway.

mod aliases;
mod bridge;
mod datapath;
mod localhost;
mod sources;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lbridge_common::{
    verdict::listening_addresses,
    wire::{
        Address, Endpoint, Entry, EntryKey, ListenerKey, NameOverride, OverrideKey, ReplySource,
        ReplySourceKey, SourceKey, TargetKey,
    },
};

use self::datapath::{Datapath, is_suitable};
use super::{
    desired::{
        Alias, BindScope, Clients, Desired, GatewayOutcome, Outcome, RelayKey, RelaySpec, RuleOutcome,
        Service, State, Subnet, stand_in_for,
    },
    firewall::{FirewallMode, Opening, ProbeRoute},
    hooks::HookSet,
    inventory::{Interface, Inventory, KernelFeatures, Namespace, NamespaceId, NetnsUnavailable},
    owner::{Sockets, loopback},
    reason::Reason,
    rule::{DEFAULT_CONNECTIONS, Network, Origin, Protocol, Rule, RuleId, Rules, Source, Target},
};

/// Returns the desired state: the decisions for each rule and gateway. `firewall` is a setting, which the
/// plan needs.
pub fn resolve(
    rules: &Rules,
    inventory: &Inventory,
    features: &KernelFeatures,
    firewall: FirewallMode,
) -> Desired {
    let mut resolver = Resolver::new(inventory, features);
    for (_, rule, origin) in rules.iter() {
        let outcome = resolver.rule(rule, origin);
        resolver.desired.outcomes.push(outcome);
    }
    // An address that is some network's gateway is that first, so aliases come last.
    let mut outcomes = std::mem::take(&mut resolver.desired.outcomes);
    for outcome in &mut outcomes {
        resolver.add_aliases(outcome);
    }
    resolver.desired.outcomes = outcomes;
    let wanted = std::mem::take(&mut resolver.registered).into_iter();
    resolver.desired.listeners = wanted.map(|(key, inodes)| (key, inodes.into_iter().collect())).collect();
    resolver.desired.firewall = firewall;
    resolver.desired.steering = features.steer.as_ref().ok().copied();
    resolver.desired
}

/// Returns the bridge that a network is, or the outcome that keeps the network's rules from being served.
pub(super) fn bridge_of(
    network: &Network,
    inventory: &Inventory,
    features: &KernelFeatures,
) -> Result<Interface, Outcome> {
    Resolver::new(inventory, features).bridge(network).cloned()
}

/// Returns the addresses and ports at which a service must listen for a rule to lead to it.
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
    features: &'a KernelFeatures,
    desired: Desired,
    sockets: Sockets<'a>,
    /// The listeners that `desired.listeners` will hold, each socket once.
    registered: BTreeMap<ListenerKey, BTreeSet<u64>>,
    /// Addresses that a rule has claimed, whatever its outcome: the first rule in order, not the first whose
    /// service is up. A namespace is one place, through whichever entrance it is found.
    claimed: BTreeMap<(SocketAddr, Protocol, Claim), RuleId>,
}

/// The bridge (by interface index) or namespace that an address is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    Bridge(u32),
    Namespace(NamespaceId),
}

/// The endpoint of an entry that refuses: no socket is bound to port 0, so the kernel refuses what such an
/// entry matches.
const NOBODY: Endpoint = Endpoint::new(Address::ANY_V6, 0);

impl<'a> Resolver<'a> {
    fn new(inventory: &'a Inventory, features: &'a KernelFeatures) -> Self {
        Self {
            inventory,
            features,
            desired: Desired::default(),
            sockets: Sockets::new(inventory),
            registered: BTreeMap::new(),
            claimed: BTreeMap::new(),
        }
    }
}

impl Resolver<'_> {
    fn rule(&mut self, rule: &Rule, origin: Origin) -> RuleOutcome {
        self.desired.kernel.targets.extend(targets(rule));
        let (gateways, without_gateway) =
            if rule.network.is_namespace() { self.in_namespace(rule) } else { self.on_bridge(rule) };
        let redirects = if rule.options.localhost { self.localhost(rule, &gateways) } else { vec![] };
        RuleOutcome { rule: rule.clone(), origin, gateways, without_gateway, redirects }
    }

    fn on_bridge(&mut self, rule: &Rule) -> (Vec<GatewayOutcome>, Option<Outcome>) {
        match self.bridge(&rule.network) {
            Err(outcome) => (vec![], Some(outcome)),
            Ok(bridge) if bridge.addresses.is_empty() => {
                (vec![], Some(Outcome::because(State::Waiting, Reason::NoGateway(bridge.name.clone()))))
            }
            Ok(bridge) => {
                if let Err(outcome) = self.networks_of(&rule.network, &rule.options.from) {
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
            Some(Err(NetnsUnavailable::NotThere(why))) => {
                without(State::Waiting, Reason::NoNamespace(why.clone()))
            }
            Some(Err(NetnsUnavailable::Unsuitable(why))) => {
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
            place: BindScope::Namespace(namespace.key.clone()),
        };
        let claim = Claim::Namespace(namespace.key.id);
        let way = self.way(rule, relay_key.address, claim, " in that namespace");
        let told = namespace.address.unwrap_or_else(|| stand_in_for(namespace.key.id).into());
        let outcome = self.outcome(rule, way, &relay_key, None, Clients::Inside(told));
        GatewayOutcome { relay_key, entry_key: None, opening: None, alias: None, outcome }
    }

    /// Decides for one of a bridge's own addresses, or for an alias that the bridge's containers dial as
    /// well.
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
        let entry_key = opening.entry(if self.checks_interface() { index } else { 0 });
        let place = BindScope::Bridge { interface: interface.to_owned(), ifindex: index };
        let relay_key = RelayKey { address: gateway, place };
        let mut way = self.way(rule, gateway, Claim::Bridge(index), "");
        // Without the interface check, an alias is one address for all networks.
        if alias.is_some() && !self.checks_interface() {
            way = match way {
                Datapath::Refuse(outcome) => Datapath::None(outcome),
                Datapath::Kernel(..) if self.desired.kernel.entries.contains_key(&entry_key) => {
                    let taken = Reason::AliasTaken { alias: gateway, gateway: own };
                    Datapath::None(Outcome::because(State::Blocked, taken))
                }
                way => way,
            };
        }
        let kernel = (entry_key, subnet);
        let outcome = if rule.options.from.is_empty() {
            self.outcome(rule, way, &relay_key, Some(kernel), Clients::Subnet(subnet))
        } else {
            let sources = self.sources(rule, own, subnet);
            let clients = Clients::Listed(sources.addresses.clone());
            let is_refused = matches!(way, Datapath::Refuse(_));
            let outcome = self.outcome(rule, way, &relay_key, Some(kernel), clients);
            // A blocked rule has nothing in force but what refuses, and the key may be another rule's.
            if outcome.state != State::Blocked || is_refused {
                for (key, grant) in sources.grants(entry_key) {
                    if self.desired.kernel.sources.contains(&key) {
                        self.desired.grants.entry(key).or_default().insert(grant);
                    }
                }
            }
            sources.told(outcome)
        };
        // While a service is down its clients must be refused at once, so the firewall must be open then,
        // too. But only where an entry, or a relay that listens, keeps what comes through from the host's
        // other services.
        let is_guarded = self.checks_interface()
            || self.desired.kernel.entries.contains_key(&entry_key)
            || self.desired.relays.contains_key(&relay_key);
        if outcome.state != State::Blocked && is_guarded {
            let via = alias.map(|_| own);
            self.desired.openings.insert(opening.clone(), ProbeRoute { ifindex: index, via });
        }
        let alias = alias.map(|(_, alias)| alias);
        GatewayOutcome { relay_key, entry_key: Some(entry_key), opening: Some(opening), alias, outcome }
    }

    /// Returns true if the kernel steers, and tells the interface that a packet came in by.
    fn checks_interface(&self) -> bool {
        self.features.steer.as_ref().is_ok_and(|steering| steering.interface_check)
    }

    /// Adds a kernel entry for these clients. Returns the addresses and netmasks that the entry serves.
    fn put_entry(
        &mut self,
        key: EntryKey,
        subnet: Subnet,
        clients: &Clients,
        target: Endpoint,
        mut flags: u16,
    ) -> Vec<(Address, Address)> {
        let mut served = vec![(subnet.base, subnet.mask)];
        if let Clients::Listed(listed) = clients {
            flags |= Entry::LISTED;
            let listed: Vec<Address> = listed.iter().copied().map(Address::from).collect();
            self.desired
                .kernel
                .sources
                .extend(listed.iter().map(|source| SourceKey { entry: key, source: *source }));
            served = listed.into_iter().map(|ip| (ip, Address([u32::MAX; 4]))).collect();
        }
        let (Subnet { base: subnet, mask }, Endpoint { address: target, port: target_port, .. }) =
            (subnet, target);
        let entry = Entry { key, subnet, mask, target, target_port, flags, reserved: [0; 2] };
        self.desired.kernel.entries.insert(key, entry);
        served
    }

    /// Adds to the desired state what a way needs, and returns the outcome.
    fn outcome(
        &mut self,
        rule: &Rule,
        way: Datapath,
        relay_key: &RelayKey,
        kernel: Option<(EntryKey, Subnet)>,
        clients: Clients,
    ) -> Outcome {
        match (way, kernel) {
            (Datapath::None(outcome), _) | (Datapath::Refuse(outcome), None) => outcome,
            (Datapath::Refuse(outcome), Some((entry_key, subnet))) => {
                self.put_entry(entry_key, subnet, &clients, NOBODY, 0);
                outcome
            }
            (Datapath::Kernel(..), None) => Outcome::because(State::Blocked, Reason::NoBridgeLeads),
            (Datapath::Kernel(target, outcome), Some((entry_key, subnet))) => {
                if rule.spec.protocol == Protocol::Udp
                    && let Err(blocked) = self.reply_sources(target, entry_key.gateway, subnet)
                {
                    return blocked;
                }
                let served = self.put_entry(entry_key, subnet, &clients, target, 0);
                self.register(rule, target);
                if rule.options.source == Source::Loopback {
                    // Only for clients that are served: a service that takes the connections of others must
                    // not take them for local ones.
                    let gateway = Endpoint::new(entry_key.gateway, entry_key.port);
                    let names = NameOverride { gateway, target };
                    let key = |(peer, mask)| (OverrideKey { gateway, peer }, OverrideKey::prefix_len(&mask));
                    self.desired.kernel.overrides.extend(served.into_iter().map(|peer| (key(peer), names)));
                    self.desired.kernel.hooks[HookSet::Names] = true;
                }
                outcome
            }
            // Nobody to listen for.
            (Datapath::Relay(_, reasons), _) if clients == Clients::Listed(BTreeSet::new()) => {
                Outcome { state: State::Relayed, reasons }
            }
            (Datapath::Relay(service, reasons), kernel) => {
                let kernel = kernel.filter(|_| self.checks_interface());
                if let Some((entry_key, subnet)) = kernel {
                    self.put_entry(entry_key, subnet, &clients, NOBODY, Entry::RELAYED);
                }
                // Without hooks a relay shows an address of its own instead, see
                // `desired::stand_in_for_container`.
                self.desired.kernel.hooks[HookSet::Names] |= rule.options.source == Source::Container
                    && matches!(service, Service::Tcp(_))
                    && self.features.hooks[HookSet::Names].is_ok();
                let spec = RelaySpec {
                    rule: rule.id(),
                    service,
                    source: rule.options.source,
                    clients,
                    by_entry: kernel.is_some(),
                    proxy_protocol: rule.options.proxy_protocol,
                    max_connections: rule.options.max_connections.map_or(DEFAULT_CONNECTIONS, Into::into),
                    idle_timeout: rule.options.idle_timeout,
                };
                self.desired.relays.insert(relay_key.clone(), spec);
                Outcome { state: State::Relayed, reasons }
            }
        }
    }

    /// Makes what a UDP service sends to the subnet leave with the gateway as its source, but not what it
    /// sends to the host itself. Fails if the service's replies to that subnet have another gateway as their
    /// source already.
    fn reply_sources(&mut self, service: Endpoint, gateway: Address, subnet: Subnet) -> Result<(), Outcome> {
        let key = |peer, mask: &Address| (ReplySourceKey { service, peer }, ReplySourceKey::prefix_len(mask));
        let to_subnet = key(subnet.base, &subnet.mask);
        // The hook that chooses the source does not know which address its receiver has dialled.
        if let Some(first) =
            self.desired.kernel.reply_sources.get(&to_subnet).filter(|first| first.gateway != gateway)
        {
            let only = Reason::OneAnswerAddress(first.gateway.into());
            return Err(Outcome::because(State::Blocked, only));
        }
        self.desired.kernel.reply_sources.insert(to_subnet, ReplySource { service, gateway });
        self.desired.kernel.hooks[HookSet::Replies] = true;
        let own = self.inventory.interfaces.iter().flat_map(|interface| &interface.addresses);
        for (ip, _) in own.filter(|(ip, _)| subnet.contains(*ip)) {
            let to_host = key((*ip).into(), &Address([u32::MAX; 4]));
            self.desired
                .kernel
                .reply_sources
                .insert(to_host, ReplySource { service, gateway: Address::ANY_V6 });
        }
        Ok(())
    }

    /// Adds the listeners of a rule's service that an entry may name to those that are registered.
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

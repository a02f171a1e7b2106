//! Resolve: decides for each rule and each address that can be dialled, given what was observed.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use lbridge_common::{
    verdict::listening_addresses,
    wire::{
        Address, Dial, DialKey, Endpoint, ListenerKey, LoopbackView, Reply, ReplyKey, RuleKey, RuleValue,
        SourceKey, TCP, TargetKey, ViewKey,
    },
};

use super::{
    firewall::{Link, Opening},
    hint,
    inventory::{
        Abilities, Absence, Attachment, DEFAULT_NETWORK, DockerNetwork, DockerPresence, Interface, Inventory,
        Listener, ListenerKind, Namespace, NamespaceId, find_networks,
    },
    policy::{
        Alias, Clients, DialOutcome, GatewayOutcome, Outcome, Place, Policy, RelayKey, RelaySpec,
        RuleOutcome, Service, State, Subnet, stand_in_for,
    },
    rule::{DEFAULT_CONNECTIONS, Network, Origin, PathChoice, Protocol, Rule, RuleId, Rules, Source, Target},
};

/// Decides for each rule and gateway.
pub fn resolve(rules: &Rules, inventory: &Inventory, abilities: &Abilities) -> Policy {
    let mut resolver = Resolver {
        inventory,
        abilities,
        policy: Policy::default(),
        by_port: BTreeMap::new(),
        claimed: BTreeMap::new(),
    };
    for (protocol, sockets) in sockets(inventory) {
        for socket in sockets {
            resolver.by_port.entry((protocol, socket.address.port())).or_default().push(socket);
        }
    }
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
    resolver.listeners_to_register();
    resolver.policy
}

/// The bridge that a network is, or what keeps its rules from being served.
pub(super) fn bridge_of(
    network: &Network,
    inventory: &Inventory,
    abilities: &Abilities,
) -> Result<Interface, Outcome> {
    let resolver = Resolver {
        inventory,
        abilities,
        policy: Policy::default(),
        by_port: BTreeMap::new(),
        claimed: BTreeMap::new(),
    };
    resolver.bridge(network).cloned()
}

/// What takes connections or datagrams on the host.
fn sockets(inventory: &Inventory) -> [(Protocol, &[Listener]); 2] {
    [Protocol::Tcp, Protocol::Udp].map(|protocol| (protocol, inventory.sockets(protocol)))
}

/// How a connection to one gateway can be served.
enum Way {
    /// By the kernel, given this listener; or by nobody yet, with everything in place for a service that starts.
    Kernel(Endpoint, Outcome),
    /// By the daemon.
    Relay(Service, String),
    /// Not at all.
    None(Outcome),
}

/// A loopback service that was found.
struct Found {
    /// Where it can be connected to.
    at: SocketAddr,
    /// Why the kernel cannot be given its listener, if it cannot.
    obstacle: Option<String>,
}

/// Who of those that a rule is for can use it at one gateway.
#[derive(Default)]
struct Sources {
    /// Their addresses.
    addresses: BTreeSet<IpAddr>,
    /// Their names.
    served: Vec<String>,
    /// Why others cannot.
    missing: Vec<String>,
}

impl Sources {
    /// With whom it is for; and if there is nobody, it waits for them.
    fn told(self, outcome: Outcome) -> Outcome {
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

const MPTCP: &str =
    "the service listens with MPTCP; GODEBUG=multipathtcp=0 in a Go service's environment gets it steered";

struct Resolver<'a> {
    inventory: &'a Inventory,
    abilities: &'a Abilities,
    policy: Policy,
    by_port: BTreeMap<(Protocol, u16), Vec<&'a Listener>>,
    /// Addresses that a rule has, whatever becomes of it: the first in order, not the first whose service is up. A
    /// namespace is one, whichever way leads there.
    claimed: BTreeMap<(SocketAddr, Protocol, Claim), RuleId>,
}

/// Whose an address is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    Bridge(u32),
    Namespace(NamespaceId),
}

impl Resolver<'_> {
    fn rule(&mut self, rule: &Rule, origin: Origin) -> RuleOutcome {
        let protocol = rule.spec.protocol.number().into();
        self.policy.targets.extend(rule.spec.target.port().map(|port| TargetKey { port, protocol }));
        let (gateways, without_gateway) =
            if rule.network.is_namespace() { self.in_namespace(rule) } else { self.on_bridge(rule) };
        let dials = if rule.localhost { self.localhost(rule, &gateways) } else { vec![] };
        RuleOutcome { rule: rule.clone(), origin, gateways, without_gateway, dials }
    }

    /// Leads the port of the containers' localhost to the network's gateways: 127.0.0.1 to an IPv4 one, ::1 to whichever serves
    /// best, since most sockets for IPv6 take IPv4 as well.
    fn localhost(&mut self, rule: &Rule, gateways: &[GatewayOutcome]) -> Vec<DialOutcome> {
        self.policy.connect_hooks |= self.abilities.connect_hooks.is_ok();
        // Every gateway of a rule is on the same bridge.
        let Some(Place::Bridge { interface, ifindex }) = gateways.first().map(|g| &g.relay_key.place) else {
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
                let key = |netns| DialKey { address: ip.into(), ifindex: *ifindex, port, protocol, netns };
                let keys: Vec<_> = self.namespaces_of(rule).into_iter().map(key).collect();
                let outcome = self.dial(&keys, gateway);
                let address = SocketAddr::new(ip, port);
                DialOutcome {
                    address,
                    keys,
                    gateway,
                    interface: interface.clone(),
                    ifindex: *ifindex,
                    outcome,
                }
            })
            .collect()
    }

    /// Whose localhost a rule is about, by cookie; 0 is everybody's on the bridge.
    fn namespaces_of(&self, rule: &Rule) -> BTreeSet<u64> {
        if rule.from.is_empty() {
            return [0].into();
        }
        let networks = self.networks_of(&rule.network, &rule.from).unwrap_or_default();
        let is_there = |name: &&String| self.addresses(name, &rule.network, &networks).is_ok();
        let container = |name| self.inventory.containers.get(name)?.as_ref().ok()?.netns;
        rule.from.iter().filter(is_there).filter_map(container).collect()
    }

    fn dial(&mut self, keys: &[DialKey], gateway: Option<IpAddr>) -> Outcome {
        if let Err(why) = &self.abilities.connect_hooks {
            return Outcome::because(State::Blocked, why);
        }
        let Some(gateway) = gateway else {
            return Outcome::because(State::Blocked, "no gateway is served that it could lead to");
        };
        if keys.is_empty() {
            return Outcome::because(State::Waiting, "none of its containers runs there");
        }
        for key in keys {
            let gateway = Endpoint::new(gateway.into(), key.port);
            self.policy.dials.insert(*key, Dial { key: *key, gateway, reserved: 0 });
        }
        self.policy.name_hooks |= self.abilities.name_hooks.is_ok();
        Outcome::steered()
    }

    fn on_bridge(&mut self, rule: &Rule) -> (Vec<GatewayOutcome>, Option<Outcome>) {
        match self.bridge(&rule.network) {
            Err(outcome) => (vec![], Some(outcome)),
            Ok(bridge) if bridge.addresses.is_empty() => {
                let why = format!("{} has no address that a container could dial", bridge.name);
                (vec![], Some(Outcome::because(State::Waiting, why)))
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

    /// Other addresses of the host that the containers may take for it. What they cannot have leaves the rule as it is.
    fn add_aliases(&mut self, of: &mut RuleOutcome) {
        // A UDP service answers a network from one address, the gateway.
        let is_udp = of.rule.spec.protocol == Protocol::Udp;
        if of.gateways.is_empty() || of.rule.network.is_namespace() || is_udp {
            return;
        }
        let Ok(bridge) = self.bridge(&of.rule.network).cloned() else { return };
        for (ip, alias) in self.aliases(&bridge) {
            // The first of its own that could be dialled as well: an entry has one subnet.
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

    /// The addresses of other interfaces that this bridge's containers know the host by.
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

    fn in_namespace(&mut self, rule: &Rule) -> (Vec<GatewayOutcome>, Option<Outcome>) {
        let inventory = self.inventory;
        let without = |state, why: &str| (vec![], Some(Outcome::because(state, why)));
        match inventory.namespaces.get(&rule.network) {
            None => without(State::Waiting, "not looked at yet"),
            Some(Err(Absence::NotThere(why))) => without(State::Waiting, why),
            Some(Err(Absence::Unsuitable(why))) => without(State::Blocked, why),
            Some(Ok(namespace)) if namespace.loopback.is_empty() => {
                without(State::Waiting, "its loopback interface is down; run `ip link set lo up` inside")
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
        GatewayOutcome { relay_key, rule_key: None, alias: None, outcome }
    }

    fn bridge(&self, network: &Network) -> Result<&Interface, Outcome> {
        let (name, of_engine) = match network {
            Network::Container(_) | Network::Netns(_) | Network::Process(_) => {
                return Err(Outcome::because(State::Blocked, "it is no bridge"));
            }
            Network::Bridge(name) => (name, None),
            Network::Docker(name) => match find_networks(&self.inventory.docker_networks, name)[..] {
                [] => return Err(self.unknown_network(name)),
                [network] => match &network.bridge {
                    Some(bridge) => (bridge, Some(network)),
                    None => return Err(without_bridge(network)),
                },
                [..] => {
                    let why = format!("several Docker networks are called {name}; name the id of one");
                    return Err(Outcome::because(State::Blocked, why));
                }
            },
        };
        match self.inventory.interface(name) {
            // An uplink here would open the port to the LAN.
            Some(interface) if !interface.is_bridge => Err(Outcome::because(
                State::Blocked,
                format!("{name} is not a bridge; name the bridge that the containers are on"),
            )),
            // It may be another network's by now.
            Some(interface) if of_engine.is_some_and(|network| !network.means(interface)) => {
                let why = format!("{name} is newer than what the engine said of it");
                Err(Outcome::because(State::Waiting, why))
            }
            Some(interface) => Ok(interface),
            None => {
                let comes = of_engine.is_some_and(|network| network.bridge_index.is_some());
                let comes = if comes { "; it comes with the network's first container" } else { "" };
                Err(Outcome::because(State::Waiting, format!("there is no interface {name}{comes}")))
            }
        }
    }

    fn unknown_network(&self, name: &str) -> Outcome {
        match self.inventory.docker {
            DockerPresence::Off => Outcome::because(
                State::Blocked,
                "the daemon runs with --no-docker; name the bridge instead: bridge:IFNAME",
            ),
            DockerPresence::Away => Outcome::because(
                State::Waiting,
                format!("Docker is away, and network {name} was not seen before"),
            ),
            DockerPresence::Reachable => {
                let hint = hint::unknown_network(name, self.inventory);
                Outcome::because(State::Waiting, format!("no Docker network {name}{hint}"))
            }
        }
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
        let checked = self.abilities.steer.as_ref().is_ok_and(|s| s.interface_check);
        let ifindex = if checked { index } else { 0 };
        let protocol = rule.spec.protocol.number().into();
        let rule_key = RuleKey { gateway: ip.into(), ifindex, port: rule.spec.port, protocol };
        let place = Place::Bridge { interface: interface.to_owned(), ifindex: index };
        let relay_key = RelayKey { address: gateway, place };
        let mut way = self.way(rule, gateway, Claim::Bridge(index), "");
        if matches!(way, Way::Kernel(..)) && alias.is_some() && self.policy.entries.contains_key(&rule_key) {
            let why = format!(
                "another network's rule has {gateway}, and this kernel does not tell by which bridge it is dialled; dial {own}"
            );
            way = Way::None(Outcome::because(State::Blocked, why));
        }
        let kernel = (rule_key, subnet);
        let outcome = if rule.from.is_empty() {
            self.outcome(rule, way, &relay_key, Some(kernel), Clients::Subnet(subnet))
        } else {
            let sources = self.sources(rule, own, subnet);
            let clients = Clients::Listed(sources.addresses.clone());
            sources.told(self.outcome(rule, way, &relay_key, Some(kernel), clients))
        };
        // While a service is down its clients are to be refused at once, so that the way has to be open then, too.
        if outcome.state != State::Blocked {
            let (protocol, port) = (rule.spec.protocol, rule.spec.port);
            let opening = Opening { interface: interface.to_owned(), gateway: ip, protocol, port };
            let via = alias.map(|_| own);
            self.policy.openings.insert(opening, Link { ifindex: index, prefix, via });
        }
        GatewayOutcome { relay_key, rule_key: Some(rule_key), alias: alias.map(|(_, alias)| alias), outcome }
    }

    /// The engine's networks that a rule for some containers can mean; none where it is for all.
    fn networks_of(
        &self,
        network: &Network,
        from: &BTreeSet<String>,
    ) -> Result<Vec<&DockerNetwork>, Outcome> {
        let networks = &self.inventory.docker_networks;
        match network {
            _ if from.is_empty() => Ok(vec![]),
            Network::Docker(name) => Ok(find_networks(networks, name)),
            Network::Bridge(name) => {
                let on_bridge: Vec<_> =
                    networks.iter().filter(|network| network.bridge.as_ref() == Some(name)).collect();
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
            Network::Container(_) | Network::Netns(_) | Network::Process(_) => Ok(vec![]),
        }
    }

    /// The addresses of the containers that a rule is for, of those that a gateway's subnet has.
    fn sources(&self, rule: &Rule, gateway: IpAddr, subnet: Subnet) -> Sources {
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
                    sources.addresses.extend(addresses);
                }
                Err(why) => sources.missing.push(why),
            }
        }
        sources
    }

    /// The addresses of a container on one of these networks, or why it has none.
    fn addresses(
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
        let is_there = |there: &&Attachment| networks.iter().any(|network| there.is_on(network));
        let mut there = container.attachments.iter().filter(is_there).peekable();
        if there.peek().is_none() {
            let on: Vec<_> = container.attachments.iter().map(|there| there.network.as_str()).collect();
            let on = if on.is_empty() { String::new() } else { format!(", but on {}", on.join(" and ")) };
            return Err(format!("container {name} is not on {meant}{on}"));
        }
        Ok(there.flat_map(|there| there.addresses.iter().copied()).collect())
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
            (Way::None(outcome), _) => outcome,
            (Way::Kernel(..), None) => Outcome::because(State::Blocked, "no bridge leads there"),
            (Way::Kernel(target, outcome), Some((rule_key, subnet))) => {
                if rule.spec.protocol == Protocol::Udp
                    && let Err(blocked) = self.replies(target, rule_key.gateway, subnet)
                {
                    return blocked;
                }
                let mut flags = 0;
                if let Clients::Listed(listed) = clients {
                    flags |= RuleValue::LISTED;
                    let key = |ip: IpAddr| SourceKey { rule: rule_key, source: ip.into() };
                    self.policy.sources.extend(listed.into_iter().map(key));
                }
                let value = RuleValue {
                    key: rule_key,
                    subnet: subnet.base,
                    mask: subnet.mask,
                    target: target.address,
                    target_port: target.port,
                    flags,
                    reserved: [0; 2],
                    steered: 0,
                };
                self.policy.entries.insert(rule_key, value);
                if rule.source == Source::Loopback {
                    let gateway = Endpoint::new(rule_key.gateway, rule_key.port);
                    let key = (ViewKey { gateway, peer: subnet.base }, ViewKey::prefix_len(&subnet.mask));
                    self.policy.views.insert(key, LoopbackView { gateway, target });
                    self.policy.name_hooks = true;
                }
                outcome
            }
            // Nobody to listen for.
            (Way::Relay(_, why), _) if clients == Clients::Listed(BTreeSet::new()) => {
                Outcome::because(State::Relayed, why)
            }
            (Way::Relay(service, why), _) => {
                // Without hooks a relay shows an address of its own instead, see `relay::stand_in`.
                self.policy.name_hooks |= rule.source == Source::Container
                    && matches!(service, Service::Tcp(_))
                    && self.abilities.name_hooks.is_ok();
                let spec = RelaySpec {
                    rule: rule.id(),
                    service,
                    source: rule.source,
                    clients,
                    proxy_protocol: rule.proxy_protocol,
                    max_connections: rule.max_connections.map_or(DEFAULT_CONNECTIONS, Into::into),
                    idle_timeout: rule.idle_timeout,
                };
                self.policy.relays.insert(relay_key.clone(), spec);
                Outcome::because(State::Relayed, why)
            }
        }
    }

    /// What a UDP service sends to the subnet is to leave with the gateway as its source. Not what it sends to the host itself.
    fn replies(&mut self, service: Endpoint, gateway: Address, subnet: Subnet) -> Result<(), Outcome> {
        let key = |peer, mask: &Address| (ReplyKey { service, peer }, ReplyKey::prefix_len(mask));
        let to_subnet = key(subnet.base, &subnet.mask);
        // The hook that chooses the source does not know what its receiver has dialled.
        if let Some(first) = self.policy.replies.get(&to_subnet).filter(|first| first.gateway != gateway) {
            let first = IpAddr::from(first.gateway);
            let why =
                format!("a UDP service answers one subnet from one address, which is {first}; dial that");
            return Err(Outcome::because(State::Blocked, why));
        }
        self.policy.replies.insert(to_subnet, Reply { service, gateway });
        let own = self.inventory.interfaces.iter().flat_map(|interface| &interface.addresses);
        for (ip, _) in own.filter(|(ip, _)| subnet.contains(*ip)) {
            let to_host = key((*ip).into(), &Address([u32::MAX; 4]));
            self.policy.replies.insert(to_host, Reply { service, gateway: Address::ANY_V6 });
        }
        Ok(())
    }

    /// How connections to an address can be served, if no rule before this one has it.
    fn way(&mut self, rule: &Rule, dialled: SocketAddr, claim: Claim, place: &str) -> Way {
        match self.claimed.entry((dialled, rule.spec.protocol, claim)) {
            Entry::Occupied(first) => {
                let why = format!("rule {} has {dialled}{place} already; deny one of them", first.get());
                return Way::None(Outcome::because(State::Blocked, why));
            }
            Entry::Vacant(free) => free.insert(rule.id()),
        };
        self.way_to_service(rule, dialled.ip())
    }

    fn way_to_service(&self, rule: &Rule, gateway: IpAddr) -> Way {
        let target = match &rule.spec.target {
            Target::Unix(path) => return self.unix_way(rule, path),
            Target::Port(port) => SocketAddr::new(loopback(gateway.is_ipv4()), *port),
            Target::Address(address) => *address,
        };
        // The kernel gives a connection only to a listener of its family.
        let same_family = target.is_ipv4() == gateway.is_ipv4();
        let (service, obstacle) = match self.find(rule, target, gateway) {
            Some(found) => (Some(found.at), self.obstacle(rule).or(found.obstacle)),
            None => (None, self.obstacle(rule)),
        };
        let entry = Endpoint::new(target.ip().into(), target.port());
        let waiting = || Outcome::because(State::Waiting, format!("nothing listens on {target}"));
        match (service, obstacle) {
            (Some(_), None) => Way::Kernel(entry, Outcome::steered()),
            // The entry is put all the same: the kernel registers a service that starts, daemon or no daemon.
            (None, None) if same_family => Way::Kernel(entry, waiting()),
            (_, Some(why)) if rule.path == PathChoice::Steer || rule.spec.protocol == Protocol::Udp => {
                Way::None(Outcome::because(State::Blocked, why))
            }
            (None, _) => Way::None(waiting()),
            (Some(at), Some(why)) => self.relay(rule, at, why),
        }
    }

    /// Why the kernel is not to have the rule's connections, whatever listens.
    fn obstacle(&self, rule: &Rule) -> Option<String> {
        if rule.path == PathChoice::Relay {
            return Some("as the rule asks".to_owned());
        }
        if rule.network.is_namespace() {
            return Some("on localhost inside".to_owned());
        }
        if let Some(why) = rule.needs_relay() {
            return Some(why.to_owned());
        }
        if let Err(why) = &self.abilities.steer {
            return Some(why.clone());
        }
        if rule.spec.protocol == Protocol::Udp {
            return self.obstacle_of_udp();
        }
        let missing = self.abilities.name_hooks.as_ref().err().filter(|_| rule.source == Source::Loopback)?;
        Some(format!("--source loopback without name hooks: {missing}"))
    }

    fn obstacle_of_udp(&self) -> Option<String> {
        // There is no handshake that a false source would fail.
        if !self.abilities.steer.as_ref().is_ok_and(|steering| steering.interface_check) {
            return Some(
                "UDP needs Linux 5.17: this kernel does not tell on which bridge a datagram comes in"
                    .to_owned(),
            );
        }
        if let Some(why) = &self.inventory.udp_unseen {
            return Some(why.clone());
        }
        let why = self.abilities.replies.as_ref().err()?;
        Some(format!("UDP services could not answer: {why}"))
    }

    /// What serves connections to `target` that come in at `gateway`. One that is found across the families always has
    /// an obstacle.
    fn find(&self, rule: &Rule, target: SocketAddr, gateway: IpAddr) -> Option<Found> {
        let same_family = target.is_ipv4() == gateway.is_ipv4();
        let there = self.serving(rule.spec.protocol, target);
        if let Some(first) = there.first() {
            // A SO_REUSEPORT group may be mixed; one that the kernel takes is enough.
            let suitable = there.iter().any(|listener| is_suitable(listener.kind));
            let obstacle = match first.kind {
                _ if suitable && same_family => None,
                ListenerKind::Mptcp => Some(MPTCP.to_owned()),
                ListenerKind::Refused(errno) => {
                    let why = io::Error::from_raw_os_error(errno);
                    Some(format!("the kernel refused to register the listener: {why}"))
                }
                ListenerKind::Tcp | ListenerKind::Udp => Some(family_mismatch(gateway, first.address)),
            };
            return Some(Found { at: target, obstacle });
        }
        let at = self.other_family(rule, target)?;
        Some(Found { at, obstacle: Some(family_mismatch(gateway, at)) })
    }

    fn relay(&self, rule: &Rule, service: SocketAddr, why: String) -> Way {
        // There is one IPv6 loopback address, so nothing to stand in for the container.
        if let (Err(missing), true, Source::Container) =
            (&self.abilities.name_hooks, service.is_ipv6(), rule.source)
        {
            let why = format!(
                "the service on {service} would take the container for a local client ({missing}); allow it with --source loopback"
            );
            return Way::None(Outcome::because(State::Blocked, why));
        }
        Way::Relay(Service::Tcp(service), why)
    }

    fn unix_way(&self, rule: &Rule, path: &Path) -> Way {
        if rule.path == PathChoice::Steer {
            return Way::None(Outcome::because(State::Blocked, "a Unix socket can only be relayed to"));
        }
        if rule.source == Source::Container {
            let why =
                "the service would see root as its peer, not the container; allow it with --source loopback";
            return Way::None(Outcome::because(State::Blocked, why));
        }
        if let Some(why) = self.inventory.untrusted_paths.get(path) {
            return Way::None(Outcome::because(State::Blocked, why));
        }
        if !self.inventory.unix_listeners.contains(path) {
            let why = format!("nothing listens on {}", rule.spec.target);
            return Way::None(Outcome::because(State::Waiting, why));
        }
        Way::Relay(Service::Unix(path.to_owned()), "the service listens on a Unix socket".to_owned())
    }

    /// The listeners that a client on the host would reach at `target`: those at the best bound address that has any.
    fn serving(&self, protocol: Protocol, target: SocketAddr) -> Vec<&Listener> {
        let Some(there) = self.by_port.get(&(protocol, target.port())) else { return vec![] };
        let v4 = target.is_ipv4();
        let bound_at = |address: Address| -> Vec<&Listener> {
            let fits = |listener: &&&Listener| {
                Address::from(listener.address.ip()) == address
                    && listener.bound_interface == 0
                    && (listener.address.is_ipv4() == v4 || !listener.single_family)
            };
            there.iter().filter(fits).copied().collect()
        };
        let target = Address::from(target.ip());
        let mut found = listening_addresses(&target).map(bound_at);
        found.find(|listeners| !listeners.is_empty()).unwrap_or_default()
    }

    /// The other family's loopback address, where the rule leaves the family open and only that one is listened on.
    fn other_family(&self, rule: &Rule, target: SocketAddr) -> Option<SocketAddr> {
        let Target::Port(port) = rule.spec.target else { return None };
        let other = SocketAddr::new(loopback(!target.is_ipv4()), port);
        (!self.serving(rule.spec.protocol, other).is_empty()).then_some(other)
    }

    /// Every listener that some entry may name.
    fn listeners_to_register(&mut self) {
        let keys = |entry: &RuleValue| {
            let (port, protocol) = (entry.target_port, entry.protocol());
            let addresses = listening_addresses(&entry.target);
            addresses.map(move |address| ListenerKey { address, port, slot: 0, protocol }).collect::<Vec<_>>()
        };
        let wanted: BTreeSet<ListenerKey> = self.policy.entries.values().flat_map(keys).collect();
        for (protocol, sockets) in sockets(self.inventory) {
            for listener in sockets {
                let (address, port) = (listener.address.ip().into(), listener.address.port());
                let bound = ListenerKey { address, port, slot: 0, protocol: protocol.number() };
                if is_suitable(listener.kind) && listener.bound_interface == 0 && wanted.contains(&bound) {
                    self.policy.listeners.entry(bound).or_default().push(listener.inode);
                }
            }
        }
    }
}

fn without_bridge(network: &DockerNetwork) -> Outcome {
    let why = match network.driver.as_str() {
        "host" => "its containers are in the host's own namespace, where localhost is the host's".to_owned(),
        driver => {
            format!(
                "driver {driver} gives the host no bridge; allow its containers one by one: container:NAME"
            )
        }
    };
    Outcome::because(State::Blocked, why)
}

/// Whether the kernel can be given such a socket.
fn is_suitable(kind: ListenerKind) -> bool {
    matches!(kind, ListenerKind::Tcp | ListenerKind::Udp)
}

fn loopback(v4: bool) -> IpAddr {
    if v4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

fn family_mismatch(gateway: IpAddr, listens_on: SocketAddr) -> String {
    let family = if gateway.is_ipv4() { "IPv4" } else { "IPv6" };
    format!("{family} was dialled, the service listens on {listens_on}")
}

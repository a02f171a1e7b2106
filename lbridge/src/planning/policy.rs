//! Policy: what should be in force, given the rules and what was observed.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use lbridge_common::{
    verdict::listening_addresses,
    wire::{Address, Endpoint, LoopbackView, RuleKey, RuleValue},
};
use serde::{Deserialize, Serialize};

use super::{
    inventory::{Abilities, DockerPresence, Interface, Inventory, Listener, ListenerKind},
    rule::{Network, Origin, PathChoice, Rule, Rules, Source, Target},
};

/// What becomes of a rule's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Given to the service's own listener by the kernel.
    Steered,
    /// Carried by the daemon.
    Relayed,
    /// Nothing to connect yet.
    Waiting,
    /// Cannot be served until something is changed.
    Blocked,
}

/// A state and its reason; steering needs none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Which.
    pub state: State,
    /// Why, in words for a person.
    pub why: Option<String>,
}

impl Outcome {
    fn steered() -> Self {
        Self { state: State::Steered, why: None }
    }

    /// A state that has a reason.
    pub fn because(state: State, why: impl Into<String>) -> Self {
        Self { state, why: Some(why.into()) }
    }
}

/// What is meant for one of a rule's gateways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayOutcome {
    /// What containers dial.
    pub gateway: SocketAddr,
    /// The bridge.
    pub interface: String,
    /// Key of the kernel's entry, whether it is meant to exist or not.
    pub key: RuleKey,
    /// The loopback address that the kernel's entry leads to.
    pub target: Option<Endpoint>,
    /// What is meant to happen.
    pub outcome: Outcome,
}

/// What is meant for a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleOutcome {
    /// The rule.
    pub rule: Rule,
    /// Who made it.
    pub origin: Origin,
    /// One for each of the network's gateways; none while there is no network.
    pub gateways: Vec<GatewayOutcome>,
    /// Why there is no gateway.
    pub without_gateway: Option<Outcome>,
}

/// Where a relay listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayKey {
    /// Gateway address and dialled port.
    pub gateway: SocketAddr,
    /// The bridge that it is bound to: the address alone would let in whoever routes packets to it.
    pub interface: String,
    /// Its index: a bridge that was made anew is another one.
    pub ifindex: u32,
}

/// Where a relay connects to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Service {
    /// A loopback address.
    Tcp(SocketAddr),
    /// A Unix stream socket.
    Unix(PathBuf),
}

/// What a relay does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelaySpec {
    /// Where it connects to.
    pub service: Service,
    /// What the service shall see.
    pub source: Source,
    /// Whom it serves.
    pub subnet: Subnet,
}

/// A network's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    /// First address.
    pub base: Address,
    /// Netmask.
    pub mask: Address,
}

impl Subnet {
    fn of(gateway: IpAddr, prefix: u8) -> Self {
        let gateway = Address::from(gateway);
        let mask = gateway.mask(prefix);
        Self { base: gateway.masked(&mask), mask }
    }

    /// Whether `ip` is one of its addresses.
    pub fn contains(&self, ip: IpAddr) -> bool {
        Address::from(ip).masked(&self.mask) == self.base
    }
}

/// What should be in force. The maps are what the kernel and the relay set are to hold, no more and no less.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// In order of the rules.
    pub outcomes: Vec<RuleOutcome>,
    /// Ports whose listeners matter.
    pub targets: BTreeSet<u16>,
    /// Kernel entries; `steered` is 0.
    pub entries: BTreeMap<RuleKey, RuleValue>,
    /// Gateways that look local to the service.
    pub views: BTreeMap<Endpoint, LoopbackView>,
    /// Listeners that the kernel map should hold: bound address and port, to the sockets there.
    pub listeners: BTreeMap<Endpoint, Vec<u64>>,
    /// Relay listeners.
    pub relays: BTreeMap<RelayKey, RelaySpec>,
    /// Whether the name hooks are needed.
    pub names: bool,
}

/// Decides for each rule and gateway.
pub fn resolve(rules: &Rules, inventory: &Inventory, abilities: &Abilities) -> Policy {
    let mut resolver = Resolver { inventory, abilities, policy: Policy::default(), by_port: BTreeMap::new() };
    for listener in &inventory.listeners {
        resolver.by_port.entry(listener.address.port()).or_default().push(listener);
    }
    for (_, rule, origin) in rules.iter() {
        let outcome = resolver.rule(rule, origin);
        resolver.policy.outcomes.push(outcome);
    }
    resolver.listeners_to_register();
    resolver.policy
}

/// How a connection to one gateway can be served.
enum Way {
    /// By the kernel; or by nobody yet, with everything in place for a service that starts.
    Kernel(Outcome),
    /// By the daemon.
    Relay(Service, String),
    /// Not at all.
    None(Outcome),
}

/// What serves a rule's connections.
enum Found {
    /// A listener that the kernel can be given.
    Steerable,
    /// A service at this loopback address that can only be connected to, and why.
    Unsteerable(SocketAddr, String),
    /// Nothing.
    Nothing,
}

const MPTCP: &str =
    "the service listens with MPTCP; GODEBUG=multipathtcp=0 in a Go service's environment gets it steered";

struct Resolver<'a> {
    inventory: &'a Inventory,
    abilities: &'a Abilities,
    policy: Policy,
    by_port: BTreeMap<u16, Vec<&'a Listener>>,
}

impl Resolver<'_> {
    fn rule(&mut self, rule: &Rule, origin: Origin) -> RuleOutcome {
        self.policy.targets.extend(rule.spec.target.port());
        let (gateways, without_gateway) = match self.bridge(&rule.network) {
            Err(outcome) => (vec![], Some(outcome)),
            Ok(bridge) if bridge.addresses.is_empty() => {
                let why = format!("{} has no address that a container could dial", bridge.name);
                (vec![], Some(Outcome::because(State::Waiting, why)))
            }
            Ok(bridge) => {
                let addresses = bridge.addresses.clone();
                let (name, index) = (bridge.name.clone(), bridge.index);
                let gateways = addresses
                    .into_iter()
                    .map(|(ip, prefix)| self.gateway(rule, &name, index, ip, prefix))
                    .collect();
                (gateways, None)
            }
        };
        RuleOutcome { rule: rule.clone(), origin, gateways, without_gateway }
    }

    fn bridge(&self, network: &Network) -> Result<&Interface, Outcome> {
        let name = match network {
            Network::Bridge(name) => name,
            Network::Docker(name) => match self.inventory.docker_network(name) {
                Some(network) => network.bridge.as_ref().ok_or_else(|| {
                    let why = format!("driver {} gives the host no bridge", network.driver);
                    Outcome::because(State::Blocked, why)
                })?,
                None => return Err(self.unknown_network(name)),
            },
        };
        match self.inventory.interface(name) {
            // An uplink here would open the port to the LAN.
            Some(interface) if !interface.is_bridge => {
                Err(Outcome::because(State::Blocked, format!("{name} is not a bridge")))
            }
            Some(interface) => Ok(interface),
            None => Err(Outcome::because(State::Waiting, format!("there is no interface {name}"))),
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
                Outcome::because(State::Waiting, format!("no Docker network {name}"))
            }
        }
    }

    fn gateway(
        &mut self,
        rule: &Rule,
        interface: &str,
        index: u32,
        ip: IpAddr,
        prefix: u8,
    ) -> GatewayOutcome {
        let gateway = SocketAddr::new(ip, rule.spec.port);
        let subnet = Subnet::of(ip, prefix);
        let checked = self.abilities.steer.as_ref().is_ok_and(|s| s.interface_check);
        let key = RuleKey {
            gateway: ip.into(),
            ifindex: if checked { index } else { 0 },
            port: rule.spec.port,
            reserved: 0,
        };
        let relay_key = RelayKey { gateway, interface: interface.to_owned(), ifindex: index };
        // The kernel's entry stays of one family; what else listens is the relay's.
        let target = rule
            .spec
            .target
            .address_for(ip)
            .filter(|target| target.is_ipv4() == ip.is_ipv4())
            .map(|target| Endpoint::new(target.ip().into(), target.port()));

        let taken = self.policy.entries.contains_key(&key) || self.policy.relays.contains_key(&relay_key);
        let way = if taken {
            Way::None(Outcome::because(State::Blocked, format!("another rule has {gateway} already")))
        } else {
            self.way(rule, ip)
        };
        let outcome = match (way, target) {
            (Way::Kernel(outcome), Some(target)) => {
                let value = RuleValue {
                    subnet: subnet.base,
                    mask: subnet.mask,
                    target: target.address,
                    target_port: target.port,
                    reserved: [0; 3],
                    steered: 0,
                };
                self.policy.entries.insert(key, value);
                if rule.source == Source::Loopback {
                    let view = LoopbackView { subnet: subnet.base, mask: subnet.mask, target };
                    self.policy.views.insert(Endpoint::new(key.gateway, key.port), view);
                    self.policy.names = true;
                }
                outcome
            }
            // Without a target of the dialled family there is no way through the kernel; `way` knows.
            (Way::Kernel(outcome) | Way::None(outcome), _) => outcome,
            (Way::Relay(service, why), _) => {
                // Without hooks a relay shows an address of its own instead, see `relay::stand_in`.
                self.policy.names |= rule.source == Source::Container
                    && matches!(service, Service::Tcp(_))
                    && self.abilities.names.is_ok();
                self.policy.relays.insert(relay_key, RelaySpec { service, source: rule.source, subnet });
                Outcome::because(State::Relayed, why)
            }
        };
        GatewayOutcome { gateway, interface: interface.to_owned(), key, target, outcome }
    }

    fn way(&self, rule: &Rule, gateway: IpAddr) -> Way {
        let Some(target) = rule.spec.target.address_for(gateway) else {
            return self.unix_way(rule);
        };
        let found = self.find(rule, target, gateway);
        let waiting = Outcome::because(State::Waiting, format!("nothing listens on {target}"));
        if rule.path == PathChoice::Relay {
            return match found {
                Found::Nothing => Way::None(waiting),
                Found::Steerable => self.relay(rule, target, "as the rule asks".to_owned()),
                Found::Unsteerable(at, _) => self.relay(rule, at, "as the rule asks".to_owned()),
            };
        }
        match (found, self.kernel_obstacle(rule)) {
            (Found::Steerable, None) => Way::Kernel(Outcome::steered()),
            // The entry is put all the same: the kernel registers a service that starts, daemon or no daemon.
            (Found::Nothing, None) if target.is_ipv4() == gateway.is_ipv4() => Way::Kernel(waiting),
            (Found::Nothing, _) => Way::None(waiting),
            (Found::Steerable, Some(why)) => self.relay_unless_steer(rule, target, why),
            (Found::Unsteerable(at, why), obstacle) => {
                self.relay_unless_steer(rule, at, obstacle.unwrap_or(why))
            }
        }
    }

    /// What serves connections to `target` that come in at `gateway`.
    fn find(&self, rule: &Rule, target: SocketAddr, gateway: IpAddr) -> Found {
        let there = self.serving(target);
        let same_family = target.is_ipv4() == gateway.is_ipv4();
        if same_family && there.iter().any(|listener| listener.kind == ListenerKind::Tcp) {
            return Found::Steerable;
        }
        if let Some(listener) = there.first() {
            let why = match listener.kind {
                ListenerKind::Mptcp => MPTCP.to_owned(),
                ListenerKind::Refused(errno) => {
                    format!(
                        "the kernel refused to register the listener: {}",
                        io::Error::from_raw_os_error(errno)
                    )
                }
                ListenerKind::Tcp => {
                    format!("{} was dialled, the service listens on {}", family(gateway), listener.address)
                }
            };
            return Found::Unsteerable(target, why);
        }
        match self.other_family(rule, target) {
            Some(other) => {
                let why = format!("{} was dialled, the service listens on {other} only", family(gateway));
                Found::Unsteerable(other, why)
            }
            None => Found::Nothing,
        }
    }

    /// Why the kernel could not have the rule's connections, whatever listens.
    fn kernel_obstacle(&self, rule: &Rule) -> Option<String> {
        if let Err(why) = &self.abilities.steer {
            return Some(why.clone());
        }
        let missing = self.abilities.names.as_ref().err().filter(|_| rule.source == Source::Loopback)?;
        Some(format!("--source loopback without name hooks: {missing}"))
    }

    fn relay_unless_steer(&self, rule: &Rule, service: SocketAddr, why: String) -> Way {
        match rule.path {
            PathChoice::Steer => Way::None(Outcome::because(State::Blocked, why)),
            PathChoice::Auto | PathChoice::Relay => self.relay(rule, service, why),
        }
    }

    fn relay(&self, rule: &Rule, service: SocketAddr, why: String) -> Way {
        // There is one IPv6 loopback address, so nothing to stand in for the container.
        if let (Err(missing), true, Source::Container) =
            (&self.abilities.names, service.is_ipv6(), rule.source)
        {
            let why = format!(
                "the service on {service} would take the container for a local client ({missing}); allow it with --source loopback"
            );
            return Way::None(Outcome::because(State::Blocked, why));
        }
        Way::Relay(Service::Tcp(service), why)
    }

    fn unix_way(&self, rule: &Rule) -> Way {
        let Target::Unix(path) = &rule.spec.target else {
            return Way::None(Outcome::because(State::Blocked, "the rule has no target"));
        };
        if rule.path == PathChoice::Steer {
            return Way::None(Outcome::because(State::Blocked, "a Unix socket can only be relayed to"));
        }
        if !self.inventory.unix_listeners.contains(path) {
            let why = format!("nothing listens on {}", rule.spec.target);
            return Way::None(Outcome::because(State::Waiting, why));
        }
        Way::Relay(Service::Unix(path.clone()), "the service listens on a Unix socket".to_owned())
    }

    /// Listeners that a connection to `target` may be given to, best first.
    fn serving(&self, target: SocketAddr) -> Vec<&Listener> {
        let Some(there) = self.by_port.get(&target.port()) else { return vec![] };
        let mut found = vec![];
        for address in distinct(listening_addresses(&target.ip().into())) {
            found.extend(there.iter().copied().filter(|l| {
                Address::from(l.address.ip()) == address
                    && l.bound_interface == 0
                    && (l.address.is_ipv4() == target.is_ipv4() || !l.single_family)
            }));
        }
        found
    }

    /// The other family's loopback address, where the rule leaves the family open and only that one is listened on.
    fn other_family(&self, rule: &Rule, target: SocketAddr) -> Option<SocketAddr> {
        let Target::Port(_) = rule.spec.target else { return None };
        let other = if target.is_ipv4() {
            IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])
        } else {
            IpAddr::from([127, 0, 0, 1])
        };
        let other = SocketAddr::new(other, target.port());
        (!self.serving(other).is_empty()).then_some(other)
    }

    /// Every listener that some entry may name.
    fn listeners_to_register(&mut self) {
        let wanted: BTreeSet<Endpoint> = self
            .policy
            .entries
            .values()
            .flat_map(|v| distinct(listening_addresses(&v.target)).map(|a| Endpoint::new(a, v.target_port)))
            .collect();
        for listener in &self.inventory.listeners {
            let bound = Endpoint::new(listener.address.ip().into(), listener.address.port());
            if listener.kind == ListenerKind::Tcp && listener.bound_interface == 0 && wanted.contains(&bound)
            {
                self.policy.listeners.entry(bound).or_default().push(listener.inode);
            }
        }
    }
}

fn distinct(addresses: [Address; 3]) -> impl Iterator<Item = Address> {
    let [first, second, third] = addresses;
    [Some(first), Some(second), (third != second).then_some(third)].into_iter().flatten()
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

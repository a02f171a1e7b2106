//! Policy: what should be in force. [`resolve`](super::resolve) makes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use lbridge_common::wire::{
    Address, Dial, DialKey, ListenerKey, LoopbackView, Reply, ReplyKey, RuleKey, RuleValue, SourceKey, TCP,
    TargetKey, ViewKey,
};
use serde::{Deserialize, Serialize};

use super::{
    firewall::{FirewallMode, Link, Opening},
    grant::Grant,
    hooks::PerHookSet,
    inventory::{NamespaceId, NamespaceKey, Steering},
    reason::{Reason, in_words},
    rule::{Origin, Protocol, ProxyProtocol, Rule, RuleId, Source},
};

/// What becomes of a rule's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Given to the service's own listener by the kernel.
    Steered,
    /// Carried by the daemon, or by `lbridge relay`.
    Relayed,
    /// Nothing to connect yet.
    Waiting,
    /// Cannot be served until something is changed.
    Blocked,
}

/// A state and its reasons, the one that decided first; steering needs none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What becomes of the connections.
    pub state: State,
    /// Why; after the first, what else there is to know.
    pub reasons: Vec<Reason>,
}

impl Outcome {
    pub(super) fn steered() -> Self {
        Self { state: State::Steered, reasons: vec![] }
    }

    /// A state that has a reason.
    pub fn because(state: State, reason: Reason) -> Self {
        Self { state, reasons: vec![reason] }
    }

    /// The reasons in words, in one line; `None` where there is none.
    pub fn why(&self) -> Option<String> {
        (!self.reasons.is_empty()).then(|| in_words(&self.reasons))
    }

    /// With another thing to know, unless it is told already.
    pub(super) fn with(mut self, reason: Reason) -> Self {
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
        self
    }
}

/// What is meant for one of the addresses that a rule's containers dial: a gateway, or localhost in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayOutcome {
    /// What is dialled, and where; the key of its relay, whether there is one or not.
    pub relay_key: RelayKey,
    /// Key of the kernel's entry, whether there is one or not. There never is one for a namespace.
    pub rule_key: Option<RuleKey>,
    /// What a firewall must let through for it, where it is on a bridge.
    pub opening: Option<Opening>,
    /// What it is, if it is no address of the network's own bridge.
    pub alias: Option<Alias>,
    /// What is meant to happen.
    pub outcome: Outcome,
}

/// Another address of the host that a network's containers dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alias {
    /// What the engine writes for `host-gateway`; containers call it `host.docker.internal`.
    HostGateway,
    /// One of `aliases` in the configuration.
    Setting,
    /// Something that this version does not know of.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostGateway => "host.docker.internal",
            Self::Setting | Self::Unknown => "an alias",
        })
    }
}

impl GatewayOutcome {
    /// Its relay, whether it has one or not. UDP never has: what is at that address is another rule's, for TCP.
    pub fn relay(&self) -> Option<&RelayKey> {
        (self.protocol() == Protocol::Tcp).then_some(&self.relay_key)
    }

    fn protocol(&self) -> Protocol {
        let is_udp = self.rule_key.is_some_and(|key| key.protocol == u16::from(Protocol::Udp.number()));
        if is_udp { Protocol::Udp } else { Protocol::Tcp }
    }
}

/// What is meant for a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleOutcome {
    /// The rule.
    pub rule: Rule,
    /// Who made it.
    pub origin: Origin,
    /// One for each address that can be dialled; none while there is no network.
    pub gateways: Vec<GatewayOutcome>,
    /// Why there is no gateway.
    pub without_gateway: Option<Outcome>,
    /// What else leads there: the containers' localhost.
    pub dials: Vec<DialOutcome>,
}

/// What is meant for an address of the containers' own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialOutcome {
    /// What is dialled.
    pub address: SocketAddr,
    /// Keys of the kernel's entries, whether there are any or not: one for all of the bridge, or one for each container that the
    /// rule is for.
    pub keys: Vec<DialKey>,
    /// The gateway that it leads to; none, where it cannot.
    pub gateway: Option<IpAddr>,
    /// Name of the bridge.
    pub interface: String,
    /// Index of the bridge.
    pub ifindex: u32,
    /// What is meant to happen; what becomes of the gateway's own connections is not in it.
    pub outcome: Outcome,
}

/// Where a relay listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayKey {
    /// Address and port that are dialled.
    pub address: SocketAddr,
    /// Where.
    pub place: Place,
}

impl RelayKey {
    /// Whether the other is in the same namespace, found by another way.
    pub fn is_beside(&self, other: &Self) -> bool {
        match (&self.place, &other.place) {
            (Place::Namespace(this), Place::Namespace(that)) => {
                this.id == that.id && this.entrance != that.entrance
            }
            _ => false,
        }
    }

    /// Key of the kernel's entry that leads to it, where it is on a bridge whose index the kernel checks.
    pub fn entry(&self) -> Option<RuleKey> {
        let Place::Bridge { ifindex, .. } = self.place else { return None };
        let (gateway, port) = (self.address.ip().into(), self.address.port());
        Some(RuleKey { gateway, ifindex, port, protocol: TCP.into() })
    }
}

/// Where an address is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// On a bridge of the host; the relay is bound to it: the address alone would let in whoever routes packets there.
    Bridge {
        /// Its name.
        interface: String,
        /// Its index: a bridge that was made anew is another one.
        ifindex: u32,
    },
    /// On `lo` of another network namespace.
    Namespace(NamespaceKey),
}

impl Place {
    /// Name of the interface that a relay is bound to.
    pub fn interface(&self) -> &str {
        match self {
            Self::Bridge { interface, .. } => interface,
            Self::Namespace(_) => "lo",
        }
    }
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
    /// For which rule: its relays share its limits.
    pub rule: RuleId,
    /// Where it connects to.
    pub service: Service,
    /// What the service shall see.
    pub source: Source,
    /// Whom it serves.
    pub clients: Clients,
    /// The kernel's entry leads to its socket, which nothing else reaches and which takes no port from a service of the host.
    /// Otherwise the socket is bound to the dialled address and port itself.
    pub by_entry: bool,
    /// Whether the service is told in a header who connects.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Connections at a time, at most.
    pub max_connections: u32,
    /// A connection that has been without a byte for that long is reset.
    pub idle_timeout: Option<Duration>,
}

/// Whom a relay serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clients {
    /// The containers of a bridge: whoever is in the subnet and not the host itself.
    Subnet(Subnet),
    /// Some containers of a bridge, by their addresses.
    Listed(BTreeSet<IpAddr>),
    /// Whoever is inside the namespace; the service is told this address, since all have the same: 127.0.0.1.
    Inside(IpAddr),
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
    /// The one that an address with the length of its prefix tells.
    pub fn of(gateway: IpAddr, prefix: u8) -> Self {
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
    /// Addresses and ports whose listeners matter.
    pub targets: BTreeSet<TargetKey>,
    /// Kernel entries; `steered` is 0.
    pub entries: BTreeMap<RuleKey, RuleValue>,
    /// The users of the entries that are not for all.
    pub sources: BTreeSet<SourceKey>,
    /// For whom each of them may: it holds for as long as one of these has the address.
    pub grants: BTreeMap<SourceKey, BTreeSet<Grant>>,
    /// Gateways that look local to the service, with the bits of the key that count.
    pub views: BTreeMap<(ViewKey, u32), LoopbackView>,
    /// Sources of UDP services' replies, with the bits of the key that count.
    pub replies: BTreeMap<(ReplyKey, u32), Reply>,
    /// What containers dial that leads to their gateway.
    pub dials: BTreeMap<DialKey, Dial>,
    /// Listeners that the kernel map should hold: the first slot of each bound address, to the sockets there.
    pub listeners: BTreeMap<ListenerKey, Vec<u64>>,
    /// Relay listeners.
    pub relays: BTreeMap<RelayKey, RelaySpec>,
    /// Whether each set of hooks is needed.
    pub hooks: PerHookSet<bool>,
    /// What the host's firewall must let through, and where that is tried from.
    pub openings: BTreeMap<Opening, Link>,
    /// What may be done to the firewall; a setting, nothing that is decided.
    pub firewall: FirewallMode,
    /// How the kernel steers, where it does; seen, not decided.
    pub steering: Option<Steering>,
}

/// The loopback address that stands for whoever is in a namespace, by the namespace's number.
pub(super) fn stand_in_for(id: NamespaceId) -> Ipv4Addr {
    let [.., a, b, c] = id.inode.to_be_bytes();
    stand_in([a, b, c])
}

/// The loopback address that a relay connects from in a container's stead, by the container's address.
pub fn stand_in_for_container(container: IpAddr) -> Ipv4Addr {
    stand_in(match container.to_canonical() {
        IpAddr::V4(ip) => [ip.octets()[1], ip.octets()[2], ip.octets()[3]],
        // The interface identifier's end is what differs within a network.
        IpAddr::V6(ip) => [ip.octets()[13], ip.octets()[14], ip.octets()[15]],
    })
}

/// A loopback address that stands for somebody who has none on the host: one of 127.128.0.0/9, never one that a service
/// trusts as 127.0.0.1.
fn stand_in([a, b, c]: [u8; 3]) -> Ipv4Addr {
    // 127.255.255.255 is the broadcast address of 127/8, and cannot be bound.
    let c = if (a | 0x80, b, c) == (255, 255, 255) { 254 } else { c };
    Ipv4Addr::new(127, a | 0x80, b, c)
}

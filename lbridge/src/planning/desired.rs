//! Desired: the desired state. [`resolve`](super::resolve) makes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use lbridge_common::wire::{Address, EntryKey, ListenerKey, RedirectKey, SourceKey, TCP};
use serde::{Deserialize, Serialize};

use super::{
    firewall::{FirewallMode, Opening, ProbeRoute},
    grant::Grant,
    inventory::{NamespaceId, NamespaceKey, Steering},
    kernel_state::KernelState,
    reason::{Reason, in_words},
    rule::{Origin, Protocol, ProxyProtocol, Rule, RuleId, Source},
};

/// The state of a rule's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Steered: the kernel gives the connections to the service's own listener.
    Steered,
    /// Relayed: the daemon, or `lbridge relay`, carries the connections.
    Relayed,
    /// Waiting: something that the rule needs is not there yet.
    Waiting,
    /// Blocked: the rule cannot be served until somebody changes something.
    Blocked,
}

/// Writes the name that the API uses.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A state and its reasons, the decisive one first. A steered state needs none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The state of the connections.
    pub state: State,
    /// The reasons for the state: the decisive one, then everything else there is to know.
    pub reasons: Vec<Reason>,
}

impl Outcome {
    pub(super) fn steered() -> Self {
        Self { state: State::Steered, reasons: vec![] }
    }

    /// Creates an outcome with one reason.
    pub fn because(state: State, reason: Reason) -> Self {
        Self { state, reasons: vec![reason] }
    }

    /// Returns the reasons in words, in one line; `None` if there are none.
    pub fn why(&self) -> Option<String> {
        (!self.reasons.is_empty()).then(|| in_words(&self.reasons))
    }

    /// Adds a reason, unless the outcome has it already.
    pub(super) fn with(mut self, reason: Reason) -> Self {
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
        self
    }
}

/// The desired outcome for one of the addresses that a rule's containers dial: a gateway, or localhost in a
/// namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayOutcome {
    /// The address and port that are dialled, and their place. This is the key of the relay, whether there is
    /// one or not.
    pub relay_key: RelayKey,
    /// Key of the kernel's entry, whether there is one or not. `None` for a namespace, which never has one.
    pub entry_key: Option<EntryKey>,
    /// The traffic that a firewall must let through to the address; `None` for a namespace.
    pub opening: Option<Opening>,
    /// The kind of alias; `None` if the address is the network's own.
    pub alias: Option<Alias>,
    /// The desired outcome of connections to the address.
    pub outcome: Outcome,
}

/// An address of the host that a network's containers dial, and that is none of their own bridge's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alias {
    /// The address that the engine writes for `host-gateway`; containers call it `host.docker.internal`.
    HostGateway,
    /// An address from `aliases` in the configuration.
    Setting,
    /// A kind of alias that this version does not know.
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
    /// Returns the key of the relay, whether there is one or not. `None` for UDP, which never has a relay: a
    /// relay at that address is another rule's, for TCP.
    pub fn relay(&self) -> Option<&RelayKey> {
        (self.protocol() == Protocol::Tcp).then_some(&self.relay_key)
    }

    fn protocol(&self) -> Protocol {
        let is_udp = self.entry_key.is_some_and(|key| key.protocol == u16::from(Protocol::Udp.number()));
        if is_udp { Protocol::Udp } else { Protocol::Tcp }
    }
}

/// The desired outcome for a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleOutcome {
    /// The rule that the outcome is for.
    pub rule: Rule,
    /// The origin of the rule: the CLI, the configuration or a label.
    pub origin: Origin,
    /// One outcome for each address that can be dialled; empty while there is no network.
    pub gateways: Vec<GatewayOutcome>,
    /// The reason why there is no gateway; `None` if there is one.
    pub without_gateway: Option<Outcome>,
    /// The redirects that lead to the gateways, from the containers' localhost; empty without `localhost`.
    pub redirects: Vec<RedirectOutcome>,
}

/// The desired outcome for a redirect: an address of the containers' own localhost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedirectOutcome {
    /// The address and port that are dialled.
    pub address: SocketAddr,
    /// Keys of the kernel's entries, whether there are any or not: one for the whole bridge, or one for each
    /// container that the rule is for.
    pub keys: Vec<RedirectKey>,
    /// The gateway that the redirect leads to; `None` if it cannot lead to any.
    pub gateway: Option<IpAddr>,
    /// Name of the bridge.
    pub interface: String,
    /// Interface index of the bridge.
    pub ifindex: u32,
    /// The desired outcome of the redirect alone. The gateway's own connections have an outcome of their own.
    pub outcome: Outcome,
}

/// The address that a relay listens on, and its place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayKey {
    /// The address and port that are dialled.
    pub address: SocketAddr,
    /// The bridge or network namespace that the address is in.
    pub place: BindScope,
}

impl RelayKey {
    /// Returns true if `other` is in the same namespace, found through another entrance.
    pub fn is_beside(&self, other: &Self) -> bool {
        match (&self.place, &other.place) {
            (BindScope::Namespace(this), BindScope::Namespace(that)) => {
                this.id == that.id && this.entrance != that.entrance
            }
            _ => false,
        }
    }

    /// Returns the key of the kernel's entry that leads to the relay, for kernels that check the bridge's
    /// index. `None` for a relay that is on no bridge.
    pub fn entry(&self) -> Option<EntryKey> {
        let BindScope::Bridge { ifindex, .. } = self.place else { return None };
        let (gateway, port) = (self.address.ip().into(), self.address.port());
        Some(EntryKey { gateway, ifindex, port, protocol: TCP.into() })
    }
}

/// The place of a dialled address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BindScope {
    /// On a bridge of the host. The relay is bound to the bridge: the address alone would let in whoever
    /// routes packets to it.
    Bridge {
        /// Name of the bridge.
        interface: String,
        /// Interface index of the bridge. A bridge that was recreated is another bridge.
        ifindex: u32,
    },
    /// On `lo` of another network namespace.
    Namespace(NamespaceKey),
}

impl BindScope {
    /// Returns the name of the interface that a relay is bound to.
    pub fn interface(&self) -> &str {
        match self {
            Self::Bridge { interface, .. } => interface,
            Self::Namespace(_) => "lo",
        }
    }
}

/// The service that a relay connects to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Service {
    /// A loopback address and port.
    Tcp(SocketAddr),
    /// A Unix stream socket, by its path.
    Unix(PathBuf),
}

/// The specification of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelaySpec {
    /// The rule that the relay serves. All relays of a rule share its limits.
    pub rule: RuleId,
    /// The service that the relay connects to.
    pub service: Service,
    /// The peer that the service shall see.
    pub source: Source,
    /// The clients that the relay serves.
    pub clients: Clients,
    /// True if the kernel's entry leads to the relay's socket. Nothing else reaches that socket, and it takes
    /// no port from a service of the host. False if the socket is bound to the dialled address and port
    /// itself.
    pub by_entry: bool,
    /// Version of the PROXY protocol, whose header tells the service who connects; `None` for no header.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Largest number of connections at a time.
    pub max_connections: u32,
    /// Time without a byte after which a connection is reset; `None` for no limit.
    pub idle_timeout: Option<Duration>,
}

/// The clients that a relay serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clients {
    /// The containers of a bridge: every address in the subnet that is not the host's own.
    Subnet(Subnet),
    /// Some containers of a bridge, by their addresses.
    Listed(BTreeSet<IpAddr>),
    /// Everybody inside the namespace. All of them have the same address, 127.0.0.1, so the service gets this
    /// one instead.
    Inside(IpAddr),
}

/// The addresses of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    /// First address of the subnet.
    pub base: Address,
    /// Netmask of the subnet.
    pub mask: Address,
}

impl Subnet {
    /// Returns the subnet of an address, given the length of its prefix in bits.
    pub fn of(gateway: IpAddr, prefix: u8) -> Self {
        let gateway = Address::from(gateway);
        let mask = gateway.mask(prefix);
        Self { base: gateway.masked(&mask), mask }
    }

    /// Returns true if `ip` is in the subnet.
    pub fn contains(&self, ip: IpAddr) -> bool {
        Address::from(ip).masked(&self.mask) == self.base
    }
}

/// The desired state. The maps are exactly what the kernel and the relay set must hold, no more and no less.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// The outcome of each rule, in the order of the rules.
    pub outcomes: Vec<RuleOutcome>,
    /// The contents of the kernel's maps.
    pub kernel: KernelState,
    /// The grants behind each source. A source is admitted for as long as one of its grants has the address.
    pub grants: BTreeMap<SourceKey, BTreeSet<Grant>>,
    /// Listeners that the kernel's map should hold: the first slot of each bound address, with the inodes of
    /// the sockets there.
    pub listeners: BTreeMap<ListenerKey, Vec<u64>>,
    /// Relays that should listen, with their specifications.
    pub relays: BTreeMap<RelayKey, RelaySpec>,
    /// Openings that the host's firewall must let through, and the link that each is tried from.
    pub openings: BTreeMap<Opening, ProbeRoute>,
    /// The changes that lbridge may make to the firewall: a setting, not a decision.
    pub firewall: FirewallMode,
    /// The features of the kernel's steering; `None` if it does not steer. Observed, not decided.
    pub steering: Option<Steering>,
}

/// Returns the loopback address that stands for whoever is in a namespace, derived from the namespace's inode
/// number.
pub(super) fn stand_in_for(id: NamespaceId) -> Ipv4Addr {
    let [.., a, b, c] = id.inode.to_be_bytes();
    stand_in([a, b, c])
}

/// Returns the loopback address that a relay connects from in place of a container, derived from the
/// container's address.
pub fn stand_in_for_container(container: IpAddr) -> Ipv4Addr {
    stand_in(match container.to_canonical() {
        IpAddr::V4(ip) => [ip.octets()[1], ip.octets()[2], ip.octets()[3]],
        // The interface identifier's end is what differs within a network.
        IpAddr::V6(ip) => [ip.octets()[13], ip.octets()[14], ip.octets()[15]],
    })
}

/// Returns a loopback address that stands for a client without an address of its own on the host: one of
/// 127.128.0.0/9, never one that a service trusts as 127.0.0.1.
fn stand_in([a, b, c]: [u8; 3]) -> Ipv4Addr {
    // 127.255.255.255 is the broadcast address of 127/8, and cannot be bound.
    let c = if (a | 0x80, b, c) == (255, 255, 255) { 254 } else { c };
    Ipv4Addr::new(127, a | 0x80, b, c)
}

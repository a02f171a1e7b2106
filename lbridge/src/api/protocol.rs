//! protocol: the requests and answers of the control API. Additions are compatible: unknown fields are
//! ignored.

use std::{collections::BTreeSet, fmt, net::IpAddr, path::PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::planning::{
    desired::{Alias, State},
    firewall::FirewallMode,
    inventory::{DockerNetwork, EngineKind},
    labels,
    reason::Reason,
    rule::{Network, Options, Origin, Protocol, Rule, RuleId},
};

/// `GET`: returns a [`Status`].
pub const STATUS: &str = "/v1/status";
/// `POST` an [`Allow`]: returns a list of [`RuleStatus`], after the change.
pub const ALLOW: &str = "/v1/allow";
/// `POST` a [`Deny`]: returns a list of [`RuleStatus`], before the change. A rule that a label still asks for
/// is listed as it is after the change.
pub const DENY: &str = "/v1/deny";
/// `POST` a [`Question`](crate::planning::explain::Question): returns an
/// [`Explanation`](crate::planning::explain::Explanation).
pub const EXPLAIN: &str = "/v1/explain";

/// `POST` without a body: returns a [`Reloaded`].
pub const RELOAD: &str = "/v1/reload";
/// `GET`: streams [`Event`]s, one line of JSON each, until the client disconnects.
pub const EVENTS: &str = "/v1/events";

/// The daemon's whole status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The status of the kernel programs.
    pub kernel: KernelStatus,
    /// The status of the Docker Engine, or Podman.
    pub docker: DockerStatus,
    /// The status of the host's firewall.
    #[serde(default)]
    pub firewall: FirewallStatus,
    /// The engine's networks; the last known ones while it is unreachable.
    #[serde(default)]
    pub docker_networks: Vec<NetworkStatus>,
    /// The status of the labels of containers and networks.
    #[serde(default)]
    pub labels: LabelStatus,
    /// The rules, sorted by network and port.
    pub rules: Vec<RuleStatus>,
    /// A configuration file that was refused and is therefore not in force; `None` if the file is in force.
    #[serde(default)]
    pub refused_reload: Option<RefusedReload>,
}

/// A network of the engine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// The engine's network id, 64 hexadecimal digits.
    pub id: String,
    /// The network's name.
    pub name: String,
    /// The network's driver: `bridge`, `macvlan`, `host`, ...
    pub driver: String,
    /// Name of the bridge interface on the host; `None` if the network has no bridge there.
    pub bridge: Option<String>,
    /// The name that Docker's API has for the network, if it differs from Podman's own (`name`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_name: Option<String>,
}

impl From<&DockerNetwork> for NetworkStatus {
    fn from(network: &DockerNetwork) -> Self {
        // The index of the bridge is the daemon's own means to tell one bridge from the next of that name.
        let DockerNetwork { id, name, driver, bridge, bridge_index: _, other_name } = network.clone();
        Self { id, name, driver, bridge, other_name }
    }
}

/// Labels of containers and networks, and the problems with them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelStatus {
    /// True if lbridge reads labels.
    pub enabled: bool,
    /// The first of the problems with labels.
    pub problems: Vec<labels::Problem>,
    /// Number of further problems that are not listed.
    pub more_problems: usize,
}

/// A configuration file that was read again and is invalid; the previous configuration stays active.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedReload {
    /// Time of the first refusal of several in a row.
    pub since: Timestamp,
    /// The problem and its place in the file, for the last refusal.
    pub error: String,
}

/// The changes made by reading the configuration again. The lists hold only rules of the file: those that are
/// new, gone or different.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// New rules, after the change.
    pub added: Vec<RuleStatus>,
    /// Changed rules, after the change.
    pub changed: Vec<RuleStatus>,
    /// Removed rules, before the change.
    pub removed: Vec<RuleStatus>,
    /// Changed settings: everything in the file that is not a rule.
    pub settings: Vec<SettingChange>,
}

/// A setting whose value has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingChange {
    /// The name of the setting in the file.
    pub name: String,
    /// The old value, as written in the file.
    pub before: String,
    /// The new value, as written in the file.
    pub now: String,
}

impl fmt::Display for SettingChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}, was {}", self.name, self.now, self.before)
    }
}

/// The host's firewall, which filters packets before the rules see them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirewallStatus {
    /// The configured mode: whether lbridge keeps accept rules where they are needed.
    pub mode: FirewallMode,
    /// Firewalls with a chain that may deny packets.
    pub firewalls: Vec<String>,
    /// Number of lbridge's own accept rules.
    pub accept_rules: usize,
    /// The reason why the ruleset, or a part of it, could not be read; `None` if it was read.
    pub unreadable: Option<String>,
    /// The reason why the daemon could not test whether packets arrive, for the first rule that is affected;
    /// `None` if it could.
    pub untried: Option<String>,
}

/// The kernel's part in serving connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelDatapath {
    /// Connections are steered by `sk_lookup`.
    Steer,
    /// The kernel programs are not in use.
    None,
}

/// The status of the kernel programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelStatus {
    /// The kernel's part in serving connections.
    pub path: KernelDatapath,
    /// The reason for [`KernelDatapath::None`].
    pub why: Option<String>,
    /// True if the ingress interface is checked; false if only the source subnet is.
    pub interface_check: bool,
    /// True if the kernel registers a service that starts while the daemon is down.
    pub registers_listeners: bool,
    /// Outcomes since the programs were first loaded; `None` if no kernel programs are in use.
    pub counters: Option<Counters>,
}

/// Number of times that each outcome occurred in the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Connections that were given to their listener.
    pub steered: u64,
    /// Connections to a rule's gateway and port from outside its subnet, left alone.
    pub foreign_source: u64,
    /// Connections refused because no listener was registered.
    pub no_listener: u64,
    /// Connections refused because the kernel did not accept the listener.
    pub assign_failed: u64,
    /// Listeners that the kernel program registered.
    pub registered: u64,
    /// Listeners that the kernel refused to register.
    pub register_refused: u64,
    /// Connections from a rule's subnet that the rule does not admit, left alone.
    #[serde(default)]
    pub not_listed: u64,
    /// Connections that no rule admits and that only lbridge's accept rule let in, refused.
    #[serde(default)]
    pub denied: u64,
    /// Connections refused because the service that takes them would see a local peer.
    #[serde(default)]
    pub looks_local: u64,
    /// Connections that were given to a relay.
    #[serde(default)]
    pub relayed: u64,
}

/// The Docker Engine, or Podman.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum DockerStatus {
    /// The daemon runs with `--no-docker`.
    Off,
    /// The engine answers.
    Reachable {
        /// The product: Docker or Podman.
        #[serde(default)]
        engine: EngineKind,
        /// The engine's version.
        version: String,
    },
    /// The engine does not answer; rules in force stay in force.
    Away {
        /// The product: Docker or Podman.
        #[serde(default)]
        engine: EngineKind,
        /// Time since which it has not answered; `None` if it was not asked yet.
        since: Option<Timestamp>,
        /// The reason why it does not answer.
        error: String,
    },
}

/// A rule and its status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleStatus {
    /// The network, as the rule names it.
    pub network: Network,
    /// The dialled port.
    pub port: u16,
    /// The IP protocol that the rule serves.
    #[serde(default)]
    pub protocol: Protocol,
    /// The target: the rule's loopback service.
    pub target: String,
    /// The options of the rule: all of them, given or not.
    #[serde(flatten)]
    pub options: Options,
    /// The origin of the rule: who or what made it.
    pub origin: Origin,
    /// The worst state of its gateways and dials; aliases do not count.
    pub state: State,
    /// The reason for the state, as text; `None` if there is nothing to say.
    pub why: Option<String>,
    /// The reasons for the state, for programs.
    #[serde(default)]
    pub reasons: Vec<ReasonStatus>,
    /// Number of connections that its relays refused because there were too many.
    #[serde(default)]
    pub refused: u64,
    /// Number of connections that its relays carry now.
    #[serde(default)]
    pub open: u32,
    /// Bytes that its relays have moved to the service. Bytes of steered connections are not counted
    /// anywhere.
    #[serde(default)]
    pub to_service: u64,
    /// Bytes that its relays have moved to the client.
    #[serde(default)]
    pub to_client: u64,
    /// The status of each address that a container can dial.
    pub gateways: Vec<GatewayStatus>,
    /// The status of each address of the containers' own localhost that leads to a gateway.
    #[serde(default)]
    pub dials: Vec<DialStatus>,
}

impl RuleStatus {
    /// Returns the rule's identity: network, port and protocol.
    pub fn id(&self) -> RuleId {
        RuleId { network: self.network.clone(), port: self.port, protocol: self.protocol }
    }
}

#[cfg(test)]
impl RuleStatus {
    /// Creates a steered rule, as `allow` without options makes it.
    pub fn example(network: &str, port: u16, target: &str, gateways: Vec<GatewayStatus>) -> Self {
        Self {
            network: network.parse().unwrap(),
            port,
            protocol: Protocol::Tcp,
            target: target.to_owned(),
            options: Options::default(),
            origin: Origin::Cli,
            state: State::Steered,
            why: None,
            reasons: vec![],
            refused: 0,
            open: 0,
            to_service: 0,
            to_client: 0,
            gateways,
            dials: vec![],
        }
    }
}

/// The status of one of a rule's gateways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// The address that containers dial.
    pub address: IpAddr,
    /// The bridge's name; `lo` inside a network namespace.
    pub interface: String,
    /// The network namespace that the interface is in; `None` for the host's.
    #[serde(default)]
    pub namespace: Option<NamespaceStatus>,
    /// The alias, if this is not an address of the network's own bridge. An alias does not count for the
    /// rule's state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<Alias>,
    /// The source addresses that are served there now, for a rule for some containers; absent if it is for
    /// all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sources: Option<BTreeSet<IpAddr>>,
    /// The user who owns the service's listener, while connections are led to one; unknown for a Unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener_user: Option<ListenerUser>,
    /// The state, as observed.
    pub state: State,
    /// The reason for the state, as text; `None` if there is nothing to say.
    pub why: Option<String>,
    /// The reasons for the state, for programs.
    #[serde(default)]
    pub reasons: Vec<ReasonStatus>,
    /// Number of connections served since the entry was put or the relay opened.
    pub connections: u64,
}

/// A reason for a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonStatus {
    /// A stable code, such as `nothing_listens`. It does not change when the text does.
    pub code: String,
    /// The reason as text.
    pub why: String,
}

impl From<&Reason> for ReasonStatus {
    fn from(reason: &Reason) -> Self {
        Self { code: reason.code().to_owned(), why: reason.to_string() }
    }
}

/// A user of the host who owns a listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerUser {
    /// The user's uid.
    pub uid: u32,
    /// The user's name; `None` if there is none or the host's user database did not answer in time.
    #[serde(default)]
    pub name: Option<String>,
}

impl fmt::Display for ListenerUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "user {name} (uid {})", self.uid),
            None => write!(f, "uid {}", self.uid),
        }
    }
}

/// The status of an address of the containers' own localhost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialStatus {
    /// The address that containers dial.
    pub address: IpAddr,
    /// The bridge that the containers are on.
    pub interface: String,
    /// The gateway that the address leads to.
    pub gateway: Option<IpAddr>,
    /// Number of network namespaces whose localhost this is. Containers may share one.
    pub containers: usize,
    /// The state, as observed; the gateway's state if the address leads there.
    pub state: State,
    /// The reason for the state, as text; `None` if there is nothing to say.
    pub why: Option<String>,
    /// The reasons for the state, for programs.
    #[serde(default)]
    pub reasons: Vec<ReasonStatus>,
}

/// A network namespace other than the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceStatus {
    /// The path of the namespace's file.
    pub path: PathBuf,
    /// The inode of that file.
    pub inode: u64,
}

/// The body of a request to add rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    /// The rules to add. Either all are added or none.
    pub rules: Vec<Rule>,
}

/// The body of a request to remove rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deny {
    /// The network whose rules are removed.
    pub network: Network,
    /// The TCP ports to remove. Either all rules are removed or none.
    #[serde(default)]
    pub ports: Vec<u16>,
    /// The UDP ports to remove.
    #[serde(default)]
    pub udp_ports: Vec<u16>,
}

/// An event, published to every subscriber.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The time at which the daemon noticed it.
    pub at: Timestamp,
    /// The event itself.
    #[serde(flatten)]
    pub what: EventKind,
}

/// The kinds of event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[cfg_attr(test, derive(strum::VariantNames), strum(serialize_all = "snake_case"))]
pub enum EventKind {
    /// The first line of the stream: every later event follows.
    Following {
        /// The daemon's version.
        version: String,
    },
    /// A rule was added.
    Allowed {
        /// The rule's network.
        network: Network,
        /// The rule's port.
        port: u16,
        /// The rule's IP protocol.
        #[serde(default)]
        protocol: Protocol,
        /// The uid of the user who added it; `None` if that is unknown.
        uid: Option<u32>,
    },
    /// A rule was removed.
    Denied {
        /// The rule's network.
        network: Network,
        /// The rule's port.
        port: u16,
        /// The rule's IP protocol.
        #[serde(default)]
        protocol: Protocol,
        /// The uid of the user who removed it; `None` if that is unknown.
        uid: Option<u32>,
    },
    /// A label now asks for a rule that nobody else has made, or no label does any more.
    Labelled {
        /// The rule's network.
        network: Network,
        /// The rule's port.
        port: u16,
        /// The rule's IP protocol.
        #[serde(default)]
        protocol: Protocol,
        /// True if a label asks for the rule now.
        asked: bool,
    },
    /// lbridge cannot follow a label.
    BadLabel(labels::Problem),
    /// A rule is in another state than before.
    State {
        /// The rule's network.
        network: Network,
        /// The rule's port.
        port: u16,
        /// The rule's IP protocol.
        #[serde(default)]
        protocol: Protocol,
        /// The new state, as observed.
        state: State,
        /// The reason for the state, as text; `None` if there is nothing to say.
        why: Option<String>,
        /// The reasons for the state, for programs.
        #[serde(default)]
        reasons: Vec<ReasonStatus>,
    },
    /// A socket has started to listen on a port that a rule leads to.
    Listening {
        /// The listener's port.
        port: u16,
    },
    /// A socket has started to listen on such a port, but the kernel refused to register it.
    Unregistered {
        /// The listener's port.
        port: u16,
        /// The kernel's error, as text.
        error: String,
    },
    /// A socket has stopped listening.
    Closed {
        /// The listener's port.
        port: u16,
    },
    /// The Docker Engine, or Podman, has started or stopped answering.
    Docker {
        /// The product: Docker or Podman.
        #[serde(default)]
        engine: EngineKind,
        /// The engine's version; `None` while it does not answer.
        version: Option<String>,
        /// The reason why it does not answer.
        error: Option<String>,
    },
    /// Relays have refused connections because there were too many.
    Refused {
        /// The rule's network.
        network: Network,
        /// The rule's port.
        port: u16,
        /// The rule's IP protocol.
        #[serde(default)]
        protocol: Protocol,
        /// Number of refused connections since the last such event.
        connections: u64,
    },
    /// This subscriber was too slow and has missed events.
    Missed {
        /// Number of events lost, the oldest ones.
        events: u64,
    },
    /// An event that this version does not know.
    #[serde(other)]
    Unknown,
}

/// The kind of an error. The codes are stable, so that scripts can rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(test, derive(strum::VariantNames), strum(serialize_all = "snake_case"))]
pub enum ErrorCode {
    /// The daemon could not carry out the request.
    Failed,
    /// The request is invalid.
    Usage,
    /// The request contradicts an existing rule.
    Conflict,
    /// There is no such rule.
    NoSuchRule,
}

/// The body of every answer whose status is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The error's code, for programs.
    pub code: ErrorCode,
    /// The error's text, for people: the problem, and what to do.
    pub message: String,
}

//! What client and daemon say to each other. Additions are compatible, so unknown fields are ignored.

use std::{collections::BTreeSet, fmt, net::IpAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::planning::{
    firewall::FirewallMode,
    inventory::{DockerNetwork, Product},
    labels,
    policy::{Alias, State},
    reason::Reason,
    rule::{Network, Origin, PathChoice, Protocol, ProxyProtocol, Rule, RuleId, Source},
};

/// `GET`: a [`Status`].
pub const STATUS: &str = "/v1/status";
/// `POST` an [`Allow`]: a list of [`RuleStatus`], as it then is.
pub const ALLOW: &str = "/v1/allow";
/// `POST` a [`Deny`]: a list of [`RuleStatus`], as it was; as it now is, where a label asks for it, too.
pub const DENY: &str = "/v1/deny";
/// `POST` a [`Question`](crate::planning::explain::Question): an [`Explanation`](crate::planning::explain::Explanation).
pub const EXPLAIN: &str = "/v1/explain";

/// `POST` nothing: a [`Reloaded`].
pub const RELOAD: &str = "/v1/reload";
/// `GET`: [`Event`]s, a line of JSON each, for as long as somebody reads.
pub const EVENTS: &str = "/v1/events";

/// Everything at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The kernel half.
    pub kernel: KernelStatus,
    /// The Docker Engine.
    pub docker: DockerStatus,
    /// The host's firewall.
    #[serde(default)]
    pub firewall: FirewallStatus,
    /// The engine's networks; the last known while it is away.
    #[serde(default)]
    pub docker_networks: Vec<DockerNetwork>,
    /// Labels of containers and networks.
    #[serde(default)]
    pub labels: LabelStatus,
    /// In order of network and port.
    pub rules: Vec<RuleStatus>,
    /// The configuration file is not what is in force.
    #[serde(default)]
    pub refused_reload: Option<RefusedReload>,
}

/// Labels of containers and networks, and what is wrong with them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelStatus {
    /// Whether they are read.
    pub enabled: bool,
    /// What is wrong with labels, of the first that are.
    pub problems: Vec<labels::Problem>,
    /// How many problems there are beside.
    pub more_problems: usize,
}

/// A configuration file that was read again and is of no use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedReload {
    /// Of the first of several in a row.
    pub since: Timestamp,
    /// What is wrong, where; of the last.
    pub error: String,
}

/// What another configuration has brought about. Of rules that the file has, and had, and has otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// As they now are.
    pub added: Vec<RuleStatus>,
    /// As they now are.
    pub changed: Vec<RuleStatus>,
    /// As they were.
    pub removed: Vec<RuleStatus>,
    /// Everything that is no rule.
    pub settings: Vec<SettingChange>,
}

/// A setting that is another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingChange {
    /// As in the file.
    pub name: String,
    /// As one would write it.
    pub before: String,
    /// As one would write it.
    pub now: String,
}

impl fmt::Display for SettingChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}, was {}", self.name, self.now, self.before)
    }
}

/// The host's firewall, in front of what rules open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirewallStatus {
    /// Whether accept rules are kept where they are needed.
    pub mode: FirewallMode,
    /// Firewalls with a chain that may deny.
    pub firewalls: Vec<String>,
    /// Accept rules of lbridge's.
    pub accept_rules: usize,
    /// Why the ruleset, or a part of it, could not be read.
    pub unreadable: Option<String>,
    /// Why it could not be tried what arrives; for the first rule of which this is so.
    pub untried: Option<String>,
}

/// How the kernel takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelPath {
    /// Connections are steered by `sk_lookup`.
    Steer,
    /// It does not.
    None,
}

/// The kernel half.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelStatus {
    /// How it takes part.
    pub path: KernelPath,
    /// Why it does not.
    pub why: Option<String>,
    /// Whether the ingress interface is checked, not the source subnet alone.
    pub interface_check: bool,
    /// Whether the kernel registers a service that starts while the daemon is down.
    pub registers_listeners: bool,
    /// Outcomes since the programs were loaded first; `None` where there is no kernel half.
    pub counters: Option<Counters>,
}

/// How often outcomes came about in the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Connections given to their listener.
    pub steered: u64,
    /// Connections to a rule's gateway and port from outside of its subnet, left alone.
    pub foreign_source: u64,
    /// Connections refused since nothing was registered.
    pub no_listener: u64,
    /// Connections refused since the kernel did not take the listener.
    pub assign_failed: u64,
    /// Listeners registered by the kernel program.
    pub registered: u64,
    /// Listeners that the kernel refused.
    pub register_refused: u64,
    /// Connections of a rule's subnet that the rule does not admit, left alone.
    #[serde(default)]
    pub not_listed: u64,
    /// Connections of a rule's subnet that the rule does not admit and that only lbridge's accept rule let in, refused.
    #[serde(default)]
    pub denied: u64,
    /// Connections refused because a service that takes them would see a local peer.
    #[serde(default)]
    pub looks_local: u64,
    /// Connections given to a relay.
    #[serde(default)]
    pub relayed: u64,
}

/// The Docker Engine, or Podman.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum DockerStatus {
    /// `--no-docker`.
    Off,
    /// It answers.
    Reachable {
        /// Which it is.
        #[serde(default)]
        engine: Product,
        /// Its version.
        version: String,
    },
    /// It does not; rules in force stay in force.
    Away {
        /// Which it was.
        #[serde(default)]
        engine: Product,
        /// Since when; `None` while it was not asked yet.
        since: Option<Timestamp>,
        /// Why.
        error: String,
    },
}

/// A rule, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleStatus {
    /// Network, as the rule names it.
    pub network: Network,
    /// Dialled port.
    pub port: u16,
    /// What is spoken there.
    #[serde(default)]
    pub protocol: Protocol,
    /// Where it leads.
    pub target: String,
    /// Names of the containers that it is for; for all of the network, if there is none.
    #[serde(default)]
    pub from: BTreeSet<String>,
    /// Whether the port of the containers' own localhost leads there, too.
    #[serde(default)]
    pub localhost: bool,
    /// What the service sees.
    pub source: Source,
    /// Which way was asked for.
    pub path: PathChoice,
    /// Connections at a time, at most, where the rule says.
    #[serde(default)]
    pub max_connections: Option<NonZeroU32>,
    /// A connection that has been without a byte for that long is reset.
    #[serde(default, with = "jiff::fmt::serde::unsigned_duration::friendly::compact::optional")]
    pub idle_timeout: Option<Duration>,
    /// Version of the header that tells the service who connects.
    #[serde(default)]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The administrator's remark.
    pub comment: Option<String>,
    /// Who made it.
    pub origin: Origin,
    /// The worst of the gateways'.
    pub state: State,
    /// Why, for a person.
    pub why: Option<String>,
    /// The same, for a program.
    #[serde(default)]
    pub reasons: Vec<ReasonStatus>,
    /// Connections that its relays refused since there were too many.
    #[serde(default)]
    pub refused: u64,
    /// Connections that its relays carry now.
    #[serde(default)]
    pub open: u32,
    /// Bytes that its relays have moved to the service; of what the kernel steers nobody knows.
    #[serde(default)]
    pub to_service: u64,
    /// And back.
    #[serde(default)]
    pub to_client: u64,
    /// One for each address that a container can dial.
    pub gateways: Vec<GatewayStatus>,
    /// One for each address of the containers' own localhost that leads to a gateway.
    #[serde(default)]
    pub dials: Vec<DialStatus>,
}

impl RuleStatus {
    /// What tells it from others.
    pub fn id(&self) -> RuleId {
        RuleId { network: self.network.clone(), port: self.port, protocol: self.protocol }
    }
}

#[cfg(test)]
impl RuleStatus {
    /// Steered, as `allow` makes it without options.
    pub fn example(network: &str, port: u16, target: &str, gateways: Vec<GatewayStatus>) -> Self {
        Self {
            network: network.parse().unwrap(),
            port,
            protocol: Protocol::Tcp,
            target: target.to_owned(),
            from: BTreeSet::new(),
            localhost: false,
            source: Source::Container,
            path: PathChoice::Auto,
            max_connections: None,
            idle_timeout: None,
            proxy_protocol: None,
            comment: None,
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

/// What becomes of one of a rule's gateways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// What containers dial.
    pub address: IpAddr,
    /// The bridge; `lo` inside a namespace.
    pub interface: String,
    /// Which namespace that is, if it is not the host's.
    #[serde(default)]
    pub namespace: Option<NamespaceStatus>,
    /// What it is, if it is no address of the network's own bridge. Says nothing of the rule's state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<Alias>,
    /// The addresses that are served there now, of a rule for some containers; absent if it is for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sources: Option<BTreeSet<IpAddr>>,
    /// The user who owns the service's listener, while connections are led to one; of a Unix socket that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener_user: Option<ListenerUser>,
    /// As observed.
    pub state: State,
    /// Why, for a person.
    pub why: Option<String>,
    /// The same, for a program.
    #[serde(default)]
    pub reasons: Vec<ReasonStatus>,
    /// Connections served since the entry was put or the relay opened.
    pub connections: u64,
}

/// One of the reasons for a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonStatus {
    /// Its name, such as `nothing_listens`. It stays the same when the words change.
    pub code: String,
    /// The words.
    pub why: String,
}

impl From<&Reason> for ReasonStatus {
    fn from(reason: &Reason) -> Self {
        Self { code: reason.code().to_owned(), why: reason.to_string() }
    }
}

/// A user of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerUser {
    /// The user's number.
    pub uid: u32,
    /// The user's name, if there is one and the host's list of users told it in time.
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

/// What becomes of connections to the containers' own localhost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialStatus {
    /// What containers dial.
    pub address: IpAddr,
    /// The bridge that they are on.
    pub interface: String,
    /// The gateway that it leads to.
    pub gateway: Option<IpAddr>,
    /// Network namespaces whose localhost that is: containers, or what containers share.
    pub containers: usize,
    /// As observed; the gateway's, where it leads there.
    pub state: State,
    /// Why, for a person.
    pub why: Option<String>,
    /// The same, for a program.
    #[serde(default)]
    pub reasons: Vec<ReasonStatus>,
}

/// A network namespace other than the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceStatus {
    /// Where it is found.
    pub path: PathBuf,
    /// Its inode there.
    pub inode: u64,
}

/// Rules to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    /// All or none.
    pub rules: Vec<Rule>,
}

/// Rules to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deny {
    /// From this network
    pub network: Network,
    /// All or none, by TCP.
    #[serde(default)]
    pub ports: Vec<u16>,
    /// And by UDP.
    #[serde(default)]
    pub udp_ports: Vec<u16>,
}

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When it was noticed.
    pub at: Timestamp,
    /// What.
    #[serde(flatten)]
    pub what: Happening,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happening {
    /// The first line: from now on everything is told.
    Following {
        /// The daemon's version.
        version: String,
    },
    /// A rule was made.
    Allowed {
        /// Its network.
        network: Network,
        /// Its port.
        port: u16,
        /// What is spoken there.
        #[serde(default)]
        protocol: Protocol,
        /// The user who made it, where that is known.
        uid: Option<u32>,
    },
    /// A rule was removed.
    Denied {
        /// Its network.
        network: Network,
        /// Its port.
        port: u16,
        /// What is spoken there.
        #[serde(default)]
        protocol: Protocol,
        /// The user who removed it, where that is known.
        uid: Option<u32>,
    },
    /// A label asks for a rule that nobody else has made, or none does any more.
    Labelled {
        /// The rule's network.
        network: Network,
        /// The rule's port.
        port: u16,
        /// What is spoken there.
        #[serde(default)]
        protocol: Protocol,
        /// Whether one does.
        asked: bool,
    },
    /// A label that cannot be followed.
    BadLabel(labels::Problem),
    /// A rule is in another state than before.
    State {
        /// Its network.
        network: Network,
        /// Its port.
        port: u16,
        /// What is spoken there.
        #[serde(default)]
        protocol: Protocol,
        /// As observed.
        state: State,
        /// Why, for a person.
        why: Option<String>,
        /// The same, for a program.
        #[serde(default)]
        reasons: Vec<ReasonStatus>,
    },
    /// A socket listens on a port that a rule leads to.
    Listening {
        /// Its port.
        port: u16,
    },
    /// As before, and the kernel refused to register it.
    Unregistered {
        /// Its port.
        port: u16,
        /// Why.
        error: String,
    },
    /// A socket listens no more.
    Closed {
        /// Its port.
        port: u16,
    },
    /// The Docker Engine answers, or does not any more.
    Docker {
        /// Which it is.
        #[serde(default)]
        engine: Product,
        /// Its version; `None` while it is away.
        version: Option<String>,
        /// Why it is away.
        error: Option<String>,
    },
    /// Relays have refused connections since there were too many.
    Refused {
        /// The rule's network.
        network: Network,
        /// The rule's port.
        port: u16,
        /// What is spoken there.
        #[serde(default)]
        protocol: Protocol,
        /// How many, since this was told last.
        connections: u64,
    },
    /// More has happened than this subscriber has read.
    Missed {
        /// How many events it lost, the oldest.
        events: u64,
    },
    /// Something that this version does not know of.
    #[serde(other)]
    Unknown,
}

/// What went wrong; stable, so that scripts can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The daemon could not do it.
    Failed,
    /// The request makes no sense.
    Usage,
    /// The request contradicts a rule there is.
    Conflict,
    /// There is no such rule.
    NoSuchRule,
}

/// The body of every answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what, and what to do.
    pub message: String,
}

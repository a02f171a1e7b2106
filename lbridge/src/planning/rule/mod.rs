//! Rules: what the administrator wants.
//!
//! - `network`, `port`: what is written, parsed;
//! - `set`: all rules, which `allow` and `deny` change.

mod network;
mod port;
mod set;

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    num::NonZeroU32,
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::text::excerpt;

pub use self::{
    network::{Network, container_name},
    port::{PortSpec, Protocol, Target},
    set::{Refused, Rules},
};

/// `Serialize` and `Deserialize` through `Display` and `FromStr`: files and the API say what the CLI says.
macro_rules! as_text {
    ($($type:ty),+) => {
        $(
            impl Serialize for $type {
                fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                    serializer.collect_str(self)
                }
            }

            impl<'de> Deserialize<'de> for $type {
                fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
                }
            }
        )+
    };
}

/// What is wrong with a text, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(String);

fn invalid<T>(text: String) -> Result<T, Invalid> {
    Err(Invalid(text))
}

/// What the service sees as its peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The container's own address.
    #[default]
    Container,
    /// A loopback address, as if the client ran on the host: whatever trusts 127.0.0.1 then trusts the network.
    Loopback,
}

/// Which way connections take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PathChoice {
    /// Steered in the kernel where it can be, relayed where not.
    #[default]
    Auto,
    /// Steered or not at all.
    Steer,
    /// Relayed.
    Relay,
}

/// `FromStr` through the names that serde has: the CLI, the files and the API say the same words.
macro_rules! from_serde_name {
    ($($type:ty: $choices:literal),+) => {
        $(
            impl FromStr for $type {
                type Err = Invalid;

                fn from_str(text: &str) -> Result<Self, Invalid> {
                    let name = serde::de::value::StrDeserializer::<serde::de::value::Error>::new(text);
                    Self::deserialize(name).or_else(|_| invalid(format!("{text:?}; write {}", $choices)))
                }
            }
        )+
    };
}

from_serde_name!(Source: "container or loopback", PathChoice: "auto, steer or relay");

/// Version of the PROXY protocol: who connects is told in a header before the first byte, to services that read it
/// (haproxy's doc/proxy-protocol.txt).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

from_serde_name!(ProxyProtocol: "v1 or v2");

/// Which process a number meant when a rule was made: numbers are given again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessStart {
    /// Clock ticks from boot to the process's start (field 22 of /proc/PID/stat, proc(5)).
    pub ticks: u64,
    /// Which boot (/proc/sys/kernel/random/boot_id).
    pub boot: String,
}

impl fmt::Display for ProcessStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.ticks, self.boot)
    }
}

impl FromStr for ProcessStart {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text.split_once('@').map(|(ticks, boot)| (ticks.parse(), boot)) {
            Some((Ok(ticks), boot)) => Ok(Self { ticks, boot: boot.to_owned() }),
            _ => invalid(format!("{text:?} is no process's start; write TICKS@BOOT_ID")),
        }
    }
}

as_text!(Network, PortSpec, ProcessStart);

/// Connections that a relay carries for one rule at a time, unless the rule or the limit of open files says less.
pub const DEFAULT_CONNECTIONS: u32 = 16_384;

/// A rule: containers of `network` that dial its gateway at `spec.port` reach `spec.target`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// From where.
    pub network: Network,
    /// What is dialled, and where it leads.
    #[serde(rename = "port")]
    pub spec: PortSpec,
    /// Names of the containers that it is for; for all of the network, if there is none.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub from: BTreeSet<String>,
    /// Whether the port of the containers' own localhost leads there, too.
    #[serde(default, skip_serializing_if = "is_default")]
    pub localhost: bool,
    /// What the service sees.
    #[serde(default, skip_serializing_if = "is_default")]
    pub source: Source,
    /// Which way.
    #[serde(default, skip_serializing_if = "is_default")]
    pub path: PathChoice,
    /// Connections at a time, at most; [`DEFAULT_CONNECTIONS`] if not said. Kept by relays alone, as all that follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<NonZeroU32>,
    /// A connection that has been without a byte for that long is reset.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        with = "jiff::fmt::serde::unsigned_duration::friendly::compact::optional"
    )]
    pub idle_timeout: Option<Duration>,
    /// Tell the service who connects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Which process, of a `pid:` network. The daemon fills it in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessStart>,
    /// The administrator's remark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Rule {
    /// Without options.
    pub fn new(network: Network, spec: PortSpec) -> Self {
        Self {
            network,
            spec,
            from: BTreeSet::new(),
            localhost: false,
            source: Source::default(),
            path: PathChoice::default(),
            max_connections: None,
            idle_timeout: None,
            proxy_protocol: None,
            process: None,
            comment: None,
        }
    }

    /// What tells it from others.
    pub fn id(&self) -> RuleId {
        RuleId { network: self.network.clone(), port: self.spec.port, protocol: self.spec.protocol }
    }

    /// Whether both mean the same; remarks aside.
    fn same_effect(&self, other: &Self) -> bool {
        self.id() == other.id()
            && self.spec == other.spec
            && self.from == other.from
            && self.localhost == other.localhost
            && self.source == other.source
            && self.path == other.path
            && self.max_connections == other.max_connections
            && self.idle_timeout == other.idle_timeout
            && self.proxy_protocol == other.proxy_protocol
    }

    /// Why the kernel cannot have the rule's connections, whatever listens.
    pub fn needs_relay(&self) -> Option<&'static str> {
        if self.network.is_namespace() {
            return Some(
                "the kernel steers what comes in on the host's bridges, not from inside a namespace",
            );
        }
        if self.proxy_protocol.is_some() {
            return Some("only a relay can send the PROXY protocol's header");
        }
        let limited = self.max_connections.is_some() || self.idle_timeout.is_some();
        limited.then_some("only a relay can keep the rule's limits")
    }
}

/// A rule's identity: there is one for each (network, dialled port, protocol).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId {
    /// From where.
    pub network: Network,
    /// Dialled port.
    pub port: u16,
    /// What is spoken there.
    pub protocol: Protocol,
}

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.network, self.port, self.protocol.suffix())
    }
}

/// A remark on a rule: one line of text. Marks of writing direction are part of some languages; whoever shows them escapes them.
pub fn comment(text: &str) -> Result<String, Invalid> {
    /// Characters of the text that the error shows.
    const SHOWN: usize = 40;
    if text.chars().any(char::is_control) {
        return invalid(format!(
            "the comment \"{}\" is not one line of text; leave out line breaks and control characters",
            excerpt(text, SHOWN)
        ));
    }
    Ok(text.to_owned())
}

/// Who made a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// `lbridge allow`.
    Cli,
    /// `lbridge.toml`: read-only to the CLI.
    Config,
    /// A label of a container or a network: as that.
    Label,
}

impl Rule {
    /// Checks the fields that hold any text, whoever filled them in: those with a type of their own were checked when they
    /// were parsed.
    fn check_text(&self) -> Result<(), Invalid> {
        self.from.iter().try_for_each(|name| container_name(name).map(drop))?;
        self.comment.iter().try_for_each(|text| comment(text).map(drop))
    }

    /// Which of its options do not go together.
    fn contradiction(&self) -> Option<&'static str> {
        if self.network.is_namespace() {
            if self.localhost {
                return Some("it is served on localhost inside anyway; leave --localhost out");
            }
            if !self.from.is_empty() {
                return Some("it is one namespace, whoever is in it; leave --from out");
            }
            if self.protocol() == Protocol::Udp {
                return Some("inside a namespace only TCP can be served; allow UDP on a network");
            }
        }
        if self.protocol() == Protocol::Tcp {
            return None;
        }
        if matches!(self.spec.target, Target::Unix(_)) {
            return Some("UDP does not lead to a Unix socket");
        }
        if self.spec.target.port() != Some(self.spec.port) {
            return Some(
                "a UDP rule leads to the same port number, which the answers come from; have the service use it, or dial the service's own",
            );
        }
        if self.localhost {
            return Some("of localhost TCP alone is led to the host; leave --localhost out");
        }
        if self.source == Source::Loopback {
            return Some("a UDP service answers the address that it sees; leave --source loopback out");
        }
        (self.path == PathChoice::Relay || self.needs_relay().is_some())
            .then_some("UDP is steered, never relayed; leave out what needs a relay")
    }

    fn protocol(&self) -> Protocol {
        self.spec.protocol
    }

    /// As the arguments of `allow`.
    pub(super) fn options(&self) -> String {
        let mut options = self.spec.to_string();
        options += match self.source {
            Source::Container => "",
            Source::Loopback => " --source loopback",
        };
        options += match self.path {
            PathChoice::Auto => "",
            PathChoice::Steer => " --path steer",
            PathChoice::Relay => " --path relay",
        };
        if self.localhost {
            options += " --localhost";
        }
        if !self.from.is_empty() {
            let from: Vec<_> = self.from.iter().map(String::as_str).collect();
            let _ = write!(options, " --from {}", from.join(","));
        }
        if let Some(max) = self.max_connections {
            let _ = write!(options, " --max-connections {max}");
        }
        if let Some(idle) = self.idle_timeout {
            let _ = write!(options, " --idle-timeout {}s", idle.as_secs_f64());
        }
        match self.proxy_protocol {
            Some(ProxyProtocol::V1) => options += " --proxy-protocol v1",
            Some(ProxyProtocol::V2) => options += " --proxy-protocol v2",
            None => {}
        }
        options
    }
}

#[cfg(test)]
mod tests;

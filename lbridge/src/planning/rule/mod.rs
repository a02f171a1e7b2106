//! Rules: what the administrator wants.
//!
//! - `network`, `port`: parse what is written;
//! - `set`: holds all rules, which `allow` and `deny` change.

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

/// Implements `Serialize` and `Deserialize` through `Display` and `FromStr`: files and the API use the CLI's
/// syntax.
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

/// The error in a text, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(String);

fn invalid<T>(text: String) -> Result<T, Invalid> {
    Err(Invalid(text))
}

/// The peer that the service sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The container's own address.
    #[default]
    Container,
    /// A loopback address, as if the client ran on the host: a service that trusts 127.0.0.1 then trusts the
    /// network.
    Loopback,
}

/// The path that connections take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PathChoice {
    /// Steered in the kernel where that is possible, otherwise relayed.
    #[default]
    Auto,
    /// Steered, or not served at all.
    Steer,
    /// Relayed in every case.
    Relay,
}

/// Implements `FromStr` through serde's names: the CLI, the files and the API use the same words.
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

/// Version of the PROXY protocol: a header before the first byte tells the service who connects, if the
/// service reads it (haproxy's doc/proxy-protocol.txt).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// Version 1, a line of text.
    V1,
    /// Version 2, in binary.
    V2,
}

from_serde_name!(ProxyProtocol: "v1 or v2");

/// The start of a process, which tells it from later processes with the same number: the kernel reuses
/// numbers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessStart {
    /// Clock ticks from boot to the process's start (field 22 of /proc/PID/stat, proc(5)).
    pub ticks: u64,
    /// The boot that the ticks count from (/proc/sys/kernel/random/boot_id).
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

/// Most connections that a relay carries for one rule at a time, unless the rule sets another limit or the
/// limit of open files allows fewer.
pub const DEFAULT_CONNECTIONS: u32 = 16_384;

/// A rule: containers of `network` that dial its gateway at `spec.port` reach `spec.target`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The network that connections come from.
    pub network: Network,
    /// The port that is dialled, and the service that it leads to.
    #[serde(rename = "port")]
    pub spec: PortSpec,
    /// Names or ids of the containers that the rule is for. If empty, the rule is for the whole network.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub from: BTreeSet<String>,
    /// True if the port on the containers' own localhost leads to the service, too.
    #[serde(default, skip_serializing_if = "is_default")]
    pub localhost: bool,
    /// The peer that the service sees.
    #[serde(default, skip_serializing_if = "is_default")]
    pub source: Source,
    /// The path that connections take.
    #[serde(default, skip_serializing_if = "is_default")]
    pub path: PathChoice,
    /// Largest number of connections at a time; `None` for [`DEFAULT_CONNECTIONS`]. Only relays enforce it,
    /// as they do `idle_timeout` and `proxy_protocol`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<NonZeroU32>,
    /// Time without a byte after which a connection is reset; `None` for no limit.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        with = "jiff::fmt::serde::unsigned_duration::friendly::compact::optional"
    )]
    pub idle_timeout: Option<Duration>,
    /// Version of the PROXY protocol, whose header tells the service who connects; `None` for no header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The start of the process of a `pid:` network. The daemon fills it in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessStart>,
    /// The administrator's comment, one line of text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Rule {
    /// Creates a rule without options.
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

    /// Returns the rule's identity.
    pub fn id(&self) -> RuleId {
        RuleId { network: self.network.clone(), port: self.spec.port, protocol: self.spec.protocol }
    }

    /// Returns true if both rules have the same effect. Compares neither comments nor processes.
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

    /// Returns why the kernel cannot serve the rule's connections, whatever listens; `None` if it can.
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
    /// The network that connections come from.
    pub network: Network,
    /// The port that is dialled.
    pub port: u16,
    /// The protocol of the port.
    pub protocol: Protocol,
}

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.network, self.port, self.protocol.suffix())
    }
}

/// Checks a comment on a rule: one line of text. Marks of writing direction are allowed, since some languages
/// need them; whoever shows a comment escapes them.
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

/// The origin of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The command `lbridge allow`.
    Cli,
    /// The configuration file, `lbridge.toml`; read-only to the CLI.
    Config,
    /// A label of a container or a network; read-only to the CLI.
    Label,
}

impl Rule {
    /// Checks the fields that hold free text, whoever filled them in. Fields with a type of their own were
    /// checked when they were parsed.
    fn check_text(&self) -> Result<(), Invalid> {
        self.from.iter().try_for_each(|name| container_name(name).map(drop))?;
        self.comment.iter().try_for_each(|text| comment(text).map(drop))
    }

    /// Returns which of the rule's options do not go together; `None` if all of them do.
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
                "a UDP rule leads to the same port number, which the answers come from; have the service use \
                 it, or dial the service's own",
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

    /// Returns the port and the options as arguments of `allow`.
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

//! Rules: what the administrator wants.
//!
//! - `network`, `port`: parse what is written;
//! - `options`: what a rule may ask for besides;
//! - `set`: holds all rules, which `allow` and `deny` change;
//! - `error`: why they refuse a change, spelled for the place where the rule was written.

mod error;
mod network;
mod options;
mod port;
mod set;

use std::{fmt, str::FromStr};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess},
};

use super::text::excerpt;

pub use self::{
    error::{Contradiction, RuleError, Spelling},
    network::{Network, container_name},
    options::{Beside, Options, Value, time, with_options},
    port::{PortSpec, Protocol, Target},
    set::Rules,
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
pub enum DatapathChoice {
    /// Steered in the kernel where that is possible, otherwise relayed.
    #[default]
    Auto,
    /// Steered, or not served at all.
    Steer,
    /// Relayed in every case.
    Relay,
}

/// Implements `Display` and `FromStr` through serde's names: the CLI, the files and the API use the same
/// words.
macro_rules! by_serde_name {
    ($($type:ty: $choices:literal),+) => {
        $(
            impl fmt::Display for $type {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    self.serialize(f)
                }
            }

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

by_serde_name!(Source: "container or loopback", DatapathChoice: "auto, steer or relay");

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

by_serde_name!(ProxyProtocol: "v1 or v2");

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
            _ => invalid(format!("{text:?} is not a process's start; write TICKS@BOOT_ID")),
        }
    }
}

as_text!(Network, PortSpec, ProcessStart);

/// Most connections that a relay carries for one rule at a time, unless the rule sets another limit or the
/// limit of open files allows fewer.
pub const DEFAULT_CONNECTIONS: u32 = 16_384;

/// A rule: containers of `network` that dial its gateway at `spec.port` reach `spec.target`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// The network that connections come from.
    pub network: Network,
    /// The port that is dialled, and the service that it leads to.
    #[serde(rename = "port")]
    pub spec: PortSpec,
    /// The options of the rule.
    #[serde(flatten, serialize_with = "options::only_given")]
    pub options: Options,
    /// The start of the process of a `pid:` network. The daemon fills it in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessStart>,
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Default)]
        struct Fields {
            network: Option<Network>,
            port: Option<PortSpec>,
            process: Option<ProcessStart>,
        }

        impl<'de> Beside<'de> for Fields {
            type Whole = Rule;

            const FIELDS: &'static [&'static str] = &["network", "port", "process"];

            fn read<A: MapAccess<'de>>(&mut self, field: &str, table: &mut A) -> Result<(), A::Error> {
                match field {
                    "network" => self.network = Some(table.next_value()?),
                    "port" => self.port = Some(table.next_value()?),
                    _ => self.process = table.next_value()?,
                }
                Ok(())
            }

            fn with<E: de::Error>(self, options: Options) -> Result<Rule, E> {
                Ok(Rule {
                    network: self.network.ok_or_else(|| E::missing_field("network"))?,
                    spec: self.port.ok_or_else(|| E::missing_field("port"))?,
                    options,
                    process: self.process,
                })
            }
        }

        with_options::<Fields, D>(deserializer)
    }
}

impl Rule {
    /// Creates a rule without options.
    pub fn new(network: Network, spec: PortSpec) -> Self {
        Self { network, spec, options: Options::default(), process: None }
    }

    /// Returns the rule's identity.
    pub fn id(&self) -> RuleId {
        RuleId { network: self.network.clone(), port: self.spec.port, protocol: self.spec.protocol }
    }

    /// Returns true if both rules have the same effect. Compares neither comments nor processes.
    fn same_effect(&self, other: &Self) -> bool {
        let effects = |rule: &Self| Options { comment: None, ..rule.options.clone() };
        self.network == other.network && self.spec == other.spec && effects(self) == effects(other)
    }

    /// Returns why the kernel cannot serve the rule's connections, whatever listens; `None` if it can.
    pub fn needs_relay(&self) -> Option<&'static str> {
        if self.network.is_namespace() {
            return Some(
                "the kernel steers what comes in on the host's bridges, not from inside a namespace",
            );
        }
        if self.options.proxy_protocol.is_some() {
            return Some("only a relay can send the PROXY protocol's header");
        }
        let limited = self.options.max_connections.is_some() || self.options.idle_timeout.is_some();
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

/// Writes the name that the API uses.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl Rule {
    /// Checks the fields that hold free text, whoever filled them in. Fields with a type of their own were
    /// checked when they were parsed.
    fn check_text(&self) -> Result<(), Invalid> {
        self.options.from.iter().try_for_each(|name| container_name(name).map(drop))?;
        self.options.comment.iter().try_for_each(|text| comment(text).map(drop))
    }

    /// Returns which of the rule's options do not go together; `None` if all of them do.
    fn contradiction(&self) -> Option<Contradiction> {
        if self.network.is_namespace() {
            if self.options.localhost {
                return Some(Contradiction::LocalhostInside);
            }
            if !self.options.from.is_empty() {
                return Some(Contradiction::FromInside);
            }
            if self.protocol() == Protocol::Udp {
                return Some(Contradiction::UdpInside);
            }
        }
        if self.protocol() == Protocol::Tcp {
            return None;
        }
        if matches!(self.spec.target, Target::Unix(_)) {
            return Some(Contradiction::UdpToUnix);
        }
        if self.spec.target.port() != Some(self.spec.port) {
            return Some(Contradiction::UdpToOtherPort);
        }
        if self.options.localhost {
            return Some(Contradiction::UdpOfLocalhost);
        }
        if self.options.source == Source::Loopback {
            return Some(Contradiction::UdpFromLoopback);
        }
        let relayed = self.options.path == DatapathChoice::Relay || self.needs_relay().is_some();
        relayed.then_some(Contradiction::UdpRelayed)
    }

    fn protocol(&self) -> Protocol {
        self.spec.protocol
    }
}

#[cfg(test)]
mod tests;

//! Labels: rules that containers and networks ask for by their labels, if the administrator lets them. Such
//! rules stay within the bounds that `lbridge.toml` sets; the rules of `allow` and of the file go first. A
//! bad label is a [`Problem`] and stops nothing else. Whoever starts a container chooses its labels, so
//! everything is bounded.

mod derive;

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
};

use serde::{Deserialize, Serialize};

pub use self::derive::{Derived, derive};
use super::{
    rule::{PortSpec, Protocol, Source, Target, container_name},
    text::excerpt,
};

/// The label with the ports that are asked for. Without it the other labels mean nothing.
pub const ALLOW: &str = "lbridge.allow";
/// The label that is as `--localhost`.
pub const LOCALHOST: &str = "lbridge.localhost";
/// The label that is as `--source`.
pub const SOURCE: &str = "lbridge.source";
/// The prefix of every label of lbridge's.
const PREFIX: &str = "lbridge.";

/// Longest value of a label that is read, in bytes.
const MAX_TEXT: usize = 4096;
/// Longest excerpt of a label or a name that is shown, in characters.
const MAX_EXCERPT: usize = 80;

/// The bounds on what labels may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// True if labels are read.
    pub enabled: bool,
    /// Ports of the host that labels may lead to, and may have containers dial.
    pub ports: Vec<PortRange>,
    /// Further ports that labels may have containers dial.
    pub dialled_ports: Vec<PortRange>,
    /// The peers that labels may have services see.
    pub sources: BTreeSet<Source>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { enabled: false, ports: vec![], dialled_ports: vec![], sources: [Source::Container].into() }
    }
}

impl Settings {
    /// Returns true if labels may lead to this port of the host.
    fn may_lead_to(&self, port: u16, protocol: Protocol) -> bool {
        self.ports.iter().any(|range| range.has(port, protocol))
    }

    /// Returns true if labels may have containers dial this port of the gateway, for a port that they may
    /// lead to. A service may listen on another port for everybody, and the label would take that service's
    /// connections.
    fn may_dial(&self, port: u16, protocol: Protocol) -> bool {
        self.ports.iter().chain(&self.dialled_ports).any(|range| range.has(port, protocol))
    }
}

/// Ports of the host: `5432`, `8000-8010`, `53/udp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
    protocol: Protocol,
}

impl PortRange {
    fn has(self, port: u16, protocol: Protocol) -> bool {
        self.protocol == protocol && (self.first..=self.last).contains(&port)
    }

    /// Returns the range that a PORT argument means; `None` if the argument leads to another target.
    pub fn of(specs: &[PortSpec]) -> Option<Self> {
        let (first, last) = (specs.first()?, specs.last()?);
        let plain = specs.iter().all(|spec| spec.target == Target::Port(spec.port));
        plain.then_some(Self { first: first.port, last: last.port, protocol: first.protocol })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last != self.first {
            write!(f, "-{}", self.last)?;
        }
        f.write_str(self.protocol.suffix())
    }
}

/// The kind of an object that has labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A network: its labels are for all of its containers.
    Network,
    /// A container: its labels are for it alone.
    Container,
}

/// A network or a running container with [`ALLOW`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Labelled {
    /// The object's kind: a network or a container.
    pub kind: Kind,
    /// Time of creation, in seconds since 1970. The object that asked first for a port gets it.
    created: i64,
    name: String,
    id: String,
    /// Ids of the object's networks, or their names if the engine reports no id.
    networks: Vec<String>,
    allow: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    localhost: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    /// The first label that begins with lbridge's prefix and is none of lbridge's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unknown: Option<String>,
}

impl Labelled {
    /// Extracts what matters from an object's labels; `None` if the object asks for nothing.
    pub fn new(
        kind: Kind,
        (id, name): (String, String),
        created: i64,
        mut networks: Vec<String>,
        labels: &HashMap<String, String>,
    ) -> Option<Self> {
        // One byte more than is read shows that the value was longer.
        let value = |label| labels.get(label).map(|text: &String| cut(text, MAX_TEXT + 1).to_owned());
        let known = [ALLOW, LOCALHOST, SOURCE];
        let unknown =
            labels.keys().filter(|label| label.starts_with(PREFIX) && !known.contains(&label.as_str())).min();
        networks.sort();
        Some(Self {
            kind,
            created,
            name,
            id,
            networks,
            allow: value(ALLOW)?,
            localhost: value(LOCALHOST),
            source: value(SOURCE),
            unknown: unknown.map(|label| excerpt(label, MAX_EXCERPT)),
        })
    }

    /// Returns the object's kind and name, as in `container web`.
    pub fn told(&self) -> String {
        let name = excerpt(&self.name, MAX_EXCERPT);
        match self.kind {
            Kind::Network => format!("network {name}"),
            Kind::Container => format!("container {name}"),
        }
    }

    /// Returns the container as a rule names it: by its name, or by its id if the name is not valid or may be
    /// another's id.
    fn as_source(&self) -> String {
        let reads_as_id = self.name.len() >= 12 && self.name.bytes().all(|b| b.is_ascii_hexdigit());
        match container_name(&self.name) {
            Ok(name) if !reads_as_id => name,
            _ => self.id.clone(),
        }
    }

    /// Returns true if `name` means this container.
    fn is_meant(&self, name: &str) -> bool {
        name == self.name || (name.len() >= 12 && self.id.starts_with(name))
    }
}

/// A problem with a label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// The object that has the label, as in `container web`.
    pub object: String,
    /// The label and its value, cut off if they are long.
    pub label: String,
    /// The error in the label.
    pub wrong: String,
    /// The advice on what to do about it.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: {}; {}", self.object, self.label, self.wrong, self.remedy)
    }
}

/// Returns the beginning of the text, at most `max` bytes of it.
fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests;

//! Labels of containers and networks, where the administrator lets them ask for rules: what they ask for within the bounds
//! that `lbridge.toml` sets, beside the rules of `allow` and of the file, which go first. A bad label is a [`Problem`] and
//! stops nothing else. Whoever starts a container chooses what is in its labels: everything is bounded.

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

/// The ports that are asked for; without it the others mean nothing.
pub const ALLOW: &str = "lbridge.allow";
const LOCALHOST: &str = "lbridge.localhost";
const SOURCE: &str = "lbridge.source";
/// Whatever begins so is lbridge's.
const PREFIX: &str = "lbridge.";

/// Longest value that is read, in bytes.
const MAX_TEXT: usize = 4096;
/// What is told of a label or of a name, in characters.
const MAX_EXCERPT: usize = 80;

/// What labels may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Whether they are read.
    pub enabled: bool,
    /// The host's ports that they may lead to, and have dialled.
    pub ports: Vec<PortRange>,
    /// Ports that they may have dialled beside those.
    pub dialled_ports: Vec<PortRange>,
    /// What they may have services see.
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

    /// Returns true if labels may have containers dial this port of the gateway, for a port that they may lead to: another one may
    /// be a service's that listens there for everybody, whose connections the label would take.
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

    /// The range that a PORT argument means, unless it says where it leads.
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

/// What has labels.
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
    /// Which of the two.
    pub kind: Kind,
    /// Seconds since 1970: whoever asked first has a port.
    created: i64,
    name: String,
    id: String,
    /// Ids of its networks, or their names where the engine tells no id.
    networks: Vec<String>,
    allow: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    localhost: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    /// The first label that begins as lbridge's do and is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unknown: Option<String>,
}

impl Labelled {
    /// What is of interest of an object's labels; `None` if it asks for nothing.
    pub fn new(
        kind: Kind,
        (id, name): (String, String),
        created: i64,
        mut networks: Vec<String>,
        labels: &HashMap<String, String>,
    ) -> Option<Self> {
        // One byte more than is read tells that there was more.
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

    /// `container web`.
    pub fn told(&self) -> String {
        let name = excerpt(&self.name, MAX_EXCERPT);
        match self.kind {
            Kind::Network => format!("network {name}"),
            Kind::Container => format!("container {name}"),
        }
    }

    /// As a rule names it: by its id, where the name is none or may be another's id.
    fn as_source(&self) -> String {
        let reads_as_id = self.name.len() >= 12 && self.name.bytes().all(|b| b.is_ascii_hexdigit());
        match container_name(&self.name) {
            Ok(name) if !reads_as_id => name,
            _ => self.id.clone(),
        }
    }

    /// Whether `name` means this container.
    fn is_meant(&self, name: &str) -> bool {
        name == self.name || (name.len() >= 12 && self.id.starts_with(name))
    }
}

/// What is wrong with a label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// Whose: `container web`.
    pub object: String,
    /// The label; cut off if it is long.
    pub label: String,
    /// What is wrong.
    pub wrong: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: {}; {}", self.object, self.label, self.wrong, self.remedy)
    }
}

/// The beginning, as long as `max` bytes at most.
fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests;

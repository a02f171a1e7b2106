//! config: reads `lbridge.toml`.
//!
//! - `errors`: what is wrong with the file, where, and what to write instead.

mod errors;

use std::{
    collections::BTreeSet,
    fmt,
    fs::OpenOptions,
    io::{self, ErrorKind},
    marker::PhantomData,
    net::IpAddr,
    os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use nix::fcntl::OFlag;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use self::errors::Mistake;
pub use self::errors::{ConfigError, Unfit};
use super::place;
use crate::planning::{
    firewall::FirewallMode,
    labels::{self, PortRange},
    rule::{
        self, Beside, Network, Options, Origin, PortSpec, Rule, RuleError, RuleId, Rules, Source,
        with_options,
    },
};

/// Default time that relayed connections have to end when the daemon is stopped.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The keys that the file may have. Kept next to the type below, since serde does not expose them.
pub(crate) const SETTINGS: [&str; 8] = [
    "drain_timeout",
    "firewall",
    "aliases",
    "labels",
    "label_ports",
    "label_dialled_ports",
    "label_sources",
    "rule",
];
/// The contents of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Time that relayed connections have to end when the daemon is stopped.
    pub drain_timeout: Duration,
    /// The changes that lbridge may make to the host's firewall.
    pub firewall: FirewallMode,
    /// Other addresses of the host that containers dial.
    pub aliases: BTreeSet<IpAddr>,
    /// The permissions of labels on containers and networks.
    pub labels: labels::Settings,
    /// The file's rules, which the CLI cannot change.
    rules: Vec<Entry>,
    /// The file's name, as shown to the user.
    name: String,
}

/// A rule and its position in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    rule: Rule,
    place: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default, deserialize_with = "rule::time")]
    drain_timeout: Option<Duration>,
    #[serde(default)]
    firewall: FirewallMode,
    #[serde(default)]
    aliases: List<Alias>,
    #[serde(default)]
    labels: bool,
    #[serde(default)]
    label_ports: List<LabelPorts>,
    #[serde(default)]
    label_dialled_ports: List<LabelPorts>,
    label_sources: Option<List<Source>>,
    #[serde(default, rename = "rule")]
    rules: Vec<Spanned<FileRule>>,
}

/// A rule of the file.
struct FileRule {
    network: Network,
    port: Option<Ports>,
    ports: Option<List<Ports>>,
    options: Options,
}

/// The fields of a rule besides its options.
#[derive(Default)]
struct Fields {
    network: Option<Network>,
    port: Option<Ports>,
    ports: Option<List<Ports>>,
}

impl<'de> Beside<'de> for Fields {
    type Whole = FileRule;

    const FIELDS: &'static [&'static str] = &["network", "port", "ports"];

    fn read<A: MapAccess<'de>>(&mut self, field: &str, table: &mut A) -> Result<(), A::Error> {
        match field {
            "network" => self.network = Some(table.next_value()?),
            "port" => self.port = Some(table.next_value()?),
            _ => self.ports = Some(table.next_value()?),
        }
        Ok(())
    }

    fn with<E: de::Error>(self, options: Options) -> Result<FileRule, E> {
        let Self { network, port, ports } = self;
        let network = network.ok_or_else(|| E::custom(Mistake::NoNetwork))?;
        Ok(FileRule { network, port, ports, options })
    }
}

impl<'de> Deserialize<'de> for FileRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        with_options::<Fields, D>(deserializer)
    }
}

/// The keys that a rule of the file may have.
pub(crate) fn rule_keys() -> Vec<&'static str> {
    [Fields::FIELDS, Options::NAMES].concat()
}

/// A list of values of one kind.
struct List<T>(Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(vec![])
    }
}

/// A value that stands in a list.
trait Listed {
    /// An example of what a list of them contains.
    const EXAMPLE: &'static str;
}

impl<'de, T: Deserialize<'de> + Listed> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de> + Listed> Visitor<'de> for Values<T> {
            type Value = List<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list, as [{}]", T::EXAMPLE)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<List<T>, A::Error> {
                let mut list = List::default();
                while let Some(value) = values.next_element()? {
                    list.0.push(value);
                }
                Ok(list)
            }
        }

        deserializer.deserialize_seq(Values(PhantomData))
    }
}

impl Listed for Source {
    const EXAMPLE: &'static str = "\"container\"";
}

/// An address of the host that containers may dial.
struct Alias(IpAddr);

impl Listed for Alias {
    const EXAMPLE: &'static str = "\"10.0.0.5\"";
}

impl<'de> Deserialize<'de> for Alias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let address: Option<IpAddr> = text.parse().ok();
        let dialled = |ip: &IpAddr| !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast());
        let wrong = || {
            de::Error::custom(format!(
                "{text:?} is not an address that a container could dial; write one of the host's, as \
                 \"10.0.0.5\""
            ))
        };
        address.filter(dialled).map(Self).ok_or_else(wrong)
    }
}

/// Ports of the host, or of its gateways: `5432`, `"8000-8010"`, `"53/udp"`.
struct LabelPorts(PortRange);

impl Listed for LabelPorts {
    const EXAMPLE: &'static str = Ports::EXAMPLE;
}

impl<'de> Deserialize<'de> for LabelPorts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Ports(specs) = Ports::deserialize(deserializer)?;
        let range = PortRange::of(&specs);
        let said = specs.first().map(ToString::to_string).unwrap_or_default();
        let wrong =
            || de::Error::custom(format!("{said:?} says where it leads; write one port or a range, as 5432"));
        range.map(Self).ok_or_else(wrong)
    }
}

/// Ports of a rule: `5432`, or what `allow` takes as PORT.
struct Ports(Vec<PortSpec>);

impl Listed for Ports {
    const EXAMPLE: &'static str = "5432, \"8000-8010\"";
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Port;
        impl Visitor<'_> for Port {
            type Value = Ports;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a port, as 5432 or \"5432=15432\"; several go into ports = [5432, \"8000-8010\"]",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Ports, E> {
                PortSpec::parse_many(text).map(Ports).map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Ports, E> {
                self.visit_str(&number.to_string())
            }
        }
        deserializer.deserialize_any(Port)
    }
}

impl Config {
    /// Reads the file; a missing file counts as an empty one. An error names line and column.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let text = match read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {name}")),
        };
        Ok(Self::parse(&text, name)?)
    }

    fn parse(text: &str, name: String) -> Result<Self, ConfigError> {
        let at = |start: usize| format!("{name}{}", place(text, start));
        let wrong = |(start, mistake)| ConfigError { place: at(start), mistake };
        let unparsed = |error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start);
            wrong((start, Mistake::Unparsed(error)))
        };
        let table = DeTable::parse(text).map_err(unparsed)?;
        check(table.get_ref()).map_err(wrong)?;
        let file: File = toml::from_str(text).map_err(unparsed)?;
        let mut rules = vec![];
        for rule in file.rules {
            let start = rule.span().start;
            let rule = rule.into_inner();
            let specs = rule.specs().map_err(|mistake| wrong((start, mistake)))?;
            rules.extend(specs.into_iter().map(|spec| Entry { rule: rule.rule(spec), place: at(start) }));
        }
        let drain_timeout = file.drain_timeout.unwrap_or(DRAIN_TIMEOUT);
        let ranges =
            |List(ports): List<LabelPorts>| ports.into_iter().map(|LabelPorts(range)| range).collect();
        let labels = labels::Settings {
            enabled: file.labels,
            ports: ranges(file.label_ports),
            dialled_ports: ranges(file.label_dialled_ports),
            sources: match file.label_sources {
                Some(List(sources)) => sources.into_iter().collect(),
                None => labels::Settings::default().sources,
            },
        };
        let aliases = file.aliases.0.into_iter().map(|Alias(ip)| ip).collect();
        Ok(Self { drain_timeout, firewall: file.firewall, aliases, labels, rules, name })
    }

    /// Returns the number of the file's rules.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Returns true if the file has no rules.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Lists the settings other than rules, as written in the file.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let time = jiff::SignedDuration::try_from(self.drain_timeout).unwrap_or_default();
        let aliases: Vec<_> = self.aliases.iter().map(|ip| format!("\"{ip}\"")).collect();
        let ports = |ranges: &[PortRange]| {
            let ports: Vec<_> = ranges.iter().map(|range| written(&range.to_string())).collect();
            format!("[{}]", ports.join(", "))
        };
        let sources = self.labels.sources.iter().map(|source| format!("\"{source}\""));
        vec![
            ("drain_timeout", format!("{time:#}")),
            ("firewall", self.firewall.to_string()),
            ("aliases", format!("[{}]", aliases.join(", "))),
            ("labels", self.labels.enabled.to_string()),
            ("label_ports", ports(&self.labels.ports)),
            ("label_dialled_ports", ports(&self.labels.dialled_ports)),
            ("label_sources", format!("[{}]", sources.collect::<Vec<_>>().join(", "))),
        ]
    }

    /// Combines the file's rules with those of `allow`, which are in the file `allowed_in`.
    pub fn rules_with(&self, allowed: Vec<Rule>, allowed_in: &Path) -> Result<Rules, Unfit> {
        let rules = self.rules.iter().map(|entry| entry.rule.clone());
        let rules = Rules::default().allow(rules, Origin::Config).map_err(|error| self.unfit(error))?;
        rules.allow(allowed, Origin::Cli).map_err(|error| match error {
            RuleError::ReadOnly { id } => {
                Unfit::Contradiction { place: self.place(&id), id, allowed_in: allowed_in.to_owned() }
            }
            error => Unfit::Together { file: self.name.clone(), allowed_in: allowed_in.to_owned(), error },
        })
    }

    /// Adds the place of the rule to an error of the file's rules.
    fn unfit(&self, error: RuleError) -> Unfit {
        match error {
            RuleError::ConflictWithin { existing, .. } => {
                let id = existing.id();
                let second = self.places(&id).next_back().unwrap_or(&self.name).clone();
                Unfit::Twice { first: self.place(&id), second, existing }
            }
            RuleError::NeedsLoopback { ref id }
            | RuleError::NeedsRelay { ref id, .. }
            | RuleError::Contradiction { ref id, .. }
            | RuleError::Invalid { ref id, .. }
            | RuleError::ProcessUnknown { ref id } => Unfit::Rule { place: self.place(id), error },
            RuleError::Conflict { .. }
            | RuleError::NoSuchRule { .. }
            | RuleError::ReadOnly { .. }
            | RuleError::FromLabel { .. }
            | RuleError::TooMany { .. } => Unfit::Rule { place: self.name.clone(), error },
        }
    }

    /// Returns the place of the first rule with this id, or the file's name.
    fn place(&self, id: &RuleId) -> String {
        self.places(id).next().unwrap_or(&self.name).clone()
    }

    fn places<'a>(&'a self, id: &'a RuleId) -> impl DoubleEndedIterator<Item = &'a String> {
        self.rules.iter().filter(|entry| entry.rule.id() == *id).map(|entry| &entry.place)
    }
}

impl FileRule {
    fn specs(&self) -> Result<Vec<PortSpec>, Mistake> {
        match (&self.port, &self.ports) {
            (Some(port), None) => Ok(port.0.clone()),
            (None, Some(List(ports))) => Ok(ports.iter().flat_map(|port| port.0.clone()).collect()),
            (None, None) => Err(Mistake::NoPort),
            (Some(_), Some(_)) => Err(Mistake::PortAndPorts),
        }
    }

    fn rule(&self, spec: PortSpec) -> Rule {
        Rule { options: self.options.clone(), ..Rule::new(self.network.clone(), spec) }
    }
}

/// Formats a port as in the file: a number has no quotes.
fn written(port: &str) -> String {
    if port.bytes().all(|b| b.is_ascii_digit()) { port.to_owned() } else { format!("{port:?}") }
}

/// Finds unknown keys and common mistakes; returns the position of the first and what is wrong there.
fn check(file: &DeTable<'_>) -> Result<(), (usize, Mistake)> {
    let rule_keys = rule_keys();
    for (key, value) in file {
        let (name, start) = (key.get_ref().as_ref(), key.span().start);
        match value.get_ref() {
            DeValue::Table(_) if name == "rule" => return Err((start, Mistake::SingleTable)),
            DeValue::Array(rules) if name == "rule" => {
                for rule in rules {
                    let DeValue::Table(rule) = rule.get_ref() else { continue };
                    for key in rule.keys() {
                        let name = key.get_ref().as_ref();
                        known(name, &rule_keys, &SETTINGS, Mistake::SettingInRule)
                            .map_err(|mistake| (key.span().start, mistake))?;
                    }
                }
            }
            _ => known(name, &SETTINGS, &rule_keys, Mistake::OptionOutside)
                .map_err(|mistake| (start, mistake))?,
        }
    }
    Ok(())
}

fn known(
    name: &str,
    here: &[&'static str],
    elsewhere: &[&str],
    there: fn(String) -> Mistake,
) -> Result<(), Mistake> {
    /// Minimum similarity for a suggestion: about one letter in three may differ.
    const SIMILAR: f64 = 0.66;
    if here.contains(&name) {
        return Ok(());
    }
    let name = name.to_owned();
    if elsewhere.contains(&name.as_str()) {
        return Err(there(name));
    }
    let similarity = |known: &&&str| strsim::normalized_damerau_levenshtein(&name, known);
    let nearest = here.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    Err(match nearest.filter(|nearest| similarity(nearest) >= SIMILAR) {
        Some(nearest) => Mistake::Misspelt { name, nearest },
        None => Mistake::Unknown { name, known: here.to_vec() },
    })
}

/// Reads the file without waiting for a writer, should it be a pipe.
fn read(path: &Path) -> io::Result<String> {
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other("it is a pipe"));
    }
    io::read_to_string(file)
}

#[cfg(test)]
mod tests;

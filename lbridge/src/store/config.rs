//! config: reads `lbridge.toml`, and reports what is wrong with it, where, and what to write instead.

use std::{
    collections::BTreeSet,
    fmt,
    fs::OpenOptions,
    io::{self, ErrorKind},
    net::IpAddr,
    num::NonZeroU32,
    os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use nix::fcntl::OFlag;
use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::place;
use crate::planning::{
    firewall::FirewallMode,
    labels::{self, PortRange},
    rule::{
        Network, Origin, PathChoice, PortSpec, ProxyProtocol, Refused, Rule, RuleId, Rules, Source,
        container_name,
    },
};

/// Default time that relayed connections have to end when the daemon is stopped.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The keys that the file and each of its rules may have. Kept next to the types below, since serde does not
/// expose them.
const SETTINGS: [&str; 8] = [
    "drain_timeout",
    "firewall",
    "aliases",
    "labels",
    "label_ports",
    "label_dialled_ports",
    "label_sources",
    "rule",
];
const RULE: [&str; 11] = [
    "network",
    "port",
    "ports",
    "from",
    "localhost",
    "source",
    "path",
    "max_connections",
    "idle_timeout",
    "proxy_protocol",
    "comment",
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

/// The reason why the file's rules cannot be in force: what is wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// The rules are invalid on their own.
    #[error("{0}")]
    Rule(String),
    /// The rules contradict those that `allow` made.
    #[error("{0}")]
    Contradiction(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default, with = "jiff::fmt::serde::unsigned_duration::friendly::compact::optional")]
    drain_timeout: Option<Duration>,
    #[serde(default)]
    firewall: FirewallMode,
    #[serde(default)]
    aliases: BTreeSet<Alias>,
    #[serde(default)]
    labels: bool,
    #[serde(default)]
    label_ports: Vec<LabelPorts>,
    #[serde(default)]
    label_dialled_ports: Vec<LabelPorts>,
    label_sources: Option<BTreeSet<Source>>,
    #[serde(default, rename = "rule")]
    rules: Vec<Spanned<FileRule>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    network: Network,
    port: Option<Ports>,
    ports: Option<Vec<Ports>>,
    #[serde(default)]
    source: Source,
    #[serde(default)]
    path: PathChoice,
    max_connections: Option<NonZeroU32>,
    #[serde(default, with = "jiff::fmt::serde::unsigned_duration::friendly::compact::optional")]
    idle_timeout: Option<Duration>,
    proxy_protocol: Option<ProxyProtocol>,
    #[serde(default)]
    from: BTreeSet<Container>,
    #[serde(default)]
    localhost: bool,
    comment: Option<String>,
}

/// An address of the host that containers may dial.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Alias(IpAddr);

impl<'de> Deserialize<'de> for Alias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let address: Option<IpAddr> = text.parse().ok();
        let dialled = |ip: &IpAddr| !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast());
        let wrong = || {
            de::Error::custom(format!(
                "{text:?} is no address that a container could dial; write one of the host's, as \"10.0.0.5\""
            ))
        };
        address.filter(dialled).map(Self).ok_or_else(wrong)
    }
}

/// The name of a container.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Container(String);

impl<'de> Deserialize<'de> for Container {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        container_name(&String::deserialize(deserializer)?).map(Self).map_err(de::Error::custom)
    }
}

/// Ports of the host, or of its gateways: `5432`, `"8000-8010"`, `"53/udp"`.
struct LabelPorts(PortRange);

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
        match read(path) {
            Ok(text) => Self::parse(&text, name),
            Err(error) if error.kind() == ErrorKind::NotFound => Self::parse("", name),
            Err(error) => Err(error).with_context(|| format!("cannot read {name}")),
        }
    }

    fn parse(text: &str, name: String) -> anyhow::Result<Self> {
        let at = |start: usize| format!("{name}{}", place(text, start));
        let wrong = |error: &toml::de::Error| {
            let message = plain(&error.message().replace('\n', " "));
            anyhow!("{}: {message}", at(error.span().map_or(0, |span| span.start)))
        };
        let table = DeTable::parse(text).map_err(|error| wrong(&error))?;
        check(table.get_ref()).map_err(|(start, message)| anyhow!("{}: {message}", at(start)))?;
        let file: File = toml::from_str(text).map_err(|error| wrong(&error))?;
        let mut rules = vec![];
        for rule in file.rules {
            let place = at(rule.span().start);
            let specs = rule.get_ref().specs().map_err(|message| anyhow!("{place}: {message}"))?;
            let rule = rule.into_inner();
            rules.extend(specs.into_iter().map(|spec| Entry { rule: rule.rule(spec), place: place.clone() }));
        }
        let drain_timeout = file.drain_timeout.unwrap_or(DRAIN_TIMEOUT);
        let labels = labels::Settings {
            enabled: file.labels,
            ports: file.label_ports.into_iter().map(|LabelPorts(range)| range).collect(),
            dialled_ports: file.label_dialled_ports.into_iter().map(|LabelPorts(range)| range).collect(),
            sources: file.label_sources.unwrap_or_else(|| labels::Settings::default().sources),
        };
        let aliases = file.aliases.into_iter().map(|Alias(ip)| ip).collect();
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
        let sources = self.labels.sources.iter().map(|source| match source {
            Source::Container => "\"container\"",
            Source::Loopback => "\"loopback\"",
        });
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
        let rules = Rules::default().allow(rules, Origin::Config).map_err(|refused| match &refused {
            Refused::ConflictWithin { id, existing, .. } => {
                let mut places = self.places(id);
                let first = places.next().unwrap_or(&self.name);
                let second = places.next_back().unwrap_or(first);
                Unfit::Rule(format!("{second}: {id} has a rule already, {existing}, at {first}; remove one"))
            }
            Refused::NeedsLoopback { id }
            | Refused::NeedsRelay { id, .. }
            | Refused::Contradiction { id, .. }
            | Refused::Invalid { id, .. }
            | Refused::ProcessUnknown { id } => {
                // In the file's notation; the errors use the command's.
                let refused = refused
                    .to_string()
                    .replace("allow it with --source loopback", "add source = \"loopback\"")
                    .replace("--path steer", "path = \"steer\"")
                    .replace("--", "");
                Unfit::Rule(format!("{}: {refused}", self.places(id).next().unwrap_or(&self.name)))
            }
            other => Unfit::Rule(format!("{}: {other}", self.name)),
        })?;
        let allowed_in = allowed_in.display();
        rules.allow(allowed, Origin::Cli).map_err(|refused| match &refused {
            Refused::ReadOnly { id } => Unfit::Contradiction(format!(
                "{}: {id} is allowed otherwise in {allowed_in}; remove the rule from one of them, there with \
                 `lbridge deny {id}`",
                self.places(id).next().unwrap_or(&self.name)
            )),
            other => Unfit::Contradiction(format!("{} and {allowed_in}: {other}", self.name)),
        })
    }

    fn places<'a>(&'a self, id: &'a RuleId) -> impl DoubleEndedIterator<Item = &'a String> {
        self.rules.iter().filter(|entry| entry.rule.id() == *id).map(|entry| &entry.place)
    }
}

impl FileRule {
    fn specs(&self) -> Result<Vec<PortSpec>, &'static str> {
        match (&self.port, &self.ports) {
            (Some(port), None) => Ok(port.0.clone()),
            (None, Some(ports)) => Ok(ports.iter().flat_map(|port| port.0.clone()).collect()),
            (None, None) => Err("the rule has no port; add port = 5432"),
            (Some(_), Some(_)) => Err("the rule has port and ports; remove one"),
        }
    }

    fn rule(&self, spec: PortSpec) -> Rule {
        Rule {
            from: self.from.iter().map(|container| container.0.clone()).collect(),
            localhost: self.localhost,
            source: self.source,
            path: self.path,
            max_connections: self.max_connections,
            idle_timeout: self.idle_timeout,
            proxy_protocol: self.proxy_protocol,
            comment: self.comment.clone(),
            ..Rule::new(self.network.clone(), spec)
        }
    }
}

/// Formats a port as in the file: a number has no quotes.
fn written(port: &str) -> String {
    if port.bytes().all(|b| b.is_ascii_digit()) { port.to_owned() } else { format!("{port:?}") }
}

/// Translates a message of serde or the parser for people who write the file.
fn plain(message: &str) -> String {
    if message.contains("duration format") {
        return "no time; write one like \"30s\" or \"10m\"".to_owned();
    }
    message
        .replace("an unsigned duration string", "a time, as \"30s\" or \"10m\"")
        .replace("a nonzero u32", "a number, at least 1")
        .replace("expected a sequence", "expected a list, as [5432, \"8000-8010\"]")
        .replace("missing field `network`", "the rule has no network; add network = \"app_net\"")
        .replace("expected a boolean", "expected true or false, without quotes")
        .replace("string values must be quoted, expected literal string", "text goes between quotes")
        .replace("unknown variant ", "there is no ")
}

/// Finds unknown keys and common mistakes; returns the position and what to write.
fn check(file: &DeTable<'_>) -> Result<(), (usize, String)> {
    for (key, value) in file {
        let (name, start) = (key.get_ref().as_ref(), key.span().start);
        match value.get_ref() {
            DeValue::Table(_) if name == "rule" => {
                return Err((
                    start,
                    "[rule] is a single table; write [[rule]], once for each rule".to_owned(),
                ));
            }
            DeValue::Array(rules) if name == "rule" => {
                for rule in rules {
                    let DeValue::Table(rule) = rule.get_ref() else { continue };
                    for key in rule.keys() {
                        let name = key.get_ref().as_ref();
                        known(
                            name,
                            &RULE,
                            &SETTINGS,
                            "a setting of the whole file; put it before the first [[rule]]",
                        )
                        .map_err(|message| (key.span().start, message))?;
                    }
                }
            }
            _ => known(name, &SETTINGS, &RULE, "part of a rule; put it below [[rule]]")
                .map_err(|message| (start, message))?,
        }
    }
    Ok(())
}

fn known(name: &str, here: &[&str], elsewhere: &[&str], there: &str) -> Result<(), String> {
    /// Minimum similarity for a suggestion: about one letter in three may differ.
    const SIMILAR: f64 = 0.66;
    if here.contains(&name) {
        return Ok(());
    }
    if elsewhere.contains(&name) {
        return Err(format!("{name} is {there}"));
    }
    let similarity = |known: &&&str| strsim::normalized_damerau_levenshtein(name, known);
    let nearest = here.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    Err(match nearest.filter(|nearest| similarity(nearest) >= SIMILAR) {
        Some(nearest) => format!("there is no {name:?}; write {nearest}"),
        None => format!("there is no {name:?}; there are {}", here.join(", ")),
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
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, String> {
        Config::parse(text, "f".to_owned()).map_err(|error| format!("{error:#}"))
    }

    fn rules(text: &str) -> Vec<String> {
        read(text).unwrap().rules.iter().map(|entry| entry.rule.spec.to_string()).collect()
    }

    #[test]
    fn a_pipe_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(format!("{:#}", Config::load(&path).unwrap_err()).contains("it is a pipe"));
        assert!(Config::load(&folder.path().join("none")).is_ok());
        assert!(Config::load(Path::new("/dev/null")).is_ok());
    }

    #[test]
    fn the_example_has_every_setting() {
        let example = include_str!("../../../packaging/lbridge.toml");
        assert_eq!(read(example).unwrap(), read("").unwrap());
        let uncommented =
            |line: &str| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).map(str::to_owned);
        let lines: Vec<_> =
            example.lines().map(|line| uncommented(line).unwrap_or(line.to_owned())).collect();
        let config = read(&lines.join("\n")).unwrap();
        assert_eq!(config.len(), 1 + 2 + 11);
        config.rules_with(vec![], Path::new("allowed")).unwrap();
        for name in SETTINGS.iter().chain(&RULE) {
            let set =
                |line: &&String| line.starts_with(&format!("{name} = ")) || **line == format!("[[{name}]]");
            assert!(lines.iter().any(|line| set(&line)), "{name}");
        }
    }

    #[test]
    fn labels_are_off_and_bounded_unless_the_file_says_otherwise() {
        let off = read("").unwrap();
        assert_eq!(off.labels, labels::Settings::default());
        assert!(!off.labels.enabled && off.labels.ports.is_empty());
        let text = "labels = true\nlabel_ports = [5432, \"8000-8010\", \"53/udp\"]\n\
                    label_dialled_ports = [80, \"9000-9010\"]\nlabel_sources = [\"loopback\"]\n";
        let on = read(text).unwrap();
        assert!(on.labels.enabled);
        let settings: Vec<_> =
            on.settings().into_iter().skip(3).map(|(name, now)| format!("{name} = {now}\n")).collect();
        assert_eq!(settings.concat(), text, "as one would write them");
    }

    #[test]
    fn ports_are_written_as_one_likes() {
        let rule = |ports: &str| rules(&format!("[[rule]]\nnetwork = \"a\"\n{ports}\n"));
        assert_eq!(rule("port = 5432"), ["5432"]);
        assert_eq!(rule("port = \"5432\""), ["5432"]);
        assert_eq!(rule("port = \"80=[::1]:3000\""), ["80=[::1]:3000"]);
        assert_eq!(rule("port = \"80-82\""), ["80", "81", "82"]);
        assert_eq!(rule("ports = [1, \"2=3\", \"4-5\"]"), ["1", "2=3", "4", "5"]);
        assert_eq!(rules(""), [""; 0]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place_and_remedy() {
        let rule = "[[rule]]\nnetwork = \"a\"\n";
        for (text, place, words) in [
            ("drain_timeot = \"5s\"\n".to_owned(), "f:1:1: ", "write drain_timeout"),
            (
                "\n  zzz = 1\n".to_owned(),
                "f:2:3: ",
                "there are drain_timeout, firewall, aliases, labels, label_ports,",
            ),
            ("label = true\n".to_owned(), "f:1:1: ", "write labels"),
            ("labels = \"true\"\n".to_owned(), "f:1:10: ", "true or false"),
            ("label_ports = [1, \"2=3\"]\n".to_owned(), "f:1:15: ", "\"2=3\" says where"),
            ("label_ports = [1, \"x\"]\n".to_owned(), "f:1:19: ", "no port"),
            ("label_ports = 1\n".to_owned(), "f:1:15: ", "a list, as [5432"),
            ("label_sources = [\"x\"]\n".to_owned(), "f:1:18: ", "container"),
            ("drain_timeout = \"5 parsecs\"\n".to_owned(), "f:1:17: ", "no time; write"),
            ("[rule]\nnetwork = \"a\"\nport = 1\n".to_owned(), "f:1:2: ", "[[rule]]"),
            ("[[rules]]\nnetwork = \"a\"\nport = 1\n".to_owned(), "f:1:3: ", "write rule"),
            ("network = \"a\"\n".to_owned(), "f:1:1: ", "below [[rule]]"),
            (format!("{rule}port = 1\ndrain_timeout = \"5s\"\n"), "f:4:1: ", "before the first [[rule]]"),
            (format!("{rule}prot = 1\n"), "f:3:1: ", "write port"),
            (format!("{rule}idle-timeout = \"1s\"\nport = 1\n"), "f:3:1: ", "write idle_timeout"),
            (format!("{rule}port = 0\n"), "f:3:8: ", "1 to 65535"),
            (format!("{rule}port = 70000\n"), "f:3:8: ", "1 to 65535"),
            (format!("{rule}port = -1\n"), "f:3:8: ", "no port"),
            (format!("{rule}port = [1]\n"), "f:3:8: ", "ports = ["),
            (format!("{rule}port = true\n"), "f:3:8: ", "a port, as 5432"),
            (format!("{rule}ports = [1,\n  \"x\"]\n"), "f:4:3: ", "no port"),
            (rule.to_owned(), "f:1:1: ", "add port"),
            (format!("{rule}port = 1\nports = [2]\n"), "f:1:1: ", "remove one"),
            (format!("{rule}port = 1\n\n[[rule]]\nport = 2\n"), "f:5:1: ", "network"),
            (format!("{rule}port = 1\nsource = \"x\"\n"), "f:4:10: ", "container"),
            (format!("{rule}port = 1\nmax_connections = 0\n"), "f:4:19: ", "at least 1"),
            (format!("{rule}port = 1\nmax_connections = \"5\"\n"), "f:4:19: ", "a number, at least 1"),
            (format!("{rule}ports = 80\n"), "f:3:9: ", "a list, as [5432"),
            ("[[rule]]\nport = 1\n".to_owned(), "f:1:1: ", "add network = "),
            ("[[rule]]\nnetwork = a\n".to_owned(), "f:2:11: ", "between quotes"),
            ("drain_timeout = 30\n".to_owned(), "f:1:17: ", "a time, as \"30s\""),
            ("firewall = \"on\"\n".to_owned(), "f:1:12: ", "`manage` or `off`"),
            ("aliases = [\"127.0.0.2\"]\n".to_owned(), "f:1:11: ", "one of the host's"),
            ("a = \n".to_owned(), "f:1:", ""),
            (format!("{rule}port = 1\nport = 2\n"), "f:4:1: ", "duplicate"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(
                error.starts_with(place) && error.contains(words) && !error.contains('\n'),
                "{text}{error}"
            );
        }
    }

    #[test]
    fn rules_that_contradict_each_other_are_told_with_their_places() {
        let text = "[[rule]]\nnetwork = \"a\"\nport = 1\n[[rule]]\nnetwork = \"a\"\nports = [2, \"1=3\"]\n";
        let error = read(text).unwrap().rules_with(vec![], Path::new("allowed")).unwrap_err();
        let is_right = |text: &str| text.starts_with("f:4:1: a 1 ") && text.contains("at f:1:1");
        assert!(matches!(&error, Unfit::Rule(text) if is_right(text)));

        let config = read(&text[..text.rfind("[[").unwrap()]).unwrap();
        let mut allowed = config.rules[0].rule.clone();
        assert!(
            config.rules_with(vec![allowed.clone()], Path::new("allowed")).is_ok(),
            "the same is no contradiction"
        );
        allowed.source = Source::Loopback;
        let error = config.rules_with(vec![allowed], Path::new("allowed")).unwrap_err();
        let is_right = |text: &str| text.starts_with("f:1:1: a 1 ") && text.contains("allowed");
        assert!(matches!(&error, Unfit::Contradiction(text) if is_right(text)));

        let unix = read("[[rule]]\nnetwork = \"a\"\nport = \"1=unix:/x\"\n").unwrap();
        let error = unix.rules_with(vec![], Path::new("allowed")).unwrap_err().to_string();
        assert!(error.starts_with("f:1:1: ") && error.contains("add source = \"loopback\""), "{error}");
    }
}

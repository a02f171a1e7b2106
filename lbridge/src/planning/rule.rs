//! Rules: what the administrator wants. Parsing of networks and ports, and the set that `allow` and `deny` change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use lbridge_common::wire;
use serde::{Deserialize, Serialize};

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

/// Longest network name taken, in bytes. Docker's own limit is lower in practice.
const MAX_NAME: usize = 255;
/// `IFNAMSIZ` less the terminating zero (include/uapi/linux/if.h).
const MAX_INTERFACE_NAME: usize = 15;

/// What is wrong with a text, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(String);

fn invalid<T>(text: String) -> Result<T, Invalid> {
    Err(Invalid(text))
}

/// A network as the administrator names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Network {
    /// A Docker network's name, or its id.
    Docker(String),
    /// `bridge:IFNAME`: a Linux bridge, whoever made it.
    Bridge(String),
    /// `container:NAME`: the network namespace of a Docker container, by its name or id.
    Container(String),
    /// `netns:PATH`: the network namespace of that file.
    Netns(PathBuf),
    /// `pid:N`: the network namespace of that process, for as long as it runs.
    Process(u32),
}

impl Network {
    /// Whether it is a namespace, served by a relay on loopback inside, not a bridge of the host.
    pub fn is_namespace(&self) -> bool {
        match self {
            Self::Docker(_) | Self::Bridge(_) => false,
            Self::Container(_) | Self::Netns(_) | Self::Process(_) => true,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Docker(name) => f.write_str(name),
            Self::Bridge(name) => write!(f, "bridge:{name}"),
            Self::Container(name) => write!(f, "container:{name}"),
            Self::Netns(path) => write!(f, "netns:{}", path.display()),
            Self::Process(pid) => write!(f, "pid:{pid}"),
        }
    }
}

impl FromStr for Network {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if let Some(name) = text.strip_prefix("bridge:") {
            let fits = !name.is_empty() && name.len() <= MAX_INTERFACE_NAME && name != "." && name != "..";
            if !fits || name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
                return invalid(format!(
                    "{text:?} is no interface name; write bridge:IFNAME, e.g. bridge:docker0"
                ));
            }
            return Ok(Self::Bridge(name.to_owned()));
        }
        if let Some(path) = text.strip_prefix("netns:") {
            // PATH_MAX (limits.h), its terminating zero included.
            let fits = Path::new(path).is_absolute() && path.len() < 4096;
            if !fits || path.chars().any(char::is_control) {
                return invalid(format!(
                    "{text:?} is no namespace; write netns:PATH with an absolute path, e.g. netns:/run/netns/sandbox"
                ));
            }
            return Ok(Self::Netns(PathBuf::from(path)));
        }
        if let Some(pid) = text.strip_prefix("pid:") {
            let number = pid.parse().ok().filter(|_| pid.bytes().all(|b| b.is_ascii_digit()));
            return match number {
                // pid_t is signed.
                Some(pid @ 1..=0x7fff_ffff) => Ok(Self::Process(pid)),
                _ => invalid(format!("{text:?} is no process; write pid:N, e.g. pid:4711")),
            };
        }
        let (name, container) = match text.strip_prefix("container:") {
            Some(name) => (name, true),
            None => (text, false),
        };
        if name.is_empty()
            || name.len() > MAX_NAME
            || name
                .chars()
                .any(|c| c.is_control() || c.is_whitespace() || c == '/' || (container && c == ':'))
        {
            return invalid(format!(
                "{text:?} is no network; write a Docker network's name or id, bridge:IFNAME, container:NAME, netns:PATH or pid:N"
            ));
        }
        if container {
            return Ok(Self::Container(name.to_owned()));
        }
        Ok(Self::Docker(text.to_owned()))
    }
}

/// A container's name or id, as `--from` takes it.
pub fn container_name(text: &str) -> Result<String, Invalid> {
    match format!("container:{text}").parse() {
        Ok(Network::Container(name)) => Ok(name),
        _ => invalid(format!("{text:?} is no container; write its name or id")),
    }
}

/// The loopback service that a rule leads to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// A port on the loopback address of whichever family was dialled; of the other where only that one listens.
    Port(u16),
    /// One loopback address.
    Address(SocketAddr),
    /// A Unix stream socket.
    Unix(PathBuf),
}

impl Target {
    /// TCP port, if it has one.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Port(port) => Some(*port),
            Self::Address(address) => Some(address.port()),
            Self::Unix(_) => None,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "127.0.0.1:{port}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
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

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP, and MPTCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// As the kernel program's keys hold it.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => wire::TCP,
            Self::Udp => wire::UDP,
        }
    }

    /// What a service gets by it.
    pub fn what(self) -> &'static str {
        match self {
            Self::Tcp => "the connection",
            Self::Udp => "the datagram",
        }
    }

    /// As firewalls call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// What follows a port's number, as Docker writes it.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Tcp => "",
            Self::Udp => "/udp",
        }
    }
}

/// A port argument: `5432`, `5432=15432`, `80=127.0.0.1:3000`, `80=[::1]:3000`, `5432=unix:/path`, `53/udp`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortSpec {
    /// Dialled port, never 0.
    pub port: u16,
    /// What is spoken there, and by the service.
    pub protocol: Protocol,
    /// Where it leads.
    pub target: Target,
}

impl PortSpec {
    /// Parses one argument, which may be a range (`8000-8010`) and so several ports.
    pub fn parse_many(text: &str) -> Result<Vec<Self>, Invalid> {
        let (ports, protocol) = split_protocol(text);
        if let Some((first, last)) = ports.split_once('-').filter(|(first, _)| !first.contains('=')) {
            let (first, last) = (parse_port(first, text)?, parse_port(last, text)?);
            if first > last {
                return invalid(format!("port range {text} is empty; write the lower port first"));
            }
            let spec = |port| Self { port, protocol, target: Target::Port(port) };
            return Ok((first..=last).map(spec).collect());
        }
        Ok(vec![text.parse()?])
    }
}

/// `53/udp`: what is before the slash, and the protocol. A Unix socket's path has slashes of its own, and no protocol.
fn split_protocol(text: &str) -> (&str, Protocol) {
    if text.contains("unix:") {
        return (text, Protocol::Tcp);
    }
    let with = |suffix, protocol| text.strip_suffix(suffix).map(|ports| (ports, protocol));
    with("/udp", Protocol::Udp).or_else(|| with("/tcp", Protocol::Tcp)).unwrap_or((text, Protocol::Tcp))
}

impl PortSpec {
    /// The same port of loopback, by TCP.
    pub fn same(port: u16) -> Self {
        Self { port, protocol: Protocol::Tcp, target: Target::Port(port) }
    }
}

impl FromStr for PortSpec {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (ports, protocol) = split_protocol(text);
        let Some((dialled, target)) = ports.split_once('=') else {
            if ports == "all" {
                return invalid("\"all\" would open every service of the host; name the ports".to_owned());
            }
            let port = parse_port(ports, text)?;
            return Ok(Self { port, protocol, target: Target::Port(port) });
        };
        let port = parse_port(dialled, text)?;
        if let Some(path) = target.strip_prefix("unix:") {
            return Ok(Self { port, protocol, target: Target::Unix(unix_path(path, text)?) });
        }
        if let Ok(address) = target.parse::<SocketAddr>() {
            if !address.ip().is_loopback() {
                return invalid(format!(
                    "target {address} is not on loopback; lbridge leads to 127.0.0.0/8, [::1] and unix: sockets only"
                ));
            }
            if address.port() == 0 {
                return invalid(format!("port 0 in {text:?}; ports are 1 to 65535"));
            }
            return Ok(Self { port, protocol, target: Target::Address(address) });
        }
        if target.bytes().all(|b| b.is_ascii_digit()) {
            return Ok(Self { port, protocol, target: Target::Port(parse_port(target, text)?) });
        }
        invalid(format!(
            "{target:?} in {text:?} is no target; write 5432=15432, 80=127.0.0.1:3000, 80=[::1]:3000 or 5432=unix:/path"
        ))
    }
}

impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Port(target) if *target == self.port => write!(f, "{}", self.port),
            Target::Port(target) => write!(f, "{}={target}", self.port),
            target => write!(f, "{}={target}", self.port),
        }?;
        f.write_str(self.protocol.suffix())
    }
}

fn parse_port(text: &str, whole: &str) -> Result<u16, Invalid> {
    // Digits alone: FromStr would take a sign.
    let number = text.parse::<u64>().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
    match number.map(u16::try_from) {
        Some(Ok(port)) if port != 0 => Ok(port),
        Some(_) => invalid(format!("port {text} in {whole:?}; ports are 1 to 65535")),
        None => {
            invalid(format!("{whole:?} is no port; write 5432, 5432=15432, 80=127.0.0.1:3000 or 8000-8010"))
        }
    }
}

fn unix_path(path: &str, whole: &str) -> Result<PathBuf, Invalid> {
    // sun_path less its terminating zero (unix(7)).
    if path.len() > 107 || path.chars().any(char::is_control) || !Path::new(path).is_absolute() {
        return invalid(format!("{whole:?}: a Unix socket's path is absolute and at most 107 bytes long"));
    }
    Ok(PathBuf::from(path))
}

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

/// Why a change was refused; nothing of it was applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The same (network, port) with other options.
    #[error(
        "{network} {wanted} contradicts {network} {existing}, which is allowed already; run `lbridge deny {id}` first",
        network = .id.network
    )]
    Conflict {
        /// Which.
        id: RuleId,
        /// The port argument and options that were to be added.
        wanted: String,
        /// Those that there are.
        existing: String,
    },
    /// As [`Refused::Conflict`], among what was to be added at once.
    #[error("{network} {wanted} contradicts {network} {existing}, both asked for at once; leave one of them out", network = .id.network)]
    ConflictWithin {
        /// Which.
        id: RuleId,
        /// The later one.
        wanted: String,
        /// The earlier one.
        existing: String,
    },
    /// There is no such rule.
    #[error("no rule for {id}; `lbridge list` shows those there are")]
    NoSuchRule {
        /// Which.
        id: RuleId,
    },
    /// The rule is the config's.
    #[error("{id} comes from the configuration file; change it there")]
    ReadOnly {
        /// Which.
        id: RuleId,
    },
    /// The rule is a label's.
    #[error(
        "{id} comes from a label of a container or a network; make that anew without it, or take the port out of label_ports in lbridge.toml"
    )]
    FromLabel {
        /// Which.
        id: RuleId,
    },
    /// A rule that could never serve.
    #[error(
        "{id} leads to a Unix socket, whose service would see root as its peer; allow it with --source loopback"
    )]
    NeedsLoopback {
        /// Which.
        id: RuleId,
    },
    /// A rule that contradicts itself.
    #[error("{id}: --path steer cannot be: {obstacle}; leave it out")]
    NeedsRelay {
        /// Which.
        id: RuleId,
        /// What keeps the kernel from serving it.
        obstacle: &'static str,
    },
    /// Options that do not go together.
    #[error("{id}: {why}")]
    Contradiction {
        /// Which.
        id: RuleId,
        /// Which they are, and what to leave out.
        why: &'static str,
    },
    /// A number that says nothing.
    #[error(
        "{id}: a process's number means nothing after its end; use `lbridge allow`, container:NAME or netns:PATH"
    )]
    ProcessUnknown {
        /// Which.
        id: RuleId,
    },
    /// More than the kernel map holds.
    #[error("{count} rules are more than the {max} that can be in force")]
    TooMany {
        /// Wanted.
        count: usize,
        /// Limit.
        max: usize,
    },
}

/// All rules, desired. Ordered, so that whatever follows from them is deterministic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules(BTreeMap<RuleId, (Rule, Origin)>);

impl Rules {
    /// In order of network and port.
    pub fn iter(&self) -> impl Iterator<Item = (&RuleId, &Rule, Origin)> {
        self.0.iter().map(|(id, (rule, origin))| (id, rule, *origin))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// With `added`, or nothing of it. Adding what is there already is no change; a remark replaces the old one.
    pub fn allow(&self, added: impl IntoIterator<Item = Rule>, origin: Origin) -> Result<Self, Refused> {
        let mut rules = self.0.clone();
        for rule in added {
            let id = rule.id();
            if matches!(rule.spec.target, Target::Unix(_)) && rule.source == Source::Container {
                return Err(Refused::NeedsLoopback { id });
            }
            if let (PathChoice::Steer, Some(obstacle)) = (rule.path, rule.needs_relay()) {
                return Err(Refused::NeedsRelay { id, obstacle });
            }
            if let Some(why) = rule.contradiction() {
                return Err(Refused::Contradiction { id, why });
            }
            if matches!(rule.network, Network::Process(_)) && rule.process.is_none() {
                return Err(Refused::ProcessUnknown { id });
            }
            if rule.process.is_some() {
                // What was for a process that had the number before it will never serve again.
                rules.retain(|_, (other, _)| other.network != rule.network || other.process == rule.process);
            }
            match rules.get(&id) {
                Some((existing, Origin::Config)) if origin == Origin::Cli && !existing.same_effect(&rule) => {
                    return Err(Refused::ReadOnly { id });
                }
                Some((existing, _)) if !existing.same_effect(&rule) => {
                    let (wanted, existing) = (rule.options(), existing.options());
                    return Err(if self.0.contains_key(&id) {
                        Refused::Conflict { id, wanted, existing }
                    } else {
                        Refused::ConflictWithin { id, wanted, existing }
                    });
                }
                // A config rule stays the config's, whatever remark the CLI gives.
                Some((_, Origin::Config | Origin::Label)) => {}
                Some((existing, Origin::Cli)) if rule.comment.is_none() && existing.comment.is_some() => {}
                _ => {
                    rules.insert(id, (rule, origin));
                }
            }
        }
        let max = wire::MAX_RULES as usize;
        if rules.len() > max {
            return Err(Refused::TooMany { count: rules.len(), max });
        }
        Ok(Self(rules))
    }

    /// Without `removed`, or nothing of it.
    pub fn deny(&self, removed: impl IntoIterator<Item = RuleId>) -> Result<Self, Refused> {
        let mut rules = self.0.clone();
        for id in removed {
            match self.0.get(&id) {
                None => return Err(Refused::NoSuchRule { id }),
                Some((_, Origin::Config)) => return Err(Refused::ReadOnly { id }),
                Some((_, Origin::Label)) => return Err(Refused::FromLabel { id }),
                Some((_, Origin::Cli)) => rules.remove(&id),
            };
        }
        Ok(Self(rules))
    }
}

impl Rule {
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
                "a UDP rule leads to the same port number, which the answers come from; have the service use it, or dial its",
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

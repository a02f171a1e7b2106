//! doctor: `lbridge doctor` diagnoses what this host can and cannot do, and what to do about it. It inspects,
//! and tests in network namespaces of its own; it changes nothing on the host, and leaves nothing behind,
//! however it ends. It works without root and without the daemon as far as possible: a check that could not
//! be made says so.
//!
//! - [`kernel`]: the programs, tested; cgroup2, bpffs, descriptors;
//! - [`daemon`]: the daemon and its rules, as `status` reports them;
//! - [`docker`]: the engine, and containers that know the host by another address;
//! - [`firewall`]: firewalls that keep packets from lbridge;
//! - [`services`]: the listeners that rules lead to;
//! - [`owners`]: the users who own those listeners;
//! - [`leftovers`]: what was used before lbridge.

mod daemon;
mod docker;
mod firewall;
mod kernel;
mod leftovers;
mod owners;
mod services;

use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

use serde::Serialize;

use crate::{
    api::client::Client,
    host::interfaces,
    planning::{
        inventory::{DockerNetwork, EngineKind, Interface, find_networks},
        rule::{DatapathChoice, Network, PortSpec, Protocol, Rule, Target},
    },
    store::{Store, config::Config},
};

/// The paths that the daemon uses.
#[derive(Debug, Clone)]
pub struct Options {
    /// The state directory.
    pub state_dir: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    /// The pin directory, on a bpffs.
    pub bpffs: PathBuf,
    /// The cgroup2 whose sockets are watched; `None` for the mount point.
    pub cgroup: Option<PathBuf>,
}

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Everything is as it should be.
    Ok,
    /// Something to know; no action is needed.
    Note,
    /// Something works, but not as well or as safely as it could.
    Warning,
    /// Something does not work.
    Problem,
}

/// A finding. The fields are what `--json` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The name of the check: a word that stays the same.
    pub check: &'static str,
    /// The severity of the finding.
    pub level: Level,
    /// A description of what was found.
    pub what: String,
    /// The reason why it matters; `None` if that needs no words.
    pub why: Option<String>,
    /// The remedy: what to type, one line each.
    pub remedy: Vec<String>,
}

/// The remedy of a check that only root can make.
const AS_ROOT: &str = "sudo lbridge doctor";

impl Finding {
    fn new(check: &'static str, level: Level, what: impl Into<String>) -> Self {
        Self { check, level, what: what.into(), why: None, remedy: vec![] }
    }

    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Level::Ok, what)
    }

    /// Creates a finding for a check that was not made because it needs root.
    fn needs_root(check: &'static str, what: &str) -> Self {
        Self::new(check, Level::Note, format!("{what}: not checked, that needs root")).type_this([AS_ROOT])
    }

    /// Returns true if the finding says that only root can make the check.
    pub fn is_for_root(&self) -> bool {
        self.remedy == [AS_ROOT]
    }

    fn because(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    fn type_this<T: Into<String>>(mut self, lines: impl IntoIterator<Item = T>) -> Self {
        self.remedy.extend(lines.into_iter().map(Into::into));
        self
    }
}

/// All findings, in the order of the checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The version of this program.
    pub version: &'static str,
    /// The worst severity among the findings.
    pub worst: Level,
    /// The findings, in the order of the checks.
    pub findings: Vec<Finding>,
}

/// A rule, as reported by the daemon or read from its files.
#[derive(Debug, Clone)]
struct Wanted {
    network: Network,
    spec: PortSpec,
    /// True if the kernel could steer its connections, as far as the rule goes.
    steerable: bool,
    /// The uid of the service's owner; `None` unless the daemon reported it.
    user: Option<u32>,
}

impl Wanted {
    fn of(rule: &Rule) -> Self {
        let steerable = rule.options.path != DatapathChoice::Relay && rule.needs_relay().is_none();
        Self { network: rule.network.clone(), spec: rule.spec.clone(), steerable, user: None }
    }

    /// Formats the rule as in `app_net 5432`.
    fn told(&self) -> String {
        format!("{} {}{}", self.network, self.spec.port, self.spec.protocol.suffix())
    }

    /// Returns true if a TCP listener at this address is the rule's service.
    fn leads_to(&self, address: IpAddr, port: u16) -> bool {
        match &self.spec.target {
            _ if self.spec.protocol == Protocol::Udp => false,
            Target::Port(target) => *target == port && (address.is_loopback() || address.is_unspecified()),
            Target::Address(target) => {
                target.port() == port && (target.ip() == address || address.is_unspecified())
            }
            Target::Unix(_) => false,
        }
    }
}

/// The facts that several checks use.
#[derive(Debug, Default)]
struct Host {
    rules: Vec<Wanted>,
    interfaces: Vec<Interface>,
    networks: Vec<DockerNetwork>,
}

impl Host {
    /// Returns the bridge of a rule's network.
    fn bridge(&self, network: &Network) -> Option<&Interface> {
        let name = match network {
            Network::Bridge(name) => name,
            Network::Docker(name) => match find_networks(&self.networks, name)[..] {
                [network] => network.bridge.as_ref()?,
                _ => return None,
            },
            Network::Container(_) | Network::Netns(_) | Network::Process(_) => return None,
        };
        self.interfaces.iter().find(|interface| interface.name == *name)
    }
}

/// Runs every check.
pub async fn examine(options: &Options, client: &Client) -> Report {
    let mut findings = vec![];
    let (daemon, status) = daemon::look(client).await;
    findings.extend(kernel::findings(options, daemon.as_ref()));
    findings.extend(daemon::findings(options, client, daemon.as_ref(), &status));

    let mut host = Host::default();
    match interfaces::list().await {
        Ok(interfaces) => host.interfaces = interfaces,
        Err(error) => findings.push(Finding::new("host", Level::Problem, format!("{error:#}"))),
    }
    host.rules = match &status {
        Ok(status) => status.rules.iter().filter_map(daemon::wanted).collect(),
        Err(_) => stored(options).unwrap_or_else(|finding| {
            findings.push(finding);
            vec![]
        }),
    };
    let (engine, about_engine) = docker::engine(&host, status.as_ref().ok()).await;
    findings.extend(about_engine);
    if let Some(engine) = engine {
        host.networks = engine.networks;
        // For Podman's containers the host is the gateway of their own network.
        if engine.product == EngineKind::Docker {
            findings.extend(docker::guests(&host, status.as_ref().ok()).await);
        }
        findings.extend(docker::unread_labels(status.as_ref().ok()).await);
    }
    findings.extend(firewall::findings(&host, status.as_ref().ok()).await);
    findings.extend(services::findings(&host));
    findings.extend(owners::findings(&host));
    findings.extend(leftovers::findings(&host));
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok);
    Report { version: env!("CARGO_PKG_VERSION"), worst, findings }
}

/// Reads the rules from the files, for when the daemon does not answer.
fn stored(options: &Options) -> Result<Vec<Wanted>, Finding> {
    let read = || {
        let store = Store::at(&options.state_dir);
        let rules = Config::load(&options.config)?.rules_with(store.rules()?, &store.rules_file())?;
        anyhow::Ok(rules.iter().map(|(_, rule, _)| rule.clone()).collect::<Vec<_>>())
    };
    match read() {
        Ok(rules) => Ok(rules.iter().map(Wanted::of).collect()),
        Err(_) if !nix::unistd::geteuid().is_root() => {
            Err(Finding::needs_root("rules", "the services that rules lead to"))
        }
        Err(error) => Err(Finding::new("rules", Level::Problem, format!("{error:#}"))
            .because("lbridge run refuses to start.")),
    }
}

/// Lists several names for people: the first few, and the number of the others.
fn listed(names: &[String]) -> String {
    const MOST: usize = 4;
    let mut text = names.iter().take(MOST).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > MOST {
        let _ = write!(text, " and {} more", names.len() - MOST);
    }
    text
}

/// Quotes a word for a shell; somebody else may have chosen it.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::{listed, quoted};

    #[test]
    fn words_cannot_act_on_a_shell() {
        assert_eq!(quoted("socat@app.service"), "socat@app.service");
        assert_eq!(quoted("a;reboot"), "'a;reboot'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn many_names_are_cut() {
        let names: Vec<_> = ["a", "b", "c", "d", "e", "f"].map(str::to_owned).into();
        assert_eq!(listed(&names[..2]), "a, b");
        assert_eq!(listed(&names), "a, b, c, d and 2 more");
    }
}

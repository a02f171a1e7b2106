//! Explain: what would become of one connection, step by step, by what is in force now. PURE. The decisions are the
//! kernel program's own ([`lbridge_common::verdict`]); the maps are as they were read for this question.
//!
//! A connection's way through the files: `rule` and, on a bridge, `bridge` (network, firewall) -> `kernel` (entry, listener)
//! -> `beyond` (relay, host); in a namespace `namespace` -> `beyond`. `words` says what things are called.

mod beyond;
mod bridge;
mod kernel;
mod namespace;
mod rule;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lbridge_common::wire::RuleKey;
use serde::{Deserialize, Serialize};

use super::{
    firewall::{self, Link, Opening},
    inventory::{Abilities, Inventory, Listener},
    policy::{Policy, RelayKey},
    reality::Reality,
    resolve::bridge_of,
    rule::{Network, Protocol},
};

/// Which connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// From where.
    pub network: Network,
    /// Dialled port.
    pub port: u16,
    /// What is spoken there.
    #[serde(default)]
    pub protocol: Protocol,
    /// From which address; some address of the subnet if not said.
    #[serde(default)]
    pub source: Option<IpAddr>,
}

/// What is in force, and what is meant.
#[derive(Debug)]
pub struct Known<'a> {
    /// The host, the namespace of the question included.
    pub inventory: &'a Inventory,
    /// What the kernel is able to do.
    pub abilities: &'a Abilities,
    /// What the rules ask for, given the inventory.
    pub policy: &'a Policy,
    /// What is in force, read back just now.
    pub reality: &'a Reality,
    /// Why relays could not be opened.
    pub relay_failures: &'a BTreeMap<RelayKey, String>,
    /// Why entries could not be put.
    pub entry_failures: &'a BTreeMap<RuleKey, String>,
    /// Which process has a listener, by inode, where that is known.
    pub holders: &'a BTreeMap<u64, String>,
    /// Listeners inside the namespace of the question; empty for a bridge.
    pub inside: &'a [Listener],
}

/// What would become of the connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// From where.
    pub network: Network,
    /// Dialled port.
    pub port: u16,
    /// What is the same for every address that can be dialled: the network and the rule.
    pub steps: Vec<Step>,
    /// One for each address that can be dialled.
    pub ways: Vec<Way>,
    /// All of it in one sentence.
    pub outcome: String,
    /// What to do about it.
    pub remedy: String,
}

/// The way of a connection to one address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// What is dialled.
    pub dialled: SocketAddr,
    /// The bridge; `lo` inside a namespace.
    pub interface: String,
    /// Where it comes from.
    pub source: IpAddr,
    /// In their order.
    pub steps: Vec<Step>,
    /// Where it ends.
    pub fate: Fate,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What is looked at.
    pub stage: Stage,
    /// What came of it.
    pub verdict: Answer,
    /// For a person.
    pub text: String,
    /// What the text is made from, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

/// What a step looks at, in the order of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// What the network's name means.
    Network,
    /// Which rule matches.
    Rule,
    /// What localhost of the containers leads to.
    Localhost,
    /// The packet comes in.
    Arrival,
    /// The host's firewall lets it through.
    Firewall,
    /// The kernel program looks for an entry.
    Lookup,
    /// It checks where the packet comes from.
    Source,
    /// It looks for the service's listener.
    Listener,
    /// A relay.
    Relay,
    /// What listens on the dialled address itself, lbridge or not.
    Host,
    /// What the service sees as its peer.
    Peer,
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// It goes on here.
    Yes,
    /// Not here.
    No,
    /// Said for its own sake.
    Note,
}

/// Where a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// At the service, by the kernel.
    Steered,
    /// At the service, by a relay.
    Relayed,
    /// Refused or reset at once.
    Refused,
    /// A time-out: a firewall drops it.
    Dropped,
    /// At whatever listens on the dialled address itself, as if lbridge were not there.
    Passed,
}

/// Listeners, by inode, whose processes are worth looking for.
pub fn listeners_of_interest(question: &Question, known: &Known<'_>) -> BTreeSet<u64> {
    let mut ports = BTreeSet::from([question.port]);
    ports.extend(
        known.reality.entries.iter().filter(|(k, _)| k.port == question.port).map(|(_, v)| v.target_port),
    );
    let meant = known.policy.outcomes.iter().filter(|meant| meant.rule.spec.port == question.port);
    ports.extend(meant.filter_map(|meant| meant.rule.spec.target.port()));
    let of_port = |listener: &&Listener| ports.contains(&listener.address.port());
    let listeners = known.inventory.sockets(question.protocol).iter().chain(known.inside);
    listeners.filter(of_port).map(|listener| listener.inode).collect()
}

/// What the firewall must let through for the connections in question; it is tried, rule or no rule.
pub fn openings(
    question: &Question,
    inventory: &Inventory,
    abilities: &Abilities,
) -> BTreeMap<Opening, Link> {
    let bridge = bridge_of(&question.network, inventory, abilities).ok();
    bridge.iter().flat_map(|bridge| firewall::openings(bridge, question.protocol, question.port)).collect()
}

/// Explains.
pub fn explain(question: &Question, known: &Known<'_>) -> Explanation {
    let explainer = Explainer { question, known };
    let (step, told) =
        if question.network.is_namespace() { explainer.namespace() } else { explainer.bridge() };
    let mut steps = vec![step];
    let (ways, ends, remedies) = match told {
        Err(end) => (vec![], vec![end.sentence], vec![end.remedy]),
        Ok(told) => {
            let mut all = (vec![], vec![], vec![]);
            for (way, end) in told {
                all.0.push(way);
                all.1.push(end.sentence);
                if !all.2.contains(&end.remedy) {
                    all.2.push(end.remedy);
                }
            }
            all
        }
    };
    steps.push(explainer.rule_step());
    steps.extend(explainer.localhost_step());
    Explanation {
        network: question.network.clone(),
        port: question.port,
        steps,
        ways,
        outcome: ends.join("; "),
        remedy: remedies.join("; "),
    }
}

/// How it ends, in words.
struct End {
    sentence: String,
    remedy: String,
}

struct Explainer<'a> {
    question: &'a Question,
    known: &'a Known<'a>,
}

type Ways = Result<Vec<(Way, End)>, End>;

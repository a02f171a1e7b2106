//! Explain: the path that one connection would take, step by step, given what is in force now. PURE. The
//! decisions are the kernel program's own ([`lbridge_common::verdict`]); the maps are as they were read for
//! this question.
//!
//! A connection's path through the files: `rule` and, on a bridge, `bridge` (network, firewall) -> `kernel`
//! (entry, listener) -> `passed` (relay, host); in a namespace `namespace` -> `passed`. `render` has the
//! names of things.

mod bridge;
mod kernel;
mod namespace;
mod passed;
mod render;
mod rule;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lbridge_common::wire::EntryKey;
use serde::{Deserialize, Serialize};

use super::{
    actual::Actual,
    desired::{Desired, RelayKey},
    firewall::{self, Opening, ProbeRoute},
    inventory::{Inventory, KernelFeatures, Listener},
    resolve::bridge_of,
    rule::{Network, Protocol},
};

/// The connection to explain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// The network that the connection comes from.
    pub network: Network,
    /// The port that is dialled.
    pub port: u16,
    /// The protocol of the port.
    #[serde(default)]
    pub protocol: Protocol,
    /// The address that the connection comes from; `None` for some address of the subnet.
    #[serde(default)]
    pub source: Option<IpAddr>,
}

/// The actual and the desired state.
#[derive(Debug)]
pub struct Known<'a> {
    /// The observed host, the namespace of the question included.
    pub inventory: &'a Inventory,
    /// Features of the kernel.
    pub features: &'a KernelFeatures,
    /// The desired state: what the rules ask for, given the inventory.
    pub desired: &'a Desired,
    /// The actual state, read back just now.
    pub actual: &'a Actual,
    /// The errors of relays that could not be opened.
    pub relay_failures: &'a BTreeMap<RelayKey, String>,
    /// The errors of entries that could not be put.
    pub entry_failures: &'a BTreeMap<EntryKey, String>,
    /// The process that has each listener, by inode, if it is known.
    pub holders: &'a BTreeMap<u64, String>,
    /// Listeners inside the namespace of the question; empty for a bridge.
    pub inside: &'a [Listener],
}

/// The explanation of what would happen to the connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The network that the connection comes from.
    pub network: Network,
    /// The port that is dialled.
    pub port: u16,
    /// Steps that are the same for every address that can be dialled: the network, the rule, and localhost if
    /// the rule covers it.
    pub steps: Vec<Step>,
    /// One way for each address that can be dialled.
    pub ways: Vec<Trace>,
    /// The outcomes of all ways in one sentence.
    pub outcome: String,
    /// The advice on what to do.
    pub remedy: String,
}

/// The path of a connection to one address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The address and port that are dialled.
    pub dialled: SocketAddr,
    /// Name of the bridge; `lo` inside a namespace.
    pub interface: String,
    /// The address that the connection comes from.
    pub source: IpAddr,
    /// The steps, in the order of the connection.
    pub steps: Vec<Step>,
    /// The end of the connection's path.
    pub fate: Fate,
}

/// One step on a connection's path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The part of the path that the step looks at.
    pub stage: Stage,
    /// The result of the step.
    pub verdict: Answer,
    /// The description, for a person.
    pub text: String,
    /// The facts behind the text, one per line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

/// The part of a connection's path that a step looks at, in the order of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The meaning of the network's name.
    Network,
    /// The rule that matches.
    Rule,
    /// The gateway that the containers' localhost leads to.
    Localhost,
    /// The arrival of the packet.
    Arrival,
    /// The host's firewall, which may let the packet through.
    Firewall,
    /// The kernel program's lookup of an entry.
    Lookup,
    /// The kernel program's check of the packet's source.
    Source,
    /// The kernel program's search for the service's listener.
    Listener,
    /// The relay that takes the connection.
    Relay,
    /// The socket that listens on the dialled address itself, lbridge's or not.
    Host,
    /// The peer that the service sees.
    Peer,
}

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// The connection continues here.
    Yes,
    /// The connection does not continue here.
    No,
    /// A remark that changes nothing.
    Note,
}

/// The end of a connection's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// Steered: at the service, by the kernel.
    Steered,
    /// Relayed: at the service, by a relay.
    Relayed,
    /// Refused or reset at once.
    Refused,
    /// A time-out: a firewall drops it.
    Dropped,
    /// At whatever listens on the dialled address itself, as if lbridge were not there.
    Passed,
}

/// Returns the inodes of the listeners whose processes are worth looking for.
pub fn listeners_of_interest(question: &Question, known: &Known<'_>) -> BTreeSet<u64> {
    let mut ports = BTreeSet::from([question.port]);
    ports.extend(
        known
            .actual
            .kernel
            .entries
            .iter()
            .filter(|(k, _)| k.port == question.port)
            .map(|(_, v)| v.target_port),
    );
    let meant = known.desired.outcomes.iter().filter(|meant| meant.rule.spec.port == question.port);
    ports.extend(meant.filter_map(|meant| meant.rule.spec.target.port()));
    let of_port = |listener: &&Listener| ports.contains(&listener.address.port());
    let listeners = known.inventory.sockets(question.protocol).iter().chain(known.inside);
    listeners.filter(of_port).map(|listener| listener.inode).collect()
}

/// Returns the openings that the connections in question need. They are tried whether there is a rule or not.
pub fn openings(
    question: &Question,
    inventory: &Inventory,
    features: &KernelFeatures,
) -> BTreeMap<Opening, ProbeRoute> {
    let bridge = bridge_of(&question.network, inventory, features).ok();
    bridge.iter().flat_map(|bridge| firewall::openings(bridge, question.protocol, question.port)).collect()
}

/// Explains a connection: its steps, its end, and what to do.
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

/// The end of a path in words, and the advice.
struct End {
    sentence: String,
    remedy: String,
}

struct Explainer<'a> {
    question: &'a Question,
    known: &'a Known<'a>,
}

type Traces = Result<Vec<(Trace, End)>, End>;

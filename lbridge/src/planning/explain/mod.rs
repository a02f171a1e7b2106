//! Explain: what would become of one connection, step by step, by what is in force now. PURE. The decisions are the
//! kernel program's own ([`lbridge_common::verdict`]); the maps are as they were read for this question.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lbridge_common::{
    verdict::{Verdict, decide, first_candidate, listening_addresses},
    wire::{Address, Endpoint, ListenerKey, RuleKey, RuleValue},
};
use serde::{Deserialize, Serialize};

use super::{
    firewall::{Link, Opening, Passage},
    inventory::{
        Abilities, Absence, DockerNetwork, DockerPresence, Interface, Inventory, Listener, ListenerKind,
        Namespace, find_networks,
    },
    policy::{
        Clients, Outcome, Place, Policy, RelayKey, RelaySpec, RuleOutcome, Service, State, bridge_of,
        stand_in_for_container,
    },
    reality::Reality,
    rule::{Network, Origin, RuleId, Source},
};

/// Rules that are told of where none matches.
const MAX_NEAREST: usize = 4;
/// A port that is so far from the dialled one may have been meant.
const NEAR: u16 = 2;
/// Digits of an id that Docker prints.
const SHORT_ID: usize = 12;

/// Which connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// From where.
    pub network: Network,
    /// Dialled port.
    pub port: u16,
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
    let listeners = known.inventory.listeners.iter().chain(known.inside);
    listeners.filter(of_port).map(|listener| listener.inode).collect()
}

/// What the firewall must let through for the connections in question; it is tried, rule or no rule.
pub fn openings(
    question: &Question,
    inventory: &Inventory,
    abilities: &Abilities,
) -> BTreeMap<Opening, Link> {
    let bridge = bridge_of(&question.network, inventory, abilities).ok();
    let gateways =
        bridge.iter().flat_map(|bridge| bridge.addresses.iter().map(move |address| (bridge, address)));
    let opening = |(bridge, (gateway, prefix)): (&Interface, &(IpAddr, u8))| {
        let opening = Opening { interface: bridge.name.clone(), gateway: *gateway, port: question.port };
        (opening, Link { ifindex: bridge.index, prefix: *prefix })
    };
    gateways.map(opening).collect()
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

impl Explainer<'_> {
    fn id(&self) -> RuleId {
        RuleId { network: self.question.network.clone(), port: self.question.port }
    }

    /// The question's rule, or whichever has one of the addresses that it is about: two names may mean one bridge.
    fn rule(&self) -> Option<&RuleOutcome> {
        let outcomes = &self.known.policy.outcomes;
        let by_name = outcomes.iter().find(|meant| meant.rule.id() == self.id());
        by_name.or_else(|| {
            let bridge = bridge_of(&self.question.network, self.known.inventory, self.known.abilities).ok()?;
            outcomes.iter().find(|meant| {
                let here = |place: &Place| matches!(place, Place::Bridge { ifindex, .. } if *ifindex == bridge.index);
                meant.rule.spec.port == self.question.port
                    && meant.gateways.iter().any(|gateway| here(&gateway.relay_key.place))
            })
        })
    }

    fn rule_step(&self) -> Step {
        let Some(meant) = self.rule() else {
            let nearest = self.nearest();
            let text = if nearest.is_empty() {
                format!("no rule for {}", self.id())
            } else {
                format!("no rule for {}; nearest: {}", self.id(), nearest.join(", "))
            };
            return step(Stage::Rule, Answer::No, text);
        };
        let by = match meant.origin {
            Origin::Cli => "made by lbridge allow",
            Origin::Config => "from the configuration file",
        };
        let shared =
            if meant.rule.network == self.question.network { "" } else { ", which means the same bridge" };
        let text = format!("{} -> {}, {by}{shared}", meant.rule.id(), meant.rule.spec.target);
        step(Stage::Rule, Answer::Yes, text)
    }

    /// Other ports of this network, and other networks that have this port or one beside it.
    fn nearest(&self) -> Vec<String> {
        let distance = |meant: &RuleOutcome| meant.rule.spec.port.abs_diff(self.question.port);
        let is_other = |meant: &RuleOutcome| meant.rule.network != self.question.network;
        let leads_there = |meant: &RuleOutcome| meant.rule.spec.target.port() == Some(self.question.port);
        let outcomes = self.known.policy.outcomes.iter();
        let mut near: Vec<_> = outcomes
            .filter(|meant| !is_other(meant) || distance(meant) <= NEAR)
            .map(|meant| (!leads_there(meant) || is_other(meant), distance(meant), is_other(meant), meant))
            .collect();
        near.sort_by_key(|(leads, distance, other, meant)| (*leads, *distance, *other, meant.rule.id()));
        let told = |meant: &RuleOutcome| format!("{} {}", meant.rule.network, meant.rule.spec);
        near.into_iter().take(MAX_NEAREST).map(|(.., meant)| told(meant)).collect()
    }

    // Networks of the host.

    fn bridge(&self) -> (Step, Ways) {
        let network = &self.question.network;
        let docker = match network {
            Network::Docker(name) => find_networks(&self.known.inventory.docker_networks, name),
            _ => vec![],
        };
        let bridge = match bridge_of(network, self.known.inventory, self.known.abilities) {
            Ok(bridge) => bridge,
            Err(outcome) => {
                let why = outcome.why.unwrap_or_default();
                let text = match docker[..] {
                    [network] => format!("{}; {why}", described(network)),
                    _ => why.clone(),
                };
                let end = End {
                    sentence: format!("nothing of {network} can dial port {}: {why}", self.question.port),
                    remedy: self.without_network(outcome.state),
                };
                return (step(Stage::Network, Answer::No, text), Err(end));
            }
        };
        let addresses: Vec<_> =
            bridge.addresses.iter().map(|(ip, prefix)| format!("{ip}/{prefix}")).collect();
        let what = match docker[..] {
            [network] => format!("{}, its bridge {}", described(network), bridge.name),
            _ => format!("the bridge {}", bridge.name),
        };
        let away = match (network, self.known.inventory.docker) {
            (Network::Docker(_), DockerPresence::Away) => "; as last seen, Docker is away",
            _ => "",
        };
        if addresses.is_empty() {
            let text = format!("{what}, which has no address that a container could dial{away}");
            let end = End {
                sentence: format!("nothing of {network} can dial port {}: no gateway", self.question.port),
                remedy: format!(
                    "give the bridge an address: `ip addr add ADDRESS/PREFIX dev {}`",
                    bridge.name
                ),
            };
            return (step(Stage::Network, Answer::No, text), Err(end));
        }
        let text = format!("{what} (interface {}), the gateway {}{away}", bridge.index, addresses.join(", "));
        let fits = |ip: &IpAddr| self.question.source.is_none_or(|source| source.is_ipv4() == ip.is_ipv4());
        let gateways = bridge.addresses.iter().filter(|(ip, _)| fits(ip));
        let ways: Vec<_> = gateways.map(|(ip, prefix)| self.to_gateway(&bridge, *ip, *prefix)).collect();
        let ways = if ways.is_empty() {
            Err(End {
                sentence: format!("{network} has no gateway of the source's family"),
                remedy: "leave out --source, or give one of the network's addresses".to_owned(),
            })
        } else {
            Ok(ways)
        };
        (step(Stage::Network, Answer::Yes, text), ways)
    }

    fn without_network(&self, state: State) -> String {
        let id = self.id();
        match (&self.question.network, state) {
            (_, State::Blocked) => {
                "name another network; `docker network ls` and `ip link show type bridge` show them"
                    .to_owned()
            }
            (Network::Docker(name), _) if self.rule().is_some() => {
                format!(
                    "`docker network create {name}`: the rule is there, and is in force as soon as the network is"
                )
            }
            (Network::Docker(_), _) => {
                format!(
                    "`docker network ls` shows the networks; `lbridge allow {id}` would wait for this one"
                )
            }
            _ => format!(
                "`ip link show type bridge` shows the bridges; `lbridge allow {id}` would wait for this one"
            ),
        }
    }

    /// The whole way of a SYN to a gateway.
    fn to_gateway(&self, bridge: &Interface, gateway: IpAddr, prefix: u8) -> (Way, End) {
        let dialled = SocketAddr::new(gateway, self.question.port);
        let source = self.question.source.unwrap_or_else(|| neighbour(gateway, prefix));
        let mut way = Way {
            dialled,
            interface: bridge.name.clone(),
            source,
            steps: vec![arrival(bridge, source, dialled)],
            fate: Fate::Refused,
        };
        if let Some(end) = self.firewall(&mut way) {
            return (way, end);
        }
        let entry = self.lookup(&mut way, bridge);
        let verdict = decide(entry, &source.into());
        let end = match (verdict, entry) {
            (Verdict::Steer, Some(entry)) => {
                let text = format!("{source} is in {}", subnet(entry));
                way.steps.push(step(Stage::Source, Answer::Yes, text));
                self.listener(&mut way, entry)
            }
            (Verdict::ForeignSource, Some(entry)) => {
                let text = format!("{source} is not in {}: left alone, and counted", subnet(entry));
                way.steps.push(step(Stage::Source, Answer::No, text));
                self.beyond(&mut way, bridge)
            }
            (_, Some(_)) => {
                let text = format!("{source} is the gateway's own address, so the host itself: left alone");
                way.steps.push(step(Stage::Source, Answer::No, text));
                self.beyond(&mut way, bridge)
            }
            (_, None) => self.beyond(&mut way, bridge),
        };
        (way, end)
    }

    /// What was tried; an end, if nothing comes through.
    fn firewall(&self, way: &mut Way) -> Option<End> {
        let opening =
            Opening { interface: way.interface.clone(), gateway: way.dialled.ip(), port: way.dialled.port() };
        let filtering = &self.known.reality.filtering;
        let (verdict, text) = match filtering.passages.get(&opening) {
            Some(Passage::Open) => {
                let accepts = filtering.accepts.keys().find(|(_, accepted)| *accepted == opening);
                let by =
                    accepts.map_or_else(String::new, |(chain, _)| format!(", by lbridge's rule in {chain}"));
                (Answer::Yes, format!("the firewall lets it in{by}: a SYN was sent and answered"))
            }
            Some(Passage::Dropped) => {
                let why = filtering.why_dropped(&opening);
                way.steps.push(step(
                    Stage::Firewall,
                    Answer::No,
                    format!("a SYN was sent and not answered: {why}"),
                ));
                let remedy = match self.rule() {
                    Some(_) => why,
                    None => format!("`lbridge allow {}` lets it through, and opens the port", self.id()),
                };
                return Some(self.end(way, Fate::Dropped, "a firewall drops them", remedy));
            }
            Some(Passage::Unknown(why)) => {
                (Answer::Note, format!("whether a firewall drops it could not be tried: {why}"))
            }
            None => (Answer::Note, "whether a firewall drops it was not tried".to_owned()),
        };
        way.steps.push(step(Stage::Firewall, verdict, text));
        None
    }

    /// The entry that the kernel program finds.
    fn lookup(&self, way: &mut Way, bridge: &Interface) -> Option<&RuleValue> {
        let Known { abilities, reality, policy, .. } = self.known;
        let mut no = |text| way.steps.push(step(Stage::Lookup, Answer::No, text));
        let steering = match &abilities.steer {
            Ok(steering) => steering,
            Err(why) => {
                no(format!("the kernel does not steer: {why}"));
                return None;
            }
        };
        if reality.detached {
            no("the kernel programs are detached, their pins are gone".to_owned());
            return None;
        }
        let ifindex = if steering.interface_check { bridge.index } else { 0 };
        let key =
            RuleKey { gateway: way.dialled.ip().into(), ifindex, port: way.dialled.port(), reserved: 0 };
        let interface = if steering.interface_check { &bridge.name } else { "any interface" };
        let asked = format!("({interface}, {}, {})", way.dialled.ip(), way.dialled.port());
        let Some(entry) = reality.entries.get(&key) else {
            let missing = if policy.entries.contains_key(&key) {
                let why =
                    self.known.entry_failures.get(&key).map_or("the next look puts it there", String::as_str);
                format!(", which the rule asks for: {why}")
            } else {
                String::new()
            };
            no(format!("RULES has nothing for {asked}{missing}"));
            return None;
        };
        if entry.key != key {
            no(format!("what RULES has for {asked} is another key's: left alone"));
            return None;
        }
        let wanted = match policy.entries.get(&key) {
            Some(wanted) if *wanted == (RuleValue { steered: 0, ..*entry }) => String::new(),
            Some(wanted) => format!("; the rule asks for {}: the next look puts that", target(wanted)),
            None => {
                "; no rule asks for it, somebody else has put it there: the next look removes it".to_owned()
            }
        };
        let text = format!(
            "RULES has {asked}: from {} to {}, {} so far{wanted}",
            subnet(entry),
            target(entry),
            entry.steered
        );
        way.steps.push(step(Stage::Lookup, Answer::Yes, text));
        Some(entry)
    }

    /// The listener that the kernel program assigns.
    fn listener(&self, way: &mut Way, entry: &RuleValue) -> End {
        let taken = |key: &ListenerKey| {
            self.known.reality.registered.contains(key) && self.is_of_family(key, way.dialled.ip())
        };
        let found = first_candidate(&entry.target, entry.target_port, |key| taken(&key).then_some(key));
        let details: Vec<_> =
            listening_addresses(&entry.target).map(|address| self.candidate(address, entry)).collect();
        let Some(key) = found else {
            let text = "none that the kernel could take is registered: refused".to_owned();
            way.steps.push(Step { stage: Stage::Listener, verdict: Answer::No, text, details });
            let mut bound =
                listening_addresses(&entry.target).map(|address| key_address(address, entry.target_port));
            let (why, remedy) = if bound.any(|bound| self.at(bound).next().is_some()) {
                let remedy = "`lbridge status` makes the daemon look, and says what it makes of the listener";
                (format!("no listener for {} is registered", target(entry)), remedy.to_owned())
            } else {
                (
                    format!("nothing listens on {}", target(entry)),
                    format!("start a service on {}", target(entry)),
                )
            };
            return self.end(way, Fate::Refused, &why, remedy);
        };
        let bound = key_address(key.address, key.port);
        let who = self
            .at(bound)
            .find_map(|listener| self.holder(listener))
            .unwrap_or_else(|| "a service".to_owned());
        let text = format!("{bound}, registered under slot {}: {who} gets the connection", key.slot);
        way.steps.push(Step { stage: Stage::Listener, verdict: Answer::Yes, text, details });
        way.steps.push(self.steered_peer(way));
        let remedy = match self.rule() {
            Some(meant) => taken_back(meant),
            None => "no rule asks for it: `lbridge status` makes the daemon look, and remove it".to_owned(),
        };
        self.end(way, Fate::Steered, &format!("{who} on {bound}"), remedy)
    }

    /// The kernel gives a connection only to a listener of its family; `[::]` may serve both.
    fn is_of_family(&self, key: &ListenerKey, dialled: IpAddr) -> bool {
        if key.address.is_v4() == dialled.is_ipv4() {
            return true;
        }
        let mut listeners = self.at(key_address(key.address, key.port)).peekable();
        // The socket may be newer than the list of them.
        key.address == Address::ANY_V6 && (listeners.peek().is_none() || listeners.any(|l| !l.single_family))
    }

    fn candidate(&self, address: Address, entry: &RuleValue) -> String {
        let bound = key_address(address, entry.target_port);
        let of_address = |key: &&ListenerKey| key.address == address && key.port == entry.target_port;
        let registered = self.known.reality.registered.iter().filter(of_address).count();
        let there: Vec<_> = self.at(bound).map(|listener| self.named(listener)).collect();
        match (registered, there.is_empty()) {
            (0, true) => format!("{bound}: nothing listens"),
            (0, false) => format!("{bound}: {}, not registered", there.join(", ")),
            (_, true) => format!("{bound}: registered"),
            (_, false) => format!("{bound}: {}, registered", there.join(", ")),
        }
    }

    /// The host's listeners that are bound there, and to no interface.
    fn at(&self, bound: SocketAddr) -> impl Iterator<Item = &Listener> {
        self.known.inventory.listeners.iter().filter(move |l| l.address == bound && l.bound_interface == 0)
    }

    fn holder(&self, listener: &Listener) -> Option<String> {
        self.known.holders.get(&listener.inode).cloned()
    }

    fn named(&self, listener: &Listener) -> String {
        let who = self.holder(listener).unwrap_or_else(|| "a service".to_owned());
        let v6_only = listener.single_family && listener.address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED);
        match listener.kind {
            ListenerKind::Tcp if v6_only => format!("{who} (IPv6 only)"),
            ListenerKind::Tcp => who,
            ListenerKind::Mptcp => format!("{who} (MPTCP)"),
            ListenerKind::Refused(errno) => format!("{who} (refused by the kernel, error {errno})"),
        }
    }

    /// The kernel goes on as if lbridge were not there: to a relay, to whatever listens on the gateway, or nowhere.
    fn beyond(&self, way: &mut Way, bridge: &Interface) -> End {
        let place = Place::Bridge { interface: bridge.name.clone(), ifindex: bridge.index };
        let key = RelayKey { address: way.dialled, place };
        if let Some(spec) = self.known.reality.relays.get(&key) {
            return self.relay(way, spec);
        }
        self.no_relay(way, &key);
        let who = answering(&self.known.inventory.listeners, way.dialled, bridge.index);
        self.host(way, who)
    }

    /// A relay that a rule asks for and that is not there, or that is about to go.
    fn no_relay(&self, way: &mut Way, key: &RelayKey) {
        let text = if self.known.policy.relays.contains_key(key) {
            let why = self.known.relay_failures.get(key).map_or("the next look opens it", String::as_str);
            format!("the rule asks for a relay on {}, which is not open: {why}", way.dialled)
        } else if self.known.reality.lingering.contains(key) {
            "a relay only completes what had begun when the kernel took over".to_owned()
        } else {
            return;
        };
        way.steps.push(step(Stage::Relay, Answer::No, text));
    }

    fn relay(&self, way: &mut Way, spec: &RelaySpec) -> End {
        let reason = self.meant(way).and_then(|outcome| outcome.why.clone());
        let reason = reason.map_or_else(String::new, |why| format!(" ({why})"));
        let service = match &spec.service {
            Service::Tcp(address) => address.to_string(),
            Service::Unix(path) => format!("unix:{}", path.display()),
        };
        let open =
            format!("the relay of {} is open on {}, {}{reason}", spec.rule, way.dialled, way.interface);
        let container = match spec.clients {
            Clients::Subnet(subnet) if !subnet.contains(way.source) || way.source == way.dialled.ip() => {
                let text = format!("{open}; {} is none of its network's containers: reset", way.source);
                way.steps.push(step(Stage::Relay, Answer::No, text));
                let remedy = "only the network's own containers are served".to_owned();
                return self.end(way, Fate::Refused, "the relay resets them", remedy);
            }
            Clients::Subnet(_) => way.source,
            Clients::Inside(told) => told,
        };
        way.steps.push(step(Stage::Relay, Answer::Yes, format!("{open}: connects to {service}")));
        way.steps.push(self.relayed_peer(spec, container));
        let remedy = self.rule().map_or_else(|| "the next look closes it".to_owned(), taken_back);
        self.end(way, Fate::Relayed, &format!("{service}{reason}"), remedy)
    }

    /// What listens on the dialled address itself, rule or no rule.
    fn host(&self, way: &mut Way, who: Option<&Listener>) -> End {
        let id = self.id();
        if let Some(listener) = who {
            let named = self.named(listener);
            let text =
                format!("{named} listens on {} and answers, as if lbridge were not there", listener.address);
            way.steps.push(step(Stage::Host, Answer::Yes, text));
            let remedy = match self.rule() {
                None => format!(
                    "`lbridge allow {id}` would lead them to the loopback service of that port; a service that is bound to a loopback address is out of their reach"
                ),
                Some(_) => self.unserved(way),
            };
            return self.end(way, Fate::Passed, &format!("{named} on {}", listener.address), remedy);
        }
        let text = format!("nothing listens on {}: refused", way.dialled);
        way.steps.push(step(Stage::Host, Answer::No, text));
        if self.rule().is_none() {
            let remedy = format!("`lbridge allow {id}` opens it");
            return self.end(way, Fate::Refused, "there is no rule", remedy);
        }
        let why = self.meant(way).filter(|o| !matches!(o.state, State::Steered | State::Relayed));
        let why = why.and_then(|outcome| outcome.why.clone());
        let why = why.unwrap_or_else(|| "neither entry nor relay has it".to_owned());
        let remedy = self.unserved(way);
        self.end(way, Fate::Refused, &why, remedy)
    }

    /// What to do where a rule does not serve.
    fn unserved(&self, way: &Way) -> String {
        let Some(meant) = self.rule() else { return String::new() };
        match self.meant(way).map(|outcome| outcome.state) {
            Some(State::Waiting) => format!("start the service on {}", meant.rule.spec.target),
            Some(State::Blocked) => {
                "`lbridge status` says the same; the reason says what to change".to_owned()
            }
            // It serves others.
            Some(State::Steered) => "only the network's own containers are served".to_owned(),
            Some(State::Relayed) | None => "`lbridge status` makes the daemon look again".to_owned(),
        }
    }

    /// What the rule means to become of this way.
    fn meant(&self, way: &Way) -> Option<&Outcome> {
        let gateways = &self.rule()?.gateways;
        Some(&gateways.iter().find(|gateway| gateway.relay_key.address == way.dialled)?.outcome)
    }

    fn end(&self, way: &mut Way, fate: Fate, what: &str, remedy: String) -> End {
        way.fate = fate;
        let whose = format!("connections from {} to {}", self.question.network, way.dialled);
        let sentence = match fate {
            Fate::Steered => format!("{whose} are steered to {what}"),
            Fate::Relayed => format!("{whose} are relayed to {what}"),
            Fate::Refused => format!("{whose} are refused: {what}"),
            Fate::Dropped => format!("{whose} time out: {what}"),
            Fate::Passed => format!("{whose} reach {what}, not by lbridge"),
        };
        End { sentence, remedy }
    }

    // Names.

    fn steered_peer(&self, way: &Way) -> Step {
        let reality = self.known.reality;
        let view = reality.views.get(&Endpoint::new(way.dialled.ip().into(), way.dialled.port()));
        let seen = |view: &&lbridge_common::wire::LoopbackView| {
            reality.name_hooks && Address::from(way.source).masked(&view.mask) == view.subnet
        };
        let text = match view.filter(seen) {
            Some(view) => format!(
                "the service sees {} as its peer, which it may trust, and itself as {}",
                IpAddr::from(view.target.address),
                key_address(view.target.address, view.target.port)
            ),
            None => format!("the service sees {} as its peer, and itself as {}", way.source, way.dialled),
        };
        step(Stage::Peer, Answer::Note, text)
    }

    fn relayed_peer(&self, spec: &RelaySpec, container: IpAddr) -> Step {
        let text = match (&spec.service, spec.source) {
            (Service::Unix(_), _) => "the service sees root as its peer".to_owned(),
            (Service::Tcp(address), Source::Loopback) => {
                format!("the service sees {} as its peer, which it may trust", loopback(address.ip()))
            }
            (Service::Tcp(address), Source::Container) => {
                // An IPv4 socket cannot be shown an IPv6 peer.
                let nameable = container.is_ipv4() || address.is_ipv6();
                let stands_in = stand_in_for_container(container);
                if self.known.reality.name_hooks && nameable && IpAddr::from(stands_in) != container {
                    format!("the service sees {container} as its peer")
                } else {
                    format!("the service sees {stands_in} as its peer, which stands for the container")
                }
            }
        };
        let header = if spec.proxy_protocol.is_some() {
            "; the PROXY protocol's header says who connects"
        } else {
            ""
        };
        step(Stage::Peer, Answer::Note, text + header)
    }

    // Namespaces.

    fn namespace(&self) -> (Step, Ways) {
        let network = &self.question.network;
        let without = |why: &str, remedy: String| {
            let sentence = format!("nothing in {network} can dial its localhost through lbridge: {why}");
            (step(Stage::Network, Answer::No, why.to_owned()), Err(End { sentence, remedy }))
        };
        let namespace = match self.known.inventory.namespaces.get(network) {
            None => return without("there is no such process", "name one that runs".to_owned()),
            Some(Err(Absence::NotThere(why))) => {
                let remedy = format!("`lbridge allow {}` waits for it", self.id());
                return without(why, remedy);
            }
            Some(Err(Absence::Unsuitable(why))) => {
                return without(why, "name another network, or what the reason says".to_owned());
            }
            Some(Ok(namespace)) if namespace.loopback.is_empty() => {
                return without(
                    "its loopback interface is down",
                    "run `ip link set lo up` inside".to_owned(),
                );
            }
            Some(Ok(namespace)) => namespace,
        };
        let addresses: Vec<_> = namespace.loopback.iter().map(ToString::to_string).collect();
        let text = format!(
            "{network} is the network namespace {}, where localhost is {}",
            namespace.key.id.inode,
            addresses.join(" and ")
        );
        let ways = namespace.loopback.iter().map(|ip| self.inside(namespace, *ip)).collect();
        (step(Stage::Network, Answer::Yes, text), Ok(ways))
    }

    fn inside(&self, namespace: &Namespace, ip: IpAddr) -> (Way, End) {
        let dialled = SocketAddr::new(ip, self.question.port);
        let text =
            format!("{dialled} is dialled inside, over lo; nothing of the host is passed on the way there");
        let mut way = Way {
            dialled,
            interface: "lo".to_owned(),
            source: ip,
            steps: vec![step(Stage::Arrival, Answer::Note, text)],
            fate: Fate::Refused,
        };
        let place = Place::Namespace(namespace.key.clone());
        let key = RelayKey { address: dialled, place };
        let is_there = |open: &&RelayKey| {
            open.address == dialled
                && matches!(&open.place, Place::Namespace(there) if there.id == namespace.key.id)
        };
        let end = if let Some((_, spec)) = self.known.reality.relays.iter().find(|(open, _)| is_there(open)) {
            self.relay(&mut way, spec)
        } else {
            self.no_relay(&mut way, &key);
            self.host(&mut way, answering(self.known.inside, dialled, 1))
        };
        (way, end)
    }
}

/// Before anything of the host has seen the SYN.
fn arrival(bridge: &Interface, source: IpAddr, dialled: SocketAddr) -> Step {
    let text = format!("a SYN from {source} to {dialled} comes in on {}", bridge.name);
    step(Stage::Arrival, Answer::Note, text)
}

fn step(stage: Stage, verdict: Answer, text: String) -> Step {
    Step { stage, verdict, text, details: vec![] }
}

fn described(network: &DockerNetwork) -> String {
    let id = network.id.get(..SHORT_ID).unwrap_or(&network.id);
    format!("Docker network {} ({id}, driver {})", network.name, network.driver)
}

fn taken_back(meant: &RuleOutcome) -> String {
    match meant.origin {
        Origin::Cli => format!("`lbridge deny {}` takes it back", meant.rule.id()),
        Origin::Config => "the rule is the configuration file's; change it there".to_owned(),
    }
}

/// The listener that the kernel itself picks for `dialled`, coming in on that interface: one that is bound to the address
/// before one that is bound to all, one that is bound to the interface before one that is not (compute_score() in
/// net/ipv4/inet_hashtables.c).
fn answering(listeners: &[Listener], dialled: SocketAddr, interface: u32) -> Option<&Listener> {
    let score = |listener: &Listener| {
        let bound = listener.address;
        let of_family = bound.is_ipv4() == dialled.is_ipv4()
            || (bound.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) && !listener.single_family);
        let of_address = bound.ip() == dialled.ip();
        let of_interface = listener.bound_interface == interface;
        let fits = bound.port() == dialled.port()
            && of_family
            && (of_address || bound.ip().is_unspecified())
            && (of_interface || listener.bound_interface == 0);
        fits.then_some((of_address, of_interface, bound.is_ipv4() == dialled.is_ipv4()))
    };
    let scored = listeners.iter().filter_map(|listener| Some((score(listener)?, listener)));
    Some(scored.max_by_key(|(score, _)| *score)?.1)
}

/// Some other address of the gateway's subnet.
fn neighbour(gateway: IpAddr, prefix: u8) -> IpAddr {
    let own = Address::from(gateway);
    let mask = own.mask(prefix);
    let is_inside = |ip: &IpAddr| Address::from(*ip).masked(&mask) == own.masked(&mask);
    let beside = |step: i8| match gateway {
        IpAddr::V4(ip) => IpAddr::from(Ipv4Addr::from(u32::from(ip).wrapping_add_signed(step.into()))),
        IpAddr::V6(ip) => IpAddr::from(Ipv6Addr::from(u128::from(ip).wrapping_add_signed(step.into()))),
    };
    Some(beside(1)).filter(is_inside).unwrap_or_else(|| beside(-1))
}

fn loopback(family: IpAddr) -> IpAddr {
    if family.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

fn key_address(address: Address, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

fn target(entry: &RuleValue) -> SocketAddr {
    key_address(entry.target, entry.target_port)
}

fn subnet(entry: &RuleValue) -> String {
    let ones: u32 = entry.mask.0.iter().map(|word| word.count_ones()).sum();
    let prefix = if entry.subnet.is_v4() { ones.saturating_sub(96) } else { ones };
    format!("{}/{prefix}", IpAddr::from(entry.subnet))
}

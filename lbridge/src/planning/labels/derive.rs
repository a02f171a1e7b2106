//! Derive: the rules that labels ask for, within the bounds that are set, beside the rules of others.

use std::collections::{BTreeMap, BTreeSet};

use super::{ALLOW, Kind, LOCALHOST, Labelled, MAX_EXCERPT, MAX_TEXT, Problem, SOURCE, Settings};
use crate::planning::{
    inventory::{DockerNetwork, find_networks},
    rule::{Network, Options, Origin, PortSpec, Protocol, Rule, Rules, Source, Spelling, Target},
    text::excerpt,
};

/// Most ports that one label may ask for.
const MAX_PORTS: usize = 256;
/// Most rules that all labels together may ask for.
const MAX_RULES: usize = 8192;
/// Most problems of one object that are reported. The others are counted.
const MAX_PROBLEMS_OF_ONE: usize = 8;
/// Most problems of all objects together that are reported. The others are counted.
pub(super) const MAX_PROBLEMS: usize = 64;
/// Longest description of a problem, in characters.
const MAX_SENTENCE: usize = 300;
/// Most ports that a problem names.
const MAX_NAMED_PORTS: usize = 5;

/// The result of reading the labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Derived {
    /// All rules: those of others, and those of labels.
    pub rules: Rules,
    /// Problems of the first objects.
    pub problems: Vec<Problem>,
    /// Number of further problems.
    pub more: usize,
}

/// Derives the rules that labels ask for, beside `own`, the rules of others.
pub fn derive(
    labelled: &[Labelled],
    settings: &Settings,
    networks: &[DockerNetwork],
    own: &Rules,
) -> Derived {
    let mut derivation = Derivation { settings, networks, own: BTreeMap::new(), wanted: BTreeMap::new() };
    for (_, rule, origin) in own.iter() {
        if let Some(bridge) = derivation.bridge(&rule.network) {
            // If a bridge has several names, the first in order is served.
            derivation
                .own
                .entry((bridge, rule.spec.port, rule.spec.protocol))
                .or_insert_with(|| (rule.clone(), origin));
        }
    }
    let mut derived = Derived::default();
    let mut objects: Vec<_> = labelled.iter().collect();
    // Networks first: a container need not ask for what a network opens to all.
    objects.sort();
    for object in objects {
        let problems = derivation.object(object);
        let kept = problems.len().min(MAX_PROBLEMS_OF_ONE).min(MAX_PROBLEMS - derived.problems.len());
        derived.more += problems.len() - kept;
        derived.problems.extend(problems.into_iter().take(kept));
    }
    let wanted = derivation.wanted.into_values().map(|wanted| wanted.rule);
    // Each rule was checked by itself. Only their number, with the rules of others, may be too large.
    derived.rules = own.allow(wanted, Origin::Label).unwrap_or_else(|error| {
        derived.problems.push(Problem {
            object: "all labels".to_owned(),
            label: ALLOW.to_owned(),
            wrong: error.for_label().to_string(),
            remedy: "none of them is in force; have fewer rules".to_owned(),
        });
        own.clone()
    });
    derived
}

/// A bridge, a port of its gateway, and the port's protocol.
type Claimed = (String, u16, Protocol);

struct Derivation<'a> {
    settings: &'a Settings,
    networks: &'a [DockerNetwork],
    own: BTreeMap<Claimed, (Rule, Origin)>,
    wanted: BTreeMap<Claimed, Wanted>,
}

struct Wanted {
    rule: Rule,
    /// The object that asked first.
    by: String,
}

/// The error about a port of a label, and what to do about it.
type Complaint = (String, String);

impl<'a> Derivation<'a> {
    fn bridge(&self, network: &Network) -> Option<String> {
        match network {
            Network::Bridge(name) => Some(name.clone()),
            Network::Docker(name) => match find_networks(self.networks, name)[..] {
                [network] => network.bridge.clone(),
                _ => None,
            },
            Network::Container(_) | Network::Netns(_) | Network::Process(_) => None,
        }
    }

    /// Takes the rules that an object asks for, and returns the problems with its labels.
    fn object(&mut self, object: &Labelled) -> Vec<Problem> {
        let problem = |label: &str, text: Option<&str>, wrong: &str, remedy: &str| Problem {
            object: object.told(),
            label: match text {
                Some(text) => format!("{label}={}", excerpt(text, MAX_EXCERPT)),
                None => label.to_owned(),
            },
            wrong: excerpt(wrong, MAX_SENTENCE),
            remedy: excerpt(remedy, MAX_SENTENCE),
        };
        let mut problems = vec![];
        if let Some(label) = &object.unknown {
            let known = format!("there are {ALLOW}, {LOCALHOST} and {SOURCE}; rename or remove it");
            problems.push(problem(label, None, "lbridge has no such label", &known));
        }
        let localhost = match object.localhost.as_deref().map(str::trim) {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => {
                let text = object.localhost.as_deref();
                problems.push(problem(LOCALHOST, text, "it is neither true nor false", "write true"));
                return problems;
            }
        };
        let source = match object.source.as_deref().map(|text| text.trim().parse::<Source>()) {
            None => Source::Container,
            Some(Ok(source)) => source,
            Some(Err(_)) => {
                let text = object.source.as_deref();
                problems.push(problem(SOURCE, text, "it is not a source", "write container or loopback"));
                return problems;
            }
        };
        if !self.settings.sources.contains(&source) {
            let remedy = "add it there and run `lbridge reload`, or change the label";
            let wrong = format!("source {source} is not in label_sources of lbridge.toml");
            problems.push(problem(SOURCE, object.source.as_deref(), &wrong, remedy));
            return problems;
        }
        let allow = Some(object.allow.as_str());
        let places = self.places(object);
        if places.is_empty() {
            let (wrong, remedy) = match object.kind {
                Kind::Network => ("it is not a bridge of this host", "allow its containers one by one"),
                Kind::Container => ("it is on no network with a bridge on this host", "join it to one"),
            };
            let remedy = format!("{remedy}, or type: lbridge allow container:NAME PORT");
            problems.push(problem(ALLOW, allow, wrong, &remedy));
            return problems;
        }
        let (specs, complaints) = self.ports(&object.allow);
        problems.extend(complaints.iter().map(|(wrong, remedy)| problem(ALLOW, allow, wrong, remedy)));
        for network in places {
            for spec in &specs {
                let from = match object.kind {
                    Kind::Network => BTreeSet::new(),
                    Kind::Container => [object.as_source()].into(),
                };
                // Only TCP to localhost can be led to the host.
                let localhost = localhost && spec.protocol == Protocol::Tcp;
                let options = Options { from, localhost, source, ..Options::default() };
                let rule = Rule { options, ..Rule::new(self.named(network), spec.clone()) };
                if let Err((wrong, remedy)) = self.want(object, network, rule) {
                    problems.push(problem(ALLOW, allow, &wrong, &remedy));
                }
            }
        }
        problems
    }

    /// Returns the object's networks that are bridges of the host.
    fn places(&self, object: &Labelled) -> Vec<&'a DockerNetwork> {
        let find = |text: &String| {
            let by_id = self.networks.iter().find(|network| network.id == *text);
            by_id.or_else(|| self.networks.iter().find(|network| network.name == *text))
        };
        object.networks.iter().filter_map(find).filter(|network| network.bridge.is_some()).collect()
    }

    /// Returns the network as a rule names it: by its name if the name means it and no other, else by its id.
    fn named(&self, network: &DockerNetwork) -> Network {
        match network.name.parse() {
            Ok(named @ Network::Docker(_)) if find_networks(self.networks, &network.name) == [network] => {
                named
            }
            _ => Network::Docker(network.id.clone()),
        }
    }

    /// Returns the ports that a label asks for and may have, and what is wrong with the others.
    fn ports(&self, text: &str) -> (Vec<PortSpec>, Vec<Complaint>) {
        let complaint = |wrong: String, remedy: &str| vec![(wrong, remedy.to_owned())];
        if text.len() > MAX_TEXT {
            let wrong = format!("it is longer than {MAX_TEXT} bytes");
            return (vec![], complaint(wrong, "name fewer ports"));
        }
        let (mut specs, mut complaints) = (vec![], vec![]);
        let (mut forbidden, mut undialled) = (vec![], vec![]);
        let mut count = 0;
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let parsed = match PortSpec::parse_many(item) {
                Ok(parsed) => parsed,
                Err(error) => {
                    complaints.push((error.to_string(), "fix the label".to_owned()));
                    continue;
                }
            };
            count += parsed.len();
            if count > MAX_PORTS {
                let wrong = format!("it names more than {MAX_PORTS} ports; none of them is allowed");
                return (vec![], complaint(wrong, "name fewer ports"));
            }
            for spec in parsed {
                let suffix = spec.protocol.suffix();
                match spec.target {
                    Target::Port(port) if !self.settings.may_lead_to(port, spec.protocol) => {
                        forbidden.push(format!("{port}{suffix}"));
                    }
                    Target::Port(_) if !self.settings.may_dial(spec.port, spec.protocol) => {
                        undialled.push(format!("{}{suffix}", spec.port));
                    }
                    Target::Port(_) => specs.push(spec),
                    Target::Address(_) | Target::Unix(_) => complaints.push((
                        format!("{spec}: a label can only lead to ports of 127.0.0.1"),
                        "write 5432 or 5432=15432, or allow it on the host with `lbridge allow`".to_owned(),
                    )),
                }
            }
        }
        if count == 0 && complaints.is_empty() {
            complaints.push(("it names no port".to_owned(), "write ports, as 5432,8080=3000".to_owned()));
        }
        forbidden.dedup();
        if !forbidden.is_empty() {
            complaints.push((
                format!("{} not in label_ports of lbridge.toml", named(&forbidden)),
                "add to label_ports what labels may open and run `lbridge reload`, or change the label"
                    .to_owned(),
            ));
        }
        if !undialled.is_empty() {
            complaints.push((
                format!(
                    "containers would dial {}, which is neither in label_ports nor in label_dialled_ports of \
                     lbridge.toml",
                    named(&undialled)
                ),
                "dial the port that the label leads to; or add to label_dialled_ports what labels may have \
                 dialled and run `lbridge reload`"
                    .to_owned(),
            ));
        }
        (specs, complaints)
    }

    /// Takes a rule for an object, unless it contradicts another rule.
    fn want(&mut self, object: &Labelled, network: &DockerNetwork, rule: Rule) -> Result<(), Complaint> {
        let id = rule.id();
        let mend = |text: String| (text, "change the label".to_owned());
        let alone = Rules::default().allow([rule.clone()], Origin::Label);
        alone.map_err(|error| mend(error.for_label().to_string()))?;
        let bridge = network.bridge.clone().unwrap_or_default();
        let place = (bridge, rule.spec.port, rule.spec.protocol);
        if let Some((own, origin)) = self.own.get(&place) {
            if covers(own, &rule, |name| object.is_meant(name)) {
                return Ok(());
            }
            let (by, spelling, remedy) = match origin {
                Origin::Config => ("lbridge.toml", Spelling::File, "change one of them".to_owned()),
                Origin::Cli | Origin::Label => {
                    let remedy = format!("type `lbridge deny {}`, or change the label", own.id());
                    ("lbridge allow", Spelling::Command, remedy)
                }
            };
            return Err((format!("{id} is allowed differently by {by}, as {}", spelling.rule(own)), remedy));
        }
        let full = self.wanted.len() >= MAX_RULES;
        match self.wanted.get_mut(&place) {
            None if full => Err(mend(format!("labels ask for more than {MAX_RULES} rules"))),
            None => {
                self.wanted.insert(place, Wanted { rule, by: object.told() });
                Ok(())
            }
            Some(wanted) if covers(&wanted.rule, &rule, |name| object.is_meant(name)) => Ok(()),
            Some(Wanted { rule: other, .. })
                if !other.options.from.is_empty()
                    && (&other.spec, other.options.source, other.options.localhost)
                        == (&rule.spec, rule.options.source, rule.options.localhost) =>
            {
                other.options.from.extend(rule.options.from);
                Ok(())
            }
            Some(Wanted { rule: other, by }) => Err(mend(format!(
                "{id} is asked for differently by {by}, as {}",
                Spelling::Label.rule(other)
            ))),
        }
    }
}

/// Lists the first ports, and how many more there are.
fn named(ports: &[String]) -> String {
    let named = ports.iter().take(MAX_NAMED_PORTS).map(String::as_str).collect::<Vec<_>>();
    match ports.len() - named.len() {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

/// Returns true if `rule` adds nothing to `other`. The path and the number of connections are up to whoever
/// made `other`.
fn covers(other: &Rule, rule: &Rule, is_meant: impl Fn(&str) -> bool) -> bool {
    let for_all = other.options.from.is_empty();
    let for_it = !rule.options.from.is_empty() && other.options.from.iter().any(|name| is_meant(name));
    (other.spec == rule.spec && other.options.source == rule.options.source)
        && (other.options.localhost || !rule.options.localhost)
        && (for_all || for_it)
}

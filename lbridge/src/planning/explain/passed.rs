//! Passed: a relay, or whatever listens on the dialled address, takes a connection that the kernel program
//! leaves alone.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::{
    Answer, End, Explainer, Fate, Stage, Trace,
    render::{addresses, step, taken_back},
};
use crate::planning::{
    desired::{BindScope, Clients, Outcome, RelayKey, RelaySpec, RuleOutcome, Service, State},
    inventory::{Interface, Listener},
    reason::Reason,
    rule::Protocol,
};

impl Explainer<'_> {
    /// Follows a connection that the kernel treats as if lbridge were not there: to a relay, to whatever
    /// listens on the gateway, or nowhere.
    pub(super) fn beyond(&self, way: &mut Trace, bridge: &Interface) -> End {
        let place = BindScope::Bridge { interface: bridge.name.clone(), ifindex: bridge.index };
        let key = RelayKey { address: way.dialled, place };
        // A relay of that port is TCP's.
        if self.question.protocol == Protocol::Tcp {
            match self.known.actual.relays.get(&key) {
                Some(spec) if !spec.by_entry => return self.relay(way, spec),
                // Only the entry leads to it.
                Some(_) => {}
                None => self.no_relay(way, &key),
            }
        }
        let who = answering(self.known.inventory.sockets(self.question.protocol), way.dialled, bridge.index);
        self.host(way, who)
    }

    /// Follows a connection that the kernel's entry leads to a relay.
    pub(super) fn by_relay(&self, way: &mut Trace, bridge: &Interface) -> End {
        let place = BindScope::Bridge { interface: bridge.name.clone(), ifindex: bridge.index };
        let key = RelayKey { address: way.dialled, place };
        let actual = self.known.actual;
        let reached = key.entry().is_some_and(|entry| actual.relay_sockets.contains(&entry));
        if let Some(spec) = actual.relays.get(&key).filter(|_| reached) {
            return self.relay(way, spec);
        }
        self.no_relay(way, &key);
        let remedy = "`lbridge status` makes the daemon look again".to_owned();
        self.end(way, Fate::Refused, "the relay's socket is not registered", remedy)
    }

    /// Ends a connection that the kernel program refuses: only sources that the rule admits may get through.
    pub(super) fn unadmitted(&self, way: &mut Trace) -> End {
        let outcome = self.meant(way).filter(|it| matches!(it.state, State::Waiting | State::Blocked));
        let why = outcome.and_then(Outcome::why);
        let why = why.unwrap_or_else(|| match self.rule() {
            Some(meant) if !meant.rule.options.from.is_empty() => {
                "the rule is for other containers".to_owned()
            }
            _ => "the rule does not admit them".to_owned(),
        });
        let remedy = if self.rule().is_some() { self.unserved(way) } else { self.whom() };
        self.end(way, Fate::Refused, &why, remedy)
    }

    /// Adds a step about a relay that a rule asks for and that is not there, or that is about to go.
    pub(super) fn no_relay(&self, way: &mut Trace, key: &RelayKey) {
        let text = if self.known.desired.relays.contains_key(key) {
            let why =
                self.known.relay_failures.get(key).map_or("the daemon's next pass opens it", String::as_str);
            format!("the rule asks for a relay on {}, which is not open: {why}", way.dialled)
        } else if self.known.actual.lingering.contains(key) {
            "a relay only completes handshakes that began before the kernel took over".to_owned()
        } else {
            return;
        };
        way.steps.push(step(Stage::Relay, Answer::No, text));
    }

    pub(super) fn relay(&self, way: &mut Trace, spec: &RelaySpec) -> End {
        let reason = self.meant(way).and_then(Outcome::why);
        let reason = reason.map_or_else(String::new, |why| format!(" ({why})"));
        let service = match &spec.service {
            Service::Tcp(address) => address.to_string(),
            Service::Unix(path) => format!("unix:{}", path.display()),
        };
        let open =
            format!("the relay of {} is open on {}, {}{reason}", spec.rule, way.dialled, way.interface);
        let container = match &spec.clients {
            Clients::Subnet(subnet) if !subnet.contains(way.source) || way.source == way.dialled.ip() => {
                let text = format!("{open}; {} is none of its network's containers: reset", way.source);
                way.steps.push(step(Stage::Relay, Answer::No, text));
                let remedy = self.whom();
                return self.end(way, Fate::Refused, "the relay resets them", remedy);
            }
            Clients::Listed(listed) if !listed.contains(&way.source) => {
                let text = format!("{open}; it is for {}, not for {}: reset", addresses(listed), way.source);
                way.steps.push(step(Stage::Relay, Answer::No, text));
                let remedy = self.whom();
                return self.end(way, Fate::Refused, "the relay resets them", remedy);
            }
            Clients::Subnet(_) | Clients::Listed(_) => way.source,
            Clients::Inside(told) => *told,
        };
        way.steps.push(step(Stage::Relay, Answer::Yes, format!("{open}: connects to {service}")));
        way.steps.push(self.relayed_peer(spec, container));
        let remedy = self.rule().map_or_else(|| "the daemon's next pass closes it".to_owned(), taken_back);
        self.end(way, Fate::Relayed, &format!("{service}{reason}"), remedy)
    }

    /// Ends a connection at whatever listens on the dialled address itself, whether there is a rule or not.
    pub(super) fn host(&self, way: &mut Trace, who: Option<&Listener>) -> End {
        let id = self.id();
        if let Some(listener) = who {
            let named = self.named(listener);
            let text =
                format!("{named} listens on {} and answers, as if lbridge were not there", listener.address);
            way.steps.push(step(Stage::Host, Answer::Yes, text));
            let remedy = match self.rule() {
                None => format!(
                    "`lbridge allow {id}` would lead them to the loopback service of that port; a service \
                     that is bound to a loopback address is out of their reach"
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
        let why = why.and_then(Outcome::why);
        let listed = |meant: &RuleOutcome| !meant.rule.options.from.is_empty();
        let why = why.unwrap_or_else(|| match self.rule() {
            Some(meant) if listed(meant) => "the rule is for other containers".to_owned(),
            _ => "neither entry nor relay has it".to_owned(),
        });
        let remedy = self.unserved(way);
        self.end(way, Fate::Refused, &why, remedy)
    }

    /// Returns what to do if a rule does not serve the connection.
    fn unserved(&self, way: &Trace) -> String {
        let Some(meant) = self.rule() else { return String::new() };
        let outcome = self.meant(way);
        // If none of the listed containers is served, the service is not what is missing.
        let services = || {
            let first = outcome.and_then(|outcome| outcome.reasons.first());
            first.is_none_or(|reason| matches!(reason, Reason::NothingListens(_)))
        };
        match outcome.map(|outcome| outcome.state) {
            Some(State::Waiting) if !meant.rule.options.from.is_empty() && !services() => self.whom(),
            Some(State::Waiting) => format!("start the service on {}", meant.rule.spec.target),
            Some(State::Blocked) => {
                "`lbridge status` says the same; the reason says what to change".to_owned()
            }
            // It serves others.
            Some(State::Steered) => self.whom(),
            Some(State::Relayed) | None => "`lbridge status` makes the daemon look again".to_owned(),
        }
    }

    /// Returns, in words, who is served if others are not.
    fn whom(&self) -> String {
        let from = self.rule().map(|meant| &meant.rule.options.from).filter(|from| !from.is_empty());
        let Some(from) = from else { return "only the network's own containers are served".to_owned() };
        let names: Vec<_> = from.iter().map(String::as_str).collect();
        format!("only {} of the network's containers may use it, as --from says", names.join(", "))
    }
}

/// Returns the listener that the kernel itself picks for `dialled`, coming in on that interface: one that is
/// bound to the address before one that is bound to all, one that is bound to the interface before one that
/// is not (compute_score() in net/ipv4/inet_hashtables.c).
pub(super) fn answering(listeners: &[Listener], dialled: SocketAddr, interface: u32) -> Option<&Listener> {
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

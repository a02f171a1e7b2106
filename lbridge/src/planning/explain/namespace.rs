//! Namespace: localhost, dialled from inside a network namespace.

use std::net::{IpAddr, SocketAddr};

use super::{
    Answer, End, Explainer, Fate, Known, Stage, Step, Trace, Traces, passed::answering, render::step,
};
use crate::planning::{
    desired::{BindScope, RelayKey, RuleOutcome, State},
    hooks::HookSet,
    inventory::{Attachment, Namespace, NetnsUnavailable, find_networks},
    rule::{Network, Protocol},
};

impl Explainer<'_> {
    pub(super) fn namespace(&self) -> (Step, Traces) {
        let network = &self.question.network;
        let without = |why: &str, remedy: String| {
            let sentence = format!("nothing in {network} can dial its localhost through lbridge: {why}");
            (step(Stage::Network, Answer::No, why.to_owned()), Err(End { sentence, remedy }))
        };
        let namespace = match self.known.inventory.namespaces.get(network) {
            None => return without("there is no such process", "name one that runs".to_owned()),
            Some(Err(NetnsUnavailable::NotThere(why))) => {
                let remedy = format!("`lbridge allow {}` waits for it", self.id());
                return without(why, remedy);
            }
            Some(Err(NetnsUnavailable::Unsuitable(why))) => {
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

    fn inside(&self, namespace: &Namespace, ip: IpAddr) -> (Trace, End) {
        let dialled = SocketAddr::new(ip, self.question.port);
        let text = format!("{dialled} is dialled inside, over lo; the host's firewall is not on the way");
        let mut way = Trace {
            dialled,
            interface: "lo".to_owned(),
            source: ip,
            steps: vec![step(Stage::Arrival, Answer::Note, text)],
            fate: Fate::Refused,
        };
        let place = BindScope::Namespace(namespace.key.clone());
        let key = RelayKey { address: dialled, place };
        let is_there = |open: &&RelayKey| {
            open.address == dialled
                && matches!(&open.place, BindScope::Namespace(there) if there.id == namespace.key.id)
        };
        let end = if let Some((_, spec)) = self.known.actual.relays.iter().find(|(open, _)| is_there(open)) {
            self.relay(&mut way, spec)
        } else if let Some(end) = self.led_to_gateway(&mut way) {
            end
        } else {
            self.no_relay(&mut way, &key);
            self.host(&mut way, answering(self.known.inside, dialled, 1))
        };
        (way, end)
    }

    /// Follows a container's localhost to the gateway that a rule of one of its networks leads it to; `None`
    /// if somebody inside listens there, or no rule leads it.
    fn led_to_gateway(&self, way: &mut Trace) -> Option<End> {
        let Known { desired, actual, inventory, inside, .. } = self.known;
        let Network::Container(name) = &self.question.network else { return None };
        let container = inventory.containers.get(name)?.as_ref().ok()?;
        let dialled = way.dialled;
        if self.question.protocol != Protocol::Tcp || answering(inside, dialled, 1).is_some() {
            return None;
        }
        let is_on = |meant: &&RuleOutcome| {
            let Network::Docker(network) = &meant.rule.network else { return false };
            let networks = find_networks(&inventory.docker_networks, network);
            let is_for_it = meant.rule.options.from.is_empty() || meant.rule.options.from.contains(name);
            let is_on = |there: &Attachment| networks.iter().any(|network| there.is_on(network));
            is_for_it && container.attachments.iter().any(is_on)
        };
        let leads = |meant: &RuleOutcome| {
            let dial = meant.redirects.iter().find(|dial| dial.address == dialled)?;
            let gateway = dial.gateway.filter(|_| actual.kernel.hooks[HookSet::Connect])?;
            let there = dial.keys.iter().any(|key| actual.kernel.redirects.contains_key(key));
            let outcome = meant.gateways.iter().find(|it| it.relay_key.address.ip() == gateway)?;
            there.then_some((gateway, outcome.outcome.state))
        };
        let (meant, (gateway, state)) =
            desired.outcomes.iter().filter(is_on).find_map(|meant| Some((meant, leads(meant)?)))?;
        let (rule, to) = (meant.rule.id(), SocketAddr::new(gateway, dialled.port()));
        let text = format!("connect() leads to {to}, by the rule {rule} --localhost: nobody listens inside");
        way.steps.push(step(Stage::Localhost, Answer::Yes, text));
        way.fate = match state {
            State::Steered => Fate::Steered,
            State::Relayed => Fate::Relayed,
            State::Waiting | State::Blocked => Fate::Refused,
        };
        Some(End {
            sentence: format!("connections from inside to {dialled} are led to {to}"),
            remedy: format!("`lbridge explain {rule}` says what becomes of them there"),
        })
    }
}

//! From inside a network namespace: localhost is dialled there.

use std::net::{IpAddr, SocketAddr};

use super::{Answer, End, Explainer, Fate, Stage, Step, Way, Ways, beyond::answering, words::step};
use crate::planning::{
    inventory::{Absence, Namespace},
    policy::{Place, RelayKey},
};

impl Explainer<'_> {
    pub(super) fn namespace(&self) -> (Step, Ways) {
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

//! Kernel: the entry that the kernel program finds in its maps, and the listener that it assigns.

use std::net::{IpAddr, SocketAddr};

use lbridge_common::{
    verdict::{first_candidate, listening_addresses},
    wire::{Address, Entry, EntryKey, ListenerKey},
};

use super::{
    Answer, End, Explainer, Fate, Known, Stage, Step, Trace,
    render::{key_address, step, subnet, taken_back, target},
};
use crate::planning::{
    desired::Outcome,
    inventory::{Interface, Listener},
};

impl Explainer<'_> {
    /// Adds a step about the kernel program's lookup, and returns the entry that it finds.
    pub(super) fn lookup(&self, way: &mut Trace, bridge: &Interface) -> Option<&Entry> {
        let Known { features, actual, desired, .. } = self.known;
        let mut no = |text| way.steps.push(step(Stage::Lookup, Answer::No, text));
        let steering = match &features.steer {
            Ok(steering) => steering,
            Err(why) => {
                no(format!("the kernel does not steer: {why}"));
                return None;
            }
        };
        if actual.detached {
            no("the kernel programs are detached; `lbridge status` has the daemon attach them again"
                .to_owned());
            return None;
        }
        let ifindex = if steering.interface_check { bridge.index } else { 0 };
        let key = EntryKey {
            gateway: way.dialled.ip().into(),
            ifindex,
            port: way.dialled.port(),
            protocol: self.question.protocol.number().into(),
        };
        let interface = if steering.interface_check { &bridge.name } else { "any interface" };
        let (port, suffix) = (way.dialled.port(), self.question.protocol.suffix());
        let asked = format!("({interface}, {}, {port}{suffix})", way.dialled.ip());
        let Some(entry) = actual.kernel.entries.get(&key) else {
            let missing = if desired.kernel.entries.contains_key(&key) {
                let why = self
                    .known
                    .entry_failures
                    .get(&key)
                    .map_or("the daemon's next pass adds it", String::as_str);
                format!(", which the rule asks for: {why}")
            } else {
                String::new()
            };
            no(format!("map ENTRIES has nothing for {asked}{missing}"));
            return None;
        };
        if entry.key != key {
            no(format!("the value in map ENTRIES for {asked} belongs to another key: left alone"));
            return None;
        }
        let wanted = match desired.kernel.entries.get(&key) {
            Some(wanted) if wanted == entry => String::new(),
            Some(wanted) => {
                format!("; the rule asks for {}: the daemon's next pass changes it", leads_to(wanted))
            }
            None => "; no rule asks for it, so somebody else has added it: the daemon's next pass removes it"
                .to_owned(),
        };
        let steered = actual.steered.get(&key).copied().unwrap_or_default();
        let so_far = if entry.has(Entry::RELAYED) { String::new() } else { format!(", {steered} so far") };
        let text =
            format!("map ENTRIES has {asked}: from {} to {}{so_far}{wanted}", subnet(entry), leads_to(entry));
        way.steps.push(step(Stage::Lookup, Answer::Yes, text));
        Some(entry)
    }

    /// Adds a step about the listener that the kernel program assigns, and returns the end.
    pub(super) fn listener(&self, way: &mut Trace, entry: &Entry) -> End {
        let taken = |key: &ListenerKey| {
            self.known.actual.registered.contains(key) && self.is_of_family(key, way.dialled.ip())
        };
        let found = first_candidate(&entry.target, entry.target_port, entry.protocol(), |key| {
            taken(&key).then_some(key)
        });
        let details: Vec<_> =
            listening_addresses(&entry.target).map(|address| self.candidate(address, entry)).collect();
        let Some(key) = found else {
            let text = "no listener that the kernel could use is registered: refused".to_owned();
            way.steps.push(Step { stage: Stage::Listener, verdict: Answer::No, text, details });
            let mut bound =
                listening_addresses(&entry.target).map(|address| key_address(address, entry.target_port));
            let (why, remedy) = if entry.target_port == 0 {
                let why = self.meant(way).and_then(Outcome::why);
                let why = why.unwrap_or_else(|| "the entry leads to no service".to_owned());
                (why, "`lbridge status` says the same; the reason says what to change".to_owned())
            } else if bound.any(|bound| self.at(bound).next().is_some()) {
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
        let text = format!(
            "{bound}, registered under slot {}: {who} gets {}",
            key.slot,
            self.question.protocol.what()
        );
        way.steps.push(Step { stage: Stage::Listener, verdict: Answer::Yes, text, details });
        way.steps.push(self.steered_peer(way));
        let remedy = match self.rule() {
            Some(meant) => taken_back(meant),
            None => "no rule asks for it: `lbridge status` makes the daemon look, and remove it".to_owned(),
        };
        self.end(way, Fate::Steered, &format!("{who} on {bound}"), remedy)
    }

    /// Returns true if the listener can serve the dialled family. The kernel gives a connection only to a
    /// listener of its family; `[::]` may serve both.
    fn is_of_family(&self, key: &ListenerKey, dialled: IpAddr) -> bool {
        if key.address.is_v4() == dialled.is_ipv4() {
            return true;
        }
        let mut listeners = self.at(key_address(key.address, key.port)).peekable();
        // The socket may be newer than the list of them.
        key.address == Address::ANY_V6 && (listeners.peek().is_none() || listeners.any(|l| !l.single_family))
    }

    fn candidate(&self, address: Address, entry: &Entry) -> String {
        let bound = key_address(address, entry.target_port);
        let of_address = |key: &&ListenerKey| {
            (key.address, key.port, key.protocol) == (address, entry.target_port, entry.protocol())
        };
        let registered = self.known.actual.registered.iter().filter(of_address).count();
        let there: Vec<_> = self.at(bound).map(|listener| self.named(listener)).collect();
        match (registered, there.is_empty()) {
            (0, true) => format!("{bound}: nothing listens"),
            (0, false) => format!("{bound}: {}, not registered", there.join(", ")),
            (_, true) => format!("{bound}: registered"),
            (_, false) => format!("{bound}: {}, registered", there.join(", ")),
        }
    }

    /// Returns the host's listeners that are bound to that address, and to no interface.
    fn at(&self, bound: SocketAddr) -> impl Iterator<Item = &Listener> {
        self.known
            .inventory
            .sockets(self.question.protocol)
            .iter()
            .filter(move |l| l.address == bound && l.bound_interface == 0)
    }
}

/// Returns in words where an entry leads.
fn leads_to(entry: &Entry) -> String {
    if entry.has(Entry::RELAYED) {
        "the relay".to_owned()
    } else if entry.target_port == 0 {
        "nobody".to_owned()
    } else {
        target(entry).to_string()
    }
}

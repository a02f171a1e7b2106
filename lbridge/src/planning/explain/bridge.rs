//! Bridge: the network, and the path of a SYN or a datagram to each gateway, up to the kernel program.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lbridge_common::{
    verdict::{Lookups, Verdict, decide},
    wire::{AcceptedKey, Address, Endpoint, Entry, EntryKey, SourceKey},
};

use super::{
    Answer, End, Explainer, Fate, Stage, Step, Trace, Traces,
    render::{addresses, described, step, subnet},
};
use crate::planning::{
    actual::Actual,
    desired::{BindScope, Clients, RelayKey, RelaySpec, State},
    firewall::{Opening, ProbeResult},
    inventory::{EngineAvailability, Interface, find_networks},
    resolve::bridge_of,
    rule::{Network, Protocol},
};

impl Explainer<'_> {
    pub(super) fn bridge(&self) -> (Step, Traces) {
        let network = &self.question.network;
        let docker = match network {
            Network::Docker(name) => find_networks(&self.known.inventory.docker_networks, name),
            _ => vec![],
        };
        let bridge = match bridge_of(network, self.known.inventory, self.known.features) {
            Ok(bridge) => bridge,
            Err(outcome) => {
                let why = outcome.why().unwrap_or_default();
                let text = match docker[..] {
                    [network] => format!("{}; {why}", described(network)),
                    _ => why.clone(),
                };
                let end = End {
                    sentence: format!(
                        "no container of {network} can dial port {}: {why}",
                        self.question.port
                    ),
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
            (Network::Docker(_), EngineAvailability::Away) => "; as last seen: the engine does not answer",
            _ => "",
        };
        if addresses.is_empty() {
            let text = format!("{what}, which has no address that a container could dial{away}");
            let end = End {
                sentence: format!(
                    "no container of {network} can dial port {}: no gateway",
                    self.question.port
                ),
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
        let mut ways: Vec<_> = gateways.map(|own| self.to_gateway(&bridge, own.0, *own)).collect();
        for ip in self.aliases(&bridge).filter(fits) {
            // The source is from the bridge's subnet of that family: without one, a rule has no such alias.
            let own = bridge.addresses.iter().find(|(own, _)| own.is_ipv4() == ip.is_ipv4());
            ways.extend(own.map(|own| self.to_gateway(&bridge, ip, *own)));
        }
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
                "name another network; `docker network ls` (or `podman network ls`) and `ip link show type \
                 bridge` show them"
                    .to_owned()
            }
            (Network::Docker(name), _) if self.rule().is_some() => {
                format!(
                    "`docker network create {name}` (or podman): the rule exists, and takes effect with the \
                     network"
                )
            }
            (Network::Docker(_), _) => {
                format!(
                    "`docker network ls` (or `podman network ls`) shows the networks; `lbridge allow {id}` \
                     would wait for this one"
                )
            }
            _ => format!(
                "`ip link show type bridge` shows the bridges; `lbridge allow {id}` would wait for this one"
            ),
        }
    }

    /// Returns the other addresses of the host that the rule's containers may dial.
    fn aliases(&self, bridge: &Interface) -> impl Iterator<Item = IpAddr> {
        let index = bridge.index;
        let gateways = self.rule().into_iter().flat_map(|meant| &meant.gateways);
        let here =
            move |place: &BindScope| matches!(place, BindScope::Bridge { ifindex, .. } if *ifindex == index);
        let aliases =
            gateways.filter(move |gateway| gateway.alias.is_some() && here(&gateway.relay_key.place));
        aliases.map(|gateway| gateway.relay_key.address.ip())
    }

    /// Follows a SYN, or a datagram, all the way to a gateway or to another address of the host. `own` is the
    /// bridge's address, with the length of its prefix in bits.
    fn to_gateway(&self, bridge: &Interface, gateway: IpAddr, own: (IpAddr, u8)) -> (Trace, End) {
        let dialled = SocketAddr::new(gateway, self.question.port);
        let source = self.question.source.or_else(|| self.listed(bridge, dialled).into_iter().next());
        let source = source.unwrap_or_else(|| neighbour(own.0, own.1));
        let mut way = Trace {
            dialled,
            interface: bridge.name.clone(),
            source,
            steps: vec![self.arrival(bridge, source, dialled)],
            fate: Fate::Refused,
        };
        if let Some(end) = self.firewall(&mut way, own) {
            return (way, end);
        }
        let entry = self.lookup(&mut way, bridge);
        let end = self.verdict(&mut way, bridge, entry);
        (way, end)
    }

    /// Follows the packet by the kernel program's verdict, given its entry.
    fn verdict(&self, way: &mut Trace, bridge: &Interface, entry: Option<&Entry>) -> End {
        let source = way.source;
        let dialled = Endpoint::new(way.dialled.ip().into(), way.dialled.port());
        let protocol = self.question.protocol;
        let maps = Maps { actual: self.known.actual, entry, source: source.into(), dialled, protocol };
        let verdict = decide(entry, &source.into(), &dialled, protocol.number(), &maps);
        let mut by_source = |answer, text| way.steps.push(step(Stage::Source, answer, text));
        match (verdict, entry) {
            (Verdict::Steer | Verdict::Relay, Some(entry)) => {
                let listed =
                    if entry.has(Entry::LISTED) { ", and one of those that the rule is for" } else { "" };
                by_source(Answer::Yes, format!("{source} is in {}{listed}", subnet(entry)));
                if verdict == Verdict::Relay { self.by_relay(way, bridge) } else { self.listener(way, entry) }
            }
            (Verdict::NotListed, Some(entry)) => {
                by_source(
                    Answer::No,
                    format!("{}: left alone, and counted", self.not_admitted(source, bridge, entry)),
                );
                self.beyond(way, bridge)
            }
            (Verdict::Denied, entry) => {
                let why = entry.map_or_else(
                    || format!("no entry admits {source}"),
                    |entry| self.not_admitted(source, bridge, entry),
                );
                by_source(
                    Answer::No,
                    format!("{why}: refused, since lbridge's accept rule lets it through the firewall"),
                );
                self.unadmitted(way)
            }
            (Verdict::ForeignSource, Some(entry)) => {
                by_source(
                    Answer::No,
                    format!("{source} is not in {}: left alone, and counted", subnet(entry)),
                );
                self.beyond(way, bridge)
            }
            (Verdict::LooksLocal, _) => {
                let text = format!(
                    "{source} is not served here, and would look local to the service (--source loopback): \
                     refused"
                );
                by_source(Answer::No, text);
                self.unadmitted(way)
            }
            (Verdict::NotOurs, Some(_)) => {
                let text = format!("{source} is the gateway's own address, so the host itself: left alone");
                by_source(Answer::No, text);
                self.beyond(way, bridge)
            }
            // Nobody asks about the daemon's own probes, and without an entry no other verdict is left.
            (Verdict::Probe, _) | (_, None) => self.beyond(way, bridge),
        }
    }

    /// Explains in words why an entry does not admit a source.
    fn not_admitted(&self, source: IpAddr, bridge: &Interface, entry: &Entry) -> String {
        if Address::from(source).masked(&entry.mask) != entry.subnet {
            return format!("{source} is not in {}", subnet(entry));
        }
        if Address::from(source).is_broadcast(&entry.mask) {
            return format!("{source} is the broadcast address of {}", subnet(entry));
        }
        let dialled = SocketAddr::new(entry.key.gateway.into(), entry.key.port);
        format!("the rule is for {}, not for {source}", addresses(&self.listed(bridge, dialled)))
    }

    /// Returns the addresses that the entry or relay there is for; empty if it is for all.
    fn listed(&self, bridge: &Interface, dialled: SocketAddr) -> BTreeSet<IpAddr> {
        let actual = self.known.actual;
        let place = BindScope::Bridge { interface: bridge.name.clone(), ifindex: bridge.index };
        if self.question.protocol == Protocol::Tcp
            && let Some(RelaySpec { clients: Clients::Listed(listed), .. }) =
                actual.relays.get(&RelayKey { address: dialled, place })
        {
            return listed.clone();
        }
        let here = |key: &EntryKey| {
            let protocol = self.question.protocol.number().into();
            (key.gateway, key.port, key.protocol) == (dialled.ip().into(), dialled.port(), protocol)
                && [0, bridge.index].contains(&key.ifindex)
        };
        let listed = actual.kernel.sources.iter().filter(|key| here(&key.entry));
        listed.map(|key| key.source.into()).collect()
    }

    /// Describes the packet's arrival, before anything of the host has seen it.
    fn arrival(&self, bridge: &Interface, source: IpAddr, dialled: SocketAddr) -> Step {
        let text = format!("{} from {source} to {dialled} comes in on {}", self.packet(), bridge.name);
        step(Stage::Arrival, Answer::Note, text)
    }

    fn packet(&self) -> &'static str {
        match self.question.protocol {
            Protocol::Tcp => "a SYN",
            Protocol::Udp => "a datagram",
        }
    }

    /// Returns the word for how lbridge knows that a packet arrives.
    fn arrived(&self) -> &'static str {
        match self.question.protocol {
            Protocol::Tcp => "answered",
            Protocol::Udp => "counted",
        }
    }

    /// Adds a step about what was tried of the firewall. Returns an end if nothing comes through.
    fn firewall(&self, way: &mut Trace, own: (IpAddr, u8)) -> Option<End> {
        let (protocol, dialled) = (self.question.protocol, way.dialled);
        let opening = Opening::new(&way.interface, own, dialled.ip(), protocol, dialled.port());
        let firewall_state = &self.known.actual.firewall_state;
        let (verdict, text) = match firewall_state.probe_results.get(&opening) {
            Some(ProbeResult::Open) => {
                let accepts = firewall_state.accepts.keys().find(|(_, accepted)| *accepted == opening);
                let by =
                    accepts.map_or_else(String::new, |(chain, _)| format!(", by lbridge's rule in {chain}"));
                (
                    Answer::Yes,
                    format!("the firewall lets it in{by}: {} was sent and {}", self.packet(), self.arrived()),
                )
            }
            Some(ProbeResult::Dropped) => {
                let why = firewall_state.why_dropped(&opening);
                way.steps.push(step(
                    Stage::Firewall,
                    Answer::No,
                    format!("{} was sent and not {}: {why}", self.packet(), self.arrived()),
                ));
                let remedy = match self.rule() {
                    Some(_) => why,
                    None => format!("`lbridge allow {}` lets it through, and opens the port", self.id()),
                };
                return Some(self.end(way, Fate::Dropped, "a firewall drops them", remedy));
            }
            Some(ProbeResult::Unknown(why)) => {
                (Answer::Note, format!("could not test if a firewall drops it: {why}"))
            }
            None => (Answer::Note, "not tested if a firewall drops it".to_owned()),
        };
        way.steps.push(step(Stage::Firewall, verdict, text));
        None
    }
}

/// The maps as they were read, with their answers about one packet.
struct Maps<'a> {
    actual: &'a Actual,
    entry: Option<&'a Entry>,
    source: Address,
    dialled: Endpoint,
    protocol: Protocol,
}

impl Lookups for Maps<'_> {
    fn is_probe(&self) -> bool {
        false
    }

    fn is_listed(&self) -> bool {
        let key = |entry: &Entry| SourceKey { entry: entry.key, source: self.source };
        self.entry.is_some_and(|entry| self.actual.kernel.sources.contains(&key(entry)))
    }

    fn is_accepted(&self) -> bool {
        let Endpoint { address: gateway, port, .. } = self.dialled;
        let packet =
            AcceptedKey { gateway, port, protocol: self.protocol.number().into(), source: self.source };
        self.actual.accepted.iter().any(|(key, bits)| key.matches(*bits, &packet))
    }

    fn looks_local(&self) -> bool {
        let mut views = self.actual.kernel.overrides.keys();
        views.any(|(key, bits)| key.matches(*bits, &self.dialled, &self.source))
    }
}

/// Returns another address of the gateway's subnet.
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

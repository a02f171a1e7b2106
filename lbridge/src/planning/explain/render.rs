//! Render: the names of ends, of listeners and their processes, and of what a service sees as its peer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lbridge_common::wire::{Address, Endpoint, Entry, OverrideKey};

use super::{Answer, End, Explainer, Fate, Stage, Step, Trace};
use crate::planning::{
    desired::{RelaySpec, RuleOutcome, Service, stand_in_for_container},
    hooks::HookSet,
    inventory::{DockerNetwork, Listener, ListenerKind},
    rule::{Origin, Protocol, Source},
};

/// Number of digits that Docker prints of an id.
const SHORT_ID: usize = 12;

impl Explainer<'_> {
    pub(super) fn end(&self, way: &mut Trace, fate: Fate, what: &str, remedy: String) -> End {
        way.fate = fate;
        let these = match self.question.protocol {
            Protocol::Tcp => "connections",
            Protocol::Udp => "datagrams",
        };
        let whose = format!("{these} from {} to {}", self.question.network, way.dialled);
        let sentence = match fate {
            Fate::Steered => format!("{whose} are steered to {what}"),
            Fate::Relayed => format!("{whose} are relayed to {what}"),
            Fate::Refused => format!("{whose} are refused: {what}"),
            Fate::Dropped => format!("{whose} time out: {what}"),
            Fate::Passed => format!("{whose} reach {what}, not by lbridge"),
        };
        End { sentence, remedy }
    }

    pub(super) fn holder(&self, listener: &Listener) -> Option<String> {
        self.known.holders.get(&listener.inode).cloned()
    }

    pub(super) fn named(&self, listener: &Listener) -> String {
        let who = self.holder(listener).unwrap_or_else(|| "a service".to_owned());
        let v6_only = listener.single_family && listener.address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED);
        match listener.kind {
            ListenerKind::Tcp if v6_only => format!("{who} (IPv6 only)"),
            ListenerKind::Tcp | ListenerKind::Udp => who,
            ListenerKind::Mptcp => format!("{who} (MPTCP)"),
            ListenerKind::NoRoom => format!("{who} (no room in the kernel's map)"),
            ListenerKind::Refused(errno) => format!("{who} (refused by the kernel, error {errno})"),
        }
    }

    pub(super) fn steered_peer(&self, way: &Trace) -> Step {
        let actual = self.known.actual;
        let gateway = Endpoint::new(way.dialled.ip().into(), way.dialled.port());
        // As the kernel's longest-prefix match has it; a gateway's subnets do not overlap.
        let found =
            |((key, bits), _): &(&(OverrideKey, u32), _)| key.matches(*bits, &gateway, &way.source.into());
        let view = actual.kernel.overrides.iter().filter(found);
        let view = view.max_by_key(|((_, bits), _)| *bits).map(|(_, view)| view);
        let text = match view.filter(|_| actual.kernel.hooks[HookSet::Names]) {
            Some(view) => format!(
                "the service sees {} as its peer, which it may trust, and itself as {}",
                IpAddr::from(view.target.address),
                key_address(view.target.address, view.target.port)
            ),
            None => format!("the service sees {} as its peer, and itself as {}", way.source, way.dialled),
        };
        step(Stage::Peer, Answer::Note, text)
    }

    pub(super) fn relayed_peer(&self, spec: &RelaySpec, container: IpAddr) -> Step {
        let text = match (&spec.service, spec.source) {
            (Service::Unix(_), _) => "the service sees root as its peer".to_owned(),
            (Service::Tcp(address), Source::Loopback) => {
                format!("the service sees {} as its peer, which it may trust", loopback(address.ip()))
            }
            (Service::Tcp(address), Source::Container) => {
                // An IPv4 socket cannot be shown an IPv6 peer.
                let nameable = container.is_ipv4() || address.is_ipv6();
                let stands_in = stand_in_for_container(container);
                if self.known.actual.kernel.hooks[HookSet::Names]
                    && nameable
                    && IpAddr::from(stands_in) != container
                {
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
}

pub(super) fn step(stage: Stage, verdict: Answer, text: String) -> Step {
    Step { stage, verdict, text, details: vec![] }
}

pub(super) fn described(network: &DockerNetwork) -> String {
    let id = network.id.get(..SHORT_ID).unwrap_or(&network.id);
    format!("network {} ({id}, driver {})", network.name, network.driver)
}

pub(super) fn taken_back(meant: &RuleOutcome) -> String {
    match meant.origin {
        Origin::Cli => format!("`lbridge deny {}` takes it back", meant.rule.id()),
        Origin::Config => "the rule is the configuration file's; change it there".to_owned(),
        Origin::Label => {
            "the rule is a label's of a container or a network; recreate that without it".to_owned()
        }
    }
}

pub(super) fn subnet(entry: &Entry) -> String {
    let ones: u32 = entry.mask.0.iter().map(|word| word.count_ones()).sum();
    let prefix = if entry.subnet.is_v4() { ones.saturating_sub(96) } else { ones };
    format!("{}/{prefix}", IpAddr::from(entry.subnet))
}

pub(super) fn target(entry: &Entry) -> SocketAddr {
    key_address(entry.target, entry.target_port)
}

pub(super) fn key_address(address: Address, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

fn loopback(family: IpAddr) -> IpAddr {
    if family.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

/// Lists the addresses of the containers that a rule is for.
pub(super) fn addresses<'a>(listed: impl IntoIterator<Item = &'a IpAddr>) -> String {
    let listed: Vec<_> = listed.into_iter().map(ToString::to_string).collect();
    if listed.is_empty() { "no container".to_owned() } else { listed.join(", ") }
}

//! How what is dialled at one address can be served: by the kernel, by a relay, or not.

use std::{
    collections::btree_map::Entry,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use lbridge_common::{
    verdict::listening_addresses,
    wire::{Address, Endpoint},
};

use super::{Claim, Resolver};
use crate::planning::{
    inventory::{Listener, ListenerKind},
    policy::{Outcome, Service, State},
    rule::{PathChoice, Protocol, Rule, Source, Target},
};

/// How a connection to one gateway can be served.
pub(super) enum Way {
    /// By the kernel, given this listener; or by nobody yet, with everything in place for a service that starts.
    Kernel(Endpoint, Outcome),
    /// By the daemon.
    Relay(Service, String),
    /// Not at all.
    None(Outcome),
}

/// A loopback service that was found.
struct Found {
    /// Where it can be connected to.
    at: SocketAddr,
    /// Why the kernel cannot be given its listener, if it cannot.
    obstacle: Option<String>,
}

const MPTCP: &str =
    "the service listens with MPTCP; GODEBUG=multipathtcp=0 in a Go service's environment gets it steered";

impl Resolver<'_> {
    /// How connections to an address can be served, if no rule before this one has it.
    pub(super) fn way(&mut self, rule: &Rule, dialled: SocketAddr, claim: Claim, place: &str) -> Way {
        match self.claimed.entry((dialled, rule.spec.protocol, claim)) {
            Entry::Occupied(first) => {
                let why = format!("rule {} has {dialled}{place} already; deny one of them", first.get());
                return Way::None(Outcome::because(State::Blocked, why));
            }
            Entry::Vacant(free) => free.insert(rule.id()),
        };
        self.way_to_service(rule, dialled.ip())
    }

    fn way_to_service(&self, rule: &Rule, gateway: IpAddr) -> Way {
        let target = match &rule.spec.target {
            Target::Unix(path) => return self.unix_way(rule, path),
            Target::Port(port) => SocketAddr::new(loopback(gateway.is_ipv4()), *port),
            Target::Address(address) => *address,
        };
        // The kernel gives a connection only to a listener of its family.
        let same_family = target.is_ipv4() == gateway.is_ipv4();
        let (service, obstacle) = match self.find(rule, target, gateway) {
            Some(found) => (Some(found.at), self.obstacle(rule).or(found.obstacle)),
            None => (None, self.obstacle(rule)),
        };
        let entry = Endpoint::new(target.ip().into(), target.port());
        let waiting = || Outcome::because(State::Waiting, format!("nothing listens on {target}"));
        match (service, obstacle) {
            (Some(_), None) => Way::Kernel(entry, Outcome::steered()),
            // The entry is put all the same: the kernel registers a service that starts, daemon or no daemon.
            (None, None) if same_family => Way::Kernel(entry, waiting()),
            (_, Some(why)) if rule.path == PathChoice::Steer || rule.spec.protocol == Protocol::Udp => {
                Way::None(Outcome::because(State::Blocked, why))
            }
            (None, _) => Way::None(waiting()),
            (Some(at), Some(why)) => self.relay(rule, at, why),
        }
    }

    /// Why the kernel is not to have the rule's connections, whatever listens.
    fn obstacle(&self, rule: &Rule) -> Option<String> {
        if rule.path == PathChoice::Relay {
            return Some("as the rule asks".to_owned());
        }
        if rule.network.is_namespace() {
            return Some("on localhost inside".to_owned());
        }
        if let Some(why) = rule.needs_relay() {
            return Some(why.to_owned());
        }
        if let Err(why) = &self.abilities.steer {
            return Some(why.clone());
        }
        if rule.spec.protocol == Protocol::Udp {
            return self.obstacle_of_udp();
        }
        let missing = self.abilities.name_hooks.as_ref().err().filter(|_| rule.source == Source::Loopback)?;
        Some(format!("--source loopback without name hooks: {missing}"))
    }

    fn obstacle_of_udp(&self) -> Option<String> {
        // There is no handshake that a false source would fail.
        if !self.abilities.steer.as_ref().is_ok_and(|steering| steering.interface_check) {
            return Some(
                "UDP needs Linux 5.17: this kernel does not tell on which bridge a datagram comes in"
                    .to_owned(),
            );
        }
        if let Some(why) = &self.inventory.udp_unseen {
            return Some(why.clone());
        }
        let why = self.abilities.reply_hooks.as_ref().err()?;
        Some(format!("UDP services could not answer: {why}"))
    }

    /// What serves connections to `target` that come in at `gateway`. One that is found across the families always has
    /// an obstacle.
    fn find(&self, rule: &Rule, target: SocketAddr, gateway: IpAddr) -> Option<Found> {
        let same_family = target.is_ipv4() == gateway.is_ipv4();
        let there = self.serving(rule.spec.protocol, target);
        if let Some(first) = there.first() {
            // A SO_REUSEPORT group may be mixed; one that the kernel takes is enough.
            let suitable = there.iter().any(|listener| is_suitable(listener.kind));
            let obstacle = match first.kind {
                _ if suitable && same_family => None,
                ListenerKind::Mptcp => Some(MPTCP.to_owned()),
                ListenerKind::Refused(errno) => {
                    let why = io::Error::from_raw_os_error(errno);
                    Some(format!("the kernel refused to register the listener: {why}"))
                }
                ListenerKind::NoRoom => Some("the kernel's map of listeners is full".to_owned()),
                ListenerKind::Tcp | ListenerKind::Udp => Some(family_mismatch(gateway, first.address)),
            };
            return Some(Found { at: target, obstacle });
        }
        let at = self.other_family(rule, target)?;
        Some(Found { at, obstacle: Some(family_mismatch(gateway, at)) })
    }

    fn relay(&self, rule: &Rule, service: SocketAddr, why: String) -> Way {
        // There is one IPv6 loopback address, so nothing to stand in for the container.
        if let (Err(missing), true, Source::Container) =
            (&self.abilities.name_hooks, service.is_ipv6(), rule.source)
        {
            let why = format!(
                "the service on {service} would take the container for a local client ({missing}); allow it with --source loopback"
            );
            return Way::None(Outcome::because(State::Blocked, why));
        }
        Way::Relay(Service::Tcp(service), why)
    }

    fn unix_way(&self, rule: &Rule, path: &Path) -> Way {
        if rule.path == PathChoice::Steer {
            return Way::None(Outcome::because(State::Blocked, "a Unix socket can only be relayed to"));
        }
        if rule.source == Source::Container {
            let why =
                "the service would see root as its peer, not the container; allow it with --source loopback";
            return Way::None(Outcome::because(State::Blocked, why));
        }
        if let Some(why) = self.inventory.untrusted_paths.get(path) {
            return Way::None(Outcome::because(State::Blocked, why));
        }
        if !self.inventory.unix_listeners.contains(path) {
            let why = format!("nothing listens on {}", rule.spec.target);
            return Way::None(Outcome::because(State::Waiting, why));
        }
        Way::Relay(Service::Unix(path.to_owned()), "the service listens on a Unix socket".to_owned())
    }

    /// The listeners that a client on the host would reach at `target`: those at the best bound address that has any.
    fn serving(&self, protocol: Protocol, target: SocketAddr) -> Vec<&Listener> {
        let Some(there) = self.by_port.get(&(protocol, target.port())) else { return vec![] };
        let v4 = target.is_ipv4();
        let bound_at = |address: Address| -> Vec<&Listener> {
            let fits = |listener: &&&Listener| {
                Address::from(listener.address.ip()) == address
                    && listener.bound_interface == 0
                    && (listener.address.is_ipv4() == v4 || !listener.single_family)
            };
            there.iter().filter(fits).copied().collect()
        };
        let target = Address::from(target.ip());
        let mut found = listening_addresses(&target).map(bound_at);
        found.find(|listeners| !listeners.is_empty()).unwrap_or_default()
    }

    /// The other family's loopback address, where the rule leaves the family open and only that one is listened on.
    fn other_family(&self, rule: &Rule, target: SocketAddr) -> Option<SocketAddr> {
        let Target::Port(port) = rule.spec.target else { return None };
        let other = SocketAddr::new(loopback(!target.is_ipv4()), port);
        (!self.serving(rule.spec.protocol, other).is_empty()).then_some(other)
    }
}

/// Whether the kernel can be given such a socket.
pub(super) fn is_suitable(kind: ListenerKind) -> bool {
    matches!(kind, ListenerKind::Tcp | ListenerKind::Udp)
}

fn loopback(v4: bool) -> IpAddr {
    if v4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

fn family_mismatch(gateway: IpAddr, listens_on: SocketAddr) -> String {
    let family = if gateway.is_ipv4() { "IPv4" } else { "IPv6" };
    format!("{family} was dialled, the service listens on {listens_on}")
}

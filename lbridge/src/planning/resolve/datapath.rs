//! Datapath: whether the kernel, a relay or nothing serves what is dialled at one address.

use std::{
    collections::btree_map::Entry,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use lbridge_common::wire::Endpoint;

use super::{Claim, Resolver};
use crate::planning::{
    desired::{Outcome, Service, State},
    hooks::HookSet,
    inventory::{Listener, ListenerKind},
    owner::{is_regular, loopback},
    reason::Reason,
    rule::{DatapathChoice, Protocol, Rule, Source, Target},
};

/// The way to serve connections to one gateway.
pub(super) enum Datapath {
    /// The kernel serves them, given this listener; or nobody does yet, with everything in place for a
    /// service that starts.
    Kernel(Endpoint, Outcome),
    /// The daemon serves them by a relay, for these reasons.
    Relay(Service, Vec<Reason>),
    /// Nothing serves them, and the kernel refuses what is dialled. Otherwise it would reach whoever listens
    /// on the dialled address.
    Refuse(Outcome),
    /// Nothing serves them, for the reasons of this outcome.
    None(Outcome),
}

/// A loopback service that was found.
struct Found {
    /// The address that a relay can connect to.
    at: SocketAddr,
    /// The reason why the kernel cannot be given the service's listener; `None` if it can.
    obstacle: Option<Reason>,
}

impl Datapath {
    /// Adds a reason to the way.
    fn with(self, reason: Reason) -> Self {
        match self {
            Self::Kernel(entry, outcome) => Self::Kernel(entry, outcome.with(reason)),
            Self::Relay(service, mut reasons) => {
                reasons.push(reason);
                Self::Relay(service, reasons)
            }
            Self::Refuse(outcome) => Self::Refuse(outcome.with(reason)),
            Self::None(outcome) => Self::None(outcome.with(reason)),
        }
    }
}

impl Resolver<'_> {
    /// Decides how connections to an address can be served, unless an earlier rule has the address.
    pub(super) fn way(
        &mut self,
        rule: &Rule,
        dialled: SocketAddr,
        claim: Claim,
        place: &'static str,
    ) -> Datapath {
        match self.claimed.entry((dialled, rule.spec.protocol, claim)) {
            Entry::Occupied(first) => {
                let taken = Reason::AddressTaken { first: first.get().clone(), dialled, place };
                return Datapath::None(Outcome::because(State::Blocked, taken));
            }
            Entry::Vacant(free) => free.insert(rule.id()),
        };
        let way = self.way_to_service(rule, dialled.ip());
        match claim {
            Claim::Bridge(interface) => self.past_strangers(rule, way, dialled, interface),
            Claim::Namespace(_) => way,
        }
    }

    fn way_to_service(&self, rule: &Rule, gateway: IpAddr) -> Datapath {
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
        let waiting = || Outcome::because(State::Waiting, Reason::NothingListens(Target::Address(target)));
        let stranger = self.sockets.stranger(rule, target);
        let may_start = stranger.is_none() && self.sockets.may_start(rule, target.is_ipv4());
        let way = match (service, obstacle) {
            (Some(_), None) => Datapath::Kernel(entry, Outcome::steered()),
            // The entry is put all the same: the kernel registers a service that starts, with or without the
            // daemon. It would register a stranger, too: where the service is not expected, an entry keeps
            // the gateway from whoever comes first.
            (None, None) if same_family && may_start => Datapath::Kernel(entry, waiting()),
            (None, None) if same_family => Datapath::Refuse(waiting()),
            (_, Some(why))
                if rule.options.path == DatapathChoice::Steer || rule.spec.protocol == Protocol::Udp =>
            {
                Datapath::None(Outcome::because(State::Blocked, why))
            }
            (None, _) => self.closed(waiting()),
            (Some(at), Some(why)) => self.relay(rule, at, why),
        };
        let elsewhere = || {
            let other = SocketAddr::new(loopback(!target.is_ipv4()), target.port());
            service.is_none().then(|| self.sockets.stranger(rule, other))?
        };
        match stranger.or_else(elsewhere) {
            Some(stranger) if self.sockets.is_down(rule) => {
                way.with(foreign(stranger)).with(Reason::ForeignListenerInItsPlace)
            }
            Some(stranger) => way.with(foreign(stranger)),
            None => way,
        }
    }

    /// Refuses connections that would reach another person's socket. Without an entry, connections reach
    /// whoever listens on the dialled address. If that is a person other than the service's owner, an entry
    /// that leads to nobody keeps the connections from that socket. Before Linux 5.17 this applies to relays,
    /// too, which cannot listen beside such a socket.
    fn past_strangers(&self, rule: &Rule, way: Datapath, dialled: SocketAddr, interface: u32) -> Datapath {
        let owner = self.sockets.user_of(rule);
        let takes = |listener: &&Listener| {
            let bound = listener.address;
            let of_family = bound.is_ipv4() == dialled.is_ipv4() || !listener.single_family;
            (bound.ip() == dialled.ip() || (bound.ip().is_unspecified() && of_family))
                && [0, interface].contains(&listener.bound_interface)
                && is_regular(listener.uid)
                && Some(listener.uid) != owner
        };
        let stranger = || self.sockets.on(rule.spec.protocol, dialled.port()).find(takes);
        if self.features.steer.is_err() || matches!(rule.spec.target, Target::Unix(_)) {
            return way;
        }
        match way {
            Datapath::Kernel(..) | Datapath::Refuse(_) => way,
            // The kernel's entry leads to it.
            Datapath::Relay(..) if self.checks_interface() => way,
            Datapath::Relay(service, why) => match stranger() {
                None => Datapath::Relay(service, why),
                Some(Listener { address, uid, .. }) => {
                    let (address, uid) = (*address, *uid);
                    let reason = Reason::ForeignListenerInTheWay { dialled, address, uid };
                    Datapath::Refuse(Outcome::because(State::Blocked, reason))
                }
            },
            Datapath::None(outcome) => match stranger() {
                None => Datapath::None(outcome),
                Some(stranger) => Datapath::Refuse(outcome.with(foreign(stranger))),
            },
        }
    }

    /// Returns the way to a relay that is not open because its service is down. Without an entry, whoever
    /// listens on the gateway, or on every address, would get the connections meanwhile.
    fn closed(&self, outcome: Outcome) -> Datapath {
        if self.features.steer.is_ok() { Datapath::Refuse(outcome) } else { Datapath::None(outcome) }
    }

    /// Returns why the kernel must not have the rule's connections, whatever listens; `None` if it may.
    fn obstacle(&self, rule: &Rule) -> Option<Reason> {
        if rule.options.path == DatapathChoice::Relay {
            return Some(Reason::AsAsked);
        }
        if rule.network.is_namespace() {
            return Some(Reason::InsideNamespace);
        }
        if let Some(why) = rule.needs_relay() {
            return Some(Reason::NeedsRelay(why));
        }
        if let Err(why) = &self.features.steer {
            return Some(Reason::NoSteering(why.clone()));
        }
        if rule.spec.protocol == Protocol::Udp {
            return self.obstacle_of_udp();
        }
        let missing = self.features.hooks[HookSet::Names]
            .as_ref()
            .err()
            .filter(|_| rule.options.source == Source::Loopback)?;
        Some(Reason::NoNameHooks(missing.clone()))
    }

    fn obstacle_of_udp(&self) -> Option<Reason> {
        // UDP has no handshake that a spoofed source would fail.
        if !self.features.steer.as_ref().is_ok_and(|steering| steering.interface_check) {
            return Some(Reason::UdpNeedsInterface);
        }
        if let Some(why) = &self.inventory.udp_unseen {
            return Some(Reason::UdpUnseen(why.clone()));
        }
        let why = self.features.hooks[HookSet::Replies].as_ref().err()?;
        Some(Reason::NoReplyHooks(why.clone()))
    }

    /// Finds the service for connections to `target` that come in at `gateway`. A service that is found
    /// across the families always has an obstacle.
    fn find(&self, rule: &Rule, target: SocketAddr, gateway: IpAddr) -> Option<Found> {
        let same_family = target.is_ipv4() == gateway.is_ipv4();
        let there = self.sockets.serving(rule, target);
        if let Some(first) = there.first() {
            // A SO_REUSEPORT group may be mixed; one that the kernel takes is enough.
            let suitable = there.iter().any(|listener| is_suitable(listener.kind));
            let obstacle = match first.kind {
                _ if suitable && same_family => None,
                ListenerKind::Mptcp => Some(Reason::Mptcp),
                ListenerKind::Refused(errno) => Some(Reason::RegisterRefused(errno)),
                ListenerKind::NoRoom => Some(Reason::ListenersFull),
                ListenerKind::Tcp | ListenerKind::Udp => {
                    Some(Reason::FamilyMismatch { dialled: gateway, listens_on: first.address })
                }
            };
            return Some(Found { at: target, obstacle });
        }
        let at = self.other_family(rule, target)?;
        Some(Found { at, obstacle: Some(Reason::FamilyMismatch { dialled: gateway, listens_on: at }) })
    }

    fn relay(&self, rule: &Rule, service: SocketAddr, why: Reason) -> Datapath {
        // IPv6 has one loopback address, so none can stand in for the container.
        if let (Err(missing), true, Source::Container) =
            (&self.features.hooks[HookSet::Names], service.is_ipv6(), rule.options.source)
        {
            let reason = Reason::WouldLookLocal { service, missing: missing.clone() };
            return Datapath::None(Outcome::because(State::Blocked, reason));
        }
        Datapath::Relay(Service::Tcp(service), vec![why])
    }

    fn unix_way(&self, rule: &Rule, path: &Path) -> Datapath {
        if rule.options.path == DatapathChoice::Steer {
            return Datapath::None(Outcome::because(State::Blocked, Reason::UnixSocketNotSteered));
        }
        if rule.options.source == Source::Container {
            return Datapath::None(Outcome::because(State::Blocked, Reason::UnixPeerIsRoot));
        }
        if let Some(why) = self.inventory.untrusted_paths.get(path) {
            return Datapath::None(Outcome::because(State::Blocked, Reason::UntrustedPath(why.clone())));
        }
        if !self.inventory.unix_listeners.contains(path) {
            let nothing = Reason::NothingListens(rule.spec.target.clone());
            return self.closed(Outcome::because(State::Waiting, nothing));
        }
        Datapath::Relay(Service::Unix(path.to_owned()), vec![Reason::UnixSocket])
    }

    /// Returns the other family's loopback address, if the rule leaves the family open and only that address
    /// is listened on.
    fn other_family(&self, rule: &Rule, target: SocketAddr) -> Option<SocketAddr> {
        let Target::Port(port) = rule.spec.target else { return None };
        let other = SocketAddr::new(loopback(!target.is_ipv4()), port);
        (!self.sockets.serving(rule, other).is_empty()).then_some(other)
    }
}

/// Returns true if the kernel can be given such a socket.
pub(super) fn is_suitable(kind: ListenerKind) -> bool {
    matches!(kind, ListenerKind::Tcp | ListenerKind::Udp)
}

/// Returns the reason for a socket of another user than the service's.
fn foreign(listener: &Listener) -> Reason {
    Reason::ForeignListener { address: listener.address, uid: listener.uid }
}

//! How what is dialled at one address can be served: by the kernel, by a relay, or not.

use std::{
    collections::btree_map::Entry,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use lbridge_common::wire::Endpoint;

use super::{Claim, Resolver};
use crate::planning::{
    hooks::HookSet,
    inventory::{Listener, ListenerKind},
    owner::{is_regular, loopback},
    policy::{Outcome, Service, State},
    reason::Reason,
    rule::{PathChoice, Protocol, Rule, Source, Target},
};

/// How a connection to one gateway can be served.
pub(super) enum Way {
    /// By the kernel, given this listener; or by nobody yet, with everything in place for a service that starts.
    Kernel(Endpoint, Outcome),
    /// By the daemon.
    Relay(Service, Vec<Reason>),
    /// Not at all; and the kernel refuses what is dialled, which would go to another user's socket.
    Refuse(Outcome),
    /// Not at all.
    None(Outcome),
}

/// A loopback service that was found.
struct Found {
    /// Where it can be connected to.
    at: SocketAddr,
    /// Why the kernel cannot be given its listener, if it cannot.
    obstacle: Option<Reason>,
}

impl Way {
    /// With something to know beside the reason.
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
    /// How connections to an address can be served, if no rule before this one has it.
    pub(super) fn way(&mut self, rule: &Rule, dialled: SocketAddr, claim: Claim, place: &'static str) -> Way {
        match self.claimed.entry((dialled, rule.spec.protocol, claim)) {
            Entry::Occupied(first) => {
                let taken = Reason::AddressTaken { first: first.get().clone(), dialled, place };
                return Way::None(Outcome::because(State::Blocked, taken));
            }
            Entry::Vacant(free) => free.insert(rule.id()),
        };
        let way = self.way_to_service(rule, dialled.ip());
        match claim {
            Claim::Bridge(interface) => self.past_strangers(rule, way, dialled, interface),
            Claim::Namespace(_) => way,
        }
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
        let waiting = || Outcome::because(State::Waiting, Reason::NothingListens(Target::Address(target)));
        let stranger = self.sockets.stranger(rule, target);
        let may_start = stranger.is_none() && self.sockets.may_start(rule, target.is_ipv4());
        let way = match (service, obstacle) {
            (Some(_), None) => Way::Kernel(entry, Outcome::steered()),
            // The entry is put all the same: the kernel registers a service that starts, daemon or no daemon. It would register
            // a stranger, too: where the service is not expected an entry keeps the gateway from whoever comes first.
            (None, None) if same_family && may_start => Way::Kernel(entry, waiting()),
            (None, None) if same_family => Way::Refuse(waiting()),
            (_, Some(why)) if rule.path == PathChoice::Steer || rule.spec.protocol == Protocol::Udp => {
                Way::None(Outcome::because(State::Blocked, why))
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

    /// What has no entry reaches whoever listens on the dialled address. If that is another person's socket, an entry that leads to
    /// nobody keeps the connections from it. Before Linux 5.17 that goes for relays, too, which cannot listen beside such a socket.
    fn past_strangers(&self, rule: &Rule, way: Way, dialled: SocketAddr, interface: u32) -> Way {
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
        if self.abilities.steer.is_err() || matches!(rule.spec.target, Target::Unix(_)) {
            return way;
        }
        match way {
            Way::Kernel(..) | Way::Refuse(_) => way,
            // The kernel's entry leads to it.
            Way::Relay(..) if self.checks_interface() => way,
            Way::Relay(service, why) => match stranger() {
                None => Way::Relay(service, why),
                Some(Listener { address, uid, .. }) => {
                    let (address, uid) = (*address, *uid);
                    let reason = Reason::ForeignListenerInTheWay { dialled, address, uid };
                    Way::Refuse(Outcome::because(State::Blocked, reason))
                }
            },
            Way::None(outcome) => match stranger() {
                None => Way::None(outcome),
                Some(stranger) => Way::Refuse(outcome.with(foreign(stranger))),
            },
        }
    }

    /// The way to a relay that is not open since its service is down. Without an entry whoever listens on the gateway, or on every
    /// address, would get the connections meanwhile.
    fn closed(&self, outcome: Outcome) -> Way {
        if self.abilities.steer.is_ok() { Way::Refuse(outcome) } else { Way::None(outcome) }
    }

    /// Why the kernel is not to have the rule's connections, whatever listens.
    fn obstacle(&self, rule: &Rule) -> Option<Reason> {
        if rule.path == PathChoice::Relay {
            return Some(Reason::AsAsked);
        }
        if rule.network.is_namespace() {
            return Some(Reason::InsideNamespace);
        }
        if let Some(why) = rule.needs_relay() {
            return Some(Reason::NeedsRelay(why));
        }
        if let Err(why) = &self.abilities.steer {
            return Some(Reason::NoSteering(why.clone()));
        }
        if rule.spec.protocol == Protocol::Udp {
            return self.obstacle_of_udp();
        }
        let missing = self.abilities.hooks[HookSet::Names]
            .as_ref()
            .err()
            .filter(|_| rule.source == Source::Loopback)?;
        Some(Reason::NoNameHooks(missing.clone()))
    }

    fn obstacle_of_udp(&self) -> Option<Reason> {
        // There is no handshake that a false source would fail.
        if !self.abilities.steer.as_ref().is_ok_and(|steering| steering.interface_check) {
            return Some(Reason::UdpNeedsInterface);
        }
        if let Some(why) = &self.inventory.udp_unseen {
            return Some(Reason::UdpUnseen(why.clone()));
        }
        let why = self.abilities.hooks[HookSet::Replies].as_ref().err()?;
        Some(Reason::NoReplyHooks(why.clone()))
    }

    /// What serves connections to `target` that come in at `gateway`. One that is found across the families always has
    /// an obstacle.
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

    fn relay(&self, rule: &Rule, service: SocketAddr, why: Reason) -> Way {
        // There is one IPv6 loopback address, so nothing to stand in for the container.
        if let (Err(missing), true, Source::Container) =
            (&self.abilities.hooks[HookSet::Names], service.is_ipv6(), rule.source)
        {
            let reason = Reason::WouldLookLocal { service, missing: missing.clone() };
            return Way::None(Outcome::because(State::Blocked, reason));
        }
        Way::Relay(Service::Tcp(service), vec![why])
    }

    fn unix_way(&self, rule: &Rule, path: &Path) -> Way {
        if rule.path == PathChoice::Steer {
            return Way::None(Outcome::because(State::Blocked, Reason::UnixSocketNotSteered));
        }
        if rule.source == Source::Container {
            return Way::None(Outcome::because(State::Blocked, Reason::UnixPeerIsRoot));
        }
        if let Some(why) = self.inventory.untrusted_paths.get(path) {
            return Way::None(Outcome::because(State::Blocked, Reason::UntrustedPath(why.clone())));
        }
        if !self.inventory.unix_listeners.contains(path) {
            let nothing = Reason::NothingListens(rule.spec.target.clone());
            return self.closed(Outcome::because(State::Waiting, nothing));
        }
        Way::Relay(Service::Unix(path.to_owned()), vec![Reason::UnixSocket])
    }

    /// The other family's loopback address, where the rule leaves the family open and only that one is listened on.
    fn other_family(&self, rule: &Rule, target: SocketAddr) -> Option<SocketAddr> {
        let Target::Port(port) = rule.spec.target else { return None };
        let other = SocketAddr::new(loopback(!target.is_ipv4()), port);
        (!self.sockets.serving(rule, other).is_empty()).then_some(other)
    }
}

/// Whether the kernel can be given such a socket.
pub(super) fn is_suitable(kind: ListenerKind) -> bool {
    matches!(kind, ListenerKind::Tcp | ListenerKind::Udp)
}

/// A socket of another user than the service's.
fn foreign(listener: &Listener) -> Reason {
    Reason::ForeignListener { address: listener.address, uid: listener.uid }
}

//! Owners: which listeners on a port are the service that a rule means, where several users listen there.
//!
//! A rule that names a port (`5432`) leaves the family open, and every local user may listen on the loopback
//! address of the family that the service does not use. So the sockets of one user are the service, and those
//! of others are strangers, which get nothing. A rule that names an address (`80=[::1]:3000`) means whoever
//! listens there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lbridge_common::{verdict::listening_addresses, wire::Address};

use super::{
    inventory::{Incumbents, Inventory, Listener, Owner},
    rule::{Protocol, Rule, Rules, Target},
};

/// Returns true if the uid is a person's: not root's, not a system user's (below 1000), not `nobody`'s, and
/// not one of those that systemd gives to units with `DynamicUser=` (61184 to 65519, "Users, Groups, UIDs and
/// GIDs on systemd Systems").
pub fn is_regular(uid: u32) -> bool {
    const FIRST: u32 = 1000;
    const NOBODY: u32 = 65534;
    uid >= FIRST && uid != NOBODY && !(61184..=65519).contains(&uid)
}

/// Returns 127.0.0.1 if `v4` is set, else `::1`.
pub(super) fn loopback(v4: bool) -> IpAddr {
    if v4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

/// Returns the rank of a listener among those that could serve `target`, lowest first: a client on the host
/// reaches the first. `None` if the listener cannot serve it.
fn rank(listener: &Listener, target: IpAddr) -> Option<usize> {
    let of_family = listener.address.is_ipv4() == target.is_ipv4() || !listener.single_family;
    let bound = Address::from(listener.address.ip());
    let place = || listening_addresses(&target.into()).position(|address| address == bound);
    (of_family && listener.bound_interface == 0).then(place)?
}

/// Chooses, among the listeners on one port, the user whose sockets are the service.
///
/// - Root and system users come before people.
/// - The user who had the service last comes before others.
/// - A user who listens for IPv4 comes before one who does not. Then the one that a client on the host
///   reaches comes first.
///
/// While the last owner has no listener (the service restarts), a person who listens on the other family
/// alone is not taken for the owner.
fn choose<'a>(listeners: impl Iterator<Item = &'a Listener>, last: Option<&Owner>) -> Option<Owner> {
    // The best listener of each family: its rank, and the older one of equals.
    type Best = Option<(usize, u64)>;
    let mut users: BTreeMap<u32, (Best, Best)> = BTreeMap::new();
    for listener in listeners {
        let found = |v4| Some((rank(listener, loopback(v4))?, listener.inode));
        let better = |known: Best, new: Best| known.into_iter().chain(new).min();
        let (v4, v6) = (found(true), found(false));
        if v4.or(v6).is_some() {
            let user = users.entry(listener.uid).or_default();
            *user = (better(user.0, v4), better(user.1, v6));
        }
    }
    let had =
        |owner: &Owner, (v4, v6): &(Best, Best)| (owner.v4 && v4.is_some()) || (owner.v6 && v6.is_some());
    let is_back = last.is_none_or(|last| users.contains_key(&last.uid));
    let eligible = |uid: u32, best: &(Best, Best)| {
        is_back || !is_regular(uid) || last.is_some_and(|last| had(last, best))
    };
    let candidates = users.iter().filter(|(uid, best)| eligible(**uid, best));
    let chosen = candidates.min_by_key(|(uid, (v4, v6))| {
        (is_regular(**uid), last.is_none_or(|last| last.uid != **uid), v4.is_none(), v4.or(*v6))
    });
    chosen.map(|(uid, (v4, v6))| Owner { uid: *uid, v4: v4.is_some(), v6: v6.is_some() })
}

/// Returns the owner of the service on each port of the rules. For a service that is down, returns the last
/// owner.
pub fn incumbents(rules: &Rules, inventory: &Inventory, last: &Incumbents) -> Incumbents {
    let sockets = Sockets::of(inventory, last);
    let ports: BTreeSet<_> = rules
        .iter()
        .filter_map(|(_, rule, _)| match rule.spec.target {
            Target::Port(port) => Some((rule.spec.protocol, port)),
            Target::Address(_) | Target::Unix(_) => None,
        })
        .collect();
    let owner = |(protocol, port)| sockets.owner(protocol, port).or_else(|| sockets.last(protocol, port));
    ports.into_iter().filter_map(|port| Some((port, owner(port)?))).collect()
}

/// The host's sockets by port, and the last owner of each service.
#[derive(Debug)]
pub struct Sockets<'a> {
    by_port: BTreeMap<(Protocol, u16), Vec<&'a Listener>>,
    last: &'a Incumbents,
}

impl<'a> Sockets<'a> {
    /// Groups the sockets of `inventory` by port.
    pub fn new(inventory: &'a Inventory) -> Self {
        Self::of(inventory, &inventory.incumbents)
    }

    fn of(inventory: &'a Inventory, last: &'a Incumbents) -> Self {
        let mut by_port: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for socket in inventory.sockets(protocol) {
                by_port.entry((protocol, socket.address.port())).or_default().push(socket);
            }
        }
        Self { by_port, last }
    }

    /// Returns every socket on a port.
    pub(super) fn on(&self, protocol: Protocol, port: u16) -> impl Iterator<Item = &'a Listener> {
        self.by_port.get(&(protocol, port)).into_iter().flatten().copied()
    }

    /// Returns the owner of the service on a port, if the service listens.
    fn owner(&self, protocol: Protocol, port: u16) -> Option<Owner> {
        choose(self.on(protocol, port), self.last.get(&(protocol, port)))
    }

    fn last(&self, protocol: Protocol, port: u16) -> Option<Owner> {
        self.last.get(&(protocol, port)).copied()
    }

    /// Returns the uid whose sockets serve a rule, if any do. `None` for a Unix socket, whose owner is not
    /// known.
    pub fn user_of(&self, rule: &Rule) -> Option<u32> {
        match rule.spec.target {
            Target::Port(port) => self.owner(rule.spec.protocol, port).map(|owner| owner.uid),
            Target::Address(target) => self.serving(rule, target).first().map(|listener| listener.uid),
            Target::Unix(_) => None,
        }
    }

    /// Returns a predicate that is true for a socket of the rule's service, given a socket on the rule's
    /// port.
    pub(super) fn of_service(&self, rule: &Rule) -> impl Fn(&Listener) -> bool + use<> {
        let any = !matches!(rule.spec.target, Target::Port(_));
        let owner = if any { None } else { self.user_of(rule) };
        move |listener| any || Some(listener.uid) == owner
    }

    /// Returns the listeners of the rule's service that a client on the host would reach at `target`: those
    /// at the best bound address that has any.
    pub(super) fn serving(&self, rule: &Rule, target: SocketAddr) -> Vec<&'a Listener> {
        let is_its = self.of_service(rule);
        self.best(rule.spec.protocol, target, &is_its)
    }

    /// Returns a socket that a client on the host might reach at `target`, and that is not the rule's
    /// service.
    pub(super) fn stranger(&self, rule: &Rule, target: SocketAddr) -> Option<&'a Listener> {
        let is_its = self.of_service(rule);
        self.best(rule.spec.protocol, target, &|listener| !is_its(listener)).first().copied()
    }

    fn best(
        &self,
        protocol: Protocol,
        target: SocketAddr,
        fits: &dyn Fn(&Listener) -> bool,
    ) -> Vec<&'a Listener> {
        let ranked = || {
            let there = self.on(protocol, target.port()).filter(|listener| fits(listener));
            there.filter_map(|listener| Some((rank(listener, target.ip())?, listener)))
        };
        let best = ranked().map(|(rank, _)| rank).min();
        ranked().filter(|(rank, _)| Some(*rank) == best).map(|(_, listener)| listener).collect()
    }

    /// Returns true if a service that starts to listen for this family may be the rule's: the service was
    /// never seen, or listened for this family.
    pub(super) fn may_start(&self, rule: &Rule, v4: bool) -> bool {
        let Target::Port(port) = rule.spec.target else { return true };
        self.last(rule.spec.protocol, port).is_none_or(|last| last.listens(v4))
    }

    /// Returns true if the rule's service was seen earlier and does not listen now.
    pub(super) fn is_down(&self, rule: &Rule) -> bool {
        let Target::Port(port) = rule.spec.target else { return false };
        self.user_of(rule).is_none() && self.last(rule.spec.protocol, port).is_some()
    }
}

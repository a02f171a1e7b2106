//! plan: decides what to test, given the daemon's status and the host's interfaces. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{
    api::protocol::{GatewayStatus, NamespaceStatus, RuleStatus, Status},
    planning::{
        desired::{State, Subnet},
        inventory::Interface,
        rule::{Protocol, RuleId},
    },
};

use super::Expected;

/// A place to test from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Vantage {
    /// A neighbour of the host on the LAN, which sends everything to the host.
    Lan,
    /// A bridge of the host, by name.
    Bridge(String),
    /// Any other interface of the host. Nothing is sent there; the kernel is asked.
    Interface {
        /// The interface's name.
        name: String,
        /// The interface's index in the host's network namespace.
        index: u32,
    },
    /// The network namespace of a rule.
    Inside(RuleId),
}

/// A test, and what it should show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trial {
    /// The rule that is tested.
    pub(super) rule: RuleId,
    /// The attempt to make.
    pub(super) attempt: Attempt,
    /// The expected result.
    pub(super) expected: Expected,
}

/// The kinds of attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Attempt {
    /// Make a connection. If it should succeed, also ask the kernel which socket gets it.
    Connect {
        /// The place to dial from.
        from: Vantage,
        /// The address to dial.
        to: SocketAddr,
        /// The socket that must get it; `None` if none may.
        by: Option<By>,
    },
    /// Send nothing; ask the kernel which socket would get a datagram.
    Ask {
        /// The place that it would come from.
        from: Vantage,
        /// The address that it would go to.
        to: SocketAddr,
        /// The socket that must get it; `None` if none may.
        by: Option<By>,
    },
    /// Use an address of the rule's network on packets that arrive elsewhere. Their sender never sees an
    /// answer, so the kernel is asked which socket would get the first packet.
    Borrow {
        /// The bridge whose address is used.
        of: String,
        /// The place where the packets arrive.
        at: Vantage,
        /// The address that they go to.
        to: SocketAddr,
    },
    /// Use the address of a container that the rule is for. Asked like [`Attempt::Borrow`], since a container
    /// already has the address.
    Listed {
        /// The container's address.
        source: IpAddr,
        /// The place where the packets arrive.
        at: Vantage,
        /// The address that they go to.
        to: SocketAddr,
        /// The socket that must get it; `None` if none may.
        by: Option<By>,
    },
    /// Use an address outside the network, on its bridge; asked like [`Attempt::Borrow`].
    Foreign {
        /// The bridge where the packets arrive.
        at: Vantage,
        /// The address that they go to.
        to: SocketAddr,
    },
    /// Dial the localhost of a namespace through an interface other than its loopback. Asked like
    /// [`Attempt::Borrow`].
    Wire {
        /// The namespace that has the localhost address.
        within: Vantage,
        /// The localhost address.
        to: SocketAddr,
    },
    /// Nothing can be tested.
    Nothing {
        /// A description of what would have been dialled.
        what: String,
        /// The reason why it cannot be.
        why: String,
    },
}

/// The socket that must get a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum By {
    /// The service's own listener, at this address or at the wildcard address that covers it.
    Service(SocketAddr),
    /// A relay of the daemon.
    Relay,
}

/// The trials and the places that they need.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) trials: Vec<Trial>,
    /// The bridges, by name.
    pub(super) bridges: BTreeMap<String, Interface>,
    /// The network namespaces of rules, by rule.
    pub(super) namespaces: BTreeMap<RuleId, NamespaceStatus>,
}

/// Decides what to try for the rules of `status` that are `wanted`. `interfaces` are the host's.
pub(super) fn plan(status: &Status, interfaces: &[Interface], wanted: Option<&RuleId>) -> Plan {
    let on_bridges = status.rules.iter().filter(|rule| !rule.network.is_namespace());
    let dialled: BTreeSet<_> = on_bridges
        .flat_map(|rule| {
            rule.gateways.iter().map(|gateway| {
                dialled_at(&gateway.interface, SocketAddr::new(gateway.address, rule.port), rule)
            })
        })
        .collect();
    let names: BTreeSet<_> = dialled
        .iter()
        .map(|(name, ..)| *name)
        .chain(status.docker_networks.iter().filter_map(|network| network.bridge.as_deref()))
        .collect();
    let bridges = interfaces.iter().filter(|i| i.is_bridge && names.contains(i.name.as_str()));
    let planner = Planner {
        dialled,
        uplinks: interfaces
            .iter()
            .filter(|i| if i.is_bridge { !names.contains(i.name.as_str()) } else { !i.addresses.is_empty() })
            .map(|i| Vantage::Interface { name: i.name.clone(), index: i.index })
            .collect(),
        host: interfaces.iter().flat_map(|i| i.addresses.iter().map(|(ip, _)| *ip)).collect(),
        interface_check: status.kernel.interface_check,
        plan: Plan {
            bridges: bridges.map(|bridge| (bridge.name.clone(), bridge.clone())).collect(),
            ..Plan::default()
        },
    };
    planner.all(status.rules.iter().filter(|rule| wanted.is_none_or(|wanted| *wanted == rule.id())))
}

fn dialled_at<'a>(bridge: &'a str, to: SocketAddr, rule: &RuleStatus) -> (&'a str, SocketAddr, Protocol) {
    (bridge, to, rule.protocol)
}

struct Planner<'a> {
    /// The addresses that some rule makes a bridge's containers dial.
    dialled: BTreeSet<(&'a str, SocketAddr, Protocol)>,
    /// Interfaces with addresses, and bridges that neither a rule nor Docker knows. Nothing is plugged into
    /// those; the LAN may be behind them.
    uplinks: Vec<Vantage>,
    /// Every address of the host.
    host: BTreeSet<IpAddr>,
    interface_check: bool,
    plan: Plan,
}

impl Planner<'_> {
    fn all<'a>(mut self, rules: impl Iterator<Item = &'a RuleStatus>) -> Plan {
        for rule in rules {
            self.meant(rule);
            self.lan(rule);
            if rule.network.is_namespace() {
                self.inside(rule);
            } else {
                self.bridges(rule);
                self.false_addresses(rule);
            }
        }
        self.plan
    }

    fn add(&mut self, rule: &RuleStatus, attempt: Attempt, expected: Expected) {
        self.plan.trials.push(Trial { rule: rule.id(), attempt, expected });
    }

    fn closed(&mut self, rule: &RuleStatus, from: &Vantage, to: SocketAddr) {
        self.add(rule, attempt(rule, from.clone(), to, None), Expected::Closed);
    }

    /// Adds the trials for what the rule is meant to open.
    fn meant(&mut self, rule: &RuleStatus) {
        if rule.gateways.is_empty() {
            let what = format!("port {}", rule.port);
            let why = rule.why.clone().unwrap_or_else(|| "there is nothing to dial".to_owned());
            self.add(rule, Attempt::Nothing { what, why }, Expected::Open);
        }
        for gateway in &rule.gateways {
            let to = SocketAddr::new(gateway.address, rule.port);
            let from = match &gateway.namespace {
                None => Vantage::Bridge(gateway.interface.clone()),
                Some(namespace) => {
                    self.plan.namespaces.insert(rule.id(), namespace.clone());
                    Vantage::Inside(rule.id())
                }
            };
            let (by, expected) = match gateway.state {
                State::Steered => (target(rule, gateway).map(By::Service), Expected::Open),
                State::Relayed => (Some(By::Relay), Expected::Open),
                State::Waiting => (None, Expected::Refused),
                // `status` reports it; a blocked alias is not promised to work.
                State::Blocked if gateway.alias.is_some() => continue,
                State::Blocked => {
                    let why = format!("blocked: {}", gateway.why.as_deref().unwrap_or_default());
                    let what = to.to_string();
                    self.add(rule, Attempt::Nothing { what, why }, Expected::Open);
                    continue;
                }
            };
            let Some(sources) = gateway.sources.as_ref().filter(|_| expected == Expected::Open) else {
                self.add(rule, attempt(rule, from, to, by), expected);
                continue;
            };
            for source in sources {
                let attempt = Attempt::Listed { source: *source, at: from.clone(), to, by: by.clone() };
                self.add(rule, attempt, Expected::Open);
            }
            // The test has another source address; a relay accepts it and resets it.
            let by = by.filter(|by| *by == By::Relay);
            self.add(rule, attempt(rule, from, to, by), Expected::Refused);
        }
    }

    /// Adds trials from the LAN: the dialled port and the service's port on every address of the host, and
    /// localhost over the wire.
    fn lan(&mut self, rule: &RuleStatus) {
        // The address that a namespace dials is not the host's.
        let ports =
            if rule.network.is_namespace() { service_port(rule).into_iter().collect() } else { ports(rule) };
        let localhost = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        // For UDP the kernel's answer does not show that it drops such packets before it looks up a socket.
        let localhost = if rule.protocol == Protocol::Udp { &[][..] } else { &localhost[..] };
        for port in ports {
            for ip in self.host.clone().into_iter().chain(localhost.iter().copied()) {
                self.closed(rule, &Vantage::Lan, SocketAddr::new(ip, port));
            }
        }
    }

    /// Adds trials from each bridge to everything that no rule opens for it. From other bridges these are the
    /// rule's gateways and the host's addresses on that bridge; from the rule's own bridge, every address of
    /// the host.
    fn bridges(&mut self, rule: &RuleStatus) {
        let own: BTreeSet<_> = rule.gateways.iter().map(|gateway| gateway.interface.as_str()).collect();
        let gateways: BTreeSet<_> = rule.gateways.iter().map(|gateway| gateway.address).collect();
        let bridges: Vec<_> = self.plan.bridges.values().cloned().collect();
        for bridge in &bridges {
            let theirs: BTreeSet<_> = bridge.addresses.iter().map(|(ip, _)| *ip).collect();
            let targets: BTreeSet<IpAddr> = if own.contains(bridge.name.as_str()) {
                self.host.clone()
            } else {
                gateways.union(&theirs).copied().collect()
            };
            for port in ports(rule) {
                for to in targets.iter().map(|ip| SocketAddr::new(*ip, port)) {
                    // Without an address of that family there is no route there, and none back.
                    let has_family = bridge.addresses.iter().any(|(ip, _)| ip.is_ipv4() == to.is_ipv4());
                    if has_family && !self.dialled.contains(&dialled_at(&bridge.name, to, rule)) {
                        self.closed(rule, &Vantage::Bridge(bridge.name.clone()), to);
                    }
                }
            }
        }
    }

    /// Adds trials with false source addresses: those of the network elsewhere, and foreign ones on the
    /// network's bridge. A relay accepts the latter and resets them.
    fn false_addresses(&mut self, rule: &RuleStatus) {
        for gateway in &rule.gateways {
            let to = SocketAddr::new(gateway.address, rule.port);
            if gateway.state == State::Steered {
                let at = Vantage::Bridge(gateway.interface.clone());
                self.add(rule, Attempt::Foreign { at, to }, Expected::Closed);
            }
            // If the kernel does not check the interface, the documentation says what happens to such
            // packets.
            let checked = match gateway.state {
                State::Steered => self.interface_check,
                State::Relayed => true,
                State::Waiting | State::Blocked => false,
            };
            if !checked {
                continue;
            }
            let others = self.plan.bridges.keys().filter(|name| **name != gateway.interface);
            let others = others.map(|name| Vantage::Bridge(name.clone())).chain([Vantage::Lan]);
            let places: Vec<_> = others.chain(self.uplinks.iter().cloned()).collect();
            // The rule refuses any other address anyway.
            let listed = gateway.sources.as_ref().and_then(|sources| sources.first().copied());
            for at in places {
                let attempt = match listed {
                    Some(source) => Attempt::Listed { source, at, to, by: None },
                    None => Attempt::Borrow { of: gateway.interface.clone(), at, to },
                };
                self.add(rule, attempt, Expected::Closed);
            }
        }
    }

    fn inside(&mut self, rule: &RuleStatus) {
        for gateway in rule.gateways.iter().filter(|gateway| gateway.state == State::Relayed) {
            let to = SocketAddr::new(gateway.address, rule.port);
            self.add(rule, Attempt::Wire { within: Vantage::Inside(rule.id()), to }, Expected::Closed);
        }
    }
}

/// Builds the attempt for the rule's protocol.
fn attempt(rule: &RuleStatus, from: Vantage, to: SocketAddr, by: Option<By>) -> Attempt {
    match rule.protocol {
        Protocol::Tcp => Attempt::Connect { from, to, by },
        Protocol::Udp => Attempt::Ask { from, to, by },
    }
}

/// Returns the address of the rule's service for clients of that gateway.
fn target(rule: &RuleStatus, gateway: &GatewayStatus) -> Option<SocketAddr> {
    let target: SocketAddr = rule.target.parse().ok()?;
    if target.is_ipv4() == gateway.address.is_ipv4() {
        return Some(target);
    }
    // A rule that names only a port means either family; its status shows the first.
    Some(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), target.port()))
}

fn service_port(rule: &RuleStatus) -> Option<u16> {
    rule.target.parse().ok().map(|target: SocketAddr| target.port())
}

/// Returns the ports at which others might reach the service.
fn ports(rule: &RuleStatus) -> BTreeSet<u16> {
    service_port(rule).into_iter().chain([rule.port]).collect()
}

/// Returns the interface's subnet that an address belongs to, as address and prefix length.
pub(super) fn subnet(interface: &Interface, ip: IpAddr) -> Option<(IpAddr, u8)> {
    let fits = |(gateway, prefix): &&(IpAddr, u8)| {
        gateway.is_ipv4() == ip.is_ipv4() && Subnet::of(*gateway, *prefix).contains(ip)
    };
    interface.addresses.iter().find(fits).copied()
}

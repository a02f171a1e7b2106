//! What is to be tried, given what the daemon says and what the host has. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{
    api::protocol::{GatewayStatus, NamespaceStatus, RuleStatus, Status},
    planning::{
        inventory::Interface,
        policy::{State, Subnet},
        rule::{Protocol, RuleId},
    },
};

use super::Expected;

/// From where something is tried.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Place {
    /// A neighbour of the host, which knows no better than to send it everything.
    Lan,
    /// A bridge of the host, by its name.
    Bridge(String),
    /// Any other interface of the host's. Nothing is sent there; the kernel is asked.
    Interface {
        /// Its name.
        name: String,
        /// Its index.
        index: u32,
    },
    /// The namespace of a rule.
    Inside(RuleId),
}

/// Something to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trial {
    /// For which rule.
    pub(super) rule: RuleId,
    /// What.
    pub(super) attempt: Attempt,
    /// What should come of it.
    pub(super) expected: Expected,
}

/// How it is tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Attempt {
    /// A connection. If it should be open the kernel is asked as well who gets it.
    Connect {
        /// From there.
        from: Place,
        /// To there.
        to: SocketAddr,
        /// Who is to get it; `None` where nobody is.
        by: Option<By>,
    },
    /// Nothing is sent: the kernel is asked who would get a datagram.
    Ask {
        /// From there.
        from: Place,
        /// To there.
        to: SocketAddr,
        /// Who is to get it; `None` where nobody is.
        by: Option<By>,
    },
    /// An address of the rule's network on packets that come in elsewhere. Who sends them never sees an answer, so the kernel
    /// is asked who would get the first.
    Borrow {
        /// The bridge that the address is of.
        of: String,
        /// There they come in.
        at: Place,
        /// To there.
        to: SocketAddr,
    },
    /// The address of a container that the rule is for; asked like the above, since somebody has it.
    Listed {
        /// Which.
        source: IpAddr,
        /// There packets come in.
        at: Place,
        /// To there.
        to: SocketAddr,
        /// Who is to get it; `None` where nobody is.
        by: Option<By>,
    },
    /// An address that is none of the network's, on its bridge; asked like the above.
    Foreign {
        /// The bridge.
        at: Place,
        /// To there.
        to: SocketAddr,
    },
    /// Localhost of a namespace, dialled at an interface other than its loopback one. Asked like the above.
    Wire {
        /// In there.
        within: Place,
        /// To there.
        to: SocketAddr,
    },
    /// Nothing can be tried, and why.
    Nothing {
        /// What would have been dialled.
        what: String,
        /// Why not.
        why: String,
    },
}

/// Who is to get a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum By {
    /// The service's own listener, there or at the wildcard address that stands for it.
    Service(SocketAddr),
    /// A relay of the daemon.
    Relay,
}

/// The trials, and where they take place.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) trials: Vec<Trial>,
    /// The bridges, by name.
    pub(super) bridges: BTreeMap<String, Interface>,
    /// The namespaces of rules.
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
            .map(|i| Place::Interface { name: i.name.clone(), index: i.index })
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
    /// What some rule has containers of a bridge dial.
    dialled: BTreeSet<(&'a str, SocketAddr, Protocol)>,
    /// Interfaces with addresses, and bridges that neither a rule nor Docker knows: nothing is plugged into those, behind which
    /// the LAN may be.
    uplinks: Vec<Place>,
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

    fn closed(&mut self, rule: &RuleStatus, from: &Place, to: SocketAddr) {
        self.add(rule, attempt(rule, from.clone(), to, None), Expected::Closed);
    }

    /// What the rule is for.
    fn meant(&mut self, rule: &RuleStatus) {
        if rule.gateways.is_empty() {
            let what = format!("port {}", rule.port);
            let why = rule.why.clone().unwrap_or_else(|| "there is nothing to dial".to_owned());
            self.add(rule, Attempt::Nothing { what, why }, Expected::Open);
        }
        for gateway in &rule.gateways {
            let to = SocketAddr::new(gateway.address, rule.port);
            let from = match &gateway.namespace {
                None => Place::Bridge(gateway.interface.clone()),
                Some(namespace) => {
                    self.plan.namespaces.insert(rule.id(), namespace.clone());
                    Place::Inside(rule.id())
                }
            };
            let (by, expected) = match gateway.state {
                State::Steered => (target(rule, gateway).map(By::Service), Expected::Open),
                State::Relayed => (Some(By::Relay), Expected::Open),
                State::Waiting => (None, Expected::Refused),
                // Said by `status`; it is not promised.
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
            // What is tried has another address; a relay accepts it, and resets it.
            let by = by.filter(|by| *by == By::Relay);
            self.add(rule, attempt(rule, from, to, by), Expected::Refused);
        }
    }

    /// The dialled port and the service's on every address of the host, and localhost over the wire.
    fn lan(&mut self, rule: &RuleStatus) {
        // What a namespace dials is nothing of the host's.
        let ports =
            if rule.network.is_namespace() { service_port(rule).into_iter().collect() } else { ports(rule) };
        let localhost = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        // The kernel, asked, does not say that it drops such packets before it looks for anybody.
        let localhost = if rule.protocol == Protocol::Udp { &[][..] } else { &localhost[..] };
        for port in ports {
            for ip in self.host.clone().into_iter().chain(localhost.iter().copied()) {
                self.closed(rule, &Place::Lan, SocketAddr::new(ip, port));
            }
        }
    }

    /// From each bridge to everything that no rule opens for it: a rule's own gateways from other bridges, and of the
    /// host's addresses those on that bridge; from the rule's bridge every address of the host.
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
                    // Without an address of that family there is no way there, and none back.
                    let has_family = bridge.addresses.iter().any(|(ip, _)| ip.is_ipv4() == to.is_ipv4());
                    if has_family && !self.dialled.contains(&dialled_at(&bridge.name, to, rule)) {
                        self.closed(rule, &Place::Bridge(bridge.name.clone()), to);
                    }
                }
            }
        }
    }

    /// Addresses of the network's elsewhere, and those of others there. A relay accepts the latter and resets them.
    fn false_addresses(&mut self, rule: &RuleStatus) {
        for gateway in &rule.gateways {
            let to = SocketAddr::new(gateway.address, rule.port);
            if gateway.state == State::Steered {
                let at = Place::Bridge(gateway.interface.clone());
                self.add(rule, Attempt::Foreign { at, to }, Expected::Closed);
            }
            // Where the kernel does not tell the interface the documentation says what such packets get.
            let checked = match gateway.state {
                State::Steered => self.interface_check,
                State::Relayed => true,
                State::Waiting | State::Blocked => false,
            };
            if !checked {
                continue;
            }
            let others = self.plan.bridges.keys().filter(|name| **name != gateway.interface);
            let others = others.map(|name| Place::Bridge(name.clone())).chain([Place::Lan]);
            let places: Vec<_> = others.chain(self.uplinks.iter().cloned()).collect();
            // Any other address is refused anyway.
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
            self.add(rule, Attempt::Wire { within: Place::Inside(rule.id()), to }, Expected::Closed);
        }
    }
}

/// How it is tried who gets what comes from there.
fn attempt(rule: &RuleStatus, from: Place, to: SocketAddr, by: Option<By>) -> Attempt {
    match rule.protocol {
        Protocol::Tcp => Attempt::Connect { from, to, by },
        Protocol::Udp => Attempt::Ask { from, to, by },
    }
}

/// Where the rule's service is, for those who dial that gateway.
fn target(rule: &RuleStatus, gateway: &GatewayStatus) -> Option<SocketAddr> {
    let target: SocketAddr = rule.target.parse().ok()?;
    if target.is_ipv4() == gateway.address.is_ipv4() {
        return Some(target);
    }
    // A rule that names a port alone means that of either family, and is shown with the first.
    Some(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), target.port()))
}

fn service_port(rule: &RuleStatus) -> Option<u16> {
    rule.target.parse().ok().map(|target: SocketAddr| target.port())
}

/// Ports at which somebody else might come by the service.
fn ports(rule: &RuleStatus) -> BTreeSet<u16> {
    service_port(rule).into_iter().chain([rule.port]).collect()
}

/// The subnet of an interface's that an address belongs to.
pub(super) fn subnet(interface: &Interface, ip: IpAddr) -> Option<(IpAddr, u8)> {
    let fits = |(gateway, prefix): &&(IpAddr, u8)| {
        gateway.is_ipv4() == ip.is_ipv4() && Subnet::of(*gateway, *prefix).contains(ip)
    };
    interface.addresses.iter().find(fits).copied()
}

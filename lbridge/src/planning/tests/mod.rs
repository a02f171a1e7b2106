//! The planner's tests: scenarios that read like a host, and the law that a plan, carried out, leaves nothing
//! to plan.

mod accepted;
mod explain;
mod firewall;
mod law;
mod owner;
mod reach;
mod scenarios;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use lbridge_common::wire::EntryKey;

use super::{
    actual::Actual,
    desired::{BindScope, Desired, RedirectOutcome, State},
    firewall::{FirewallMode, FirewallState},
    hooks::PerHookSet,
    inventory::{
        Attachment, Container, DockerNetwork, EngineAvailability, Interface, Inventory, KernelFeatures,
        Listener, ListenerKind, Namespace, NamespaceId, NamespaceKey, NetnsRef, NetnsUnavailable, Steering,
        find_networks,
    },
    owner::incumbents,
    resolve::resolve,
    rule::{DatapathChoice, Network, Options, Origin, ProcessStart, Rule, Rules, Source},
};

/// A host to be described step by step.
#[derive(Debug, Clone)]
struct Host {
    inventory: Inventory,
    features: KernelFeatures,
    rules: Rules,
}

impl Host {
    /// A host with Docker, one network (`app`, 172.18.0.1/16 on br-app) and a current kernel.
    fn new() -> Self {
        let host = Self {
            inventory: Inventory { docker: EngineAvailability::Reachable, ..Inventory::default() },
            features: KernelFeatures {
                steer: Ok(Steering { interface_check: true, kernel_registers: true }),
                hooks: PerHookSet::from_fn(|_| Ok(())),
            },
            rules: Rules::default(),
        };
        host.network("app", "br-app").bridge("br-app", 7, &["172.18.0.1/16"])
    }

    fn network(mut self, name: &str, bridge: &str) -> Self {
        self.inventory.docker_networks.push(DockerNetwork {
            id: format!("{:0<64}", format!("{:x}", name.len() + 0xabc_def0_1234)),
            name: name.to_owned(),
            driver: "bridge".to_owned(),
            bridge: Some(bridge.to_owned()),
            ..DockerNetwork::default()
        });
        self
    }

    /// A container that runs, with its addresses on networks there are.
    fn container(mut self, name: &str, networks: &[(&str, &[&str])]) -> Self {
        let attachment = |(network, addresses): &(&str, &[&str])| Attachment {
            network: (*network).to_owned(),
            id: find_networks(&self.inventory.docker_networks, network).first().map(|known| known.id.clone()),
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        };
        let attachments = networks.iter().map(attachment).collect();
        let container = Container { running: true, attachments, netns: None };
        self.inventory.containers.insert(name.to_owned(), Ok(container));
        self
    }

    fn bridge(mut self, name: &str, index: u32, addresses: &[&str]) -> Self {
        let address = |text: &&str| {
            let (ip, prefix) = text.split_once('/').unwrap();
            (ip.parse::<IpAddr>().unwrap(), prefix.parse().unwrap())
        };
        let addresses = addresses.iter().map(address).collect();
        self.inventory.interfaces.push(Interface {
            index,
            name: name.to_owned(),
            is_bridge: true,
            is_port: false,
            addresses,
        });
        self
    }

    /// Has a rule's `network` lead to the namespace with this inode and these loopback addresses.
    fn namespace(mut self, network: &str, inode: u64, loopback: &[&str]) -> Self {
        let namespace = Namespace {
            key: NamespaceKey {
                id: NamespaceId { device: 4, inode },
                entrance: NetnsRef::Path(format!("/run/{network}").into()),
            },
            loopback: loopback.iter().map(|ip| ip.parse().unwrap()).collect(),
            address: None,
        };
        self.inventory.namespaces.insert(network.parse().unwrap(), Ok(namespace));
        self
    }

    fn no_namespace(mut self, network: &str, why: NetnsUnavailable) -> Self {
        self.inventory.namespaces.insert(network.parse().unwrap(), Err(why));
        self
    }

    fn listens(self, address: &str) -> Self {
        self.listens_as(address, ListenerKind::Tcp)
    }

    fn listens_as(mut self, address: &str, kind: ListenerKind) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let inode = 1000 + self.inventory.listeners.len() as u64;
        let single_family = address.is_ipv4() || address.ip().is_loopback();
        let uid = 0;
        self.inventory.listeners.push(Listener {
            address,
            inode,
            uid,
            single_family,
            bound_interface: 0,
            kind,
        });
        self
    }

    /// A UDP socket.
    fn takes_datagrams(mut self, address: &str) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let inode = 2000 + self.inventory.udp_sockets.len() as u64;
        let single_family = address.is_ipv4() || address.ip().is_loopback();
        let kind = ListenerKind::Udp;
        let uid = 0;
        self.inventory.udp_sockets.push(Listener {
            address,
            inode,
            uid,
            single_family,
            bound_interface: 0,
            kind,
        });
        self
    }

    /// Gives the sockets that are bound there to a user.
    fn owned_by(mut self, address: &str, uid: u32) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let inventory = &mut self.inventory;
        let sockets = inventory.listeners.iter_mut().chain(&mut inventory.udp_sockets);
        sockets.filter(|socket| socket.address == address).for_each(|socket| socket.uid = uid);
        self
    }

    /// Makes the wildcard listeners for IPv6 take IPv6 alone.
    fn v6_only(mut self) -> Self {
        let sockets = self.inventory.listeners.iter_mut().chain(&mut self.inventory.udp_sockets);
        sockets.filter(|socket| socket.address.is_ipv6()).for_each(|socket| socket.single_family = true);
        self
    }

    /// The same host, once the daemon has looked at it; it remembers whose the services are.
    fn looked_at(mut self) -> Self {
        self.inventory.incumbents = incumbents(&self.rules, &self.inventory, &self.inventory.incumbents);
        self
    }

    /// The same host with nobody listening.
    fn silent(mut self) -> Self {
        self.inventory.listeners.clear();
        self.inventory.udp_sockets.clear();
        self
    }

    fn allow(self, network: &str, port: &str) -> Self {
        self.allow_with(network, port, Source::Container, DatapathChoice::Auto)
    }

    fn allow_with(self, network: &str, port: &str, source: Source, path: DatapathChoice) -> Self {
        self.allow_for(network, port, source, path, &[])
    }

    fn allow_for(
        mut self,
        network: &str,
        port: &str,
        source: Source,
        path: DatapathChoice,
        from: &[&str],
    ) -> Self {
        let rule = Rule {
            options: Options {
                from: from.iter().map(|name| (*name).to_owned()).collect(),
                source,
                path,
                ..Options::default()
            },
            process: network.starts_with("pid:").then(|| ProcessStart { ticks: 1, boot: String::new() }),
            ..Rule::new(network.parse().unwrap(), port.parse().unwrap())
        };
        self.rules = self.rules.allow([rule], Origin::Cli).unwrap();
        self
    }

    /// Gives a rule that there is `--localhost`.
    fn with_localhost(mut self, network: &str, port: u16) -> Self {
        let network: Network = network.parse().unwrap();
        let rule = self.rules.iter().find(|(id, ..)| id.network == network && id.port == port);
        let mut rule = rule.unwrap().1.clone();
        rule.options.localhost = true;
        let id = rule.id();
        self.rules = self.rules.deny([id]).unwrap().allow([rule], Origin::Cli).unwrap();
        self
    }

    /// One line for each address of the containers' own: `127.0.0.1:80 to 172.18.0.1 steered`.
    fn dials(&self) -> Vec<String> {
        let outcomes = self.desired().outcomes;
        let told = |dial: &RedirectOutcome| {
            let what = match dial.gateway {
                Some(gateway) => format!("{} to {gateway}", dial.address),
                None => dial.address.to_string(),
            };
            line(&what, dial.outcome.state, dial.outcome.why())
        };
        outcomes.iter().flat_map(|outcome| &outcome.redirects).map(told).collect()
    }

    fn desired(&self) -> Desired {
        resolve(&self.rules, &self.inventory, &self.features, FirewallMode::default())
    }

    /// One line for each gateway (or rule without one): `172.18.0.1:80 steered`.
    fn states(&self) -> Vec<String> {
        let mut lines = vec![];
        for rule in self.desired().outcomes {
            if let Some(without) = rule.without_gateway {
                lines.push(line(&rule.rule.id().to_string(), without.state, without.why()));
            }
            for gateway in rule.gateways {
                lines.push(line(
                    &gateway.relay_key.address.to_string(),
                    gateway.outcome.state,
                    gateway.outcome.why(),
                ));
            }
        }
        lines
    }
}

/// The keys under which the relays that a desired state wants can be reached once they are open.
fn relay_sockets(desired: &Desired) -> BTreeSet<EntryKey> {
    let by_entry = desired.relays.iter().filter(|(_, spec)| spec.by_entry);
    by_entry.filter_map(|(key, _)| key.entry()).collect()
}

/// The actual state once everything that a desired state wants is in force, behind a firewall.
fn in_force(desired: &Desired, firewall_state: FirewallState) -> Actual {
    Actual {
        kernel: desired.kernel.clone(),
        relay_sockets: relay_sockets(desired),
        relays: desired.relays.clone(),
        registered: desired.listeners.keys().copied().collect(),
        accepted: firewall_state.accepts.keys().map(|(_, opening)| opening.accepted()).collect(),
        firewall_state,
        ..Actual::default()
    }
}

fn br_app() -> BindScope {
    BindScope::Bridge { interface: "br-app".to_owned(), ifindex: 7 }
}

fn line(what: &str, state: State, why: Option<String>) -> String {
    let state = format!("{state:?}").to_lowercase();
    why.map_or_else(|| format!("{what} {state}"), |why| format!("{what} {state} ({why})"))
}

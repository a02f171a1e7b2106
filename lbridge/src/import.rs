//! import: `lbridge import` turns socat units into rules. It inspects, and decides what to ask of the daemon;
//! it leaves alone what is the administrator's, units and firewall rules. Imports migrate, host, docker,
//! planning and the API's protocol.

use std::{collections::BTreeMap, net::IpAddr, path::Path};

use anyhow::Context as _;

use crate::{
    api::protocol::{DockerStatus, RuleStatus, Status},
    docker::client,
    host::interfaces,
    migrate::{
        socat::{self, Forward},
        ufw::{self, Allowed},
        unit::{self, Service},
    },
    planning::{
        inventory::{DockerNetwork, EngineKind, Interface},
        rule::{Network, Options, Origin, PortSpec, Protocol, Rule, RuleId, Source, Target},
    },
};

/// The result for each unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Units that become rules.
    pub taken: Vec<Taken>,
    /// Units that do not, each with the reason.
    pub left: Vec<(String, String)>,
}

/// A unit whose socat becomes a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The unit's name.
    pub unit: String,
    /// True if the unit runs nothing else.
    pub alone: bool,
    /// The rule that replaces the socat.
    pub rule: Rule,
    /// The address that containers dial, before and after.
    pub gateway: IpAddr,
    /// The rule's relation to the existing rules.
    pub standing: Standing,
    /// UFW's rules for it, in the form that `ufw` takes.
    pub ufw: Vec<String>,
}

/// The relation of a rule to the existing ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// The rule has yet to be made.
    New,
    /// An existing rule leads to the same target.
    There,
    /// An existing rule leads elsewhere; describes the conflict.
    Conflict(String),
}

/// The bridges that a socat may listen on.
#[derive(Debug, Default)]
struct Bridges {
    interfaces: Vec<Interface>,
    networks: Vec<DockerNetwork>,
    /// The reason why Docker's networks are unknown although they should be known; `None` otherwise.
    without_docker: Option<String>,
}

/// Reads units and firewall rules, and compares them with the daemon's rules.
pub async fn plan(source: Source, status: &Status) -> anyhow::Result<Plan> {
    let services = unit::services(&unit::FOLDERS.map(Path::new)).context("cannot read the units")?;
    let mut bridges = Bridges { interfaces: interfaces::list().await?, ..Bridges::default() };
    if status.docker != DockerStatus::Off {
        match client::engine().await {
            Ok(engine) => bridges.networks = engine.networks,
            Err(error) => bridges.without_docker = Some(format!("{error:#}")),
        }
    }
    let allowed = match ufw::allowed(Path::new(ufw::FOLDER)) {
        Ok(allowed) => allowed,
        Err(error) => anyhow::bail!("cannot read UFW's rules: {error}; use sudo"),
    };
    Ok(turned(&services, &bridges, &allowed, source, &status.rules))
}

fn turned(
    services: &[Service],
    bridges: &Bridges,
    allowed: &[Allowed],
    source: Source,
    rules: &[RuleStatus],
) -> Plan {
    let mut plan = Plan::default();
    let mut seen: BTreeMap<RuleId, String> = BTreeMap::new();
    for service in services {
        for command in &service.commands {
            let turned = match command {
                Ok(words) if socat::is_socat(words) => {
                    socat::forward(words).and_then(|forward| rule(&forward, bridges, source, &service.name))
                }
                Ok(words) if words.iter().any(|word| word.contains("socat")) => {
                    Err("it runs socat through another program".to_owned())
                }
                // It is also unknown whether this is a socat; its name tells what it was meant for.
                Err(why) if service.name.contains("socat") => Err(why.clone()),
                Ok(_) | Err(_) => continue,
            };
            let turned = turned.and_then(|(rule, gateway, bridge)| match seen.get(&rule.id()) {
                Some(other) => Err(format!("it serves what {other} serves: {}", rule.id())),
                None => Ok((rule, gateway, bridge)),
            });
            match turned {
                Err(why) => plan.left.push((service.name.clone(), why)),
                Ok((rule, gateway, bridge)) => {
                    seen.insert(rule.id(), service.name.clone());
                    let port = rule.spec.port;
                    let ufw = allowed.iter().filter(|allowed| {
                        allowed.endpoint() == Some((gateway, port)) && allowed.admits(&bridge, gateway, port)
                    });
                    plan.taken.push(Taken {
                        unit: service.name.clone(),
                        alone: service.commands.len() == 1,
                        standing: standing(&rule, rules),
                        ufw: ufw.filter_map(Allowed::words).collect(),
                        rule,
                        gateway,
                    });
                }
            }
        }
    }
    plan
}

/// Returns the rule that replaces a socat, the address that is dialled, and the bridge.
fn rule(
    forward: &Forward,
    bridges: &Bridges,
    source: Source,
    unit: &str,
) -> Result<(Rule, IpAddr, String), String> {
    let (network, gateway, bridge) = network(forward, bridges)?;
    let spec = PortSpec { port: forward.port, protocol: Protocol::Tcp, target: forward.target.clone() };
    let rule = Rule {
        // The service would see root as its peer; the daemon requires the rule to say so.
        options: Options {
            source: if matches!(forward.target, Target::Unix(_)) { Source::Loopback } else { source },
            comment: Some(format!("was {}", unit.escape_debug())),
            ..Options::default()
        },
        ..Rule::new(network, spec)
    };
    Ok((rule, gateway, bridge))
}

fn network(forward: &Forward, bridges: &Bridges) -> Result<(Network, IpAddr, String), String> {
    let has =
        |interface: &&Interface, address: IpAddr| interface.addresses.iter().any(|(its, _)| *its == address);
    let mut interfaces = bridges.interfaces.iter();
    let (interface, gateway) = match (forward.address, &forward.interface) {
        (None, None) => {
            return Err("it listens on every address (no bind=), which names no network".to_owned());
        }
        (Some(address), _) if address.is_loopback() => {
            return Err(format!("it listens on {address}, which is not on a bridge"));
        }
        (Some(address), None) => {
            let found = interfaces.find(|interface| has(interface, address));
            (found.ok_or_else(|| format!("no interface of this host has the address {address}"))?, address)
        }
        (address, Some(name)) => {
            let found = interfaces.find(|interface| interface.name == *name);
            let found = found.ok_or_else(|| format!("there is no interface {name}"))?;
            let first = found.addresses.first().map(|(address, _)| *address);
            let gateway = address.or(first).filter(|address| has(&found, *address));
            (found, gateway.ok_or_else(|| format!("{name} has no such address"))?)
        }
    };
    let name = &interface.name;
    if !interface.is_bridge {
        return Err(format!("{gateway} is the address of {name}, which is not a bridge"));
    }
    let network = match (
        bridges.networks.iter().find(|network| network.bridge.as_ref() == Some(name)),
        &bridges.without_docker,
        engine_that_names(name),
    ) {
        (Some(network), ..) => Network::Docker(network.name.clone()),
        (None, Some(why), Some(engine)) => {
            return Err(format!("{name} may be of a {engine} network, and {engine} does not answer: {why}"));
        }
        (None, ..) => Network::Bridge(name.clone()),
    };
    Ok((network, gateway, name.clone()))
}

/// Returns the engine that gives such names to its bridges. Podman gives a name again, to another network, so
/// that a rule must not name its bridge.
fn engine_that_names(bridge: &str) -> Option<EngineKind> {
    if bridge == "docker0" || bridge.starts_with("br-") {
        return Some(EngineKind::Docker);
    }
    (bridge.starts_with("podman") || bridge.starts_with("cni-podman")).then_some(EngineKind::Podman)
}

fn standing(rule: &Rule, rules: &[RuleStatus]) -> Standing {
    let target = rule.spec.target.to_string();
    // A rule from a label is removed with its label, and ranks below rules that were made explicitly.
    let mut made = rules.iter().filter(|other| other.origin != Origin::Label);
    match made.find(|other| other.network == rule.network && other.port == rule.spec.port) {
        None => Standing::New,
        Some(there) if there.target == target => Standing::There,
        Some(there) => Standing::Conflict(there.target.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge(name: &str, address: &str, is_bridge: bool) -> Interface {
        Interface {
            index: 1,
            name: name.to_owned(),
            is_bridge,
            is_port: false,
            addresses: vec![(address.parse().unwrap(), 16)],
        }
    }

    fn bridges() -> Bridges {
        let network = DockerNetwork {
            id: "0123".to_owned(),
            name: "app".to_owned(),
            driver: "bridge".to_owned(),
            bridge: Some("br-0123".to_owned()),
            ..DockerNetwork::default()
        };
        Bridges {
            interfaces: vec![
                bridge("br-0123", "172.18.0.1", true),
                bridge("virbr0", "10.7.0.1", true),
                bridge("eth0", "192.0.2.1", false),
            ],
            networks: vec![network],
            without_docker: None,
        }
    }

    fn services(commands: &[&str]) -> Vec<Service> {
        let service = |(number, command): (usize, &&str)| Service {
            name: format!("socat-{number}.service"),
            enabled: true,
            commands: vec![Ok(command.split(' ').map(str::to_owned).collect())],
        };
        commands.iter().enumerate().map(service).collect()
    }

    fn plan(commands: &[&str], bridges: &Bridges) -> Plan {
        turned(&services(commands), bridges, &[], Source::Container, &[])
    }

    #[test]
    fn addresses_name_networks() {
        for (options, rule) in [
            ("bind=172.18.0.1", Ok("app 80")),
            ("bind=10.7.0.1", Ok("bridge:virbr0 80")),
            ("so-bindtodevice=virbr0", Ok("bridge:virbr0 80")),
            ("fork", Err("no bind=")),
            ("bind=192.0.2.1", Err("not a bridge")),
            ("bind=192.0.2.2", Err("no interface")),
            ("bind=127.0.0.1", Err("not on a bridge")),
            ("bind=10.7.0.1,so-bindtodevice=br-0123", Err("no such address")),
        ] {
            let plan = plan(&[&format!("socat TCP-LISTEN:80,{options} TCP:127.0.0.1:81")], &bridges());
            match rule {
                Ok(id) => assert_eq!(plan.taken[0].rule.id().to_string(), id),
                Err(says) => assert!(plan.left[0].1.contains(says), "{options}: {plan:?}"),
            }
            assert_eq!(plan.taken.len() + plan.left.len(), 1);
        }
    }

    #[test]
    fn without_docker_its_bridges_have_no_name() {
        let bridges = Bridges { networks: vec![], without_docker: Some("away".to_owned()), ..bridges() };
        let plan = plan(
            &[
                "socat TCP-L:80,bind=172.18.0.1 TCP:127.0.0.1:80",
                "socat TCP-L:80,bind=10.7.0.1 TCP:127.0.0.1:80",
            ],
            &bridges,
        );
        assert!(plan.left[0].1.contains("away"), "{plan:?}");
        assert_eq!(plan.taken[0].rule.id().to_string(), "bridge:virbr0 80");
    }

    #[test]
    fn one_rule_for_two_units_is_named() {
        let listen = "socat TCP-LISTEN:80,bind=10.7.0.1";
        let commands = [format!("{listen} TCP:127.0.0.1:80"), format!("{listen} TCP:127.0.0.1:81")];
        let plan = plan(&commands.each_ref().map(String::as_str), &bridges());
        assert_eq!((plan.taken.len(), plan.left.len()), (1, 1), "{plan:?}");
        assert!(plan.left[0].1.contains("socat-0.service"), "{plan:?}");
    }

    #[test]
    fn other_services_are_none_of_its_business() {
        let mut services = services(&["/usr/sbin/nginx -g daemon", "/bin/sh -c socat"]);
        services[0].name = "nginx.service".to_owned();
        let plan = turned(&services, &bridges(), &[], Source::Container, &[]);
        assert_eq!((plan.taken.len(), plan.left.len()), (0, 1), "{plan:?}");
        assert!(plan.left[0].1.contains("another program"), "{plan:?}");
    }

    #[test]
    fn unix_sockets_see_a_local_peer() {
        let plan = plan(&["socat TCP-L:80,bind=10.7.0.1 UNIX-CONNECT:/run/x"], &bridges());
        assert_eq!(plan.taken[0].rule.options.source, Source::Loopback);
    }
}

//! Which bridge a network is.

use super::Resolver;
use crate::planning::{
    hint,
    inventory::{DockerNetwork, DockerPresence, Interface, find_networks},
    policy::{Outcome, State},
    rule::Network,
};

impl Resolver<'_> {
    pub(super) fn bridge(&self, network: &Network) -> Result<&Interface, Outcome> {
        let (name, of_engine) = match network {
            Network::Container(_) | Network::Netns(_) | Network::Process(_) => {
                return Err(Outcome::because(State::Blocked, "it is no bridge"));
            }
            Network::Bridge(name) => (name, None),
            Network::Docker(name) => match find_networks(&self.inventory.docker_networks, name)[..] {
                [] => return Err(self.unknown_network(name)),
                [network] => match &network.bridge {
                    Some(bridge) => (bridge, Some(network)),
                    None => return Err(without_bridge(network)),
                },
                [..] => {
                    let why = format!("several Docker networks are called {name}; name the id of one");
                    return Err(Outcome::because(State::Blocked, why));
                }
            },
        };
        match self.inventory.interface(name) {
            // An uplink here would open the port to the LAN.
            Some(interface) if !interface.is_bridge => Err(Outcome::because(
                State::Blocked,
                format!("{name} is not a bridge; name the bridge that the containers are on"),
            )),
            // It may be another network's by now.
            Some(interface) if of_engine.is_some_and(|network| !network.means(interface)) => {
                let why = format!("{name} is newer than what the engine said of it");
                Err(Outcome::because(State::Waiting, why))
            }
            Some(interface) => Ok(interface),
            None => {
                let comes = of_engine.is_some_and(|network| network.bridge_index.is_some());
                let comes = if comes { "; it comes with the network's first container" } else { "" };
                Err(Outcome::because(State::Waiting, format!("there is no interface {name}{comes}")))
            }
        }
    }

    fn unknown_network(&self, name: &str) -> Outcome {
        match self.inventory.docker {
            DockerPresence::Off => Outcome::because(
                State::Blocked,
                "the daemon runs with --no-docker; name the bridge instead: bridge:IFNAME",
            ),
            DockerPresence::Away => Outcome::because(
                State::Waiting,
                format!("Docker is away, and network {name} was not seen before"),
            ),
            DockerPresence::Reachable => {
                let hint = hint::unknown_network(name, self.inventory);
                Outcome::because(State::Waiting, format!("no Docker network {name}{hint}"))
            }
        }
    }
}

fn without_bridge(network: &DockerNetwork) -> Outcome {
    let why = match network.driver.as_str() {
        "host" => "its containers are in the host's own namespace, where localhost is the host's".to_owned(),
        driver => {
            format!(
                "driver {driver} gives the host no bridge; allow its containers one by one: container:NAME"
            )
        }
    };
    Outcome::because(State::Blocked, why)
}

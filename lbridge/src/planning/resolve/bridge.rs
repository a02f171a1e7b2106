//! Bridge: finds the bridge that a network is.

use super::Resolver;
use crate::planning::{
    desired::{Outcome, State},
    hint,
    inventory::{DockerNetwork, EngineAvailability, Interface, find_networks},
    reason::Reason,
    rule::Network,
};

impl Resolver<'_> {
    pub(super) fn bridge(&self, network: &Network) -> Result<&Interface, Outcome> {
        let (name, of_engine) = match network {
            Network::Container(_) | Network::Netns(_) | Network::Process(_) => {
                return Err(Outcome::because(State::Blocked, Reason::NoBridge));
            }
            Network::Bridge(name) => (name, None),
            Network::Docker(name) => match find_networks(&self.inventory.docker_networks, name)[..] {
                [] => return Err(self.unknown_network(name)),
                [network] => match &network.bridge {
                    Some(bridge) => (bridge, Some(network)),
                    None => return Err(without_bridge(network)),
                },
                [..] => {
                    return Err(Outcome::because(State::Blocked, Reason::AmbiguousNetwork(name.clone())));
                }
            },
        };
        match self.inventory.interface(name) {
            // An uplink here would open the port to the LAN.
            Some(interface) if !interface.is_bridge => {
                Err(Outcome::because(State::Blocked, Reason::NotABridge(name.clone())))
            }
            // It may be another network's by now.
            Some(interface) if of_engine.is_some_and(|network| !network.means(interface)) => {
                Err(Outcome::because(State::Waiting, Reason::BridgeNewer(name.clone())))
            }
            Some(interface) => Ok(interface),
            None => {
                let comes = of_engine.is_some_and(|network| network.bridge_index.is_some());
                Err(Outcome::because(State::Waiting, Reason::NoInterface { name: name.clone(), comes }))
            }
        }
    }

    fn unknown_network(&self, name: &str) -> Outcome {
        match self.inventory.docker {
            EngineAvailability::Off => Outcome::because(State::Blocked, Reason::EngineOff),
            EngineAvailability::Away => Outcome::because(State::Waiting, Reason::EngineAway(name.to_owned())),
            EngineAvailability::Reachable => {
                let hint = hint::unknown_network(name, self.inventory);
                Outcome::because(State::Waiting, Reason::NoSuchNetwork { name: name.to_owned(), hint })
            }
        }
    }
}

fn without_bridge(network: &DockerNetwork) -> Outcome {
    let reason = match network.driver.as_str() {
        "host" => Reason::HostNetwork,
        driver => Reason::DriverWithoutBridge(driver.to_owned()),
    };
    Outcome::because(State::Blocked, reason)
}

//! The engine's networks and containers, as the rest of the program wants them.

use std::net::IpAddr;

use anyhow::Context as _;
use bollard::{
    Docker,
    errors::Error,
    models::{ContainerInspectResponse, EndpointSettings, Network},
    query_parameters::{InspectContainerOptions, ListNetworksOptions},
};

use crate::planning::inventory::DockerNetwork;

use super::watch::{Container, Sighting};

const BRIDGE_NAME: &str = "com.docker.network.bridge.name";

/// Lists the engine's networks, in order of name.
pub(super) async fn networks(docker: &Docker) -> anyhow::Result<Vec<DockerNetwork>> {
    let networks =
        docker.list_networks(None::<ListNetworksOptions>).await.context("cannot list Docker's networks")?;
    let mut networks: Vec<_> = networks.into_iter().filter_map(network).collect();
    networks.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    Ok(networks)
}

fn network(network: Network) -> Option<DockerNetwork> {
    let (id, name, driver) = (network.id?, network.name?, network.driver.unwrap_or_default());
    let chosen = network.options.unwrap_or_default().remove(BRIDGE_NAME).filter(|name| !name.is_empty());
    let bridge = match driver.as_str() {
        // What the bridge driver does where the option names no bridge.
        "bridge" => Some(chosen.unwrap_or_else(|| format!("br-{}", id.get(..12).unwrap_or(&id)))),
        _ => None,
    };
    Some(DockerNetwork { id, name, driver, bridge, ..DockerNetwork::default() })
}

/// The container of this name or id. What the engine has to say against one container is that one's state; an error
/// is the engine's own.
pub(super) async fn container(docker: &Docker, name: &str) -> anyhow::Result<Sighting> {
    match docker.inspect_container(name, None::<InspectContainerOptions>).await {
        Ok(container) => Ok(meant(container, name)),
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(Ok(None)),
        Err(Error::DockerResponseServerError { message, .. }) => {
            Ok(Err(format!("Docker says: {}", message.replace('\n', " "))))
        }
        Err(error) => Err(error).with_context(|| format!("cannot inspect container {name}")),
    }
}

/// The engine takes any beginning of an id for its container: `db` is one in 256. Only what Docker prints of an id is one
/// here, and a name that reads so is nobody's: it may be another's id.
fn meant(container: ContainerInspectResponse, name: &str) -> Sighting {
    const SHORT_ID: usize = 12;
    let id = container.id.as_deref().unwrap_or_default();
    let reads_as_id = name.len() >= SHORT_ID && name.bytes().all(|b| b.is_ascii_hexdigit());
    if reads_as_id && id.starts_with(name) {
        return Ok(described(container));
    }
    let is_named = container.name.as_deref().is_some_and(|its| its.trim_start_matches('/') == name);
    match (is_named, reads_as_id) {
        (true, false) => Ok(described(container)),
        (true, true) => Err(format!("{name} is the name of a container, and reads like an id; rename it")),
        (false, _) => Ok(None),
    }
}

fn described(container: ContainerInspectResponse) -> Option<Container> {
    let pid = container.state.and_then(|state| u32::try_from(state.pid?).ok()).filter(|pid| *pid != 0);
    let networks = container.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let mut networks: Vec<_> = networks.into_iter().collect();
    networks.sort_by(|(a, _), (b, _)| a.cmp(b));
    let address = networks.iter().find_map(|(_, endpoint)| address(endpoint));
    let networks = networks.into_iter().map(|(name, _)| name).collect();
    Some(Container { id: container.id?, pid, address, networks })
}

fn address(endpoint: &EndpointSettings) -> Option<IpAddr> {
    let addresses = [&endpoint.ip_address, &endpoint.global_ipv6_address];
    // The engine lets networks have any; none of these may be shown to a service.
    let is_a_containers = |ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast();
    addresses.into_iter().flatten().filter_map(|text| text.parse().ok()).find(is_a_containers)
}

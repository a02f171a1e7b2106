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

use super::watch::Container;

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
    Some(DockerNetwork { id, name, driver, bridge })
}

/// The container that the engine knows by this name or id.
pub(super) async fn container(docker: &Docker, name: &str) -> anyhow::Result<Option<Container>> {
    match docker.inspect_container(name, None::<InspectContainerOptions>).await {
        Ok(container) => Ok(described(container)),
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot inspect container {name}")),
    }
}

fn described(container: ContainerInspectResponse) -> Option<Container> {
    let pid = container.state.and_then(|state| u32::try_from(state.pid?).ok()).filter(|pid| *pid != 0);
    let networks = container.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let mut networks: Vec<_> = networks.into_iter().collect();
    networks.sort_by(|(a, _), (b, _)| a.cmp(b));
    let address = networks.iter().find_map(|(_, endpoint)| address(endpoint));
    Some(Container { id: container.id?, pid, address })
}

fn address(endpoint: &EndpointSettings) -> Option<IpAddr> {
    let addresses = [&endpoint.ip_address, &endpoint.global_ipv6_address];
    addresses.into_iter().flatten().find_map(|text| text.parse().ok())
}

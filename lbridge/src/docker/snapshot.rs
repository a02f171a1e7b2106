//! The engine's list of networks, as planning wants it.

use anyhow::Context as _;
use bollard::{Docker, models::Network, query_parameters::ListNetworksOptions};

use crate::planning::inventory::DockerNetwork;

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

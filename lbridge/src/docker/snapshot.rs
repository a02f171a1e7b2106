//! Snapshot: lists the engine's networks and containers, and converts them to planning's types.

use std::{collections::HashMap, net::IpAddr};

use anyhow::Context as _;
use bollard::{
    Docker,
    errors::Error,
    models::{ContainerInspectResponse, ContainerSummary, EndpointSettings, Network},
    query_parameters::{InspectContainerOptions, ListContainersOptions, ListNetworksOptions},
};
use nix::net::if_::if_nametoindex;

use crate::planning::{
    inventory::{Attachment, DockerNetwork, EngineKind},
    labels::{ALLOW, Kind, Labelled},
};

use super::{
    engine::Engine,
    libpod,
    view::{Container, ContainerLookup},
};

const BRIDGE_NAME: &str = "com.docker.network.bridge.name";

/// Lists the engine's networks, sorted by name.
pub(super) async fn networks(docker: &Docker, engine: &Engine) -> anyhow::Result<Vec<DockerNetwork>> {
    // The bridges first, see `of_podman`.
    let bridges = match &engine.libpod {
        Some(libpod) => libpod.networks().await?.into_iter().map(seen).collect(),
        None => HashMap::new(),
    };
    let networks = docker.list_networks(None::<ListNetworksOptions>).await;
    let networks = networks.with_context(|| format!("cannot list {}'s networks", engine.product))?;
    let networks = networks.into_iter().filter_map(|network| match engine.product {
        EngineKind::Docker => of_docker(network),
        EngineKind::Podman => of_podman(network, engine, &bridges),
    });
    let mut networks: Vec<_> = networks.map(|network| on_this_host(network, engine)).collect();
    networks.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    Ok(networks)
}

fn of_docker(network: Network) -> Option<DockerNetwork> {
    let (id, name, driver) = (network.id?, network.name?, network.driver.unwrap_or_default());
    let chosen = network.options.unwrap_or_default().remove(BRIDGE_NAME).filter(|name| !name.is_empty());
    let bridge = match driver.as_str() {
        // The bridge driver's default name, if the option names no bridge.
        "bridge" => Some(chosen.unwrap_or_else(|| format!("br-{}", id.get(..12).unwrap_or(&id)))),
        _ => None,
    };
    Some(DockerNetwork { id, name, driver, bridge, ..DockerNetwork::default() })
}

/// Pairs a Podman network, by its id, with the index of the interface that now has the name of its bridge; 0
/// if none has.
fn seen(network: libpod::Network) -> (String, (libpod::Network, u32)) {
    let index = network.bridge().and_then(|name| if_nametoindex(name).ok()).unwrap_or_default();
    (network.id.clone(), (network, index))
}

/// Converts a network of Podman's.
///
/// Podman makes a bridge together with its network's first container, and names it podmanN with the first
/// free N. The next network may get the name later, and Podman does not report that. But a network keeps its
/// bridge's name for as long as the network exists. So the interface that had the name between two lists that
/// both contain the network is its bridge.
fn of_podman(
    network: Network,
    engine: &Engine,
    bridges: &HashMap<String, (libpod::Network, u32)>,
) -> Option<DockerNetwork> {
    let (id, name, driver) = (network.id?, network.name?, network.driver.unwrap_or_default());
    if engine.libpod.is_none() {
        let driver = format!("{driver} (of Podman {}, which does not report its bridge)", engine.version);
        return Some(DockerNetwork { id, name, driver, ..DockerNetwork::default() });
    }
    // A network that is newer than the first list is in the next one.
    let (network, index) = bridges.get(&id)?;
    let bridge = network.bridge().map(str::to_owned);
    Some(DockerNetwork {
        id,
        driver: network.driver(),
        bridge_index: bridge.as_ref().map(|_| *index),
        bridge,
        // The default network is called `podman`, and in Docker's API `bridge`.
        other_name: (name != network.name).then_some(name),
        name: network.name.clone(),
    })
}

/// Removes the bridge from a network of a rootless engine. Its bridges are in a network namespace of its own;
/// on the host, other interfaces may have their names.
fn on_this_host(network: DockerNetwork, engine: &Engine) -> DockerNetwork {
    if !engine.rootless || network.bridge.is_none() {
        return network;
    }
    let driver = format!("{} (rootless)", network.driver);
    DockerNetwork { driver, bridge: None, bridge_index: None, ..network }
}

/// Lists the networks and the running containers that have lbridge's labels, sorted.
pub(super) async fn labelled(docker: &Docker) -> anyhow::Result<Vec<Labelled>> {
    let filters = || Some(HashMap::from([("label".to_owned(), vec![ALLOW.to_owned()])]));
    let networks = docker.list_networks(Some(ListNetworksOptions { filters: filters() }));
    let networks = networks.await.context("cannot list the networks with labels")?;
    // Without `all`, only running containers are listed, including one that is being restarted.
    let options = ListContainersOptions { filters: filters(), ..ListContainersOptions::default() };
    let containers = docker.list_containers(Some(options));
    let containers = containers.await.context("cannot list the containers with labels")?;
    let networks = networks.into_iter().filter_map(labelled_network);
    let mut labelled: Vec<_> =
        networks.chain(containers.into_iter().filter_map(labelled_container)).collect();
    labelled.sort();
    Ok(labelled)
}

fn labelled_network(network: Network) -> Option<Labelled> {
    let (id, name) = (network.id?, network.name?);
    Labelled::new(Kind::Network, (id.clone(), name), 0, vec![id], &network.labels?)
}

fn labelled_container(container: ContainerSummary) -> Option<Labelled> {
    let id = container.id?;
    let name = container.names.and_then(|names| names.into_iter().next()).unwrap_or_else(|| id.clone());
    let name = name.trim_start_matches('/').to_owned();
    let networks = container.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let id_of = |(name, endpoint): (String, EndpointSettings)| {
        endpoint.network_id.filter(|id| !id.is_empty()).unwrap_or(name)
    };
    let networks = networks.into_iter().map(id_of).collect();
    let created = container.created.unwrap_or_default();
    Labelled::new(Kind::Container, (id, name), created, networks, &container.labels?)
}

/// Looks up the container of this name or id. What the engine reports against a single container is part of
/// the lookup; an error is a failure of the engine itself.
pub(super) async fn container(
    docker: &Docker,
    engine: &Engine,
    name: &str,
) -> anyhow::Result<ContainerLookup> {
    let found = docker.inspect_container(name, None::<InspectContainerOptions>).await;
    let found = match (found, &engine.libpod) {
        // A status that only Podman has, or anything else that bollard does not expect.
        (Err(Error::JsonDataError { .. }), Some(libpod)) => {
            let container = libpod.container(name).await;
            Ok(container.with_context(|| format!("cannot inspect container {name}"))?)
        }
        (found, _) => found,
    };
    match found {
        Ok(container) => Ok(match meant(container, name) {
            ContainerLookup::Found(container) => ContainerLookup::Found(as_trusted(container, engine)),
            other => other,
        }),
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(ContainerLookup::NotFound),
        Err(Error::DockerResponseServerError { message, .. }) => {
            Ok(ContainerLookup::Failed(format!("the engine says: {}", message.replace('\n', " "))))
        }
        Err(error) => Err(error).with_context(|| format!("cannot inspect container {name}")),
    }
}

/// Checks that the engine found the container that was meant. The engine accepts any beginning of an id: `db`
/// matches one container in 256. Here only the full id or its first 12 digits or more count as an id. A name
/// that reads like an id is refused, since it may be another container's id.
fn meant(container: ContainerInspectResponse, name: &str) -> ContainerLookup {
    const SHORT_ID: usize = 12;
    let id = container.id.as_deref().unwrap_or_default();
    let reads_as_id = name.len() >= SHORT_ID && name.bytes().all(|b| b.is_ascii_hexdigit());
    if reads_as_id && id.starts_with(name) {
        return described(container);
    }
    let is_named = container.name.as_deref().is_some_and(|its| its.trim_start_matches('/') == name);
    match (is_named, reads_as_id) {
        (true, false) => described(container),
        (true, true) => ContainerLookup::Failed(format!(
            "{name} is the name of a container, and reads like an id; rename it"
        )),
        (false, _) => ContainerLookup::NotFound,
    }
}

/// Removes the addresses of a rootless engine's container. The engine's networks are not the host's: a
/// service must not see addresses that mean another container on the host.
fn as_trusted(mut container: Container, engine: &Engine) -> Container {
    if engine.rootless {
        container.attachments.iter_mut().for_each(|there| there.addresses.clear());
    }
    container
}

/// Describes a container. One without an id, which no engine answers, counts as none.
fn described(container: ContainerInspectResponse) -> ContainerLookup {
    let pid = container.state.and_then(|state| u32::try_from(state.pid?).ok()).filter(|pid| *pid != 0);
    let networks = container.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let mut attachments: Vec<_> =
        networks.into_iter().map(|(name, endpoint)| attachment(name, &endpoint)).collect();
    attachments.sort_by(|a, b| a.network.cmp(&b.network));
    match container.id {
        Some(id) => ContainerLookup::Found(Container { id, pid, running: pid.is_some(), attachments }),
        None => ContainerLookup::NotFound,
    }
}

fn attachment(network: String, endpoint: &EndpointSettings) -> Attachment {
    let addresses = [&endpoint.ip_address, &endpoint.global_ipv6_address];
    // The engine accepts any subnet for a network; a service must not see these addresses.
    let is_a_containers = |ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast();
    let addresses = addresses.into_iter().flatten().filter_map(|text| text.parse().ok());
    let addresses = addresses.filter(is_a_containers).collect();
    // Podman puts the network's name there.
    let id = endpoint.network_id.clone().filter(|id| !id.is_empty() && *id != network);
    Attachment { network, id, addresses }
}

/// Lists the names of all containers, also of those that do not run, sorted.
pub(super) async fn container_names(docker: &Docker) -> anyhow::Result<Vec<String>> {
    containers_of(docker, None).await
}

/// Lists the names of the containers on a network, given by its name or id, or of all containers.
pub(super) async fn containers_of(docker: &Docker, network: Option<&str>) -> anyhow::Result<Vec<String>> {
    let filters = network.map(|network| HashMap::from([("network".to_owned(), vec![network.to_owned()])]));
    let options = ListContainersOptions { all: true, filters, ..ListContainersOptions::default() };
    let containers =
        docker.list_containers(Some(options)).await.context("cannot list the engine's containers")?;
    // Legacy links are names with a second slash.
    let own = |name: &String| Some(name.strip_prefix('/')?.to_owned()).filter(|name| !name.contains('/'));
    let mut names: Vec<_> =
        containers.iter().filter_map(|c| c.names.iter().flatten().find_map(own)).collect();
    names.sort();
    Ok(names)
}

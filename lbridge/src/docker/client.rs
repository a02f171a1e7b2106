//! Client: asks the engine once, for commands that do not follow it.

use std::time::Duration;

use anyhow::Context as _;
use bollard::{
    Docker,
    query_parameters::{InspectContainerOptions, ListContainersOptions},
};
use tokio::time::timeout;

use super::{engine::Engine, snapshot};
use crate::planning::{
    inventory::{DockerNetwork, EngineKind},
    labels::Labelled,
};

/// The longest wait for all answers; an engine that takes longer counts as away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The word that containers are given in place of the host's address.
const HOST_GATEWAY: &str = "host-gateway";

/// An engine, as it describes itself, and its networks.
#[derive(Debug, Clone)]
pub struct EngineInfo {
    /// Docker or Podman.
    pub product: EngineKind,
    /// The engine's version, as it reports it.
    pub version: String,
    /// True if the engine runs without root, in namespaces of its own.
    pub rootless: bool,
    /// The engine's networks, sorted by name.
    pub networks: Vec<DockerNetwork>,
}

/// A running container that has names for the host.
#[derive(Debug, Clone)]
pub struct HostNameUser {
    /// The container's name, without the leading slash.
    pub name: String,
    /// The names of the container's networks, sorted.
    pub networks: Vec<String>,
    /// The names that stand for the host in the container, such as `host.docker.internal`.
    pub host_names: Vec<String>,
    /// True if the container has a default route. A container that is only on internal networks has none.
    pub has_way_out: bool,
}

/// Asks the engine at `DOCKER_HOST`, or at the default socket.
pub async fn engine() -> anyhow::Result<EngineInfo> {
    within(async {
        let docker = connect()?;
        let engine = Engine::ask(&docker).await?;
        let networks = snapshot::networks(&docker, &engine).await?;
        let Engine { product, version, rootless, .. } = engine;
        Ok(EngineInfo { product, version, rootless, networks })
    })
    .await
}

/// Lists the networks and the running containers that have lbridge's labels.
pub async fn labelled() -> anyhow::Result<Vec<Labelled>> {
    within(async { snapshot::labelled(&connect()?).await }).await
}

/// Lists the running containers that were started with `--add-host NAME:host-gateway`, sorted by name.
pub async fn guests() -> anyhow::Result<Vec<HostNameUser>> {
    within(async {
        let docker = connect()?;
        let mut guests = vec![];
        for container in docker.list_containers(None::<ListContainersOptions>).await? {
            let Some(id) = container.id else { continue };
            // The container may have ended in the meantime.
            let Ok(container) = docker.inspect_container(&id, None::<InspectContainerOptions>).await else {
                continue;
            };
            let hosts = container.host_config.and_then(|config| config.extra_hosts).unwrap_or_default();
            let host_names: Vec<_> = hosts.iter().filter_map(|host| name_of_host(host)).collect();
            if host_names.is_empty() {
                continue;
            }
            let networks =
                container.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
            let told = |gateway: &Option<String>| gateway.as_ref().is_some_and(|ip| !ip.is_empty());
            let has_way_out =
                networks.values().any(|there| told(&there.gateway) || told(&there.ipv6_gateway));
            let mut networks: Vec<_> = networks.into_keys().collect();
            networks.sort();
            let name = container.name.unwrap_or(id).trim_start_matches('/').to_owned();
            guests.push(HostNameUser { name, networks, host_names, has_way_out });
        }
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(guests)
    })
    .await
}

/// Lists the names of the containers on a network, also of those that do not run, sorted.
pub async fn containers_of(network: &str) -> anyhow::Result<Vec<String>> {
    within(async { snapshot::containers_of(&connect()?, Some(network)).await }).await
}

/// Returns NAME of `NAME:host-gateway` or `NAME=host-gateway`; `None` for any other entry.
fn name_of_host(host: &str) -> Option<String> {
    let name = host.strip_suffix(HOST_GATEWAY)?;
    Some(name.strip_suffix(':').or_else(|| name.strip_suffix('='))?.to_owned())
}

fn connect() -> anyhow::Result<Docker> {
    Ok(Docker::connect_with_defaults()?)
}

async fn within<T>(answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(ANSWER_TIMEOUT, answer).await.context("the engine does not answer")?
}

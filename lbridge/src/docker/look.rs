//! One look at the engine, for those who do not follow it.

use std::{env, time::Duration};

use anyhow::Context as _;
use bollard::{
    Docker,
    query_parameters::{InspectContainerOptions, ListContainersOptions},
};
use tokio::time::timeout;

use super::{engine, snapshot};
use crate::planning::{
    inventory::{DockerNetwork, Product},
    labels::Labelled,
};

/// An engine that takes longer is as good as away.
const LIMIT: Duration = Duration::from_secs(5);
/// What containers write for the address of the host.
const HOST_GATEWAY: &str = "host-gateway";

/// What the engine says of itself.
#[derive(Debug, Clone)]
pub struct Engine {
    /// Which it is.
    pub product: Product,
    /// Its version.
    pub version: String,
    /// Whether it runs without root, in namespaces of its own.
    pub rootless: bool,
    /// Its networks.
    pub networks: Vec<DockerNetwork>,
}

/// A running container that has names for the host.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// The names of its networks.
    pub networks: Vec<String>,
    /// The names that stand for the host: `host.docker.internal`.
    pub host_names: Vec<String>,
    /// Whether it has a default route: on internal networks alone it has none.
    pub has_way_out: bool,
}

/// Where the engine is looked for.
pub fn address() -> String {
    env::var("DOCKER_HOST")
        .ok()
        .filter(|host| !host.is_empty())
        .unwrap_or("unix:///var/run/docker.sock".to_owned())
}

/// Asks the engine at `DOCKER_HOST`, or at the default socket.
pub async fn engine() -> anyhow::Result<Engine> {
    within(async {
        let docker = connect()?;
        let engine = engine::Engine::ask(&docker).await?;
        let networks = snapshot::networks(&docker, &engine).await?;
        let engine::Engine { product, version, rootless, .. } = engine;
        Ok(Engine { product, version, rootless, networks })
    })
    .await
}

/// The networks and the running containers whose labels ask for something.
pub async fn labelled() -> anyhow::Result<Vec<Labelled>> {
    within(async { snapshot::labelled(&connect()?).await }).await
}

/// The running containers that were started with `--add-host NAME:host-gateway`.
pub async fn guests() -> anyhow::Result<Vec<Guest>> {
    within(async {
        let docker = connect()?;
        let mut guests = vec![];
        for container in docker.list_containers(None::<ListContainersOptions>).await? {
            let Some(id) = container.id else { continue };
            // It may end meanwhile.
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
            guests.push(Guest { name, networks, host_names, has_way_out });
        }
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(guests)
    })
    .await
}

/// `NAME:host-gateway`, or `NAME=host-gateway`.
fn name_of_host(host: &str) -> Option<String> {
    let name = host.strip_suffix(HOST_GATEWAY)?;
    Some(name.strip_suffix(':').or_else(|| name.strip_suffix('='))?.to_owned())
}

fn connect() -> anyhow::Result<Docker> {
    Ok(Docker::connect_with_defaults()?)
}

async fn within<T>(answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(LIMIT, answer).await.context("the engine does not answer")?
}

//! Engine: identifies the engine that answers, Docker or Podman.

use std::{collections::HashMap, env};

use bollard::Docker;

use super::libpod::Libpod;
use crate::planning::inventory::EngineKind;

/// The name of the component by which Podman's version answer is recognized.
const PODMAN: &str = "Podman Engine";

/// Returns the engine's address: `DOCKER_HOST`, or the default socket.
pub fn address() -> String {
    env::var("DOCKER_HOST")
        .ok()
        .filter(|host| !host.is_empty())
        .unwrap_or("unix:///var/run/docker.sock".to_owned())
}

/// An engine, as it describes itself.
#[derive(Debug, Clone)]
pub(super) struct Engine {
    pub(super) product: EngineKind,
    pub(super) version: String,
    /// True if the engine runs without root. Its bridges are then in a network namespace of its own, whatever
    /// bridges of the same name the host has.
    pub(super) rootless: bool,
    /// Podman's own API, if it is new enough to list networks; `None` for Docker.
    pub(super) libpod: Option<Libpod>,
}

impl Engine {
    /// Asks the engine for its product, its version and whether it is rootless.
    pub(super) async fn ask(docker: &Docker) -> anyhow::Result<Self> {
        if let Some(libpod) = Libpod::find(&address()).await {
            let Libpod { version, rootless, .. } = libpod.clone();
            let libpod = Some(libpod).filter(Libpod::tells_bridges);
            return Ok(Self { product: EngineKind::Podman, version, rootless, libpod });
        }
        let version = docker.version().await.map_err(super::plain)?;
        let components = version.components.unwrap_or_default();
        let podman = components.iter().any(|component| component.name == PODMAN);
        let options = docker.info().await.map_err(super::plain)?.security_options.unwrap_or_default();
        Ok(Self {
            product: if podman { EngineKind::Podman } else { EngineKind::Docker },
            version: version.version.unwrap_or_default(),
            rootless: options.iter().any(|option| option.starts_with("name=rootless")),
            libpod: None,
        })
    }

    /// Returns the filters for the events that may change the lists: those that create, end, connect or
    /// rename something. Other events are as frequent as the health checks of every container.
    pub(super) fn events() -> HashMap<String, Vec<String>> {
        // Podman 4 filters the end of a container under another name than it then reports.
        let actions =
            ["create", "destroy", "remove", "connect", "disconnect", "start", "die", "died", "rename"];
        HashMap::from([
            ("type".to_owned(), vec!["network".to_owned(), "container".to_owned()]),
            ("event".to_owned(), actions.map(str::to_owned).into()),
        ])
    }
}

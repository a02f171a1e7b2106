//! Which engine it is that answers.

use std::collections::HashMap;

use bollard::Docker;

use super::libpod::Libpod;
use crate::planning::inventory::Product;

/// What Podman says that it consists of, among others.
const PODMAN: &str = "Podman Engine";

/// An engine, as it introduced itself.
#[derive(Debug, Clone)]
pub(super) struct Engine {
    pub(super) product: Product,
    pub(super) version: String,
    /// Whether it runs without root: its bridges are in a network namespace of its own, whatever the host's are called.
    pub(super) rootless: bool,
    /// Podman's own API, where it can be asked for networks.
    pub(super) libpod: Option<Libpod>,
}

impl Engine {
    /// Asks it.
    pub(super) async fn ask(docker: &Docker) -> anyhow::Result<Self> {
        if let Some(libpod) = Libpod::find(&super::look::address()).await {
            let Libpod { version, rootless, .. } = libpod.clone();
            let libpod = Some(libpod).filter(Libpod::tells_bridges);
            return Ok(Self { product: Product::Podman, version, rootless, libpod });
        }
        let version = docker.version().await.map_err(super::plain)?;
        let components = version.components.unwrap_or_default();
        let podman = components.iter().any(|component| component.name == PODMAN);
        let options = docker.info().await.map_err(super::plain)?.security_options.unwrap_or_default();
        Ok(Self {
            product: if podman { Product::Podman } else { Product::Docker },
            version: version.version.unwrap_or_default(),
            rootless: options.iter().any(|option| option.starts_with("name=rootless")),
            libpod: None,
        })
    }

    /// Events that may mean another list: what makes, ends or renames something. Others are as frequent as the health checks
    /// of every container.
    pub(super) fn events() -> HashMap<String, Vec<String>> {
        // Podman 4 knows the end of a container by another name than it then tells.
        let actions =
            ["create", "destroy", "remove", "connect", "disconnect", "start", "die", "died", "rename"];
        HashMap::from([
            ("type".to_owned(), vec!["network".to_owned(), "container".to_owned()]),
            ("event".to_owned(), actions.map(str::to_owned).into()),
        ])
    }
}

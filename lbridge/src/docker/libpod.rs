//! Podman's own API (libpod), on the same socket as Docker's. Reads what Docker's API does not report: the
//! bridges of networks, and whether Podman runs as root. Uses hyper, since bollard speaks only Docker's API.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, ensure};
use bollard::models::ContainerInspectResponse;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, Response, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::net::UnixStream;

/// The oldest major version of the API with these fields; every later one still serves it.
const OLDEST: u32 = 4;
/// The response header that only Podman sends, in every answer.
const VERSION_HEADER: &str = "libpod-api-version";
/// The longest answer that is accepted, in bytes.
const LONGEST: usize = 64 << 20;

/// Podman's API on a Unix socket.
#[derive(Debug, Clone)]
pub(super) struct Libpod {
    path: PathBuf,
    /// The API version that Podman reports.
    pub(super) version: String,
    /// True if the process that listens on the socket is not root's.
    pub(super) rootless: bool,
}

/// A network, as Podman's API describes it.
#[derive(Debug, Deserialize)]
pub(super) struct Network {
    pub(super) id: String,
    pub(super) name: String,
    driver: String,
    /// The bridge, for the bridge driver; for other drivers a parent interface, which leads to the LAN.
    #[serde(default, rename = "network_interface")]
    interface: String,
    #[serde(default)]
    options: BTreeMap<String, String>,
}

impl Network {
    /// Returns the bridge that belongs to this network alone; `None` if it has none, or shares it.
    pub(super) fn bridge(&self) -> Option<&str> {
        (self.driver == "bridge" && self.sharing().is_none() && !self.interface.is_empty())
            .then_some(&*self.interface)
    }

    /// Returns the driver's name, with the option that keeps it from having a bridge of its own.
    pub(super) fn driver(&self) -> String {
        self.sharing().map_or_else(|| self.driver.clone(), |option| format!("{} ({option})", self.driver))
    }

    /// Returns the option by which others, perhaps the LAN, are on the bridge; `None` if no option does that.
    fn sharing(&self) -> Option<String> {
        let option = |name: &str| self.options.get(name).map(String::as_str).filter(|text| !text.is_empty());
        match (option("mode"), option("vlan")) {
            (Some("unmanaged"), _) => Some("mode=unmanaged".to_owned()),
            (_, Some(vlan)) => Some(format!("vlan={vlan}")),
            _ => None,
        }
    }
}

impl Libpod {
    /// Connects to the engine at `address`, in the form of `DOCKER_HOST`. Returns `None` if it is not Podman,
    /// or not on a Unix socket.
    pub(super) async fn find(address: &str) -> Option<Self> {
        let path = PathBuf::from(address.strip_prefix("unix://")?);
        let (response, uid) = get(&path, "/_ping").await.ok()?;
        // Podman's version and info answers take it a second (it asks dpkg or rpm). This request is cheap,
        // and the kernel reports whose process listens.
        let version = response.headers().get(VERSION_HEADER)?.to_str().ok()?.to_owned();
        Some(Self { path, version, rootless: uid != 0 })
    }

    /// Returns true if this version of Podman reports the bridges of networks.
    pub(super) fn tells_bridges(&self) -> bool {
        let major = self.version.split('.').next().and_then(|major| major.parse().ok());
        major.is_some_and(|major: u32| major >= OLDEST)
    }

    /// Lists Podman's networks.
    pub(super) async fn networks(&self) -> anyhow::Result<Vec<Network>> {
        let resource = format!("/v{OLDEST}.0.0/libpod/networks/json");
        self.ask(&resource).await.context("cannot list Podman's networks")
    }

    /// Describes a container that exists as Docker's API does. From a container's end until Podman has
    /// cleaned up after it, Podman gives even there a status that Docker does not have.
    ///
    /// # Errors
    ///
    /// If Podman does not answer, knows of no such container, or describes it otherwise.
    pub(super) async fn container(&self, name: &str) -> anyhow::Result<ContainerInspectResponse> {
        let container = self.ask(&format!("/containers/{name}/json")).await;
        Ok(serde_json::from_value(in_dockers_words(container?))?)
    }

    /// Sends a GET request; returns the answer, parsed.
    async fn ask<T: DeserializeOwned>(&self, resource: &str) -> anyhow::Result<T> {
        let (response, _) = get(&self.path, resource).await?;
        let status = response.status();
        ensure!(status.is_success(), "Podman answered {status}");
        let body = Limited::new(response.into_body(), LONGEST).collect().await;
        let body = body.map_err(|error| anyhow!("{error}"))?.to_bytes();
        Ok(serde_json::from_slice(&body)?)
    }
}

/// Replaces the status that only Podman has, `stopped`, in the description of a container.
fn in_dockers_words(mut container: Value) -> Value {
    if let Some(status) = container.pointer_mut("/State/Status").filter(|status| **status == "stopped") {
        *status = "exited".into();
    }
    container
}

/// Sends a GET request. Returns the response, whose body is not read yet, and the user id of the process that
/// listens on the socket.
async fn get(socket: &Path, resource: &str) -> anyhow::Result<(Response<Incoming>, u32)> {
    let stream = UnixStream::connect(socket).await?;
    let uid = stream.peer_cred()?.uid();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // The task ends when the sender and the response are dropped.
    tokio::spawn(connection);
    let request = Request::get(resource).header(header::HOST, "lbridge").body(Empty::<Bytes>::new())?;
    Ok((sender.send_request(request).await?, uid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(more: &str) -> Network {
        let text = format!(
            r#"{{"id":"ab","name":"app","created":"2026-11-22T09:42:24Z","dns_enabled":true{more}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_bridge_is_a_networks_own_or_none() {
        let own = network(
            ",\"driver\":\"bridge\",\"network_interface\":\"podman1\",\"options\":{\"mtu\":\"1400\"}",
        );
        assert_eq!((own.bridge(), &*own.driver()), (Some("podman1"), "bridge"));
        // A macvlan's parent interface leads to the LAN.
        let macvlan = network(",\"driver\":\"macvlan\",\"network_interface\":\"eth0\"");
        assert_eq!((macvlan.bridge(), &*macvlan.driver()), (None, "macvlan"));
        for (option, value) in [("mode", "unmanaged"), ("vlan", "7")] {
            let shared = network(&format!(
                r#","driver":"bridge","network_interface":"br0","options":{{"{option}":"{value}"}}"#
            ));
            assert_eq!((shared.bridge(), shared.driver()), (None, format!("bridge ({option}={value})")));
        }
        let managed = network(
            ",\"driver\":\"bridge\",\"network_interface\":\"br0\",\"options\":{\"mode\":\"managed\"}",
        );
        assert_eq!(managed.bridge(), Some("br0"));
        assert_eq!(network(",\"driver\":\"bridge\"").bridge(), None);
    }

    #[test]
    fn a_container_that_is_not_cleaned_up_has_ended() {
        let text = r#"{"Id":"ab","Name":"/web","State":{"Status":"stopped","Running":false,"Pid":0}}"#;
        assert!(
            serde_json::from_str::<ContainerInspectResponse>(text).is_err(),
            "bollard knows it: drop this"
        );
        let container = in_dockers_words(serde_json::from_str(text).unwrap());
        let container: ContainerInspectResponse = serde_json::from_value(container).unwrap();
        assert_eq!(container.state.and_then(|state| state.pid), Some(0));
    }
}

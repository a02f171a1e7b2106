//! Podman's own API (libpod), on the same socket as Docker's. Reads what Docker's API does not report: the
//! bridges of networks, and whether Podman runs as root. Uses hyper, since bollard speaks only Docker's API.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, Response, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
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
        let list = async {
            let (response, _) = get(&self.path, &resource).await?;
            let status = response.status();
            ensure!(status.is_success(), "it answers {status}");
            let body = Limited::new(response.into_body(), LONGEST).collect().await;
            let body = body.map_err(|error| anyhow!("{error}"))?.to_bytes();
            Ok(serde_json::from_slice(&body)?)
        };
        list.await.context("cannot list Podman's networks")
    }
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
            "{{\"id\":\"ab\",\"name\":\"app\",\"created\":\"2026-11-22T09:42:24Z\",\
             \"dns_enabled\":true{more}}}"
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
                ",\"driver\":\"bridge\",\"network_interface\":\"br0\",\
                 \"options\":{{\"{option}\":\"{value}\"}}"
            ));
            assert_eq!((shared.bridge(), shared.driver()), (None, format!("bridge ({option}={value})")));
        }
        let managed = network(
            ",\"driver\":\"bridge\",\"network_interface\":\"br0\",\"options\":{\"mode\":\"managed\"}",
        );
        assert_eq!(managed.bridge(), Some("br0"));
        assert_eq!(network(",\"driver\":\"bridge\"").bridge(), None);
    }
}

//! docker: a Docker Engine as an [`Engine`], on its default socket.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::engine::{Engine, Network, Process};
use super::logs::Log;
use super::netns::NetNs;
use super::sandbox;

const SOCKET: &str = "/run/docker.sock";
/// The engine's data folder, on the sandbox's tmpfs, so that nothing is left on the machine.
const DATA: &str = "/run/docker-data";

/// A Docker Engine, running or stopped.
#[derive(Debug)]
pub struct Docker {
    process: Process,
    live_restore: bool,
}

impl Docker {
    /// Prepares an Engine without starting it; the first [`Engine::up`] has no image yet. With `live_restore`
    /// its containers survive it.
    pub fn prepare(live_restore: bool) -> Result<Docker> {
        // A key is written to the first, containerd's folders to the second; nothing may stay on the machine.
        sandbox::shadow("/etc")?;
        sandbox::shadow("/opt")?;
        Ok(Docker { process: Process::new("dockerd"), live_restore })
    }

    fn start_with(live_restore: bool) -> Result<Docker> {
        let mut docker = Docker::prepare(live_restore)?;
        docker.up()?;
        docker.import_image()?;
        Ok(docker)
    }
}

impl Engine for Docker {
    const PRODUCT: &'static str = "Docker";
    const DEFAULT_NETWORK: &'static str = "bridge";
    const DEFAULT_BRIDGE: &'static str = "docker0";
    const UNIT: &'static str = "docker.service";
    const BRIDGE_WITHOUT_CONTAINERS: bool = true;
    const LISTS_HOST_AND_NONE: bool = true;
    const LISTS_RESTARTING_CONTAINERS: bool = true;
    const TELLS_OF_NETWORKS: bool = true;
    const REUSES_BRIDGE_NAMES: bool = false;
    const KEEPS_HARDWARE_ADDRESSES: bool = true;
    const HOST_GATEWAY_IS_SHARED: bool = true;

    fn start() -> Result<Docker> {
        Docker::start_with(false)
    }

    fn start_lasting() -> Result<Docker> {
        Docker::start_with(true)
    }

    fn up(&mut self) -> Result<()> {
        let mut command = Command::new("dockerd");
        command
            .args(["--data-root", DATA, "--log-level", "warn"])
            .env_remove("DOCKER_HOST")
            .env_remove("NOTIFY_SOCKET");
        if self.live_restore {
            command.arg("--live-restore");
        }
        let answers = || Ok(Path::new(SOCKET).exists() && client().arg("version").output()?.status.success());
        self.process.start(command, answers)
    }

    fn down(&mut self) -> Result<()> {
        self.process.stop()
    }

    fn socket(&self) -> String {
        SOCKET.to_owned()
    }

    fn environment(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn client(&self) -> Command {
        client()
    }

    fn log(&self) -> &Log {
        &self.process.log
    }

    fn network(&self, name: &str) -> Result<Network> {
        let networks: Value = serde_json::from_str(&self.cli(&["network", "inspect", "--", name])?)?;
        let network = &networks[0];
        let word = |value: &Value| value.as_str().map(str::to_owned);
        let id = word(&network["Id"]).context("a network without an id")?;
        let name = word(&network["Name"]).context("a network without a name")?;
        let bridge = word(&network["Options"]["com.docker.network.bridge.name"]);
        let bridge = bridge.unwrap_or_else(|| format!("br-{}", &id[..12]));
        let mut configurations = network["IPAM"]["Config"].as_array().into_iter().flatten();
        let gateway = if let Some(gateway) = configurations.find_map(|one| word(&one["Gateway"])) {
            gateway
        } else {
            // The Engine does not report that of its default network: it is the bridge's address.
            let addresses = NetNs::current()?.ip_output(&format!("-4 -o addr show dev {bridge}"))?;
            addresses.split_whitespace().nth(3).context("no address")?.to_owned()
        };
        // The Engine of Debian 12 adds the prefix for the networks it numbers itself.
        let gateway = gateway.split('/').next().unwrap_or_default().parse().context("gateway")?;
        Ok(Network { id, name, bridge, gateway })
    }
}

fn client() -> Command {
    let mut command = Command::new("docker");
    command.env("DOCKER_HOST", format!("unix://{SOCKET}")).env("DOCKER_CONFIG", "/run/docker-client");
    command
}

//! scene: the usual setup: a host with a bridge, a container on it, and a daemon without Docker.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};

use super::client::{self, Greeting};
use super::daemon::{Daemon, Options, RuleState};
use super::lab::{Bridge, Lab};
use super::netns::NetNs;
use super::patience;
use super::service::{self, Service};

/// The setup that most tests start from.
#[derive(Debug)]
pub struct Scene {
    /// The host and its links.
    pub lab: Lab,
    /// The bridge `lab0`.
    pub bridge: Bridge,
    /// The network namespace of the container on `lab0`.
    pub container: NetNs,
    /// The container's first address.
    pub container_ip: IpAddr,
    /// The daemon in the host's namespace.
    pub daemon: Daemon,
}

/// IPv4 addresses of the bridge and of the container on it.
pub const V4: (&str, &str) = ("10.7.0.1/24", "10.7.0.2/24");
/// IPv6 addresses of the bridge and of the container on it.
pub const V6: (&str, &str) = ("fd07::1/64", "fd07::2/64");

impl Scene {
    /// Sets up an IPv4 bridge: gateway 10.7.0.1, container 10.7.0.2.
    pub fn new() -> Result<Scene> {
        Scene::with(V4, Options::default())
    }

    /// Sets up an IPv6 bridge: gateway `fd07::1`, container `fd07::2`.
    pub fn v6() -> Result<Scene> {
        Scene::with(V6, Options::default())
    }

    /// Sets up a scene with these addresses of bridge and container, and these options for the daemon.
    pub fn with((gateway, container): (&str, &str), options: Options) -> Result<Scene> {
        let lab = Lab::new()?;
        let bridge = lab.add_bridge("lab0", gateway)?;
        let container_ip = container.split('/').next().unwrap_or_default().parse()?;
        let container = lab.container(&bridge, container)?;
        let daemon = Daemon::start_with(lab.host(), options)?;
        Ok(Scene { lab, bridge, container, container_ip, daemon })
    }

    /// Returns the gateway's endpoint at a port.
    pub fn gateway(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.bridge.gateway(), port)
    }

    /// Starts an echo service on the host.
    pub fn service(&self, name: &str, address: &str) -> Result<Service> {
        Service::start(self.lab.host(), name, address)
    }

    /// Starts a service on the host.
    pub fn service_with(&self, options: &service::Options) -> Result<Service> {
        Service::start_with(self.lab.host(), options)
    }

    /// Runs `lbridge allow bridge:lab0 …`.
    pub fn allow(&self, arguments: &[&str]) -> Result<()> {
        self.daemon.allow(&[&["bridge:lab0"], arguments].concat()).map(drop)
    }

    /// Runs `lbridge deny bridge:lab0 …`.
    pub fn deny(&self, arguments: &[&str]) -> Result<()> {
        self.daemon.deny(&[&["bridge:lab0"], arguments].concat()).map(drop)
    }

    /// Requires that the rule for a port is in this state now.
    pub fn must_be(&self, port: u16, state: &str) -> Result<RuleState> {
        let now = self.daemon.rule_state("bridge:lab0", port)?;
        ensure!(now.state == state, "port {port} should be {state}: {now:?}");
        Ok(now)
    }

    /// Waits until the rule for a port is in this state.
    pub fn wait_for(&self, port: u16, state: &str) -> Result<RuleState> {
        self.daemon.wait_for_state("bridge:lab0", port, state)
    }

    /// Requires that the container reaches the service of that name when it dials the gateway.
    pub fn served(&self, port: u16, service: &str) -> Result<Greeting> {
        client::served_by(&self.container, self.gateway(port), service)
    }

    /// Like [`Scene::served`], for when the daemon may have to notice a change first.
    pub fn soon_served(&self, port: u16, service: &str) -> Result<Greeting> {
        let mut last = None;
        patience::until(&format!("{service} serves port {port}"), || {
            Ok(self.served(port, service).map_err(|error| last = Some(format!("{error:#}"))).ok())
        })
        .map_err(|error| error.context(format!("last: {last:?}")))
    }

    /// Requires that the container is refused at once when it dials the gateway.
    pub fn refused(&self, port: u16) -> Result<()> {
        client::refused(&self.container, self.gateway(port))
    }
}

//! lbridge beside a real Podman, which speaks Docker's API in words of its own.

mod containers;
mod networks;
mod rootless;
mod service;

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Greeting};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::podman::{Container, Network, Podman};
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Suite};

fn main() {
    const NEEDS: &[Need] = &[
        Need::Root,
        Need::Cgroup2,
        Need::Lbridge,
        Need::Program("ip"),
        Need::Program("podman"),
        Need::Program("runc"),
        Need::File("/usr/lib/podman/netavark"),
        Need::Program("iptables"),
        Need::Program("busybox"),
        Need::Program("tar"),
    ];
    let tests = [networks::tests(), containers::tests(), service::tests(), rootless::tests()];
    let mut suite = Suite::new(NEEDS, tests.concat());
    suite.threads = 1;
    suite.main()
}

/// Podman and a daemon, both in the sandbox' own network namespace.
pub(crate) struct Scene {
    pub(crate) podman: Podman,
    pub(crate) daemon: Daemon,
    pub(crate) host: NetNs,
}

impl Scene {
    pub(crate) fn new() -> Result<Scene> {
        Scene::with(Podman::start()?)
    }

    pub(crate) fn with(podman: Podman) -> Result<Scene> {
        let host = NetNs::current()?;
        let env = vec![("DOCKER_HOST".to_owned(), podman.address())];
        let daemon = Daemon::start_with(&host, Options { docker: true, env, ..Options::default() })?;
        Ok(Scene { podman, daemon, host })
    }

    pub(crate) fn service(&self, name: &str, address: &str) -> Result<Service> {
        Service::start(&self.host, name, address)
    }

    pub(crate) fn must_be(&self, network: &str, port: u16, state: &str) -> Result<()> {
        let now = self.daemon.rule_state(network, port)?;
        ensure!(now.state == state, "{network} {port} should be {state}: {now:?}");
        Ok(())
    }

    /// From within the container's network namespace.
    pub(crate) fn served(&self, container: &Container, to: SocketAddr, service: &str) -> Result<Greeting> {
        client::served_by(&self.podman.netns(container)?, to, service)
    }

    pub(crate) fn refused(&self, container: &Container, to: SocketAddr) -> Result<()> {
        client::refused(&self.podman.netns(container)?, to)
    }

    pub(crate) fn wait_for_podman(&self, wanted: &str) -> Result<()> {
        patience::until(&format!("Podman is {wanted}"), || {
            Ok((self.daemon.status()?["docker"]["state"] == wanted).then_some(()))
        })
    }

    /// The container's own address on a network.
    pub(crate) fn address(&self, container: &Container, network: &Network) -> Result<IpAddr> {
        let text = self.podman.podman(&["inspect", &container.id])?;
        let inspected: serde_json::Value = serde_json::from_str(&text)?;
        let of_network = &inspected[0]["NetworkSettings"]["Networks"][&network.name];
        Ok(of_network["IPAddress"].as_str().context("an address")?.parse()?)
    }
}

pub(crate) fn at(network: &Network, port: u16) -> SocketAddr {
    SocketAddr::new(network.gateway, port)
}

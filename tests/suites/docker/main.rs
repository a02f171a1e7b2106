//! lbridge beside a real Docker Engine: networks and containers that come, go and change under its rules.

mod aliases;
mod compose;
mod containers;
mod doctor;
mod engine;
mod from;
mod labels;
mod localhost;
mod names;
mod networks;
mod revocation;
mod swarm;
mod walled;

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Greeting};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::docker::{Container, Engine, Network};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Suite};

fn main() {
    const NEEDS: &[Need] = &[
        Need::Root,
        Need::Cgroup2,
        Need::Lbridge,
        Need::Program("ip"),
        Need::Program("dockerd"),
        Need::Program("docker"),
        Need::Program("iptables"),
        Need::Program("busybox"),
        Need::Program("tar"),
    ];
    let tests = [
        compose::tests(),
        networks::tests(),
        names::tests(),
        engine::tests(),
        containers::tests(),
        swarm::tests(),
        from::tests(),
        revocation::tests(),
        labels::tests(),
        localhost::tests(),
        doctor::tests(),
        aliases::tests(),
        walled::tests(),
    ];
    let mut suite = Suite::new(NEEDS, tests.concat());
    suite.threads = 1;
    suite.main()
}

/// An Engine and a daemon, both in the sandbox' own network namespace.
pub(crate) struct Scene {
    pub(crate) engine: Engine,
    pub(crate) daemon: Daemon,
    pub(crate) host: NetNs,
}

impl Scene {
    pub(crate) fn new() -> Result<Scene> {
        Scene::with(Engine::start()?)
    }

    pub(crate) fn with(engine: Engine) -> Result<Scene> {
        let host = NetNs::current()?;
        let daemon = Daemon::start_with(&host, Options { docker: true, ..Options::default() })?;
        Ok(Scene { engine, daemon, host })
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
        client::served_by(&self.engine.netns(container)?, to, service)
    }

    pub(crate) fn refused(&self, container: &Container, to: SocketAddr) -> Result<()> {
        client::refused(&self.engine.netns(container)?, to)
    }

    pub(crate) fn docker_state(&self) -> Result<(String, Option<String>)> {
        let status = self.daemon.status()?;
        let state = status["docker"]["state"].as_str().context("a state of docker")?.to_owned();
        Ok((state, status["docker"]["since"].as_str().map(str::to_owned)))
    }

    pub(crate) fn wait_for_docker(&self, wanted: &str) -> Result<()> {
        patience::until(&format!("docker is {wanted}"), || {
            Ok((self.docker_state()?.0 == wanted).then_some(()))
        })
    }
}

pub(crate) fn at(network: &Network, port: u16) -> SocketAddr {
    SocketAddr::new(network.gateway, port)
}

pub(crate) fn address(scene: &Scene, container: &Container, network: &Network) -> Result<String> {
    let text = scene.engine.docker(&["inspect", &container.id])?;
    let inspected: serde_json::Value = serde_json::from_str(&text)?;
    let of_network = &inspected[0]["NetworkSettings"]["Networks"][&network.name];
    Ok(of_network["IPAddress"].as_str().context("an address")?.to_owned())
}

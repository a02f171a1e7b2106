//! Rules for some containers, on a host whose firewall drops: what lbridge lets in for them is for them
//! alone.

use std::net::SocketAddr;

use anyhow::{Result, bail, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::engine::{Container, Engine, Network};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Scene, Tested};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        the_port_is_open_to_the_named_container_alone,
        a_relays_port_is_open_to_the_named_container_alone,
        a_rule_for_nobody_opens_nothing,
        a_label_opens_its_port_to_its_container_alone,
    ]
}

/// The port that is dialled, and on which the host has a service of its own on every address: its SSH server,
/// say.
const PORT: u16 = 2222;

const DROPS: &str = "table inet walled { chain input { type filter hook input priority 0; policy drop; \
                     iifname lo accept; ct state established,related accept; }; }";

struct Walled {
    scene: Scene,
    app: Network,
    own: Service,
}

impl Walled {
    fn new(config: &str) -> Result<Walled> {
        let engine = Tested::start()?;
        NetNs::current()?.shell(&format!("nft '{DROPS}'"))?;
        let scene = Scene::configured(engine, config)?;
        let app = scene.engine.create_network("app", &[])?;
        let own = scene.service("own", &format!("0.0.0.0:{PORT}"))?;
        Ok(Walled { scene, app, own })
    }

    fn run(&self, name: &str, more: &[&str]) -> Result<Container> {
        self.scene.engine.run("app", &[&["--name", name], more].concat())
    }

    /// The network's gateway, and the address that containers of all networks call the host, if there is one.
    fn dialled(&self) -> Result<Vec<SocketAddr>> {
        let mut dialled = vec![self.app.at(PORT)];
        if Tested::HOST_GATEWAY_IS_SHARED {
            dialled.push(self.scene.engine.network(Tested::DEFAULT_NETWORK)?.at(PORT));
        }
        Ok(dialled)
    }

    fn served(&self, container: &Container) -> Result<()> {
        for to in self.dialled()? {
            self.scene.served(container, to, "service")?;
        }
        Ok(())
    }

    /// Nobody answers in the host's name.
    fn kept_out(&self, container: &Container) -> Result<()> {
        let netns = self.scene.engine.netns(container)?;
        for to in self.dialled()? {
            match client::attempt(&netns, to) {
                Attempt::Served(greeting) => bail!("{} got to {greeting:?}", container.id),
                Attempt::Refused(_) | Attempt::Nothing(_) => {}
            }
        }
        ensure!(
            self.own.accepted() == 0,
            "{} connections reached the host's own service",
            self.own.accepted()
        );
        Ok(())
    }

    fn wait_for(&self, state: &str) -> Result<()> {
        patience::until(&format!("the rule is {state}"), || {
            let rule = self.scene.daemon.rule("app", PORT)?;
            Ok(rule.filter(|rule| rule["state"] == state).map(drop))
        })
    }
}

fn for_web_alone(path: &str, state: &str) -> Result<()> {
    let walled = Walled::new("")?;
    let (web, other) = (walled.run("web", &[])?, walled.run("other", &[])?);
    walled.kept_out(&other)?;
    let allow = ["app", "2222=8088", "--from", "web", "--path", path];
    walled.scene.daemon.allow(&allow)?;
    walled.wait_for("waiting")?;
    walled.kept_out(&web)?;
    walled.kept_out(&other)?;
    let service = walled.scene.service("service", "127.0.0.1:8088")?;
    walled.wait_for(state)?;
    walled.served(&web)?;
    walled.kept_out(&other)?;
    service.stop();
    walled.wait_for("waiting")?;
    walled.kept_out(&web)?;
    walled.kept_out(&other)?;
    walled.scene.engine.remove(&web)?;
    let _service = walled.scene.service("service", "127.0.0.1:8088")?;
    walled.kept_out(&other)?;
    walled.scene.daemon.deny(&["app", "2222"])?;
    walled.kept_out(&other)
}

fn the_port_is_open_to_the_named_container_alone() -> Result<()> {
    for_web_alone("auto", "steered")
}

fn a_relays_port_is_open_to_the_named_container_alone() -> Result<()> {
    for_web_alone("relay", "relayed")
}

fn a_rule_for_nobody_opens_nothing() -> Result<()> {
    let walled = Walled::new("")?;
    let other = walled.run("other", &[])?;
    let _service = walled.scene.service("service", "127.0.0.1:8088")?;
    for path in ["auto", "relay"] {
        walled.scene.daemon.allow(&["app", "2222=8088", "--from", "ghost", "--path", path])?;
        walled.wait_for("waiting")?;
        walled.kept_out(&other)?;
        walled.scene.daemon.deny(&["app", "2222"])?;
    }
    Ok(())
}

fn a_label_opens_its_port_to_its_container_alone() -> Result<()> {
    let walled = Walled::new("labels = true\nlabel_ports = [2222, 8088]\n")?;
    let _service = walled.scene.service("service", "127.0.0.1:8088")?;
    let other = walled.run("other", &[])?;
    let web = walled.run("web", &["--label=lbridge.allow=2222=8088"])?;
    walled.wait_for("steered")?;
    walled.served(&web)?;
    walled.kept_out(&other)?;
    walled.scene.engine.remove(&web)?;
    walled.kept_out(&other)
}

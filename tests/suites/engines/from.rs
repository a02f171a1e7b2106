//! Rules for some containers of a network: those get in, whatever becomes of them, and nobody else.

use std::fs;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::engine::{Container, Engine, Network};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use serde_json::Value;

use super::{IMAGE, Scene};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        the_named_container_gets_in_and_no_other,
        several_containers_are_named,
        a_container_that_restarts_with_another_address_is_followed,
        the_name_decides_who_gets_in,
        a_container_that_leaves_the_network_is_out,
        an_address_that_is_given_again_lets_nobody_in,
        a_relay_serves_the_named_container_alone,
        the_service_may_see_a_local_peer,
        whoever_is_not_named_is_no_local_peer,
        an_ipv6_container_is_named,
        a_bridge_has_the_containers_of_its_network,
        the_daemon_restarts,
        the_engine_is_away,
        what_status_and_explain_say,
        verify_tries_both,
        a_rule_of_the_configuration_is_changed,
    ]
}

/// `app` with `web` and `other` on it, `far` on another network, and a service.
pub(crate) struct Crowd {
    pub(crate) scene: Scene,
    pub(crate) app: Network,
    pub(crate) web: Container,
    pub(crate) other: Container,
    far: Container,
    pub(crate) service: Service,
}

const SUBNET: &[&str] = &["--subnet", "10.50.0.0/24", "--gateway", "10.50.0.1"];

impl Crowd {
    fn new() -> Result<Crowd> {
        Crowd::with(Scene::new()?)
    }

    pub(crate) fn with(scene: Scene) -> Result<Crowd> {
        let app = scene.engine.create_network("app", SUBNET)?;
        scene.engine.create_network("elsewhere", &[])?;
        let named = |network: &str, name: &str| scene.engine.run(network, &["--name", name]);
        let (web, other, far) = (named("app", "web")?, named("app", "other")?, named("elsewhere", "far")?);
        let service = scene.service("service", "127.0.0.1:8080")?;
        Ok(Crowd { scene, app, web, other, far, service })
    }

    pub(crate) fn allow(&self, more: &[&str]) -> Result<()> {
        self.scene.daemon.allow(&[&["app", "8080", "--from", "web"], more].concat()).map(drop)
    }

    fn to(&self) -> SocketAddr {
        self.app.at(8080)
    }

    pub(crate) fn served(&self, container: &Container) -> Result<()> {
        self.scene.served(container, self.to(), "service").map(drop)
    }

    /// At once, and by nobody else either.
    fn refused(&self, container: &Container) -> Result<()> {
        let before = self.service.accepted();
        self.scene.refused(container, self.to())?;
        ensure!(self.service.accepted() == before, "it got through");
        Ok(())
    }

    fn state(&self) -> Result<(String, String)> {
        let now = self.scene.daemon.rule_state("app", 8080)?;
        Ok((now.state, now.why.unwrap_or_default()))
    }

    pub(crate) fn wait_for(&self, state: &str, why: &str) -> Result<()> {
        let mut last = None;
        let reached = patience::until(&format!("{state} ({why})"), || {
            let now = self.state()?;
            let there = now == (state.to_owned(), why.to_owned());
            last = Some(now);
            Ok(there.then_some(()))
        });
        reached.with_context(|| format!("last: {last:?}"))
    }
}

fn the_named_container_gets_in_and_no_other() -> Result<()> {
    let crowd = Crowd::new()?;
    crowd.refused(&crowd.web)?;
    crowd.allow(&[])?;
    crowd.wait_for("steered", "for web")?;
    crowd.served(&crowd.web)?;
    crowd.refused(&crowd.other)?;
    crowd.refused(&crowd.far)?;
    client::refused(&crowd.scene.host, crowd.to())?;
    // For all, and for one again: who was let in is let in, and nobody else is.
    crowd.scene.daemon.deny(&["app", "8080"])?;
    crowd.refused(&crowd.web)?;
    crowd.scene.daemon.allow(&["app", "8080"])?;
    crowd.served(&crowd.other)?;
    crowd.scene.daemon.deny(&["app", "8080"])?;
    crowd.allow(&[])?;
    crowd.served(&crowd.web)?;
    crowd.refused(&crowd.other)
}

fn several_containers_are_named() -> Result<()> {
    let crowd = Crowd::new()?;
    let third = crowd.scene.engine.run("app", &["--name", "third"])?;
    crowd.scene.daemon.allow(&["app", "8080", "--from", "web,other", "--from", "far"])?;
    crowd.wait_for("steered", "for other, web; container far is not on app, but on elsewhere")?;
    crowd.served(&crowd.web)?;
    crowd.served(&crowd.other)?;
    crowd.refused(&third)?;
    crowd.refused(&crowd.far)?;
    crowd.scene.engine.cli(&["network", "connect", "app", "far"])?;
    crowd.wait_for("steered", "for far, other, web")?;
    crowd.served(&crowd.far)?;
    // A rule may be made before its containers.
    crowd.scene.engine.remove(&crowd.web)?;
    crowd.wait_for("steered", "for far, other; no container web")?;
    let again = crowd.scene.engine.run("app", &["--name", "web"])?;
    crowd.wait_for("steered", "for far, other, web")?;
    crowd.served(&again)
}

fn a_container_that_restarts_with_another_address_is_followed() -> Result<()> {
    let crowd = Crowd::new()?;
    crowd.allow(&[])?;
    let engine = &crowd.scene.engine;
    let before = crowd.scene.address(&crowd.web, &crowd.app)?;
    engine.cli(&["stop", "--time", "0", "web"])?;
    crowd.wait_for("waiting", "container web is not running")?;
    let heir = engine.run("app", &["--name", "heir", "--ip", &before])?;
    crowd.refused(&heir)?;
    engine.cli(&["start", "web"])?;
    crowd.wait_for("steered", "for web")?;
    ensure!(crowd.scene.address(&crowd.web, &crowd.app)? != before, "it should have another address");
    crowd.served(&crowd.web)?;
    crowd.refused(&heir)
}

fn the_name_decides_who_gets_in() -> Result<()> {
    let crowd = Crowd::new()?;
    crowd.allow(&[])?;
    let engine = &crowd.scene.engine;
    engine.cli(&["rename", "web", "web2"])?;
    crowd.wait_for("waiting", "no container web; did you mean web2?")?;
    crowd.refused(&crowd.web)?;
    engine.cli(&["rename", "other", "web"])?;
    crowd.wait_for("steered", "for web")?;
    crowd.served(&crowd.other)?;
    crowd.refused(&crowd.web)?;
    engine.remove(&crowd.other)?;
    crowd.wait_for("waiting", "no container web; did you mean web2?")
}

fn a_container_that_leaves_the_network_is_out() -> Result<()> {
    let crowd = Crowd::new()?;
    crowd.allow(&[])?;
    let engine = &crowd.scene.engine;
    let old = crowd.scene.address(&crowd.web, &crowd.app)?;
    engine.cli(&["network", "connect", "elsewhere", "web"])?;
    crowd.served(&crowd.web)?;
    engine.cli(&["network", "disconnect", "app", "web"])?;
    crowd.wait_for("waiting", "container web is not on app, but on elsewhere")?;
    engine.cli(&["network", "disconnect", "elsewhere", "far"])?;
    engine.cli(&["network", "connect", "--ip", &old, "app", "far"])?;
    crowd.refused(&crowd.far)?;
    engine.cli(&["network", "connect", "app", "web"])?;
    crowd.wait_for("steered", "for web")?;
    crowd.served(&crowd.web)?;
    crowd.refused(&crowd.far)
}

/// A container ends and another gets its address at once: as fast as Docker can, it is not as fast as
/// lbridge.
fn an_address_that_is_given_again_lets_nobody_in() -> Result<()> {
    let crowd = Crowd::new()?;
    crowd.allow(&[])?;
    let engine = &crowd.scene.engine;
    let its = crowd.scene.address(&crowd.web, &crowd.app)?;
    // From its first moment on.
    let dial = "while :; do echo x | timeout 1 nc 10.50.0.1 8080; done";
    engine.cli(&["create", "--name", "heir", "--network", "app", "--ip", &its, IMAGE, "sh", "-c", dial])?;
    for round in 0..3 {
        crowd.served(&crowd.web)?;
        let before = crowd.service.accepted();
        let (end, start): (&[&str], &[&str]) = match round {
            0 => (&["kill", "web"], &["start", "heir"]),
            1 => (&["stop", "--time", "0", "web"], &["start", "heir"]),
            // Its process runs already.
            _ => (
                &["network", "disconnect", "app", "web"],
                &["network", "connect", "--ip", &its, "app", "far"],
            ),
        };
        engine.cli(end)?;
        let ended = Instant::now();
        // It may be a moment until the address is free.
        patience::until("the other has the address", || Ok(engine.cli(start).is_ok().then_some(())))?;
        let given = ended.elapsed();
        if round == 2 {
            crowd.refused(&crowd.far)?;
        } else {
            thread::sleep(Duration::from_millis(300));
        }
        println!("given again {given:?} after the command that ended it");
        ensure!(crowd.service.accepted() == before, "the address let another in");
        if round < 2 {
            engine.cli(&["kill", "heir"])?;
            engine.cli(&["start", "web"])?;
            crowd.wait_for("steered", "for web")?;
        }
    }
    Ok(())
}

fn a_relay_serves_the_named_container_alone() -> Result<()> {
    let crowd = Crowd::new()?;
    crowd.allow(&["--path", "relay"])?;
    crowd.wait_for("relayed", "as the rule asks; for web")?;
    crowd.served(&crowd.web)?;
    let out = |container: &Container| -> Result<()> {
        let before = crowd.service.accepted();
        crowd.scene.not_served(container, crowd.to())?;
        ensure!(crowd.service.accepted() == before, "it got through");
        Ok(())
    };
    out(&crowd.other)?;
    out(&crowd.far)?;
    let its = crowd.scene.address(&crowd.web, &crowd.app)?;
    crowd.scene.engine.cli(&["kill", "web"])?;
    crowd.wait_for("waiting", "container web is not running")?;
    let heir = crowd.scene.engine.run("app", &["--name", "heir", "--ip", &its])?;
    out(&heir)?;
    crowd.scene.engine.cli(&["start", "web"])?;
    crowd.wait_for("relayed", "as the rule asks; for web")?;
    crowd.served(&crowd.web)?;
    out(&heir)
}

fn the_service_may_see_a_local_peer() -> Result<()> {
    let crowd = Crowd::new()?;
    crowd.allow(&["--source", "loopback"])?;
    let greeting = crowd.scene.served(&crowd.web, crowd.to(), "service")?;
    ensure!(greeting.peer.ip().is_loopback(), "{greeting:?}");
    crowd.refused(&crowd.other)
}

/// A container that the rule is not for gets to whoever listens on all addresses, as without lbridge, and is
/// what it is there.
fn whoever_is_not_named_is_no_local_peer() -> Result<()> {
    let crowd = Crowd::new()?;
    let _wide = crowd.scene.service("wide", "0.0.0.0:8081")?;
    let allow = ["app", "8081=8080", "--from", "web", "--source", "loopback"];
    crowd.scene.daemon.allow(&allow)?;
    let to = crowd.app.at(8081);
    let greeting = crowd.scene.served(&crowd.web, to, "service")?;
    ensure!(greeting.peer.ip().is_loopback(), "{greeting:?}");
    let its = crowd.scene.address(&crowd.other, &crowd.app)?;
    let greeting = crowd.scene.served(&crowd.other, to, "wide")?;
    let seen = [greeting.accept.ip(), greeting.peer.ip()].map(|ip| ip.to_string());
    ensure!(seen == [its.clone(), its], "{greeting:?}");
    ensure!(greeting.local == to, "{greeting:?}");
    Ok(())
}

fn an_ipv6_container_is_named() -> Result<()> {
    let scene = Scene::new()?;
    scene.engine.create_network("six", &["--ipv6", "--subnet", "fd00:6::/64", "--gateway", "fd00:6::1"])?;
    let (web, other) =
        (scene.engine.run("six", &["--name", "web"])?, scene.engine.run("six", &["--name", "other"])?);
    let service = scene.service("six", "[::1]:8080")?;
    scene.daemon.allow(&["six", "8080", "--from", "web"])?;
    for container in [&web, &other] {
        let netns = scene.engine.netns(container)?;
        patience::until("the container's IPv6 address is usable", || {
            Ok((!netns.ip_output("-6 addr show tentative")?.contains("fd00:6")).then_some(()))
        })?;
    }
    let to = "[fd00:6::1]:8080".parse()?;
    scene.served(&web, to, "six")?;
    scene.refused(&other, to)?;
    ensure!(service.accepted() == 1, "one alone");
    let rule = scene.daemon.rule("six", 8080)?.context("the rule")?;
    let gateways = rule["gateways"].as_array().context("gateways")?;
    let all_for_web =
        gateways.iter().all(|gateway| gateway["why"].as_str().unwrap_or_default().contains("for web"));
    ensure!(all_for_web, "{rule}");
    Ok(())
}

fn a_bridge_has_the_containers_of_its_network() -> Result<()> {
    let crowd = Crowd::new()?;
    let daemon = &crowd.scene.daemon;
    let bridge = format!("bridge:{}", crowd.app.bridge);
    daemon.allow(&[&bridge, "8080", "--from", "web"])?;
    crowd.served(&crowd.web)?;
    crowd.refused(&crowd.other)?;
    crowd.scene.host.ip("link add own0 type bridge")?;
    crowd.scene.host.ip("addr add 10.60.0.1/24 dev own0")?;
    daemon.allow(&["bridge:own0", "8080", "--from", "web"])?;
    let state = daemon.rule_state("bridge:own0", 8080)?;
    ensure!(state.state == "blocked", "{state:?}");
    state.must_be_because("from_on_foreign_bridge")?;
    Ok(())
}

fn the_daemon_restarts() -> Result<()> {
    let mut crowd = Crowd::new()?;
    crowd.allow(&[])?;
    for kill in [false, true] {
        if kill {
            crowd.scene.daemon.kill9()?;
        } else {
            ensure!(crowd.scene.daemon.terminate()?.success());
        }
        // Nobody is there to follow the containers; who had the address gets in.
        crowd.served(&crowd.web)?;
        crowd.refused(&crowd.other)?;
        crowd.scene.daemon.restart()?;
        crowd.served(&crowd.web)?;
        crowd.refused(&crowd.other)?;
        crowd.wait_for("steered", "for web")?;
    }
    // What changed meanwhile is made good.
    crowd.scene.daemon.kill9()?;
    let its = crowd.scene.address(&crowd.web, &crowd.app)?;
    crowd.scene.engine.cli(&["kill", "web"])?;
    let heir = crowd.scene.engine.run("app", &["--name", "heir", "--ip", &its])?;
    crowd.scene.daemon.restart()?;
    crowd.refused(&heir)
}

fn the_engine_is_away() -> Result<()> {
    let mut crowd = Crowd::with(Scene::lasting()?)?;
    crowd.allow(&[])?;
    let [web, other] = [&crowd.web, &crowd.other].map(|container| crowd.scene.engine.netns(container));
    let (web, other) = (web?, other?);
    let pid = crowd.scene.engine.pid(&crowd.web)?.cast_signed();
    crowd.scene.engine.down()?;
    crowd.scene.wait_for_engine("away")?;
    client::served_by(&web, crowd.to(), "service")?;
    client::refused(&other, crowd.to())?;
    crowd.wait_for("steered", "for web")?;
    // Nobody tells that it ends.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    crowd.wait_for("waiting", "container web is not running")?;
    client::not_served(&web, None, crowd.to())?;
    crowd.scene.engine.up()?;
    crowd.scene.wait_for_engine("reachable")?;
    crowd.scene.engine.cli(&["start", "web"])?;
    crowd.wait_for("steered", "for web")?;
    crowd.served(&crowd.web)?;
    // A daemon that starts meanwhile knows whom it saw, and whether that is still there.
    let pid = crowd.scene.engine.pid(&crowd.web)?.cast_signed();
    let web = crowd.scene.engine.netns(&crowd.web)?;
    crowd.scene.engine.down()?;
    crowd.scene.wait_for_engine("away")?;
    crowd.scene.daemon.restart()?;
    crowd.wait_for("steered", "for web")?;
    client::served_by(&web, crowd.to(), "service")?;
    client::refused(&other, crowd.to())?;
    crowd.scene.daemon.terminate()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    crowd.scene.daemon.restart()?;
    crowd.wait_for("waiting", "container web is not running")?;
    client::not_served(&web, None, crowd.to())?;
    // One that never saw it lets nobody in.
    crowd.scene.daemon.terminate()?;
    fs::remove_file(crowd.scene.daemon.state_dir().join("containers.toml"))?;
    crowd.scene.daemon.restart()?;
    // An engine that has never answered goes by Docker's name.
    crowd.wait_for("waiting", "the engine does not answer, and container web was not seen before")?;
    crowd.scene.engine.up()?;
    crowd.scene.wait_for_engine("reachable")?;
    crowd.scene.engine.cli(&["start", "web"])?;
    crowd.wait_for("steered", "for web")
}

fn what_status_and_explain_say() -> Result<()> {
    let crowd = Crowd::new()?;
    let daemon = &crowd.scene.daemon;
    let output = daemon.allow(&["app", "8080", "--from", "web"])?;
    ensure!(output.stdout.trim_end().ends_with("-> 127.0.0.1:8080 steered (for web)"), "{output:?}");
    let [its, others] =
        [&crowd.web, &crowd.other].map(|container| crowd.scene.address(container, &crowd.app));
    let (its, others) = (its?, others?);
    let rule = daemon.rule("app", 8080)?.context("the rule")?;
    ensure!(rule["gateways"][0]["sources"] == serde_json::json!([its]), "{rule}");
    ensure!(daemon.cli(&["list"])?.stdout.contains("--from web"));
    let explained = |more: &[&str]| -> Result<Value> {
        let output = daemon.cli(&[&["explain", "--json", "app", "8080"], more].concat())?;
        ensure!(output.status == 0, "{output:?}");
        Ok(serde_json::from_str(&output.stdout)?)
    };
    let by_itself = explained(&[])?;
    let way = &by_itself["ways"][0];
    ensure!(way["fate"] == "steered" && way["source"] == its, "{by_itself:#}");
    let another = explained(&["--source", &others])?;
    let text = another.to_string();
    ensure!(another["ways"][0]["fate"] == "refused", "{another:#}");
    ensure!(text.contains(&format!("the rule is for {its}, not for {others}")), "{another:#}");
    daemon.deny(&["app", "8080"])?;
    crowd.allow(&["--path", "relay"])?;
    ensure!(explained(&[])?["ways"][0]["fate"] == "relayed");
    ensure!(explained(&["--source", &others])?["ways"][0]["fate"] == "refused");
    Ok(())
}

fn verify_tries_both() -> Result<()> {
    let crowd = Crowd::new()?;
    let its = crowd.scene.address(&crowd.web, &crowd.app)?;
    for more in [&[][..], &["--path", "relay"]] {
        crowd.allow(more)?;
        let output = crowd.scene.daemon.cli(&["verify", "--json"])?;
        ensure!(output.status == 0, "{output:?}");
        let report: Value = serde_json::from_str(&output.stdout)?;
        let checks = report["checks"].as_array().context("checks")?;
        let found = |from: &str, expected: &str| {
            checks.iter().any(|check| check["from"] == from && check["expected"] == expected)
        };
        ensure!(found(&format!("app, as {its}"), "open") && found("app", "refused"), "{report:#}");
        ensure!(found(&format!("elsewhere, as {its}"), "closed"), "{report:#}");
        crowd.scene.daemon.deny(&["app", "8080"])?;
    }
    crowd.allow(&[])?;
    crowd.scene.engine.cli(&["kill", "web"])?;
    crowd.wait_for("waiting", "container web is not running")?;
    let output = crowd.scene.daemon.cli(&["verify"])?;
    ensure!(output.status == 0, "{output:?}");
    Ok(())
}

fn a_rule_of_the_configuration_is_changed() -> Result<()> {
    let crowd = Crowd::new()?;
    let reload = |from: &str| -> Result<()> {
        let rule = format!("[[rule]]\nnetwork = \"app\"\nport = 8080\n{from}\n");
        crowd.scene.reload(&rule).map(drop)
    };
    reload("from = [\"web\"]")?;
    crowd.served(&crowd.web)?;
    crowd.refused(&crowd.other)?;
    reload("")?;
    crowd.served(&crowd.other)?;
    reload("from = [\"other\"]")?;
    crowd.served(&crowd.other)?;
    crowd.refused(&crowd.web)
}

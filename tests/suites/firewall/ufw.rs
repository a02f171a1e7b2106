//! UFW, and Docker behind it.

use std::thread;

use anyhow::{Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::docker::Docker;
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::sandbox;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{Walled, dropped};

pub(crate) fn tests() -> Vec<Test> {
    tests![ufw_lets_in_what_is_allowed, ufw_reload_and_its_like, ufw_off, containers_behind_ufw]
}

/// UFW with its defaults: what comes in is dropped. Its files are private to the test.
pub(crate) fn enable(host: &NetNs) -> Result<()> {
    sandbox::shadow("/etc")?;
    host.shell("ufw --force enable && ufw status verbose | grep 'deny (incoming)'").map(drop)
}

fn ufw_lets_in_what_is_allowed() -> Result<()> {
    let walled = Walled::new()?;
    enable(walled.host())?;
    let before = walled.must("iptables -S; ip6tables -S")?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    dropped(&walled.scene.container, walled.scene.gateway(8080))?;
    walled.scene.allow(&["8080"])?;
    walled.scene.served(8080, "walled")?;
    dropped(&walled.scene.container, walled.scene.gateway(8081))?;
    walled.elsewhere_is_dropped(8080)?;
    ensure!(!walled.must("ufw status")?.contains("8080"), "UFW's own rules are the administrator's");
    walled.scene.deny(&["8080"])?;
    ensure!(walled.must("iptables -S; ip6tables -S")? == before);
    Ok(())
}

fn ufw_reload_and_its_like() -> Result<()> {
    let walled = Walled::new()?;
    enable(walled.host())?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080"])?;
    for command in [
        "ufw reload",
        "ufw allow 22/tcp",
        "ufw --force disable && ufw --force enable",
        "iptables -F INPUT",
        "iptables-save | grep -v lbridge | iptables-restore",
        "iptables-save > /run/rules && iptables-restore < /run/rules",
        "ufw --force reset && ufw --force enable",
        "iptables -I INPUT -i lab0 -j DROP",
    ] {
        walled.must(command)?;
        walled.scene.soon_served(8080, "walled")?;
        walled.scene.wait_for(8080, "steered")?;
        let rules = walled.must("iptables -S INPUT")?;
        ensure!(rules.matches("lbridge").count() == 1, "{command}: {rules}");
    }
    walled.scene.deny(&["8080"])?;
    ensure!(!walled.must("iptables -S; ip6tables -S")?.contains("lbridge"));
    Ok(())
}

fn ufw_off() -> Result<()> {
    let walled = Walled::off()?;
    enable(walled.host())?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080"])?;
    let why = walled.scene.must_be(8080, "blocked")?.why.unwrap_or_default();
    ensure!(
        why == "firewall UFW drops it; type: ufw allow in on lab0 from 10.7.0.0/24 to 10.7.0.1 port 8080 \
                proto tcp",
        "{why}"
    );
    walled.must("ufw allow in on lab0 from 10.7.0.0/24 to 10.7.0.1 port 8080 proto tcp")?;
    walled.scene.wait_for(8080, "steered")?;
    walled.scene.served(8080, "walled").map(drop)
}

/// A Docker host as there are many: the engine's rules and UFW's in the same tables, both ways of containers
/// to a service.
fn containers_behind_ufw() -> Result<()> {
    let engine = Docker::start()?;
    let host = NetNs::current()?;
    host.shell("ufw --force enable")?;
    let daemon = Daemon::start_with(&host, Options { docker: true, ..Options::default() })?;
    let network = engine.create_network("app", &[])?;
    let other = engine.create_network("other", &[])?;
    let container = engine.run("app", &[])?;
    let stranger = engine.run("other", &[])?;
    let _service = Service::start(&host, "behind", "127.0.0.1:8080")?;
    let gateway = (network.gateway, 8080).into();
    dropped(&engine.netns(&container)?, gateway)?;
    daemon.allow(&["app", "8080"])?;
    client::served_by(&engine.netns(&container)?, gateway, "behind")?;
    dropped(&engine.netns(&stranger)?, gateway)?;
    dropped(&engine.netns(&stranger)?, (other.gateway, 8080).into())?;

    // Containers that come and go change the same tables all the time; nobody who is served notices.
    let busy = thread::scope(|scope| {
        let changes = scope.spawn(|| -> Result<()> {
            for port in 9001..9004 {
                let published = engine.run("other", &["-p", &format!("127.0.0.1:{port}:80")])?;
                engine.remove(&published)?;
            }
            Ok(())
        });
        while !changes.is_finished() {
            client::served_by(&engine.netns(&container)?, gateway, "behind")?;
        }
        changes.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
    });
    busy?;
    engine.remove(&container)?;
    engine.remove_network("app")?;
    daemon.wait_for_state("app", 8080, "waiting")?;
    ensure!(!host.shell("iptables -S INPUT")?.contains("lbridge"), "the bridge is gone, and so is its rule");
    Ok(())
}

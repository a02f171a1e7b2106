//! Datagrams behind a firewall. What refuses one says what the host says of a port that nobody has: neither
//! is taken for arrival.

use anyhow::{Result, ensure};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::harness::udp::{Echo, served_by, silent};
use lbridge_tests::tests;

use super::{DROPS, Walled, ufw};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        udp_behind_nftables,
        udp_behind_iptables,
        udp_behind_what_rejects,
        udp_behind_ufw,
        udp_off_says_what_to_type,
    ]
}

fn served(walled: &Walled) -> Result<()> {
    let scene = &walled.scene;
    served_by(&scene.container, scene.container_ip, scene.gateway(53), "walled")
}

/// Traffic that is let through is served, other traffic is dropped as before, and `deny` leaves no trace.
fn served_until_denied(walled: &Walled) -> Result<()> {
    let scene = &walled.scene;
    let before = walled.must("nft list ruleset; iptables-legacy-save | grep -v '^#' | sed 's/\\[.*//'")?;
    let service = Echo::start(walled.host(), "walled", "127.0.0.1:53")?;
    scene.allow(&["53/udp"])?;
    scene.must_be(53, "steered")?;
    ensure!(service.received() == 0, "the try is kept from the service");
    served(walled)?;
    let got = service.received();
    silent(&scene.container, None, scene.gateway(54))?;
    silent(&walled.elsewhere, None, scene.gateway(53))?;
    ensure!(service.received() == got);
    // TCP of that port was not opened.
    let _tcp = scene.service("tcp", "10.7.0.1:53")?;
    super::dropped_or_rejected(&scene.container, scene.gateway(53))?;
    scene.deny(&["53/udp"])?;
    silent(&scene.container, None, scene.gateway(53))?;
    let after = walled.must("nft list ruleset; iptables-legacy-save | grep -v '^#' | sed 's/\\[.*//'")?;
    ensure!(after == before, "{after}");
    Ok(())
}

fn udp_behind_nftables() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    walled.scene.allow(&["53/udp"])?;
    ensure!(
        walled.own()?
            == [
                r#"iifname "lab0" ip saddr 10.7.0.0/24 ip daddr 10.7.0.1 udp dport 53 accept comment "lbridge""#
            ],
        "{}",
        walled.ruleset()?
    );
    // Beside TCP's.
    walled.scene.allow(&["53"])?;
    ensure!(walled.own()?.len() == 2);
    walled.scene.deny(&["53"])?;
    ensure!(walled.own()?.len() == 1);
    walled.scene.deny(&["53/udp"])?;
    served_until_denied(&walled)
}

fn udp_behind_iptables() -> Result<()> {
    for program in ["iptables-nft", "iptables-legacy"] {
        let walled = Walled::new()?;
        walled.must(&format!(
            "{program} -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT && \
             {program} -P INPUT DROP"
        ))?;
        served_until_denied(&walled)?;
    }
    Ok(())
}

/// With the very answer of a closed port.
fn udp_behind_what_rejects() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(
        "nft 'table ip f \
         { chain in \
         { type filter hook input priority 0; ct state established accept; iifname lo accept; reject \
         with icmp port-unreachable; }; }'",
    )?;
    served_until_denied(&walled)
}

fn udp_behind_ufw() -> Result<()> {
    let walled = Walled::new()?;
    ufw::enable(walled.host())?;
    let _service = Echo::start(walled.host(), "walled", "127.0.0.1:53")?;
    silent(&walled.scene.container, None, walled.scene.gateway(53))?;
    walled.scene.allow(&["53/udp"])?;
    served(&walled)?;
    walled.must("ufw reload")?;
    patience::until("served after a reload", || Ok(served(&walled).ok()))
}

fn udp_off_says_what_to_type() -> Result<()> {
    let walled = Walled::off()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let _service = Echo::start(walled.host(), "walled", "127.0.0.1:53")?;
    walled.scene.allow(&["53/udp"])?;
    let state = walled.scene.must_be(53, "blocked")?;
    let why = state.why.unwrap_or_default();
    let command = why.split_once("type: ").map(|(_, command)| command.to_owned()).unwrap_or_default();
    ensure!(command.contains("udp dport 53 accept"), "{why}");
    walled.must(&command)?;
    patience::until("let through by hand", || Ok(served(&walled).ok()))?;
    walled.scene.wait_for(53, "steered").map(drop)
}

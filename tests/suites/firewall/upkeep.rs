//! Accept rules over the life of the daemon, and what the tries leave behind: nothing.

use anyhow::{Result, ensure};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use super::{DROPS, Walled, dropped};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_flushed_rule_comes_back,
        a_firewall_that_comes_later,
        rules_outlive_the_daemon,
        what_was_denied_meanwhile_goes,
        off_takes_back_what_was_managed,
        the_bridge_is_as_it_was,
        a_kill_leaves_no_link,
    ]
}

fn a_flushed_rule_comes_back() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080"])?;
    for command in [
        "nft flush chain inet filter input".to_owned(),
        // As `systemctl reload nftables` does it: one transaction, and lbridge's is not in the file.
        format!("nft 'flush ruleset; {DROPS}'"),
        // Saved with it, and loaded twice, behind a rule that drops.
        "nft list ruleset > /run/saved; nft add rule inet filter input drop; nft -f /run/saved".to_owned(),
        "nft insert rule inet filter input iifname lab0 drop".to_owned(),
    ] {
        walled.must(&command)?;
        walled.scene.soon_served(8080, "walled")?;
        walled.scene.wait_for(8080, "steered")?;
        patience::until("one rule", || {
            let own = walled.own()?;
            Ok((own.iter().filter(|line| line.contains("ip daddr")).count() == 1).then_some(()))
        })?;
    }
    Ok(())
}

fn a_firewall_that_comes_later() -> Result<()> {
    let walled = Walled::new()?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080"])?;
    walled.scene.served(8080, "walled")?;
    walled.must(&format!("nft '{DROPS}'"))?;
    walled.scene.soon_served(8080, "walled")?;
    patience::until("an accept rule", || Ok((!walled.own()?.is_empty()).then_some(())))
}

fn rules_outlive_the_daemon() -> Result<()> {
    let mut walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080"])?;
    let own = walled.ruleset()?;
    walled.scene.daemon.kill9()?;
    walled.scene.served(8080, "walled")?;
    walled.scene.daemon.restart()?;
    walled.scene.daemon.restart()?;
    ensure!(walled.ruleset()? == own, "neither more nor fewer: {}", walled.ruleset()?);
    walled.scene.served(8080, "walled")?;
    walled.scene.deny(&["8080"])?;
    ensure!(walled.own()?.is_empty());
    Ok(())
}

fn what_was_denied_meanwhile_goes() -> Result<()> {
    let mut walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    walled.must("iptables-legacy -P INPUT DROP; iptables-nft -P INPUT DROP")?;
    walled.scene.allow(&["8080"])?;
    walled.scene.daemon.terminate()?;
    std::fs::remove_file(walled.scene.daemon.rules_file())?;
    ensure!(!walled.own()?.is_empty());
    // Others may say the same words.
    walled.must("nft 'add rule inet filter input tcp dport 99 accept comment \"lbridge\"'")?;
    walled.scene.daemon.restart()?;
    let own = walled.own()?;
    ensure!(own == [r#"tcp dport 99 accept comment "lbridge""#], "{own:?}");
    ensure!(!walled.must("iptables-legacy -S; iptables-nft -S")?.contains("lbridge"));
    Ok(())
}

fn off_takes_back_what_was_managed() -> Result<()> {
    let mut walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let before = walled.ruleset()?;
    walled.scene.allow(&["8080"])?;
    ensure!(!walled.own()?.is_empty());
    std::fs::write(walled.scene.daemon.config(), "firewall = \"off\"\n")?;
    walled.scene.daemon.restart()?;
    ensure!(walled.ruleset()? == before);
    walled.scene.must_be(8080, "blocked")?;
    dropped(&walled.scene.container, walled.scene.gateway(8080))
}

/// Containers would lose their way to a bridge that changes its hardware address, even for a moment.
fn the_bridge_is_as_it_was() -> Result<()> {
    let walled = Walled::new()?;
    let links =
        || walled.must("ip -o link show | sed 's/^[0-9]*: \\([^:]*\\):.*\\(link.*\\) brd.*/\\1: \\2/'");
    let (before, log) = (links()?, "/run/monitor");
    let mut monitor =
        walled.host().command("sh").args(["-c", &format!("exec ip monitor link > {log}")]).spawn()?;
    for port in 8080..8084 {
        walled.scene.allow(&[&port.to_string()])?;
    }
    drop(monitor.kill());
    monitor.wait()?;
    ensure!(links()? == before, "{}", links()?);
    let monitored = std::fs::read_to_string(log)?;
    let mac = before
        .lines()
        .find(|line| line.starts_with("lab0"))
        .and_then(|line| line.split("link/ether ").nth(1));
    let mac = mac.and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    let others: Vec<_> = monitored
        .lines()
        .zip(monitored.lines().skip(1))
        .filter(|(first, second)| first.contains(" lab0: ") && !second.contains(mac))
        .collect();
    ensure!(others.is_empty(), "{mac}: {others:?}");
    Ok(())
}

fn a_kill_leaves_no_link() -> Result<()> {
    let mut walled = Walled::new()?;
    // What is dropped is waited for, with the link in place.
    walled.must(
        "nft 'table inet raw \
         { chain pre { type filter hook prerouting priority raw; iifname lab0 drop; }; }'",
    )?;
    let mut allow = walled.scene.daemon.command()?.args(["allow", "bridge:lab0", "8080"]).spawn()?;
    let probing = || Ok(walled.must("ip -o link show")?.contains("lbr").then_some(()));
    patience::until("a probe", probing)?;
    walled.scene.daemon.kill9()?;
    allow.wait()?;
    patience::until("the link is gone", || {
        Ok((!walled.must("ip -o link show")?.contains("lbr")).then_some(()))
    })
}

//! nftables and both kinds of iptables: what drops is found, and the accept rule is put where it counts.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn};

use super::{DROPS, Walled, dropped};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_host_without_a_firewall_gets_none,
        nftables_policy_drop,
        nftables_that_rejects_at_its_end,
        every_chain_that_drops,
        ipv6_gateway,
        iptables_nft,
        iptables_legacy,
        a_relay_is_let_in,
        a_service_that_is_down_is_refused_at_once,
        off_says_what_to_type,
        off_for_every_firewall,
        a_drop_that_no_chain_shows,
        a_bridge_whose_name_is_a_pattern,
        another_container_does_not_answer_the_try,
        what_others_put_meanwhile_stays,
        a_ruleset_that_changes_all_the_time,
        trying_is_not_noticed,
    ]
}

/// Traffic that is let through is served, other traffic is dropped as before, and `deny` leaves no trace.
fn served_until_denied(walled: &Walled, before: &str) -> Result<()> {
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    dropped(&walled.scene.container, walled.scene.gateway(8080))?;
    walled.scene.allow(&["8080"])?;
    walled.scene.must_be(8080, "steered")?;
    walled.scene.served(8080, "walled")?;
    dropped(&walled.scene.container, walled.scene.gateway(8081))?;
    walled.elsewhere_is_dropped(8080)?;
    walled.scene.deny(&["8080"])?;
    dropped(&walled.scene.container, walled.scene.gateway(8080))?;
    ensure!(walled.ruleset()? == before, "{}", walled.ruleset()?);
    Ok(())
}

fn a_host_without_a_firewall_gets_none() -> Result<()> {
    let walled = Walled::new()?;
    let _service = walled.scene.service("open", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080"])?;
    walled.scene.served(8080, "open")?;
    ensure!(walled.ruleset()?.is_empty(), "{}", walled.ruleset()?);
    // Nor one that lets it through anyway.
    walled.must(
        "nft 'add table inet t; add chain inet t c \
         { type filter hook input priority 0; policy drop; }; add rule inet t c accept'",
    )?;
    walled.scene.must_be(8080, "steered")?;
    ensure!(walled.own()?.is_empty(), "{}", walled.ruleset()?);
    Ok(())
}

fn nftables_policy_drop() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let before = walled.ruleset()?;
    walled.scene.allow(&["8080"])?;
    ensure!(
        walled.own()?
            == [
                r#"iifname "lab0" ip saddr 10.7.0.0/24 ip daddr 10.7.0.1 tcp dport 8080 accept comment "lbridge""#
            ],
        "{}",
        walled.ruleset()?
    );
    // Again: still one.
    walled.scene.allow(&["8080"])?;
    ensure!(walled.own()?.len() == 1);
    walled.scene.deny(&["8080"])?;
    served_until_denied(&walled, &before)
}

/// Policy accept, and a last rule for what nobody accepted; the usual shape beside policy drop.
fn nftables_that_rejects_at_its_end() -> Result<()> {
    for last in ["reject", "counter jump end", "ip protocol vmap { tcp : drop }"] {
        let walled = Walled::new()?;
        walled.must(&format!(
            "nft 'table ip f {{ chain end {{ reject with icmp host-prohibited; }}; chain in \
             {{ type filter hook input priority 0; iifname lo accept; {last}; }}; }}'"
        ))?;
        let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
        let before = walled.ruleset()?;
        ensure!(
            !matches!(
                client::attempt(&walled.scene.container, walled.scene.gateway(8080)),
                Attempt::Served(_)
            ),
            "{last}"
        );
        walled.scene.allow(&["8080"])?;
        walled.scene.served(8080, "walled")?;
        ensure!(walled.own()?.len() == 1, "{last}");
        walled.scene.deny(&["8080"])?;
        let stateless =
            |text: String| text.replace("packets", "").replace("bytes", "").replace(char::is_numeric, "");
        ensure!(stateless(walled.ruleset()?) == stateless(before), "{}", walled.ruleset()?);
    }
    Ok(())
}

/// An accept in one does not help against a drop in the other.
fn every_chain_that_drops() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    walled.must("iptables-nft -P INPUT DROP; iptables-nft -A INPUT -i lo -j ACCEPT")?;
    walled.must("nft 'table ip6 other { chain in { type filter hook input priority 0; policy drop; }; }'")?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080"])?;
    walled.scene.served(8080, "walled")?;
    ensure!(walled.must("nft list chain inet filter input")?.contains("lbridge"));
    ensure!(walled.must("iptables-nft -S INPUT")?.contains("lbridge"));
    let other = walled.must("nft list chain ip6 other in")?;
    ensure!(!other.contains("lbridge"), "no packet of the rule's comes by there: {other}");
    walled.scene.deny(&["8080"])?;
    ensure!(walled.own()?.is_empty() && !walled.must("iptables-nft -S")?.contains("lbridge"));
    Ok(())
}

fn ipv6_gateway() -> Result<()> {
    let walled = Walled::v6()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    walled.must("ip6tables-nft -P INPUT DROP; ip6tables-nft -A INPUT -p icmpv6 -j ACCEPT")?;
    let _service = Service::start(walled.host(), "six", "[::1]:8080")?;
    walled.scene.allow(&["8080"])?;
    // Who the gateway is cannot even be asked.
    let why = walled.scene.must_be(8080, "blocked")?.why.unwrap_or_default();
    ensure!(why.contains("nd-neighbor-solicit"), "{why}");
    walled.must(
        "nft add rule inet filter input icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
    )?;
    walled.scene.wait_for(8080, "steered")?;
    walled.scene.served(8080, "six")?;
    let rules = walled.must("ip6tables-nft -S INPUT")?;
    ensure!(
        rules.contains(
            "-d fd07::1/128 -i lab0 -p tcp -m tcp --dport 8080 -m comment --comment lbridge -j ACCEPT"
        ),
        "{rules}"
    );
    walled.scene.deny(&["8080"])?;
    ensure!(walled.own()?.is_empty() && !walled.must("ip6tables-nft -S")?.contains("lbridge"));
    dropped(&walled.scene.container, walled.scene.gateway(8080))
}

fn iptables_nft() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(
        "iptables-nft -P INPUT DROP; iptables-nft -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT",
    )?;
    walled.scene.allow(&["8080"])?;
    let rules = walled.must("iptables-nft -S INPUT")?;
    let ours = "-A INPUT -s 10.7.0.0/24 -d 10.7.0.1/32 -i lab0 -p tcp -m tcp --dport 8080 -m comment \
                --comment lbridge -j ACCEPT";
    ensure!(rules.lines().nth(1) == Some(ours), "{rules}");
    ensure!(rules.matches("lbridge").count() == 1, "{rules}");
    walled.scene.deny(&["8080"])?;
    // What iptables reads it can still read.
    let before = walled.ruleset()?;
    served_until_denied(&walled, &before)
}

fn iptables_legacy() -> Result<()> {
    let walled = Walled::new()?;
    walled.must("iptables-legacy -P INPUT DROP; iptables-legacy -A INPUT -i lo -j ACCEPT")?;
    let rules = walled.must("iptables-legacy -S")?;
    served_until_denied(&walled, &walled.ruleset()?)?;
    ensure!(walled.must("iptables-legacy -S")? == rules);
    walled.scene.allow(&["8080"])?;
    ensure!(walled.must("iptables-legacy -S")?.matches("lbridge").count() == 1);
    // Tables that nobody uses are not made.
    ensure!(!walled.must("cat /proc/net/ip6_tables_names || true")?.contains("filter"));
    Ok(())
}

fn a_relay_is_let_in() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let _service = walled.scene.service("relayed", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080", "--path", "relay"])?;
    walled.scene.must_be(8080, "relayed")?;
    walled.scene.served(8080, "relayed").map(drop)
}

fn a_service_that_is_down_is_refused_at_once() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    walled.scene.allow(&["8080"])?;
    walled.scene.must_be(8080, "waiting")?;
    walled.scene.refused(8080)
}

fn off_says_what_to_type() -> Result<()> {
    let walled = Walled::off()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let before = walled.ruleset()?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    walled.scene.allow(&["8080"])?;
    let state = walled.scene.must_be(8080, "blocked")?;
    ensure!(walled.ruleset()? == before, "nothing is touched");
    let why = state.why.unwrap_or_default();
    let command = why.strip_prefix("firewall nftables drops it; type: ").unwrap_or_default();
    walled.must(command)?;
    walled.scene.wait_for(8080, "steered")?;
    walled.scene.served(8080, "walled")?;
    walled.elsewhere_is_dropped(8080)
}

fn off_for_every_firewall() -> Result<()> {
    for (setup, firewall) in
        [("iptables-nft -P INPUT DROP", "iptables"), ("iptables-legacy -P INPUT DROP", "iptables")]
    {
        let walled = Walled::off()?;
        walled.must(setup)?;
        let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
        walled.scene.allow(&["8080"])?;
        let why = walled.scene.must_be(8080, "blocked")?.why.unwrap_or_default();
        let command = why.strip_prefix(&format!("firewall {firewall} drops it; type: ")).unwrap_or_default();
        walled.must(command)?;
        // Nothing tells of the old tables' changes: it is tried again after a while, and at once when it is
        // allowed again.
        walled.scene.allow(&["8080"])?;
        walled.scene.must_be(8080, "steered")?;
        walled.scene.served(8080, "walled")?;
    }
    Ok(())
}

fn a_drop_that_no_chain_shows() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(
        "nft 'table inet raw \
         { chain pre { type filter hook prerouting priority raw; iifname lab0 tcp dport 8080 drop; }; }'",
    )?;
    let before = walled.ruleset()?;
    walled.scene.allow(&["8080"])?;
    let why = walled.scene.must_be(8080, "blocked")?.why.unwrap_or_default();
    ensure!(why.contains("prerouting"), "{why}");
    ensure!(walled.ruleset()? == before);
    walled.must("nft flush ruleset")?;
    walled.scene.wait_for(8080, "waiting").map(drop)
}

/// To nft `br*` is every interface that begins so; to iptables `br+` is.
fn a_bridge_whose_name_is_a_pattern() -> Result<()> {
    let walled = Walled::with(Options::default())?;
    walled.must(&format!("nft '{DROPS}'"))?;
    for (name, number) in [("la*", 20), ("la+", 21), ("@la", 22), ("!la", 23), ("$(id)", 24)] {
        let bridge = walled.scene.lab.add_bridge(name, &format!("10.{number}.0.1/24"))?;
        let before = walled.ruleset()?;
        walled.scene.daemon.allow(&[&bridge.network(), "8080"])?;
        walled.scene.daemon.allow(&[&bridge.network(), "8080"])?;
        let state = walled.scene.daemon.rule_state(&bridge.network(), 8080)?;
        ensure!(state.state == "blocked", "{name}: {state:?}");
        ensure!(state.why.as_ref().is_some_and(|why| why.contains("by hand")), "{name}: {state:?}");
        // A command with that name would open more, or do something else.
        ensure!(state.why.as_ref().is_some_and(|why| !why.contains(name)), "{name}: {state:?}");
        ensure!(walled.ruleset()? == before, "{name}: {}", walled.ruleset()?);
    }
    Ok(())
}

/// Somebody on the bridge answers in the gateway's name for what the firewall drops.
fn another_container_does_not_answer_the_try() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    // To whoever has the address that the try is sent from.
    walled
        .scene
        .container
        .shell("ip neigh replace 10.7.0.254 lladdr ff:ff:ff:ff:ff:ff dev eth0 nud permanent")?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let liar = scope.spawn(|| walled.scene.container.run(|| answer_in_the_gateways_name(&over)));
        let told = walled.scene.allow(&["8080"]).and_then(|()| walled.scene.served(8080, "walled"));
        over.store(true, Ordering::Relaxed);
        liar.join().map_err(|_| anyhow!("a panic"))??;
        told.map(drop)
    })
}

/// Sends SYN-ACKs from 10.7.0.1:8080 to 10.7.0.254:1023 until it is over.
fn answer_in_the_gateways_name(over: &AtomicBool) -> Result<()> {
    let socket =
        socket::socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    let mut packet = [0; 40];
    // IPv4 (RFC 791); the kernel puts length and checksum (raw(7)). Then TCP, whose checksum no raw socket
    // looks at.
    packet[0] = 0x45;
    packet[8..10].copy_from_slice(&[64, 6]);
    packet[12..20].copy_from_slice(&[10, 7, 0, 1, 10, 7, 0, 254]);
    packet[20..22].copy_from_slice(&8080_u16.to_be_bytes());
    packet[22..24].copy_from_slice(&1023_u16.to_be_bytes());
    packet[28..32].copy_from_slice(&1_u32.to_be_bytes());
    packet[32..34].copy_from_slice(&[0x50, 0x12]);
    let to = SockaddrIn::new(10, 7, 0, 254, 0);
    while !over.load(Ordering::Relaxed) {
        socket::sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty())?;
        thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// While lbridge moves its rule to the front somebody puts one there, as fail2ban does.
fn what_others_put_meanwhile_stays() -> Result<()> {
    for program in ["iptables-legacy", "iptables-nft"] {
        // Whatever lbridge reads there is out of date at once.
        let folder = tempfile::tempdir()?;
        let (wrapper, path) = (folder.path().join(program), std::env::var("PATH")?);
        let real = NetNs::current()?.shell(&format!("command -v {program}"))?;
        let real = real.trim();
        fs::write(
            &wrapper,
            format!(
                "#!/bin/sh\n{real} \"$@\" || exit\ncase \"$*\" in *'-S INPUT') {real} -I INPUT -s 192.0.2.1 \
                 -j ACCEPT; esac\n"
            ),
        )?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
        let env = vec![("PATH".to_owned(), format!("{}:{path}", folder.path().display()))];
        let walled = Walled::with(Options { env, ..Options::default() })?;
        walled.must(&format!("{program} -P INPUT DROP"))?;
        let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
        walled.scene.allow(&["8080"])?;
        // What is behind this one does not count.
        walled.must(&format!("{program} -I INPUT -i lab0 -j DROP"))?;
        walled.scene.allow(&["8080"])?;
        walled.scene.soon_served(8080, "walled")?;
        let rules = walled.must(&format!("{program} -S INPUT"))?;
        ensure!(rules.matches("-i lab0 -j DROP").count() == 1, "{rules}");
        ensure!(rules.matches("-s 192.0.2.1").count() >= 2, "{rules}");
        ensure!(rules.matches("lbridge").count() == 1, "{rules}");
    }
    Ok(())
}

/// Each change, fail2ban's, say, may be the one that matters; none of them keeps lbridge from letting in.
fn a_ruleset_that_changes_all_the_time() -> Result<()> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let _service = walled.scene.service("walled", "127.0.0.1:8080")?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let other = scope.spawn(|| -> Result<()> {
            for number in 1_u16.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                walled.must(&format!("nft add rule inet filter input tcp dport {number} drop"))?;
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        let told = walled.scene.allow(&["8080"]).and_then(|()| {
            walled.must("nft insert rule inet filter input iifname lab0 drop")?;
            walled.scene.soon_served(8080, "walled")
        });
        over.store(true, Ordering::Relaxed);
        other.join().map_err(|_| anyhow!("a panic"))??;
        told.map(drop)
    })
}

/// The service sees no connection, and none is counted, however often it is tried.
fn trying_is_not_noticed() -> Result<()> {
    let walled = Walled::new()?;
    let service = walled.scene.service("walled", "127.0.0.1:8080")?;
    let relayed = walled.scene.service("relayed", "127.0.0.1:8081")?;
    walled.scene.allow(&["8080"])?;
    walled.scene.allow(&["8081", "--path", "relay"])?;
    for round in 0..3 {
        walled.must(&format!("nft add table inet t{round}"))?;
        walled.must(&format!(
            "nft 'add chain inet t{round} c {{ type filter hook input priority {round}; policy drop; }}'"
        ))?;
        patience::until("an accept rule more", || {
            let own = walled.own()?;
            let of_port = own.iter().filter(|line| line.contains("10.7.0.1 tcp dport 8080"));
            Ok((of_port.count() == round + 1).then_some(()))
        })?;
        walled.scene.wait_for(8080, "steered")?;
    }
    ensure!((service.accepted(), relayed.accepted()) == (0, 0));
    for port in [8080, 8081] {
        let rule = walled.scene.daemon.rule("bridge:lab0", port)?.unwrap_or_default();
        ensure!(rule["gateways"][0]["connections"] == 0, "{rule}");
    }
    walled.scene.served(8080, "walled")?;
    let rule = walled.scene.daemon.rule("bridge:lab0", 8080)?.unwrap_or_default();
    ensure!(rule["gateways"][0]["connections"] == 1, "{rule}");
    Ok(())
}

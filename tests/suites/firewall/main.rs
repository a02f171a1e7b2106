//! A firewall that drops: the container's SYN would never arrive. lbridge notices by trying, lets through
//! what rules open and nothing else, and takes it back.

mod accepted;
mod chains;
mod firewalld;
mod flows;
mod tools;
mod udp;
mod ufw;
mod upkeep;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::scene::{self, Scene};
use lbridge_tests::harness::suite::{Need, Suite};

fn main() {
    const NEEDS: &[Need] = &[
        Need::Program("nft"),
        Need::Program("iptables-nft"),
        Need::Program("iptables-legacy"),
        Need::Program("ufw"),
        Need::Program("dockerd"),
        Need::Program("systemctl"),
    ];
    let tests = [
        chains::tests(),
        accepted::tests(),
        firewalld::tests(),
        flows::tests(),
        ufw::tests(),
        udp::tests(),
        upkeep::tests(),
    ]
    .concat();
    let mut suite = Suite::new(NEEDS, tests);
    // firewalld and its command are Python, and started a dozen times: a test of theirs takes 15 s of a
    // processor, of which there may be a quarter.
    suite.limit = 180;
    suite.main()
}

/// Drops what nobody accepts, as a server's ruleset does.
const DROPS: &str = "table inet filter {
    chain input {
        type filter hook input priority filter; policy drop;
        iifname \"lo\" accept
        ct state established,related accept
        tcp dport 22 accept
    }
}";

/// A scene whose host has another bridge, with a container on it, that no rule names.
struct Walled {
    scene: Scene,
    elsewhere: NetNs,
}

impl Walled {
    fn new() -> Result<Walled> {
        Walled::with(Options::default())
    }

    fn off() -> Result<Walled> {
        Walled::with(Options { config: "firewall = \"off\"\n".to_owned(), ..Options::default() })
    }

    fn with(options: Options) -> Result<Walled> {
        Walled::at(scene::V4, options)
    }

    fn v6() -> Result<Walled> {
        Walled::at(scene::V6, Options::default())
    }

    fn at(addresses: (&str, &str), options: Options) -> Result<Walled> {
        let scene = Scene::with(addresses, options)?;
        let bridge = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
        let elsewhere = scene.lab.container(&bridge, "10.8.0.2/24")?;
        Ok(Walled { scene, elsewhere })
    }

    fn host(&self) -> &NetNs {
        self.scene.lab.host()
    }

    /// A shell command in the host's namespace, which must succeed.
    fn must(&self, command: &str) -> Result<String> {
        self.host().shell(command)
    }

    fn ruleset(&self) -> Result<String> {
        self.must("nft list ruleset")
    }

    /// Lines of the ruleset with lbridge's comment.
    fn own(&self) -> Result<Vec<String>> {
        let ruleset = self.ruleset()?;
        Ok(ruleset
            .lines()
            .filter(|line| line.contains("lbridge"))
            .map(|line| line.trim().to_owned())
            .collect())
    }

    /// The firewall drops what comes from the other bridge, to this rule's gateway and to its own.
    fn elsewhere_is_dropped(&self, port: u16) -> Result<()> {
        for to in [self.scene.gateway(port), SocketAddr::new("10.8.0.1".parse()?, port)] {
            dropped(&self.elsewhere, to)?;
        }
        Ok(())
    }
}

/// Whatever comes back, nobody serves.
fn dropped_or_rejected(from: &NetNs, to: SocketAddr) -> Result<()> {
    client::not_served(from, None, to)
}

/// Nothing comes back, not even a refusal.
fn dropped(from: &NetNs, to: SocketAddr) -> Result<()> {
    const LONG: Duration = Duration::from_millis(700);
    match client::dial(from, None, to, LONG) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(()),
        other => bail!("{to} should be dropped: {other:?}"),
    }
}

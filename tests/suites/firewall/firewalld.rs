//! firewalld, with the programs of a newer Debian: its tables have an owner, so that rules go through
//! firewalld itself.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::daemon;
use lbridge_tests::harness::forge;
use lbridge_tests::harness::lab::{Bridge, Lab};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::packages;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::systemd::{self, Systemd};
use lbridge_tests::harness::udp::Echo;
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        firewalld_lets_in_what_is_allowed: [Need::DebianRoot("trixie")],
        firewallds_docker_zone_needs_no_rule: [Need::DebianRoot("trixie")],
        firewalld_off: [Need::DebianRoot("trixie")],
        firewalld_opens_nothing_to_other_interfaces: [Need::DebianRoot("trixie")],
    ]
}

struct Host {
    systemd: Systemd,
    bridge: Bridge,
    container: NetNs,
    lab: Lab,
}

impl Host {
    fn boot() -> Result<Host> {
        let systemd = Systemd::boot_root(&packages::root("trixie")?)?;
        let program = systemd.path(systemd::LBRIDGE);
        fs::copy(daemon::binary()?, &program).context("copy lbridge")?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let lab = Lab::with_host(systemd.netns().clone());
        let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
        let container = lab.container(&bridge, "10.7.0.2/24")?;
        let host = Host { systemd, bridge, container, lab };
        host.run("systemctl start firewalld")?;
        host.run("lbridge service install")?;
        Ok(host)
    }

    fn run(&self, command: &str) -> Result<String> {
        let output = self.systemd.run("sh", &["-c", command])?;
        ensure!(output.status == 0, "{command}: {output:?}");
        Ok(output.stdout)
    }

    /// Rich rules of lbridge's, with their zones.
    fn own(&self) -> Result<Vec<String>> {
        let listed = self.run("firewall-cmd --list-all-zones")?;
        Ok(listed.lines().map(str::trim).filter(|line| line.contains("-21093")).map(str::to_owned).collect())
    }

    fn gateway(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.bridge.gateway(), port)
    }

    /// Dials, and expects firewalld's answer instead of the service's.
    fn denied(&self, port: u16) -> Result<()> {
        let attempt = client::attempt(&self.container, self.gateway(port));
        ensure!(
            matches!(&attempt, Attempt::Nothing(error) if error.kind() == io::ErrorKind::HostUnreachable),
            "{attempt:?}"
        );
        Ok(())
    }

    fn soon_served(&self) -> Result<()> {
        patience::until(
            "served",
            || Ok(client::served_by(&self.container, self.gateway(8080), "walled").ok()),
        )
        .map(drop)
    }
}

fn firewalld_lets_in_what_is_allowed() -> Result<()> {
    let host = Host::boot()?;
    host.denied(8080)?;
    let said = host.run("lbridge allow bridge:lab0 8080")?;
    ensure!(said.contains("waiting (nothing listens"), "{said}");
    // The rule first: the daemon does not see the processes of this host's outside.
    let _service = Service::start(host.lab.host(), "walled", "127.0.0.1:8080")?;
    client::served_by(&host.container, host.gateway(8080), "walled")?;
    let rule = "rule priority=\"-21093\" family=\"ipv4\" source address=\"10.7.0.0/24\" destination \
                address=\"10.7.0.1\" port port=\"8080\" protocol=\"tcp\" accept";
    ensure!(host.own()? == [rule], "{:?}", host.own()?);
    host.denied(8081)?;
    // A reload forgets what was not made to last.
    host.run("firewall-cmd --reload")?;
    host.soon_served()?;
    patience::until("one rule", || Ok((host.own()? == [rule]).then_some(())))?;
    // Another zone.
    host.run("firewall-cmd --zone=work --change-interface=lab0")?;
    host.soon_served()?;
    patience::until("in the other zone alone", || {
        let in_zone = host.run("firewall-cmd --zone=work --list-rich-rules")?;
        Ok((in_zone.trim() == rule && host.own()?.len() == 1).then_some(()))
    })?;
    host.run("lbridge deny bridge:lab0 8080")?;
    ensure!(host.own()?.is_empty(), "{:?}", host.own()?);
    host.denied(8080)?;
    // What a dead daemon left is given back.
    host.run("lbridge allow bridge:lab0 8080 8081 && systemctl stop lbridge")?;
    ensure!(host.own()?.len() == 2);
    let said = host.run("lbridge service cleanup")?;
    ensure!(host.own()?.is_empty() && said.contains("2 accept rules"), "{said}");
    Ok(())
}

/// A rich rule names the subnet, not the bridge, and every interface of the zone meets it: a datagram with an
/// address of the network as its source could come by any of them.
fn firewalld_opens_nothing_to_other_interfaces() -> Result<()> {
    let host = Host::boot()?;
    let elsewhere = host.lab.container(&host.lab.add_bridge("lab1", "10.8.0.1/24")?, "10.8.0.2/24")?;
    let own = Echo::start(host.lab.host(), "own", "0.0.0.0:5300")?;
    let of_network = SocketAddr::new("10.7.0.2".parse()?, 4000);
    let forged = || forge::datagram(&elsewhere, of_network, host.gateway(5300), b"forged");
    // The control: somebody else's rule of the same words lets them in.
    let rule = "rule family=\"ipv4\" source address=\"10.7.0.0/24\" destination address=\"10.7.0.1\" port \
                port=\"5300\" protocol=\"udp\" accept";
    host.run(&format!("firewall-cmd --add-rich-rule='{rule}'"))?;
    patience::until("a forged datagram arrives", || {
        forged()?;
        Ok((own.received() > 0).then_some(()))
    })?;
    host.run(&format!("firewall-cmd --remove-rich-rule='{rule}'"))?;
    host.run("lbridge allow bridge:lab0 5300/udp")?;
    ensure!(host.own()?.len() == 1, "{:?}", host.own()?);
    let before = own.received();
    for _ in 0..5 {
        forged()?;
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(own.received() == before, "the host's own service got {}", own.received() - before);
    host.run("lbridge deny bridge:lab0 5300/udp")?;
    ensure!(host.own()?.is_empty(), "{:?}", host.own()?);
    Ok(())
}

/// Where Docker puts its bridges, which accepts all.
fn firewallds_docker_zone_needs_no_rule() -> Result<()> {
    let host = Host::boot()?;
    host.run(
        "firewall-cmd --permanent --get-zones | grep -w docker || firewall-cmd --permanent --new-zone=docker",
    )?;
    host.run("firewall-cmd --permanent --zone=docker --set-target=ACCEPT && firewall-cmd --reload")?;
    host.run("firewall-cmd --zone=docker --change-interface=lab0")?;
    let said = host.run("lbridge allow bridge:lab0 8080")?;
    ensure!(said.contains("waiting (nothing listens"), "{said}");
    client::refused(&host.container, host.gateway(8080))?;
    ensure!(host.own()?.is_empty(), "{:?}", host.own()?);
    Ok(())
}

fn firewalld_off() -> Result<()> {
    let host = Host::boot()?;
    host.run(
        "sed -i 's/^#firewall = .*/firewall = \"off\"/' /etc/lbridge/lbridge.toml && systemctl reload \
         lbridge",
    )?;
    let said = host.run("lbridge allow bridge:lab0 8080")?;
    let (_, command) =
        said.split_once("blocked (firewall firewalld drops it; type: ").context(said.clone())?;
    let command = command.trim_end().strip_suffix(')').context(said.clone())?;
    host.run(command)?;
    patience::until("let in", || Ok(host.run("lbridge status")?.contains("waiting (nothing").then_some(())))?;
    client::refused(&host.container, host.gateway(8080))
}

//! The harness itself: a lab whose packets do not flow would prove nothing about lbridge.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::sandbox;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Suite};
use lbridge_tests::tests;

fn main() {
    let tests = tests![packets_flow, loopback_is_not_reached, the_sandbox_is_private, init_reaps];
    let mut suite = Suite::new(&[], tests);
    suite.needs = vec![Need::Root, Need::Cgroup2, Need::Program("ip")];
    suite.main()
}

/// Container to host, container to container of another bridge, LAN to a gateway: whatever is refused later
/// on is not refused for lack of a route.
fn packets_flow() -> Result<()> {
    let lab = Lab::new()?;
    let one = lab.add_bridge("lab0", "10.7.0.1/24 fd07::1/64")?;
    let two = lab.add_bridge("lab1", "10.8.0.1/24")?;
    let inside = lab.container(&one, "10.7.0.2/24 fd07::2/64")?;
    let outside = lab.container(&two, "10.8.0.2/24")?;
    let lan = lab.lan("192.0.2.1/24")?;
    let _v4 = Service::start(lab.host(), "v4", "10.7.0.1:80")?;
    let _v6 = Service::start(lab.host(), "v6", "[fd07::1]:80")?;

    for (netns, address) in [(&inside, "10.7.0.2"), (&outside, "10.8.0.2"), (&lan, "192.0.2.2")] {
        let greeting = client::served_by(netns, "10.7.0.1:80".parse()?, "v4")?;
        ensure!(greeting.peer.ip().to_string() == address, "{greeting:?}");
        ensure!(greeting.accept == greeting.peer && greeting.local == "10.7.0.1:80".parse()?, "{greeting:?}");
    }
    let greeting = client::served_by(&inside, "[fd07::1]:80".parse()?, "v6")?;
    ensure!(greeting.peer.ip().to_string() == "fd07::2", "{greeting:?}");
    client::refused(&inside, "10.7.0.1:81".parse()?)?;
    Ok(())
}

/// A service on the loopback is out of reach: otherwise lbridge would have nothing to do.
fn loopback_is_not_reached() -> Result<()> {
    let lab = Lab::new()?;
    let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
    let container = lab.container(&bridge, "10.7.0.2/24")?;
    let service = Service::start(lab.host(), "private", "127.0.0.1:80")?;
    client::served_by(lab.host(), service.address(), "private")?;
    client::refused(&container, "10.7.0.1:80".parse()?)?;
    ensure!(matches!(client::attempt(&container, service.address()), Attempt::Refused(_)));
    ensure!(service.accepted() == 1);
    service.stop();
    client::refused(lab.host(), "127.0.0.1:80".parse()?)
}

fn the_sandbox_is_private() -> Result<()> {
    let links = Command::new("ip").args(["-brief", "link"]).output()?;
    ensure!(String::from_utf8(links.stdout)?.lines().count() == 1, "only the loopback");
    let processes = fs::read_dir("/proc")?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
    ensure!(processes.count() == 2, "init and this process");
    ensure!(fs::read_to_string("/proc/self/cgroup")?.lines().any(|line| line == "0::/init"));
    let pins: Vec<_> = fs::read_dir(sandbox::BPFFS)?.flatten().map(|entry| entry.file_name()).collect();
    // The kernel's own, in newer ones.
    ensure!(pins.iter().all(|pin| pin == "maps.debug" || pin == "progs.debug"), "an empty bpffs: {pins:?}");
    ensure!(fs::read_dir("/run")?.flatten().map(|entry| entry.file_name()).eq(["lock"]), "an empty /run");
    fs::write(sandbox::shared_folder()?.join("file"), "gone with the sandbox")?;
    Ok(())
}

/// Orphans go to init, which must not mistake them for the command it waits for.
fn init_reaps() -> Result<()> {
    let status = Command::new("sh").args(["-c", "sleep 0.05 & sleep 0.1 & exit 7"]).status()?;
    ensure!(status.code() == Some(7), "{status}");
    std::thread::sleep(std::time::Duration::from_millis(300));
    let zombies =
        Command::new("sh").args(["-c", "cat /proc/[0-9]*/stat | grep -c ' Z ' || true"]).output()?;
    ensure!(zombies.stdout == b"0\n", "{zombies:?}");
    Ok(())
}

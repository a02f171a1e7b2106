//! The host's other programs and sockets notice nothing of lbridge.

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::Daemon;
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::programs::{self, AddressHook};
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::udp::{self, Echo};
use lbridge_tests::harness::{client, patience, sandbox};
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_sock_ops_program_before_ours_is_heard,
        a_sock_ops_program_after_ours_is_heard,
        a_sock_ops_program_is_heard_when_the_daemon_is_dead,
        programs_at_the_same_hooks_are_heard: [Need::TellsInterfaces],
    ]
}

/// An initial time-out of 50 jiffies, which is 50 to 500 ms. The default is a second.
const JIFFIES: u8 = 50;

/// Dials a neighbour that never answers; how long it took until the kernel gave up. One retry, so that it is
/// three times the initial time-out.
fn gives_up_after(host: &NetNs) -> Result<Duration> {
    host.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    let silent = [10, 7, 0, 99];
    host.run(|| {
        nobody_at(silent)?;
        let silent = std::net::IpAddr::from(silent);
        let begun = Instant::now();
        let error = TcpStream::connect((silent, 80)).err().map(|error| error.kind());
        ensure!(error == Some(io::ErrorKind::TimedOut), "nobody answers: {error:?}");
        Ok(begun.elapsed())
    })
}

/// Has packets to that address go to a link-layer address on `lab0` that nobody has (arp(7)).
fn nobody_at(ip: [u8; 4]) -> Result<()> {
    const ATF_COM: libc::c_int = 0x02;
    const ATF_PERM: libc::c_int = 0x04;
    // SAFETY: all zeroes is a valid value of this struct of integers.
    let mut request: libc::arpreq = unsafe { std::mem::zeroed() };
    request.arp_pa.sa_family = libc::AF_INET.try_into()?;
    // Of a `sockaddr_in` the address is behind the port.
    for (byte, value) in request.arp_pa.sa_data[2..].iter_mut().zip(ip) {
        *byte = libc::c_char::from_ne_bytes([value]);
    }
    request.arp_ha.sa_family = libc::ARPHRD_ETHER;
    for (byte, value) in request.arp_ha.sa_data.iter_mut().zip([2, 0, 0, 0, 0, 9]) {
        *byte = value;
    }
    for (byte, value) in request.arp_dev.iter_mut().zip(*b"lab0") {
        *byte = libc::c_char::from_ne_bytes([value]);
    }
    request.arp_flags = ATF_COM | ATF_PERM;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: the request outlives the call, which reads it.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSARP, &raw const request) };
    nix::errno::Errno::result(done).context("add a neighbour")?;
    Ok(())
}

fn heard(host: &NetNs) -> Result<()> {
    let took = gives_up_after(host)?;
    ensure!(took < Duration::from_secs(2), "the other program's time-out is not in force: {took:?}");
    Ok(())
}

fn lab() -> Result<Lab> {
    let lab = Lab::new()?;
    let _container = lab.container(&lab.add_bridge("lab0", "10.7.0.1/24")?, "10.7.0.2/24")?;
    Ok(lab)
}

fn a_sock_ops_program_before_ours_is_heard() -> Result<()> {
    let lab = lab()?;
    let alone = gives_up_after(lab.host())?;
    ensure!(alone > Duration::from_secs(2), "the default: {alone:?}");
    programs::ask_for_timeout(sandbox::CGROUP_ROOT.as_ref(), JIFFIES)?;
    heard(lab.host())?;
    let daemon = Daemon::start(lab.host())?;
    heard(lab.host())?;
    daemon.allow(&["bridge:lab0", "8080"])?;
    heard(lab.host())
}

fn a_sock_ops_program_after_ours_is_heard() -> Result<()> {
    let lab = lab()?;
    let _daemon = Daemon::start(lab.host())?;
    programs::ask_for_timeout(sandbox::CGROUP_ROOT.as_ref(), JIFFIES)?;
    heard(lab.host())
}

fn a_sock_ops_program_is_heard_when_the_daemon_is_dead() -> Result<()> {
    let lab = lab()?;
    programs::ask_for_timeout(sandbox::CGROUP_ROOT.as_ref(), JIFFIES)?;
    let mut daemon = Daemon::start(lab.host())?;
    daemon.kill9()?;
    heard(lab.host())
}

/// Of each hook that a rule with everything needs: another program before ours, and one after.
fn programs_at_the_same_hooks_are_heard() -> Result<()> {
    let cgroup = Path::new(sandbox::CGROUP_ROOT);
    let lab = Lab::new()?;
    let container = lab.container(&lab.add_bridge("lab0", "10.7.0.1/24")?, "10.7.0.2/24")?;
    let host = lab.host();
    // A process inside is how a namespace without a name is found.
    let mut occupant = container.command("sleep").arg("1000000").spawn()?;
    let _before = [
        programs::change_port(cgroup, AddressHook::Connect, 7001, 8080)?,
        programs::change_port(cgroup, AddressHook::Sendmsg, 7001, 5300)?,
        programs::change_port(cgroup, AddressHook::Getpeername, 8080, 7001)?,
        programs::refuse_port(host, 7003)?,
    ];
    let daemon = Daemon::start(host)?;
    let _services =
        [Service::start(host, "service", "127.0.0.1:8080")?, Service::start(host, "own", "0.0.0.0:7003")?];
    let _echo = Echo::start(host, "echo", "127.0.0.1:5300")?;
    daemon.allow(&["bridge:lab0", "8080", "--localhost", "--source", "loopback"])?;
    daemon.allow(&["bridge:lab0", "5300/udp"])?;
    daemon.allow(&["bridge:lab0", "9090=8080", "--path", "relay"])?;
    let _after = [
        programs::change_port(cgroup, AddressHook::Connect, 7002, 8080)?,
        programs::change_port(cgroup, AddressHook::Sendmsg, 7002, 5300)?,
        programs::refuse_port(host, 7004)?,
    ];
    let _late = Service::start(host, "late", "0.0.0.0:7004")?;
    for port in [7001, 7002] {
        let to: SocketAddr = ([127, 0, 0, 1], port).into();
        client::served_by(host, to, "service").context("connect()")?;
        let (said, _) = udp::ask_from(host, None, to, false, Duration::from_secs(2))?.context("sendto()")?;
        ensure!(said.starts_with("echo "), "sendto(): {said}");
    }
    let peer = host.run(|| Ok(TcpStream::connect("127.0.0.1:8080")?.peer_addr()?))?;
    ensure!(peer.port() == 7001, "getpeername() as the other program has it: {peer}");
    for port in [7003, 7004] {
        client::refused(host, ([127, 0, 0, 1], port).into()).context("sk_lookup")?;
        client::refused(&container, ([10, 7, 0, 1], port).into()).context("sk_lookup")?;
    }
    // And ours are.
    client::served_by(&container, "10.7.0.1:8080".parse()?, "service")?;
    client::served_by(&container, "10.7.0.1:9090".parse()?, "service")?;
    let localhost = patience::until("--localhost", || {
        Ok(client::served_by(&container, "127.0.0.1:8080".parse()?, "service").ok().map(drop))
    });
    drop((occupant.kill(), occupant.wait()));
    localhost?;
    udp::served_by(&container, "10.7.0.2".parse()?, "10.7.0.1:5300".parse()?, "echo")
}

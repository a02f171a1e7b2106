//! Flows that conntrack knows: what a firewall lets in as established (`ct state established accept`) though
//! the accept rule that let in their first packet is gone.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::harness::udp::Echo;
use lbridge_tests::harness::{client, kernel, patience};
use lbridge_tests::tests;
use nix::sys::socket::{self, SockaddrStorage, setsockopt, sockopt};

use super::{DROPS, Walled, dropped};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        datagrams_of_a_denied_rule_are_dropped,
        a_connection_that_is_over_lets_nothing_in,
        an_open_connection_goes_on_and_lets_nothing_else_in,
        what_is_redirected_to_the_port_is_forgotten_too,
    ]
}

/// The port that is dialled, where the host has a service of its own on every address.
const PORT: u16 = 2222;

fn dropping() -> Result<Walled> {
    let walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    Ok(walled)
}

fn ask(socket: &UdpSocket, to: SocketAddr) -> Result<String> {
    socket.send_to(b"ping", to)?;
    let mut buffer = [0; 256];
    let (length, _) = socket.recv_from(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn datagrams_of_a_denied_rule_are_dropped() -> Result<()> {
    let walled = dropping()?;
    let scene = &walled.scene;
    let own = Echo::start(walled.host(), "own", "0.0.0.0:5300")?;
    let service = Echo::start(walled.host(), "steered", "127.0.0.1:5300")?;
    let gateway = scene.gateway(5300);
    let flow = scene.container.run(|| Ok(UdpSocket::bind("10.7.0.2:4000")?))?;
    flow.set_read_timeout(Some(Duration::from_millis(300)))?;
    scene.allow(&["5300/udp"])?;
    patience::until("steered", || Ok(ask(&flow, gateway).ok().filter(|said| said.starts_with("steered"))))?;
    scene.deny(&["5300/udp"])?;
    drop(service);
    for _ in 0..5 {
        ensure!(ask(&flow, gateway).is_err(), "the old flow is answered");
    }
    ensure!(own.received() == 0, "the host's own service got {} datagrams", own.received());
    Ok(())
}

/// The accept rule sees the port that NAT has made of the dialled one, conntrack's first packet has the
/// dialled one.
fn what_is_redirected_to_the_port_is_forgotten_too() -> Result<()> {
    let walled = dropping()?;
    let scene = &walled.scene;
    walled.must(
        "nft 'table ip redirects \
         { chain c { type nat hook prerouting priority dstnat; udp dport 53 redirect to :5300; }; }'",
    )?;
    let own = Echo::start(walled.host(), "own", "0.0.0.0:5300")?;
    let service = Echo::start(walled.host(), "steered", "127.0.0.1:5300")?;
    scene.allow(&["5300/udp"])?;
    let flow = scene.container.run(|| Ok(UdpSocket::bind("10.7.0.2:4000")?))?;
    flow.set_read_timeout(Some(Duration::from_millis(300)))?;
    patience::until("steered", || {
        Ok(ask(&flow, scene.gateway(53)).ok().filter(|said| said.starts_with("steered")))
    })?;
    scene.deny(&["5300/udp"])?;
    drop(service);
    ensure!(ask(&flow, scene.gateway(53)).is_err(), "the old flow is answered");
    ensure!(own.received() == 0, "the host's own service got {} datagrams", own.received());
    Ok(())
}

/// A connection from that end.
fn connect(from: &NetNs, end: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    from.run(|| {
        let socket = kernel::stream_socket(false, false)?;
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(end))?;
        let stream = TcpStream::from(socket);
        stream.set_write_timeout(Some(Duration::from_millis(700)))?;
        socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(stream)
    })
}

struct Denied {
    walled: Walled,
    own: Service,
    listener: TcpListener,
    end: SocketAddr,
    client: TcpStream,
    accepted: TcpStream,
}

/// A connection to a steered service, from a known end.
fn connected() -> Result<Denied> {
    let walled = dropping()?;
    let scene = &walled.scene;
    let own = scene.service("own", &format!("0.0.0.0:{PORT}"))?;
    let listener = walled.host().run(|| Ok(TcpListener::bind("127.0.0.1:8088")?))?;
    scene.allow(&["2222=8088"])?;
    let end = SocketAddr::new(scene.container_ip, 4000);
    let client = connect(&scene.container, end, scene.gateway(PORT))?;
    let (accepted, _) = listener.accept()?;
    Ok(Denied { walled, own, listener, end, client, accepted })
}

/// The host has no socket of the connection any more, while conntrack takes it for one that is open: the
/// container has dropped what would have ended it.
fn forgotten_by_the_host(denied: Denied) -> Result<(Walled, Service, SocketAddr)> {
    let Denied { walled, own, listener, end, client, accepted } = denied;
    walled.scene.container.shell(
        "nft 'table ip t {
            chain i { type filter hook input priority 0; ip saddr 10.7.0.1 tcp sport 2222 drop; }
            chain o { type filter hook output priority 0; tcp flags & (fin|rst) != 0 drop; }
        }'",
    )?;
    drop((accepted, listener));
    setsockopt(&client, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    drop(client);
    patience::until("the host's socket is gone", || {
        let listed = walled.must(&format!("ss -Htan state connected sport = :{PORT}"))?;
        Ok(listed.trim().is_empty().then_some(()))
    })?;
    walled.scene.container.shell("nft delete table ip t")?;
    Ok((walled, own, end))
}

/// Neither the end that conntrack knows nor another one gets anywhere.
fn closed(walled: &Walled, own: &Service, end: SocketAddr) -> Result<()> {
    let gateway = walled.scene.gateway(PORT);
    dropped(&walled.scene.container, gateway)?;
    ensure!(connect(&walled.scene.container, end, gateway).is_err(), "the old end is let in");
    ensure!(own.accepted() == 0, "the host's own service accepted {}", own.accepted());
    Ok(())
}

fn a_connection_that_is_over_lets_nothing_in() -> Result<()> {
    let denied = connected()?;
    // A socket without a process is given up after one try.
    denied.walled.host().sysctl("net/ipv4/tcp_orphan_retries", "1")?;
    let (walled, own, end) = forgotten_by_the_host(denied)?;
    walled.scene.deny(&["2222"])?;
    ensure!(walled.own()?.is_empty(), "{:?}", walled.own()?);
    closed(&walled, &own, end)
}

fn an_open_connection_goes_on_and_lets_nothing_else_in() -> Result<()> {
    let mut denied = connected()?;
    denied.walled.host().sysctl("net/ipv4/tcp_orphan_retries", "1")?;
    denied.walled.scene.deny(&["2222"])?;
    ensure!(denied.walled.own()?.is_empty(), "{:?}", denied.walled.own()?);
    denied.client.write_all(b"after deny").context("what is open goes on")?;
    let mut said = [0; 10];
    denied.accepted.set_read_timeout(Some(Duration::from_secs(2)))?;
    denied.accepted.read_exact(&mut said).context("what is open goes on")?;
    let (walled, own, end) = forgotten_by_the_host(denied)?;
    closed(&walled, &own, end)?;
    // Once the daemon has looked, whoever may come by another rule of the firewall's comes.
    walled.must(&format!("nft insert rule inet filter input iifname lab0 tcp dport {PORT} accept"))?;
    patience::until("the port is nobody's any more", || {
        walled.scene.daemon.status()?;
        Ok(client::served_by(&walled.scene.container, walled.scene.gateway(PORT), "own").ok())
    })?;
    Ok(())
}

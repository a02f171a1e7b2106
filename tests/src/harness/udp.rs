//! udp: UDP services that answer each datagram, and clients that query them.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};

use super::netns::NetNs;
use super::patience;
use super::service::become_user;

/// A service that answers each datagram with its name and the source that it saw.
#[derive(Debug)]
pub struct Echo {
    received: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts a service in `netns`, with `SO_REUSEPORT`.
    pub fn start(netns: &NetNs, name: &'static str, address: &str) -> Result<Echo> {
        Echo::start_as(netns, 0, name, address)
    }

    /// Like [`Echo::start`], owned by a user; an IPv6 service accepts only IPv6.
    pub fn start_as(netns: &NetNs, uid: u32, name: &'static str, address: &str) -> Result<Echo> {
        let address: SocketAddr = address.parse()?;
        let socket = netns.run(|| {
            if uid != 0 {
                become_user(uid)?;
            }
            bind(address, uid != 0)
        })?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let received = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (counter, stopped) = (Arc::clone(&received), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::SeqCst) {
                let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
                counter.fetch_add(1, Ordering::SeqCst);
                let text = String::from_utf8_lossy(&buffer[..length]);
                // A lost answer is noticed by the client.
                let _ = socket.send_to(format!("{name} {} {text}", peer.ip()).as_bytes(), peer);
            }
        });
        Ok(Echo { received, stop, thread: Some(thread) })
    }

    /// Returns the number of datagrams received.
    pub fn received(&self) -> usize {
        self.received.load(Ordering::SeqCst)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn bind(address: SocketAddr, v6_only: bool) -> Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket::socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&fd, sockopt::ReusePort, &true)?;
    if address.is_ipv6() {
        socket::setsockopt(&fd, sockopt::Ipv6V6Only, &v6_only)?;
    }
    socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(address))
        .with_context(|| format!("bind {address}"))?;
    Ok(UdpSocket::from(fd))
}

/// Sends a query from an unconnected or a connected socket; returns the answer and its source.
pub fn ask_from(
    netns: &NetNs,
    source: Option<IpAddr>,
    to: SocketAddr,
    connected: bool,
    limit: Duration,
) -> Result<io::Result<(String, SocketAddr)>> {
    let any: IpAddr = if to.is_ipv4() { "0.0.0.0".parse()? } else { "::".parse()? };
    let socket = netns.run(|| Ok(UdpSocket::bind(SocketAddr::new(source.unwrap_or(any), 0))?))?;
    socket.set_read_timeout(Some(limit))?;
    let exchange = || {
        if connected {
            socket.connect(to)?;
            socket.send(b"ping")?;
        } else {
            socket.send_to(b"ping", to)?;
        }
        let mut buffer = [0; 2048];
        let (length, from) = socket.recv_from(&mut buffer)?;
        Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), from))
    };
    Ok(exchange())
}

/// Requires that both kinds of client get the answer of that service, from the address that they queried.
pub fn served_by(netns: &NetNs, ip: IpAddr, to: SocketAddr, service: &str) -> Result<()> {
    for connected in [false, true] {
        let (text, from) = ask_from(netns, None, to, connected, patience::seconds(2))?
            .with_context(|| format!("{to}, connected: {connected}"))?;
        ensure!(text == format!("{service} {ip} ping"), "{text:?}, connected: {connected}");
        ensure!(from == to, "answered from {from}, not {to}");
    }
    Ok(())
}

/// Requires that a connected client is refused at once.
pub fn refused(netns: &NetNs, to: SocketAddr) -> Result<()> {
    let begun = Instant::now();
    match ask_from(netns, None, to, true, patience::seconds(2))? {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            ensure!(begun.elapsed() < patience::seconds(1), "only after {:?}", begun.elapsed());
            Ok(())
        }
        other => bail!("{to} should have refused: {other:?}"),
    }
}

/// Requires that nobody answers. The service's counter shows whether it received the datagram.
pub fn silent(netns: &NetNs, source: Option<IpAddr>, to: SocketAddr) -> Result<()> {
    match ask_from(netns, source, to, false, Duration::from_millis(700))? {
        Err(_) => Ok(()),
        Ok(answer) => bail!("{to} should not have answered: {answer:?}"),
    }
}

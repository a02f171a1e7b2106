//! service: services to connect to: each sends a greeting with its name and what it sees of its peer, then
//! echoes.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, Backlog, SockaddrStorage, sockopt};
use nix::unistd::{Uid, pipe2, setfsuid};
use serde_json::json;

use super::kernel;
use super::netns::NetNs;

/// A service's behaviour on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Sends the greeting, then echoes.
    Echo,
    /// Echoes without a greeting.
    SilentEcho,
    /// Sends the greeting, reads everything up to the peer's FIN, then sends this number of bytes of
    /// [`pattern`].
    AfterFin(usize),
}

/// The address to listen on, and the socket's options.
#[derive(Clone, Debug)]
pub struct Options {
    /// The service's name, which the greeting contains.
    pub name: String,
    /// The address that it listens on; port 0 for any.
    pub address: SocketAddr,
    /// True to set `SO_REUSEPORT`.
    pub reuse_port: bool,
    /// True for an MPTCP socket, as Go 1.24 creates them.
    pub mptcp: bool,
    /// True to set `IPV6_V6ONLY`.
    pub v6_only: bool,
    /// The uid of the socket's owner; `None` for root's.
    pub uid: Option<u32>,
    /// The behaviour on a connection.
    pub answer: Answer,
}

impl Options {
    /// Creates options for an echo service with that name.
    pub fn new(name: &str, address: &str) -> Result<Options> {
        let address = address.parse().with_context(|| format!("address {address}"))?;
        let name = name.to_owned();
        Ok(Options {
            name,
            address,
            reuse_port: false,
            mptcp: false,
            v6_only: false,
            uid: None,
            answer: Answer::Echo,
        })
    }
}

/// A service that listens. Dropping it closes the listener; connections continue until their peers end them.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    /// The thread's end signal: closing it ends the thread.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Starts an echo service in `netns`.
    pub fn start(netns: &NetNs, name: &str, address: &str) -> Result<Service> {
        Service::start_with(netns, &Options::new(name, address)?)
    }

    /// Starts a service with these options in `netns`.
    pub fn start_with(netns: &NetNs, options: &Options) -> Result<Service> {
        let listener = netns
            .run(|| listen(options))
            .with_context(|| format!("{} listens on {}", options.name, options.address))?;
        let address = listener.local_addr()?;
        let (stopped, stop) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let accepted = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&accepted);
        let options = options.clone();
        let thread = thread::spawn(move || serve(&listener, &stopped, &options, &counter));
        Ok(Service { address, accepted, stop: Some(stop), thread: Some(thread) })
    }

    /// Returns the address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the number of connections accepted.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Closes the listener. The port is free when this returns.
    pub fn stop(mut self) {
        self.close();
    }

    fn close(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed, and a test would miss its connections.
            drop(thread.join());
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.close();
    }
}

fn listen(options: &Options) -> Result<TcpListener> {
    if let Some(uid) = options.uid {
        become_user(uid)?;
    }
    let fd = kernel::stream_socket(options.address.is_ipv6(), options.mptcp).context("socket")?;
    socket::setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if options.reuse_port {
        socket::setsockopt(&fd, sockopt::ReusePort, &true)?;
    }
    if options.address.is_ipv6() {
        socket::setsockopt(&fd, sockopt::Ipv6V6Only, &options.v6_only)?;
    }
    socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(options.address)).context("bind")?;
    socket::listen(&fd, Backlog::new(1024)?).context("listen")?;
    Ok(TcpListener::from(fd))
}

/// Makes this thread, which ends soon, create its sockets as that user: a socket's owner is the file system
/// uid of the thread that calls socket(2).
pub(super) fn become_user(uid: u32) -> Result<()> {
    setfsuid(Uid::from_raw(uid));
    // Returns the previous uid, and changes nothing if the argument is not a uid.
    let now = setfsuid(Uid::from_raw(u32::MAX));
    ensure!(now.as_raw() == uid, "this thread cannot become user {uid}");
    Ok(())
}

fn serve(listener: &TcpListener, stopped: &OwnedFd, options: &Options, accepted: &AtomicUsize) {
    loop {
        let mut events = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
        ];
        if poll(&mut events, PollTimeout::NONE).is_err() {
            continue;
        }
        if events[1].any() == Some(true) {
            return;
        }
        // A client that left before it was accepted does not count.
        let Ok((stream, peer)) = listener.accept() else { continue };
        accepted.fetch_add(1, Ordering::SeqCst);
        let options = options.clone();
        // The peer may leave at any time.
        thread::spawn(move || drop(answer(stream, peer, &options)));
    }
}

fn answer(mut stream: TcpStream, accept: SocketAddr, options: &Options) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if options.answer != Answer::SilentEcho {
        let greeting = json!({
            "service": options.name,
            "accept": accept.to_string(),
            "peer": stream.peer_addr()?.to_string(),
            "local": stream.local_addr()?.to_string(),
        });
        stream.write_all(format!("{greeting}\n").as_bytes())?;
    }
    let mut buffer = vec![0; 65536];
    loop {
        let length = match stream.read(&mut buffer)? {
            0 => break,
            length => length,
        };
        if !matches!(options.answer, Answer::AfterFin(_)) {
            stream.write_all(&buffer[..length])?;
        }
    }
    if let Answer::AfterFin(bytes) = options.answer {
        stream.write_all(&pattern(0, bytes))?;
    }
    stream.shutdown(std::net::Shutdown::Both)
}

/// Returns bytes `from .. from + length` of an endless sequence in which a lost, doubled or moved block is
/// noticeable.
pub fn pattern(from: usize, length: usize) -> Vec<u8> {
    let byte = |at: usize| (at ^ (at >> 8).wrapping_mul(31) ^ (at >> 16).wrapping_mul(131)).to_le_bytes()[0];
    (from..from + length).map(byte).collect()
}

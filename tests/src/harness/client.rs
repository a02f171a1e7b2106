//! client: the container's side: dials, and checks who answers.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, SockaddrStorage, sockopt};
use serde_json::Value;

use super::netns::NetNs;
use super::{kernel, patience};

/// A [`super::service::Service`]'s greeting: its name, and what it sees of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The service's name.
    pub service: String,
    /// The peer that `accept()` returned.
    pub accept: SocketAddr,
    /// The peer that `getpeername()` returned.
    pub peer: SocketAddr,
    /// The service's own end, as `getsockname()` returned it.
    pub local: SocketAddr,
}

/// A connection to a service that has sent its greeting.
#[derive(Debug)]
pub struct Connection {
    /// The service's greeting.
    pub greeting: Greeting,
    stream: BufReader<TcpStream>,
}

/// The result of an attempt to reach a service.
#[derive(Debug)]
pub enum Attempt {
    /// A service sent its greeting.
    Served(Greeting),
    /// The connection was refused (ECONNREFUSED) or reset, after this time.
    Refused(Duration),
    /// Neither: a time-out, an unreachable address, or a close without a greeting.
    Nothing(io::Error),
}

/// Connects from within `netns`, from `source` if given; fails after `limit`.
pub fn dial(netns: &NetNs, source: Option<IpAddr>, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let mut outcome = Err(io::Error::other("not tried"));
    netns
        .run(|| {
            outcome = dial_here(source, to, limit);
            Ok(())
        })
        .map_err(io::Error::other)?;
    outcome
}

fn dial_here(source: Option<IpAddr>, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let Some(source) = source else { return TcpStream::connect_timeout(&to, limit) };
    let fd = kernel::stream_socket(to.is_ipv6(), false)?;
    socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0)))?;
    let stream = TcpStream::from(fd);
    stream.set_nonblocking(true)?;
    match socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let timeout = PollTimeout::try_from(limit).map_err(io::Error::other)?;
    if poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)], timeout)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match socket::getsockopt(&stream, sockopt::SocketError)? {
        0 => {}
        error => return Err(io::Error::from_raw_os_error(error)),
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Connects an MPTCP client socket from within `netns`.
pub fn dial_mptcp(netns: &NetNs, to: SocketAddr) -> Result<TcpStream> {
    netns.run(|| {
        let fd = kernel::stream_socket(to.is_ipv6(), true)?;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(TcpStream::from(fd))
    })
}

/// Connects and reads the greeting.
pub fn connect(netns: &NetNs, to: SocketAddr) -> Result<Connection> {
    let stream = dial(netns, None, to, patience::seconds(5)).with_context(|| format!("connect to {to}"))?;
    Connection::greeted(stream).with_context(|| format!("greeting of {to}"))
}

/// Tries to reach a service, from `source` if given.
pub fn attempt_from(netns: &NetNs, source: Option<IpAddr>, to: SocketAddr) -> Attempt {
    attempt_for(netns, source, to, patience::seconds(2))
}

fn attempt_for(netns: &NetNs, source: Option<IpAddr>, to: SocketAddr, limit: Duration) -> Attempt {
    let start = Instant::now();
    let classify = |error: io::Error| match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {
            Attempt::Refused(start.elapsed())
        }
        _ => Attempt::Nothing(error),
    };
    let stream = match dial(netns, source, to, limit) {
        Ok(stream) => stream,
        Err(error) => return classify(error),
    };
    match Connection::greeted(stream) {
        Ok(connection) => Attempt::Served(connection.greeting),
        Err(error) => match error.downcast::<io::Error>() {
            Ok(error) => classify(error),
            Err(error) => Attempt::Nothing(io::Error::other(error)),
        },
    }
}

/// Tries to reach a service, from any source address.
pub fn attempt(netns: &NetNs, to: SocketAddr) -> Attempt {
    attempt_from(netns, None, to)
}

/// Requires that the service at `to` has the name `service` and echoes a few bytes; returns its greeting.
pub fn served_by(netns: &NetNs, to: SocketAddr, service: &str) -> Result<Greeting> {
    let mut connection = connect(netns, to)?;
    ensure!(connection.greeting.service == service, "{to} is {:?}, not {service}", connection.greeting);
    connection.echo(b"there and back")?;
    Ok(connection.greeting)
}

/// Requires that `to` refuses at once.
pub fn refused(netns: &NetNs, to: SocketAddr) -> Result<()> {
    match attempt(netns, to) {
        Attempt::Refused(after) => {
            ensure!(after < patience::seconds(1), "{to} refused, but only after {after:?}");
            Ok(())
        }
        other => bail!("{to} should have refused: {other:?}"),
    }
}

/// Requires that `to` does not serve: it may refuse or be silent.
pub fn not_served(netns: &NetNs, source: Option<IpAddr>, to: SocketAddr) -> Result<()> {
    // Without an answer this takes the whole time, so it is not multiplied on slow machines.
    match attempt_for(netns, source, to, Duration::from_secs(2)) {
        Attempt::Served(greeting) => bail!("{to} should not have served {source:?}: {greeting:?}"),
        Attempt::Refused(_) | Attempt::Nothing(_) => Ok(()),
    }
}

impl Connection {
    /// Reads the greeting of a new connection. An [`io::Error`] is the connection's own.
    pub fn greeted(stream: TcpStream) -> Result<Connection> {
        stream.set_read_timeout(Some(patience::seconds(5)))?;
        stream.set_write_timeout(Some(patience::seconds(5)))?;
        stream.set_nodelay(true)?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "closed before a greeting, after {line:?}");
        let greeting: Value = serde_json::from_str(&line).with_context(|| format!("greeting {line:?}"))?;
        let text = |name: &str| greeting[name].as_str().with_context(|| format!("{name} in {line:?}"));
        let greeting = Greeting {
            service: text("service")?.to_owned(),
            accept: text("accept")?.parse()?,
            peer: text("peer")?.parse()?,
            local: text("local")?.parse()?,
        };
        Ok(Connection { greeting, stream })
    }

    /// Sends bytes and expects the same bytes back.
    pub fn echo(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.get_mut().write_all(bytes).context("send")?;
        let mut back = vec![0; bytes.len()];
        self.stream.read_exact(&mut back).context("read the echo")?;
        ensure!(back == bytes, "the echo differs");
        Ok(())
    }

    /// Returns the socket, for tests that read and write themselves. Nothing is buffered between two echoes.
    pub fn stream(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    /// Sends a FIN; returns everything that arrives until the peer's FIN.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.stream.get_ref().shutdown(std::net::Shutdown::Write)?;
        let mut rest = Vec::new();
        self.stream
            .read_to_end(&mut rest)
            .with_context(|| format!("read the rest, after {} bytes", rest.len()))?;
        Ok(rest)
    }

    /// Requires that the connection is reset, now or soon: it was cut off, and must not look finished.
    pub fn must_be_reset(mut self) -> Result<()> {
        match self.stream.read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            other => bail!("the connection should have been reset: {other:?}"),
        }
    }

    /// Requires that the peer closes or resets the connection, now or soon.
    pub fn must_be_over(mut self) -> Result<()> {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            other => bail!("the connection should be over: {other:?}"),
        }
    }
}

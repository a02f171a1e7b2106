//! Connection: the life of one relayed connection. Connects to the service, tells it who the client is, and
//! has the bytes moved until one side or the idle timeout ends it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use nix::sys::socket::{setsockopt, sockopt};
use proxy_header::{ProxiedAddress, ProxyHeader};
use rustix::{
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, socket_with, sockopt::socket_cookie},
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    time::{sleep, timeout},
};

use super::{PeerNames, meter::Statistics, splice};
use crate::{
    host::trusted,
    planning::{
        desired::{RelaySpec, Service, stand_in_for_container},
        rule::{ProxyProtocol, Source},
    },
};

/// The longest wait for a service on loopback to answer: it answers at once, unless its backlog is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The number of checks, within one idle timeout, for bytes that have moved.
const IDLE_LOOKS: u32 = 4;

/// Carries an accepted connection to its end. `container` is the peer that the service is shown, if the rule
/// asks for that.
///
/// # Errors
///
/// If the service cannot be reached; the client is reset then.
pub(super) async fn proxy_connection(
    client: TcpStream,
    container: SocketAddr,
    spec: &RelaySpec,
    statistics: &Arc<Statistics>,
    names: Option<Arc<dyn PeerNames>>,
) -> anyhow::Result<()> {
    let metered = statistics.clone().metered();
    let traffic = &*metered.traffic;
    let Ok(early) = splice::Prefetched::read(&client) else {
        tracing::debug!(container = %container, "relayed connection reset before the service was reached");
        return Ok(());
    };
    let header = match spec.proxy_protocol {
        Some(version) => proxy_header(version, container, client.local_addr()?)?,
        None => vec![],
    };
    let ended = match &spec.service {
        Service::Tcp(address) => {
            let speaks_first = !early.is_empty() || !header.is_empty();
            let connected = connect(*address, container, spec.source, names, speaks_first).await;
            let mut service = connected.inspect_err(|_| reset(&client))?;
            write_proxy_header(&mut service, &header).await.inspect_err(|_| reset(&client))?;
            or_idle(splice::relay(client, early, service, traffic), traffic, spec.idle_timeout).await
        }
        Service::Unix(path) => {
            let mut service = connect_unix(path).await.inspect_err(|_| reset(&client))?;
            write_proxy_header(&mut service, &header).await.inspect_err(|_| reset(&client))?;
            or_idle(splice::relay(client, early, service, traffic), traffic, spec.idle_timeout).await
        }
    };
    let (sent, received) = (traffic.to_service(), traffic.to_client());
    let ended = match ended {
        Some(splice::Outcome::Finished) => "finished".to_owned(),
        Some(splice::Outcome::Reset(side)) => format!("reset by the {side:?}"),
        Some(splice::Outcome::Failed(side, error)) => format!("failed at the {side:?}: {error}"),
        None => "idle for too long".to_owned(),
    };
    tracing::debug!(container = %container, service = ?spec.service, sent, received, ended, "relayed \
    connection ended");
    Ok(())
}

/// Awaits `relaying` and returns its result. Returns `None` if no byte moved for `limit`, or up to a quarter
/// longer, and drops `relaying`, which resets both ends.
async fn or_idle<T>(
    relaying: impl Future<Output = T>,
    traffic: &splice::Traffic,
    limit: Option<Duration>,
) -> Option<T> {
    let Some(limit) = limit else { return Some(relaying.await) };
    let idle = async {
        let (mut seen, mut looks) = (0, 0);
        while looks < IDLE_LOOKS {
            sleep(limit / IDLE_LOOKS).await;
            let moved = traffic.to_service() + traffic.to_client();
            looks = if moved == seen { looks + 1 } else { 0 };
            seen = moved;
        }
    };
    tokio::select! {
        ended = relaying => Some(ended),
        () = idle => None,
    }
}

/// Builds the PROXY protocol header that tells the service the client's address.
fn proxy_header(version: ProxyProtocol, client: SocketAddr, dialled: SocketAddr) -> anyhow::Result<Vec<u8>> {
    // The protocol needs both addresses in one family.
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    let (client, dialled) = (canonical(client), canonical(dialled));
    let addresses = if client.is_ipv4() == dialled.is_ipv4() {
        ProxiedAddress::stream(client, dialled)
    } else {
        ProxiedAddress::stream(mapped(client), mapped(dialled))
    };
    let (header, mut bytes) = (ProxyHeader::with_address(addresses), vec![]);
    match version {
        ProxyProtocol::V1 => header.encode_v1(&mut bytes),
        ProxyProtocol::V2 => header.encode_v2(&mut bytes),
    }
    .map_err(|error| anyhow::anyhow!("cannot write the PROXY protocol's header: {error:?}"))?;
    Ok(bytes)
}

async fn write_proxy_header(service: &mut (impl AsyncWrite + Unpin), header: &[u8]) -> anyhow::Result<()> {
    timeout(CONNECT_TIMEOUT, service.write_all(header)).await.context("no answer")??;
    Ok(())
}

/// Makes the coming close a reset: the client's bytes were not delivered, and an orderly close would hide
/// that.
pub(super) fn reset(client: &TcpStream) {
    let _ = client.set_zero_linger();
}

/// An announced name; withdrawn when dropped, unless it was confirmed.
#[derive(Debug)]
struct Announced {
    names: Arc<dyn PeerNames>,
    cookie: u64,
    confirmed: bool,
}

impl Announced {
    fn confirm(
        mut self,
        relay: SocketAddr,
        service: SocketAddr,
        container: SocketAddr,
    ) -> anyhow::Result<()> {
        self.names.confirm(self.cookie, relay, service, container)?;
        self.confirmed = true;
        Ok(())
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        if !self.confirmed {
            self.names.withdraw(self.cookie);
        }
    }
}

async fn connect(
    service: SocketAddr,
    container: SocketAddr,
    source: Source,
    names: Option<Arc<dyn PeerNames>>,
    speaks_first: bool,
) -> anyhow::Result<TcpStream> {
    let family = if service.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    splice::prepare(&socket)?;
    if speaks_first {
        splice::speak_first(&socket)?;
    }
    let mut announced = None;
    if source == Source::Container {
        if service.is_ipv4() {
            let own = stand_in_for_container(container.ip());
            // connect() chooses the port: one that bind() has chosen is lost to every other program's
            // connect(), and a container could use them all up.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            net::bind(&socket, &SocketAddr::from((own, 0)))
                .with_context(|| format!("cannot connect from {own}"))?;
        }
        if let Some(names) = names {
            let cookie = socket_cookie(&socket)?;
            names.announce(cookie, container)?;
            announced = Some(Announced { names, cookie, confirmed: false });
        }
    }
    let dialled = net::connect(&socket, &service);
    let connecting = timeout(CONNECT_TIMEOUT, connected(socket, service, dialled));
    let stream = connecting.await.context("no answer").and_then(|done| Ok(done?));
    let stream = stream.with_context(|| format!("cannot connect to {service}"))?;
    if let Some(announced) = announced {
        announced.confirm(stream.local_addr()?, service, container)?;
    }
    Ok(stream)
}

/// Waits for a connect() that has begun. On loopback the handshake is complete when connect() returns,
/// although it returns EINPROGRESS; a second connect() then reports the outcome, without a round through the
/// event loop.
async fn connected(
    socket: OwnedFd,
    service: SocketAddr,
    begun: rustix::io::Result<()>,
) -> io::Result<TcpStream> {
    let asked = if begun == Err(Errno::INPROGRESS) { net::connect(&socket, &service) } else { begun };
    let pending = asked == Err(Errno::ALREADY);
    if !pending {
        asked?;
    }
    let stream = TcpStream::from_std(socket.into())?;
    if pending {
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    Ok(stream)
}

/// Connects to a Unix socket through its file, opened with [`trusted::open`]. The owner of a folder on the
/// path could have put a link there to a socket that only this process may connect to.
async fn connect_unix(path: &Path) -> anyhow::Result<UnixStream> {
    let file = trusted::open(path).with_context(|| format!("cannot connect to {}", path.display()))?;
    let file_path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let connecting = timeout(CONNECT_TIMEOUT, UnixStream::connect(file_path));
    let stream = connecting.await.context("no answer").and_then(|done| Ok(done?));
    stream.with_context(|| format!("cannot connect to {}", path.display()))
}

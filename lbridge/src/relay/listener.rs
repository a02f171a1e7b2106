//! One relay: listens on the gateway, bound to the bridge; checks who comes; connects to the service.

use std::{
    future, io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use nix::sys::socket::{setsockopt, sockopt};
use rustix::{
    net::sockopt::{set_ipv6_freebind, socket_cookie},
    process::{Resource, getrlimit},
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UnixStream},
    sync::{Semaphore, mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{PeerNames, splice, stand_in};
use crate::planning::{
    policy::{RelayKey, RelaySpec, Service},
    rule::Source,
};

/// How long handshakes that began before the kernel took over may take to end.
const LINGER: Duration = Duration::from_secs(1);
/// Pause after a failed accept(): the usual reason is that there are no descriptors left, and trying again at once
/// would only burn the CPU.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// As a busy service would have it; the kernel caps it at net.core.somaxconn.
const BACKLOG: u32 = 4096;

/// Refusals for want of places are logged that often.
const REFUSAL_LOG: Duration = Duration::from_secs(60);
/// How long a service on loopback may take to answer: it does at once, or its backlog is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that one relay carries at a time, at most.
const MAX_CONNECTIONS: usize = 4096;
/// Descriptors of a connection: two sockets, and a pipe for each direction while it is in use.
const DESCRIPTORS: usize = 6;
/// Descriptors that connections leave to the rest of the daemon.
const RESERVED_DESCRIPTORS: usize = 256;

/// Whether a relay takes new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Yes.
    Open,
    /// Only those that began before the kernel took over.
    Lingering,
}

/// Places for connections, of one relay or of all.
pub(super) type Places = Arc<Semaphore>;

/// Places for the connections of all relays, as the limit of open files has it; and for those of one, which must leave
/// some to the others.
pub(super) fn places() -> (Places, usize) {
    let limit =
        getrlimit(Resource::Nofile).current.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
    let all = (limit.saturating_sub(RESERVED_DESCRIPTORS) / DESCRIPTORS).clamp(1, Semaphore::MAX_PERMITS);
    (Arc::new(Semaphore::new(all)), MAX_CONNECTIONS.min(all.div_ceil(2)))
}

/// Counts of one relay.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    /// Connections taken.
    pub(super) connections: AtomicU64,
}

/// What a relay needs of its surroundings.
#[derive(Debug, Clone)]
pub(super) struct Surroundings {
    /// How services are told who is behind a connection, where there is a way.
    pub(super) names: Option<Arc<dyn PeerNames>>,
    /// Gets a unit when a service turns out not to be there: the relay should not be either, then.
    pub(super) wake: mpsc::Sender<()>,
    /// Places for the connections of all relays.
    pub(super) places: Places,
    /// How many of them one relay may take.
    pub(super) places_of_one: usize,
}

/// Listens where `key` says. Both the address and the device are bound: the address alone would let in the LAN, which
/// may route packets for it to the host (the weak host model).
pub(super) fn bind(key: &RelayKey) -> anyhow::Result<TcpListener> {
    let bind = || -> io::Result<TcpListener> {
        let socket = if key.gateway.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind_device(Some(key.interface.as_bytes()))?;
        // An IPv6 address is tentative until the bridge has its first port, which is when it has its first container.
        if key.gateway.is_ipv6() {
            set_ipv6_freebind(&socket, true)?;
        }
        // Connections of an earlier relay may be in TIME_WAIT on the port.
        socket.set_reuseaddr(true)?;
        socket.bind(key.gateway)?;
        socket.listen(BACKLOG)
    };
    bind().map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            anyhow::anyhow!("{} is taken by another socket of the host (ss -ltnp shows it)", key.gateway)
        }
        _ => anyhow::Error::new(error).context(format!("cannot listen on {}", key.gateway)),
    })
}

/// Accepts until told otherwise. Connections are tasks of their own, and outlive this one.
pub(super) async fn serve(
    socket: TcpListener,
    specs: watch::Receiver<RelaySpec>,
    mut modes: watch::Receiver<Mode>,
    statistics: Arc<Statistics>,
    surroundings: Surroundings,
) {
    let gateway = socket.local_addr().map(|address| address.ip().to_canonical()).ok();
    let own_places = Arc::new(Semaphore::new(surroundings.places_of_one));
    let (mut deadline, mut refused_at) = (None, None::<Instant>);
    loop {
        let end = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((client, container)) => {
                    let spec = specs.borrow().clone();
                    // The host's own processes come from the gateway's address.
                    if !spec.subnet.contains(container.ip()) || Some(container.ip().to_canonical()) == gateway {
                        tracing::debug!("refused {container}: not an address of this network's containers");
                        reset(&client);
                        continue;
                    }
                    let place = own_places.clone().try_acquire_owned();
                    let shared = surroundings.places.clone().try_acquire_owned();
                    let (Ok(place), Ok(shared)) = (place, shared) else {
                        if refused_at.is_none_or(|at| at.elapsed() >= REFUSAL_LOG) {
                            tracing::warn!("refused {container} and maybe others: too many connections are open");
                            refused_at = Some(Instant::now());
                        }
                        reset(&client);
                        continue;
                    };
                    statistics.connections.fetch_add(1, Ordering::Relaxed);
                    let surroundings = surroundings.clone();
                    tokio::spawn(async move {
                        let _places = (place, shared);
                        if let Err(error) = carry(client, container, spec, surroundings.names).await {
                            tracing::debug!("{container}: {error:#}");
                            let _ = surroundings.wake.try_send(());
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    sleep(ACCEPT_BACKOFF).await;
                }
            },
            changed = modes.changed() => {
                if changed.is_err() {
                    return;
                }
                deadline = match *modes.borrow_and_update() {
                    Mode::Open => None,
                    Mode::Lingering => Some(Instant::now() + LINGER),
                };
            }
            () = end => return,
        }
    }
}

async fn carry(
    client: TcpStream,
    container: SocketAddr,
    spec: RelaySpec,
    names: Option<Arc<dyn PeerNames>>,
) -> anyhow::Result<()> {
    let traffic = splice::Traffic::default();
    let outcome = match &spec.service {
        Service::Tcp(address) => {
            let connected = connect(*address, container, spec.source, names).await;
            let (service, _presented) = connected.inspect_err(|_| reset(&client))?;
            splice::relay(client, service, &traffic).await
        }
        Service::Unix(path) => {
            let service = connect_unix(path).await.inspect_err(|_| reset(&client))?;
            splice::relay(client, service, &traffic).await
        }
    };
    let (sent, received) = (traffic.to_service(), traffic.to_client());
    let ended = match outcome {
        splice::Outcome::Finished => "finished".to_owned(),
        splice::Outcome::Reset(side) => format!("reset by the {side:?}"),
        splice::Outcome::Failed(side, error) => format!("failed at the {side:?}: {error}"),
    };
    tracing::debug!("{container} to {:?}: {ended}, {sent} bytes there, {received} back", spec.service);
    Ok(())
}

/// Makes the coming close a reset: what the client sent was not delivered, and it must not think so.
fn reset(client: &TcpStream) {
    let _ = client.set_zero_linger();
}

/// A name that the service is told; forgotten when the connection ends, however it does.
#[derive(Debug)]
struct Presented {
    names: Arc<dyn PeerNames>,
    cookie: u64,
    relay_end: Option<SocketAddr>,
    container: SocketAddr,
}

impl Drop for Presented {
    fn drop(&mut self) {
        self.names.forget(self.cookie, self.relay_end, self.container);
    }
}

async fn connect(
    service: SocketAddr,
    container: SocketAddr,
    source: Source,
    names: Option<Arc<dyn PeerNames>>,
) -> anyhow::Result<(TcpStream, Option<Presented>)> {
    let socket = if service.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let mut presented = None;
    if source == Source::Container {
        if service.is_ipv4() {
            let own = stand_in(container.ip());
            // The port is chosen by connect(): one that bind() has chosen is lost to every other program's connect(), and
            // a container could use them all up.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind((own, 0).into()).with_context(|| format!("cannot connect from {own}"))?;
        }
        if let Some(names) = names {
            let cookie = socket_cookie(&socket)?;
            names.announce(cookie, container)?;
            presented = Some(Presented { names, cookie, relay_end: None, container });
        }
    }
    let connecting = timeout(CONNECT_TIMEOUT, socket.connect(service));
    let stream = connecting.await.context("no answer").and_then(|done| Ok(done?));
    let stream = stream.with_context(|| format!("cannot connect to {service}"))?;
    if let Some(presented) = &mut presented {
        let relay_end = stream.local_addr()?;
        presented.relay_end = Some(relay_end);
        presented.names.confirm(presented.cookie, relay_end, container)?;
    }
    Ok((stream, presented))
}

async fn connect_unix(path: &Path) -> anyhow::Result<UnixStream> {
    let connecting = timeout(CONNECT_TIMEOUT, UnixStream::connect(path));
    let stream = connecting.await.context("no answer").and_then(|done| Ok(done?));
    stream.with_context(|| format!("cannot connect to {}", path.display()))
}

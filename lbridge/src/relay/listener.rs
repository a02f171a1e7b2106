//! Listener: one relay. Listens where the kernel's entry leads; or on the gateway itself, bound to the
//! bridge, before Linux 5.17; or on loopback in a namespace. Checks the client's address, and connects to the
//! service.

use std::{
    collections::HashMap,
    future, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    ops::RangeInclusive,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use futures_util::FutureExt as _;
use nix::sys::socket::{setsockopt, sockopt};
use proxy_header::{ProxiedAddress, ProxyHeader};
use rustix::{
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, socket_with, sockopt::socket_cookie},
    process::{Resource, getrlimit},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::task::TaskTracker;

use lbridge_common::wire::MAX_RELAY_PEERS;

use super::{PeerNames, splice, stand_in, trusted};
use crate::planning::{
    policy::{Clients, RelaySpec, Service},
    rule::{ProxyProtocol, Source},
};

/// The time that handshakes which began before the kernel took over have to complete.
const LINGER: Duration = Duration::from_secs(1);
/// The pause after a failed accept(). The usual cause is that no descriptors are left, and an immediate retry
/// would only burn CPU time.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// The backlog of a busy service; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Ports that neither services nor connections use: IANA registers none of them (RFC 6335), and
/// `net.ipv4.ip_local_port_range` ends at 60999 unless the administrator has changed it.
const UNUSED_PORTS: RangeInclusive<u16> = 61_000..=65_535;
/// The first IPv4 address for listeners; below 127.128.0.0/9, from which relays connect.
const LOOPBACK_V4: Ipv4Addr = Ipv4Addr::new(127, 64, 0, 0);
const LOOPBACK_V4_HOSTS: u32 = 0x003f_ffff;
const DISCARD_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0);

/// The interval at which a repeated event is logged.
const LOG_PAUSE: Duration = Duration::from_secs(60);
/// The longest wait for a service on loopback to answer: it answers at once, unless its backlog is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The number of checks, within one idle timeout, for bytes that have moved.
const IDLE_LOOKS: u32 = 4;
/// Descriptors per connection: its two sockets.
const DESCRIPTORS: usize = 2;
/// Descriptors that are reserved for pipes and for the rest of the daemon; half of all, if there are few.
const RESERVED_DESCRIPTORS: usize = 1280;

/// The connections that a relay still accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// All new connections.
    Open,
    /// Only those whose handshake began before the kernel took over.
    Lingering,
    /// Only those that already wait to be accepted.
    Closing,
}

/// The places for connections, as many as the limit of open files allows.
#[derive(Debug, Clone)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    all: usize,
}

impl Places {
    pub(super) fn new() -> Self {
        let limit = getrlimit(Resource::Nofile)
            .current
            .map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
        let reserved = RESERVED_DESCRIPTORS.min(limit / 2);
        // Pipes may take half of the reserved descriptors, at two descriptors each.
        splice::limit_pipes(reserved / 4);
        // At most as many as the kernel's map of peer names has entries.
        let all = ((limit - reserved) / DESCRIPTORS).clamp(1, MAX_RELAY_PEERS as usize);
        Self { free: Arc::new(Semaphore::new(all)), all }
    }

    /// Takes a place for a connection of the rule that `statistics` belongs to and that may have `max`
    /// connections. `None` if a limit is reached.
    fn take(&self, statistics: &Arc<Statistics>, max: u32) -> Option<Permit> {
        let shared = self.free.clone().try_acquire_owned().ok()?;
        // A network may use what other networks leave, less one eighth, which stays free for them however
        // many rules the network has. The place taken just now does not count.
        let taken = (self.all - self.free.available_permits()).saturating_sub(1);
        let of_network = statistics.of_network.load(Ordering::Relaxed) as usize;
        let left = self.all - taken.saturating_sub(of_network);
        if of_network >= left - left / 8 {
            return None;
        }
        let counted = statistics
            .open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| (open < max).then_some(open + 1));
        counted.ok()?;
        statistics.of_network.fetch_add(1, Ordering::Relaxed);
        Some(Permit { _shared: shared, statistics: statistics.clone() })
    }
}

/// The place of one connection, freed when dropped.
struct Permit {
    _shared: OwnedSemaphorePermit,
    statistics: Arc<Statistics>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.statistics.open.fetch_sub(1, Ordering::Relaxed);
        self.statistics.of_network.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The counters of one rule.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    /// Open connections of the rule.
    pub(super) open: AtomicU32,
    /// Connections of the rule that were refused because a limit was reached.
    pub(super) refused: AtomicU64,
    /// Open connections of all rules of the network.
    pub(super) of_network: Arc<AtomicU32>,
    /// The time at which a failure was last logged.
    failed: Mutex<Pause>,
    traffic: Mutex<Meter>,
}

/// The byte counts of a rule's connections.
#[derive(Debug, Default)]
struct Meter {
    /// Bytes of the connections that have ended, to the service and back.
    ended: (u64, u64),
    /// Counters of the open connections, each under a number of its own.
    open: HashMap<u64, Arc<splice::Traffic>>,
    next: u64,
}

/// A connection whose bytes count for its rule; dropping it adds them to the rule's total.
struct Metered {
    statistics: Arc<Statistics>,
    number: u64,
    traffic: Arc<splice::Traffic>,
}

impl Drop for Metered {
    fn drop(&mut self) {
        let mut meter = self.statistics.meter();
        meter.open.remove(&self.number);
        meter.ended.0 += self.traffic.to_service();
        meter.ended.1 += self.traffic.to_client();
    }
}

impl Statistics {
    pub(super) fn of(network: Arc<AtomicU32>) -> Self {
        Self { of_network: network, ..Self::default() }
    }

    fn meter(&self) -> MutexGuard<'_, Meter> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn metered(self: Arc<Self>) -> Metered {
        let traffic = Arc::new(splice::Traffic::default());
        let mut meter = self.meter();
        meter.next += 1;
        let number = meter.next;
        meter.open.insert(number, traffic.clone());
        drop(meter);
        Metered { statistics: self, number, traffic }
    }

    /// Returns the bytes moved to the service and back, over all connections of the rule so far.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let meter = self.meter();
        let add = |(there, back): (u64, u64), traffic: &Arc<splice::Traffic>| {
            (there + traffic.to_service(), back + traffic.to_client())
        };
        meter.open.values().fold(meter.ended, add)
    }
}

/// The desired state of a relay.
#[derive(Debug)]
pub(super) struct Orders {
    pub(super) spec: RelaySpec,
    pub(super) statistics: Arc<Statistics>,
}

/// The handles that all relays share.
#[derive(Debug, Clone)]
pub(super) struct Surroundings {
    /// The way to make services see the container as their peer; `None` if there is none.
    pub(super) names: Option<Arc<dyn PeerNames>>,
    /// Gets a unit when a connection fails: if the service is not there, the relay should not be there
    /// either.
    pub(super) wake: mpsc::Sender<()>,
    /// The places for the connections of all relays.
    pub(super) places: Places,
    /// The tasks of all relays' connections.
    pub(super) connections: TaskTracker,
}

/// A receiver that turns true when a relay's namespace has gone; `None` for the host's own, which never goes.
#[derive(Debug, Clone)]
pub(super) struct Gone(pub(super) Option<watch::Receiver<bool>>);

impl Gone {
    async fn wait(&mut self) {
        match &mut self.0 {
            // The sender lives for as long as there are receivers.
            Some(gone) => drop(gone.wait_for(|gone| *gone).await),
            None => future::pending().await,
        }
    }
}

/// A listening socket with the options that a relay's connections inherit.
#[derive(Debug)]
pub struct Listening(std::net::TcpListener);

impl Listening {
    /// Sets the options of a bound socket, and starts to listen on it.
    pub fn begin(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = Socket::from(socket.into());
        // Before the first connection: without the options it could not be cut off with a reset.
        splice::prepare(&socket)?;
        socket.listen(BACKLOG)?;
        Ok(Self(socket.into()))
    }

    /// Wraps a socket that already listens, and sets its options.
    pub fn inherited(socket: std::net::TcpListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        splice::prepare(&socket)?;
        Ok(Self(socket))
    }

    /// Registers the socket with the current event loop.
    pub(super) fn register(self) -> io::Result<TcpListener> {
        TcpListener::from_std(self.0)
    }
}

/// Listens in this thread's network namespace, bound to both the address and the interface. The address alone
/// would let in the LAN, which may route packets for it to the host (the weak host model).
pub fn listen(address: SocketAddr, interface: NonZeroU32) -> io::Result<Listening> {
    Listening::begin(bound(address, interface)?)
}

/// Listens in this thread's network namespace on an address that no packet can name, bound to the bridge, so
/// that only the kernel's entry for `dialled` leads there. Takes a port of the host that services do not use,
/// so that a service which listens on every address can have the dialled port.
///
/// # Errors
///
/// Any error of socket(2), bind(2) and listen(2); `AddrInUse` if none of the ports is free.
pub fn listen_by_entry(dialled: SocketAddr, interface: NonZeroU32) -> io::Result<Listening> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let mut last = io::ErrorKind::AddrInUse.into();
    // A local user may occupy all of them; the kernel picks another port then.
    for port in UNUSED_PORTS.chain([0]) {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let address: IpAddr = match dialled {
            // Packets from a bridge to 127/8 are martians.
            SocketAddr::V4(_) => {
                Ipv4Addr::from_bits(LOOPBACK_V4.to_bits() | (number & LOOPBACK_V4_HOSTS)).into()
            }
            // Discard-only (RFC 6666): no host has such an address.
            SocketAddr::V6(_) => Ipv6Addr::from_bits(DISCARD_V6.to_bits() | u128::from(number)).into(),
        };
        match bound(SocketAddr::new(address, port), interface) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            done => return done.and_then(Listening::begin),
        }
    }
    Err(last)
}

fn bound(address: SocketAddr, interface: NonZeroU32) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    // By its index: the name may pass to another interface.
    socket.bind_device_by_index_v4(Some(interface))?;
    // An IPv6 address is tentative until the bridge has its first port, that is until its first container.
    if address.is_ipv6() && !address.ip().is_loopback() {
        socket.set_freebind_v6(true)?;
    }
    // Connections of an earlier relay may be in TIME_WAIT on the port.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// A running relay.
pub(super) struct Listener {
    pub(super) socket: Arc<TcpListener>,
    /// The address and port that its clients dial.
    pub(super) dialled: SocketAddr,
    pub(super) orders: watch::Receiver<Arc<Orders>>,
    pub(super) modes: watch::Receiver<Mode>,
    pub(super) gone: Gone,
    /// The number of connections that this relay took.
    pub(super) taken: Arc<AtomicU64>,
    pub(super) surroundings: Surroundings,
}

impl Listener {
    /// Accepts connections until the mode or the end of the namespace stops it. Connections are tasks of
    /// their own, and outlive this one.
    pub(super) async fn serve(mut self) {
        let (mut deadline, mut refused, mut failed) = (None, Pause::default(), Pause::default());
        loop {
            let end = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => future::pending().await,
                }
            };
            tokio::select! {
                accepted = self.socket.accept() => match accepted {
                    Ok((client, peer)) => self.take(client, peer, &mut refused),
                    Err(error) => {
                        if failed.is_over() {
                            tracing::warn!(
                                "{}: cannot accept connections, trying again: {error}",
                                self.orders.borrow().spec.rule
                            );
                        }
                        sleep(ACCEPT_BACKOFF).await;
                    }
                },
                changed = self.modes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let mode = *self.modes.borrow_and_update();
                    deadline = match mode {
                        Mode::Open => None,
                        Mode::Lingering => Some(Instant::now() + LINGER),
                        Mode::Closing => {
                            while let Some(Ok((client, peer))) = self.socket.accept().now_or_never() {
                                self.take(client, peer, &mut refused);
                            }
                            return;
                        }
                    };
                }
                () = self.gone.wait() => return,
                () = end => return,
            }
        }
    }

    fn take(&self, client: TcpStream, peer: SocketAddr, refused: &mut Pause) {
        let orders = self.orders.borrow().clone();
        let Orders { spec, statistics } = &*orders;
        // An inherited socket of an earlier daemon may hold connections to the address of another rule.
        if !client.local_addr().is_ok_and(|own| {
            own.port() == self.dialled.port() && own.ip().to_canonical() == self.dialled.ip().to_canonical()
        }) {
            tracing::debug!("refused {peer}: it did not dial {}", self.dialled);
            return reset(&client);
        }
        let container = match &spec.clients {
            // The host's own processes connect from the gateway's address.
            Clients::Subnet(subnet)
                if !subnet.contains(peer.ip())
                    || peer.ip().to_canonical() == self.dialled.ip().to_canonical() =>
            {
                tracing::debug!("refused {peer}: not an address of this network's containers");
                return reset(&client);
            }
            Clients::Listed(listed) if !listed.contains(&peer.ip().to_canonical()) => {
                tracing::debug!("refused {peer}: none of the containers that the rule is for");
                return reset(&client);
            }
            Clients::Subnet(_) | Clients::Listed(_) => peer,
            Clients::Inside(told) => SocketAddr::new(*told, peer.port()),
        };
        let Some(permit) = self.surroundings.places.take(statistics, spec.max_connections) else {
            statistics.refused.fetch_add(1, Ordering::Relaxed);
            if refused.is_over() {
                tracing::warn!(
                    "{}: refused {container}, and maybe others in the next minute: too many connections are \
                     open (its limit is {}, and all rules share the limit of open files)",
                    spec.rule,
                    spec.max_connections
                );
            }
            return reset(&client);
        };
        self.taken.fetch_add(1, Ordering::Relaxed);
        let (mut gone, surroundings) = (self.gone.clone(), self.surroundings.clone());
        self.surroundings.connections.spawn(async move {
            let _permit = permit;
            tokio::select! {
                carried = carry(client, container, &orders, surroundings.names) => {
                    let Err(error) = carried else { return };
                    let told = &orders.statistics.failed;
                    if told.lock().unwrap_or_else(PoisonError::into_inner).is_over() {
                        tracing::warn!(
                            "{}: a connection of {container} has failed, and others may: {error:#}",
                            orders.spec.rule,
                        );
                    }
                    let _ = surroundings.wake.try_send(());
                }
                // Both ends are reset: there is nobody left to read the rest.
                () = gone.wait() => tracing::debug!("{container}: its namespace is gone"),
            }
        });
    }
}

/// Limits how often a frequent event is logged; holds the time of the last log entry.
#[derive(Debug, Default)]
struct Pause(Option<Instant>);

impl Pause {
    /// Returns true if the last log entry is at least [`LOG_PAUSE`] ago, and then counts this one as the
    /// last.
    fn is_over(&mut self) -> bool {
        let over = self.0.is_none_or(|last| last.elapsed() >= LOG_PAUSE);
        if over {
            self.0 = Some(Instant::now());
        }
        over
    }
}

async fn carry(
    client: TcpStream,
    container: SocketAddr,
    Orders { spec, statistics }: &Orders,
    names: Option<Arc<dyn PeerNames>>,
) -> anyhow::Result<()> {
    let metered = statistics.clone().metered();
    let traffic = &*metered.traffic;
    let Ok(early) = splice::Early::read(&client) else {
        tracing::debug!("{container}: reset before the service was reached");
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
            introduce(&mut service, &header).await.inspect_err(|_| reset(&client))?;
            or_idle(splice::relay(client, early, service, traffic), traffic, spec.idle_timeout).await
        }
        Service::Unix(path) => {
            let mut service = connect_unix(path).await.inspect_err(|_| reset(&client))?;
            introduce(&mut service, &header).await.inspect_err(|_| reset(&client))?;
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
    tracing::debug!("{container} to {:?}: {ended}, {sent} bytes there, {received} back", spec.service);
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

async fn introduce(service: &mut (impl AsyncWrite + Unpin), header: &[u8]) -> anyhow::Result<()> {
    timeout(CONNECT_TIMEOUT, service.write_all(header)).await.context("no answer")??;
    Ok(())
}

/// Makes the coming close a reset: the client's bytes were not delivered, and an orderly close would hide
/// that.
fn reset(client: &TcpStream) {
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
            let own = stand_in(container.ip());
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

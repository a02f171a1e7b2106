//! One relay: listens where the kernel's entry leads, or on the gateway itself before Linux 5.17, bound to the bridge; or on
//! loopback in a namespace. Checks who comes, and connects to the service.

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

/// How long handshakes that began before the kernel took over may take to end.
const LINGER: Duration = Duration::from_secs(1);
/// Pause after a failed accept(): the usual reason is that there are no descriptors left, and trying again at once
/// would only burn the CPU.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// As a busy service would have it; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Ports that neither services are given (IANA registers none of them, RFC 6335) nor, unless the administrator has said
/// otherwise, connections (`net.ipv4.ip_local_port_range` ends at 60999).
const UNUSED_PORTS: RangeInclusive<u16> = 61_000..=65_535;
/// Below 127.128.0.0/9, from which relays connect.
const LOOPBACK_V4: Ipv4Addr = Ipv4Addr::new(127, 64, 0, 0);
const LOOPBACK_V4_HOSTS: u32 = 0x003f_ffff;
const DISCARD_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0);

/// What happens again and again is logged that often.
const LOG_PAUSE: Duration = Duration::from_secs(60);
/// How long a service on loopback may take to answer: it does at once, or its backlog is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle time-out looks whether bytes have moved, of its length.
const IDLE_LOOKS: u32 = 4;
/// Descriptors of a connection: its two sockets.
const DESCRIPTORS: usize = 2;
/// Descriptors that connections leave to pipes and to the rest of the daemon; half of all, where there are few.
const RESERVED_DESCRIPTORS: usize = 1280;

/// Whether a relay takes new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Yes.
    Open,
    /// Only those that began before the kernel took over.
    Lingering,
    /// Only those that wait to be accepted already.
    Closing,
}

/// Places for connections, as the limit of open files has it.
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
        // Half of what is reserved, at two descriptors each.
        splice::limit_pipes(reserved / 4);
        // Each may have a name in the kernel's map.
        let all = ((limit - reserved) / DESCRIPTORS).clamp(1, MAX_RELAY_PEERS as usize);
        Self { free: Arc::new(Semaphore::new(all)), all }
    }

    /// A place for a connection of a rule that may have `max`, and has those of `statistics`.
    fn take(&self, statistics: &Arc<Statistics>, max: u32) -> Option<Permit> {
        let shared = self.free.clone().try_acquire_owned().ok()?;
        // Of what others leave, an eighth stays free: for them, however many rules a network has.
        // Without the place that was taken just now.
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

/// One connection's place, given back when it ends.
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

/// Counts of one rule.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    /// Connections that are open.
    pub(super) open: AtomicU32,
    /// Connections refused for want of a place.
    pub(super) refused: AtomicU64,
    /// Connections that are open, of all rules of the network.
    pub(super) of_network: Arc<AtomicU32>,
    /// When a failure was told last.
    failed: Mutex<Pause>,
    traffic: Mutex<Meter>,
}

/// Bytes of a rule's connections.
#[derive(Debug, Default)]
struct Meter {
    /// Of those that have ended, to the service and back.
    ended: (u64, u64),
    /// Of those that are open, each under a number of its own.
    open: HashMap<u64, Arc<splice::Traffic>>,
    next: u64,
}

/// A connection whose bytes count for its rule.
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

    /// Bytes moved to the service and back, over all connections there ever were.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let meter = self.meter();
        let add = |(there, back): (u64, u64), traffic: &Arc<splice::Traffic>| {
            (there + traffic.to_service(), back + traffic.to_client())
        };
        meter.open.values().fold(meter.ended, add)
    }
}

/// What a relay is to do.
#[derive(Debug)]
pub(super) struct Orders {
    pub(super) spec: RelaySpec,
    pub(super) statistics: Arc<Statistics>,
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
    /// The connections of all relays.
    pub(super) connections: TaskTracker,
}

/// Whether the namespace that a relay is for has gone; never, of the host's own.
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

/// A socket that listens, and has the options that a relay's connections are to inherit.
#[derive(Debug)]
pub struct Listening(std::net::TcpListener);

impl Listening {
    /// Begins to listen on a bound socket.
    pub fn begin(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = Socket::from(socket.into());
        // Before the first connection, which could not be cut off with a reset otherwise.
        splice::prepare(&socket)?;
        socket.listen(BACKLOG)?;
        Ok(Self(socket.into()))
    }

    /// One that listens since before.
    pub fn inherited(socket: std::net::TcpListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        splice::prepare(&socket)?;
        Ok(Self(socket))
    }

    /// In the event loop that is entered.
    pub(super) fn register(self) -> io::Result<TcpListener> {
        TcpListener::from_std(self.0)
    }
}

/// Listens in this thread's network namespace. Both the address and the device are bound: the address alone would let in
/// the LAN, which may route packets for it to the host (the weak host model).
pub fn listen(address: SocketAddr, interface: NonZeroU32) -> io::Result<Listening> {
    Listening::begin(bound(address, interface)?)
}

/// Listens in this thread's network namespace where only the kernel's entry leads: for `dialled`, on an address that no packet can
/// name, bound to the bridge. Of the host's ports it takes one that services do not use, so that a service which listens on
/// every address can have the dialled port.
///
/// # Errors
///
/// Any of socket(2), bind(2) and listen(2); `AddrInUse` if none of the ports is free.
pub fn listen_by_entry(dialled: SocketAddr, interface: NonZeroU32) -> io::Result<Listening> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let mut last = io::ErrorKind::AddrInUse.into();
    // A local user can have all of them; the kernel finds another one then.
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
    // By its index: a name can be given to another interface.
    socket.bind_device_by_index_v4(Some(interface))?;
    // An IPv6 address is tentative until the bridge has its first port, which is when it has its first container.
    if address.is_ipv6() && !address.ip().is_loopback() {
        socket.set_freebind_v6(true)?;
    }
    // Connections of an earlier relay may be in TIME_WAIT on the port.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// One relay at work.
pub(super) struct Listener {
    pub(super) socket: Arc<TcpListener>,
    /// Address and port that its clients dial.
    pub(super) dialled: SocketAddr,
    pub(super) orders: watch::Receiver<Arc<Orders>>,
    pub(super) modes: watch::Receiver<Mode>,
    pub(super) gone: Gone,
    /// Connections that this relay took.
    pub(super) taken: Arc<AtomicU64>,
    pub(super) surroundings: Surroundings,
}

impl Listener {
    /// Accepts until told otherwise. Connections are tasks of their own, and outlive this one.
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
        // A socket of the daemon before this one may hold connections to what another rule had.
        if !client.local_addr().is_ok_and(|own| {
            own.port() == self.dialled.port() && own.ip().to_canonical() == self.dialled.ip().to_canonical()
        }) {
            tracing::debug!("refused {peer}: it did not dial {}", self.dialled);
            return reset(&client);
        }
        let container = match &spec.clients {
            // The host's own processes come from the gateway's address.
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
                    "{}: refused {container}, and maybe others in the next minute: too many connections are open \
                     (its limit is {}, and all rules share the limit of open files)",
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
                carried = carry(client, container, &orders, surroundings.names) => if let Err(error) = carried {
                    let told = &orders.statistics.failed;
                    if told.lock().unwrap_or_else(PoisonError::into_inner).is_over() {
                        tracing::warn!("{}: a connection of {container} has failed, and others may: {error:#}", orders.spec.rule);
                    }
                    let _ = surroundings.wake.try_send(());
                },
                // Both ends are reset: there is nobody left to read the rest.
                () = gone.wait() => tracing::debug!("{container}: its namespace is gone"),
            }
        });
    }
}

/// Keeps a thing that may happen a thousand times a second from being told as often.
#[derive(Debug, Default)]
struct Pause(Option<Instant>);

impl Pause {
    /// Whether the last time is long enough ago; this is one, then.
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

/// What `relaying` comes to; `None` if no byte moved for `limit`, or for up to a quarter longer. It is dropped then, which
/// resets both ends.
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

/// Tells the service who connects, in the PROXY protocol's header.
fn proxy_header(version: ProxyProtocol, client: SocketAddr, dialled: SocketAddr) -> anyhow::Result<Vec<u8>> {
    // Both are of one family there.
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

/// Makes the coming close a reset: what the client sent was not delivered, and it must not think so.
fn reset(client: &TcpStream) {
    let _ = client.set_zero_linger();
}

/// A name that the service is to be told: withdrawn if it comes to nothing, whatever the reason.
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
            // The port is chosen by connect(): one that bind() has chosen is lost to every other program's connect(), and
            // a container could use them all up.
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

/// Waits for a connect() that was begun. On loopback the handshake is over when it returns, although it says that it has
/// only begun; asked again it tells, and the event loop need not be gone through.
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

/// By its file, which is looked for with care: whoever owns a folder on the way could have put a link there to a socket that
/// only this process may connect to.
async fn connect_unix(path: &Path) -> anyhow::Result<UnixStream> {
    let file = trusted::open(path).with_context(|| format!("cannot connect to {}", path.display()))?;
    let file_path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let connecting = timeout(CONNECT_TIMEOUT, UnixStream::connect(file_path));
    let stream = connecting.await.context("no answer").and_then(|done| Ok(done?));
    stream.with_context(|| format!("cannot connect to {}", path.display()))
}

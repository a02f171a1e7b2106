//! One relay: listens on the gateway, bound to the bridge; checks who comes; connects to the service.

use std::{
    future, io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UnixStream},
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
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

/// Whether a relay takes new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Yes.
    Open,
    /// Only those that began before the kernel took over.
    Lingering,
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
}

/// Listens where `key` says. Both the address and the device are bound: the address alone would let in the LAN, which
/// may route packets for it to the host (the weak host model).
pub(super) fn bind(key: &RelayKey) -> anyhow::Result<TcpListener> {
    let bind = || -> io::Result<TcpListener> {
        let socket = if key.gateway.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind_device(Some(key.interface.as_bytes()))?;
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
    let mut deadline = None;
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
                    if !spec.subnet.contains(container.ip()) {
                        tracing::warn!("refused {container}: not an address of this network");
                        reset(&client);
                        continue;
                    }
                    statistics.connections.fetch_add(1, Ordering::Relaxed);
                    let surroundings = surroundings.clone();
                    tokio::spawn(async move {
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

/// Forgets the name when the connection ends, however it does.
#[derive(Debug)]
struct Presented {
    names: Arc<dyn PeerNames>,
    relay_end: SocketAddr,
}

impl Drop for Presented {
    fn drop(&mut self) {
        self.names.forget(self.relay_end);
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
        let own =
            if service.is_ipv4() { stand_in(container.ip()).into() } else { IpAddr::V6(Ipv6Addr::LOCALHOST) };
        // The port must be known before the service's accept() can ask for it.
        socket.bind(SocketAddr::new(own, 0)).with_context(|| format!("cannot connect from {own}"))?;
        if let Some(names) = names {
            let relay_end = socket.local_addr()?;
            names.present(relay_end, container)?;
            presented = Some(Presented { names, relay_end });
        }
    }
    let stream = socket.connect(service).await.with_context(|| format!("cannot connect to {service}"))?;
    Ok((stream, presented))
}

async fn connect_unix(path: &Path) -> anyhow::Result<UnixStream> {
    UnixStream::connect(path).await.with_context(|| format!("cannot connect to {}", path.display()))
}

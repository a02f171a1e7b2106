//! Listener: one relay. Accepts connections, checks the client's address, and has each admitted one carried.

use std::{
    future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::TaskTracker;

use super::{
    PeerNames,
    connection::{proxy_connection, reset},
    limits::ConnectionLimiter,
    log_rate_limit::LogRateLimit,
    meter::Statistics,
};
use crate::planning::{
    desired::{Clients, RelaySpec},
    rule::RuleId,
};

/// The time that handshakes which began before the kernel took over have to complete.
const LINGER: Duration = Duration::from_secs(1);
/// The pause after a failed accept(). The usual cause is that no descriptors are left, and an immediate retry
/// would only burn CPU time.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

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

/// A relay's specification, and its rule's counters.
#[derive(Debug)]
pub(super) struct RelayConfig {
    pub(super) spec: RelaySpec,
    pub(super) statistics: Arc<Statistics>,
}

/// The handles that all relays share.
#[derive(Debug, Clone)]
pub(super) struct RelayContext {
    /// The way to make services see the container as their peer; `None` if there is none.
    pub(super) names: Option<Arc<dyn PeerNames>>,
    /// Gets a unit when a connection fails: if the service is not there, the relay should not be there
    /// either.
    pub(super) wake: mpsc::Sender<()>,
    /// The places for the connections of all relays.
    pub(super) places: ConnectionLimiter,
    /// The tasks of all relays' connections.
    pub(super) connections: TaskTracker,
}

/// A receiver that turns true when a relay's namespace has gone; `None` for the host's own, which never goes.
#[derive(Debug, Clone)]
pub(super) struct NetnsClosed(pub(super) Option<watch::Receiver<bool>>);

impl NetnsClosed {
    async fn wait(&mut self) {
        match &mut self.0 {
            // The sender lives for as long as there are receivers.
            Some(gone) => drop(gone.wait_for(|gone| *gone).await),
            None => future::pending().await,
        }
    }
}

/// A running relay.
pub(super) struct Listener {
    pub(super) socket: Arc<TcpListener>,
    /// The address and port that its clients dial.
    pub(super) dialled: SocketAddr,
    pub(super) config: watch::Receiver<Arc<RelayConfig>>,
    pub(super) modes: watch::Receiver<Mode>,
    pub(super) gone: NetnsClosed,
    /// The number of connections that this relay took.
    pub(super) taken: Arc<AtomicU64>,
    pub(super) context: RelayContext,
}

impl Listener {
    /// Accepts connections until the mode or the end of the namespace stops it. Connections are tasks of
    /// their own, and outlive this one.
    pub(super) async fn serve(mut self) {
        let (mut deadline, mut refused, mut failed) =
            (None, LogRateLimit::default(), LogRateLimit::default());
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
                            let RuleId { network, port, protocol } = &self.config.borrow().spec.rule;
                            tracing::warn!(
                                %network,
                                port,
                                protocol = protocol.name(),
                                %error,
                                "relay could not accept connections; trying again"
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

    fn take(&self, client: TcpStream, peer: SocketAddr, refused: &mut LogRateLimit) {
        let config = self.config.borrow().clone();
        let RelayConfig { spec, statistics } = &*config;
        // An inherited socket of an earlier daemon may hold connections to the address of another rule.
        if !client.local_addr().is_ok_and(|own| {
            own.port() == self.dialled.port() && own.ip().to_canonical() == self.dialled.ip().to_canonical()
        }) {
            tracing::debug!(client = %peer, dialled = %self.dialled, "relay refused a client: it dialled \
                                                                      another address");
            return reset(&client);
        }
        let container = match &spec.clients {
            // The host's own processes connect from the gateway's address.
            Clients::Subnet(subnet)
                if !subnet.contains(peer.ip())
                    || peer.ip().to_canonical() == self.dialled.ip().to_canonical() =>
            {
                tracing::debug!(client = %peer, "relay refused a client: not a container of this network");
                return reset(&client);
            }
            Clients::Listed(listed) if !listed.contains(&peer.ip().to_canonical()) => {
                tracing::debug!(client = %peer, "relay refused a client: the rule is not for this container");
                return reset(&client);
            }
            Clients::Subnet(_) | Clients::Listed(_) => peer,
            Clients::Inside(told) => SocketAddr::new(*told, peer.port()),
        };
        let Some(permit) = self.context.places.take(statistics, spec.max_connections) else {
            statistics.refused.fetch_add(1, Ordering::Relaxed);
            if refused.is_over() {
                let RuleId { network, port, protocol } = &spec.rule;
                tracing::warn!(
                    %network,
                    port,
                    protocol = protocol.name(),
                    container = %container,
                    limit = spec.max_connections,
                    "relay refused a connection: too many connections for the rule's limit or the limit of \
                     open files; more are logged after a minute"
                );
            }
            return reset(&client);
        };
        self.taken.fetch_add(1, Ordering::Relaxed);
        let (mut gone, context) = (self.gone.clone(), self.context.clone());
        self.context.connections.spawn(async move {
            let _permit = permit;
            let (RelayConfig { spec, statistics }, RelayContext { names, wake, .. }) = (&*config, context);
            let carried = proxy_connection(client, container, spec, statistics, names);
            tokio::select! {
                carried = carried => if let Err(error) = carried {
                    if statistics.failure_is_due() {
                        let RuleId { network, port, protocol } = &spec.rule;
                        tracing::warn!(
                            %network,
                            port,
                            protocol = protocol.name(),
                            container = %container,
                            error = format!("{error:#}"),
                            "relayed connection failed; more are logged after a minute"
                        );
                    }
                    let _ = wake.try_send(());
                },
                // Both ends are reset: there is nobody left to read the rest.
                () = gone.wait() => tracing::debug!(container = %container, "relayed connection reset: the \
                                                                             namespace is gone"),
            }
        });
    }
}

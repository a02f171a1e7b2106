//! Splice: the relay's data plane, which moves the bytes of one connection between two connected sockets.
//!
//! Owns everything between accept/connect and close: both directions, their ends, resets, counters, and the
//! options of both sockets. Knows nothing of rules, listeners or namespaces, and imports nothing of the
//! crate.
//!
//! Invariants:
//! - Each direction ends by itself. An end of file is passed on as one, and the other direction continues.
//! - A reset is passed on as a reset, never as an end of file, after the bytes that came before it.
//! - A direction holds at most one buffer or one pipe of bytes, and only while its destination is full. A
//!   connection with nothing to move holds neither.
//! - Dropping the future closes both sockets at once, with a reset: a stream that was cut must not look
//!   finished. The kernel does the same when the process is killed.
//!
//! SIGPIPE must be ignored, as the Rust runtime does by default: splice(2) has no `MSG_NOSIGNAL`.

mod leg;
mod pipe;
mod pump;
#[cfg(test)]
mod tests;

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;

pub(crate) use leg::{Leg, prepare, speak_first};
pub(crate) use pipe::limit_pipes;
pub(crate) use pump::Prefetched;
use pump::{Broken, Flow, Watch};

/// The time that one leg's last bytes may take to reach the other leg after the first one broke; then the
/// other is reset too. The bytes are few (a receive queue and a pipe); only a peer that has stopped reading
/// needs this long.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// One end of a relayed connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The container or sandbox that dialled.
    Client,
    /// The service that the client dialled.
    Service,
}

impl Side {
    /// Returns the opposite side.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Client => Self::Service,
            Self::Service => Self::Client,
        }
    }
}

/// The number of bytes that one connection has moved so far: those that its destinations have accepted.
/// Updated on every call, so that it can be read at any time.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    to_service: AtomicU64,
    to_client: AtomicU64,
}

impl Traffic {
    /// Returns the bytes moved from the client to the service.
    pub(crate) fn to_service(&self) -> u64 {
        self.to_service.load(Ordering::Relaxed)
    }

    /// Returns the bytes moved from the service to the client.
    pub(crate) fn to_client(&self) -> u64 {
        self.to_client.load(Ordering::Relaxed)
    }
}

/// The way in which a relayed connection ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Both sides ended their streams, and each end was passed on to the other side.
    Finished,
    /// This side's peer reset the connection; the other side was reset too.
    Reset(Side),
    /// This side failed otherwise (a keepalive time-out, an unreachable network); the other side was reset.
    Failed(Side, io::Error),
}

/// Moves bytes between `client` and `service` until both have ended or one has broken, then closes both.
/// `early` has bytes that were read from the client before. A TCP socket must have been [prepared](prepare),
/// or accepted from one that was.
pub(crate) async fn relay<C: Leg, S: Leg>(
    client: C,
    early: Prefetched,
    service: S,
    traffic: &Traffic,
) -> Outcome {
    let mut to_service = Flow::new(Side::Client, &traffic.to_service).with(early);
    let mut to_client = Flow::new(Side::Service, &traffic.to_client);

    let ended = async {
        both(&mut to_service, &mut to_client, &client, &service).await?;
        client.close_orderly().map_err(|error| Broken { side: Side::Client, error })?;
        service.close_orderly().map_err(|error| Broken { side: Side::Service, error })
    };
    let Broken { side, error } = match ended.await {
        Ok(()) => return Outcome::Finished,
        Err(broken) => broken,
    };

    match side {
        Side::Client => deliver_last_bytes(&mut to_service, &client, &service, &error).await,
        Side::Service => deliver_last_bytes(&mut to_client, &service, &client, &error).await,
    }
    // Both sockets are closed here, with the reset that `prepare` has ordered.
    if leg::is_reset(&error) { Outcome::Reset(side) } else { Outcome::Failed(side, error) }
}

/// Runs both directions to their ends. After one direction has ended nothing reads from its source any more,
/// so that socket is watched for a reset while the other direction continues.
async fn both<C: Leg, S: Leg>(
    to_service: &mut Flow<'_>,
    to_client: &mut Flow<'_>,
    client: &C,
    service: &S,
) -> Result<(), Broken> {
    let mut to_service = pin!(pump::transfer(to_service, client, service, Watch::Source));
    let mut to_client = pin!(pump::transfer(to_client, service, client, Watch::Source));
    // The end that comes second is passed on by the close.
    tokio::select! {
        biased;
        ended = &mut to_service => {
            ended?;
            end(service, Side::Service)?;
            tokio::select! {
                biased;
                ended = &mut to_client => ended,
                error = pump::broken(client) => Err(Broken { side: Side::Client, error }),
            }
        }
        ended = &mut to_client => {
            ended?;
            end(client, Side::Client)?;
            tokio::select! {
                biased;
                ended = &mut to_service => ended,
                error = pump::broken(service) => Err(Broken { side: Side::Service, error }),
            }
        }
    }
}

/// Passes on the end of the other side's stream, by shutting down writes.
fn end(to: &impl Leg, side: Side) -> Result<(), Broken> {
    to.shutdown_write().map_err(|error| {
        // ENOTCONN: the pending error has the reset that came in between.
        Broken { side, error: to.take_error().ok().flatten().unwrap_or(error) }
    })
}

/// Delivers what `dead` had sent before it broke: a peer connected directly would have had it in its own
/// queue, and could read it even after the reset.
async fn deliver_last_bytes(flow: &mut Flow<'_>, dead: &impl Leg, live: &impl Leg, error: &io::Error) {
    let deliver = async {
        match pump::transfer(flow, dead, live, Watch::Nothing).await {
            // The error was taken already, so the end looks like an end of file even if there was none. The
            // kernel's error code tells: after the peer's FIN a reset is EPIPE, otherwise ECONNRESET.
            Ok(()) if error.raw_os_error() == Some(Errno::EPIPE as i32) => {
                // If this fails, `live` is broken too, and has nothing left to be delivered.
                let _ = live.shutdown_write();
            }
            Err(broken) if broken.side != flow.from() => return,
            _ => {}
        }
        // A close with a reset discards what has not been sent yet.
        let mut pause = Duration::from_millis(1);
        while !live.is_delivered() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    };
    // Late or not, the reset follows.
    let _ = tokio::time::timeout(LAST_BYTES, deliver).await;
}

//! One end of a relayed connection: the few things the data plane asks of a socket, for TCP and for Unix sockets.
//!
//! Owns the socket options of both legs. May import nothing of the crate.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, getsockopt, setsockopt, shutdown, sockopt};
use nix::{getsockopt_impl, libc, sockopt_impl};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// A peer that vanished without a word (a container's namespace was removed, a virtual machine stopped) is found
/// out after `KEEPALIVE_IDLE + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL` seconds: two minutes.
const KEEPALIVE_IDLE: u32 = 60;
const KEEPALIVE_INTERVAL: u32 = 10;
const KEEPALIVE_PROBES: u32 = 6;

/// The position of the bytes queued for sending (unsent or not acknowledged) in what `SO_MEMINFO` returns:
/// `SK_MEMINFO_WMEM_QUEUED` of `linux/sock_diag.h`.
const WMEM_QUEUED: usize = 5;

/// Keeps the option's type, which the macro makes `pub`, from being part of any interface.
mod meminfo {
    use super::{getsockopt_impl, libc, sockopt_impl};

    sockopt_impl!(
        /// What the kernel has allocated for a socket.
        MemInfo,
        GetOnly,
        libc::SOL_SOCKET,
        libc::SO_MEMINFO,
        [u32; 9]
    );
}

/// A connected socket that the relay moves bytes from and to.
///
/// Each leg has exactly one reader and one writer, which is what lets the `poll_` functions keep a single waker.
pub(crate) trait Leg: AsFd + Send + Sync {
    /// Ready when a read would not block, which includes an end of file and an error.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Ready when a write would not block, which includes an error.
    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Resolves when an error is raised on the socket, whoever waits to read from it or to write to it.
    fn error_raised(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Runs `op` if the socket was last seen ready; when `op` would block, the readiness is cleared.
    fn try_io<T>(&self, interest: Interest, op: impl FnOnce() -> io::Result<T>) -> io::Result<T>;

    /// Reads without blocking.
    fn try_read(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes without blocking.
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Takes the pending error (`SO_ERROR`).
    fn take_error(&self) -> io::Result<Option<io::Error>>;

    /// Sets the options a relayed socket has from its start.
    fn prepare(&self) -> io::Result<()>;

    /// From here on a close is an orderly one.
    fn close_orderly(&self) -> io::Result<()>;

    /// Whether everything written has arrived at the peer's kernel.
    fn is_delivered(&self) -> bool;

    /// Ends the stream towards the peer; the other direction goes on.
    fn shutdown_write(&self) -> io::Result<()> {
        shutdown(self.as_fd().as_raw_fd(), Shutdown::Write).map_err(io::Error::from)
    }
}

macro_rules! forward_to_tokio {
    () => {
        fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.poll_read_ready(cx)
        }

        fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.poll_write_ready(cx)
        }

        async fn error_raised(&self) -> io::Result<()> {
            self.ready(Interest::ERROR).await.map(drop)
        }

        fn try_io<T>(&self, interest: Interest, op: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
            self.try_io(interest, op)
        }

        fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
            self.try_read(buf)
        }

        fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
            self.try_write(bytes)
        }

        fn take_error(&self) -> io::Result<Option<io::Error>> {
            self.take_error()
        }
    };
}

impl Leg for TcpStream {
    forward_to_tokio!();

    fn prepare(&self) -> io::Result<()> {
        // Whatever ends the relay before both ends of file were passed on (the task is dropped, the process is
        // killed) must not look like the orderly end of a stream that was in fact cut: a plain close would send
        // a FIN. With a linger time of zero the kernel sends a RST.
        setsockopt(self, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        // Messages were cut into segments by their sender; to hold one back for more would only delay it.
        setsockopt(self, sockopt::TcpNoDelay, &true)?;
        // An urgent byte stays in its place in the stream. Otherwise reads would silently skip it.
        setsockopt(self, sockopt::OobInline, &true)?;
        setsockopt(self, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
        setsockopt(self, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
        setsockopt(self, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
        setsockopt(self, sockopt::KeepAlive, &true)?;
        Ok(())
    }

    fn close_orderly(&self) -> io::Result<()> {
        Ok(setsockopt(self, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 })?)
    }

    fn is_delivered(&self) -> bool {
        // A question that cannot be answered must not be asked again and again.
        getsockopt(self, meminfo::MemInfo).map_or(true, |info| info[WMEM_QUEUED] == 0)
    }
}

impl Leg for UnixStream {
    forward_to_tokio!();

    /// A Unix socket has no keepalive (its peer cannot vanish unnoticed), and no way to send a reset: the kernel
    /// raises one when a socket is closed with unread bytes, and there only.
    fn prepare(&self) -> io::Result<()> {
        Ok(())
    }

    fn close_orderly(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_delivered(&self) -> bool {
        true // A write puts the bytes into the peer's own queue.
    }
}

/// Whether `error` says that the peer, rather than the network or this host, ended the connection.
pub(super) fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN | Errno::ECONNABORTED)
    )
}

//! Leg: one end of a relayed connection, with the few operations that the data plane needs, for TCP and Unix
//! sockets.
//!
//! Owns the socket options of both legs. May import nothing of the crate.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, recv, send, setsockopt, shutdown, sockopt};
use nix::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// Seconds without traffic before keepalive probes start. A peer that vanished silently (a container's
/// namespace was removed, a virtual machine stopped) is detected after `KEEPALIVE_IDLE + KEEPALIVE_PROBES *
/// KEEPALIVE_INTERVAL` seconds: two minutes.
const KEEPALIVE_IDLE: u32 = 60;
const KEEPALIVE_INTERVAL: u32 = 10;
const KEEPALIVE_PROBES: u32 = 6;

/// The index in the result of `SO_MEMINFO` of the bytes queued for sending (unsent or not acknowledged):
/// `SK_MEMINFO_WMEM_QUEUED` of `linux/sock_diag.h`.
const WMEM_QUEUED: usize = 5;

/// Keeps the options' types, which the macro makes `pub`, from being part of any interface.
mod options {
    use super::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};

    sockopt_impl!(
        /// The memory that the kernel has allocated for a socket.
        MemInfo,
        GetOnly,
        libc::SOL_SOCKET,
        libc::SO_MEMINFO,
        [u32; 9]
    );

    sockopt_impl!(
        /// True if the socket sends acknowledgements at once.
        QuickAck,
        SetOnly,
        libc::IPPROTO_TCP,
        libc::TCP_QUICKACK,
        bool
    );
}

/// A connected socket that the relay moves bytes from and to.
///
/// Each leg has exactly one reader and one writer, which is what lets the `poll_` functions keep a single
/// waker.
pub(crate) trait Leg: AsFd + Send + Sync {
    /// Polls for reading: ready when a read would not block, which includes an end of file and an error.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Polls for writing: ready when a write would not block, which includes an error.
    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Waits until an error is raised on the socket, while others may wait to read from it or to write to it.
    fn error_raised(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Runs `op` if the socket was last seen ready; when `op` would block, the readiness is cleared.
    fn try_io<T>(&self, interest: Interest, op: impl FnOnce() -> io::Result<T>) -> io::Result<T>;

    /// Reads without blocking.
    fn try_read(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// Reads without blocking, whether or not the socket was seen ready: a new one is often readable before
    /// the event loop has said so. `WouldBlock` does not clear the readiness.
    fn read_now(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self.as_fd().as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT)?)
    }

    /// Writes without blocking, whether or not the socket was seen ready: it nearly always is.
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let write = || {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            send(self.as_fd().as_raw_fd(), bytes, flags).map_err(io::Error::from)
        };
        match write() {
            // Try again through `try_io` to clear the readiness: a call clears only the readiness that was
            // seen before it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.try_io(Interest::WRITABLE, write),
            done => done,
        }
    }

    /// Takes the pending error (`SO_ERROR`).
    fn take_error(&self) -> io::Result<Option<io::Error>>;

    /// Makes the coming close an orderly one, instead of a reset.
    fn close_orderly(&self) -> io::Result<()>;

    /// Returns true if everything written has arrived at the peer's kernel.
    fn is_delivered(&self) -> bool;

    /// Ends the stream towards the peer; the other direction continues.
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

        fn take_error(&self) -> io::Result<Option<io::Error>> {
            self.take_error()
        }
    };
}

impl Leg for TcpStream {
    forward_to_tokio!();

    fn close_orderly(&self) -> io::Result<()> {
        Ok(setsockopt(self, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 })?)
    }

    fn is_delivered(&self) -> bool {
        // If it cannot be read, count as delivered: the caller must not ask for ever.
        getsockopt(self, options::MemInfo).map_or(true, |info| info[WMEM_QUEUED] == 0)
    }
}

impl Leg for UnixStream {
    forward_to_tokio!();

    /// Does nothing: a Unix socket cannot be told to send a reset. The kernel sends one only when a socket is
    /// closed with unread bytes.
    fn close_orderly(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_delivered(&self) -> bool {
        true // A write puts the bytes into the peer's own queue.
    }
}

/// Sets the options of a relayed TCP socket; a Unix socket needs none. Sockets accepted from a listening one
/// inherit all of them, so that nothing has to be set for each connection.
pub(crate) fn prepare(socket: &impl AsFd) -> io::Result<()> {
    // If the relay ends before both ends of file were passed on (the task is dropped, the process is killed),
    // that must not look like the orderly end of a stream that was in fact cut: a plain close would send a
    // FIN. With a linger time of zero the kernel sends a RST.
    setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    // The sender has cut the messages into segments; holding one back for more would only delay it.
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    // An urgent byte stays in its place in the stream. Otherwise reads would silently skip it.
    setsockopt(socket, sockopt::OobInline, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
    setsockopt(socket, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    Ok(())
}

/// Prepares a socket that will write as soon as it is connected: the handshake's last acknowledgement is then
/// sent together with the first bytes, and the service is woken once instead of twice.
pub(crate) fn speak_first(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, options::QuickAck, &false)?)
}

/// Returns true if `error` means that the peer ended the connection, rather than the network or this host.
pub(super) fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN | Errno::ECONNABORTED)
    )
}

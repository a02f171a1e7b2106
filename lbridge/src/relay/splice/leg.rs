//! One end of a relayed connection: the few things the data plane asks of a socket, for TCP and for Unix sockets.
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

/// A peer that vanished without a word (a container's namespace was removed, a virtual machine stopped) is found
/// out after `KEEPALIVE_IDLE + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL` seconds: two minutes.
const KEEPALIVE_IDLE: u32 = 60;
const KEEPALIVE_INTERVAL: u32 = 10;
const KEEPALIVE_PROBES: u32 = 6;

/// The position of the bytes queued for sending (unsent or not acknowledged) in what `SO_MEMINFO` returns:
/// `SK_MEMINFO_WMEM_QUEUED` of `linux/sock_diag.h`.
const WMEM_QUEUED: usize = 5;

/// Keeps the options' types, which the macro makes `pub`, from being part of any interface.
mod options {
    use super::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};

    sockopt_impl!(
        /// What the kernel has allocated for a socket.
        MemInfo,
        GetOnly,
        libc::SOL_SOCKET,
        libc::SO_MEMINFO,
        [u32; 9]
    );

    sockopt_impl!(
        /// Whether an acknowledgement is sent at once.
        QuickAck,
        SetOnly,
        libc::IPPROTO_TCP,
        libc::TCP_QUICKACK,
        bool
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

    /// Reads without blocking, whether or not the socket was seen ready: a new one is often readable before the event
    /// loop has said so. `WouldBlock` says nothing about later.
    fn read_now(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self.as_fd().as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT)?)
    }

    /// Writes without blocking, whether or not the socket was seen ready: nearly always it is.
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let write = || {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            send(self.as_fd().as_raw_fd(), bytes, flags).map_err(io::Error::from)
        };
        match write() {
            // Again, for the readiness to be cleared: only what was seen before a call is made void by it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.try_io(Interest::WRITABLE, write),
            done => done,
        }
    }

    /// Takes the pending error (`SO_ERROR`).
    fn take_error(&self) -> io::Result<Option<io::Error>>;

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
        // A question that cannot be answered must not be asked again and again.
        getsockopt(self, options::MemInfo).map_or(true, |info| info[WMEM_QUEUED] == 0)
    }
}

impl Leg for UnixStream {
    forward_to_tokio!();

    /// It has no way to send a reset: the kernel raises one when a socket is closed with unread bytes, and there only.
    fn close_orderly(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_delivered(&self) -> bool {
        true // A write puts the bytes into the peer's own queue.
    }
}

/// Sets what a relayed TCP socket has from its start; a Unix socket needs nothing. What a listening socket accepts inherits
/// all of it, so that nothing has to be set for each connection.
pub(crate) fn prepare(socket: &impl AsFd) -> io::Result<()> {
    // Whatever ends the relay before both ends of file were passed on (the task is dropped, the process is
    // killed) must not look like the orderly end of a stream that was in fact cut: a plain close would send
    // a FIN. With a linger time of zero the kernel sends a RST.
    setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    // Messages were cut into segments by their sender; to hold one back for more would only delay it.
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    // An urgent byte stays in its place in the stream. Otherwise reads would silently skip it.
    setsockopt(socket, sockopt::OobInline, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
    setsockopt(socket, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    Ok(())
}

/// For a socket that is about to connect, and to write as soon as it has: the handshake's last acknowledgement goes with
/// what is written, and the service is woken once instead of twice.
pub(crate) fn speak_first(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, options::QuickAck, &false)?)
}

/// Whether `error` says that the peer, rather than the network or this host, ended the connection.
pub(super) fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN | Errno::ECONNABORTED)
    )
}

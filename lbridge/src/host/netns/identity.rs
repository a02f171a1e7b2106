//! Identity: tells network namespaces apart, by their inodes and by their cookies.

use std::{
    io,
    os::{fd::AsFd, unix::net::UnixDatagram},
};

use anyhow::Context as _;
use nix::{errno::Errno, sys::socket::getsockopt};
use rustix::fs::fstat;

use crate::planning::inventory::NamespaceId;

/// Reads the identity of an open namespace.
pub fn id_of(file: &impl AsFd) -> io::Result<NamespaceId> {
    let stat = fstat(file)?;
    Ok(NamespaceId { device: stat.st_dev, inode: stat.st_ino })
}

/// Returns the cookie of this thread's network namespace; `None` before Linux 5.14.
pub(super) fn own_cookie() -> anyhow::Result<Option<u64>> {
    // Any socket will do.
    let socket = UnixDatagram::unbound()?;
    match getsockopt(&socket, option::NetnsCookie) {
        Ok(cookie) => Ok(Some(cookie)),
        Err(Errno::ENOPROTOOPT) => Ok(None),
        Err(error) => Err(error).context("cannot read the network namespace's cookie"),
    }
}

/// Keeps the option's type, which the macro makes `pub`, from being part of any interface.
mod option {
    use nix::{getsockopt_impl, libc, sockopt_impl};

    sockopt_impl!(
        /// The cookie of the socket's network namespace.
        NetnsCookie,
        GetOnly,
        libc::SOL_SOCKET,
        libc::SO_NETNS_COOKIE,
        u64
    );
}

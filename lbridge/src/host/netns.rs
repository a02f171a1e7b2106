//! The network namespace that this process is in: "the host".

use std::{fs::File, os::unix::net::UnixDatagram};

use anyhow::Context as _;
use nix::{errno::Errno, sys::socket::getsockopt};

/// The namespace of this process.
#[derive(Debug)]
pub struct HostNetns {
    /// Its handle.
    pub file: File,
    /// Its cookie, never used again (`SO_NETNS_COOKIE`, Linux 5.14 and later); `None` on older kernels.
    pub cookie: Option<u64>,
}

impl HostNetns {
    /// Opens it.
    pub fn open() -> anyhow::Result<Self> {
        let file = File::open("/proc/self/ns/net").context("cannot open this process's network namespace")?;
        // Any socket will do.
        let socket = UnixDatagram::unbound()?;
        let cookie = match getsockopt(&socket, option::NetnsCookie) {
            Ok(cookie) => Some(cookie),
            Err(Errno::ENOPROTOOPT) => None,
            Err(error) => return Err(error).context("cannot read the network namespace's cookie"),
        };
        Ok(Self { file, cookie })
    }
}

/// Keeps the option's type, which the macro makes `pub`, from being part of any interface.
mod option {
    use nix::{getsockopt_impl, libc, sockopt_impl};

    sockopt_impl!(
        /// Cookie of the socket's network namespace.
        NetnsCookie,
        GetOnly,
        libc::SOL_SOCKET,
        libc::SO_NETNS_COOKIE,
        u64
    );
}

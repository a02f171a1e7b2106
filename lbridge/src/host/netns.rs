//! The network namespace that this process is in: "the host".

use std::{
    fs::File,
    io,
    net::TcpListener,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
};

use anyhow::Context as _;

/// The namespace of this process.
#[derive(Debug)]
pub struct HostNetns {
    /// Its handle.
    pub file: File,
    /// Its inode number, unique among living namespaces.
    pub inode: u64,
    /// Its cookie, never used again (`SO_NETNS_COOKIE`, Linux 5.14 and later); `None` on older kernels.
    pub cookie: Option<u64>,
}

impl HostNetns {
    /// Opens it.
    pub fn open() -> anyhow::Result<Self> {
        let file = File::open("/proc/self/ns/net").context("cannot open this process's network namespace")?;
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode, cookie: cookie().context("cannot read the network namespace's cookie")? })
    }
}

fn cookie() -> io::Result<Option<u64>> {
    // Any socket will do; this one needs no address that is free.
    let socket = TcpListener::bind(("127.0.0.1", 0))?;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: pointer and length describe `cookie`; the descriptor is open.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match status {
        0 => Ok(Some(cookie)),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
            error => Err(error),
        },
    }
}

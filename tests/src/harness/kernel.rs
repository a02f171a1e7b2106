//! kernel: features of the running kernel, determined without the daemon under test.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Returns the kernel's version, `(6, 1)` for 6.1.176.
pub fn version() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|text| text.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Creates a stream socket for IPv6 or IPv4, of MPTCP or TCP.
pub fn stream_socket(v6: bool, mptcp: bool) -> io::Result<OwnedFd> {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    let protocol = if mptcp { libc::IPPROTO_MPTCP } else { libc::IPPROTO_TCP };
    // SAFETY: socket is a plain system call.
    let fd =
        Errno::result(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns true if MPTCP sockets can be created.
pub fn has_mptcp() -> bool {
    stream_socket(false, true).is_ok()
}

/// Returns true if `sk_lookup` programs can read a packet's ingress interface.
pub fn has_ingress_ifindex() -> bool {
    version() >= (5, 17)
}

/// Returns true if socket programs can tell the host's listeners from a container's by themselves, so that a
/// restarted service is registered again without the daemon.
pub fn registers_listeners_alone() -> bool {
    version() >= (5, 15)
}

//! Foreign sockets: takes a descriptor of another process's listening socket (pidfd_getfd(2)). This is the
//! most privileged act of the daemon: whoever has the descriptor can accept the service's connections. The
//! daemon only registers the socket in the kernel's map, and closes the descriptor.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::OwnedFd,
};

use anyhow::{Context as _, bail};
use rustix::{
    net::{ipproto, sockopt},
    process::{self, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_open},
};

use super::holders::holders_of;

/// Takes descriptors of listening sockets of other processes.
#[derive(Debug, Default)]
pub struct SocketFdTaker {
    /// Maps a socket's inode to the processes that hold it and their descriptors, as one walk through /proc
    /// found them. `None` before the walk.
    holders: Option<HashMap<u64, Vec<(Pid, i32)>>>,
}

impl SocketFdTaker {
    /// Returns a descriptor of the socket with this inode. Needs `CAP_SYS_PTRACE` (`PTRACE_MODE_ATTACH`,
    /// pidfd_getfd(2)).
    ///
    /// `wanted` has the inodes that this call and later calls ask for: one walk through /proc finds them all.
    pub fn take(&mut self, inode: u64, wanted: &HashSet<u64>) -> anyhow::Result<OwnedFd> {
        let holders = match &mut self.holders {
            Some(holders) => holders,
            none => none.insert(holders_of(wanted)?),
        };
        let Some(holders) = holders.get(&inode) else {
            bail!("no process holds the listening socket (inode {inode})");
        };
        let mut last = None;
        for (pid, fd) in holders {
            match pidfd_getfd(*pid, *fd) {
                // The process may have closed it and reused the descriptor's number.
                Ok(taken) if socket_inode(&taken) == Some(inode) => return Ok(taken),
                Ok(_) => {}
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error).context("cannot duplicate the service's listening socket"),
            None => bail!("the listening socket is gone (inode {inode})"),
        }
    }
}

/// Returns true if a listening socket is an MPTCP socket (`SO_PROTOCOL`).
pub fn is_mptcp(socket: &OwnedFd) -> bool {
    sockopt::socket_protocol(socket).is_ok_and(|protocol| protocol == Some(ipproto::MPTCP))
}

fn pidfd_getfd(pid: Pid, fd: i32) -> io::Result<OwnedFd> {
    // Both descriptors are close-on-exec.
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(process::pidfd_getfd(process, fd, PidfdGetfdFlags::empty())?)
}

fn socket_inode(fd: &OwnedFd) -> Option<u64> {
    nix::sys::stat::fstat(fd).ok().map(|stat| stat.st_ino)
}

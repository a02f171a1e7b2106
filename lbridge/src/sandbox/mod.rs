//! Sandboxes: network namespaces that users make for themselves, with bubblewrap or unshare(1), and that
//! contain only a loopback interface of their own. Needs no daemon and no root: everything here runs with the
//! rights of the user who made the sandbox. Imports planning's identity of a namespace, and nothing else.
//!
//! - [`find`]: finds the namespace that a process is in, or has made;
//! - [`launch`]: starts a command, and holds it when its sandbox is up and its program has not run yet;
//! - [`door`]: makes listening sockets inside.
//!
//! `trace` wraps ptrace(2), `signals` forwards signals to the command.

pub mod door;
pub mod find;
pub mod launch;
mod signals;
mod trace;

use std::{fs::File, io, os::fd::AsFd, path::Path};

use nix::sys::stat::{FileStat, fstat, stat};

use crate::planning::inventory::NamespaceId;

/// Returns the identity of an open namespace: "if they are in the same namespace, the device IDs and inode
/// numbers will be the same" (namespaces(7)). Valid for as long as one of the two is kept open or alive.
fn id_of(namespace: impl AsFd) -> io::Result<NamespaceId> {
    Ok(id(fstat(namespace)?))
}

/// Returns the identity of the namespace behind a link in `/proc/PID/ns`.
fn id_at(link: impl AsRef<Path>) -> io::Result<NamespaceId> {
    Ok(id(stat(link.as_ref())?))
}

/// Returns the identity of the calling thread's network namespace.
fn own_netns() -> io::Result<NamespaceId> {
    id_at("/proc/thread-self/ns/net")
}

fn id(stat: FileStat) -> NamespaceId {
    NamespaceId { device: stat.st_dev, inode: stat.st_ino }
}

/// Opens the network namespace of a process or thread. The caller must make sure that `pid` is not reused.
fn netns_of(pid: nix::unistd::Pid) -> io::Result<File> {
    File::open(format!("/proc/{pid}/ns/net"))
}

#[cfg(test)]
mod tests;

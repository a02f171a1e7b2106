//! Sandboxes: network namespaces that users make for themselves, with bubblewrap or unshare(1), where nothing but an own
//! loopback is. No daemon and no root here: all of it runs with the rights of the user who made the sandbox. Imports
//! planning's identity of a namespace, and nothing else.
//!
//! - [`find`]: the namespace that a process is in, or has made;
//! - [`launch`]: starts a command, and catches the moment when its sandbox is up and its program has not run yet;
//! - [`door`]: makes listening sockets inside.
//!
//! `trace` has the calls of ptrace(2), `signals` passes signals on to the command.

pub mod door;
pub mod find;
pub mod launch;
mod signals;
mod trace;

use std::{fs::File, io, os::fd::AsFd, path::Path};

use nix::sys::stat::{FileStat, fstat, stat};

use crate::planning::inventory::NamespaceId;

/// Which namespace an open one is: "if they are in the same namespace, the device IDs and inode numbers will be the same"
/// (namespaces(7)). Holds as long as one of them is kept open or alive.
fn id_of(namespace: impl AsFd) -> io::Result<NamespaceId> {
    Ok(id(fstat(namespace)?))
}

/// Which namespace is behind a link in `/proc/PID/ns`.
fn id_at(link: impl AsRef<Path>) -> io::Result<NamespaceId> {
    Ok(id(stat(link.as_ref())?))
}

/// The network namespace that the calling thread is in.
fn own_netns() -> io::Result<NamespaceId> {
    id_at("/proc/thread-self/ns/net")
}

fn id(stat: FileStat) -> NamespaceId {
    NamespaceId { device: stat.st_dev, inode: stat.st_ino }
}

/// The network namespace of a process or thread. The caller sees to it that `pid` does not come to mean another one.
fn netns_of(pid: nix::unistd::Pid) -> io::Result<File> {
    File::open(format!("/proc/{pid}/ns/net"))
}

#[cfg(test)]
mod tests;

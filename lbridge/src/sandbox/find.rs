//! Find: finds the sandbox that a process is in, or has made.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::Pid,
};
use rustix::process::{PidfdFlags, pidfd_open};

use super::{id_of, netns_of, own_netns};

/// A process in another network namespace.
#[derive(Debug)]
pub struct Found {
    /// The open network namespace.
    pub netns: OwnedFd,
    /// A pidfd of the process: readable once it has ended.
    pub process: OwnedFd,
    /// The process's number (PID).
    pub pid: u32,
}

/// Finds the network namespace of a process. If that is this process's own, finds the first descendant that
/// is in another one: bubblewrap's outer process stays in the host's namespace, and its child is inside.
pub fn namespace_of(pid: u32) -> anyhow::Result<Found> {
    let own = own_netns().context("cannot determine this process's network namespace")?;
    let root = i32::try_from(pid).ok().filter(|&pid| pid > 0).map(Pid::from_raw);
    let root = root.with_context(|| format!("{pid} is not the number of a process"))?;
    let (handle, netns) = open_process(root).map_err(|error| match error.raw_os_error() {
        // EINVAL: the number is a thread's (pidfd_open(2)).
        Some(libc::ESRCH | libc::ENOENT | libc::EINVAL) => anyhow::anyhow!("there is no process {pid}"),
        Some(libc::EACCES | libc::EPERM) => {
            anyhow::anyhow!("process {pid} may not be inspected; run as the user who started it, or as root")
        }
        _ => anyhow::Error::new(error).context(format!("cannot inspect process {pid}")),
    })?;
    if id_of(&netns)? != own {
        return Ok(Found { netns: netns.into(), process: handle, pid });
    }
    for (child, parent) in descendants(root)? {
        // It may have ended since, or belong to another user.
        let Ok((process, netns)) = open_process(child) else { continue };
        // The number still means the same process if the parent is still the same.
        if id_of(&netns)? != own && parent_of(child) == Some(parent) && !has_ended(&process) {
            return Ok(Found { netns: netns.into(), process, pid: child.as_raw().unsigned_abs() });
        }
    }
    bail!("process {pid} shares this network namespace; there is nothing to bridge")
}

/// Opens a pidfd of a process and its network namespace. First takes the pidfd, then uses the number, then
/// checks that the process has not ended: so the number meant it all along.
fn open_process(pid: Pid) -> io::Result<(OwnedFd, File)> {
    let pidfd = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(Errno::ESRCH)?;
    let process = pidfd_open(pidfd, PidfdFlags::empty())?;
    let netns = netns_of(pid)?;
    if has_ended(&process) {
        return Err(Errno::ESRCH.into());
    }
    Ok((process, netns))
}

/// Returns true if the process has ended: "a PID file descriptor can be monitored using poll(2): when the
/// process that it refers to terminates, these interfaces indicate the file descriptor as readable",
/// pidfd_open(2).
fn has_ended(process: &impl AsFd) -> bool {
    let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    poll(&mut ended, PollTimeout::ZERO) != Ok(0)
}

/// Lists the descendants of a process, each with its parent; children first, then their children. Reads the
/// parents of all processes, since not every kernel has `/proc/PID/task/TID/children`.
fn descendants(root: Pid) -> anyhow::Result<Vec<(Pid, Pid)>> {
    let mut children: BTreeMap<Pid, Vec<Pid>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")?.flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw);
        if let Some(pid) = pid
            && let Some(parent) = parent_of(pid)
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let (mut found, mut queue) = (Vec::new(), VecDeque::from([root]));
    while let Some(parent) = queue.pop_front() {
        let mut children = children.remove(&parent).unwrap_or_default();
        children.sort_unstable();
        found.extend(children.iter().map(|&child| (child, parent)));
        queue.extend(children);
    }
    Ok(found)
}

fn parent_of(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, but nothing behind it does: "state ppid ...",
    // proc_pid_stat(5).
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok().map(Pid::from_raw)
}

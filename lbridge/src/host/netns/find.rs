//! Finding: opens the network namespace of a process or at a path, and checks that it is the one that is
//! meant.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::CloneFlags,
};
use rustix::{
    fs::{FsWord, Mode, OFlags, fstat, fstatfs, open},
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::{
    host::trusted,
    planning::{inventory::NetnsUnavailable, rule::ProcessStart},
};

/// The magic number of nsfs: `NSFS_MAGIC` (include/uapi/linux/magic.h).
const NSFS: FsWord = 0x6e73_6673;

/// Opens the network namespace of a process, and a pidfd of the process. Checks the process's start and
/// container if these are given.
pub(super) fn of_process(
    pid: u32,
    start: Option<&ProcessStart>,
    container: Option<&str>,
) -> Result<(OwnedFd, OwnedFd), NetnsUnavailable> {
    let ended = || NetnsUnavailable::NotThere(format!("process {pid} has ended"));
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(ended)?;
    // First take a pidfd, then look at what the number leads to, then check that the process has not ended:
    // so the number meant this process all along.
    let process = pidfd_open(number, PidfdFlags::empty()).map_err(|_| ended())?;
    if start.is_some_and(|start| process_start(pid).ok().as_ref() != Some(start)) {
        return Err(ended());
    }
    if let Some(container) = container {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|_| ended())?;
        if !is_in_container(&cgroups, container) {
            return Err(NetnsUnavailable::Unsuitable(format!(
                "process {pid} does not belong to this container; is the engine at DOCKER_HOST on this host?"
            )));
        }
    }
    let path = format!("/proc/{pid}/ns/net");
    let file = File::open(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ended(),
        _ => NetnsUnavailable::Unsuitable(format!("cannot open {path}: {error}")),
    })?;
    if has_ended(&process) {
        return Err(ended());
    }
    Ok((file.into(), process))
}

/// Returns true if a process in these cgroups (/proc/PID/cgroup) is the container's: on each path, the first
/// part that contains an id contains this one. A process that is in a container, or has a cgroup of its own,
/// can make cgroups below that with any name.
fn is_in_container(cgroups: &str, container: &str) -> bool {
    let ids = cgroups.lines().filter_map(|line| {
        let path = without_pod(line.splitn(3, ':').nth(2)?);
        // `ID`, `docker-ID.scope`, `libpod-ID.scope`, `crio-ID`.
        path.split('/').find_map(|part| part.split(['-', '.']).find(|word| is_id(word)))
    });
    let ids: Vec<_> = ids.collect();
    is_id(container) && !ids.is_empty() && ids.iter().all(|id| *id == container)
}

/// Strips a pod from a cgroup's path. Where Podman makes cgroups itself, a pod's cgroup encloses those of its
/// containers, and its name is the pod's id alone. It is below a folder at the top, where only root can make
/// any.
fn without_pod(path: &str) -> &str {
    let inside = path.strip_prefix("/libpod_parent/").and_then(|path| path.split_once('/'));
    inside.filter(|(pod, _)| is_id(pod)).map_or(path, |(_, container)| container)
}

fn is_id(text: &str) -> bool {
    const ID: usize = 64;
    text.len() == ID && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn has_ended(process: &OwnedFd) -> bool {
    let mut ready = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// The links and folders that a path may go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::host) enum Follow {
    /// All links and folders.
    Any,
    /// Only those that nobody but root and this process's user can change.
    Trusted,
}

/// Opens the network namespace at a path. Does not open any other file: a FIFO would block, a device might
/// act.
pub(in crate::host) fn at_path(path: &Path, follow: Follow) -> Result<OwnedFd, NetnsUnavailable> {
    let shown = path.display();
    let seen = match follow {
        Follow::Any => open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from),
        Follow::Trusted => trusted::open_fixed(path),
    };
    let seen = seen.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NetnsUnavailable::NotThere(format!("there is no {shown}")),
        io::ErrorKind::PermissionDenied if follow == Follow::Trusted => NetnsUnavailable::Unsuitable(format!(
            "{shown} is not followed: {error}; name the namespace by a path that only root can change, as \
             `ip netns attach NAME PID` makes it (netns:/run/netns/NAME), or allow pid:N"
        )),
        _ => NetnsUnavailable::Unsuitable(format!("cannot open {shown}: {error}")),
    })?;
    if !fstatfs(&seen).is_ok_and(|fs| fs.f_type == NSFS) {
        return Err(match fstat(&seen) {
            // `ip netns add` creates the file first, and mounts the namespace on it.
            Ok(stat) if stat.st_size == 0 => {
                NetnsUnavailable::NotThere(format!("{shown} is not a namespace"))
            }
            _ => NetnsUnavailable::Unsuitable(format!("{shown} is not a namespace")),
        });
    }
    let file = File::open(format!("/proc/self/fd/{}", seen.as_raw_fd()));
    let file = file.map_err(|error| NetnsUnavailable::Unsuitable(format!("cannot open {shown}: {error}")))?;
    if kind_of(&file).is_ok_and(|kind| kind != CloneFlags::CLONE_NEWNET.bits()) {
        return Err(NetnsUnavailable::Unsuitable(format!(
            "{shown} is a namespace, but not a network namespace"
        )));
    }
    Ok(file.into())
}

/// Returns the type of a namespace, one of the `CLONE_NEW...` flags (ioctl_ns(2)).
fn kind_of(file: &File) -> io::Result<i32> {
    // SAFETY: the request takes no argument.
    Ok(Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) })?)
}

/// Returns the start of the process that has this number now, which tells it from other processes with the
/// number.
pub fn process_start(pid: u32) -> io::Result<ProcessStart> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses, and may hold anything.
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks = rest.split(' ').nth(19).and_then(|field| field.parse().ok());
    let ticks = ticks.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    Ok(ProcessStart { ticks, boot })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_cgroup_is_the_first_that_is_one() {
        let (own, other) = ("ab".repeat(32), "cd".repeat(32));
        for (cgroups, is_own) in [
            (format!("0::/docker/{own}\n"), true),
            (format!("0::/system.slice/docker-{own}.scope\n"), true),
            (format!("0::/machine.slice/libpod-{own}.scope/container\n"), true),
            (format!("0::/system.slice/a.service/libpod-payload-{own}\n"), true),
            (format!("0::/libpod_parent/libpod-{own}\n"), true),
            // In a pod, and what a process in a container may make of that.
            (format!("0::/libpod_parent/{other}/libpod-{own}\n"), true),
            (format!("0::/machine.slice/machine-libpod_pod_{other}.slice/libpod-{own}.scope\n"), true),
            (format!("0::/libpod_parent/libpod-{other}/libpod-{own}\n"), false),
            (format!("0::/docker/{other}/libpod_parent/{other}/libpod-{own}\n"), false),
            (format!("1:cpu:/docker/{own}\n0::/\n"), true),
            (format!("0::/docker/{other}/{own}\n"), false),
            (format!("0::/docker/{own}/{other}\n"), true),
            (format!("1:cpu:/docker/{other}\n0::/docker/{own}\n"), false),
            (format!("0::/user/{own}x\n"), false),
            ("0::/\n".to_owned(), false),
        ] {
            assert_eq!(is_in_container(&cgroups, &own), is_own, "{cgroups}");
        }
        assert!(!is_in_container("0::/docker/\n", ""));
        assert!(!is_in_container("0::/docker/abc\n", "abc"));
    }

    #[test]
    fn a_process_has_one_start() {
        let pid = std::process::id();
        assert_eq!(process_start(pid).unwrap(), process_start(pid).unwrap());
        assert_ne!(process_start(pid).unwrap(), process_start(1).unwrap());
    }
}

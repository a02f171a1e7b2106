//! Holders of sockets: finds the processes that have a descriptor of a socket, in /proc.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    fs,
    path::PathBuf,
};

use anyhow::Context as _;
use rustix::process::Pid;

/// Returns the name and number of a process that holds a socket of this thread's network namespace, as text
/// for a message. Processes inside the namespace are searched first. Stops after 20,000 descriptors, so that
/// it does not take long, and then returns `None`.
pub fn holder(inode: u64) -> Option<String> {
    const MAX_LOOKS: usize = 20_000;
    let own = fs::read_link("/proc/thread-self/ns/net").ok()?;
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|process| process.path());
    let is_inside = |process: &PathBuf| fs::read_link(process.join("ns/net")).is_ok_and(|netns| netns == own);
    let (inside, outside): (Vec<_>, Vec<_>) = processes.partition(is_inside);
    let descriptors = inside.into_iter().chain(outside).flat_map(|process| {
        let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        open.map(move |descriptor| (process.clone(), descriptor.path()))
    });
    let is_it = |(_, descriptor): &(PathBuf, PathBuf)| {
        fs::read_link(descriptor).is_ok_and(|link| link.as_os_str() == OsStr::new(&wanted))
    };
    let (process, _) = descriptors.take(MAX_LOOKS).find(is_it)?;
    // The user who runs the process chooses these bytes.
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).escape_debug().to_string();
    Some(format!("{name} (process {})", process.file_name()?.display()))
}

/// Returns true if the process has a descriptor of the socket with this inode.
pub fn is_held_by(inode: u64, pid: u32) -> bool {
    let wanted = format!("socket:[{inode}]");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    descriptors.into_iter().any(|descriptor| {
        fs::read_link(descriptor.path()).is_ok_and(|link| link.as_os_str() == OsStr::new(&wanted))
    })
}

/// Maps the inodes of these sockets to the numbers of the processes that hold them. Finds only processes
/// whose descriptors this one may inspect.
pub fn processes_of(wanted: &BTreeSet<u64>) -> anyhow::Result<BTreeMap<u64, BTreeSet<u32>>> {
    let holders = holders_of(&wanted.iter().copied().collect())?.into_iter();
    let number = |(pid, _): (Pid, i32)| pid.as_raw_nonzero().get().unsigned_abs();
    Ok(holders.map(|(inode, holders)| (inode, holders.into_iter().map(number).collect())).collect())
}

/// Maps the inodes of these sockets to the processes that hold them and their descriptors. Walks through
/// /proc once.
pub(super) fn holders_of(wanted: &HashSet<u64>) -> anyhow::Result<HashMap<u64, Vec<(Pid, i32)>>> {
    let mut holders: HashMap<u64, Vec<_>> = HashMap::new();
    for process in fs::read_dir("/proc").context("cannot list processes")? {
        let Ok(process) = process else { continue };
        let Some(pid) = process.file_name().to_str().and_then(|n| Pid::from_raw(n.parse().ok()?)) else {
            continue;
        };
        // A process may end while it is looked at.
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Some(fd) = descriptor.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
                continue;
            };
            let Ok(link) = fs::read_link(descriptor.path()) else { continue };
            let inode =
                link.to_str().and_then(|l| l.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            if let Some(inode) = inode.filter(|i| wanted.contains(i)) {
                holders.entry(inode).or_default().push((pid, fd));
            }
        }
    }
    Ok(holders)
}

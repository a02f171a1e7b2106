//! cgroup2: finds its mount point.

use std::path::PathBuf;

use anyhow::Context as _;

/// Returns the mount point of cgroup2, from /proc/mounts. On hybrid hosts that is not /sys/fs/cgroup.
pub fn mount() -> anyhow::Result<PathBuf> {
    // Mount points are bytes; the kernel writes blanks in them as octal escapes (proc(5)).
    let mounts = std::fs::read("/proc/mounts").context("cannot look for cgroup2")?;
    let mount = mounts.split(|b| *b == b'\n').find_map(|line| {
        let mut fields = line.split(|b| *b == b' ');
        let (point, kind) = (fields.nth(1)?, fields.next()?);
        (kind == b"cgroup2").then(|| PathBuf::from(String::from_utf8_lossy(point).replace("\\040", " ")))
    });
    mount.context(
        "no cgroup2 is mounted; run `mount -t cgroup2 none /sys/fs/cgroup`, or give one with --cgroup",
    )
}

//! Pins: what outlives the daemon. One directory for each [`ABI_VERSION`], so that maps are never misread.

use std::{
    fs::{self, DirBuilder, File},
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use aya::maps::{MapData, MapError};
use lbridge_common::{
    symbols::{
        COUNTERS, DIALLED, DIALS, GUESTS, LISTENERS, LOOPBACK_VIEWS, PEER_NAMES, RELAY_CONNECTS, RELAY_PEERS,
        RELAYS, REPLIES, RULES, SOURCES, TARGETS,
    },
    wire::ABI_VERSION,
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{
    links,
    loader::{LISTENERS_LINK, STEER_LINK},
    object::Shape,
};

/// Maps that outlive the daemon. The event buffer and the counts of probes do not: they are of use to one daemon only.
pub(super) const PINNED_MAPS: [&str; 14] = [
    RULES,
    SOURCES,
    GUESTS,
    DIALS,
    DIALLED,
    TARGETS,
    LISTENERS,
    RELAYS,
    LOOPBACK_VIEWS,
    REPLIES,
    RELAY_CONNECTS,
    RELAY_PEERS,
    PEER_NAMES,
    COUNTERS,
];

/// What the pins of links begin with.
const LINK: &str = "link_";

/// The pin directory, locked for as long as this lives.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    current: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    /// Opens `root`, a directory on a bpffs; makes it where it is not there.
    pub(super) fn open(root: &Path) -> anyhow::Result<Self> {
        check(root)?;
        let current = root.join(format!("v{ABI_VERSION}"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&current)
            .with_context(|| format!("cannot make {}", current.display()))?;
        Ok(Self { root: root.to_owned(), current, _lock: lock(root)? })
    }

    /// Where a map is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.current.join(name)
    }

    /// Where the link of a hook is pinned.
    pub(super) fn link(&self, hook: &str) -> PathBuf {
        self.current.join(format!("{LINK}{hook}"))
    }

    /// Removes what is pinned if any of its maps is not of the shape that the object's is: aya would take it as it is.
    pub(super) fn discard_misshapen(&self, shapes: &[(String, Shape)]) -> anyhow::Result<()> {
        for (name, wanted) in shapes.iter().filter(|(name, _)| PINNED_MAPS.contains(&name.as_str())) {
            let path = self.map(name);
            if !path.exists() {
                continue;
            }
            let found = match MapData::from_pin(&path).and_then(|map| map.info()) {
                Ok(info) => Some(Shape {
                    kind: info.map_type().map_or(0, |kind| kind as u32),
                    key_size: info.key_size(),
                    value_size: info.value_size(),
                    max_entries: info.max_entries(),
                }),
                // A program or a link under the name; any other error says nothing of the pin.
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
                    None
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot look at {}", path.display()));
                }
            };
            if found.as_ref() != Some(wanted) {
                tracing::warn!(
                    "{} is not a map of this lbridge ({found:?}); everything is set up anew",
                    path.display()
                );
                return self.clear();
            }
        }
        Ok(())
    }

    /// Removes everything of this version: what it serves ends.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        for pin in fs::read_dir(&self.current)? {
            remove(&pin?.path())?;
        }
        Ok(())
    }

    /// Removes what other versions pinned, once this one's is in force: until then both steer.
    pub(super) fn remove_other_versions(&self) -> anyhow::Result<()> {
        for (version, path) in versions(&self.root)? {
            if version != ABI_VERSION {
                tracing::info!("removing {}, pinned by another version", path.display());
                remove_version(&path)?;
            }
        }
        Ok(())
    }
}

/// Whether what is always attached is pinned below `root`, without a change to anything.
pub fn in_place(root: &Path) -> std::io::Result<bool> {
    let current = root.join(format!("v{ABI_VERSION}"));
    for link in [STEER_LINK, LISTENERS_LINK] {
        match fs::symlink_metadata(current.join(format!("{LINK}{link}"))) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Removes everything that daemons pinned at `root`, and by that detaches it; whether there was anything. None may run.
pub fn remove_all(root: &Path) -> anyhow::Result<bool> {
    if !root.exists() {
        return Ok(false);
    }
    check(root)?;
    let _lock = lock(root)?;
    for (_, path) in versions(root)? {
        remove_version(&path)?;
    }
    match fs::remove_dir(root) {
        // What else is there is somebody else's.
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
        done => done.with_context(|| format!("cannot remove {}", root.display()))?,
    }
    Ok(true)
}

/// Whether a path, or the folder that it is to be made in, is on a bpffs.
pub fn on_bpffs(root: &Path) -> bool {
    let on_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    on_bpffs(root) || on_bpffs(root.parent().unwrap_or(root))
}

/// What to type where [`on_bpffs`] is not so. Never to mount over a folder that may be something else's.
pub fn mount_one(root: &Path) -> &'static str {
    if root.starts_with("/sys/fs/bpf") {
        "mount -t bpf bpf /sys/fs/bpf"
    } else {
        "mount -t bpf bpf /sys/fs/bpf    # if need be; then --bpffs /sys/fs/bpf/lbridge"
    }
}

/// Whether `root` may be ours.
fn check(root: &Path) -> anyhow::Result<()> {
    if !on_bpffs(root) {
        bail!("{} is not on a bpffs: {}", root.display(), mount_one(root));
    }
    // What else is on the file system is not ours to look at, let alone to remove.
    let is_mount_point = match (fs::metadata(root), fs::metadata(root.join(".."))) {
        (Ok(own), Ok(parent)) => own.dev() != parent.dev() || own.ino() == parent.ino(),
        _ => false,
    };
    if is_mount_point {
        bail!("{} is a mount point; give a directory below it, e.g. {0}/lbridge", root.display());
    }
    Ok(())
}

/// Held by the one daemon that uses the directory.
fn lock(root: &Path) -> anyhow::Result<Flock<File>> {
    Flock::lock(File::open(root)?, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        Errno::EWOULDBLOCK => {
            anyhow::anyhow!("another lbridge daemon uses {}; stop it first", root.display())
        }
        error => anyhow::anyhow!("cannot lock {}: {error}", root.display()),
    })
}

/// The directories of each version, this one's and others'.
fn versions(root: &Path) -> anyhow::Result<Vec<(u32, PathBuf)>> {
    let mut versions = vec![];
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        let version = name.to_str().and_then(|name| name.strip_prefix('v')?.parse().ok());
        versions.extend(version.map(|version| (version, entry.path())));
    }
    Ok(versions)
}

/// Removes the directory of a version, with all that is pinned in it.
fn remove_version(path: &Path) -> anyhow::Result<()> {
    let pins = fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    pins.filter_map(Result::ok).for_each(|pin| detach_link(&pin.path()));
    fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Detaches the link that is pinned there, if it is one.
fn detach_link(path: &Path) {
    if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(LINK.as_bytes())) {
        links::detach(path);
    }
}

/// Removes a pin; none is as good. A link is detached by that.
pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    if fs::symlink_metadata(path).is_ok() {
        detach_link(path);
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done.with_context(|| format!("cannot remove {}", path.display())),
    }
}

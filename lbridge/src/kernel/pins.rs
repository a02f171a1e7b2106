//! Pins: what outlives the daemon. One directory for each [`ABI_VERSION`], so that maps are never misread.
//!
//! Whoever can change these directories decides what is in force after the daemon has ended, and whether
//! `deny` has an effect. So each of them, and every folder on the way, must be root's (`host/trusted.rs`): a
//! bpffs that was mounted without options lets every user make folders in it.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use aya::maps::{LpmTrie, Map, MapData, MapError};
use lbridge_common::{
    symbols::{
        ACCEPTED, COUNTERS, ENTRIES, LISTENERS, LOOPBACK_NAMES, NAME_OVERRIDES, ORIGINAL_DST, PEER_NAMES,
        REDIRECT_NETNS, REDIRECTS, RELAY_CONNECTS, RELAY_PEERS, RELAYS, REPLY_SOURCES, SOURCES, TARGETS,
    },
    wire::{ABI_VERSION, AcceptedKey},
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{links::Link, object::Shape};
use crate::host::trusted::{self, Untrusted};

/// Maps that outlive the daemon. The event buffer and the maps of probes do not: they serve one daemon only.
pub(super) const PINNED_MAPS: [&str; 16] = [
    ENTRIES,
    SOURCES,
    ACCEPTED,
    REDIRECT_NETNS,
    REDIRECTS,
    ORIGINAL_DST,
    TARGETS,
    LISTENERS,
    RELAYS,
    NAME_OVERRIDES,
    LOOPBACK_NAMES,
    REPLY_SOURCES,
    RELAY_CONNECTS,
    RELAY_PEERS,
    PEER_NAMES,
    COUNTERS,
];

/// The earlier version whose maps have the layouts and the meaning of this one's. Its pins are adopted.
const ADOPTED: u32 = 3;

/// Pins of version [`ADOPTED`] that have another name today: the old name, and the new one.
const RENAMED: [(&str, &str); 8] = [
    ("RULES", ENTRIES),
    ("GUESTS", REDIRECT_NETNS),
    ("DIALS", REDIRECTS),
    ("DIALLED", ORIGINAL_DST),
    ("LOOPBACK_VIEWS", NAME_OVERRIDES),
    ("REPLIES", REPLY_SOURCES),
    ("link_dial4", "link_redirect4"),
    ("link_dial6", "link_redirect6"),
];

/// Names of the links of the two hooks that are always attached, whichever program serves them.
pub(super) const STEER_LINK: &str = "steer";
pub(super) const LISTENERS_LINK: &str = "listeners";

/// Prefix of the names of links' pins.
const LINK: &str = "link_";

/// The pin directory, locked for as long as this lives.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    current: PathBuf,
    lock: Flock<File>,
}

impl Pins {
    /// Opens `root`, a directory on a bpffs, and makes it if it is missing. Refuses one that another user
    /// could change.
    pub(super) fn open(root: &Path) -> anyhow::Result<Self> {
        check(root)?;
        trusted::make_folder(root).map_err(|error| refused(root, root, &error))?;
        let pins =
            Self { root: root.to_owned(), current: root.join(format!("v{ABI_VERSION}")), lock: lock(root)? };
        // Checks other versions, too: they are removed once this one's rules are in force, which is too late
        // to refuse.
        for (_, path) in versions(root)? {
            trusted::open_folder(&path).map_err(|error| refused(root, &path, &error))?;
        }
        trusted::make_folder(&pins.current).map_err(|error| refused(root, &pins.current, &error))?;
        pins.adopt()?;
        pins.make_current()?;
        Ok(pins)
    }

    /// Moves the pins of version [`ADOPTED`] to this version's directory, under their names of today. A move
    /// changes nothing that is in force, and what an interrupted start has left is moved by the next one.
    fn adopt(&self) -> anyhow::Result<()> {
        let old = self.root.join(format!("v{ADOPTED}"));
        let pins = match fs::read_dir(&old) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            pins => pins.with_context(|| format!("cannot read {}", old.display()))?,
        };
        for pin in pins.collect::<io::Result<Vec<_>>>()? {
            let name = pin.file_name();
            let renamed = RENAMED.iter().find(|(old, _)| name == *old).map(|(_, new)| OsString::from(new));
            let new = self.current.join(renamed.unwrap_or(name));
            if fs::symlink_metadata(&new).is_ok() {
                continue;
            }
            fs::rename(pin.path(), &new)
                .with_context(|| format!("cannot move {} to {}", pin.path().display(), new.display()))?;
        }
        tracing::info!(path = %old.display(), "adopted the pins of another version");
        Ok(())
    }

    /// Makes the directory of this version, and checks that no other user has put anything there.
    fn make_current(&self) -> anyhow::Result<()> {
        let refused = |path: &Path, error| refused(&self.root, path, &error);
        trusted::make_folder(&self.current).map_err(|error| refused(&self.current, error))?;
        for pin in self.entries()? {
            let uid = fs::symlink_metadata(&pin)
                .with_context(|| format!("cannot inspect {}", pin.display()))?
                .uid();
            if !trusted::is_trusted(uid) {
                return Err(refused(&pin, Untrusted::Owner { path: pin.clone(), uid }.into()));
            }
        }
        Ok(())
    }

    /// Lists everything in the directory of this version.
    fn entries(&self) -> anyhow::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.current)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>());
        entries.with_context(|| format!("cannot read {}", self.current.display()))
    }

    /// Makes the directories again if they were renamed, removed or replaced since they were opened.
    pub(super) fn keep(&mut self) -> anyhow::Result<()> {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let ours = self.lock.metadata().map(identity)?;
        if !fs::metadata(&self.root).is_ok_and(|metadata| identity(metadata) == ours) {
            let open = Self::open(&self.root);
            *self = open.with_context(|| format!("{} is gone", self.root.display()))?;
        }
        self.make_current()
    }

    /// Returns the path of a map's pin.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.current.join(name)
    }

    /// Returns the path of the pin of a hook's link.
    pub(super) fn link(&self, hook: &str) -> PathBuf {
        self.current.join(format!("{LINK}{hook}"))
    }

    /// Removes what is pinned if the shape of any of its maps is not the object's: aya would take the map as
    /// it is.
    pub(super) fn discard_incompatible(&self, shapes: &[(String, Shape)]) -> anyhow::Result<()> {
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
                    return Err(error).with_context(|| format!("cannot inspect {}", path.display()));
                }
            };
            if found.as_ref() != Some(wanted) {
                tracing::warn!(
                    path = %path.display(),
                    found = ?found,
                    "pinned map has another layout; setting everything up anew"
                );
                return self.clear();
            }
        }
        Ok(())
    }

    /// Removes everything that this version has pinned, and ends what it serves.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        self.entries()?.iter().try_for_each(|pin| remove(pin))
    }

    /// Removes what other versions pinned. Call this once this version's pins are in force: until then both
    /// steer.
    pub(super) fn remove_other_versions(&self) -> anyhow::Result<()> {
        for (version, path) in versions(&self.root)? {
            if version != ABI_VERSION {
                tracing::info!(path = %path.display(), "removing the pins of another version");
                remove_version(&self.root, &path)?;
            }
        }
        Ok(())
    }
}

/// Returns true if what is always attached is pinned below `root`, and attached. Changes nothing.
pub fn in_place(root: &Path) -> io::Result<bool> {
    // After an upgrade, the pins are the last version's until the daemon starts.
    for version in [ABI_VERSION, ADOPTED] {
        if is_attached(&root.join(format!("v{version}")))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns true if what is always attached is pinned in the directory of one version, and attached.
fn is_attached(folder: &Path) -> io::Result<bool> {
    match trusted::open_folder(folder) {
        Ok(_) => {}
        // A folder that others could change is not the daemon's, nor is anything in it.
        Err(error) if error.kind() == ErrorKind::NotFound || Untrusted::of(&error).is_some() => {
            return Ok(false);
        }
        Err(error) => return Err(error),
    }
    for link in [STEER_LINK, LISTENERS_LINK] {
        match Link::pinned(&folder.join(format!("{LINK}{link}"))).and_then(|link| link.info()) {
            Ok(info) if info.place.is_attached() => {}
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Returns why the daemon would not use `root` although it is on a bpffs, and what to type; `None` if it
/// would.
pub fn refusal(root: &Path) -> Option<(String, Option<String>)> {
    let error = [root, &root.join(format!("v{ABI_VERSION}"))]
        .into_iter()
        .filter_map(|path| trusted::open_folder(path).err())
        .find(|error| Untrusted::of(error).is_some())?;
    Some((error.to_string(), remedy(root, &error)))
}

/// Lists the ids of all links that are pinned below `root`, whichever version pinned them.
pub(super) fn link_ids(root: &Path) -> BTreeSet<u32> {
    let versions = versions(root).unwrap_or_default();
    let pins = versions.iter().filter_map(|(_, path)| fs::read_dir(path).ok()).flatten().flatten();
    let links = pins.map(|pin| pin.path()).filter(|path| is_link(path));
    links.filter_map(|path| Some(Link::pinned(&path).ok()?.info().ok()?.id)).collect()
}

/// Reads what accept rules let in, as the last daemon knew it, each key with the number of its leading bits
/// that count.
///
/// # Errors
///
/// If another user could change the folder; if the map cannot be read.
pub fn accepted(root: &Path) -> anyhow::Result<BTreeSet<(AcceptedKey, u32)>> {
    let mut accepted = BTreeSet::new();
    for version in [ADOPTED, ABI_VERSION] {
        let folder = root.join(format!("v{version}"));
        match trusted::open_folder(&folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            opened => opened.map_err(|error| refused(root, &folder, &error))?,
        };
        let path = folder.join(ACCEPTED);
        if !path.exists() {
            continue;
        }
        let read = || -> Result<BTreeSet<_>, MapError> {
            let map: LpmTrie<MapData, AcceptedKey, u8> =
                Map::LpmTrie(MapData::from_pin(&path)?).try_into()?;
            map.keys().map(|key| key.map(|key| (key.data(), key.prefix_len()))).collect()
        };
        accepted.extend(read().with_context(|| format!("failed to read map {}", path.display()))?);
    }
    Ok(accepted)
}

/// Removes everything that daemons pinned at `root`, which detaches it. Returns true if `root` was there. No
/// daemon may run.
pub fn remove_all(root: &Path) -> anyhow::Result<bool> {
    if !root.exists() {
        return Ok(false);
    }
    check(root)?;
    trusted::open_folder(root).map_err(|error| refused(root, root, &error))?;
    let _lock = lock(root)?;
    for (_, path) in versions(root)? {
        remove_version(root, &path)?;
    }
    match fs::remove_dir(root) {
        // Anything else there belongs to somebody else.
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
        done => done.with_context(|| format!("cannot remove {}", root.display()))?,
    }
    Ok(true)
}

/// Returns the error that `path`, a part of the pin directory `root`, is not used, with why and what to type.
fn refused(root: &Path, path: &Path, error: &io::Error) -> anyhow::Error {
    match (Untrusted::of(error), remedy(root, error)) {
        (Some(refusal), Some(remedy)) => anyhow::anyhow!("{refusal}; type: {remedy}"),
        (Some(refusal), None) => anyhow::anyhow!("{refusal}"),
        (None, _) => anyhow::anyhow!("cannot open {}: {error}", path.display()),
    }
}

fn remedy(root: &Path, error: &io::Error) -> Option<String> {
    Some(match Untrusted::of(error)? {
        // Nothing of it is to be kept: what another user has pinned may be made to look like ours.
        Untrusted::Owner { path, .. } | Untrusted::Link { path, .. } if path.starts_with(root) => {
            format!("rm -r {}", path.display())
        }
        Untrusted::Writable { path } => format!("chmod go-w {}", path.display()),
        Untrusted::Owner { path, .. } if root.starts_with("/sys/fs/bpf") => {
            format!("chown root:root {}", path.display())
        }
        Untrusted::Owner { .. } | Untrusted::Link { .. } | Untrusted::Process => {
            "lbridge run --bpffs /sys/fs/bpf/lbridge".to_owned()
        }
    })
}

/// Returns true if a path, or the folder that it is to be made in, is on a bpffs.
pub fn on_bpffs(root: &Path) -> bool {
    let on_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    on_bpffs(root) || on_bpffs(root.parent().unwrap_or(root))
}

/// Returns what to type if [`on_bpffs`] is false. Never says to mount over a folder that may be something
/// else's.
pub fn mount_one(root: &Path) -> &'static str {
    if root.starts_with("/sys/fs/bpf") {
        "mount -t bpf -o mode=700 bpf /sys/fs/bpf"
    } else {
        "mount -t bpf -o mode=700 bpf /sys/fs/bpf    # if need be; then --bpffs /sys/fs/bpf/lbridge"
    }
}

/// Checks that `root` may be ours: it must be on a bpffs, and must not be a mount point.
fn check(root: &Path) -> anyhow::Result<()> {
    if !on_bpffs(root) {
        bail!("{} is not on a bpffs: {}", root.display(), mount_one(root));
    }
    // The rest of the file system is not ours to look at, let alone to remove.
    let is_mount_point = match (fs::metadata(root), fs::metadata(root.join(".."))) {
        (Ok(own), Ok(parent)) => own.dev() != parent.dev() || own.ino() == parent.ino(),
        _ => false,
    };
    if is_mount_point {
        bail!("{} is a mount point; give a directory below it, e.g. {0}/lbridge", root.display());
    }
    Ok(())
}

/// Locks the directory for the one daemon that uses it.
fn lock(root: &Path) -> anyhow::Result<Flock<File>> {
    Flock::lock(File::open(root)?, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        Errno::EWOULDBLOCK => {
            anyhow::anyhow!("another lbridge daemon uses {}; stop it first", root.display())
        }
        error => anyhow::anyhow!("cannot lock {}: {error}", root.display()),
    })
}

/// Lists the directory of each version, this one's and others', with its version.
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

/// Removes the directory of a version, with all that is pinned in it. Refuses one that others could change.
fn remove_version(root: &Path, path: &Path) -> anyhow::Result<()> {
    trusted::open_folder(path).map_err(|error| refused(root, path, &error))?;
    let pins = fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    pins.filter_map(Result::ok).for_each(|pin| detach_link(&pin.path()));
    fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))
}

fn is_link(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(LINK.as_bytes()))
}

/// Detaches the link that is pinned at `path` at once, if it is a link. If that fails, the link ends when it
/// is closed.
fn detach_link(path: &Path) {
    if !is_link(path) {
        return;
    }
    if let Err(error) = Link::pinned(path).and_then(|link| link.detach()) {
        tracing::debug!(path = %path.display(), %error, "could not detach a link; it ends when it is closed");
    }
}

/// Ensures that `link` is the one pinned at `path`. Another link found there is unpinned, not detached: its
/// owner is not known here.
pub(super) fn keep_link(link: &Link, path: &Path) -> anyhow::Result<()> {
    if Link::pinned(path).and_then(|there| Ok(there.info()?.id == link.info()?.id)).unwrap_or(false) {
        return Ok(());
    }
    unlink(path)?;
    link.pin(path).with_context(|| format!("cannot pin {}", path.display()))
}

/// Removes a pin, if there is one. If it is a link's, the link is detached.
pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    if fs::symlink_metadata(path).is_ok() {
        detach_link(path);
    }
    unlink(path)
}

/// Removes only a pin, if there is one. A link stays attached for as long as somebody has it open or pinned.
pub(super) fn unlink(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done.with_context(|| format!("cannot remove {}", path.display())),
    }
}

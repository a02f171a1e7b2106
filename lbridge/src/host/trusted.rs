//! Trusted paths: opens files without following symbolic links that belong to other users. The folders of a
//! path may belong to the service's user, who could put a symbolic link there to something that only root may
//! use. The kernel guards against that only in sticky folders (fs.protected_symlinks, proc_sys_fs(5)).
//!
//! [`open_fixed`] is stricter: it accepts only paths that nobody but root and this process's user can change.
//! [`open_folder`] and [`make_folder`] also check who can add files to the folder.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{OsStr, OsString},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, FsWord, Mode, OFlags, Stat, fstat, fstatfs, mkdirat, openat, readlinkat},
    io::Errno,
    process::geteuid,
};

/// The most symbolic links in one path; the kernel follows as many (`MAXSYMLINKS`, include/linux/namei.h).
const MAX_LINKS: usize = 40;

/// The magic number of procfs: `PROC_SUPER_MAGIC` (include/uapi/linux/magic.h).
const PROC: FsWord = 0x9fa0;

/// The reason why a path is refused: another user can make it lead elsewhere. The `PermissionDenied` errors
/// of this module carry it; [`Untrusted::of`] returns it.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// A symbolic link on the path belongs to another user.
    #[error("{} is a symbolic link of user {uid}, who can point it anywhere", path.display())]
    Link {
        /// Path of the link.
        path: PathBuf,
        /// User id of the link's owner.
        uid: u32,
    },
    /// A file or folder on the path belongs to another user.
    #[error("{} belongs to user {uid}, who can change what is there", path.display())]
    Owner {
        /// Path of the file or folder.
        path: PathBuf,
        /// User id of its owner.
        uid: u32,
    },
    /// Users other than root can write to a file or folder.
    #[error("users other than root may write to {}", path.display())]
    Writable {
        /// Path of the file or folder.
        path: PathBuf,
    },
    /// The path leads through /proc.
    #[error("it belongs to a process, whose number can be reused")]
    Process,
}

impl Untrusted {
    /// Returns the refusal that an error of this module carries; `None` for other errors.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    /// Returns the command that removes the cause, or the advice to choose another path.
    fn remedy(&self) -> String {
        match self {
            Self::Link { path, .. } => format!("type: rm {}", path.display()),
            Self::Owner { path, .. } => format!("type: chown root:root {}", path.display()),
            Self::Writable { path } => format!("type: chmod go-w {}", path.display()),
            Self::Process => "choose another path".to_owned(),
        }
    }
}

/// Builds the one-line error that says why `what`, at `path`, is not used, and how to fix it.
pub fn refused(what: &str, path: &Path, error: &io::Error) -> anyhow::Error {
    let path = path.display();
    match Untrusted::of(error) {
        Some(refusal) => anyhow::anyhow!("{what} {path} is not used: {refusal}; {}", refusal.remedy()),
        None => anyhow::anyhow!("cannot open {what} {path}: {error}"),
    }
}

impl From<Untrusted> for io::Error {
    fn from(refusal: Untrusted) -> Self {
        Self::new(io::ErrorKind::PermissionDenied, refusal)
    }
}

/// Opens the file at an absolute path as a location only (`O_PATH`). Symbolic links on the path must belong
/// to root or to this process's user.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    walk(path, |_, _, _| Ok(()))
}

/// Opens a file like [`open`], and checks every folder on the path. Each must belong to root or to this
/// process's user, and be sticky if others may write to it. A user who owns a folder, or may write to one
/// that is not sticky, can rename its entries, and so replace a file by another without any link.
///
/// # Errors
///
/// `PermissionDenied`, with the link or folder in the message, if others can change the path. Also if the
/// path leads through /proc, where another process may later get the same number.
pub fn open_fixed(path: &Path) -> io::Result<OwnedFd> {
    walk(path, |folder, stat, shown| {
        if !is_own(stat) {
            return Err(Untrusted::Owner { path: shown.to_owned(), uid: stat.st_uid }.into());
        }
        if is_open_to_others(stat) && !Mode::from_raw_mode(stat.st_mode).contains(Mode::SVTX) {
            return Err(Untrusted::Writable { path: shown.to_owned() }.into());
        }
        if fstatfs(folder)?.f_type == PROC {
            return Err(Untrusted::Process.into());
        }
        Ok(())
    })
}

/// Opens a folder like [`open_fixed`], and checks that nobody else can add entries to it, sticky or not.
///
/// # Errors
///
/// Any error of [`open_fixed`]; `NotADirectory` if the path names something else.
pub fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let folder = open_fixed(&std::path::absolute(path)?)?;
    let stat = fstat(&folder)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(Errno::NOTDIR.into());
    }
    if is_open_to_others(&stat) {
        return Err(Untrusted::Writable { path: path.to_owned() }.into());
    }
    Ok(folder)
}

/// Opens a folder like [`open_folder`]. If only the last component of the path is missing, creates it with
/// mode 0700.
pub fn make_folder(path: &Path) -> io::Result<OwnedFd> {
    let path = std::path::absolute(path)?;
    if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
        match mkdirat(open_fixed(parent)?, name, Mode::RWXU) {
            // Another process may have created it; `open_folder` checks it below.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    open_folder(&path)
}

/// Checks the existing part of a folder's path like [`open_fixed`]. The process that creates the rest will
/// own it.
///
/// # Errors
///
/// Any error of [`open_fixed`].
pub fn check_way(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    // A dangling link counts as existing.
    let there = path.ancestors().find(|path| path.symlink_metadata().is_ok());
    there.map_or(Ok(()), |there| open_fixed(there).map(drop))
}

/// Checks a file that root will act on: like [`open_fixed`], and nobody else may own the file or write to it.
/// A missing file passes.
///
/// # Errors
///
/// Any error of [`open_fixed`].
pub fn check_file(path: &Path) -> io::Result<()> {
    let file = match open_fixed(&std::path::absolute(path)?) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let stat = fstat(&file)?;
    // Everybody may write to /dev/null.
    if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice {
        return Ok(());
    }
    if !is_own(&stat) {
        return Err(Untrusted::Owner { path: path.to_owned(), uid: stat.st_uid }.into());
    }
    if is_open_to_others(&stat) {
        return Err(Untrusted::Writable { path: path.to_owned() }.into());
    }
    Ok(())
}

/// Returns true if the mode lets users other than the owner and root's group write.
fn is_open_to_others(stat: &Stat) -> bool {
    let mode = Mode::from_raw_mode(stat.st_mode);
    mode.contains(Mode::WOTH) || mode.contains(Mode::WGRP) && stat.st_gid != 0
}

/// Resolves an absolute path one component at a time, and opens it. Calls `check` for every folder on the
/// path, with its descriptor, its metadata and its path.
fn walk(path: &Path, check: impl Fn(&OwnedFd, &Stat, &Path) -> io::Result<()>) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let root = || -> io::Result<(OwnedFd, PathBuf)> {
        let (root, shown) = (openat(CWD, "/", flags, Mode::empty())?, PathBuf::from("/"));
        check(&root, &fstat(&root)?, &shown)?;
        Ok((root, shown))
    };
    let mut parts = parts(path);
    let ((mut at, mut shown), mut links) = (root()?, 0);
    while let Some(part) = parts.pop_front() {
        if part == OsStr::new("/") {
            (at, shown) = root()?;
            continue;
        }
        let next = openat(&at, &part, flags, Mode::empty())?;
        let stat = fstat(&next)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                if !is_own(&stat) {
                    return Err(Untrusted::Link { path: shown.join(&part), uid: stat.st_uid }.into());
                }
                let target = OsString::from_vec(readlinkat(&next, "", vec![])?.into_bytes());
                for part in self::parts(Path::new(&target)).into_iter().rev() {
                    parts.push_front(part);
                }
                continue;
            }
            // Only for messages. `..` is kept, so that they show the path that was taken.
            FileType::Directory => {
                shown.push(&part);
                check(&next, &stat, &shown)?;
            }
            _ => {}
        }
        at = next;
    }
    Ok(at)
}

fn is_own(stat: &Stat) -> bool {
    is_trusted(stat.st_uid)
}

/// Returns true if `uid` is root or this process's effective user.
pub fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Lists the paths that lead through links which are not followed, each with the reason.
pub fn untrusted<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> BTreeMap<PathBuf, String> {
    let refusal =
        |path: &Path| open(path).err().filter(|error| error.kind() == io::ErrorKind::PermissionDenied);
    paths.into_iter().filter_map(|path| Some((path.clone(), refusal(path)?.to_string()))).collect()
}

/// Splits a path into its parts: `/` for the root, then names and `..`.
fn parts(path: &Path) -> VecDeque<OsString> {
    let name = |component: Component<'_>| component.as_os_str().to_owned();
    path.components().filter(|component| *component != Component::CurDir).map(name).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown, symlink},
    };

    use super::*;

    fn inode(path: &Path) -> io::Result<u64> {
        Ok(fstat(open(path)?)?.st_ino)
    }

    #[test]
    fn links_of_others_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("real")).unwrap();
        fs::write(at("real/file"), "").unwrap();
        symlink("real", at("folder")).unwrap();
        symlink(at("folder/../real/./file"), at("link")).unwrap();
        symlink("loop", at("loop")).unwrap();
        let file = fs::metadata(at("real/file")).unwrap().ino();
        for name in ["real/file", "folder/file", "link", "real/../link"] {
            assert_eq!(inode(&at(name)).unwrap(), file, "{name}");
        }
        assert_eq!(inode(&at("loop")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert_eq!(inode(&at("none")).unwrap_err().kind(), io::ErrorKind::NotFound);

        if geteuid().is_root() {
            lchown(at("folder"), Some(54_321), None).unwrap();
            for name in ["folder/file", "link"] {
                assert_eq!(inode(&at(name)).unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{name}");
            }
            assert_eq!(inode(&at("real/file")).unwrap(), file);
        }
    }
    /// The owner of a folder can put another file there under the same name, without any link.
    #[test]
    fn folders_of_others_fix_nothing() {
        let place = tempfile::tempdir_in("/run").or_else(|_| tempfile::tempdir()).unwrap();
        let at = |name: &str| place.path().join(name);
        fs::create_dir_all(at("folder/inner")).unwrap();
        fs::write(at("folder/inner/file"), "").unwrap();
        symlink("folder/inner", at("link")).unwrap();
        let refused = |name: &str| {
            let error = open_fixed(&at(name)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
            error.to_string()
        };
        let mode = |mode| fs::set_permissions(at("folder"), fs::Permissions::from_mode(mode)).unwrap();
        for name in ["folder/inner/file", "link/file", "folder/../link/file"] {
            open_fixed(&at(name)).unwrap();
        }
        mode(0o777);
        assert!(refused("link/file").contains("may write to"));
        mode(0o1777);
        open_fixed(&at("link/file")).unwrap();
        assert!(open_fixed(Path::new("/proc/self/status")).unwrap_err().to_string().contains("number"));
        if geteuid().is_root() {
            mode(0o755);
            lchown(at("folder"), Some(54_321), None).unwrap();
            let why = refused("link/file");
            assert!(why.contains("folder belongs to user 54321"), "{why}");
            assert_eq!(
                open(&at("link/file")).map(drop).ok(),
                Some(()),
                "a service may be in its user's folder"
            );
            lchown(at("folder"), Some(0), Some(54_321)).unwrap();
            open_fixed(&at("link/file")).unwrap();
            mode(0o775);
            assert!(refused("link/file").contains("may write to"));
            mode(0o755);
            lchown(at("link"), Some(54_321), None).unwrap();
            assert!(refused("link/file").contains("link is a symbolic link of user 54321"));
        }
    }
    /// A folder is accepted only if nobody else may add entries to it, whatever others can rename.
    #[test]
    fn folders_are_made_where_nobody_can_exchange_them() {
        let place = tempfile::tempdir_in("/run").or_else(|_| tempfile::tempdir()).unwrap();
        let at = |name: &str| place.path().join(name);
        let mode =
            |name: &str, mode| fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        make_folder(&at("way")).unwrap();
        assert_eq!(fs::metadata(at("way")).unwrap().permissions().mode() & 0o7777, 0o700);
        make_folder(&at("way")).unwrap();
        assert_eq!(make_folder(&at("none/made")).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(at("file"), "").unwrap();
        assert_eq!(make_folder(&at("file")).unwrap_err().kind(), io::ErrorKind::NotADirectory);

        mode("way", 0o1777);
        make_folder(&at("way/made")).unwrap();
        let way = at("way");
        let is_way = |error: io::Error| {
            let error = Untrusted::of(&error);
            matches!(error, Some(Untrusted::Writable { path }) if *path == way)
        };
        assert!(is_way(make_folder(&at("way")).unwrap_err()) && is_way(open_folder(&at("way")).unwrap_err()));
        mode("way", 0o777);
        assert!(is_way(make_folder(&at("way/more")).unwrap_err()) && !at("way/more").exists());

        if geteuid().is_root() {
            mode("way", 0o1777);
            lchown(at("way/made"), Some(54_321), None).unwrap();
            let error = make_folder(&at("way/made")).unwrap_err();
            let (error, folder) = (Untrusted::of(&error), at("way/made"));
            assert!(matches!(error, Some(Untrusted::Owner { path, uid: 54_321 }) if *path == folder));
        }
    }
}

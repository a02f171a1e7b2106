//! Files that are reached over nobody else's links. A path's folders may belong to the service's user, who may put a symbolic
//! link there to something that only root may use; the kernel guards against that in sticky folders alone
//! (fs.protected_symlinks, proc_sys_fs(5)).
//!
//! [`open_fixed`] is stricter: it takes only paths that nobody but root and this process's user can change. [`open_folder`] and
//! [`make_folder`] also see to what is in a folder.

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

/// As many links as the kernel follows (`MAXSYMLINKS`, include/linux/namei.h).
const MAX_LINKS: usize = 40;

/// `PROC_SUPER_MAGIC` (include/uapi/linux/magic.h).
const PROC: FsWord = 0x9fa0;

/// Why a path is refused: somebody else can make it lead elsewhere. Found in the `PermissionDenied` errors of this module by
/// [`Untrusted::of`].
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// A symbolic link of another user.
    #[error("{} is a link of user {uid}, which may lead anywhere", path.display())]
    Link {
        /// The link.
        path: PathBuf,
        /// Its owner's id.
        uid: u32,
    },
    /// A file or folder of another user.
    #[error("{} belongs to user {uid}, who can change what is there", path.display())]
    Owner {
        /// The file or folder.
        path: PathBuf,
        /// Its owner's id.
        uid: u32,
    },
    /// A file or folder that other users can write to.
    #[error("users other than root may write to {}", path.display())]
    Writable {
        /// The file or folder.
        path: PathBuf,
    },
    /// A path through /proc.
    #[error("it is a process's, whose number may be given again")]
    Process,
}

impl Untrusted {
    /// The refusal behind an error of this module, if it is one.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    /// What to do about it.
    fn remedy(&self) -> String {
        match self {
            Self::Link { path, .. } => format!("type: rm {}", path.display()),
            Self::Owner { path, .. } => format!("type: chown root:root {}", path.display()),
            Self::Writable { path } => format!("type: chmod go-w {}", path.display()),
            Self::Process => "choose another path".to_owned(),
        }
    }
}

/// Why `what`, at `path`, is not used, and what to do: in one line.
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

/// Opens the file at an absolute path, for its place in the file system alone (`O_PATH`). Links on the way must be root's
/// or this process's user's.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    walk(path, |_, _, _| Ok(()))
}

/// As [`open`]; every folder on the way must also belong to root or to this process's user, and be sticky if others may write
/// there. Whoever owns a folder, or may write to one that is not sticky, can rename what is in it and so exchange one file for
/// another without any link.
///
/// # Errors
///
/// `PermissionDenied`, naming the link or folder, if others can change the path; also if it goes through /proc, where another
/// process gets the same number later.
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

/// As [`open_fixed`], for a folder that nobody else can add anything to either, sticky or not.
///
/// # Errors
///
/// Those of [`open_fixed`]; `NotADirectory`.
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

/// As [`open_folder`]; where only the last component of the path is missing it is made, with mode 0700.
pub fn make_folder(path: &Path) -> io::Result<OwnedFd> {
    let path = std::path::absolute(path)?;
    if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
        match mkdirat(open_fixed(parent)?, name, Mode::RWXU) {
            // Whoever has made it: it is checked now.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    open_folder(&path)
}

/// As [`open_fixed`], for the part of a folder's path that is there: who makes the rest owns it.
///
/// # Errors
///
/// Those of [`open_fixed`].
pub fn check_way(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    // A link that leads nowhere is there.
    let there = path.ancestors().find(|path| path.symlink_metadata().is_ok());
    there.map_or(Ok(()), |there| open_fixed(there).map(drop))
}

/// Checks a file that root is to act by: as [`open_fixed`], and nobody else may own it or write to it. One that is not there is
/// as good.
///
/// # Errors
///
/// Those of [`open_fixed`].
pub fn check_file(path: &Path) -> io::Result<()> {
    let file = match open_fixed(&std::path::absolute(path)?) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let stat = fstat(&file)?;
    // /dev/null is everybody's.
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

/// Returns true if users other than root can write there.
fn is_open_to_others(stat: &Stat) -> bool {
    let mode = Mode::from_raw_mode(stat.st_mode);
    mode.contains(Mode::WOTH) || mode.contains(Mode::WGRP) && stat.st_gid != 0
}

/// Goes to an absolute path step by step. `check` is called for every folder on the way, with its metadata and its path.
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
            // For messages alone; `..` is kept, so that they show which way was taken.
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

/// Returns true if a user is root or this process's own.
pub fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Which of these paths lead over links that are not followed, and why.
pub fn untrusted<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> BTreeMap<PathBuf, String> {
    let refusal =
        |path: &Path| open(path).err().filter(|error| error.kind() == io::ErrorKind::PermissionDenied);
    paths.into_iter().filter_map(|path| Some((path.clone(), refusal(path)?.to_string()))).collect()
}

/// `/` for the root, then names and `..`.
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
    /// Whoever owns a folder can have another file by the same name there without any link.
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
            assert!(refused("link/file").contains("link is a link of user 54321"));
        }
    }
    /// Nobody else may add anything to it, whatever he can rename.
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
        let is_way = |error: io::Error| matches!(Untrusted::of(&error), Some(Untrusted::Writable { path }) if *path == at("way"));
        assert!(is_way(make_folder(&at("way")).unwrap_err()) && is_way(open_folder(&at("way")).unwrap_err()));
        mode("way", 0o777);
        assert!(is_way(make_folder(&at("way/more")).unwrap_err()) && !at("way/more").exists());

        if geteuid().is_root() {
            mode("way", 0o1777);
            lchown(at("way/made"), Some(54_321), None).unwrap();
            let error = make_folder(&at("way/made")).unwrap_err();
            assert!(
                matches!(Untrusted::of(&error), Some(Untrusted::Owner { path, uid: 54_321 }) if *path == at("way/made"))
            );
        }
    }
}

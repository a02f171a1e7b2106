//! Files that are reached over nobody else's links. A path's folders may belong to the service's user, who may put a symbolic
//! link there to something that only root may use; the kernel guards against that in sticky folders alone
//! (fs.protected_symlinks, proc_sys_fs(5)).
//!
//! [`open_fixed`] is stricter: it takes only paths that nobody but root and this process's user can change.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{OsStr, OsString},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, FsWord, Mode, OFlags, Stat, fstat, fstatfs, openat, readlinkat},
    process::geteuid,
};

/// As many links as the kernel follows (`MAXSYMLINKS`, include/linux/namei.h).
const MAX_LINKS: usize = 40;

/// `PROC_SUPER_MAGIC` (include/uapi/linux/magic.h).
const PROC: FsWord = 0x9fa0;

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
        let mode = Mode::from_raw_mode(stat.st_mode);
        let by_group = mode.contains(Mode::WGRP) && stat.st_gid != 0;
        let by_others = (by_group || mode.contains(Mode::WOTH)) && !mode.contains(Mode::SVTX);
        if !is_own(stat) {
            return Err(denied(format!(
                "{} belongs to user {}, who can change what is there",
                shown.display(),
                stat.st_uid
            )));
        }
        if by_others {
            return Err(denied(format!("users other than root may write to {}", shown.display())));
        }
        if fstatfs(folder)?.f_type == PROC {
            return Err(denied("it is a process's, whose number may be given again".to_owned()));
        }
        Ok(())
    })
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
                    return Err(rustix::io::Errno::LOOP.into());
                }
                if !is_own(&stat) {
                    let link = part.display();
                    return Err(denied(format!(
                        "{link} is a link of user {}, which may lead anywhere",
                        stat.st_uid
                    )));
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

/// Returns true if the file belongs to root or to this process's user.
fn is_own(stat: &Stat) -> bool {
    stat.st_uid == 0 || stat.st_uid == geteuid().as_raw()
}

fn denied(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
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
}

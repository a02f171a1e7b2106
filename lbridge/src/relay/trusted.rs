//! Files that are reached over nobody else's links. A path's folders may belong to the service's user, who may put a symbolic
//! link there to something that only root may use; the kernel guards against that in sticky folders alone
//! (fs.protected_symlinks, proc_sys_fs(5)).

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{OsStr, OsString},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat, readlinkat},
    process::geteuid,
};

/// As many links as the kernel follows (`MAXSYMLINKS`, include/linux/namei.h).
const MAX_LINKS: usize = 40;

/// Opens the file at an absolute path, for its place in the file system alone (`O_PATH`). Links on the way must be root's
/// or this process's user's.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let root = || openat(CWD, "/", flags, Mode::empty());
    let mut parts = parts(path);
    let (mut at, mut links) = (root()?, 0);
    while let Some(part) = parts.pop_front() {
        if part == OsStr::new("/") {
            at = root()?;
            continue;
        }
        let next = openat(&at, &part, flags, Mode::empty())?;
        let stat = fstat(&next)?;
        if !FileType::from_raw_mode(stat.st_mode).is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(rustix::io::Errno::LOOP.into());
        }
        if stat.st_uid != 0 && stat.st_uid != geteuid().as_raw() {
            let why =
                format!("{} is a link of user {}, which may lead anywhere", part.display(), stat.st_uid);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let target = OsString::from_vec(readlinkat(&next, "", vec![])?.into_bytes());
        for part in self::parts(Path::new(&target)).into_iter().rev() {
            parts.push_front(part);
        }
    }
    Ok(at)
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
        os::unix::fs::{MetadataExt as _, lchown, symlink},
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
}

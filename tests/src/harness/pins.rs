//! pins: reads and writes pinned maps through the kernel, not through the program that pinned them.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result};
use nix::errno::Errno;

/// Commands and map types (include/uapi/linux/bpf.h).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const HASH: u32 = 1;
const SOCKHASH: u32 = 18;

pub(super) fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    let (pointer, size) = (std::ptr::from_mut(attributes), size_of::<T>());
    // SAFETY: the length of the attributes is correct, and what they point to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, size) };
    Ok(i32::try_from(Errno::result(result)?).unwrap_or(i32::MAX))
}

/// The first fields of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
}

pub(super) fn open(path: &Path) -> Result<OwnedFd> {
    #[repr(C)]
    struct Get {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut get = Get { path: name.as_ptr() as u64, fd: 0, flags: 0 };
    let fd = bpf(BPF_OBJ_GET, &mut get).with_context(|| format!("open {}", path.display()))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn map_info(fd: &OwnedFd) -> io::Result<MapInfo> {
    get_info(fd)
}

/// Returns the kernel's information about an object, as many bytes as `T` has.
pub(super) fn get_info<T: Default>(fd: &OwnedFd) -> io::Result<T> {
    #[repr(C)]
    struct GetInfo {
        fd: u32,
        length: u32,
        info: u64,
    }
    let mut info = T::default();
    let pointer = std::ptr::from_mut(&mut info) as u64;
    let length = u32::try_from(size_of::<T>()).unwrap_or(0);
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut GetInfo { fd: fd.as_raw_fd().cast_unsigned(), length, info: pointer })?;
    Ok(info)
}

fn count(fd: &OwnedFd, key_size: usize) -> Result<usize> {
    #[repr(C)]
    struct NextKey {
        fd: u32,
        padding: u32,
        key: u64,
        next: u64,
    }
    let (mut key, mut next) = (vec![0_u8; key_size], vec![0_u8; key_size]);
    let mut seen = 0;
    loop {
        let from = if seen == 0 { 0 } else { key.as_ptr() as u64 };
        let to = next.as_mut_ptr() as u64;
        let fd = fd.as_raw_fd().cast_unsigned();
        match bpf(BPF_MAP_GET_NEXT_KEY, &mut NextKey { fd, padding: 0, key: from, next: to }) {
            Ok(_) => seen += 1,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(seen),
            Err(error) => return Err(error).context("next key"),
        }
        std::mem::swap(&mut key, &mut next);
    }
}

/// A pinned map, which a test reads and writes as an attacker would.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
}

/// `union bpf_attr` for commands on elements.
#[repr(C)]
struct Element {
    fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Map {
    /// Opens the map that is pinned at `path`.
    pub fn open(path: &Path) -> Result<Map> {
        let fd = open(path)?;
        let info = map_info(&fd)?;
        Ok(Map {
            fd,
            key_size: usize::try_from(info.key_size)?,
            value_size: usize::try_from(info.value_size)?,
        })
    }

    /// Returns the number of entries.
    ///
    /// # Errors
    ///
    /// If the kernel does not permit reading the map.
    pub fn len(&self) -> Result<usize> {
        count(&self.fd, self.key_size)
    }

    /// Returns true if the map has no entry.
    ///
    /// # Errors
    ///
    /// See [`Map::len`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Opens the pinned map of that name under a folder.
    ///
    /// # Errors
    ///
    /// If there is no such map, or it cannot be opened.
    pub fn named(folder: &Path, map: &str) -> Result<Map> {
        let path = files(folder)?.into_iter().find(|path| path.file_name().is_some_and(|name| name == map));
        Map::open(&path.with_context(|| format!("no pinned map {map}"))?)
    }

    /// Returns the value of a key.
    pub fn get(&self, key: &[u8]) -> Result<Vec<u8>> {
        let mut value = vec![0; self.value_size];
        self.element(BPF_MAP_LOOKUP_ELEM, key, value.as_mut_ptr() as u64).context("look up")?;
        Ok(value)
    }

    /// Puts a value under a key.
    pub fn put(&self, key: &[u8], value: &[u8]) -> Result<()> {
        anyhow::ensure!(value.len() == self.value_size, "a value has {} bytes", self.value_size);
        self.element(BPF_MAP_UPDATE_ELEM, key, value.as_ptr() as u64).context("update")
    }

    /// Removes a key, if it exists.
    pub fn remove(&self, key: &[u8]) -> Result<()> {
        match self.element(BPF_MAP_DELETE_ELEM, key, 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            done => done.context("delete"),
        }
    }

    fn element(&self, command: libc::c_long, key: &[u8], value: u64) -> io::Result<()> {
        assert_eq!(key.len(), self.key_size, "a key's size");
        let fd = self.fd.as_raw_fd().cast_unsigned();
        let mut element = Element { fd, padding: 0, key: key.as_ptr() as u64, value, flags: 0 };
        bpf(command, &mut element).map(drop)
    }
}

/// Attaches a program that does nothing to a cgroup's `sock_ops` hook, without a link and exclusively. It
/// stays until the cgroup is removed.
pub fn take_sock_ops(cgroup: &Path) -> Result<()> {
    /// The instructions `r0 = 1; exit`.
    const INSTRUCTIONS: [u64; 2] = [0x0000_0001_0000_00b7, 0x0000_0000_0000_0095];
    attach_sock_ops(cgroup, &INSTRUCTIONS, 0)
}

/// Attaches a program to a cgroup's `sock_ops` hook, next to others, that requests an initial SYN time-out of
/// `jiffies`, as data centres do. It stays until the cgroup is removed.
pub fn ask_for_timeout(cgroup: &Path, jiffies: u8) -> Result<()> {
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let reply = 0x0000_0000_0000_03b7 | u64::from(jiffies) << 32;
    // `struct bpf_sock_ops` begins with `op` and `reply`; BPF_SOCK_OPS_TIMEOUT_INIT is 1.
    let instructions = [
        0x0000_0000_0000_1261, // r2 = *(u32 *)(r1 + 0)
        0x0000_0001_0002_0255, // if r2 != 1 goto +2
        reply,                 // r3 = jiffies
        0x0000_0000_0004_3163, // *(u32 *)(r1 + 4) = r3
        0x0000_0001_0000_00b7, // r0 = 1
        0x0000_0000_0000_0095, // exit
    ];
    attach_sock_ops(cgroup, &instructions, BPF_F_ALLOW_MULTI)
}

fn attach_sock_ops(cgroup: &Path, instructions: &[u64], flags: u32) -> Result<()> {
    // From include/uapi/linux/bpf.h.
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_PROG_TYPE_SOCK_OPS: u32 = 13;
    const BPF_CGROUP_SOCK_OPS: u32 = 3;
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
    }
    #[repr(C)]
    struct Attach {
        cgroup: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    let mut load = Load {
        kind: BPF_PROG_TYPE_SOCK_OPS,
        count: u32::try_from(instructions.len())?,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
    };
    // Before 5.11 programs count against this limit; later kernels do not mind if it cannot be raised.
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limits outlive the call, which reads them.
    let _ = Errno::result(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) });
    let program = bpf(BPF_PROG_LOAD, &mut load).context("load a program")?;
    // SAFETY: the kernel has just made this descriptor for us.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let cgroup = fs::File::open(cgroup)?;
    let descriptor = |fd: &dyn AsRawFd| fd.as_raw_fd().cast_unsigned();
    let (cgroup, program) = (descriptor(&cgroup), descriptor(&program));
    let mut attach = Attach { cgroup, program, kind: BPF_CGROUP_SOCK_OPS, flags };
    bpf(BPF_PROG_ATTACH, &mut attach).context("attach a program").map(drop)
}

/// Puts an entry into the pinned map of that name under a folder, bypassing the program that pinned it.
pub fn put(folder: &Path, map: &str, key: &[u8], value: &[u8]) -> Result<()> {
    Map::named(folder, map)?.put(key, value)
}

/// Lists all files under a folder.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries.with_context(|| format!("list {}", folder.display()))?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Returns the number of entries of each pinned hash map and socket map under a folder, by file name.
pub fn entries(folder: &Path) -> Result<BTreeMap<String, usize>> {
    let mut found = BTreeMap::new();
    for path in files(folder)? {
        let fd = open(&path)?;
        // Links and programs return other structures; their descriptors tell them apart.
        let what = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if what.as_os_str() != "anon_inode:bpf-map" {
            continue;
        }
        let info = map_info(&fd)?;
        if info.kind == HASH || info.kind == SOCKHASH {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.insert(name, count(&fd, usize::try_from(info.key_size)?)?);
        }
    }
    Ok(found)
}

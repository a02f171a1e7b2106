//! pins: reads and writes pinned maps through the kernel, not through the program that pinned them.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result};

use super::bpf;

/// Commands and map types (include/uapi/linux/bpf.h).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const HASH: u32 = 1;
const SOCKHASH: u32 = 18;

/// The first fields of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
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
        let fd = bpf::number(fd);
        match bpf::bpf(BPF_MAP_GET_NEXT_KEY, &mut NextKey { fd, padding: 0, key: from, next: to }) {
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
        let fd = bpf::open(path)?;
        let info = bpf::info::<MapInfo>(&fd)?;
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
        let fd = bpf::number(&self.fd);
        let mut element = Element { fd, padding: 0, key: key.as_ptr() as u64, value, flags: 0 };
        bpf::bpf(command, &mut element).map(drop)
    }
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

/// Returns the kernel's id of each pinned map and link under a folder, by file name.
pub fn ids(folder: &Path) -> Result<BTreeMap<String, u32>> {
    let mut found = BTreeMap::new();
    for path in files(folder)? {
        let fd = bpf::open(&path)?;
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let id = info.lines().find_map(|line| {
            line.strip_prefix("map_id:").or_else(|| line.strip_prefix("link_id:")).map(str::trim)
        });
        let id = id.with_context(|| format!("{}: neither a map nor a link: {info}", path.display()))?;
        found.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), id.parse()?);
    }
    Ok(found)
}

/// Returns the number of entries of each pinned hash map and socket map under a folder, by file name.
pub fn entries(folder: &Path) -> Result<BTreeMap<String, usize>> {
    let mut found = BTreeMap::new();
    for path in files(folder)? {
        let fd = bpf::open(&path)?;
        // Links and programs return other structures; their descriptors tell them apart.
        let what = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if what.as_os_str() != "anon_inode:bpf-map" {
            continue;
        }
        let info = bpf::info::<MapInfo>(&fd)?;
        if info.kind == HASH || info.kind == SOCKHASH {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.insert(name, count(&fd, usize::try_from(info.key_size)?)?);
        }
    }
    Ok(found)
}

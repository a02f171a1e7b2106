//! links: links of kernel programs, inspected and changed behind the back of the program that made them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::bpf::{self, EXIT, ONE};
use super::netns::NetNs;

/// Commands (include/uapi/linux/bpf.h).
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_LINK_GET_NEXT_ID: libc::c_long = 31;
const BPF_LINK_DETACH: libc::c_long = 34;
/// Types of links (include/uapi/linux/bpf.h).
const CGROUP: u32 = 3;
const NETNS: u32 = 5;

/// An open link.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
}

/// `struct bpf_link_info`, as far as links of cgroups and network namespaces fill it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkInfo {
    kind: u32,
    /// The link's id.
    pub id: u32,
    /// The id of the attached program.
    pub program: u32,
    padding: u32,
    /// A cgroup's id; or a network namespace's inode and its hook.
    place: [u32; 2],
    /// A cgroup's hook.
    more: [u32; 2],
}

impl LinkInfo {
    /// Returns true if the link has not been detached and the object that it was attached to still exists.
    pub fn is_attached(&self) -> bool {
        self.place() != 0
    }

    /// Returns the cgroup's id or the network namespace's inode; 0 if it is attached to nothing.
    fn place(&self) -> u64 {
        let [low, high] = self.place.map(u64::from);
        if self.kind == NETNS { low } else { high << 32 | low }
    }

    fn hook(&self) -> u32 {
        if self.kind == NETNS { self.place[1] } else { self.more[0] }
    }
}

/// `union bpf_attr` with a descriptor or an id, and one more word.
#[repr(C)]
struct Words {
    first: u32,
    second: u32,
    third: u32,
    fourth: u32,
}

impl Words {
    fn new([first, second, third]: [u32; 3]) -> Words {
        Words { first, second, third, fourth: 0 }
    }
}

/// Opens a program or a link by its id.
fn by_id(command: libc::c_long, id: u32) -> io::Result<OwnedFd> {
    bpf::descriptor(command, &mut Words::new([id, 0, 0]))
}

impl Link {
    /// Opens the link that is pinned at `path`.
    pub fn pinned(path: &Path) -> Result<Link> {
        Ok(Link { fd: bpf::open(path)? })
    }

    /// Returns the kernel's information about the link: its program and what it is attached to.
    pub fn info(&self) -> Result<LinkInfo> {
        bpf::info(&self.fd).context("ask a link")
    }

    /// Detaches the link, as `bpftool link detach` does.
    pub fn detach(&self) -> Result<()> {
        bpf::bpf(BPF_LINK_DETACH, &mut Words::new([bpf::number(&self.fd), 0, 0])).context("detach a link")?;
        ensure!(!self.info()?.is_attached(), "it is detached");
        Ok(())
    }

    /// Replaces the link's program.
    pub fn replace(&self, program: &Program) -> Result<()> {
        let mut update = Words::new([bpf::number(&self.fd), bpf::number(&program.fd), 0]);
        bpf::bpf(BPF_LINK_UPDATE, &mut update).context("update a link").map(drop)
    }

    /// Attaches the link's program once more, to the same hook of that network namespace or cgroup.
    pub fn attach_again(&self, netns: &NetNs, cgroup: &File) -> Result<Link> {
        let info = self.info()?;
        let fd = by_id(BPF_PROG_GET_FD_BY_ID, info.program).context("open a program")?;
        let program = Program { fd, hook: info.hook() };
        if info.kind == NETNS { program.attach(netns) } else { program.attach(cgroup) }
    }
}

/// A program that does nothing.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    hook: u32,
}

/// Hooks that a program that does nothing can be attached to.
#[derive(Clone, Copy, Debug)]
pub enum Hook {
    /// The `sk_lookup` hook of a network namespace.
    SkLookup,
    /// The `sock_ops` hook of a cgroup.
    SockOps,
}

impl Program {
    /// Loads a program with that name.
    pub fn load(name: &str, hook: Hook) -> Result<Program> {
        let kind = match hook {
            Hook::SkLookup => bpf::SK_LOOKUP,
            Hook::SockOps => bpf::SOCK_OPS,
        };
        Ok(Program { fd: bpf::load(kind, name, &[ONE, EXIT])?, hook: kind.hook })
    }

    /// Attaches the program to that network namespace or cgroup.
    pub fn attach(&self, to: &impl AsFd) -> Result<Link> {
        Ok(Link { fd: bpf::attach(&self.fd, to, self.hook)? })
    }
}

/// `struct bpf_prog_info` up to the name.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    before: [u64; 8],
    name: [u8; 16],
}

/// Lists the ids of links that attach a program with one of these names to a network namespace or a cgroup.
pub fn attached(names: &[&str], netns: &NetNs, cgroup: &Path) -> Result<BTreeSet<u32>> {
    let netns = File::from(netns.as_fd().try_clone_to_owned()?).metadata()?.ino();
    let cgroup = cgroup.metadata()?.ino();
    let (mut found, mut id) = (BTreeSet::new(), 0);
    loop {
        let mut next = Words::new([id, 0, 0]);
        match bpf::bpf(BPF_LINK_GET_NEXT_ID, &mut next) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            other => other.context("next link")?,
        };
        id = next.second;
        // Links of other tests may disappear at any moment.
        let Ok(fd) = by_id(BPF_LINK_GET_FD_BY_ID, id) else { continue };
        let info = Link { fd }.info()?;
        let here = match info.kind {
            NETNS => info.place() == netns,
            CGROUP => info.place() == cgroup,
            _ => false,
        };
        let Ok(program) = by_id(BPF_PROG_GET_FD_BY_ID, info.program) else { continue };
        let program: ProgramInfo = bpf::info(&program)?;
        let name = program.name.split(|byte| *byte == 0).next().unwrap_or_default();
        if here && names.iter().any(|wanted| wanted.as_bytes() == name) {
            found.insert(id);
        }
    }
}

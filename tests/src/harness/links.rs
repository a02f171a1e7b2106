//! links: links of kernel programs, inspected and changed behind the back of the program that made them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::netns::NetNs;
use super::pins::{bpf, get_info, open};

/// Commands (include/uapi/linux/bpf.h).
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_LINK_CREATE: libc::c_long = 28;
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

fn words(command: libc::c_long, [first, second, third]: [u32; 3]) -> io::Result<i32> {
    bpf(command, &mut Words { first, second, third, fourth: 0 })
}

fn descriptor(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Link {
    /// Opens the link that is pinned at `path`.
    pub fn pinned(path: &Path) -> Result<Link> {
        Ok(Link { fd: open(path)? })
    }

    /// Returns the kernel's information about the link: its program and what it is attached to.
    pub fn info(&self) -> Result<LinkInfo> {
        get_info(&self.fd).context("ask a link")
    }

    /// Detaches the link, as `bpftool link detach` does.
    pub fn detach(&self) -> Result<()> {
        words(BPF_LINK_DETACH, [self.raw(), 0, 0]).context("detach a link")?;
        ensure!(!self.info()?.is_attached(), "it is detached");
        Ok(())
    }

    /// Replaces the link's program.
    pub fn replace(&self, program: &Program) -> Result<()> {
        let program = program.fd.as_raw_fd().cast_unsigned();
        words(BPF_LINK_UPDATE, [self.raw(), program, 0]).context("update a link").map(drop)
    }

    /// Attaches the link's program once more, to the same hook of that network namespace or cgroup.
    pub fn attach_again(&self, netns: &NetNs, cgroup: &File) -> Result<Link> {
        let info = self.info()?;
        let fd = descriptor(words(BPF_PROG_GET_FD_BY_ID, [info.program, 0, 0]).context("open a program")?);
        let program = Program { fd, hook: info.hook() };
        if info.kind == NETNS { program.attach(netns) } else { program.attach(cgroup) }
    }

    fn raw(&self) -> u32 {
        self.fd.as_raw_fd().cast_unsigned()
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
        /// The instructions `r0 = 1; exit`.
        const INSTRUCTIONS: [u64; 2] = [0x0000_0001_0000_00b7, 0x0000_0000_0000_0095];
        /// The first fields of `union bpf_attr` for BPF_PROG_LOAD.
        #[repr(C)]
        struct Load {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log: [u64; 2],
            version: u32,
            flags: u32,
            name: [u8; 16],
            interface: u32,
            hook: u32,
        }
        let (kind, hook) = match hook {
            Hook::SkLookup => (30, 36),
            Hook::SockOps => (13, 3),
        };
        // Before 5.11 programs count against this limit; on later kernels it does not matter if this fails.
        let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: setrlimit is a plain system call.
        unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
        let mut bytes = [0; 16];
        bytes.iter_mut().take(15).zip(name.bytes()).for_each(|(to, from)| *to = from);
        let mut load = Load {
            kind,
            count: u32::try_from(INSTRUCTIONS.len())?,
            instructions: INSTRUCTIONS.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log: [0; 2],
            version: 0,
            flags: 0,
            name: bytes,
            interface: 0,
            hook,
        };
        Ok(Program { fd: descriptor(bpf(BPF_PROG_LOAD, &mut load).context("load a program")?), hook })
    }

    /// Attaches the program to that network namespace or cgroup.
    pub fn attach(&self, to: &impl AsFd) -> Result<Link> {
        let (program, to) = (self.fd.as_raw_fd().cast_unsigned(), to.as_fd().as_raw_fd().cast_unsigned());
        let fd = words(BPF_LINK_CREATE, [program, to, self.hook]).context("attach a program")?;
        Ok(Link { fd: descriptor(fd) })
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
        let mut next = Words { first: id, second: 0, third: 0, fourth: 0 };
        match bpf(BPF_LINK_GET_NEXT_ID, &mut next) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            other => other.context("next link")?,
        };
        id = next.second;
        // Links of other tests may disappear at any moment.
        let Ok(link) = words(BPF_LINK_GET_FD_BY_ID, [id, 0, 0]) else { continue };
        let info = Link { fd: descriptor(link) }.info()?;
        let here = match info.kind {
            NETNS => info.place() == netns,
            CGROUP => info.place() == cgroup,
            _ => false,
        };
        let Ok(program) = words(BPF_PROG_GET_FD_BY_ID, [info.program, 0, 0]) else { continue };
        let program: ProgramInfo = get_info(&descriptor(program))?;
        let name = program.name.split(|byte| *byte == 0).next().unwrap_or_default();
        if here && names.iter().any(|wanted| wanted.as_bytes() == name) {
            found.insert(id);
        }
    }
}

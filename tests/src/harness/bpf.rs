//! bpf: the calls of bpf(2) that the harness makes itself, bypassing the program under test. Commands, types
//! and structures are those of include/uapi/linux/bpf.h.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;

/// The instruction `r0 = 1`.
pub(super) const ONE: u64 = 0x0000_0001_0000_00b7;
/// The instruction `exit`.
pub(super) const EXIT: u64 = 0x0000_0000_0000_0095;

/// A program's type, and the hook that it is attached to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// The program type.
    pub(super) program: u32,
    /// The attach type.
    pub(super) hook: u32,
}

/// The `sock_ops` hook of a cgroup.
pub(super) const SOCK_OPS: Kind = Kind { program: 13, hook: 3 };
/// The `sk_lookup` hook of a network namespace.
pub(super) const SK_LOOKUP: Kind = Kind { program: 30, hook: 36 };

/// Makes the system call; returns its result.
pub(super) fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    let (pointer, size) = (std::ptr::from_mut(attributes), size_of::<T>());
    // SAFETY: the length of the attributes is correct, and what they point to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, size) };
    Ok(i32::try_from(Errno::result(result)?).unwrap_or(i32::MAX))
}

/// Makes a system call that opens an object; returns its descriptor.
pub(super) fn descriptor<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns the descriptor's number, as the kernel's structures have it.
pub(super) fn number(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

/// Opens a pinned object.
pub(super) fn open(path: &Path) -> Result<OwnedFd> {
    #[repr(C)]
    struct Get {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut get = Get { path: name.as_ptr() as u64, fd: 0, flags: 0 };
    descriptor(BPF_OBJ_GET, &mut get).with_context(|| format!("open {}", path.display()))
}

/// Returns the kernel's information about an object, as many bytes as `T` has.
pub(super) fn info<T: Default>(fd: &OwnedFd) -> io::Result<T> {
    #[repr(C)]
    struct GetInfo {
        fd: u32,
        length: u32,
        info: u64,
    }
    let mut info = T::default();
    let pointer = std::ptr::from_mut(&mut info) as u64;
    let length = u32::try_from(size_of::<T>()).unwrap_or(0);
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut GetInfo { fd: number(fd), length, info: pointer })?;
    Ok(info)
}

/// Loads a program with that name, of which the kernel keeps 15 bytes.
pub(super) fn load(kind: Kind, name: &str, instructions: &[u64]) -> Result<OwnedFd> {
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
    // Before 5.11 programs count against this limit; on later kernels it does not matter if this fails.
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limits outlive the call, which reads them.
    let _ = Errno::result(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) });
    let mut bytes = [0; 16];
    bytes.iter_mut().take(15).zip(name.bytes()).for_each(|(to, from)| *to = from);
    let mut load = Load {
        kind: kind.program,
        count: u32::try_from(instructions.len())?,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [0; 2],
        version: 0,
        flags: 0,
        name: bytes,
        interface: 0,
        hook: kind.hook,
    };
    descriptor(BPF_PROG_LOAD, &mut load).context("load a program")
}

/// Attaches a program to a hook of a network namespace or a cgroup until the returned link is closed.
pub(super) fn attach(program: &OwnedFd, to: &impl AsFd, hook: u32) -> Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        program: u32,
        target: u32,
        hook: u32,
        flags: u32,
    }
    let mut create = Create { program: number(program), target: number(to), hook, flags: 0 };
    descriptor(BPF_LINK_CREATE, &mut create).context("attach a program")
}

//! programs: small eBPF programs, as other software might attach them, at the hooks that lbridge uses. They
//! are written in the kernel's instructions, so that no toolchain is needed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;

// From include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;
const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;
const BPF_CGROUP_INET4_GETPEERNAME: u32 = 29;
const BPF_SK_LOOKUP: u32 = 36;

/// The instruction `r0 = 1`.
const ONE: u64 = 0x0000_0001_0000_00b7;
/// The instruction `exit`.
const EXIT: u64 = 0x0000_0000_0000_0095;

/// A program attached to its hook until this is dropped.
#[derive(Debug)]
pub struct Attached {
    _link: OwnedFd,
    _program: OwnedFd,
}

/// Hooks whose programs change the port of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressHook {
    /// Changes the address given to connect(2).
    Connect,
    /// Changes the address given to sendto(2).
    Sendmsg,
    /// Changes the address that getpeername(2) returns.
    Getpeername,
}

/// Attaches a program that changes port `from` to port `to`.
pub fn change_port(cgroup: &Path, hook: AddressHook, from: u16, to: u16) -> Result<Attached> {
    let attach = match hook {
        AddressHook::Connect => BPF_CGROUP_INET4_CONNECT,
        AddressHook::Sendmsg => BPF_CGROUP_UDP4_SENDMSG,
        AddressHook::Getpeername => BPF_CGROUP_INET4_GETPEERNAME,
    };
    let immediate = |port: u16| u64::from(port.to_be()) << 32;
    // `user_port` of `struct bpf_sock_addr`, in network byte order, is at 24.
    let instructions = [
        0x0000_0000_0018_1261,                   // r2 = *(u32 *)(r1 + 24)
        0x0000_0000_0002_0255 | immediate(from), // if r2 != from goto +2
        0x0000_0000_0000_02b7 | immediate(to),   // r2 = to
        0x0000_0000_0018_2163,                   // *(u32 *)(r1 + 24) = r2
        ONE,
        EXIT,
    ];
    attach_program(BPF_PROG_TYPE_CGROUP_SOCK_ADDR, attach, &instructions, &File::open(cgroup)?)
}

/// Attaches a program to a network namespace that refuses connections to a port, whatever listens there.
pub fn refuse_port(netns: &impl AsFd, port: u16) -> Result<Attached> {
    // `local_port` of `struct bpf_sk_lookup`, in host byte order, is at 60; SK_DROP is 0.
    let instructions = [
        0x0000_0000_003c_1261, // r2 = *(u32 *)(r1 + 60)
        ONE,
        0x0000_0000_0001_0255 | u64::from(port) << 32, // if r2 != port goto +1
        0x0000_0000_0000_00b7,                         // r0 = 0
        EXIT,
    ];
    attach_program(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, &instructions, netns)
}

fn attach_program(kind: u32, attach: u32, instructions: &[u64], to: &impl AsFd) -> Result<Attached> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        unused: [u32; 11],
        attach: u32,
    }
    #[repr(C)]
    struct Create {
        program: u32,
        target: u32,
        attach: u32,
        flags: u32,
    }
    let mut load = Load {
        kind,
        count: u32::try_from(instructions.len())?,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        unused: [0; 11],
        attach,
    };
    let program = descriptor(BPF_PROG_LOAD, &mut load).context("load a program")?;
    let (program_fd, target) = (program.as_raw_fd().cast_unsigned(), to.as_fd().as_raw_fd().cast_unsigned());
    let mut create = Create { program: program_fd, target, attach, flags: 0 };
    let link = descriptor(BPF_LINK_CREATE, &mut create).context("attach a program")?;
    Ok(Attached { _link: link, _program: program })
}

fn descriptor<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    let (pointer, size) = (std::ptr::from_mut(attributes), size_of::<T>());
    // SAFETY: the length of the attributes is correct, and what they point to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, size) };
    let fd = i32::try_from(Errno::result(result)?).unwrap_or(i32::MAX);
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

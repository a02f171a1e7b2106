//! programs: small eBPF programs, as other software might attach them, at the hooks that lbridge uses. They
//! are written in the kernel's instructions, so that no toolchain is needed.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};

use super::bpf::{self, EXIT, Kind, ONE, SK_LOOKUP, SOCK_OPS};

// From include/uapi/linux/bpf.h.
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;
const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;
const BPF_CGROUP_INET4_GETPEERNAME: u32 = 29;

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
    let hook = match hook {
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
    let kind = Kind { program: BPF_PROG_TYPE_CGROUP_SOCK_ADDR, hook };
    attach(kind, &instructions, &File::open(cgroup)?)
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
    attach(SK_LOOKUP, &instructions, netns)
}

fn attach(kind: Kind, instructions: &[u64], to: &impl AsFd) -> Result<Attached> {
    let program = bpf::load(kind, "", instructions)?;
    Ok(Attached { _link: bpf::attach(&program, to, kind.hook)?, _program: program })
}

/// Attaches a program that does nothing to a cgroup's `sock_ops` hook, without a link and exclusively. It
/// stays until the cgroup is removed.
pub fn take_sock_ops(cgroup: &Path) -> Result<()> {
    attach_sock_ops(cgroup, &[ONE, EXIT], 0)
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
        ONE,
        EXIT,
    ];
    attach_sock_ops(cgroup, &instructions, BPF_F_ALLOW_MULTI)
}

/// Attaches a program as before there were links.
fn attach_sock_ops(cgroup: &Path, instructions: &[u64], flags: u32) -> Result<()> {
    #[repr(C)]
    struct Attach {
        cgroup: u32,
        program: u32,
        hook: u32,
        flags: u32,
    }
    let (program, cgroup) = (bpf::load(SOCK_OPS, "", instructions)?, File::open(cgroup)?);
    let (program, cgroup) = (bpf::number(&program), bpf::number(&cgroup));
    let mut attach = Attach { cgroup, program, hook: SOCK_OPS.hook, flags };
    bpf::bpf(BPF_PROG_ATTACH, &mut attach).context("attach a program").map(drop)
}

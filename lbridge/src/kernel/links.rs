//! Links: attaching a program to its hook, and replacing it under a link that stays, so that no connection meets an
//! empty hook. The latter is not in aya; two raw bpf(2) commands are.

use std::{
    ffi::CString,
    fs::File,
    io, mem,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::Path,
};

use anyhow::{Context as _, bail};
use aya::programs::{CgroupAttachMode, Program, links::FdLink};
use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info};

use super::pins;

/// What programs are attached to.
#[derive(Debug)]
pub(super) struct Hooks {
    /// The host's network namespace.
    pub(super) netns: File,
    /// The cgroup whose sockets are watched: the root, for all of the host's.
    pub(super) cgroup: File,
}

impl Hooks {
    /// Attaches `program` and pins the link at `pin`; where one of the same hook is pinned there already, replaces the
    /// program under it.
    pub(super) fn attach(&self, program: &mut Program, pin: &Path) -> anyhow::Result<()> {
        if pin.exists() {
            match self.replace(program, pin) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!("{} cannot be adopted, attaching anew: {error:#}", pin.display());
                    pins::remove(pin)?;
                }
            }
        }
        let link: FdLink = match program {
            Program::SkLookup(program) => {
                let id = program.attach(&self.netns)?;
                program.take_link(id)?.into()
            }
            // AllowMultiple is a flag of the older attach command, which bpf_link_create refuses; links of one hook
            // live side by side anyway.
            Program::SockOps(program) => {
                let id = program.attach(&self.cgroup, CgroupAttachMode::Single)?;
                program.take_link(id)?.try_into()?
            }
            Program::CgroupSockAddr(program) => {
                let id = program.attach(&self.cgroup, CgroupAttachMode::Single)?;
                program.take_link(id)?.try_into()?
            }
            other => bail!("no hook for a program of type {:?}", other.prog_type()),
        };
        link.pin(pin).with_context(|| format!("cannot pin {}", pin.display()))?;
        Ok(())
    }

    fn replace(&self, program: &Program, pin: &Path) -> anyhow::Result<()> {
        let link = open_pinned(pin)?;
        let info = link_info(link.as_fd())?;
        // SAFETY: the kernel filled the member that belongs to the program's type of link; both are plain integers.
        let (there, here) = unsafe {
            match program {
                Program::SkLookup(_) => {
                    (u64::from(info.__bindgen_anon_1.netns.netns_ino), self.netns.metadata()?.ino())
                }
                _ => (info.__bindgen_anon_1.cgroup.cgroup_id, self.cgroup.metadata()?.ino()),
            }
        };
        // A namespace that is gone has number 0.
        if there != here {
            bail!("it is attached elsewhere (inode {there}, ours is {here})");
        }
        update(link.as_fd(), program.fd()?.as_fd()).context("cannot replace the program")?;
        // Closing our descriptor is nothing to the link; the pin keeps it.
        Ok(())
    }
}

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a whole `bpf_attr`, its unused bytes zero, as bpf(2) demands; whatever it points to outlives
    // the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as u32, std::ptr::from_mut(attr), size_of::<bpf_attr>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn empty_attr() -> bpf_attr {
    // SAFETY: all zeroes is a valid value of this union of integers.
    unsafe { mem::zeroed() }
}

/// aya opens pinned links too, but does not lend their descriptors.
fn open_pinned(pin: &Path) -> anyhow::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = empty_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    let fd = i32::try_from(bpf(bpf_cmd::BPF_OBJ_GET, &mut attr)?)?;
    // SAFETY: the command returned a new descriptor, close-on-exec, that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty_attr();
    attr.link_update.link_fd = link.as_raw_fd().cast_unsigned();
    attr.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd().cast_unsigned();
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

#[expect(clippy::cast_possible_truncation, reason = "the struct is some dozens of bytes")]
const INFO_LENGTH: u32 = size_of::<bpf_link_info>() as u32;

fn link_info(link: BorrowedFd<'_>) -> io::Result<bpf_link_info> {
    let mut attr = empty_attr();
    // SAFETY: all zeroes is a valid value of this struct of integers.
    let mut info: bpf_link_info = unsafe { mem::zeroed() };
    attr.info.bpf_fd = link.as_raw_fd().cast_unsigned();
    attr.info.info_len = INFO_LENGTH;
    attr.info.info = &raw mut info as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

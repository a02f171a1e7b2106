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
use aya_obj::generated::{
    BPF_F_ALLOW_MULTI, bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type,
};

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
        let place = match program {
            Program::SkLookup(_) => Place::Netns(self.netns.metadata()?.ino()),
            _ => Place::Cgroup(self.cgroup.metadata()?.ino()),
        };
        let there = Place::of(link.as_fd())?;
        if there != place {
            bail!("it is attached elsewhere ({there:?}, ours is {place:?})");
        }
        update(link.as_fd(), program.fd()?.as_fd()).context("cannot replace the program")?;
        // Closing our descriptor is nothing to the link; the pin keeps it.
        Ok(())
    }

    /// Whether the link pinned at `pin` serves another namespace than ours, or one that is gone.
    pub(super) fn is_of_another_netns(&self, pin: &Path) -> anyhow::Result<bool> {
        if !pin.exists() {
            return Ok(false);
        }
        let ours = Place::Netns(self.netns.metadata()?.ino());
        Ok(open_pinned(pin).and_then(|link| Place::of(link.as_fd())).is_ok_and(|there| there != ours))
    }
}

/// What a link is attached to, by inode number; a namespace that is gone has number 0.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Netns(u64),
    Cgroup(u64),
}

impl Place {
    fn of(link: BorrowedFd<'_>) -> anyhow::Result<Self> {
        let info = link_info(link)?;
        if info.type_ == bpf_link_type::BPF_LINK_TYPE_NETNS as u32 {
            // SAFETY: the kernel has filled the member that belongs to the type.
            Ok(Self::Netns(u64::from(unsafe { info.__bindgen_anon_1.netns.netns_ino })))
        } else if info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
            // SAFETY: as above.
            Ok(Self::Cgroup(unsafe { info.__bindgen_anon_1.cgroup.cgroup_id }))
        } else {
            bail!("it is a link of another kind ({})", info.type_)
        }
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

/// Whether programs are attached at a hook of that cgroup that suffer no others beside them.
pub(super) fn is_exclusive(cgroup: &File, hook: bpf_attach_type) -> io::Result<bool> {
    let mut attr = empty_attr();
    attr.query.__bindgen_anon_1.target_fd = cgroup.as_raw_fd().cast_unsigned();
    attr.query.attach_type = hook as u32;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: the kernel has filled these members, which are integers.
    let (flags, count) = unsafe { (attr.query.attach_flags, attr.query.__bindgen_anon_2.prog_cnt) };
    Ok(count > 0 && flags & BPF_F_ALLOW_MULTI == 0)
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

/// Detaches what is pinned there at once. A link that is merely closed is detached when the kernel gets to it, some 10 to 200 ms later,
/// and steers meanwhile. Linux 5.9 and later; where it fails the closing has to do.
pub(super) fn detach(pin: &Path) {
    let detached = open_pinned(pin).and_then(|link| {
        let mut attr = empty_attr();
        attr.link_detach.link_fd = link.as_raw_fd().cast_unsigned();
        Ok(bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)?)
    });
    if let Err(error) = detached {
        tracing::debug!("{} is left to its closing: {error:#}", pin.display());
    }
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

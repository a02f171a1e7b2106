//! Links: the kernel's links and the programs under them, by raw bpf(2) commands, since aya does not lend the
//! descriptors of links.

use std::{
    ffi::CString,
    fs::File,
    io, mem,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::{
    BPF_F_ALLOW_MULTI, bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_prog_info,
};

use super::object::NAME_LENGTH;

/// The place that a link is attached to, by inode number. It is 0 for a link that was detached, and for a
/// namespace that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttachTarget {
    Netns(u64),
    Cgroup(u64),
    /// Place of a link of any other kind.
    Elsewhere,
}

impl AttachTarget {
    /// Returns true if the link is still attached.
    pub(super) fn is_attached(self) -> bool {
        !matches!(self, Self::Netns(0) | Self::Cgroup(0))
    }
}

/// Information that the kernel reports of a link.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinkInfo {
    /// Kernel id of the link.
    pub(super) id: u32,
    /// Kernel id of the program under the link.
    pub(super) program: u32,
    /// Place that the link is attached to.
    pub(super) place: AttachTarget,
    /// Hook of the link (`bpf_attach_type`); `None` for [`AttachTarget::Elsewhere`].
    pub(super) hook: Option<u32>,
}

/// An open link. It stays attached at least for as long as this lives, even if its pin is removed.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Attaches a program to a hook of `target`, a network namespace or a cgroup.
    pub(super) fn create(program: BorrowedFd<'_>, target: &File, hook: bpf_attach_type) -> io::Result<Self> {
        let mut attr = empty_attr();
        attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd().cast_unsigned();
        attr.link_create.__bindgen_anon_2.target_fd = target.as_raw_fd().cast_unsigned();
        attr.link_create.attach_type = hook as u32;
        opened(bpf_cmd::BPF_LINK_CREATE, &mut attr).map(Self)
    }

    /// Opens the link that is pinned at `pin`.
    pub(super) fn pinned(pin: &Path) -> io::Result<Self> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let mut attr = empty_attr();
        attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
        opened(bpf_cmd::BPF_OBJ_GET, &mut attr).map(Self)
    }

    /// Opens the link with this id (Linux 5.8 and later).
    pub(super) fn of_id(id: u32) -> io::Result<Self> {
        let mut attr = empty_attr();
        attr.__bindgen_anon_6.__bindgen_anon_1.link_id = id;
        opened(bpf_cmd::BPF_LINK_GET_FD_BY_ID, &mut attr).map(Self)
    }

    /// Reads the link's program, place and hook, as they are now.
    pub(super) fn info(&self) -> io::Result<LinkInfo> {
        let mut attr = empty_attr();
        // SAFETY: all zeroes is a valid value of this struct of integers.
        let mut info: bpf_link_info = unsafe { mem::zeroed() };
        attr.info.bpf_fd = self.0.as_raw_fd().cast_unsigned();
        attr.info.info_len = length_of(&info);
        attr.info.info = &raw mut info as u64;
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
        let (place, hook) = if info.type_ == bpf_link_type::BPF_LINK_TYPE_NETNS as u32 {
            // SAFETY: the kernel has filled the member that belongs to the type.
            let netns = unsafe { info.__bindgen_anon_1.netns };
            (AttachTarget::Netns(u64::from(netns.netns_ino)), Some(netns.attach_type))
        } else if info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
            // SAFETY: as above.
            let cgroup = unsafe { info.__bindgen_anon_1.cgroup };
            (AttachTarget::Cgroup(cgroup.cgroup_id), Some(cgroup.attach_type))
        } else {
            (AttachTarget::Elsewhere, None)
        };
        Ok(LinkInfo { id: info.id, program: info.prog_id, place, hook })
    }

    /// Replaces the program under the link, so that no connection meets an empty hook.
    pub(super) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr = empty_attr();
        attr.link_update.link_fd = self.0.as_raw_fd().cast_unsigned();
        attr.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd().cast_unsigned();
        bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
    }

    /// Pins the link at `pin`, where nothing may be pinned yet.
    pub(super) fn pin(&self, pin: &Path) -> io::Result<()> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let mut attr = empty_attr();
        attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
        attr.__bindgen_anon_4.bpf_fd = self.0.as_raw_fd().cast_unsigned();
        bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
    }

    /// Detaches the link at once (Linux 5.9 and later). The kernel detaches a link that is merely closed some
    /// 10 to 200 ms later, and it steers meanwhile.
    pub(super) fn detach(&self) -> io::Result<()> {
        let mut attr = empty_attr();
        attr.link_detach.link_fd = self.0.as_raw_fd().cast_unsigned();
        bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
    }
}

/// Lists the ids of all links of this kernel, whoever owns them; none before Linux 5.8, and none without the
/// privilege to ask.
pub(super) fn all_ids() -> Vec<u32> {
    let (mut ids, mut id) = (vec![], 0);
    loop {
        let mut attr = empty_attr();
        attr.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
        if bpf(bpf_cmd::BPF_LINK_GET_NEXT_ID, &mut attr).is_err() {
            return ids;
        }
        // SAFETY: the kernel has filled this member, an integer.
        id = unsafe { attr.__bindgen_anon_6.next_id };
        ids.push(id);
    }
}

/// Returns a program's name, and the ids of its maps.
pub(super) fn program(id: u32) -> io::Result<(Vec<u8>, Vec<u32>)> {
    let mut attr = empty_attr();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    let program = opened(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)?;
    // More than any program of ours has; the kernel reports how many there are.
    let mut maps = vec![0; 64];
    let info = program_info(program.as_fd(), &mut maps)?;
    maps.truncate(usize::try_from(info.nr_map_ids).unwrap_or(usize::MAX));
    Ok((program_name(&info).to_vec(), maps))
}

/// Reads what the kernel reports of a program, and as many ids of its maps as fit into `maps`.
pub(super) fn program_info(program: BorrowedFd<'_>, maps: &mut [u32]) -> io::Result<bpf_prog_info> {
    let mut attr = empty_attr();
    // SAFETY: all zeroes is a valid value of this struct of integers.
    let mut info: bpf_prog_info = unsafe { mem::zeroed() };
    info.nr_map_ids = u32::try_from(maps.len()).unwrap_or(0);
    info.map_ids = maps.as_mut_ptr() as u64;
    attr.info.bpf_fd = program.as_raw_fd().cast_unsigned();
    attr.info.info_len = length_of(&info);
    attr.info.info = &raw mut info as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

fn program_name(info: &bpf_prog_info) -> &[u8] {
    // SAFETY: `c_char` and `u8` have the same size and alignment, and every value of one is a value of the
    // other.
    let name = unsafe { std::slice::from_raw_parts(info.name.as_ptr().cast::<u8>(), NAME_LENGTH) };
    name.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[expect(clippy::cast_possible_truncation, reason = "the kernel's structs are some dozens of bytes")]
fn length_of<T>(info: &T) -> u32 {
    size_of_val(info) as u32
}

/// Runs a command that returns a new descriptor.
fn opened(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the command returned a new descriptor, close-on-exec, that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a whole `bpf_attr`, its unused bytes zero, as bpf(2) demands; whatever it points to
    // outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as u32, std::ptr::from_mut(attr), size_of::<bpf_attr>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn empty_attr() -> bpf_attr {
    // SAFETY: all zeroes is a valid value of this union of integers.
    unsafe { mem::zeroed() }
}

/// Returns true if a program attached at this hook of the cgroup allows no others beside it.
pub(super) fn is_exclusive(cgroup: &File, hook: bpf_attach_type) -> io::Result<bool> {
    let mut attr = empty_attr();
    attr.query.__bindgen_anon_1.target_fd = cgroup.as_raw_fd().cast_unsigned();
    attr.query.attach_type = hook as u32;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: the kernel has filled these members, which are integers.
    let (flags, count) = unsafe { (attr.query.attach_flags, attr.query.__bindgen_anon_2.prog_cnt) };
    Ok(count > 0 && flags & BPF_F_ALLOW_MULTI == 0)
}

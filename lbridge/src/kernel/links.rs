//! Links: attaching a program to its hook, replacing it under a link that stays, so that no connection meets an empty
//! hook, and looking at what is attached. aya lends no descriptors of links; raw bpf(2) commands are needed for most of it.

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
use aya::programs::Program;
use aya_obj::generated::{
    BPF_F_ALLOW_MULTI, bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_prog_info,
};

use super::{
    object::{NAME_LENGTH, PROGRAMS},
    pins,
};

/// What programs are attached to.
#[derive(Debug)]
pub(super) struct Hooks {
    /// The host's network namespace.
    pub(super) netns: File,
    /// The cgroup whose sockets are watched: the root, for all of the host's.
    pub(super) cgroup: File,
}

impl Hooks {
    /// Attaches `program`, called `name` in the object. Where there is a link at its hook already, `held` or pinned at `pin`, the program
    /// under that is replaced, and no connection meets an empty hook. The link is not pinned by that.
    pub(super) fn attach(
        &self,
        program: &Program,
        name: &str,
        held: Option<Link>,
        pin: &Path,
    ) -> anyhow::Result<Link> {
        for link in held.map(Ok).into_iter().chain(pin.exists().then(|| Link::pinned(pin))) {
            match link.map_err(anyhow::Error::from).and_then(|link| self.replace(program, link)) {
                Ok(link) => return Ok(link),
                Err(error) => tracing::warn!("cannot adopt the link of {name}: {error:#}; attaching anew"),
            }
        }
        pins::remove(pin)?;
        let hook = PROGRAMS.iter().find(|known| known.name == name).context("it belongs to no hook")?.hook;
        let target = if hook == bpf_attach_type::BPF_SK_LOOKUP { &self.netns } else { &self.cgroup };
        Ok(Link::create(program.fd()?.as_fd(), target, hook)?)
    }

    fn replace(&self, program: &Program, link: Link) -> anyhow::Result<Link> {
        let (there, place) = (link.info()?.place, self.place(program)?);
        if !there.is_attached() {
            bail!("somebody has detached it");
        }
        if there != place {
            bail!("it is attached elsewhere ({there:?}, ours is {place:?})");
        }
        link.update(program.fd()?.as_fd()).context("cannot replace the program")?;
        Ok(link)
    }

    /// What `program` is to be attached to.
    fn place(&self, program: &Program) -> io::Result<Place> {
        Ok(match program {
            Program::SkLookup(_) => Place::Netns(self.netns.metadata()?.ino()),
            _ => Place::Cgroup(self.cgroup.metadata()?.ino()),
        })
    }

    /// Whether `link` is attached where `program` belongs, and runs it.
    pub(super) fn runs(&self, program: &Program, link: &Link) -> anyhow::Result<bool> {
        let (info, own) = (link.info()?, program_info(program.fd()?.as_fd(), &mut [])?);
        Ok(info.place == self.place(program)? && info.program == own.id)
    }

    /// Whether the link pinned at `pin` serves another namespace than ours, or one that is gone.
    pub(super) fn is_of_another_netns(&self, pin: &Path) -> anyhow::Result<bool> {
        if !pin.exists() {
            return Ok(false);
        }
        let ours = Place::Netns(self.netns.metadata()?.ino());
        Ok(Link::pinned(pin).and_then(|link| link.info()).is_ok_and(|info| info.place != ours))
    }
}

/// What a link is attached to, by inode number; of a link that was detached, and of a namespace that is gone, it is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Netns(u64),
    Cgroup(u64),
    /// A link of another kind.
    Elsewhere,
}

impl Place {
    /// Whether the link is still attached.
    pub(super) fn is_attached(self) -> bool {
        !matches!(self, Self::Netns(0) | Self::Cgroup(0))
    }
}

/// What the kernel tells of a link.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinkInfo {
    /// The link's id.
    pub(super) id: u32,
    /// The id of the program under it.
    pub(super) program: u32,
    /// What it is attached to.
    pub(super) place: Place,
    /// Its hook (`bpf_attach_type`), where the place is known here.
    pub(super) hook: Option<u32>,
}

/// A link, open. It stays attached at least for as long as this lives, even if its pin is removed.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    fn create(program: BorrowedFd<'_>, target: &File, hook: bpf_attach_type) -> io::Result<Self> {
        let mut attr = empty_attr();
        attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd().cast_unsigned();
        attr.link_create.__bindgen_anon_2.target_fd = target.as_raw_fd().cast_unsigned();
        attr.link_create.attach_type = hook as u32;
        opened(bpf_cmd::BPF_LINK_CREATE, &mut attr).map(Self)
    }

    /// Opens what is pinned there.
    pub(super) fn pinned(pin: &Path) -> io::Result<Self> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let mut attr = empty_attr();
        attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
        opened(bpf_cmd::BPF_OBJ_GET, &mut attr).map(Self)
    }

    /// Opens the one of that id (Linux 5.8 and later).
    pub(super) fn of_id(id: u32) -> io::Result<Self> {
        let mut attr = empty_attr();
        attr.__bindgen_anon_6.__bindgen_anon_1.link_id = id;
        opened(bpf_cmd::BPF_LINK_GET_FD_BY_ID, &mut attr).map(Self)
    }

    /// What is attached, where, as of now.
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
            (Place::Netns(u64::from(netns.netns_ino)), Some(netns.attach_type))
        } else if info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
            // SAFETY: as above.
            let cgroup = unsafe { info.__bindgen_anon_1.cgroup };
            (Place::Cgroup(cgroup.cgroup_id), Some(cgroup.attach_type))
        } else {
            (Place::Elsewhere, None)
        };
        Ok(LinkInfo { id: info.id, program: info.prog_id, place, hook })
    }

    fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr = empty_attr();
        attr.link_update.link_fd = self.0.as_raw_fd().cast_unsigned();
        attr.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd().cast_unsigned();
        bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
    }

    /// Sees to it that this link is what is pinned at `pin`. Another one there is unpinned, not detached: whose it is is not known
    /// here.
    pub(super) fn keep_pinned(&self, pin: &Path) -> anyhow::Result<()> {
        if Self::pinned(pin).and_then(|there| Ok(there.info()?.id == self.info()?.id)).unwrap_or(false) {
            return Ok(());
        }
        pins::unlink(pin)?;
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let mut attr = empty_attr();
        attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
        attr.__bindgen_anon_4.bpf_fd = self.0.as_raw_fd().cast_unsigned();
        bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr)
            .with_context(|| format!("cannot pin {}", pin.display()))
            .map(drop)
    }

    /// Detaches it at once (Linux 5.9 and later). One that is merely closed is detached when the kernel gets to it, some 10 to
    /// 200 ms later, and steers meanwhile.
    pub(super) fn detach(&self) -> io::Result<()> {
        let mut attr = empty_attr();
        attr.link_detach.link_fd = self.0.as_raw_fd().cast_unsigned();
        bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
    }
}

/// Detaches what is pinned there, at once; where that fails the closing has to do.
pub(super) fn detach(pin: &Path) {
    if let Err(error) = Link::pinned(pin).and_then(|link| link.detach()) {
        tracing::debug!("{} is left to its closing: {error}", pin.display());
    }
}

/// The ids of all links of this kernel, whoever's; none before Linux 5.8, and none without the privilege to ask.
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

/// A program's name, and the ids of its maps.
pub(super) fn program(id: u32) -> io::Result<(Vec<u8>, Vec<u32>)> {
    let mut attr = empty_attr();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    let program = opened(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)?;
    // More than any program of ours has; the kernel tells how many there are.
    let mut maps = vec![0; 64];
    let info = program_info(program.as_fd(), &mut maps)?;
    maps.truncate(usize::try_from(info.nr_map_ids).unwrap_or(usize::MAX));
    Ok((program_name(&info).to_vec(), maps))
}

fn program_info(program: BorrowedFd<'_>, maps: &mut [u32]) -> io::Result<bpf_prog_info> {
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
    // SAFETY: `c_char` and `u8` have the same size and alignment, and every value of one is a value of the other.
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

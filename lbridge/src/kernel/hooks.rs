//! Hooks: attaches a program to its hook, or replaces it under a link that stays, so that no connection meets
//! an empty hook.

use std::{
    fs::File,
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

use anyhow::{Context as _, bail};
use aya::programs::Program;
use aya_obj::generated::bpf_attach_type;

use super::{
    links::{AttachTarget, Link, program_info},
    object::PROGRAMS,
    pins,
};

/// The places that programs are attached to.
#[derive(Debug)]
pub(super) struct Hooks {
    /// The host's network namespace.
    pub(super) netns: File,
    /// The cgroup whose sockets are watched: the root, for all of the host's.
    pub(super) cgroup: File,
}

impl Hooks {
    /// Attaches `program`, called `name` in the object. If its hook has a link already, `held` or pinned at
    /// `pin`, the program under that link is replaced, and no connection meets an empty hook. Does not pin
    /// the link.
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
                Err(error) => tracing::warn!(
                    program = name,
                    error = format!("{error:#}"),
                    "could not adopt a link; attaching the program anew"
                ),
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
            bail!("it was detached");
        }
        if there != place {
            bail!("it is attached elsewhere ({there:?}, ours is {place:?})");
        }
        link.update(program.fd()?.as_fd()).context("cannot replace the program")?;
        Ok(link)
    }

    /// Returns the place that `program` is to be attached to.
    fn place(&self, program: &Program) -> io::Result<AttachTarget> {
        Ok(match program {
            Program::SkLookup(_) => AttachTarget::Netns(self.netns.metadata()?.ino()),
            _ => AttachTarget::Cgroup(self.cgroup.metadata()?.ino()),
        })
    }

    /// Returns true if `link` is attached where `program` belongs, and runs it.
    pub(super) fn runs(&self, program: &Program, link: &Link) -> anyhow::Result<bool> {
        let (info, own) = (link.info()?, program_info(program.fd()?.as_fd(), &mut [])?);
        Ok(info.place == self.place(program)? && info.program == own.id)
    }

    /// Returns true if the link pinned at `pin` serves another namespace than ours, or one that is gone.
    pub(super) fn is_of_another_netns(&self, pin: &Path) -> anyhow::Result<bool> {
        if !pin.exists() {
            return Ok(false);
        }
        let ours = AttachTarget::Netns(self.netns.metadata()?.ino());
        Ok(Link::pinned(pin).and_then(|link| link.info()).is_ok_and(|info| info.place != ours))
    }
}

//! Strays: programs of lbridge that are attached to this host though no pin of the daemon names their links.
//! They remain if the folder of pins was renamed or removed, or if another `--bpffs` or another version was
//! used. Nobody changes their maps any more, so they would serve for ever what was denied since.
//!
//! A program is ours if its name, its hook and its maps are (`object::PROGRAMS`). It serves this host if it
//! is attached to this network namespace. At a cgroup, which hosts may share, it serves this host if its
//! `HOST_NETNS` is this namespace's cookie. If one of the two is not known, it does so if it has maps in
//! common with a program that serves this host. Every other program is left alone. If the kernel reports no
//! cookies, `announce` may be left alone, too; it serves nobody.

use std::{collections::BTreeSet, fs::File, io, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::Context as _;
use aya::maps::{Array, Map, MapData, MapInfo};

use super::{
    links::{self, AttachTarget, Link},
    object::{Known, is_known_map},
    pins,
};

/// Name of the map of the object's read-only globals, of which `HOST_NETNS` is the only one in every version.
const GLOBALS: &[u8] = b".rodata";

/// Identity of this host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Host {
    /// Inode number of the host's network namespace.
    netns: u64,
    /// Cookie of that namespace, if the kernel reports it (Linux 5.14 and later).
    cookie: Option<u64>,
}

impl Host {
    pub(super) fn new(netns: &File, cookie: Option<u64>) -> io::Result<Self> {
        Ok(Self { netns: netns.metadata()?.ino(), cookie })
    }
}

/// A program of ours whose link no pin names.
#[derive(Debug)]
pub struct Stray {
    name: &'static str,
    link: Link,
    id: u32,
    /// Kernel id of the program.
    pub program: u32,
}

impl Stray {
    /// Detaches the stray from its hook at once.
    pub fn end(&self) -> anyhow::Result<()> {
        let Self { name, id, .. } = self;
        self.link.detach().with_context(|| {
            format!(
                "cannot detach {name} (link {id}), which no pin names; it may still serve rules that were \
                 denied; type: bpftool link detach id {id}"
            )
        })
    }
}

/// Finds the strays of the host whose network namespace is `netns`. Links pinned below `bpffs`, by whichever
/// version, are no strays.
pub fn find(bpffs: &Path, netns: &File, cookie: Option<u64>) -> io::Result<Vec<Stray>> {
    let pinned = pins::link_ids(bpffs);
    Ok(Search::new(Host::new(netns, cookie)?).strays(&pinned))
}

/// A search for strays that can be repeated. It does not look at a link twice: asking for the ids alone costs
/// a microsecond or two each, so that a search at every pass of the daemon is cheap on hosts with thousands
/// of links.
#[derive(Debug)]
pub(super) struct Search {
    host: Host,
    /// Ids of links that are no strays, or that could not be detached. The kernel gives an id to another link
    /// only after two thousand million others were made.
    seen: BTreeSet<u32>,
}

/// A program of ours that may be a stray.
struct Candidate {
    name: &'static str,
    id: u32,
    link: Link,
    program: u32,
    maps: Vec<u32>,
    /// True if the program serves this host; `None` if only its maps can tell.
    serves: Option<bool>,
}

impl Search {
    pub(super) fn new(host: Host) -> Self {
        Self { host, seen: BTreeSet::new() }
    }

    /// Detaches every stray, and logs each. The links with the ids `own` are no strays.
    pub(super) fn end_strays(&mut self, own: &BTreeSet<u32>) {
        for stray in self.strays(own) {
            match stray.end() {
                Ok(()) => tracing::warn!(
                    program = stray.name,
                    link = stray.id,
                    "detached a program: no pin of this daemon names it, so deny had no effect on it"
                ),
                Err(error) => {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "could not detach a program that no pin names"
                    );
                    // Detaching it would fail the next time, too.
                    self.seen.insert(stray.id);
                }
            }
        }
    }

    /// Finds every stray. The links with the ids `own` are no strays.
    pub(super) fn strays(&mut self, own: &BTreeSet<u32>) -> Vec<Stray> {
        let all: BTreeSet<u32> = links::all_ids().into_iter().collect();
        self.seen.retain(|id| all.contains(id));
        let new: Vec<u32> =
            all.iter().filter(|id| !self.seen.contains(id) && !own.contains(id)).copied().collect();
        if new.is_empty() {
            return vec![];
        }
        // The maps of the daemon's own programs show which others serve this host.
        let looked_at = own.iter().chain(&new).map(|id| (*id, self.candidate(*id)));
        let mut candidates = vec![];
        for (id, candidate) in looked_at.collect::<Vec<_>>() {
            match candidate {
                Ok(Some(candidate)) => candidates.push(candidate),
                Ok(None) => drop(self.seen.insert(id)),
                // Most likely the link is gone by now; otherwise it is looked at again.
                Err(error) => tracing::debug!(link = id, %error, "could not look at a link"),
            }
        }
        settle(&mut candidates);
        let (ours, others): (Vec<_>, Vec<_>) = candidates
            .into_iter()
            .filter(|candidate| !own.contains(&candidate.id))
            .partition(|candidate| candidate.serves == Some(true));
        self.seen.extend(others.iter().map(|candidate| candidate.id));
        let stray = |Candidate { name, id, link, program, .. }| Stray { name, link, id, program };
        ours.into_iter().map(stray).collect()
    }

    /// Opens the link with this id, if the program under it is one of ours.
    fn candidate(&self, id: u32) -> io::Result<Option<Candidate>> {
        let link = Link::of_id(id)?;
        let info = link.info()?;
        if !info.place.is_attached() || info.hook.is_none() {
            return Ok(None);
        }
        let (name, maps) = links::program(info.program)?;
        let Some(known) = Known::of_name(&name).filter(|known| Some(known.hook as u32) == info.hook) else {
            return Ok(None);
        };
        let infos = maps.iter().map(|id| MapInfo::from_id(*id)).collect::<Result<Vec<_>, _>>();
        let infos = infos.map_err(io::Error::other)?;
        let uses = |name: &&str| {
            infos.iter().any(|map| {
                let kind = map.map_type().map_or(0, |kind| kind as u32);
                map.name() == name.as_bytes() && is_known_map(map.name(), kind, map.key_size())
            })
        };
        if !known.maps.iter().any(|all| all.iter().all(uses)) {
            return Ok(None);
        }
        let serves = match info.place {
            AttachTarget::Netns(netns) => Some(netns == self.host.netns),
            _ => match (self.host.cookie, infos.iter().find_map(host_netns)) {
                (Some(own), Some(its)) => Some(own == its),
                _ => None,
            },
        };
        Ok(Some(Candidate { name: known.name, id, link, program: info.program, maps, serves }))
    }
}

/// Finds the candidates that have maps in common with one that serves this host. They serve it, too: maps are
/// never shared between hosts.
fn settle(candidates: &mut [Candidate]) {
    let mut maps = BTreeSet::new();
    loop {
        let before = maps.len();
        for candidate in candidates.iter_mut() {
            if candidate.serves.is_none() && candidate.maps.iter().any(|map| maps.contains(map)) {
                candidate.serves = Some(true);
            }
            if candidate.serves == Some(true) {
                maps.extend(candidate.maps.iter().copied());
            }
        }
        if maps.len() == before {
            return;
        }
    }
}

/// Returns the cookie of the network namespace that a program was loaded for, if this map holds it.
fn host_netns(map: &MapInfo) -> Option<u64> {
    if map.name() != GLOBALS || map.value_size() != 8 {
        return None;
    }
    let data = MapData::from_id(map.id()).ok()?;
    let globals: Array<_, u64> = Map::Array(data).try_into().ok()?;
    globals.get(&0, 0).ok()
}

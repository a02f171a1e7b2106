//! Trial: loads the object as the daemon does, but pins nothing and attaches to nothing of the host.
//! Everything is gone when the trial is dropped, or the process ends.

use std::{fs::File, path::Path};

use anyhow::Context as _;
use aya::{Ebpf, EbpfLoader, programs::Program};
use aya_obj::generated::bpf_attach_type;
use lbridge_common::symbols;

use super::{
    links,
    loader::{Programs, error_chain, open_cgroup, program_mut, raise_memlock, steering},
    maps::Maps,
    object,
};
use crate::planning::inventory::KernelFeatures;

/// Capacity of each large map, in entries: a trial puts one.
const ROOM: u32 = 8;
/// Hooks of the cgroup that the daemon attaches to, except those that only UDP needs.
const CGROUP_HOOKS: [bpf_attach_type; 7] = [
    bpf_attach_type::BPF_CGROUP_SOCK_OPS,
    bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_INET4_GETSOCKNAME,
    bpf_attach_type::BPF_CGROUP_INET6_GETSOCKNAME,
    bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
];

/// The object, loaded for a trial.
#[derive(Debug)]
pub struct Trial {
    /// Capabilities of this kernel, with the reason for each that it lacks.
    pub features: KernelFeatures,
    /// Typed access to the maps.
    pub maps: Maps,
    steer: Option<&'static str>,
    object: Ebpf,
}

impl Trial {
    /// Loads the object. `cookie` is that of the host's network namespace, if the kernel reports it.
    pub fn load(cookie: Option<u64>) -> anyhow::Result<Self> {
        raise_memlock();
        let bytes = object::bytes()?;
        let host_netns = cookie.unwrap_or(0);
        let mut loader = EbpfLoader::new();
        loader.override_global(symbols::HOST_NETNS, &host_netns, true);
        // The daemon's own maps take dozens of megabytes.
        for map in [
            symbols::ENTRIES,
            symbols::SOURCES,
            symbols::ACCEPTED,
            symbols::TARGETS,
            symbols::LISTENERS,
            symbols::RELAYS,
            symbols::NAME_OVERRIDES,
            symbols::REDIRECT_NETNS,
            symbols::REDIRECTS,
            symbols::REPLY_SOURCES,
            symbols::PROBES,
            symbols::RELAY_CONNECTS,
            symbols::RELAY_PEERS,
        ] {
            loader.map_max_entries(map, ROOM);
        }
        let mut object = loader.load(&bytes).map_err(|error| anyhow::anyhow!(error_chain(&error)))?;
        let Programs { steer, listeners, hooks } = Programs::load(&mut object, cookie);
        let features = KernelFeatures { steer: steering(&steer, &listeners), hooks };
        Ok(Self { features, maps: Maps::take(&mut object)?.0, steer: steer.ok(), object })
    }

    /// Attaches the steering program to this network namespace, which was made for the trial.
    pub fn attach(&mut self, netns: &File) -> anyhow::Result<()> {
        let steer = self.steer.context("the kernel accepts no steering program")?;
        match program_mut(&mut self.object, steer)? {
            Program::SkLookup(program) => {
                program.attach(netns).map_err(|error| anyhow::anyhow!(error_chain(&error)))?;
                Ok(())
            }
            _ => anyhow::bail!("{steer} is not a program of this hook"),
        }
    }
}

/// Checks that the daemon could attach to this cgroup: it is one of cgroup2, the kernel has its hooks, and no
/// other program holds one of them exclusively.
pub fn check_cgroup(path: &Path) -> anyhow::Result<()> {
    let cgroup = open_cgroup(path)?;
    for hook in CGROUP_HOOKS {
        let exclusive = links::is_exclusive(&cgroup, hook);
        let exclusive =
            exclusive.with_context(|| format!("cannot query the programs attached at {}", path.display()))?;
        anyhow::ensure!(
            !exclusive,
            "another program holds hook {} of {} exclusively; `bpftool cgroup show {1}` names it",
            hook as u32,
            path.display()
        );
    }
    Ok(())
}

//! Carries out steps. No meaningful choices: what a step means was decided by the plan. A step that fails does not keep
//! the others from being carried out; what failed is told.

use std::{
    collections::{BTreeMap, HashSet},
    io,
};

use anyhow::Context as _;
use lbridge_common::wire::RuleKey;

use crate::{
    host::listeners::{self, Taker},
    kernel::{loader::Kernel, maps::PeerNames},
    planning::{inventory::ListenerKind, plan::Step, policy::RelayKey, reality::Reality},
    relay::{self, set::RelaySet},
};

/// What is changed: the kernel's maps and the relays.
#[derive(Debug)]
pub(super) struct Executor {
    /// The kernel half, where there is one.
    pub(super) kernel: Option<Kernel>,
    /// The relays.
    pub(super) relays: RelaySet,
}

/// What went wrong in one round of steps.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// Relays that could not be opened.
    pub(super) relays: BTreeMap<RelayKey, String>,
    /// Entries that could not be put.
    pub(super) entries: BTreeMap<RuleKey, String>,
    /// Listeners, by inode, that the kernel cannot be given.
    pub(super) refused: BTreeMap<u64, ListenerKind>,
    /// Everything else.
    pub(super) others: Vec<String>,
}

impl relay::PeerNames for PeerNames {
    fn present(
        &self,
        relay_end: std::net::SocketAddr,
        container: std::net::SocketAddr,
    ) -> anyhow::Result<()> {
        Self::present(self, relay_end, container)
    }

    fn forget(&self, relay_end: std::net::SocketAddr) {
        Self::forget(self, relay_end);
    }
}

impl Executor {
    /// What is in force, read back.
    pub(super) fn reality(&mut self) -> anyhow::Result<Reality> {
        let relays = self.relays.specs();
        let Some(kernel) = &self.kernel else { return Ok(Reality { relays, ..Reality::default() }) };
        Ok(Reality {
            targets: kernel.maps.targets()?,
            entries: kernel.maps.entries()?,
            views: kernel.maps.views()?,
            registered: kernel.maps.registered()?,
            relays,
            names: kernel.names_attached(),
        })
    }

    /// Carries out `steps` in their order.
    pub(super) fn execute(&mut self, steps: Vec<Step>) -> Failures {
        let mut failures = Failures::default();
        let wanted: HashSet<u64> = steps
            .iter()
            .filter_map(|s| if let Step::Register { inode, .. } = s { Some(*inode) } else { None })
            .collect();
        let mut taker = Taker::default();
        for step in steps {
            tracing::debug!(?step);
            if let Err(error) = self.step(&step, &mut taker, &wanted) {
                let text = format!("{error:#}");
                match step {
                    Step::OpenRelay(key, _) => drop(failures.relays.insert(key, text)),
                    Step::PutEntry(key, _) => drop(failures.entries.insert(key, text)),
                    Step::Register { inode, .. } => match unsuitable(&error) {
                        Some(kind) => drop(failures.refused.insert(inode, kind)),
                        None => failures.others.push(text),
                    },
                    _ => failures.others.push(text),
                }
            }
        }
        failures
    }

    fn step(&mut self, step: &Step, taker: &mut Taker, wanted: &HashSet<u64>) -> anyhow::Result<()> {
        match step {
            Step::OpenRelay(key, spec) => return self.relays.open(key, spec.clone()),
            Step::CloseRelay { key, handed_over } => {
                self.relays.close(key, *handed_over);
                return Ok(());
            }
            _ => {}
        }
        // Without a kernel half the only targets are for our own eyes.
        let Some(kernel) = &mut self.kernel else { return Ok(()) };
        match step {
            Step::AddTarget(port) => kernel.maps.add_target(*port),
            Step::AttachNames => kernel.attach_names(),
            Step::PutView(endpoint, view) => kernel.maps.put_view(endpoint, view),
            Step::Register { key, inode } => {
                // A walk through /proc may take its time on a host with many processes.
                let socket = tokio::task::block_in_place(|| taker.take(*inode, wanted))?;
                if listeners::is_mptcp(&socket) {
                    return Err(Mptcp.into());
                }
                kernel.maps.register(*key, &socket)
            }
            Step::PutEntry(key, value) => kernel.maps.put_entry(key, value),
            Step::RemoveEntry(key) => kernel.maps.remove_entry(key),
            Step::RemoveView(endpoint) => kernel.maps.remove_view(endpoint),
            Step::DetachNames => kernel.detach_names(),
            Step::Unregister(key) => kernel.maps.unregister(key),
            Step::RemoveTarget(port) => kernel.maps.remove_target(*port),
            Step::OpenRelay(..) | Step::CloseRelay { .. } => Ok(()),
        }
        .with_context(|| format!("{step:?}"))
    }
}

/// A SOCKHASH takes TCP sockets only.
#[derive(Debug, thiserror::Error)]
#[error("the listener is MPTCP")]
struct Mptcp;

/// What the failed registration tells of the socket itself, and so stays true for as long as the socket lives; of one
/// that is gone meanwhile, or of a full map, nothing.
fn unsuitable(error: &anyhow::Error) -> Option<ListenerKind> {
    if error.is::<Mptcp>() {
        return Some(ListenerKind::Mptcp);
    }
    let errno = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())?;
    matches!(errno, libc::EOPNOTSUPP | libc::EINVAL | libc::EBUSY).then_some(ListenerKind::Refused(errno))
}

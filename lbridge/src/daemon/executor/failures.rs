//! Failures: the failures of steps, by what they concern.

use std::{collections::BTreeMap, io};

use lbridge_common::wire::{AcceptedKey, EntryKey, SourceKey};

use crate::{
    daemon::sources::Contradicted,
    planning::{
        desired::RelayKey,
        firewall::Opening,
        hooks::PerHookSet,
        inventory::ListenerKind,
        plan::{Prerequisite, Step},
    },
};

/// Failures of one round of steps, each with its reason.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Failures {
    /// Relays that could not be opened.
    pub(in crate::daemon) relays: BTreeMap<RelayKey, String>,
    /// Entries that could not be put, or whose sources could not be added.
    pub(in crate::daemon) entries: BTreeMap<EntryKey, String>,
    /// Keys of accept rules whose flows conntrack could not forget.
    pub(in crate::daemon) flows: BTreeMap<(AcceptedKey, u32), String>,
    /// Keys of accept rules that could not be added to `ACCEPTED`.
    pub(in crate::daemon) accepted: BTreeMap<(AcceptedKey, u32), String>,
    /// Listeners, by inode, that the kernel cannot be given.
    pub(in crate::daemon) refused: BTreeMap<u64, ListenerKind>,
    /// Ports whose listeners could not be registered.
    pub(in crate::daemon) listeners: BTreeMap<u16, String>,
    /// Sets of hooks that could not be attached; `None` for a set that did not fail.
    pub(in crate::daemon) hooks: PerHookSet<Option<String>>,
    /// Openings that no accept rule could be put for.
    pub(in crate::daemon) openings: BTreeMap<Opening, String>,
    /// Failures of all other steps.
    pub(in crate::daemon) others: Vec<String>,
    /// The steps that failed, and those of sources that the gate refused to add.
    pub(in crate::daemon) steps: Vec<Step>,
}

impl Failures {
    /// Adds the failure of a step.
    pub(super) fn add(&mut self, step: &Step, error: &anyhow::Error) {
        let text = format!("{error:#}");
        match step {
            // No failure: the engine's view has changed since the plan was made, and the next round makes a
            // new plan.
            Step::AddSource(_) if error.is::<Contradicted>() => {
                tracing::debug!(error = text, "source not added: the engine's view has changed");
            }
            Step::OpenRelay(key, _) => drop(self.relays.insert(key.clone(), text)),
            Step::PutEntry(key, _) | Step::AddSource(SourceKey { entry: key, .. }) => {
                drop(self.entries.insert(*key, text));
            }
            Step::ForgetFlows(keys) => self.flows.extend(keys.iter().map(|key| (*key, text.clone()))),
            Step::AddAccepted(key) => drop(self.accepted.insert(*key, text)),
            Step::Register { inode, key } => match unsuitable(error) {
                Some(kind) => drop(self.refused.insert(*inode, kind)),
                None => drop(self.listeners.insert(key.port, text)),
            },
            Step::Accept { opening, .. } => drop(self.openings.insert(opening.clone(), text)),
            Step::AttachHooks(set) => self.hooks[*set] = Some(text),
            _ => self.others.push(text),
        }
        self.steps.push(step.clone());
    }

    /// Logs the failures that are not in `before`. A relay's failure is news, but not a new reason for it:
    /// the process that holds its port may change its name every moment.
    pub(in crate::daemon) fn log_since(&self, before: &Self) {
        for (RelayKey { address, place }, why) in
            self.relays.iter().filter(|(key, _)| !before.relays.contains_key(key))
        {
            tracing::warn!(%address, interface = place.interface(), error = why, "relay failed to open");
        }
        let known: Vec<_> = before.others().collect();
        for error in self.others().filter(|text| !known.contains(text)) {
            tracing::warn!(error, "step failed");
        }
    }

    /// Returns true if a step that should have established the condition has failed.
    pub(super) fn rule_out(&self, condition: &Prerequisite) -> bool {
        match condition {
            Prerequisite::Hooks(set) => self.hooks[*set].is_some(),
            Prerequisite::IsRefused(key) => self.accepted.contains_key(key),
            Prerequisite::NoFlows(key) => self.flows.contains_key(key),
        }
    }

    fn others(&self) -> impl Iterator<Item = &String> {
        let specific = self.entries.values().chain(self.listeners.values()).chain(self.openings.values());
        specific
            .chain(self.accepted.values())
            .chain(self.flows.values().take(1))
            .chain(self.hooks.iter().filter_map(|(_, why)| why.as_ref()))
            .chain(&self.others)
    }
}

/// Describes a condition that does not hold.
pub(super) fn unmet(condition: &Prerequisite) -> &'static str {
    match condition {
        Prerequisite::Hooks(_) => "the hooks that it needs could not be attached",
        Prerequisite::IsRefused(_) => {
            "the kernel could not be set to refuse other traffic that the accept rule lets in"
        }
        Prerequisite::NoFlows(_) => "conntrack still lists its flows, so it stays refused",
    }
}

/// Error of registering an MPTCP listener: a SOCKHASH takes plain TCP and UDP sockets only.
#[derive(Debug, thiserror::Error)]
#[error("the listener is MPTCP")]
pub(super) struct Mptcp;

/// Returns why the kernel cannot be given the socket, if the failed registration shows it. The reason is
/// either the socket itself, and holds for as long as it lives, or a full map. If the socket is gone
/// meanwhile, it shows nothing.
fn unsuitable(error: &anyhow::Error) -> Option<ListenerKind> {
    if error.is::<Mptcp>() {
        return Some(ListenerKind::Mptcp);
    }
    let errno = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())?;
    if errno == libc::E2BIG {
        return Some(ListenerKind::NoRoom);
    }
    matches!(errno, libc::EOPNOTSUPP | libc::EINVAL | libc::EBUSY).then_some(ListenerKind::Refused(errno))
}

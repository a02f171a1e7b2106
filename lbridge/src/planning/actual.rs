//! Actual: the actual state, read back from the kernel, the relay set and the firewall.

use std::collections::{BTreeMap, BTreeSet};

use lbridge_common::{
    verdict::first_candidate,
    wire::{AcceptedKey, Entry, EntryKey, ListenerKey},
};

use super::{
    desired::{RedirectOutcome, RelayKey, RelaySpec},
    firewall::FirewallState,
    kernel_state::KernelState,
};

/// The actual state, in the terms of the desired state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Actual {
    /// The contents of the kernel's maps.
    pub kernel: KernelState,
    /// Number of connections that each entry has steered since it was put.
    pub steered: BTreeMap<EntryKey, u64>,
    /// Traffic that accept rules let in, and that the kernel refuses unless an entry admits it; with the
    /// length of the key's prefix in bits.
    pub accepted: BTreeSet<(AcceptedKey, u32)>,
    /// Flows that a firewall may still let in, for keys that no accept rule lets in any more.
    pub flows: BTreeMap<(AcceptedKey, u32), Flows>,
    /// Listeners that are registered in the kernel.
    pub registered: BTreeSet<ListenerKey>,
    /// Keys of the entries whose relay the kernel can reach.
    pub relay_sockets: BTreeSet<EntryKey>,
    /// Relays that listen, with their specifications.
    pub relays: BTreeMap<RelayKey, RelaySpec>,
    /// Relays that only complete what had begun when the kernel took over.
    pub lingering: BTreeSet<RelayKey>,
    /// True if a program that must always be attached is not.
    pub detached: bool,
    /// True if sockets may exist that still need the name hooks, whatever the desired state says.
    pub name_hooks_in_use: bool,
    /// Number of network namespaces (guests) known to be on each bridge, by interface index. Only bridges
    /// that have redirects.
    pub guests: BTreeMap<u32, usize>,
    /// The state of the host's firewall.
    pub firewall_state: FirewallState,
}

/// Numbers of flows that conntrack knows of what an accept rule let in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flows {
    /// Flows of open TCP connections.
    pub open: usize,
    /// All other flows, which conntrack may forget: UDP, and TCP connections without a socket of the host's.
    pub forgettable: usize,
}

impl Actual {
    /// Returns the number of network namespaces whose localhost the redirect is for.
    pub fn whose_localhost(&self, redirect: &RedirectOutcome) -> usize {
        match &redirect.keys[..] {
            [all] if all.netns == 0 => self.guests.get(&redirect.ifindex).copied().unwrap_or_default(),
            each => each.len(),
        }
    }

    /// Returns true if a connection that matches this entry finds a listener.
    pub fn serves(&self, entry: &Entry) -> bool {
        if entry.has(Entry::RELAYED) {
            return self.relay_sockets.contains(&entry.key);
        }
        let registered = |key| self.registered.contains(&key).then_some(());
        first_candidate(&entry.target, entry.target_port, entry.protocol(), registered).is_some()
    }
}

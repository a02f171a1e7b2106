//! Reality: what is in force, read back from the kernel and from the relay set.

use std::collections::{BTreeMap, BTreeSet};

use lbridge_common::{
    verdict::candidates,
    wire::{Endpoint, ListenerKey, LoopbackView, RuleKey, RuleValue},
};

use super::policy::{RelayKey, RelaySpec};

/// What is in force.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reality {
    /// Ports whose listeners the kernel registers or tells of.
    pub targets: BTreeSet<u16>,
    /// Kernel entries, with their counts.
    pub entries: BTreeMap<RuleKey, RuleValue>,
    /// Gateways that look local.
    pub views: BTreeMap<Endpoint, LoopbackView>,
    /// Registered listeners.
    pub registered: BTreeSet<ListenerKey>,
    /// Open relay listeners; those that only finish what has begun are not among them.
    pub relays: BTreeMap<RelayKey, RelaySpec>,
    /// Whether the name hooks are attached.
    pub names: bool,
}

impl Reality {
    /// Whether a connection that meets this entry finds a listener.
    pub fn serves(&self, entry: &RuleValue) -> bool {
        candidates(&entry.target, entry.target_port).any(|key| self.registered.contains(&key))
    }
}

//! Reality: what is in force, read back from the kernel, the relay set and the firewall.

use std::collections::{BTreeMap, BTreeSet};

use lbridge_common::{
    verdict::first_candidate,
    wire::{
        AcceptedKey, Dial, DialKey, ListenerKey, LoopbackView, Reply, ReplyKey, RuleKey, RuleValue,
        SourceKey, TargetKey, ViewKey,
    },
};

use super::{
    firewall::Filtering,
    hooks::PerHookSet,
    policy::{DialOutcome, RelayKey, RelaySpec},
};

/// What is in force.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reality {
    /// Addresses and ports whose listeners the kernel registers or tells of.
    pub targets: BTreeSet<TargetKey>,
    /// Kernel entries, with their counts.
    pub entries: BTreeMap<RuleKey, RuleValue>,
    /// The users of the entries that are not for all.
    pub sources: BTreeSet<SourceKey>,
    /// What the kernel refuses unless an entry admits it, with the bits of the key that count: what accept rules let in.
    pub accepted: BTreeSet<(AcceptedKey, u32)>,
    /// Flows that a firewall may still let in, of what no accept rule lets in any more.
    pub flows: BTreeMap<(AcceptedKey, u32), Flows>,
    /// Gateways that look local.
    pub views: BTreeMap<(ViewKey, u32), LoopbackView>,
    /// Sources of UDP services' replies.
    pub replies: BTreeMap<(ReplyKey, u32), Reply>,
    /// What containers dial that leads to their gateway.
    pub dials: BTreeMap<DialKey, Dial>,
    /// Registered listeners.
    pub registered: BTreeSet<ListenerKey>,
    /// Keys of the entries whose relay the kernel can reach.
    pub relay_sockets: BTreeSet<RuleKey>,
    /// Open relay listeners.
    pub relays: BTreeMap<RelayKey, RelaySpec>,
    /// Relay listeners that only complete what had begun when the kernel took over.
    pub lingering: BTreeSet<RelayKey>,
    /// Whether the programs that are always attached are not.
    pub detached: bool,
    /// Whether each set of hooks is attached.
    pub hooks: PerHookSet<bool>,
    /// Whether sockets may live that still need the name hooks, whatever the policy says.
    pub name_hooks_in_use: bool,
    /// Network namespaces that are known to be on a bridge, by its index; of bridges that have dials alone.
    pub guests: BTreeMap<u32, usize>,
    /// The host's firewall.
    pub filtering: Filtering,
}

/// How many flows conntrack knows of what an accept rule let in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flows {
    /// Those of open TCP connections.
    pub open: usize,
    /// All others, which may be forgotten: UDP, and TCP connections without a socket of the host's.
    pub forgettable: usize,
}

impl Reality {
    /// How many network namespaces have that localhost.
    pub fn whose_localhost(&self, dial: &DialOutcome) -> usize {
        match &dial.keys[..] {
            [all] if all.netns == 0 => self.guests.get(&dial.ifindex).copied().unwrap_or_default(),
            each => each.len(),
        }
    }

    /// Whether a connection that meets this entry finds a listener.
    pub fn serves(&self, entry: &RuleValue) -> bool {
        if entry.has(RuleValue::RELAYED) {
            return self.relay_sockets.contains(&entry.key);
        }
        let registered = |key| self.registered.contains(&key).then_some(());
        first_candidate(&entry.target, entry.target_port, entry.protocol(), registered).is_some()
    }
}

//! Plan: the steps from reality to policy, in an order that leaves no gap and no hole.
//!
//! - a port is watched before its listeners are looked for, a listener is ready before the entry that names it;
//! - the name hooks are attached before the connections that need them can come, and detached after the last one;
//! - a relay listens before the kernel's entry goes, the entry is there before the relay stops;
//! - a UDP service's replies get their source before the entry that leads to it, and leave as they are after it;
//! - an entry goes before its listener, and before the firewall is closed;
//! - who may use an entry is entered before it, and forgotten after it; at once, if it stays for others;
//! - what leads to a gateway is entered after what answers there, and goes before it; its hooks come before it, and go after it;
//! - the firewall is tried last, when everything that answers is there;
//! - before an accept rule is put, and for as long as it is there, an entry refuses whom the rule does not admit.

use std::collections::BTreeMap;

use lbridge_common::wire::{
    Address, Dial, DialKey, ListenerKey, LoopbackView, Reply, ReplyKey, RuleKey, RuleValue, SLOTS, SourceKey,
    TCP, TargetKey, ViewKey,
};

use super::{
    firewall::{self, Chain, Link, Opening, Through},
    policy::{GatewayOutcome, Policy, RelayKey, RelaySpec, State, Subnet},
    reality::Reality,
};

/// One change, to be carried out as it says: what it means was decided before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Attach the programs that are always attached: somebody has removed their pins.
    Attach,
    /// Watch listeners of a port.
    AddTarget(TargetKey),
    /// Attach the name hooks.
    AttachNameHooks,
    /// Attach the connect hooks.
    AttachConnectHooks,
    /// Make a gateway's connections look local, or otherwise so.
    PutView((ViewKey, u32), LoopbackView),
    /// Attach the hooks that give UDP services' replies their source.
    AttachReplyHooks,
    /// Give replies their source, or another one.
    PutReply((ReplyKey, u32), Reply),
    /// Register the socket of this inode.
    Register {
        /// Under which key.
        key: ListenerKey,
        /// Which socket.
        inode: u64,
    },
    /// Listen as a relay; or, where it does, relay otherwise.
    OpenRelay(RelayKey, RelaySpec),
    /// Let an address use an entry that is not for all.
    AddSource(SourceKey),
    /// Put an entry, or change where it leads.
    PutEntry(RuleKey, RuleValue),
    /// Remove an entry.
    RemoveEntry(RuleKey),
    /// Let an address use it no more.
    RemoveSource(SourceKey),
    /// Lead what containers dial to their gateway.
    PutDial(DialKey, Dial),
    /// Leave it alone.
    RemoveDial(DialKey),
    /// Stop listening as a relay.
    CloseRelay {
        /// Which.
        key: RelayKey,
        /// Whether the kernel has taken over: handshakes that are under way are then still completed.
        handed_over: bool,
    },
    /// Make a gateway's connections look as they are.
    RemoveView((ViewKey, u32)),
    /// Detach the name hooks.
    DetachNameHooks,
    /// Detach the connect hooks.
    DetachConnectHooks,
    /// Leave replies as they are.
    RemoveReply((ReplyKey, u32)),
    /// Detach the hooks of replies.
    DetachReplyHooks,
    /// Forget a listener.
    Unregister(ListenerKey),
    /// Watch a port no more.
    RemoveTarget(TargetKey),
    /// Put an accept rule first in one of the firewall's chains.
    Accept {
        /// Where.
        chain: Chain,
        /// For what.
        opening: Opening,
    },
    /// Remove an accept rule from the firewall.
    Unaccept {
        /// Where.
        chain: Chain,
        /// For what.
        opening: Opening,
    },
    /// Try whether the firewall lets these through.
    Probe(BTreeMap<Opening, Link>),
}

impl Step {
    /// Whether it is the kernel programs' and their maps'.
    pub fn is_of_kernel(&self) -> bool {
        !matches!(
            self,
            Self::OpenRelay(..)
                | Self::CloseRelay { .. }
                | Self::Accept { .. }
                | Self::Unaccept { .. }
                | Self::Probe(_)
        )
    }
}

/// The steps from `reality` to `policy`. None, where they agree.
pub fn plan(policy: &Policy, reality: &Reality) -> Vec<Step> {
    let mut steps = vec![];
    let firewall = firewall::plan(&policy.openings, policy.firewall, &reality.filtering);
    let entries = entries(policy, reality, &firewall);
    // Where the entry goes on to be for some, nothing needs them any more, and the address may be another's by now.
    let listed =
        |key: &SourceKey| policy.entries.get(&key.rule).is_some_and(|entry| entry.has(RuleValue::LISTED));
    let (gone, later): (Vec<_>, Vec<_>) =
        reality.sources.difference(&policy.sources).copied().partition(listed);
    steps.extend(gone.into_iter().map(Step::RemoveSource));
    if reality.detached {
        steps.push(Step::Attach);
    }
    steps.extend(policy.targets.difference(&reality.targets).map(|port| Step::AddTarget(*port)));
    if policy.name_hooks && !reality.name_hooks {
        steps.push(Step::AttachNameHooks);
    }
    if policy.connect_hooks && !reality.connect_hooks {
        steps.push(Step::AttachConnectHooks);
    }
    for (endpoint, view) in &policy.views {
        if reality.views.get(endpoint) != Some(view) {
            steps.push(Step::PutView(*endpoint, *view));
        }
    }
    if !policy.replies.is_empty() && !reality.reply_hooks {
        steps.push(Step::AttachReplyHooks);
    }
    for (key, reply) in &policy.replies {
        if reality.replies.get(key) != Some(reply) {
            steps.push(Step::PutReply(*key, *reply));
        }
    }
    steps.extend(registrations(policy, reality));
    let stale = |key: &&RelayKey| !policy.relays.contains_key(*key);
    // Of one namespace that is found by another way now: its port has to be free first.
    let moved =
        |key: &&RelayKey| policy.relays.keys().any(|new| new.address == key.address && new.is_beside(key));
    for key in reality.relays.keys().filter(stale).filter(moved) {
        steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
    }
    for (key, spec) in &policy.relays {
        let reached =
            || key.entry().is_some_and(|entry| reality.relay_sockets.contains(&entry)) || !spec.by_entry;
        if reality.relays.get(key) != Some(spec) || !reached() {
            steps.push(Step::OpenRelay(key.clone(), spec.clone()));
        }
    }
    // Before anything else goes that they lead to; after the hooks, where they are new.
    let dials = reality.dials.keys().filter(|key| !policy.dials.contains_key(key));
    steps.extend(dials.map(|key| Step::RemoveDial(*key)));
    if reality.connect_hooks && !policy.connect_hooks {
        steps.push(Step::DetachConnectHooks);
    }
    steps.extend(policy.sources.difference(&reality.sources).map(|key| Step::AddSource(*key)));
    for (key, value) in &entries {
        if reality.entries.get(key) != Some(value) {
            steps.push(Step::PutEntry(*key, *value));
        }
    }
    steps.extend(reality.entries.keys().filter(|k| !entries.contains_key(k)).map(|k| Step::RemoveEntry(*k)));
    // With its entry: without one, whoever would look local is refused.
    steps
        .extend(reality.views.keys().filter(|k| !policy.views.contains_key(k)).map(|k| Step::RemoveView(*k)));
    steps.extend(later.into_iter().map(Step::RemoveSource));
    for (key, dial) in &policy.dials {
        if reality.dials.get(key) != Some(dial) {
            steps.push(Step::PutDial(*key, *dial));
        }
    }
    // By the entry of its own rule: where entries do not name the interface another network's may have that address, too.
    let handed_over = |key: &RelayKey| {
        // One that leads to a relay, or to nobody, takes nothing over.
        let steers = |key: &RuleKey| policy.entries.get(key).is_some_and(|entry| entry.target_port != 0);
        let is_entered = |key: &RuleKey| key.protocol == u16::from(TCP) && steers(key);
        let taken_over = |gateway: &GatewayOutcome| {
            gateway.relay_key == *key
                && gateway.outcome.state != State::Blocked
                && gateway.rule_key.as_ref().is_some_and(is_entered)
        };
        policy.outcomes.iter().flat_map(|outcome| &outcome.gateways).any(taken_over)
    };
    for key in reality.relays.keys().filter(stale).filter(|key| !moved(key)) {
        steps.push(Step::CloseRelay { key: key.clone(), handed_over: handed_over(key) });
    }
    // Denied while it lingers: at once, too.
    for key in reality.lingering.iter().filter(|key| !policy.relays.contains_key(key) && !handed_over(key)) {
        steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
    }
    if reality.name_hooks && !policy.name_hooks && !reality.name_hooks_in_use {
        steps.push(Step::DetachNameHooks);
    }
    steps.extend(
        reality.replies.keys().filter(|k| !policy.replies.contains_key(k)).map(|k| Step::RemoveReply(*k)),
    );
    if reality.reply_hooks && policy.replies.is_empty() {
        steps.push(Step::DetachReplyHooks);
    }
    let watched = |key: &ListenerKey| {
        let (address, port, protocol) = (key.address, key.port, key.protocol.into());
        policy.targets.contains(&TargetKey { address, port, protocol })
    };
    let stale = reality.registered.iter().filter(|key| !watched(key));
    steps.extend(stale.map(|k| Step::Unregister(*k)));
    steps.extend(reality.targets.difference(&policy.targets).map(|port| Step::RemoveTarget(*port)));
    steps.extend(firewall);
    steps
}

/// The entries that should be in force, with the counts of those that are: the policy's, and one that admits nobody for what
/// else an accept rule of lbridge's lets in. Where there is one, or is to be one, entries are exclusive.
fn entries(policy: &Policy, reality: &Reality, firewall: &[Step]) -> BTreeMap<RuleKey, RuleValue> {
    let mut entries = policy.entries.clone();
    let planned = firewall.iter().filter_map(|step| match step {
        Step::Accept { chain, opening } => Some((chain, opening)),
        _ => None,
    });
    let accepts = reality.filtering.accepts.keys().map(|(chain, opening)| (chain, opening));
    for (chain, opening) in accepts.chain(planned) {
        for ifindex in ingress(policy, chain, opening) {
            let key = opening.entry(ifindex);
            entries.entry(key).or_insert_with(|| closed(key, opening)).flags |= RuleValue::EXCLUSIVE;
        }
    }
    for (key, entry) in &mut entries {
        // The count is the kernel's.
        if let Some(there) = reality.entries.get(key).filter(|there| there.leads_as(entry)) {
            entry.steered = there.steered;
        }
    }
    entries
}

/// Indices of the interfaces by which an accept rule lets packets in, as keys of entries have them.
fn ingress(policy: &Policy, chain: &Chain, opening: &Opening) -> Vec<u32> {
    let interfaces = &policy.ingress.interfaces;
    if !policy.ingress.checked {
        return vec![0];
    }
    // A rich rule names no interface: whatever is in the zone can send packets with a source of the subnet.
    if chain.through == Through::Firewalld {
        return interfaces.values().copied().collect();
    }
    interfaces.get(&opening.interface).copied().into_iter().collect()
}

fn closed(key: RuleKey, opening: &Opening) -> RuleValue {
    let Subnet { base: subnet, mask } = Subnet::of(opening.sources.addr(), opening.sources.prefix_len());
    let (target, target_port) = (Address::ANY_V6, 0);
    RuleValue {
        key,
        subnet,
        mask,
        target,
        target_port,
        flags: RuleValue::CLOSED,
        reserved: [0; 2],
        steered: 0,
    }
}

/// Fills the free slots of each bound address from its sockets, newest last: an inode's number grows. A socket may come
/// to be registered twice, which does no harm.
fn registrations(policy: &Policy, reality: &Reality) -> Vec<Step> {
    let mut steps = vec![];
    for (bound, inodes) in &policy.listeners {
        let keys = (0..SLOTS).map(|slot| ListenerKey { slot, ..*bound });
        let free: Vec<_> = keys.filter(|key| !reality.registered.contains(key)).collect();
        let missing = inodes.len().min(usize::from(SLOTS)).saturating_sub(usize::from(SLOTS) - free.len());
        let newest = inodes.iter().rev().take(missing);
        steps.extend(free.into_iter().zip(newest).map(|(key, inode)| Step::Register { key, inode: *inode }));
    }
    steps
}

//! Plan: the steps from the actual to the desired state ([`Reality`] to [`Policy`]), in an order that leaves
//! no gap and no hole.
//!
//! - a port is watched before its listeners are looked for, and a listener is ready before the entry that
//!   names it;
//! - the name hooks are attached before connections that need them can come, and detached after the last of
//!   these;
//! - a relay listens before the kernel's entry is removed, and the entry is in place before the relay stops;
//! - the source of a UDP service's replies is set before the entry that leads to the service, and reset after
//!   that entry is removed;
//! - an entry is removed before its listener, and before the firewall is closed;
//! - a source is added before the entry that it may use, and removed after it; at once, if the entry stays
//!   for others;
//! - what only takes access away, and needs nothing new, comes first ([`revocations`]);
//! - a redirect is added after what answers at its gateway, and removed before it; the redirects' hooks are attached
//!   before the redirects, and detached after them;
//! - the firewall is tried last, when everything that answers is in place;
//! - before an accept rule is put, and for as long as the rule or a flow that it let in exists, the kernel
//!   refuses the traffic of that rule that no entry admits.

use std::{collections::BTreeSet, net::SocketAddr};

use lbridge_common::wire::{
    Address, Endpoint, Entry, EntryKey, ListenerKey, OverrideKey, SLOTS, SourceKey, TCP, TargetKey,
};

pub use self::step::{Prerequisite, Step};
use super::{
    hooks::HookSet,
    kernel_state::{KernelState, changes},
    policy::{Clients, GatewayOutcome, Place, Policy, RelayKey, RelaySpec, State},
    reality::Reality,
};

pub(super) mod firewall;
mod step;

/// Returns the steps that only take access away, and that depend on nothing new. They come first in every
/// plan, and can be carried out before the firewall is looked at.
pub fn revocations(policy: &Policy, reality: &Reality) -> Vec<Step> {
    let mut steps: Vec<_> =
        sources_of_others(&policy.kernel, &reality.kernel).map(Step::RemoveSource).collect();
    steps.extend(overrides_of_others(policy, reality).into_iter().map(Step::RemoveOverride));
    for (key, there) in &reality.relays {
        let meant = policy.relays.get(key).map(|spec| &spec.clients);
        let clients = match (&there.clients, meant) {
            (Clients::Listed(there), Some(Clients::Listed(meant))) => {
                there.intersection(meant).copied().collect()
            }
            (Clients::Subnet(_), Some(Clients::Listed(meant))) => meant.clone(),
            _ => continue,
        };
        let clients = Clients::Listed(clients);
        if clients != there.clients {
            steps.push(Step::OpenRelay(key.clone(), RelaySpec { clients, ..there.clone() }));
        }
    }
    // Redirects before what they lead to, entries before their relays.
    let redirects = changes(&policy.kernel.redirects, &reality.kernel.redirects).remove;
    steps.extend(redirects.into_iter().copied().map(Step::RemoveRedirect));
    let denied = reality.kernel.entries.keys().filter(|key| is_denied(policy, key));
    steps.extend(denied.map(|key| Step::RemoveEntry(*key)));
    let handed_over = handed_over(policy);
    let denied = |key: &&RelayKey| {
        !policy.relays.contains_key(key) && !handed_over.contains(key) && !is_moved(policy, key)
    };
    // Includes relays that linger. Where an entry that refuses replaces a relay, the relay closes after the
    // entry is put.
    for key in reality.relays.keys().chain(&reality.lingering).filter(denied) {
        if !is_refused(policy, key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
        }
    }
    steps
}

/// Returns true if the policy has an entry that leads to nobody where a relay of a bridge listens.
fn is_refused(policy: &Policy, key: &RelayKey) -> bool {
    let anywhere = key.entry().map(|entry| EntryKey { ifindex: 0, ..entry });
    let entries = key.entry().into_iter().chain(anywhere).filter_map(|key| policy.kernel.entries.get(&key));
    entries.into_iter().any(|entry| entry.target_port == 0 && !entry.has(Entry::RELAYED))
}

/// Returns the sources that may no longer use an entry which stays for other sources. Nothing needs these any
/// more, and the addresses may be other containers' by now.
fn sources_of_others<'a>(
    desired: &'a KernelState,
    actual: &'a KernelState,
) -> impl Iterator<Item = SourceKey> + 'a {
    let stays = |key: &&SourceKey| desired.entries.get(&key.rule).is_some_and(|it| it.has(Entry::LISTED));
    actual.sources.difference(&desired.sources).filter(stays).copied()
}

/// Returns the overrides of single addresses whose holders may be others by now: those at the gateways of entries
/// that are for some sources only.
fn overrides_of_others(policy: &Policy, reality: &Reality) -> BTreeSet<(OverrideKey, u32)> {
    let single = OverrideKey::prefix_len(&Address([u32::MAX; 4]));
    let mut stale = reality
        .kernel
        .overrides
        .keys()
        .filter(|names| names.1 == single && !policy.kernel.overrides.contains_key(names))
        .peekable();
    if stale.peek().is_none() {
        return BTreeSet::new();
    }
    let listed = policy.kernel.entries.values().filter(|entry| entry.has(Entry::LISTED));
    let gateways: BTreeSet<_> =
        listed.map(|entry| Endpoint::new(entry.key.gateway, entry.key.port)).collect();
    stale.filter(|(key, _)| gateways.contains(&key.gateway)).copied().collect()
}

/// Returns true if an entry must be removed and no relay replaces it. Such a relay would have to listen
/// first.
fn is_denied(policy: &Policy, key: &EntryKey) -> bool {
    let address = SocketAddr::new(key.gateway.into(), key.port);
    let is_relayed = |relay: &RelayKey| match relay.place {
        Place::Bridge { ifindex, .. } => [0, ifindex].contains(&key.ifindex),
        Place::Namespace(_) => false,
    };
    let first = RelayKey { address, place: Place::Bridge { interface: String::new(), ifindex: 0 } };
    let mut relays =
        policy.relays.range(first..).map(|(relay, _)| relay).take_while(|r| r.address == address);
    !policy.kernel.entries.contains_key(key) && !relays.any(is_relayed)
}

/// Returns true if the relay's namespace is found through another entrance now.
fn is_moved(policy: &Policy, key: &RelayKey) -> bool {
    policy.relays.keys().any(|new| new.address == key.address && new.is_beside(key))
}

/// Returns the relays that the kernel takes over from. The entry must be of the relay's own rule: where
/// entries do not name the interface, another network's rule may have that address, too.
fn handed_over(policy: &Policy) -> BTreeSet<&RelayKey> {
    // One that leads to a relay, or to nobody, takes nothing over.
    let steers = |key: &EntryKey| policy.kernel.entries.get(key).is_some_and(|entry| entry.target_port != 0);
    let is_entered = |key: &EntryKey| key.protocol == u16::from(TCP) && steers(key);
    let taken_over = |gateway: &&GatewayOutcome| {
        gateway.outcome.state != State::Blocked && gateway.entry_key.as_ref().is_some_and(is_entered)
    };
    let gateways = policy.outcomes.iter().flat_map(|outcome| &outcome.gateways);
    gateways.filter(taken_over).map(|gateway| &gateway.relay_key).collect()
}

/// Returns the steps from `reality` to `policy`; empty if they agree.
pub fn plan(policy: &Policy, reality: &Reality) -> Vec<Step> {
    let (desired, actual) = (&policy.kernel, &reality.kernel);
    let overrides = changes(&desired.overrides, &actual.overrides);
    let reply_sources = changes(&desired.reply_sources, &actual.reply_sources);
    let entries = changes(&desired.entries, &actual.entries);
    let redirects = changes(&desired.redirects, &actual.redirects);
    let attach = |set| (desired.hooks[set] && !actual.hooks[set]).then_some(Step::AttachHooks(set));
    let detach = |set| (actual.hooks[set] && !desired.hooks[set]).then_some(Step::DetachHooks(set));

    let mut steps = revocations(policy, reality);
    steps.extend(reality.detached.then_some(Step::Attach));
    steps.extend(desired.targets.difference(&actual.targets).copied().map(Step::AddTarget));
    steps.extend(attach(HookSet::Names));
    steps.extend(attach(HookSet::Connect));
    steps.extend(overrides.puts(Step::PutOverride));
    steps.extend(attach(HookSet::Replies));
    steps.extend(reply_sources.puts(Step::PutReplySource));
    steps.extend(registrations(policy, reality));
    steps.extend(relays_to_open(policy, reality));
    steps.extend(detach(HookSet::Connect));
    steps.extend(desired.sources.difference(&actual.sources).copied().map(Step::AddSource));
    steps.extend(entries.puts(Step::PutEntry));
    // The other entries are revoked: no relay replaces them.
    let replaced = entries.remove.into_iter().filter(|key| !is_denied(policy, key));
    steps.extend(replaced.copied().map(Step::RemoveEntry));
    // An override goes after its entry: without an entry, the kernel refuses connections that would look local.
    let revoked = overrides_of_others(policy, reality);
    steps.extend(
        overrides.remove.into_iter().filter(|key| !revoked.contains(key)).copied().map(Step::RemoveOverride),
    );
    let revoked: BTreeSet<_> = sources_of_others(desired, actual).collect();
    let later = actual.sources.difference(&desired.sources).filter(|key| !revoked.contains(key));
    steps.extend(later.copied().map(Step::RemoveSource));
    steps.extend(redirects.puts(Step::PutRedirect));
    steps.extend(relays_to_close(policy, reality));
    steps.extend(detach(HookSet::Names).filter(|_| !reality.name_hooks_in_use));
    steps.extend(reply_sources.remove.into_iter().copied().map(Step::RemoveReplySource));
    steps.extend(detach(HookSet::Replies));
    let is_watched = |key: &&ListenerKey| {
        let (address, port, protocol) = (key.address, key.port, key.protocol.into());
        desired.targets.contains(&TargetKey { address, port, protocol })
    };
    let unwatched = reality.registered.iter().filter(|key| !is_watched(key));
    steps.extend(unwatched.copied().map(Step::Unregister));
    steps.extend(actual.targets.difference(&desired.targets).copied().map(Step::RemoveTarget));
    steps.extend(firewall::steps(policy, reality));
    steps
}

/// Opens the relays that are missing or have another specification.
fn relays_to_open(policy: &Policy, reality: &Reality) -> Vec<Step> {
    // The port of a relay that is found through another entrance now has to be free first.
    let moved = reality.relays.keys().filter(|key| !policy.relays.contains_key(key) && is_moved(policy, key));
    let mut steps: Vec<_> =
        moved.map(|key| Step::CloseRelay { key: key.clone(), handed_over: false }).collect();
    for (key, spec) in &policy.relays {
        let is_reached =
            || !spec.by_entry || key.entry().is_some_and(|entry| reality.relay_sockets.contains(&entry));
        if reality.relays.get(key) != Some(spec) || !is_reached() {
            steps.push(Step::OpenRelay(key.clone(), spec.clone()));
        }
    }
    steps
}

/// Closes the relays that the kernel has taken over from, and those that an entry which refuses replaces.
fn relays_to_close(policy: &Policy, reality: &Reality) -> Vec<Step> {
    let handed_over = handed_over(policy);
    let mut steps = vec![];
    let there = reality.relays.keys().chain(&reality.lingering);
    for key in there.filter(|key| !policy.relays.contains_key(key)) {
        if handed_over.contains(key) && reality.relays.contains_key(key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: true });
        } else if !handed_over.contains(key) && is_refused(policy, key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
        }
    }
    steps
}

/// Fills the free slots of each bound address with its newest sockets. Inode numbers grow, so the newest
/// socket is the last of the list. A socket may be registered twice, which does no harm.
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

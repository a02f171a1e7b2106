//! Plan: the steps from the actual to the desired state ([`Actual`] to [`Desired`]), in an order that leaves
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
//! - a redirect is added after what answers at its gateway, and removed before it; the redirects' hooks are
//!   attached before the redirects, and detached after them;
//! - the firewall is tried last, when everything that answers is in place;
//! - before an accept rule is put, and for as long as the rule or a flow that it let in exists, the kernel
//!   refuses the traffic of that rule that no entry admits.

use std::{collections::BTreeSet, net::SocketAddr};

use lbridge_common::wire::{
    Address, Endpoint, Entry, EntryKey, ListenerKey, OverrideKey, SLOTS, SourceKey, TCP, TargetKey,
};

pub use self::step::{Prerequisite, Step};
use super::{
    actual::Actual,
    desired::{BindScope, Clients, Desired, GatewayOutcome, RelayKey, RelaySpec, State},
    hooks::HookSet,
    kernel_state::{KernelState, changes},
};

pub(super) mod firewall;
mod step;

/// Returns the steps that only take access away, and that depend on nothing new. They come first in every
/// plan, and can be carried out before the firewall is looked at.
pub fn revocations(desired: &Desired, actual: &Actual) -> Vec<Step> {
    let mut steps: Vec<_> =
        sources_of_others(&desired.kernel, &actual.kernel).map(Step::RemoveSource).collect();
    steps.extend(overrides_of_others(desired, actual).into_iter().map(Step::RemoveOverride));
    for (key, there) in &actual.relays {
        let meant = desired.relays.get(key).map(|spec| &spec.clients);
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
    let redirects = changes(&desired.kernel.redirects, &actual.kernel.redirects).remove;
    steps.extend(redirects.into_iter().copied().map(Step::RemoveRedirect));
    let denied = actual.kernel.entries.keys().filter(|key| is_denied(desired, key));
    steps.extend(denied.map(|key| Step::RemoveEntry(*key)));
    let handed_over = handed_over(desired);
    let denied = |key: &&RelayKey| {
        !desired.relays.contains_key(key) && !handed_over.contains(key) && !is_moved(desired, key)
    };
    // Includes relays that linger. Where an entry that refuses replaces a relay, the relay closes after the
    // entry is put.
    for key in actual.relays.keys().chain(&actual.lingering).filter(denied) {
        if !is_refused(desired, key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
        }
    }
    steps
}

/// Returns true if the desired state has an entry that leads to nobody where a relay of a bridge listens.
fn is_refused(desired: &Desired, key: &RelayKey) -> bool {
    let anywhere = key.entry().map(|entry| EntryKey { ifindex: 0, ..entry });
    let entries = key.entry().into_iter().chain(anywhere).filter_map(|key| desired.kernel.entries.get(&key));
    entries.into_iter().any(|entry| entry.target_port == 0 && !entry.has(Entry::RELAYED))
}

/// Returns the sources that may no longer use an entry which stays for other sources. Nothing needs these any
/// more, and the addresses may be other containers' by now.
fn sources_of_others<'a>(
    desired: &'a KernelState,
    actual: &'a KernelState,
) -> impl Iterator<Item = SourceKey> + 'a {
    let stays = |key: &&SourceKey| desired.entries.get(&key.entry).is_some_and(|it| it.has(Entry::LISTED));
    actual.sources.difference(&desired.sources).filter(stays).copied()
}

/// Returns the overrides of single addresses whose holders may be others by now: those at the gateways of
/// entries that are for some sources only.
fn overrides_of_others(desired: &Desired, actual: &Actual) -> BTreeSet<(OverrideKey, u32)> {
    let single = OverrideKey::prefix_len(&Address([u32::MAX; 4]));
    let mut stale = actual
        .kernel
        .overrides
        .keys()
        .filter(|key| key.1 == single && !desired.kernel.overrides.contains_key(key))
        .peekable();
    if stale.peek().is_none() {
        return BTreeSet::new();
    }
    let listed = desired.kernel.entries.values().filter(|entry| entry.has(Entry::LISTED));
    let gateways: BTreeSet<_> =
        listed.map(|entry| Endpoint::new(entry.key.gateway, entry.key.port)).collect();
    stale.filter(|(key, _)| gateways.contains(&key.gateway)).copied().collect()
}

/// Returns true if an entry must be removed and no relay replaces it. Such a relay would have to listen
/// first.
fn is_denied(desired: &Desired, key: &EntryKey) -> bool {
    let address = SocketAddr::new(key.gateway.into(), key.port);
    let is_relayed = |relay: &RelayKey| match relay.place {
        BindScope::Bridge { ifindex, .. } => [0, ifindex].contains(&key.ifindex),
        BindScope::Namespace(_) => false,
    };
    let first = RelayKey { address, place: BindScope::Bridge { interface: String::new(), ifindex: 0 } };
    let mut relays =
        desired.relays.range(first..).map(|(relay, _)| relay).take_while(|r| r.address == address);
    !desired.kernel.entries.contains_key(key) && !relays.any(is_relayed)
}

/// Returns true if the relay's namespace is found through another entrance now.
fn is_moved(desired: &Desired, key: &RelayKey) -> bool {
    desired.relays.keys().any(|new| new.address == key.address && new.is_beside(key))
}

/// Returns the relays that the kernel takes over from. The entry must be of the relay's own rule: where
/// entries do not name the interface, another network's rule may have that address, too.
fn handed_over(desired: &Desired) -> BTreeSet<&RelayKey> {
    // One that leads to a relay, or to nobody, takes nothing over.
    let steers = |key: &EntryKey| desired.kernel.entries.get(key).is_some_and(|entry| entry.target_port != 0);
    let is_entered = |key: &EntryKey| key.protocol == u16::from(TCP) && steers(key);
    let taken_over = |gateway: &&GatewayOutcome| {
        gateway.outcome.state != State::Blocked && gateway.entry_key.as_ref().is_some_and(is_entered)
    };
    let gateways = desired.outcomes.iter().flat_map(|outcome| &outcome.gateways);
    gateways.filter(taken_over).map(|gateway| &gateway.relay_key).collect()
}

/// Returns the steps from `actual` to `desired`; empty if they agree.
pub fn plan(desired: &Desired, actual: &Actual) -> Vec<Step> {
    let (wanted, there) = (&desired.kernel, &actual.kernel);
    let overrides = changes(&wanted.overrides, &there.overrides);
    let reply_sources = changes(&wanted.reply_sources, &there.reply_sources);
    let entries = changes(&wanted.entries, &there.entries);
    let redirects = changes(&wanted.redirects, &there.redirects);
    let attach = |set| (wanted.hooks[set] && !there.hooks[set]).then_some(Step::AttachHooks(set));
    let detach = |set| (there.hooks[set] && !wanted.hooks[set]).then_some(Step::DetachHooks(set));

    let mut steps = revocations(desired, actual);
    steps.extend(actual.detached.then_some(Step::Attach));
    steps.extend(wanted.targets.difference(&there.targets).copied().map(Step::AddTarget));
    steps.extend(attach(HookSet::Names));
    steps.extend(attach(HookSet::Connect));
    steps.extend(overrides.puts(Step::PutOverride));
    steps.extend(attach(HookSet::Replies));
    steps.extend(reply_sources.puts(Step::PutReplySource));
    steps.extend(registrations(desired, actual));
    steps.extend(relays_to_open(desired, actual));
    steps.extend(detach(HookSet::Connect));
    steps.extend(wanted.sources.difference(&there.sources).copied().map(Step::AddSource));
    steps.extend(entries.puts(Step::PutEntry));
    // The other entries are revoked: no relay replaces them.
    let replaced = entries.remove.into_iter().filter(|key| !is_denied(desired, key));
    steps.extend(replaced.copied().map(Step::RemoveEntry));
    // An override goes after its entry: without an entry, the kernel refuses connections that would look
    // local.
    let revoked = overrides_of_others(desired, actual);
    steps.extend(
        overrides.remove.into_iter().filter(|key| !revoked.contains(key)).copied().map(Step::RemoveOverride),
    );
    let revoked: BTreeSet<_> = sources_of_others(wanted, there).collect();
    let later = there.sources.difference(&wanted.sources).filter(|key| !revoked.contains(key));
    steps.extend(later.copied().map(Step::RemoveSource));
    steps.extend(redirects.puts(Step::PutRedirect));
    steps.extend(relays_to_close(desired, actual));
    steps.extend(detach(HookSet::Names).filter(|_| !actual.name_hooks_in_use));
    steps.extend(reply_sources.remove.into_iter().copied().map(Step::RemoveReplySource));
    steps.extend(detach(HookSet::Replies));
    let is_watched = |key: &&ListenerKey| {
        let (address, port, protocol) = (key.address, key.port, key.protocol.into());
        wanted.targets.contains(&TargetKey { address, port, protocol })
    };
    let unwatched = actual.registered.iter().filter(|key| !is_watched(key));
    steps.extend(unwatched.copied().map(Step::Unregister));
    steps.extend(there.targets.difference(&wanted.targets).copied().map(Step::RemoveTarget));
    steps.extend(firewall::steps(desired, actual));
    steps
}

/// Opens the relays that are missing or have another specification.
fn relays_to_open(desired: &Desired, actual: &Actual) -> Vec<Step> {
    // The port of a relay that is found through another entrance now has to be free first.
    let moved =
        actual.relays.keys().filter(|key| !desired.relays.contains_key(key) && is_moved(desired, key));
    let mut steps: Vec<_> =
        moved.map(|key| Step::CloseRelay { key: key.clone(), handed_over: false }).collect();
    for (key, spec) in &desired.relays {
        let is_reached =
            || !spec.by_entry || key.entry().is_some_and(|entry| actual.relay_sockets.contains(&entry));
        if actual.relays.get(key) != Some(spec) || !is_reached() {
            steps.push(Step::OpenRelay(key.clone(), spec.clone()));
        }
    }
    steps
}

/// Closes the relays that the kernel has taken over from, and those that an entry which refuses replaces.
fn relays_to_close(desired: &Desired, actual: &Actual) -> Vec<Step> {
    let handed_over = handed_over(desired);
    let mut steps = vec![];
    let there = actual.relays.keys().chain(&actual.lingering);
    for key in there.filter(|key| !desired.relays.contains_key(key)) {
        if handed_over.contains(key) && actual.relays.contains_key(key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: true });
        } else if !handed_over.contains(key) && is_refused(desired, key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
        }
    }
    steps
}

/// Fills the free slots of each bound address with its newest sockets. Inode numbers grow, so the newest
/// socket is the last of the list. A socket may be registered twice, which does no harm.
fn registrations(desired: &Desired, actual: &Actual) -> Vec<Step> {
    let mut steps = vec![];
    for (bound, inodes) in &desired.listeners {
        let keys = (0..SLOTS).map(|slot| ListenerKey { slot, ..*bound });
        let free: Vec<_> = keys.filter(|key| !actual.registered.contains(key)).collect();
        let missing = inodes.len().min(usize::from(SLOTS)).saturating_sub(usize::from(SLOTS) - free.len());
        let newest = inodes.iter().rev().take(missing);
        steps.extend(free.into_iter().zip(newest).map(|(key, inode)| Step::Register { key, inode: *inode }));
    }
    steps
}

//! KernelState: the contents of the kernel's maps that steps put and remove, the same type for the desired
//! and the actual state, and the comparison of the two.

use std::collections::{BTreeMap, BTreeSet};

use lbridge_common::wire::{
    Entry, EntryKey, NameOverride, OverrideKey, Redirect, RedirectKey, ReplySource, ReplySourceKey,
    SourceKey, TargetKey,
};

use super::hooks::PerHookSet;

/// The contents of the kernel's maps, without what the kernel itself writes: counts and listeners.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelState {
    /// Addresses and ports whose listeners the kernel registers or reports.
    pub targets: BTreeSet<TargetKey>,
    /// Entries: the target of each dialled address and port.
    pub entries: BTreeMap<EntryKey, Entry>,
    /// Sources that may use the entries that are not for their whole network.
    pub sources: BTreeSet<SourceKey>,
    /// Overrides: gateways that look local to the service, with the length of the key's prefix in bits.
    pub overrides: BTreeMap<(OverrideKey, u32), NameOverride>,
    /// Sources of the replies of UDP services, with the length of the key's prefix in bits.
    pub reply_sources: BTreeMap<(ReplySourceKey, u32), ReplySource>,
    /// Redirects: addresses of the containers' localhost that lead to their gateway.
    pub redirects: BTreeMap<RedirectKey, Redirect>,
    /// For each set of hooks, true if it is needed, or attached.
    pub hooks: PerHookSet<bool>,
}

/// The difference between a desired and an actual map.
#[derive(Debug)]
pub(super) struct Changes<'a, K, V> {
    /// Keys that are missing or have another value, with the desired value.
    pub(super) put: Vec<(&'a K, &'a V)>,
    /// Keys that should not be there.
    pub(super) remove: Vec<&'a K>,
}

/// Compares a desired map to the actual one.
pub(super) fn changes<'a, K: Ord, V: PartialEq>(
    desired: &'a BTreeMap<K, V>,
    actual: &'a BTreeMap<K, V>,
) -> Changes<'a, K, V> {
    Changes {
        put: desired.iter().filter(|(key, value)| actual.get(key) != Some(value)).collect(),
        remove: actual.keys().filter(|key| !desired.contains_key(key)).collect(),
    }
}

impl<K: Copy, V: Copy> Changes<'_, K, V> {
    /// Creates a step with `make` for each key to put.
    pub(super) fn puts<S>(&self, make: impl Fn(K, V) -> S) -> impl Iterator<Item = S> {
        self.put.iter().map(move |(key, value)| make(**key, **value))
    }
}

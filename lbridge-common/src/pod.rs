//! pod: declares the map types as plain data for aya. No other module does.

use crate::wire::{
    AcceptedKey, Address, CountedEntry, Endpoint, EntryKey, ListenerKey, NameOverride, OverrideKey,
    ProberKey, Redirect, RedirectKey, RedirectedNetns, RelayPeer, RelayPeerKey, ReplySource, ReplySourceKey,
    SourceKey, TargetKey,
};

macro_rules! pod {
    ($($type:ty),+ $(,)?) => {
        $(
            // SAFETY: `repr(C)` integers only, every byte initialised; the const asserts of `wire` rule out
            // padding.
            unsafe impl aya::Pod for $type {}
        )+
    };
}

pod!(
    AcceptedKey,
    Address,
    CountedEntry,
    Redirect,
    RedirectKey,
    Endpoint,
    RedirectedNetns,
    ListenerKey,
    NameOverride,
    ProberKey,
    RelayPeer,
    RelayPeerKey,
    ReplySource,
    ReplySourceKey,
    EntryKey,
    SourceKey,
    TargetKey,
    OverrideKey,
);

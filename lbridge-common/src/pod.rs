//! pod: declares the map types as plain data for aya. No other module does.

use crate::wire::{
    AcceptedKey, Address, CountedEntry, Dial, DialKey, Endpoint, Guest, ListenerKey, LoopbackView, ProberKey,
    RelayPeer, RelayPeerKey, Reply, ReplyKey, RuleKey, SourceKey, TargetKey, ViewKey,
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
    Dial,
    DialKey,
    Endpoint,
    Guest,
    ListenerKey,
    LoopbackView,
    ProberKey,
    RelayPeer,
    RelayPeerKey,
    Reply,
    ReplyKey,
    RuleKey,
    SourceKey,
    TargetKey,
    ViewKey,
);

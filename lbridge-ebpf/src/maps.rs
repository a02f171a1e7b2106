//! The statics that live in the kernel. The Rust names are the map names, see `lbridge_common::symbols`.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{HashMap, LpmTrie, PerCpuArray, RingBuf, SockHash, lpm_trie::Key},
};
use lbridge_common::wire::{
    AcceptedKey, Address, Counter, Dial, DialKey, Endpoint, Guest, ListenerEvent, ListenerKey, LoopbackView,
    MAX_GUESTS, MAX_LISTENERS, MAX_PROBERS, MAX_RELAY_PEERS, MAX_RULES, MAX_TARGETS, ProberKey, RelayPeer,
    RelayPeerKey, Reply, ReplyKey, RuleKey, RuleValue, SourceKey, TargetKey, ViewKey,
};

// Not preallocated: an empty map costs nothing.
#[map]
pub static RULES: HashMap<RuleKey, RuleValue> = HashMap::with_max_entries(MAX_RULES, BPF_F_NO_PREALLOC);
#[map]
pub static SOURCES: HashMap<SourceKey, u8> = HashMap::with_max_entries(MAX_RULES, BPF_F_NO_PREALLOC);
#[map]
static ACCEPTED: LpmTrie<AcceptedKey, u8> = LpmTrie::with_max_entries(MAX_RULES, BPF_F_NO_PREALLOC);
#[map]
pub static TARGETS: HashMap<TargetKey, u8> = HashMap::with_max_entries(MAX_TARGETS, BPF_F_NO_PREALLOC);
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(MAX_LISTENERS, 0);
#[map]
pub static RELAYS: SockHash<RuleKey> = SockHash::with_max_entries(MAX_LISTENERS, 0);
#[map]
static LOOPBACK_VIEWS: LpmTrie<ViewKey, LoopbackView> =
    LpmTrie::with_max_entries(MAX_RULES, BPF_F_NO_PREALLOC);
#[map]
static GUESTS: HashMap<u64, Guest> = HashMap::with_max_entries(MAX_GUESTS, BPF_F_NO_PREALLOC);
#[map]
static DIALS: HashMap<DialKey, Dial> = HashMap::with_max_entries(MAX_RULES, BPF_F_NO_PREALLOC);
#[map]
static REPLIES: LpmTrie<ReplyKey, Reply> = LpmTrie::with_max_entries(MAX_RULES, BPF_F_NO_PREALLOC);
#[map]
pub static PROBERS: HashMap<ProberKey, u8> = HashMap::with_max_entries(MAX_PROBERS, BPF_F_NO_PREALLOC);
#[map]
pub static PROBES: HashMap<RuleKey, u64> = HashMap::with_max_entries(MAX_RULES, BPF_F_NO_PREALLOC);
// No LRU: an entry that went while its connection lives would show the service a local peer. Where it is full a relay
// gives up the connection instead.
#[map]
pub static RELAY_PEERS: HashMap<RelayPeerKey, RelayPeer> =
    HashMap::with_max_entries(MAX_RELAY_PEERS, BPF_F_NO_PREALLOC);
#[map]
pub static RELAY_CONNECTS: HashMap<u64, Endpoint> =
    HashMap::with_max_entries(MAX_RELAY_PEERS, BPF_F_NO_PREALLOC);
/// Lives as long as the service's socket, whatever becomes of the relay and its end.
#[btf_map]
pub static PEER_NAMES: SkStorage<Endpoint> = SkStorage::new();
/// What the service's own end is shown as, for a connection that looks local. Lives as long as the service's socket.
#[btf_map]
pub static LOOPBACK_NAMES: SkStorage<Endpoint> = SkStorage::new();
/// Lives as long as the container's socket.
#[btf_map]
pub static DIALLED: SkStorage<Dial> = SkStorage::new();
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

#[unsafe(no_mangle)]
static HOST_NETNS: Global<u64> = Global::new(0);

/// Cookie of the network namespace that is "the host"; 0 where the kernel does not tell it.
#[inline(always)]
pub fn host_netns() -> u64 {
    HOST_NETNS.load()
}

/// How connections to `gateway` from `peer` look to the service, if otherwise than they are.
#[inline(always)]
pub fn loopback_view(gateway: &Endpoint, peer: &Address) -> Option<LoopbackView> {
    let key = ViewKey { gateway: *gateway, peer: *peer };
    let view = LOOPBACK_VIEWS.get(Key::new(ViewKey::BITS, key)).copied()?;
    (view.gateway == *gateway).then_some(view)
}

/// Returns true if an accept rule lets such a packet through the firewall. The value is not looked at: what was found matched.
#[inline(always)]
pub fn is_accepted(packet: AcceptedKey) -> bool {
    ACCEPTED.get(Key::new(AcceptedKey::BITS, packet)).is_some()
}

/// The bridges of a namespace whose localhost may lead to the host.
#[inline(always)]
pub fn guest(netns: u64) -> Option<Guest> {
    // SAFETY: memory of the map stays readable while the program runs. It is copied, and the copy must be this key's: the kernel
    // may reuse a removed element's at once.
    let guest = unsafe { GUESTS.get(netns) }.copied()?;
    (guest.netns == netns).then_some(guest)
}

/// Where what is dialled leads.
#[inline(always)]
pub fn dial(key: &DialKey) -> Option<Dial> {
    // SAFETY: as above.
    let dial = unsafe { DIALS.get(key) }.copied()?;
    (dial.key == *key).then_some(dial)
}

/// The source that datagrams from `service` to `peer` are to leave with, if another than the service's.
#[inline(always)]
pub fn reply_source(service: &Endpoint, peer: &Address) -> Option<Address> {
    let key = ReplyKey { service: *service, peer: *peer };
    let reply = REPLIES.get(Key::new(ReplyKey::BITS, key)).copied()?;
    (reply.service == *service && !reply.gateway.is_unspecified()).then_some(reply.gateway)
}

/// The client behind a relayed connection, by the relay's end and the service's.
#[inline(always)]
pub fn relay_peer(key: &RelayPeerKey) -> Option<RelayPeer> {
    // SAFETY: memory of the map stays readable while the program runs. It is copied, and the copy must be this key's.
    unsafe { RELAY_PEERS.get(key) }.copied().filter(|peer| peer.key == *key)
}

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: this CPU's own slot, valid while the program runs; no program here is interrupted by another that
        // writes the same slot but on a kernel with preemptible BPF, where a count may get lost.
        unsafe { *value += 1 };
    }
}

/// Wakes the daemon. A full buffer loses nothing but the wake-up: the daemon looks at the sockets themselves.
#[inline(always)]
pub fn emit(event: ListenerEvent) {
    let _ = EVENTS.output::<ListenerEvent>(&event, 0);
}

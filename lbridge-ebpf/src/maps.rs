//! maps: the maps and globals that the kernel holds. Their Rust names are the map names, see
//! `lbridge_common::symbols`.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{HashMap, LpmTrie, PerCpuArray, RingBuf, SockHash, lpm_trie::Key},
};
use lbridge_common::wire::{
    AcceptedKey, Address, CountedEntry, Counter, Dial, DialKey, Endpoint, Guest, ListenerEvent, ListenerKey,
    LoopbackView, MAX_GUESTS, MAX_LISTENERS, MAX_PROBERS, MAX_RELAY_PEERS, MAX_RULES, MAX_TARGETS, ProberKey,
    RelayPeer, RelayPeerKey, Reply, ReplyKey, RuleKey, SourceKey, TargetKey, ViewKey,
};

// Not preallocated: an empty map uses no memory for elements.
#[map]
pub static RULES: HashMap<RuleKey, CountedEntry> = HashMap::with_max_entries(MAX_RULES, BPF_F_NO_PREALLOC);
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
// Not an LRU map: an entry evicted while its connection lives would make the service see a local peer. If the
// map is full, a relay gives up the connection instead.
#[map]
pub static RELAY_PEERS: HashMap<RelayPeerKey, RelayPeer> =
    HashMap::with_max_entries(MAX_RELAY_PEERS, BPF_F_NO_PREALLOC);
#[map]
pub static RELAY_CONNECTS: HashMap<u64, Endpoint> =
    HashMap::with_max_entries(MAX_RELAY_PEERS, BPF_F_NO_PREALLOC);
/// The container's endpoint, per service socket. It lives as long as that socket, even if the relay and its
/// socket are gone.
#[btf_map]
pub static PEER_NAMES: SkStorage<Endpoint> = SkStorage::new();
/// The endpoint that a service sees as its own end, for a connection that looks local. It lives as long as
/// the service's socket.
#[btf_map]
pub static LOOPBACK_NAMES: SkStorage<Endpoint> = SkStorage::new();
/// The dial that a container's socket used. It lives as long as that socket.
#[btf_map]
pub static DIALLED: SkStorage<Dial> = SkStorage::new();
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

#[unsafe(no_mangle)]
static HOST_NETNS: Global<u64> = Global::new(0);

/// Returns the cookie of the host's network namespace; 0 if the kernel does not provide it.
#[inline(always)]
pub fn host_netns() -> u64 {
    HOST_NETNS.load()
}

/// Returns the view for connections to `gateway` from `peer`; `None` if the service sees their real ends.
#[inline(always)]
pub fn loopback_view(gateway: &Endpoint, peer: &Address) -> Option<LoopbackView> {
    let key = ViewKey { gateway: *gateway, peer: *peer };
    let view = LOOPBACK_VIEWS.get(Key::new(ViewKey::BITS, key)).copied()?;
    (view.gateway == *gateway).then_some(view)
}

/// Returns true if an accept rule lets such a packet through the firewall. The value is ignored: an element
/// that is found has matched.
#[inline(always)]
pub fn is_accepted(packet: AcceptedKey) -> bool {
    ACCEPTED.get(Key::new(AcceptedKey::BITS, packet)).is_some()
}

/// Returns the guest with this namespace cookie, and its bridges; `None` if its localhost leads nowhere.
#[inline(always)]
pub fn guest(netns: u64) -> Option<Guest> {
    // SAFETY: the map's memory stays readable while the program runs. The value is copied, and the copy must
    // belong to this key: the kernel may reuse a removed element's memory at once.
    let guest = unsafe { GUESTS.get(netns) }.copied()?;
    (guest.netns == netns).then_some(guest)
}

/// Returns the dial for this key: the gateway that the dialled address leads to.
#[inline(always)]
pub fn dial(key: &DialKey) -> Option<Dial> {
    // SAFETY: as in `guest`.
    let dial = unsafe { DIALS.get(key) }.copied()?;
    (dial.key == *key).then_some(dial)
}

/// Returns the source address that datagrams from `service` to `peer` must leave with; `None` if it does not
/// change.
#[inline(always)]
pub fn reply_source(service: &Endpoint, peer: &Address) -> Option<Address> {
    let key = ReplyKey { service: *service, peer: *peer };
    let reply = REPLIES.get(Key::new(ReplyKey::BITS, key)).copied()?;
    (reply.service == *service && !reply.gateway.is_unspecified()).then_some(reply.gateway)
}

/// Returns the client behind a relayed connection, given the relay's end and the service's.
#[inline(always)]
pub fn relay_peer(key: &RelayPeerKey) -> Option<RelayPeer> {
    // SAFETY: the map's memory stays readable while the program runs. The value is copied, and the copy must
    // belong to this key.
    unsafe { RELAY_PEERS.get(key) }.copied().filter(|peer| peer.key == *key)
}

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: this CPU's own slot, valid while the program runs. Another program that writes the same
        // slot can interrupt this one only on a kernel with preemptible BPF, where a count may get lost.
        unsafe { *value += 1 };
    }
}

/// Wakes the daemon. If the buffer is full, only the wake-up is lost: the daemon inspects the sockets
/// themselves.
#[inline(always)]
pub fn emit(event: ListenerEvent) {
    let _ = EVENTS.output::<ListenerEvent>(&event, 0);
}

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
    AcceptedKey, Address, CountedEntry, Counter, Endpoint, EntryKey, ListenerEvent, ListenerKey, MAX_ENTRIES,
    MAX_LISTENERS, MAX_PROBERS, MAX_REDIRECT_NETNS, MAX_RELAY_PEERS, MAX_TARGETS, NameOverride, OverrideKey,
    ProberKey, Redirect, RedirectKey, RedirectedNetns, RelayPeer, RelayPeerKey, ReplySource, ReplySourceKey,
    SourceKey, TargetKey,
};

// Not preallocated: an empty map uses no memory for elements.
/// Entries: the target of each dialled address and port. The daemon's loop writes them; `steer` counts.
#[map]
pub static ENTRIES: HashMap<EntryKey, CountedEntry> =
    HashMap::with_max_entries(MAX_ENTRIES, BPF_F_NO_PREALLOC);
/// Sources that may use an entry with [`Entry::LISTED`](lbridge_common::wire::Entry::LISTED), each to 1. The
/// daemon's source gate writes them.
#[map]
pub static SOURCES: HashMap<SourceKey, u8> = HashMap::with_max_entries(MAX_ENTRIES, BPF_F_NO_PREALLOC);
/// Traffic that lbridge's accept rules let through the firewall, to 1. The daemon's loop writes it.
#[map]
static ACCEPTED: LpmTrie<AcceptedKey, u8> = LpmTrie::with_max_entries(MAX_ENTRIES, BPF_F_NO_PREALLOC);
/// Bound addresses and ports whose listeners are registered, each to 1. The daemon's loop writes them.
#[map]
pub static TARGETS: HashMap<TargetKey, u8> = HashMap::with_max_entries(MAX_TARGETS, BPF_F_NO_PREALLOC);
/// Registered listening sockets. `register` writes them as they begin to listen, the daemon those that were
/// there before, and UDP sockets; the kernel removes those that close.
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(MAX_LISTENERS, 0);
/// Listening sockets of the daemon's relays, by the entry that leads there. The daemon's loop writes them.
#[map]
pub static RELAYS: SockHash<EntryKey> = SockHash::with_max_entries(MAX_LISTENERS, 0);
/// Gateways whose connections look local to the service (`--source loopback`). The daemon's loop writes them.
#[map]
static NAME_OVERRIDES: LpmTrie<OverrideKey, NameOverride> =
    LpmTrie::with_max_entries(MAX_ENTRIES, BPF_F_NO_PREALLOC);
/// Network namespaces whose localhost may lead to the host, by cookie. The daemon's thread `guests` writes
/// them.
#[map]
static REDIRECT_NETNS: HashMap<u64, RedirectedNetns> =
    HashMap::with_max_entries(MAX_REDIRECT_NETNS, BPF_F_NO_PREALLOC);
/// Connect redirects: addresses of containers' localhost, to the gateway. The daemon's loop writes them.
#[map]
static REDIRECTS: HashMap<RedirectKey, Redirect> = HashMap::with_max_entries(MAX_ENTRIES, BPF_F_NO_PREALLOC);
/// Source addresses of UDP services' replies. The daemon's loop writes them.
#[map]
static REPLY_SOURCES: LpmTrie<ReplySourceKey, ReplySource> =
    LpmTrie::with_max_entries(MAX_ENTRIES, BPF_F_NO_PREALLOC);
/// Source addresses of the daemon's own probes, each to 1. The daemon writes them while it probes.
#[map]
pub static PROBERS: HashMap<ProberKey, u8> = HashMap::with_max_entries(MAX_PROBERS, BPF_F_NO_PREALLOC);
/// Numbers of probe datagrams that arrived, by entry. The daemon adds a key, `steer` counts.
#[map]
pub static PROBES: HashMap<EntryKey, u64> = HashMap::with_max_entries(MAX_ENTRIES, BPF_F_NO_PREALLOC);
/// Relayed connections, by both ends, to the container behind each. `register` and `announce` write them when
/// the relay's socket connects, and remove them when it closes.
// Not an LRU map: an entry evicted while its connection lives would make the service see a local peer. If the
// map is full, a relay gives up the connection instead.
#[map]
pub static RELAY_PEERS: HashMap<RelayPeerKey, RelayPeer> =
    HashMap::with_max_entries(MAX_RELAY_PEERS, BPF_F_NO_PREALLOC);
/// Sockets of relays that are about to connect, by cookie, to the container's end. The relay writes them.
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
/// The redirect that a container's socket used. It lives as long as that socket.
#[btf_map]
pub static ORIGINAL_DST: SkStorage<Redirect> = SkStorage::new();
/// Counters of outcomes, per CPU, by [`Counter`]. Every program counts.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::COUNT, 0);
/// Events of listeners, for the daemon. `register` and `announce` write them.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

#[unsafe(no_mangle)]
static HOST_NETNS: Global<u64> = Global::new(0);

/// Returns the cookie of the host's network namespace; 0 if the kernel does not provide it.
#[inline(always)]
pub fn host_netns() -> u64 {
    HOST_NETNS.load()
}

/// Returns the override for connections to `gateway` from `peer`; `None` if the service sees their real ends.
#[inline(always)]
pub fn name_override(gateway: &Endpoint, peer: &Address) -> Option<NameOverride> {
    let key = OverrideKey { gateway: *gateway, peer: *peer };
    let names = NAME_OVERRIDES.get(Key::new(OverrideKey::BITS, key)).copied()?;
    (names.gateway == *gateway).then_some(names)
}

/// Returns true if an accept rule lets such a packet through the firewall. The value is ignored: an element
/// that is found has matched.
#[inline(always)]
pub fn is_accepted(packet: AcceptedKey) -> bool {
    ACCEPTED.get(Key::new(AcceptedKey::BITS, packet)).is_some()
}

/// Returns the guest with this namespace cookie, and its bridges; `None` if its localhost leads nowhere.
#[inline(always)]
pub fn guest(netns: u64) -> Option<RedirectedNetns> {
    // SAFETY: the map's memory stays readable while the program runs. The value is copied, and the copy must
    // belong to this key: the kernel may reuse a removed element's memory at once.
    let guest = unsafe { REDIRECT_NETNS.get(netns) }.copied()?;
    (guest.netns == netns).then_some(guest)
}

/// Returns the redirect for this key: the gateway that the dialled address leads to.
#[inline(always)]
pub fn redirect(key: &RedirectKey) -> Option<Redirect> {
    // SAFETY: as in `guest`.
    let redirect = unsafe { REDIRECTS.get(key) }.copied()?;
    (redirect.key == *key).then_some(redirect)
}

/// Returns the source address that datagrams from `service` to `peer` must leave with; `None` if it does not
/// change.
#[inline(always)]
pub fn reply_source(service: &Endpoint, peer: &Address) -> Option<Address> {
    let key = ReplySourceKey { service: *service, peer: *peer };
    let reply = REPLY_SOURCES.get(Key::new(ReplySourceKey::BITS, key)).copied()?;
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

//! Maps: typed access to the maps, and the events that wake the daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::Hash,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, bail};
use aya::{
    Ebpf, Pod,
    maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, RingBuf, SockHash, lpm_trie::Key},
};
use lbridge_common::{
    symbols,
    wire::{
        AcceptedKey, CountedEntry, Counter, Endpoint, Entry, EntryKey, ListenerEvent, ListenerKey,
        NameOverride, OverrideKey, ProberKey, Redirect, RedirectKey, RedirectedNetns, RelayPeer,
        RelayPeerKey, ReplySource, ReplySourceKey, SourceKey, TargetKey,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

/// Flag of an update: insert only if there is no such key (include/uapi/linux/bpf.h).
const BPF_NOEXIST: u64 = 1;

/// The maps that userspace reads and writes.
pub struct Maps {
    entries: HashMap<MapData, EntryKey, CountedEntry>,
    /// The map `SOURCES`, only to be read; [`Sources`] changes it.
    sources: HashMap<MapData, SourceKey, u8>,
    accepted: LpmTrie<MapData, AcceptedKey, u8>,
    targets: HashMap<MapData, TargetKey, u8>,
    listeners: SockHash<MapData, ListenerKey>,
    relays: SockHash<MapData, EntryKey>,
    redirects: HashMap<MapData, RedirectKey, Redirect>,
    overrides: LpmTrie<MapData, OverrideKey, NameOverride>,
    reply_sources: LpmTrie<MapData, ReplySourceKey, ReplySource>,
    counters: PerCpuArray<MapData, u64>,
    /// The daemon's own probes of the firewall.
    pub probes: Probes,
    /// Names of the containers behind relayed connections. Shared with the relays, which enter and remove
    /// their own.
    pub peers: RelayNames,
}

// aya's maps do not implement it.
impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

fn taken<M: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, name: &str) -> anyhow::Result<M> {
    let map = object.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))?;
    M::try_from(map).with_context(|| format!("map {name} is of another kind"))
}

/// Takes a map for two owners, each with a descriptor of its own, so that reading all of it does not hold up
/// changes.
fn taken_twice<M: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, name: &str) -> anyhow::Result<(M, M)> {
    let map = object.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))?;
    let Map::HashMap(first) = map else { bail!("map {name} is of another kind") };
    let descriptor = first.fd().as_fd().try_clone_to_owned()?;
    let second = MapData::from_fd(descriptor).with_context(|| format!("failed to open map {name} again"))?;
    let kind = || format!("map {name} is of another kind");
    let [first, second] = [first, second].map(|data| M::try_from(Map::HashMap(data)).with_context(kind));
    Ok((first?, second?))
}

fn collected<K: Pod + Ord + Hash, V: Pod>(map: &HashMap<MapData, K, V>) -> Result<BTreeMap<K, V>, MapError> {
    map.iter().collect()
}

impl Maps {
    pub(super) fn take(object: &mut Ebpf) -> anyhow::Result<(Self, Sources)> {
        let (sources, owned) = taken_twice(object, symbols::SOURCES)?;
        let maps = Self {
            entries: taken(object, symbols::ENTRIES)?,
            sources,
            accepted: taken(object, symbols::ACCEPTED)?,
            targets: taken(object, symbols::TARGETS)?,
            listeners: taken(object, symbols::LISTENERS)?,
            relays: taken(object, symbols::RELAYS)?,
            redirects: taken(object, symbols::REDIRECTS)?,
            overrides: taken(object, symbols::NAME_OVERRIDES)?,
            reply_sources: taken(object, symbols::REPLY_SOURCES)?,
            counters: taken(object, symbols::COUNTERS)?,
            probes: Probes(Arc::new(Mutex::new(ProbeMaps {
                sources: taken(object, symbols::PROBERS)?,
                arrived: taken(object, symbols::PROBES)?,
            }))),
            peers: RelayNames(Arc::new(Mutex::new(NameMaps {
                connects: taken(object, symbols::RELAY_CONNECTS)?,
                peers: taken(object, symbols::RELAY_PEERS)?,
            }))),
        };
        Ok((maps, Sources(owned)))
    }

    /// Reads the entries, and the number of connections that each has steered.
    pub fn entries(&self) -> anyhow::Result<(BTreeMap<EntryKey, Entry>, BTreeMap<EntryKey, u64>)> {
        let counted = collected(&self.entries).context("failed to read map ENTRIES")?;
        Ok(counted.iter().map(|(key, it)| ((*key, it.entry), (*key, it.steered))).unzip())
    }

    /// Puts or replaces an entry; a lookup meets the old one or the new one, never none. The count restarts.
    pub fn put_entry(&mut self, key: &EntryKey, entry: Entry) -> anyhow::Result<()> {
        self.entries.insert(key, CountedEntry { entry, steered: 0 }, 0).context("failed to write map ENTRIES")
    }

    /// Removes an entry; does nothing if it is not there.
    pub fn remove_entry(&mut self, key: &EntryKey) -> anyhow::Result<()> {
        or_absent(self.entries.remove(key)).context("failed to delete from map ENTRIES")
    }

    /// Lists the addresses and ports whose listeners are registered.
    pub fn targets(&self) -> anyhow::Result<BTreeSet<TargetKey>> {
        let ports: Result<_, MapError> = self.targets.keys().collect();
        ports.context("failed to read map TARGETS")
    }

    /// Starts watching a port at an address.
    pub fn add_target(&mut self, key: &TargetKey) -> anyhow::Result<()> {
        self.targets.insert(key, 1, 0).context("failed to write map TARGETS")
    }

    /// Stops watching a port at an address; does nothing if it is not watched.
    pub fn remove_target(&mut self, key: &TargetKey) -> anyhow::Result<()> {
        or_absent(self.targets.remove(key)).context("failed to delete from map TARGETS")
    }

    /// Lists the addresses that may use the entries that are not for all, each with its entry.
    pub fn sources(&self) -> anyhow::Result<BTreeSet<SourceKey>> {
        let keys: Result<_, MapError> = self.sources.keys().collect();
        keys.context("failed to read map SOURCES")
    }

    /// Lists what accept rules let in, each key with the number of its leading bits that count.
    pub fn accepted(&self) -> anyhow::Result<BTreeSet<(AcceptedKey, u32)>> {
        let keys = self.accepted.keys().map(|key| key.map(|key| (key.data(), key.prefix_len())));
        keys.collect::<Result<_, MapError>>().context("failed to read map ACCEPTED")
    }

    /// Makes the kernel refuse what an accept rule lets in, unless an entry admits it.
    pub fn add_accepted(&mut self, (key, bits): (AcceptedKey, u32)) -> anyhow::Result<()> {
        self.accepted.insert(&Key::new(bits, key), 1, 0).context("failed to write map ACCEPTED")
    }

    /// Makes the kernel let it pass again; does nothing if the key is not there.
    pub fn remove_accepted(&mut self, (key, bits): (AcceptedKey, u32)) -> anyhow::Result<()> {
        or_absent(self.accepted.remove(&Key::new(bits, key))).context("failed to delete from map ACCEPTED")
    }

    /// Lists the redirects: what containers dial, and the gateway that each leads to.
    pub fn redirects(&self) -> anyhow::Result<BTreeMap<RedirectKey, Redirect>> {
        collected(&self.redirects).context("failed to read map REDIRECTS")
    }

    /// Puts a redirect, which leads to its gateway.
    pub fn put_redirect(&mut self, key: &RedirectKey, redirect: &Redirect) -> anyhow::Result<()> {
        self.redirects.insert(key, redirect, 0).context("failed to write map REDIRECTS")
    }

    /// Removes a redirect, so that its address is not redirected; does nothing if it is not there.
    pub fn remove_redirect(&mut self, key: &RedirectKey) -> anyhow::Result<()> {
        or_absent(self.redirects.remove(key)).context("failed to delete from map REDIRECTS")
    }

    /// Lists the overrides, which make gateways look local, each with the number of leading bits of the key
    /// that count.
    pub fn overrides(&self) -> anyhow::Result<BTreeMap<(OverrideKey, u32), NameOverride>> {
        let overrides = self
            .overrides
            .iter()
            .map(|entry| entry.map(|(key, names)| ((key.data(), key.prefix_len()), names)));
        overrides.collect::<Result<_, MapError>>().context("failed to read map NAME_OVERRIDES")
    }

    /// Puts an override, which makes a gateway's connections look local.
    pub fn put_override(
        &mut self,
        (key, bits): (OverrideKey, u32),
        names: &NameOverride,
    ) -> anyhow::Result<()> {
        self.overrides.insert(&Key::new(bits, key), names, 0).context("failed to write map NAME_OVERRIDES")
    }

    /// Removes an override, so that a gateway's connections look as they are; does nothing if it is not
    /// there.
    pub fn remove_override(&mut self, (key, bits): (OverrideKey, u32)) -> anyhow::Result<()> {
        or_absent(self.overrides.remove(&Key::new(bits, key)))
            .context("failed to delete from map NAME_OVERRIDES")
    }

    /// Lists the sources of UDP services' datagrams, each with the number of leading bits of the key that
    /// count.
    pub fn reply_sources(&self) -> anyhow::Result<BTreeMap<(ReplySourceKey, u32), ReplySource>> {
        let reply_sources = self
            .reply_sources
            .iter()
            .map(|entry| entry.map(|(key, reply)| ((key.data(), key.prefix_len()), reply)));
        reply_sources.collect::<Result<_, MapError>>().context("failed to read map REPLY_SOURCES")
    }

    /// Makes a service's datagrams leave with a gateway as their source.
    pub fn put_reply_source(
        &mut self,
        (key, bits): (ReplySourceKey, u32),
        reply: &ReplySource,
    ) -> anyhow::Result<()> {
        self.reply_sources.insert(&Key::new(bits, key), reply, 0).context("failed to write map REPLY_SOURCES")
    }

    /// Makes a service's datagrams leave as they are; does nothing if the key is not there.
    pub fn remove_reply_source(&mut self, (key, bits): (ReplySourceKey, u32)) -> anyhow::Result<()> {
        or_absent(self.reply_sources.remove(&Key::new(bits, key)))
            .context("failed to delete from map REPLY_SOURCES")
    }

    /// Lists the keys under which a listener is registered now. The kernel removes them as sockets close.
    pub fn registered(&self) -> anyhow::Result<BTreeSet<ListenerKey>> {
        let keys: Result<_, MapError> = self.listeners.keys().collect();
        keys.context("failed to read map LISTENERS")
    }

    /// Registers a listening socket, unless the kernel program has taken the slot for another. The error's
    /// chain holds an errno of the kernel's as an [`std::io::Error`].
    pub fn register(&mut self, key: ListenerKey, socket: &impl AsFd) -> anyhow::Result<()> {
        match self.listeners.insert(key, socket.as_fd().as_raw_fd(), BPF_NOEXIST) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => {
                Ok(())
            }
            done => done.context("the kernel refused to register the listener"),
        }
    }

    /// Unregisters a listener; does nothing if it is gone already.
    pub fn unregister(&mut self, key: &ListenerKey) -> anyhow::Result<()> {
        match self.listeners.remove(key) {
            // SOCKHASH's error for a missing key (net/core/sock_map.c).
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
                Ok(())
            }
            done => done.context("failed to delete from map LISTENERS"),
        }
    }

    /// Lists the keys of the entries whose relay the kernel can reach now. It removes them as sockets close.
    pub fn relays(&self) -> anyhow::Result<BTreeSet<EntryKey>> {
        let keys: Result<_, MapError> = self.relays.keys().collect();
        keys.context("failed to read map RELAYS")
    }

    /// Makes an entry's connections lead to the listening socket of its relay.
    pub fn put_relay(&mut self, key: EntryKey, socket: &impl AsFd) -> anyhow::Result<()> {
        self.relays.insert(key, socket.as_fd().as_raw_fd(), 0).context("failed to write map RELAYS")
    }

    /// Returns how often an outcome has occurred, summed over all CPUs.
    pub fn counter(&self, counter: Counter) -> anyhow::Result<u64> {
        let values = self.counters.get(&(counter as u32), 0).context("failed to read map COUNTERS")?;
        Ok(values.iter().sum())
    }
}

/// The daemon's own probes of the firewall, as the kernel program knows them. Shared with the code that sends
/// them.
#[derive(Debug, Clone)]
pub struct Probes(Arc<Mutex<ProbeMaps>>);

#[derive(Debug)]
struct ProbeMaps {
    sources: HashMap<MapData, ProberKey, u8>,
    arrived: HashMap<MapData, EntryKey, u64>,
}

impl Probes {
    fn maps(&self) -> MutexGuard<'_, ProbeMaps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to take packets from this source as probes.
    pub fn add_source(&self, key: &ProberKey) -> anyhow::Result<()> {
        self.maps().sources.insert(key, 1, 0).context("failed to write map PROBERS")
    }

    /// Stops taking packets from this source as probes; does nothing if it is not there.
    pub fn remove_source(&self, key: &ProberKey) -> anyhow::Result<()> {
        or_absent(self.maps().sources.remove(key)).context("failed to delete from map PROBERS")
    }

    /// Starts counting the datagrams that meet an entry, from 0.
    pub fn count(&self, key: &EntryKey) -> anyhow::Result<()> {
        self.maps().arrived.insert(key, 0, 0).context("failed to write map PROBES")
    }

    /// Returns the number of datagrams that have met an entry since [`Self::count`].
    pub fn counted(&self, key: &EntryKey) -> anyhow::Result<u64> {
        self.maps().arrived.get(key, 0).context("failed to read map PROBES")
    }

    /// Stops counting the datagrams that meet an entry.
    pub fn forget(&self, key: &EntryKey) -> anyhow::Result<()> {
        or_absent(self.maps().arrived.remove(key)).context("failed to delete from map PROBES")
    }
}

/// The map `SOURCES`, open for writing: the addresses that may use the entries that are not for all. Its
/// owner is not that of the other maps.
pub struct Sources(HashMap<MapData, SourceKey, u8>);

// aya's maps do not implement it.
impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

impl Sources {
    /// Lets an address use an entry.
    ///
    /// # Errors
    ///
    /// If the map is full, or the kernel refuses the change.
    pub fn add(&mut self, key: &SourceKey) -> anyhow::Result<()> {
        let source = IpAddr::from(key.source);
        self.0.insert(key, 1, 0).with_context(|| format!("failed to let {source} use the rule"))
    }

    /// Revokes an address's use of an entry; does nothing if it is not there.
    ///
    /// # Errors
    ///
    /// If the kernel refuses the change: the address can still use the entry then.
    pub fn remove(&mut self, key: &SourceKey) -> anyhow::Result<()> {
        let source = IpAddr::from(key.source);
        or_absent(self.0.remove(key)).with_context(|| format!("failed to revoke {source}'s use of the rule"))
    }
}

/// The map `REDIRECT_NETNS`: network namespaces whose localhost leads to the host. Its owner is not that of
/// the other maps.
pub struct Guests(HashMap<MapData, u64, RedirectedNetns>);

// aya's maps do not implement it.
impl fmt::Debug for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guests").finish_non_exhaustive()
    }
}

impl Guests {
    pub(super) fn take(object: &mut Ebpf) -> anyhow::Result<Self> {
        taken(object, symbols::REDIRECT_NETNS).map(Self)
    }

    /// Reads all guests, by the cookies of their namespaces.
    pub fn all(&self) -> anyhow::Result<BTreeMap<u64, RedirectedNetns>> {
        collected(&self.0).context("failed to read map REDIRECT_NETNS")
    }

    /// Makes the localhost of a guest's namespace lead to the host.
    pub fn put(&mut self, guest: &RedirectedNetns) -> anyhow::Result<()> {
        self.0.insert(guest.netns, guest, 0).context("failed to write map REDIRECT_NETNS")
    }

    /// Stops redirecting the localhost of the namespace with this cookie; does nothing if it is not there.
    pub fn remove(&mut self, netns: u64) -> anyhow::Result<()> {
        or_absent(self.0.remove(&netns)).context("failed to delete from map REDIRECT_NETNS")
    }
}

fn or_absent(done: Result<(), MapError>) -> Result<(), MapError> {
    match done {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done,
    }
}

/// The maps `RELAY_CONNECTS` and `RELAY_PEERS`, by which the kernel names the containers behind relayed
/// connections. It removes a name when the relay's socket closes; the name that the service has seen stays
/// true for as long as its own socket lives.
#[derive(Debug, Clone)]
pub struct RelayNames(Arc<Mutex<NameMaps>>);

#[derive(Debug)]
struct NameMaps {
    connects: HashMap<MapData, u64, Endpoint>,
    peers: HashMap<MapData, RelayPeerKey, RelayPeer>,
}

impl RelayNames {
    fn maps(&self) -> MutexGuard<'_, NameMaps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the kernel enter a name for `container` as soon as the socket of this cookie connects.
    pub fn put_connect(&self, cookie: u64, container: SocketAddr) -> anyhow::Result<()> {
        self.maps()
            .connects
            .insert(cookie, endpoint(container), 0)
            .context("failed to write map RELAY_CONNECTS")
    }

    /// Withdraws what [`Self::put_connect`] has told the kernel; does nothing if it is not there.
    pub fn remove_connect(&self, cookie: u64) -> anyhow::Result<()> {
        or_absent(self.maps().connects.remove(&cookie)).context("failed to delete from map RELAY_CONNECTS")
    }

    /// Returns true if the kernel names `container` as the peer of a service's connection, which leads from
    /// `relay`, the socket of this cookie, to `service`.
    pub fn is_named(
        &self,
        cookie: u64,
        relay: SocketAddr,
        service: SocketAddr,
        container: SocketAddr,
    ) -> bool {
        let key = RelayPeerKey { relay: endpoint(relay), service: endpoint(service) };
        let peer = self.maps().peers.get(&key, 0);
        peer.is_ok_and(|peer| (peer.cookie, peer.container) == (cookie, endpoint(container)))
    }

    /// Removes the names that another daemon's connections left.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        let mut maps = self.maps();
        let cookies: Vec<_> = maps.connects.keys().collect::<Result<_, _>>()?;
        cookies
            .iter()
            .try_for_each(|key| or_absent(maps.connects.remove(key)))
            .context("failed to clear map RELAY_CONNECTS")?;
        let ends: Vec<_> = maps.peers.keys().collect::<Result<_, _>>()?;
        ends.iter()
            .try_for_each(|key| or_absent(maps.peers.remove(key)))
            .context("failed to clear map RELAY_PEERS")
    }
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::new(address.ip().into(), address.port())
}

/// Stream of the events of listeners on watched ports.
pub struct Events {
    buffer: RingBuf<MapData>,
    readiness: AsyncFd<OwnedFd>,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("readiness", &self.readiness).finish_non_exhaustive()
    }
}

impl Events {
    pub(super) fn take(object: &mut Ebpf) -> anyhow::Result<Self> {
        let buffer: RingBuf<MapData> = taken(object, symbols::EVENTS)?;
        let descriptor = buffer.as_fd().try_clone_to_owned()?;
        // SAFETY: an `OwnedFd` stays the descriptor that it is for as long as it lives.
        let readiness = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        let readiness =
            readiness.map_err(io::Error::from).context("failed to poll the ring buffer of events")?;
        Ok(Self { buffer, readiness })
    }

    /// Waits until something has happened, then returns the events, oldest first. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<Vec<ListenerEvent>> {
        loop {
            let mut ready = self.readiness.readable().await?;
            // Cleared first: what comes while the buffer is read makes it ready again.
            ready.clear_ready();
            let mut events = vec![];
            while let Some(item) = self.buffer.next() {
                events.extend(parse(&item));
            }
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Option<ListenerEvent> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    Some(ListenerEvent { kind: word(0)?, port: word(4)?, error: word(8)?.cast_signed() })
}

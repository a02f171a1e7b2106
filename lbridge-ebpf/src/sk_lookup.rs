//! sk_lookup: steers packets. If the packet's (ingress interface, gateway, port) has an entry and its
//! source is in the entry's subnet, the connection goes to the registered listener. Runs for every TCP packet
//! that no connection claims, which are mostly SYNs, and for every datagram that no connected socket claims.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{bindings::BPF_SK_LOOKUP_F_REPLACE, programs::SkLookupContext};
use lbridge_common::{
    verdict::{Lookups, Verdict, decide, first_candidate},
    wire::{
        AcceptedKey, Address, CountedEntry, Counter, Endpoint, Entry, EntryKey, PROBE_PORT, ProberKey,
        SourceKey,
    },
};

use crate::{
    ctx,
    maps::{ENTRIES, LISTENERS, PROBERS, PROBES, RELAYS, SOURCES, count, is_accepted, name_override},
};

const ENOENT: i32 = 2;
/// Flag: replaces a socket that another program may have chosen for the packet. A rule determines where its
/// port leads, so it has the last word, as it has over a listener on every address.
const REPLACE: u64 = BPF_SK_LOOKUP_F_REPLACE as u64;

/// The result of the lookup for a packet.
pub enum Outcome {
    /// The packet is not ours: the kernel's own lookup continues.
    Untouched,
    /// The packet goes to a listener, or to a relay.
    Assigned,
    /// The packet goes to no socket.
    Refused,
}

#[cfg(feature = "log")]
impl Outcome {
    /// Returns the outcome's name for the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Untouched => "untouched",
            Self::Assigned => "assigned",
            Self::Refused => "refused",
        }
    }
}

/// The maps' answers about one packet.
struct Maps<'a> {
    ctx: &'a SkLookupContext,
    key: EntryKey,
    source: Address,
}

impl Lookups for Maps<'_> {
    #[inline(always)]
    fn is_probe(&self) -> bool {
        ctx::source_port(self.ctx) == PROBE_PORT
            && PROBERS.get_ptr(ProberKey { source: self.source, ifindex: self.key.ifindex }).is_some()
    }

    #[inline(always)]
    fn is_listed(&self) -> bool {
        SOURCES.get_ptr(SourceKey { entry: self.key, source: self.source }).is_some()
    }

    #[inline(always)]
    fn is_accepted(&self) -> bool {
        let EntryKey { gateway, port, protocol, .. } = self.key;
        is_accepted(AcceptedKey { gateway, port, protocol, source: self.source })
    }

    #[inline(always)]
    fn looks_local(&self) -> bool {
        name_override(&Endpoint::new(self.key.gateway, self.key.port), &self.source).is_some()
    }
}

#[inline(always)]
pub fn try_steer(ctx: &SkLookupContext, ifindex: u32, protocol: u8) -> Outcome {
    let Some((source, dialled)) = ctx::packet(ctx) else {
        return Outcome::Untouched;
    };
    let key =
        EntryKey { gateway: dialled.address, ifindex, port: dialled.port, protocol: u16::from(protocol) };
    let pointer = ENTRIES.get_ptr_mut(key);
    // Without a value in its place LLVM would leave the entry's words undefined, and read them back from the
    // stack: before Linux 6.3 the verifier refuses that ("invalid read from stack").
    let value = match pointer {
        // SAFETY: the map's memory stays readable while the program runs. It may be written to meanwhile:
        // with a new value, or, once the entry is removed, for another key (htab elements are reused at once
        // from Linux 6.1 on). So the value is copied, and the copy must belong to this key.
        Some(pointer) => unsafe { core::ptr::read_volatile(pointer) },
        None => CountedEntry::EMPTY,
    };
    let entry = if pointer.is_some() && value.entry.key == key { Some(&value.entry) } else { None };
    let maps = Maps { ctx, key, source };
    let verdict = decide(entry, &source, &dialled, protocol, &maps);
    match (verdict, entry, pointer) {
        (Verdict::Steer, Some(entry), Some(pointer)) => steer(ctx, entry, pointer, &maps),
        (Verdict::Relay, ..) => relay(ctx, key, &maps),
        (Verdict::Probe, ..) => {
            // No answer distinguishes a firewall's refusal from ours, so arrivals are counted.
            if let Some(arrived) = PROBES.get_ptr_mut(key) {
                add_one(arrived);
            }
            Outcome::Refused
        }
        (Verdict::Denied, ..) => counted(Counter::Denied, Outcome::Refused),
        (Verdict::LooksLocal, ..) => counted(Counter::LooksLocal, Outcome::Refused),
        (Verdict::ForeignSource, ..) => counted(Counter::ForeignSource, Outcome::Untouched),
        (Verdict::NotListed, ..) => counted(Counter::NotListed, Outcome::Untouched),
        // `decide` returns `Steer` only for an entry.
        (Verdict::NotOurs | Verdict::Steer, ..) => Outcome::Untouched,
    }
}

#[inline(always)]
fn steer(ctx: &SkLookupContext, entry: &Entry, pointer: *mut CountedEntry, maps: &Maps<'_>) -> Outcome {
    let mut found = false;
    // Inlined into each of its calls: a function of its own would receive the context through the stack.
    let assigned = first_candidate(
        &entry.target,
        entry.target_port,
        entry.protocol(),
        #[inline(always)]
        |key| {
            let done = LISTENERS.redirect_sk_lookup(ctx, key, REPLACE);
            found |= matches!(done, Err(error) if error != -ENOENT);
            done.ok()
        },
    );
    if assigned.is_none() {
        let counter = if found { Counter::AssignFailed } else { Counter::NoListener };
        return counted(counter, Outcome::Refused);
    }
    if maps.is_probe() {
        return Outcome::Assigned;
    }
    // SAFETY: the field's place in the map's memory; nothing is read.
    add_one(unsafe { &raw mut (*pointer).steered });
    counted(Counter::Steered, Outcome::Assigned)
}

/// Hands the connection to the entry's relay. The relay itself counts the entry's connections.
#[inline(always)]
fn relay(ctx: &SkLookupContext, key: EntryKey, maps: &Maps<'_>) -> Outcome {
    match RELAYS.redirect_sk_lookup(ctx, key, REPLACE) {
        Ok(()) if maps.is_probe() => Outcome::Assigned,
        Ok(()) => counted(Counter::Relayed, Outcome::Assigned),
        Err(error) if error == -ENOENT => counted(Counter::NoListener, Outcome::Refused),
        Err(_) => counted(Counter::AssignFailed, Outcome::Refused),
    }
}

#[inline(always)]
fn counted(counter: Counter, outcome: Outcome) -> Outcome {
    count(counter);
    outcome
}

#[inline(always)]
fn add_one(count: *mut u64) {
    // SAFETY: 8 aligned bytes of a map's memory; at worst another entry's count is incremented.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, 1) };
}

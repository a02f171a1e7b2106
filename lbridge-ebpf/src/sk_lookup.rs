//! Steering: the packet's (ingress interface, gateway, port) in the rules, its source in the rule's subnet -> the
//! connection is given to the registered listener. Runs for every TCP packet that no connection claims: SYNs, mostly; and for
//! every datagram that no connected socket claims.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::programs::SkLookupContext;
use lbridge_common::{
    verdict::{Verdict, decide, first_candidate},
    wire::{Counter, PROBE_PORT, RuleKey, SourceKey, TCP, UDP},
};

use crate::{
    ctx,
    maps::{LISTENERS, PROBES, RULES, SOURCES, count, loopback_view},
};

const ENOENT: i32 = 2;

/// What became of a packet.
pub enum Outcome {
    /// Not ours: the kernel's own lookup goes on.
    Untouched,
    /// A listener has it.
    Assigned,
    /// A rule, and nobody to serve it.
    Refused,
}

#[cfg(feature = "log")]
impl Outcome {
    /// For the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Untouched => "untouched",
            Self::Assigned => "assigned",
            Self::Refused => "refused",
        }
    }
}

#[inline(always)]
pub fn try_steer(ctx: &SkLookupContext, ifindex: u32, protocol: u8) -> Outcome {
    let Some((source, dialled)) = ctx::packet(ctx) else {
        return Outcome::Untouched;
    };
    let key =
        RuleKey { gateway: dialled.address, ifindex, port: dialled.port, protocol: u16::from(protocol) };
    let Some(pointer) = RULES.get_ptr_mut(key) else {
        // The name hooks know of no interface. Who comes by another bridge, with an address of a network that looks local at this
        // gateway, would look local to whoever listens on every address.
        let looks_local =
            protocol == TCP && source != dialled.address && loopback_view(&dialled, &source).is_some();
        return if looks_local { Outcome::Refused } else { Outcome::Untouched };
    };
    // SAFETY: memory of the map stays readable while the program runs. It may be written to meanwhile, for a new value
    // or, once the entry is removed, for another key (htab elements are reused at once from Linux 6.1 on). So it is
    // copied, and the copy must be this key's.
    let rule = unsafe { core::ptr::read_volatile(pointer) };
    if rule.key != key {
        return Outcome::Untouched;
    }
    // No answer tells a firewall's refusal from ours, so that arrival is counted. For as long as the daemon tries, that is.
    if protocol == UDP
        && ctx::source_port(ctx) == PROBE_PORT
        && let Some(arrived) = PROBES.get_ptr_mut(key)
    {
        // SAFETY: 8 aligned bytes of the map's memory; at worst another entry's count gains one.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(arrived, 1) };
        return Outcome::Refused;
    }
    let listed = || SOURCES.get_ptr(SourceKey { rule: key, source }).is_some();
    match decide(Some(&rule), &source, listed) {
        Verdict::NotOurs => return Outcome::Untouched,
        Verdict::ForeignSource => {
            count(Counter::ForeignSource);
            return Outcome::Untouched;
        }
        Verdict::Steer => {}
    }

    let mut found = false;
    // Inlined at each of its calls: a function of its own would get the context by way of the stack.
    let assigned = first_candidate(
        &rule.target,
        rule.target_port,
        protocol,
        #[inline(always)]
        |key| {
            let done = LISTENERS.redirect_sk_lookup(ctx, key, 0);
            found |= matches!(done, Err(error) if error != -ENOENT);
            done.ok()
        },
    );
    if assigned.is_none() {
        count(if found { Counter::AssignFailed } else { Counter::NoListener });
        return Outcome::Refused;
    }
    if ctx::source_port(ctx) == PROBE_PORT {
        return Outcome::Assigned;
    }
    // SAFETY: `steered` is 8 aligned bytes of the map's memory; at worst another entry's count gains one.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*pointer).steered, 1) };
    count(Counter::Steered);
    Outcome::Assigned
}

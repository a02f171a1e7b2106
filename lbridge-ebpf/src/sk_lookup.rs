//! Steering: the packet's (ingress interface, gateway, port) in the rules, its source in the rule's subnet -> the
//! connection is given to the registered listener. Runs for every TCP packet that no connection claims: SYNs, mostly.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::programs::SkLookupContext;
use lbridge_common::{
    verdict::{Verdict, candidates, decide},
    wire::{Counter, RuleKey},
};

use crate::{
    ctx,
    maps::{LISTENERS, RULES, count},
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

#[inline(always)]
pub fn try_steer(ctx: &SkLookupContext, ifindex: u32) -> Outcome {
    let Some((source, dialled)) = ctx::packet(ctx) else {
        return Outcome::Untouched;
    };
    let key = RuleKey { gateway: dialled.address, ifindex, port: dialled.port, reserved: 0 };
    let pointer = RULES.get_ptr_mut(key);
    // SAFETY: valid while the program runs; written to by the atomic add below only (an update replaces the entry).
    let rule = pointer.map(|p| unsafe { &*p });
    match decide(rule, &source) {
        Verdict::NotOurs => return Outcome::Untouched,
        Verdict::ForeignSource => {
            count(Counter::ForeignSource);
            return Outcome::Untouched;
        }
        Verdict::Steer => {}
    }
    let (Some(rule), Some(pointer)) = (rule, pointer) else {
        return Outcome::Untouched;
    };

    let mut found = false;
    for key in candidates(&rule.target, rule.target_port) {
        match LISTENERS.redirect_sk_lookup(ctx, key, 0) {
            Ok(()) => {
                // SAFETY: `steered` is 8 bytes, aligned, in the map value that `pointer` was checked to lead to.
                unsafe {
                    atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*pointer).steered, 1)
                };
                count(Counter::Steered);
                return Outcome::Assigned;
            }
            Err(error) => found |= error != -ENOENT,
        }
    }
    count(if found { Counter::AssignFailed } else { Counter::NoListener });
    Outcome::Refused
}

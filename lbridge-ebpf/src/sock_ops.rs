//! Registration: when a socket of the host starts to listen on a port that some rule targets, it enters the listener
//! map, so that a restarted service is steered to at once, daemon or no daemon. The kernel takes a socket out of the
//! map when it closes.

use aya_ebpf::{
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_LISTEN_CB,
        BPF_TCP_LISTEN,
    },
    helpers::generated::bpf_get_prandom_u32,
    programs::SockOpsContext,
};
use lbridge_common::wire::{Counter, Endpoint, ListenerEvent, ListenerKey, SLOTS};

use crate::{
    ctx,
    maps::{LISTENERS, TARGETS, count, emit, host_netns},
};

const EEXIST: i32 = 17;

#[inline(always)]
pub fn on_callback(ctx: &SockOpsContext, listening: fn(&SockOpsContext, &Endpoint)) {
    match ctx::callback(ctx) {
        BPF_SOCK_OPS_TCP_LISTEN_CB => {
            // One that is bound to a device would answer there, not on the bridge.
            if let Some(bound) = ctx::bound_to(ctx).filter(is_targeted)
                && !ctx::has_device(ctx)
            {
                listening(ctx, &bound);
                // The accepted connections inherit the flag; their callbacks end at the comparison below.
                let _ = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
            }
        }
        BPF_SOCK_OPS_STATE_CB => {
            if ctx::first_argument(ctx) == BPF_TCP_LISTEN
                && let Some(bound) = ctx::bound_to(ctx)
            {
                emit(ListenerEvent { kind: ListenerEvent::CLOSED, port: u32::from(bound.port), error: 0 });
            }
        }
        _ => {}
    }
}

/// Only loopback and wildcard sockets can be what a rule means, and only on a port that some rule targets.
#[inline(always)]
fn is_targeted(bound: &Endpoint) -> bool {
    (bound.address.is_loopback() || bound.address.is_unspecified())
        && TARGETS.get_ptr(bound.port).is_some()
}

#[inline(always)]
pub fn register_listener(ctx: &SockOpsContext, bound: &Endpoint) {
    // A container that listens on the same port must never be handed the host's connections: bpf_sk_assign does not
    // compare namespaces.
    if ctx::sock_ops_netns(ctx) != host_netns() {
        return;
    }
    let (kind, error) = match put(ctx, bound) {
        Ok(()) => {
            count(Counter::Registered);
            (ListenerEvent::LISTENING, 0)
        }
        // MPTCP: EOPNOTSUPP. The daemon relays it.
        Err(error) => {
            count(Counter::RegisterRefused);
            (ListenerEvent::REFUSED, error)
        }
    };
    emit(ListenerEvent { kind, port: u32::from(bound.port), error });
}

/// Takes the first free slot; where a group has filled them all, one at random, so that the newest sockets are always
/// among the registered: a service that replaces its listeners one by one is never without.
#[inline(always)]
fn put(ctx: &SockOpsContext, bound: &Endpoint) -> Result<(), i32> {
    // SAFETY: the context is the kernel's own `bpf_sock_ops`.
    let ops = unsafe { &mut *ctx.ops };
    for slot in 0..u16::from(SLOTS) {
        let key = ListenerKey { address: bound.address, port: bound.port, slot };
        match LISTENERS.update(key, &mut *ops, u64::from(BPF_NOEXIST)) {
            Err(error) if error == -EEXIST => {}
            done => return done,
        }
    }
    // SAFETY: no arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    let slot = (random % u32::from(SLOTS)) as u16;
    LISTENERS.update(ListenerKey { address: bound.address, port: bound.port, slot }, ops, 0)
}

#[inline(always)]
pub fn announce_listener(_ctx: &SockOpsContext, bound: &Endpoint) {
    emit(ListenerEvent { kind: ListenerEvent::LISTENING, port: u32::from(bound.port), error: 0 });
}

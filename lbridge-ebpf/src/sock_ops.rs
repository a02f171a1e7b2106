//! Registration of listeners, and names of relayed connections.
//!
//! When a socket of the host starts to listen on a port that some rule targets, it enters the listener
//! map, so that a restarted service is steered to at once, daemon or no daemon. The kernel takes a socket out of the
//! map when it closes.

use aya_ebpf::{
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_LISTEN,
    },
    helpers::generated::bpf_get_prandom_u32,
    programs::SockOpsContext,
};
use lbridge_common::wire::{Counter, Endpoint, ListenerEvent, ListenerKey, SLOTS, TCP, TargetKey};

use crate::{
    ctx::{self, Ends},
    maps::{LISTENERS, PEER_NAMES, RELAY_CONNECTS, RELAY_PEERS, TARGETS, count, emit, host_netns},
};

const EEXIST: i32 = 17;

/// What differs between kernels that tell a socket's namespace here and those that do not.
pub struct Variant {
    /// Whether the socket is the host's, as far as the kernel tells.
    pub is_host: fn(&SockOpsContext) -> bool,
    /// What is done with a new listener.
    pub listening: fn(&SockOpsContext, &Endpoint),
}

#[inline(always)]
pub fn on_callback(ctx: &SockOpsContext, variant: Variant) {
    let callback = ctx::callback(ctx);
    let Some(ends) = ctx::ends(ctx) else { return };
    match callback {
        // One that is bound to a device would answer there, not on the bridge.
        BPF_SOCK_OPS_TCP_LISTEN_CB if is_targeted(&ends.local) && !ctx::has_device(ctx) => {
            // A container that listens on the same port must never be handed the host's connections: bpf_sk_assign does
            // not compare namespaces.
            if (variant.is_host)(ctx) {
                (variant.listening)(ctx, &ends.local);
                // Beside what other programs have set. The accepted connections inherit the flag; their callbacks end
                // at the comparison below.
                let _ = ctx.set_cb_flags((ctx::callback_flags(ctx) | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx::first_argument(ctx) == BPF_TCP_LISTEN => {
            emit(ListenerEvent { kind: ListenerEvent::CLOSED, port: u32::from(ends.local.port), error: 0 });
        }
        BPF_SOCK_OPS_TCP_CONNECT_CB => relay_connects(ctx, &ends),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
            if ends.remote.address.is_loopback() && (variant.is_host)(ctx) =>
        {
            relay_connected(ctx, &ends);
        }
        _ => {}
    }
}

/// A relay's socket has got its port and has sent nothing yet.
#[inline(always)]
fn relay_connects(ctx: &SockOpsContext, ends: &Ends) {
    // SAFETY: memory of the map stays readable while the program runs, and is copied. An entry is removed by the relay
    // only, after its connect() has returned.
    if let Some(container) = unsafe { RELAY_CONNECTS.get(ctx::cookie(ctx)) }.copied() {
        // Should the map be full, the relay finds no name and gives the connection up.
        let _ = RELAY_PEERS.insert(ends.local, container, 0);
    }
}

/// The service's end of a relayed connection: what it is told of its peer has to live as long as its socket.
#[inline(always)]
fn relay_connected(ctx: &SockOpsContext, ends: &Ends) {
    // SAFETY: as above.
    if let Some(mut container) = unsafe { RELAY_PEERS.get(ends.remote) }.copied() {
        ctx::store(ctx, &PEER_NAMES, &mut container);
    }
}

/// Whether the socket is of the host's namespace. Linux 5.15 and later.
#[inline(always)]
pub fn is_host(ctx: &SockOpsContext) -> bool {
    ctx::sock_ops_netns(ctx) == host_netns()
}

/// Only loopback and wildcard sockets can be what a rule means, and only on a port that some rule targets.
#[inline(always)]
fn is_targeted(bound: &Endpoint) -> bool {
    (bound.address.is_loopback() || bound.address.is_unspecified())
        && TARGETS.get_ptr(TargetKey { port: bound.port, protocol: u16::from(TCP) }).is_some()
}

#[inline(always)]
pub fn register_listener(ctx: &SockOpsContext, bound: &Endpoint) {
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
    for slot in 0..SLOTS {
        let key = ListenerKey { address: bound.address, port: bound.port, slot, protocol: TCP };
        match LISTENERS.update(key, &mut *ops, u64::from(BPF_NOEXIST)) {
            Err(error) if error == -EEXIST => {}
            done => return done,
        }
    }
    // SAFETY: no arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    let slot = (random % u32::from(SLOTS)) as u8;
    LISTENERS.update(ListenerKey { address: bound.address, port: bound.port, slot, protocol: TCP }, ops, 0)
}

/// Tells of the socket. The daemon looks which it is.
#[inline(always)]
pub fn announce_listener(_ctx: &SockOpsContext, bound: &Endpoint) {
    emit(ListenerEvent { kind: ListenerEvent::LISTENING, port: u32::from(bound.port), error: 0 });
}

//! sock_ops: registers listeners, and records the names of connections that are presented differently from
//! what they are.
//!
//! When a socket of the host starts to listen on a port that some rule targets, it enters the listener map. A
//! restarted service is therefore steered to at once, even if the daemon is not running. The kernel removes a
//! socket from the map when it closes.

use aya_ebpf::{
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, BPF_TCP_LISTEN,
    },
    helpers::generated::bpf_get_prandom_u32,
    programs::SockOpsContext,
};
use lbridge_common::wire::{
    Address, Counter, Endpoint, ListenerEvent, ListenerKey, RelayPeer, RelayPeerKey, SLOTS, TCP, TargetKey,
};

use crate::{
    ctx::{self, Ends},
    maps::{
        LISTENERS, LOOPBACK_NAMES, PEER_NAMES, RELAY_CONNECTS, RELAY_PEERS, TARGETS, count, emit, host_netns,
        name_override, relay_peer,
    },
};

const EEXIST: i32 = 17;
/// Value in the storage of a socket that made a connection itself: no service has accepted it.
pub const NOT_ACCEPTED: Endpoint = Endpoint::new(Address::ANY_V6, 0);

/// The difference between kernels where `sock_ops` can read a socket's network namespace and those where it
/// cannot.
pub struct Variant {
    /// Returns true if the socket is the host's, as far as the kernel can tell.
    pub is_host: fn(&SockOpsContext) -> bool,
    /// Handles a new listener.
    pub listening: fn(&SockOpsContext, &Endpoint),
}

#[inline(always)]
pub fn on_callback(ctx: &SockOpsContext, variant: Variant) {
    let callback = ctx::callback(ctx);
    let Some(ends) = ctx::ends(ctx) else { return };
    match callback {
        // A listener that is bound to a device would answer there, not on the bridge.
        BPF_SOCK_OPS_TCP_LISTEN_CB if is_targeted(&ends.local) && !ctx::has_device(ctx) => {
            // The host's connections must never go to a container that listens on the same port:
            // bpf_sk_assign does not compare namespaces.
            if (variant.is_host)(ctx) {
                (variant.listening)(ctx, &ends.local);
                follow_state(ctx);
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx::first_argument(ctx) == BPF_TCP_LISTEN => {
            emit(ListenerEvent { kind: ListenerEvent::CLOSED, port: u32::from(ends.local.port), error: 0 });
        }
        // Also called for connections that a registered listener accepted: they inherit the flag.
        BPF_SOCK_OPS_STATE_CB if ctx::second_argument(ctx) == BPF_TCP_CLOSE => relay_closes(ctx, &ends),
        BPF_SOCK_OPS_TCP_CONNECT_CB => connects(ctx, &ends),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB if (variant.is_host)(ctx) => connected(ctx, &ends),
        _ => {}
    }
}

/// Enables the callbacks for the socket's state changes, and keeps those that other programs have enabled.
#[inline(always)]
fn follow_state(ctx: &SockOpsContext) {
    let _ = ctx.set_cb_flags((ctx::callback_flags(ctx) | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
}

/// Handles a socket that has a local port and has not sent anything yet.
#[inline(always)]
fn connects(ctx: &SockOpsContext, ends: &Ends) {
    relay_connects(ctx, ends);
    // In a simultaneous open the kernel reports this socket as an accepted one (tcp_rcv_state_process() with
    // TCP_SYN_RECV).
    if name_override(&ends.local, &ends.remote.address).is_some() {
        ctx::store(ctx, &LOOPBACK_NAMES, &mut { NOT_ACCEPTED });
    }
}

#[inline(always)]
fn relay_connects(ctx: &SockOpsContext, ends: &Ends) {
    let cookie = ctx::cookie(ctx);
    // SAFETY: the map's memory stays readable while the program runs, and the value is copied. Only the relay
    // removes an entry, after its connect() has returned.
    if let Some(container) = unsafe { RELAY_CONNECTS.get(cookie) }.copied() {
        let key = RelayPeerKey { relay: ends.local, service: ends.remote };
        // If the map is full, the relay finds no entry and gives up the connection.
        let _ = RELAY_PEERS.insert(key, RelayPeer { key, cookie, container, reserved: 0 }, 0);
        follow_state(ctx);
    }
}

/// Handles the close of a socket, after which another socket may reuse its ends (tcp_set_state() calls this
/// before it unhashes the socket). If it is a relay's, its name is removed with it: the next socket with the
/// same ends belongs to someone else.
#[inline(always)]
fn relay_closes(ctx: &SockOpsContext, ends: &Ends) {
    if ends.local.address.is_loopback() {
        let key = RelayPeerKey { relay: ends.local, service: ends.remote };
        if relay_peer(&key).is_some_and(|peer| peer.cookie == ctx::cookie(ctx)) {
            let _ = RELAY_PEERS.remove(key);
        }
    }
}

/// Handles the service's end of a connection, before accept() returns it. The names that it sees must live as
/// long as its socket: rules and relays may be gone earlier. No other socket with the same ends may see them,
/// such as a connection that the host makes from the gateway's address and the dialled port.
#[inline(always)]
fn connected(ctx: &SockOpsContext, ends: &Ends) {
    if ends.remote.address.is_loopback() {
        if let Some(mut peer) = relay_peer(&RelayPeerKey { relay: ends.remote, service: ends.local }) {
            ctx::store(ctx, &PEER_NAMES, &mut peer.container);
        }
    } else if let Some(mut names) = name_override(&ends.local, &ends.remote.address)
        // The host itself is never steered.
        && ends.local.address != ends.remote.address
    {
        // The connection was steered: any other connection to this gateway would look local, and was refused.
        // Does not apply if the socket is [`NOT_ACCEPTED`].
        ctx::store(ctx, &LOOPBACK_NAMES, &mut names.target);
    }
}

/// Returns true if the socket is in the host's network namespace. Needs Linux 5.15 or later.
#[inline(always)]
pub fn is_host(ctx: &SockOpsContext) -> bool {
    ctx::sock_ops_netns(ctx) == host_netns()
}

/// Returns true if some rule can lead to a listener on `bound`. Only these are registered: any user may
/// listen on the rest of 127.0.0.0/8.
#[inline(always)]
fn is_targeted(bound: &Endpoint) -> bool {
    let key = TargetKey { address: bound.address, port: bound.port, protocol: u16::from(TCP) };
    (bound.address.is_loopback() || bound.address.is_unspecified()) && TARGETS.get_ptr(key).is_some()
}

#[inline(always)]
pub fn register_listener(ctx: &SockOpsContext, bound: &Endpoint) {
    let (kind, error) = match put(ctx, bound) {
        Ok(()) => {
            count(Counter::Registered);
            (ListenerEvent::LISTENING, 0)
        }
        // For MPTCP the error is EOPNOTSUPP. The daemon relays it.
        Err(error) => {
            count(Counter::RegisterRefused);
            (ListenerEvent::REFUSED, error)
        }
    };
    emit(ListenerEvent { kind, port: u32::from(bound.port), error });
}

/// Registers the socket in the first free slot. If the group has filled all slots, replaces one at random, so
/// that the newest sockets are always among the registered ones: a service that replaces its listeners one by
/// one is never without one.
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

/// Reports the new listener to the daemon, which finds out which socket it is.
#[inline(always)]
pub fn announce_listener(_ctx: &SockOpsContext, bound: &Endpoint) {
    emit(ListenerEvent { kind: ListenerEvent::LISTENING, port: u32::from(bound.port), error: 0 });
}

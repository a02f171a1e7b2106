//! Names: what accept(), getpeername() and getsockname() tell the service.
//!
//! - a steered connection under a rule with `--source loopback` looks local at both ends;
//! - a relayed connection under any other rule shows the container, not the relay.

use aya_ebpf::programs::SockAddrContext;
use lbridge_common::wire::Endpoint;

use crate::{
    ctx::{self, Side},
    maps::{LOOPBACK_VIEWS, PEER_NAMES, RELAY_PEERS, host_netns},
};

#[inline(always)]
pub fn rewrite_v4(ctx: &SockAddrContext, side: Side) {
    if is_host(ctx)
        && let Some(local) = ctx::local_end_v4(ctx)
        && let Some(name) = rewritten(ctx, &local, &ctx::name_v4(ctx), side)
        // An IPv4 socket cannot be shown an IPv6 container; part of its address could read as anybody's, 127.0.0.1 too.
        && name.address.is_v4()
    {
        ctx::set_name_v4(ctx, &name);
    }
}

#[inline(always)]
pub fn rewrite_v6(ctx: &SockAddrContext, side: Side) {
    if is_host(ctx)
        && let Some(local) = ctx::local_end_v6(ctx)
        && let Some(name) = rewritten(ctx, &local, &ctx::name_v6(ctx), side)
    {
        ctx::set_name_v6(ctx, &name);
    }
}

/// Whether the socket is of the host's namespace. Where userspace cannot learn its cookie (before 5.14) every socket
/// counts: a namespace that has the gateway's own address and port could see a changed name.
#[inline(always)]
fn is_host(ctx: &SockAddrContext) -> bool {
    let host = host_netns();
    host == 0 || ctx::sock_addr_netns(ctx) == host
}

#[inline(always)]
fn rewritten(ctx: &SockAddrContext, local: &Endpoint, name: &Endpoint, side: Side) -> Option<Endpoint> {
    // SAFETY: memory of the map stays readable while the program runs, and is copied.
    if let Some(view) = unsafe { LOOPBACK_VIEWS.get(local) }.copied() {
        return match side {
            Side::Local => Some(view.target),
            // The subnet again: the entry is for the network's connections, not for whatever else is bound there.
            Side::Peer => (name.address.masked(&view.mask) == view.subnet)
                .then_some(Endpoint::new(view.target.address, name.port)),
        };
    }
    match side {
        Side::Local => None,
        // An MPTCP service's socket is not the one that was connected to, so it has no storage; the relay's end tells.
        // SAFETY: as above.
        Side::Peer => ctx::stored(ctx, &PEER_NAMES).or_else(|| unsafe { RELAY_PEERS.get(name) }.copied()),
    }
}

//! peername: rewrites the names that accept(), getpeername() and getsockname() return.
//!
//! - A steered connection under a rule with `--source loopback` looks local at both ends.
//! - A relayed connection under any other rule shows the container, not the relay.
//! - A container that dialled localhost, where that leads to the host, sees localhost.

use aya_ebpf::programs::SockAddrContext;
use lbridge_common::wire::{Endpoint, RelayPeerKey};

use crate::{
    connect::original_dst,
    ctx::{self, Ends, Side},
    maps::{LOOPBACK_NAMES, ORIGINAL_DST, PEER_NAMES, host_netns, relay_peer},
    sock_ops::NOT_ACCEPTED,
};

#[inline(always)]
pub fn rewrite_v4(ctx: &SockAddrContext, side: Side) {
    if !is_host(ctx) {
        if let Some(name) = dialled_instead(ctx, &ctx::name_v4(ctx), side)
            && name.address.is_v4()
        {
            ctx::set_name_v4(ctx, &name);
        }
    } else if let Some(ends) = ctx::ends_v4(ctx)
        && let Some(name) = rewritten(ctx, &ends, &ctx::name_v4(ctx), side)
        // An IPv4 socket cannot be shown an IPv6 container: a part of that address could read as any address,
        // even 127.0.0.1.
        && name.address.is_v4()
    {
        ctx::set_name_v4(ctx, &name);
    }
}

#[inline(always)]
pub fn rewrite_v6(ctx: &SockAddrContext, side: Side) {
    if !is_host(ctx) {
        if let Some(name) = dialled_instead(ctx, &ctx::name_v6(ctx), side) {
            ctx::set_name_v6(ctx, &name);
        }
    } else if let Some(ends) = ctx::ends_v6(ctx)
        && let Some(name) = rewritten(ctx, &ends, &ctx::name_v6(ctx), side)
    {
        ctx::set_name_v6(ctx, &name);
    }
}

/// Returns true if the socket is in the host's network namespace. Before Linux 5.14 userspace cannot learn
/// the host's cookie, so every socket counts: a namespace that has the gateway's own address and port could
/// see a changed name.
#[inline(always)]
fn is_host(ctx: &SockAddrContext) -> bool {
    let host = host_netns();
    host == 0 || ctx::sock_addr_netns(ctx) == host
}

/// Returns the address that a container's socket dialled, if it was redirected to `name`. Compares the
/// redirect's gateway with `name`, since the socket may have been connected to something else in the
/// meantime.
#[inline(always)]
fn dialled_instead(ctx: &SockAddrContext, name: &Endpoint, side: Side) -> Option<Endpoint> {
    match side {
        Side::Local => None,
        Side::Peer => ctx::stored(ctx, &ORIGINAL_DST)
            .filter(|redirect| redirect.gateway == *name)
            .map(|redirect| original_dst(&redirect)),
    }
}

#[inline(always)]
fn rewritten(ctx: &SockAddrContext, ends: &Ends, name: &Endpoint, side: Side) -> Option<Endpoint> {
    if let Some(target) = ctx::stored(ctx, &LOOPBACK_NAMES).filter(|target| *target != NOT_ACCEPTED) {
        return Some(match side {
            Side::Local => target,
            Side::Peer => Endpoint::new(target.address, name.port),
        });
    }
    match side {
        Side::Local => None,
        // An MPTCP service's socket is not the socket that was connected to, so it has no storage; look it up
        // by its ends.
        Side::Peer => ctx::stored(ctx, &PEER_NAMES).or_else(
            #[inline(always)]
            || {
                let key = RelayPeerKey { relay: *name, service: ends.local };
                relay_peer(&key).map(|peer| peer.container)
            },
        ),
    }
}

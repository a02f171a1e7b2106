//! Replies of UDP services: a datagram that a service on loopback sends to a container leaves with the gateway as its
//! source, which is what the container has dialled.
//!
//! Only the source of datagrams that would leave from loopback for another host is changed. The kernel refuses to send these
//! (IPv4) or everybody to receive them (IPv6), so that nothing is changed that would work otherwise.

use aya_ebpf::programs::SockAddrContext;
use lbridge_common::wire::{Address, Endpoint};

use crate::{
    ctx,
    maps::{host_netns, reply_source},
};

#[inline(always)]
pub fn rewrite_v4(ctx: &SockAddrContext) {
    if let Some(gateway) = gateway(ctx, ctx::source_v4(ctx), ctx::name_v4(ctx).address)
        && gateway.is_v4()
    {
        ctx::set_source_v4(ctx, &gateway);
    }
}

#[inline(always)]
pub fn rewrite_v6(ctx: &SockAddrContext) {
    if let Some(gateway) = gateway(ctx, ctx::source_v6(ctx), ctx::name_v6(ctx).address)
        && !gateway.is_v4()
    {
        ctx::set_source_v6(ctx, &gateway);
    }
}

/// Most datagrams of a host do not leave from loopback: that is asked first. A container's own loopback is none of ours.
#[inline(always)]
fn gateway(ctx: &SockAddrContext, source: Address, peer: Address) -> Option<Address> {
    if !source.is_loopback() || ctx::sock_addr_netns(ctx) != host_netns() {
        return None;
    }
    reply_source(&Endpoint::new(source, ctx::bound_port(ctx)?), &peer)
}

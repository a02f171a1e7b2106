//! replies: rewrites the source of a UDP service's replies. A datagram that a service on loopback sends to a
//! container leaves with the gateway as its source, which is the address that the container dialled.
//!
//! Only datagrams that would leave from loopback for another host are changed. The kernel refuses to send
//! these (IPv4), or every host refuses to receive them (IPv6), so this changes nothing that would otherwise
//! work.

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

/// Returns the gateway to use as the source; `None` to leave the datagram unchanged. Tests for a loopback
/// source first, since most of a host's datagrams do not have one. A container's own loopback is left alone.
#[inline(always)]
fn gateway(ctx: &SockAddrContext, source: Address, peer: Address) -> Option<Address> {
    if !source.is_loopback() || ctx::sock_addr_netns(ctx) != host_netns() {
        return None;
    }
    reply_source(&Endpoint::new(source, ctx::bound_port(ctx)?), &peer)
}

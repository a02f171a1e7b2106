//! connect: redirects a container's connect() to localhost to its network's gateway, where a rule says so.
//! This opens nothing: the gateway's rule decides, as it does for a container that dials the gateway itself.

use aya_ebpf::programs::SockAddrContext;
use lbridge_common::wire::{BRIDGES, Endpoint, Redirect, RedirectKey, TCP};

use crate::{
    ctx,
    maps::{ORIGINAL_DST, guest, host_netns, redirect},
};

#[inline(always)]
pub fn redirect_v4(ctx: &SockAddrContext) {
    if ctx::connects_tcp(ctx)
        && let Some(netns) = container(ctx)
        && let Some(mut redirect) = leads(netns, &ctx::name_v4(ctx))
        // An IPv4 socket can only reach an IPv4 gateway.
        && redirect.gateway.address.is_v4()
        && !ctx::is_bound_v4(ctx)
        && !ctx::is_listened_on(ctx, &original_dst(&redirect))
    {
        ctx::keep(ctx, &ORIGINAL_DST, &mut redirect);
        ctx::set_name_v4(ctx, &redirect.gateway);
    }
}

/// Redirects a connect() by IPv6. An IPv4 gateway is given as v4-mapped, which sockets accept unless they are
/// IPv6-only.
#[inline(always)]
pub fn redirect_v6(ctx: &SockAddrContext) {
    if ctx::connects_tcp(ctx)
        && let Some(netns) = container(ctx)
        && let Some(mut redirect) = leads(netns, &ctx::name_v6(ctx))
        && !ctx::is_bound_v6(ctx)
        && !ctx::is_listened_on(ctx, &original_dst(&redirect))
    {
        ctx::keep(ctx, &ORIGINAL_DST, &mut redirect);
        ctx::set_name_v6(ctx, &redirect.gateway);
    }
}

/// Returns the original destination: the address and port that the container dialled.
#[inline(always)]
pub fn original_dst(redirect: &Redirect) -> Endpoint {
    Endpoint::new(redirect.key.address, redirect.key.port)
}

/// Returns the cookie of the caller's network namespace; `None` for the host's. Before Linux 5.14 userspace
/// cannot learn namespace cookies, so no caller counts as a container.
#[inline(always)]
fn container(ctx: &SockAddrContext) -> Option<u64> {
    let (host, own) = (host_netns(), ctx::sock_addr_netns(ctx));
    (host != 0 && own != host).then_some(own)
}

/// Returns the redirect for `name` from the first of the namespace's bridges that has one.
#[inline(always)]
fn leads(netns: u64, name: &Endpoint) -> Option<Redirect> {
    const _: () = assert!(BRIDGES == 4, "as many bridges as are written out below");
    let [first, second, third, fourth] = guest(netns)?.bridges;
    from_bridge(first, netns, name)
        .or_else(
            #[inline(always)]
            || from_bridge(second, netns, name),
        )
        .or_else(
            #[inline(always)]
            || from_bridge(third, netns, name),
        )
        .or_else(
            #[inline(always)]
            || from_bridge(fourth, netns, name),
        )
}

#[inline(always)]
fn from_bridge(ifindex: u32, netns: u64, name: &Endpoint) -> Option<Redirect> {
    if ifindex == 0 {
        return None;
    }
    let key =
        RedirectKey { address: name.address, ifindex, port: name.port, protocol: u16::from(TCP), netns: 0 };
    redirect(&key).or_else(
        #[inline(always)]
        || redirect(&RedirectKey { netns, ..key }),
    )
}

//! Localhost: what a container dials that leads to its network's gateway, where a rule says so. Opens nothing: the gateway's
//! rule decides, as for whoever dials the gateway itself.

use aya_ebpf::programs::SockAddrContext;
use lbridge_common::wire::{BRIDGES, Dial, DialKey, Endpoint, TCP};

use crate::{
    ctx,
    maps::{DIALLED, dial, guest, host_netns},
};

#[inline(always)]
pub fn dial_v4(ctx: &SockAddrContext) {
    if ctx::connects_tcp(ctx)
        && let Some(netns) = container(ctx)
        && let Some(mut dial) = leads(netns, &ctx::name_v4(ctx))
        // An IPv4 socket gets to IPv4 gateways alone.
        && dial.gateway.address.is_v4()
        && !ctx::is_bound_v4(ctx)
        && !ctx::is_listened_on(ctx, &dialled(&dial))
    {
        ctx::keep(ctx, &DIALLED, &mut dial);
        ctx::set_name_v4(ctx, &dial.gateway);
    }
}

/// An IPv4 gateway of what is dialled by IPv6 is v4-mapped, as sockets take it unless they are for IPv6 alone.
#[inline(always)]
pub fn dial_v6(ctx: &SockAddrContext) {
    if ctx::connects_tcp(ctx)
        && let Some(netns) = container(ctx)
        && let Some(mut dial) = leads(netns, &ctx::name_v6(ctx))
        && !ctx::is_bound_v6(ctx)
        && !ctx::is_listened_on(ctx, &dialled(&dial))
    {
        ctx::keep(ctx, &DIALLED, &mut dial);
        ctx::set_name_v6(ctx, &dial.gateway);
    }
}

/// What a dial leads away from.
#[inline(always)]
pub fn dialled(dial: &Dial) -> Endpoint {
    Endpoint::new(dial.key.address, dial.key.port)
}

/// The caller's namespace, unless it is the host's. Where userspace cannot learn namespaces' cookies (before 5.14) nobody is
/// a container.
#[inline(always)]
fn container(ctx: &SockAddrContext) -> Option<u64> {
    let (host, own) = (host_netns(), ctx::sock_addr_netns(ctx));
    (host != 0 && own != host).then_some(own)
}

/// Where that leads from the first of the namespace's bridges that has something for it.
#[inline(always)]
fn leads(netns: u64, name: &Endpoint) -> Option<Dial> {
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
fn from_bridge(ifindex: u32, netns: u64, name: &Endpoint) -> Option<Dial> {
    if ifindex == 0 {
        return None;
    }
    let key = DialKey { address: name.address, ifindex, port: name.port, protocol: u16::from(TCP), netns: 0 };
    dial(&key).or_else(
        #[inline(always)]
        || dial(&DialKey { netns, ..key }),
    )
}

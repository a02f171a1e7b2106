//! lbridge-ebpf: lbridge's kernel programs. This file holds only the entry points: each calls the file of its
//! hook and turns the result into the kernel's return code. There is one file per hook:
//!
//! - [`sk_lookup`]: picks the listener of a connection;
//! - [`sock_ops`]: registers the listeners to pick from, and records the client of a relayed connection;
//! - [`connect`]: redirects a container's localhost to its gateway;
//! - [`peername`]: the peer that the service, and such a container, sees;
//! - [`replies`]: the source that a container sees on a UDP service's datagrams.
//!
//! The maps are in [`maps`], every read of a kernel context is in [`ctx`].
#![no_std]
#![no_main]
#![feature(core_intrinsics, stmt_expr_attributes)]
#![expect(internal_features, reason = "an atomic add on a map value; stable atomics do not lower to BPF's")]

mod connect;
mod ctx;
mod maps;
mod peername;
mod replies;
mod sk_lookup;
mod sock_ops;

use aya_ebpf::{
    macros::{cgroup_sock_addr, sk_lookup, sock_ops},
    programs::{SkLookupContext, SockAddrContext, SockOpsContext},
};

use lbridge_common::wire::TCP;

use crate::{ctx::Side, sk_lookup::Outcome, sock_ops::Variant};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

/// Logs to the daemon, only in debug objects.
macro_rules! log {
    ($ctx:expr, $($message:tt)+) => {
        #[cfg(feature = "log")]
        aya_log_ebpf::info!($ctx, $($message)+);
    };
}

fn verdict(ctx: &SkLookupContext, ifindex: u32, protocol: u8) -> u32 {
    let outcome = sk_lookup::try_steer(ctx, ifindex, protocol);
    log!(ctx, "sk_lookup interface={} {}", ifindex, outcome.name());
    match outcome {
        Outcome::Untouched | Outcome::Assigned => SK_PASS,
        // No socket: the kernel answers a SYN with RST, and a datagram with ICMP "port unreachable". The
        // container gets ECONNREFUSED.
        Outcome::Refused => SK_DROP,
    }
}

#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    let Some(protocol) = ctx::protocol(&ctx) else { return SK_PASS };
    verdict(&ctx, ctx::ingress_ifindex(&ctx), protocol)
}

/// Steers on kernels before 5.17, whose verifier rejects a read of `ingress_ifindex`. Without that check a
/// datagram with a forged source would reach the service from any interface, so UDP is left alone.
#[sk_lookup]
pub fn steer_any_interface(ctx: SkLookupContext) -> u32 {
    if !ctx::is_tcp(&ctx) {
        return SK_PASS;
    }
    verdict(&ctx, 0, TCP)
}

/// The only return value that keeps the results of other `sock_ops` programs in force. If any program returns
/// 0, the kernel reports -EPERM for all of them (`__cgroup_bpf_run_filter_sock_ops()`), and the time-outs,
/// windows and options that the others set are lost.
const SUCCESS: u32 = 1;

#[sock_ops]
pub fn register(ctx: SockOpsContext) -> u32 {
    let variant = Variant { is_host: sock_ops::is_host, listening: sock_ops::register_listener };
    sock_ops::on_callback(&ctx, variant);
    SUCCESS
}

/// Reports listeners on kernels before 5.15, where `sock_ops` cannot read the network namespace's cookie. The
/// daemon registers them.
#[sock_ops]
pub fn announce(ctx: SockOpsContext) -> u32 {
    let variant = Variant { is_host: |_| true, listening: sock_ops::announce_listener };
    sock_ops::on_callback(&ctx, variant);
    SUCCESS
}

/// The only return value of the `sock_addr` hooks: they may change the address, but never refuse the call.
const PROCEED: i32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn redirect4(ctx: SockAddrContext) -> i32 {
    connect::redirect_v4(&ctx);
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn redirect6(ctx: SockAddrContext) -> i32 {
    connect::redirect_v6(&ctx);
    PROCEED
}

#[cgroup_sock_addr(getpeername4)]
pub fn peername4(ctx: SockAddrContext) -> i32 {
    peername::rewrite_v4(&ctx, Side::Peer);
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn peername6(ctx: SockAddrContext) -> i32 {
    peername::rewrite_v6(&ctx, Side::Peer);
    PROCEED
}

#[cgroup_sock_addr(getsockname4)]
pub fn sockname4(ctx: SockAddrContext) -> i32 {
    peername::rewrite_v4(&ctx, Side::Local);
    PROCEED
}

#[cgroup_sock_addr(getsockname6)]
pub fn sockname6(ctx: SockAddrContext) -> i32 {
    peername::rewrite_v6(&ctx, Side::Local);
    PROCEED
}

#[cgroup_sock_addr(sendmsg4)]
pub fn reply4(ctx: SockAddrContext) -> i32 {
    replies::rewrite_v4(&ctx);
    PROCEED
}

#[cgroup_sock_addr(sendmsg6)]
pub fn reply6(ctx: SockAddrContext) -> i32 {
    replies::rewrite_v6(&ctx);
    PROCEED
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The license: the kernel offers `bpf_sk_assign` and similar helpers only to GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

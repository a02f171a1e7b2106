//! lbridge's kernel programs. Entries only: each calls its hook's file and turns the answer into the kernel's return
//! code. One file per hook:
//!
//! - [`sk_lookup`]: picks the listener of a connection;
//! - [`sock_ops`]: registers the listeners to pick from, and notes who is behind a relayed connection;
//! - [`connect`]: where a container's localhost leads;
//! - [`peername`]: what the service, and such a container, sees as its peer;
//! - [`replies`]: what a container sees as the source of a UDP service's datagrams.
//!
//! The maps are in [`maps`], every read of a kernel context in [`ctx`].
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

/// Logs to the daemon, in debug objects only.
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
        // No socket: the kernel answers a SYN with RST, a datagram with ICMP's "port unreachable"; the container gets
        // ECONNREFUSED.
        Outcome::Refused => SK_DROP,
    }
}

#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    let Some(protocol) = ctx::protocol(&ctx) else { return SK_PASS };
    verdict(&ctx, ctx::ingress_ifindex(&ctx), protocol)
}

/// For kernels before 5.17, whose verifier refuses a read of `ingress_ifindex`. Without it a datagram with a false source
/// would reach the service from anywhere: UDP is left alone.
#[sk_lookup]
pub fn steer_any_interface(ctx: SkLookupContext) -> u32 {
    if !ctx::is_tcp(&ctx) {
        return SK_PASS;
    }
    verdict(&ctx, 0, TCP)
}

/// The only answer that leaves the answers of other `sock_ops` programs in force: after a 0 of any of them the kernel reports
/// -EPERM for all (`__cgroup_bpf_run_filter_sock_ops()`), and time-outs, windows and options that others set are void.
const SUCCESS: u32 = 1;

#[sock_ops]
pub fn register(ctx: SockOpsContext) -> u32 {
    let variant = Variant { is_host: sock_ops::is_host, listening: sock_ops::register_listener };
    sock_ops::on_callback(&ctx, variant);
    SUCCESS
}

/// For kernels before 5.15, where `sock_ops` cannot tell the network namespace: the daemon registers.
#[sock_ops]
pub fn announce(ctx: SockOpsContext) -> u32 {
    let variant = Variant { is_host: |_| true, listening: sock_ops::announce_listener };
    sock_ops::on_callback(&ctx, variant);
    SUCCESS
}

/// The only valid answer of a hook for addresses: it may change the address, never refuse the call.
const PROCEED: i32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn dial4(ctx: SockAddrContext) -> i32 {
    connect::dial_v4(&ctx);
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn dial6(ctx: SockAddrContext) -> i32 {
    connect::dial_v6(&ctx);
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

/// The kernel offers `bpf_sk_assign` and its like to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

//! ctx: the only reads and writes of kernel contexts. They are volatile, so that LLVM neither merges nor
//! narrows them: the verifier accepts a context field only at its own offset and width.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_CURRENT_NETNS, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr, bpf_sock_ops,
        bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as TupleV4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as TupleV6,
    },
    btf_maps::SkStorage,
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_release, bpf_sk_storage_get, bpf_skc_lookup_tcp,
    },
    programs::{SkLookupContext, SockAddrContext, SockOpsContext},
};
use lbridge_common::wire::{Address, Endpoint, TCP, UDP};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = TCP as u32;
const IPPROTO_UDP: u32 = UDP as u32;
/// Does not fit into a byte: kernels that keep the protocol in one report 6.
const IPPROTO_MPTCP: u32 = 262;

/// Reads a field of a kernel struct through a pointer that the kernel gave.
macro_rules! read {
    ($pointer:expr, $($field:tt)+) => {
        // SAFETY: a pointer that the kernel passed to the program (or that was checked for null); the
        // verifier rejects the program if the field is out of bounds.
        unsafe { core::ptr::read_volatile(&raw const (*$pointer).$($field)+) }
    };
}

macro_rules! write {
    ($pointer:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as for `read`; the verifier knows which fields a program may write.
        unsafe { core::ptr::write_volatile(&raw mut (*$pointer).$($field)+, $value) }
    };
}

macro_rules! read_words {
    ($pointer:expr, $field:ident) => {
        Address([
            read!($pointer, $field[0]),
            read!($pointer, $field[1]),
            read!($pointer, $field[2]),
            read!($pointer, $field[3]),
        ])
    };
}

#[inline(always)]
pub fn is_tcp(ctx: &SkLookupContext) -> bool {
    read!(ctx.lookup, protocol) == IPPROTO_TCP
}

/// Returns the packet's protocol, [`TCP`] or [`UDP`]; `None` for any other.
#[inline(always)]
pub fn protocol(ctx: &SkLookupContext) -> Option<u8> {
    match read!(ctx.lookup, protocol) {
        IPPROTO_TCP => Some(TCP),
        IPPROTO_UDP => Some(UDP),
        _ => None,
    }
}

#[inline(always)]
pub fn ingress_ifindex(ctx: &SkLookupContext) -> u32 {
    read!(ctx.lookup, ingress_ifindex)
}

/// Returns the packet's (source, destination). Returns `None` for an IPv6 packet with a v4-mapped address:
/// such a packet does not belong on a wire, and it would otherwise match the keys of IPv4 rules.
#[inline(always)]
pub fn packet(ctx: &SkLookupContext) -> Option<(Address, Endpoint)> {
    let lookup = ctx.lookup;
    // Host byte order, unlike the addresses and the remote port (include/uapi/linux/bpf.h).
    let port = read!(lookup, local_port) as u16;
    match read!(lookup, family) {
        AF_INET => Some((
            Address::from_v4_word(read!(lookup, remote_ip4)),
            Endpoint::new(Address::from_v4_word(read!(lookup, local_ip4)), port),
        )),
        AF_INET6 => {
            let (source, gateway) = (read_words!(lookup, remote_ip6), read_words!(lookup, local_ip6));
            (!source.is_v4() && !gateway.is_v4()).then_some((source, Endpoint::new(gateway, port)))
        }
        _ => None,
    }
}

/// Returns the packet's source port, in host byte order.
#[inline(always)]
pub fn source_port(ctx: &SkLookupContext) -> u16 {
    let lookup = ctx.lookup;
    u16::from_be(read!(lookup, remote_port))
}

/// Both ends of a socket; a listener's remote end is unspecified.
pub struct Ends {
    pub local: Endpoint,
    pub remote: Endpoint,
}

/// Returns both ends of the socket of a `sock_ops` callback; `None` if it is neither IPv4 nor IPv6.
///
/// All fields are read before the family is tested. Given reads within the branches, LLVM merges them into
/// one read behind the branches, at a computed offset, and the verifier reports "dereference of modified ctx
/// ptr R1 off=60 disallowed".
#[inline(always)]
pub fn ends(ctx: &SockOpsContext) -> Option<Ends> {
    let ops: *mut bpf_sock_ops = ctx.ops;
    let local_port = read!(ops, local_port) as u16;
    // Unlike the local port, this one is in network byte order, in the upper half of what is then a 32-bit
    // number.
    let remote_port = u32::from_be(read!(ops, remote_port)) as u16;
    let (local_v4, remote_v4) = (read!(ops, local_ip4), read!(ops, remote_ip4));
    let (local_v6, remote_v6) = (read_words!(ops, local_ip6), read_words!(ops, remote_ip6));
    let (local, remote) = match read!(ops, family) {
        AF_INET => (Address::from_v4_word(local_v4), Address::from_v4_word(remote_v4)),
        AF_INET6 => (local_v6, remote_v6),
        _ => return None,
    };
    Some(Ends { local: Endpoint::new(local, local_port), remote: Endpoint::new(remote, remote_port) })
}

/// Puts `value` into the storage of the callback's socket. Does nothing if the kernel has no memory for it.
#[inline(always)]
pub fn store<T>(ctx: &SockOpsContext, storage: &SkStorage<T>, value: &mut T) {
    let sk = read!(ctx.ops, __bindgen_anon_2.sk);
    if sk.is_null() {
        return;
    }
    // SAFETY: a socket of the kernel's, checked for null; `value` is a whole `T`. If the kernel has no memory
    // for it, it returns null, and the socket stays without a value.
    unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(storage).cast_mut().cast(),
            sk.cast(),
            core::ptr::from_mut(value).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    };
}

/// Returns a copy of the value in the storage of a name hook's socket.
#[inline(always)]
pub fn stored<T: Copy>(ctx: &SockAddrContext, storage: &SkStorage<T>) -> Option<T> {
    // SAFETY: the pointer leads into the storage of a socket that lives while the hook runs.
    unsafe { storage.get_ptr_mut(ctx).as_ref() }.copied()
}

/// Returns the socket's cookie, which is never reused.
#[inline(always)]
pub fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes the program's own context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Returns true if the socket of a `sock_ops` callback is bound to a device (`SO_BINDTODEVICE`).
#[inline(always)]
pub fn has_device(ctx: &SockOpsContext) -> bool {
    let sk = read!(ctx.ops, __bindgen_anon_2.sk);
    // The kernel passes no socket only in callbacks for request sockets, which we do not handle.
    sk.is_null() || read!(sk, bound_dev_if) != 0
}

#[inline(always)]
pub fn callback(ctx: &SockOpsContext) -> u32 {
    read!(ctx.ops, op)
}

/// Returns the flags of the callbacks that are enabled for the socket.
#[inline(always)]
pub fn callback_flags(ctx: &SockOpsContext) -> u32 {
    read!(ctx.ops, bpf_sock_ops_cb_flags)
}

/// Returns the first argument of a callback: for a state change, the old state.
#[inline(always)]
pub fn first_argument(ctx: &SockOpsContext) -> u32 {
    read!(ctx.ops, __bindgen_anon_1.args[0])
}

/// Returns the second argument of a callback: for a state change, the new state.
#[inline(always)]
pub fn second_argument(ctx: &SockOpsContext) -> u32 {
    read!(ctx.ops, __bindgen_anon_1.args[1])
}

#[inline(always)]
pub fn sock_ops_netns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes the program's own context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

#[inline(always)]
pub fn sock_addr_netns(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes the program's own context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Returns true if the socket of a `sock_addr` hook uses TCP or MPTCP.
#[inline(always)]
pub fn connects_tcp(ctx: &SockAddrContext) -> bool {
    matches!(read!(ctx.sock_addr, protocol), IPPROTO_TCP | IPPROTO_MPTCP)
}

/// Returns true if the socket of a connect hook is already bound to a loopback address or to a device, so
/// that it cannot be redirected.
#[inline(always)]
pub fn is_bound_v4(ctx: &SockAddrContext) -> bool {
    let sk = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    sk.is_null() || has_end(sk, Address::from_v4_word(read!(sk, src_ip4)))
}

/// Like [`is_bound_v4`], for an IPv6 socket.
#[inline(always)]
pub fn is_bound_v6(ctx: &SockAddrContext) -> bool {
    let sk = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    sk.is_null() || has_end(sk, read_words!(sk, src_ip6))
}

#[inline(always)]
fn has_end(sk: *mut bpf_sock, source: Address) -> bool {
    source.is_loopback() || read!(sk, bound_dev_if) != 0
}

/// Returns true if a socket in the caller's namespace listens on `at`: on its address, or on every address.
#[inline(always)]
pub fn is_listened_on(ctx: &SockAddrContext, at: &Endpoint) -> bool {
    let port = at.port.to_be();
    // A connection never has port 0 as its remote end, so the lookup finds only listeners.
    if at.address.is_v4() {
        let ip = at.address.v4_word();
        has_listener(ctx, &mut TupleV4 { saddr: ip, daddr: ip, sport: 0, dport: port })
    } else {
        let ip = at.address.0;
        has_listener(ctx, &mut TupleV6 { saddr: ip, daddr: ip, sport: 0, dport: port })
    }
}

#[inline(always)]
fn has_listener<T>(ctx: &SockAddrContext, tuple: &mut T) -> bool {
    let tuple: *mut bpf_sock_tuple = core::ptr::from_mut(tuple).cast();
    // SAFETY: the helper gets the program's own context, and a tuple whose length tells the family. A socket
    // that it finds is released.
    unsafe {
        let sk =
            bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, size_of::<T>() as u32, BPF_F_CURRENT_NETNS as u64, 0);
        !sk.is_null() && {
            bpf_sk_release(sk.cast());
            true
        }
    }
}

/// Puts `value` into the storage of a `sock_addr` hook's socket, and overwrites an earlier value.
#[inline(always)]
pub fn keep<T>(ctx: &SockAddrContext, storage: &SkStorage<T>, value: &mut T) {
    // SAFETY: the socket lives while the hook runs. This call does not change a value that is already there.
    let place = unsafe { storage.get_or_insert_ptr_mut(ctx, Some(value)) };
    if !place.is_null() {
        // SAFETY: the storage's own memory, checked for null. A reader that runs at the same time compares
        // what it read.
        unsafe { core::ptr::copy_nonoverlapping(value, place, 1) };
    }
}

/// The end of a connection that a name hook was called for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Peer,
    Local,
}

/// Returns both ends of a name hook's socket; the ports are in host byte order.
#[inline(always)]
pub fn ends_v4(ctx: &SockAddrContext) -> Option<Ends> {
    let sk = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    if sk.is_null() {
        return None;
    }
    let local = Endpoint::new(Address::from_v4_word(read!(sk, src_ip4)), read!(sk, src_port) as u16);
    let remote = Endpoint::new(Address::from_v4_word(read!(sk, dst_ip4)), u16::from_be(read!(sk, dst_port)));
    Some(Ends { local, remote })
}

/// Like [`ends_v4`], for an IPv6 socket; IPv4 on a dual-stack socket is v4-mapped.
#[inline(always)]
pub fn ends_v6(ctx: &SockAddrContext) -> Option<Ends> {
    let sk = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    if sk.is_null() {
        return None;
    }
    let local = Endpoint::new(read_words!(sk, src_ip6), read!(sk, src_port) as u16);
    let remote = Endpoint::new(read_words!(sk, dst_ip6), u16::from_be(read!(sk, dst_port)));
    Some(Ends { local, remote })
}

/// Returns the address and port in the hook's context: in a name hook what the caller would get, in a connect
/// hook what it dials, in a sendmsg hook the datagram's destination.
#[inline(always)]
pub fn name_v4(ctx: &SockAddrContext) -> Endpoint {
    Endpoint::new(Address::from_v4_word(read!(ctx.sock_addr, user_ip4)), name_port(ctx))
}

#[inline(always)]
pub fn name_v6(ctx: &SockAddrContext) -> Endpoint {
    Endpoint::new(read_words!(ctx.sock_addr, user_ip6), name_port(ctx))
}

#[inline(always)]
fn name_port(ctx: &SockAddrContext) -> u16 {
    // Network byte order, in the low half of a 32-bit word.
    u16::from_be(read!(ctx.sock_addr, user_port) as u16)
}

#[inline(always)]
pub fn set_name_v4(ctx: &SockAddrContext, name: &Endpoint) {
    let sock_addr: *mut bpf_sock_addr = ctx.sock_addr;
    write!(sock_addr, name.address.v4_word(), user_ip4);
    write!(sock_addr, u32::from(name.port.to_be()), user_port);
}

#[inline(always)]
pub fn set_name_v6(ctx: &SockAddrContext, name: &Endpoint) {
    let sock_addr: *mut bpf_sock_addr = ctx.sock_addr;
    let words = name.address.0;
    write!(sock_addr, words[0], user_ip6[0]);
    write!(sock_addr, words[1], user_ip6[1]);
    write!(sock_addr, words[2], user_ip6[2]);
    write!(sock_addr, words[3], user_ip6[3]);
    write!(sock_addr, u32::from(name.port.to_be()), user_port);
}

/// Returns the source that a datagram is about to leave with: the address that the service is bound to, or
/// the one that it requests (`IP_PKTINFO`). It is unspecified if the route is to decide.
#[inline(always)]
pub fn source_v4(ctx: &SockAddrContext) -> Address {
    Address::from_v4_word(read!(ctx.sock_addr, msg_src_ip4))
}

#[inline(always)]
pub fn source_v6(ctx: &SockAddrContext) -> Address {
    read_words!(ctx.sock_addr, msg_src_ip6)
}

#[inline(always)]
pub fn set_source_v4(ctx: &SockAddrContext, source: &Address) {
    let sock_addr: *mut bpf_sock_addr = ctx.sock_addr;
    write!(sock_addr, source.v4_word(), msg_src_ip4);
}

#[inline(always)]
pub fn set_source_v6(ctx: &SockAddrContext, source: &Address) {
    let sock_addr: *mut bpf_sock_addr = ctx.sock_addr;
    let words = source.0;
    write!(sock_addr, words[0], msg_src_ip6[0]);
    write!(sock_addr, words[1], msg_src_ip6[1]);
    write!(sock_addr, words[2], msg_src_ip6[2]);
    write!(sock_addr, words[3], msg_src_ip6[3]);
}

/// Returns the port that the socket of a `sock_addr` hook is bound to, in host byte order.
#[inline(always)]
pub fn bound_port(ctx: &SockAddrContext) -> Option<u16> {
    let sk = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    (!sk.is_null()).then(|| read!(sk, src_port) as u16)
}

//! symbols: names of the object's maps and programs, by which the loader finds them.
//!
//! A program must not be named like its section (`fn sk_lookup` in section `sk_lookup` fails to link).

/// Entries: [`crate::wire::EntryKey`] to [`crate::wire::CountedEntry`].
pub const ENTRIES: &str = "ENTRIES";
/// Sources that may use a rule with [`crate::wire::Entry::LISTED`]: [`crate::wire::SourceKey`] to 1
/// (`u8`).
pub const SOURCES: &str = "SOURCES";
/// Packets that lbridge's accept rules let through the firewall: [`crate::wire::AcceptedKey`] to 1 (`u8`).
pub const ACCEPTED: &str = "ACCEPTED";
/// Bound addresses and ports whose listeners are registered: [`crate::wire::TargetKey`] to 1 (`u8`).
pub const TARGETS: &str = "TARGETS";
/// Registered listeners: [`crate::wire::ListenerKey`] to socket.
pub const LISTENERS: &str = "LISTENERS";
/// Listening sockets of relays: [`crate::wire::EntryKey`] to socket.
pub const RELAYS: &str = "RELAYS";
/// Gateways whose connections look local: [`crate::wire::OverrideKey`] to [`crate::wire::NameOverride`].
pub const NAME_OVERRIDES: &str = "NAME_OVERRIDES";
/// Network namespaces whose localhost may lead to the host: cookie (`u64`) to
/// [`crate::wire::RedirectedNetns`].
pub const REDIRECT_NETNS: &str = "REDIRECT_NETNS";
/// Redirects, which lead from a guest's localhost to a gateway: [`crate::wire::RedirectKey`] to
/// [`crate::wire::Redirect`].
pub const REDIRECTS: &str = "REDIRECTS";
/// Source addresses for the datagrams of UDP services: [`crate::wire::ReplySourceKey`] to
/// [`crate::wire::ReplySource`].
pub const REPLY_SOURCES: &str = "REPLY_SOURCES";
/// Source addresses of the daemon's own probes: [`crate::wire::ProberKey`] to 1 (`u8`).
pub const PROBERS: &str = "PROBERS";
/// UDP rules that the daemon probes the firewall for: [`crate::wire::EntryKey`] to the number of datagrams
/// that arrived (`u64`).
pub const PROBES: &str = "PROBES";
/// Sockets of relays that are about to connect: socket cookie (`u64`) to the container's
/// [`crate::wire::Endpoint`].
pub const RELAY_CONNECTS: &str = "RELAY_CONNECTS";
/// Relayed connections: [`crate::wire::RelayPeerKey`] to [`crate::wire::RelayPeer`].
pub const RELAY_PEERS: &str = "RELAY_PEERS";
/// Socket storage of the service's own socket: the container's [`crate::wire::Endpoint`].
pub const PEER_NAMES: &str = "PEER_NAMES";
/// Socket storage of the service's own socket: the [`crate::wire::NameOverride::target`] that it sees as its
/// own end.
pub const LOOPBACK_NAMES: &str = "LOOPBACK_NAMES";
/// Socket storage of a container's socket: the [`crate::wire::Redirect`] that it used.
pub const ORIGINAL_DST: &str = "ORIGINAL_DST";
/// Counters of outcomes, per CPU, indexed by [`crate::wire::Counter`].
pub const COUNTERS: &str = "COUNTERS";
/// Ring buffer of [`crate::wire::ListenerEvent`].
pub const EVENTS: &str = "EVENTS";

/// Read-only global: cookie of the host's network namespace; 0 if the kernel does not provide it.
pub const HOST_NETNS: &str = "HOST_NETNS";

/// `sk_lookup` program that checks the ingress interface (Linux 5.17 and later).
pub const STEER: &str = "steer";
/// `sk_lookup` program that does not read `ingress_ifindex`; its entries have interface 0.
pub const STEER_ANY_INTERFACE: &str = "steer_any_interface";
/// `sock_ops` program that registers listeners (needs `bpf_get_netns_cookie` in `sock_ops`, Linux 5.15 and
/// later).
pub const REGISTER: &str = "register";
/// `sock_ops` program that only reports listeners to the daemon.
pub const ANNOUNCE: &str = "announce";
/// `cgroup/getpeername4` program.
pub const PEERNAME4: &str = "peername4";
/// `cgroup/getpeername6` program.
pub const PEERNAME6: &str = "peername6";
/// `cgroup/getsockname4` program.
pub const SOCKNAME4: &str = "sockname4";
/// `cgroup/getsockname6` program.
pub const SOCKNAME6: &str = "sockname6";
/// `cgroup/connect4` program.
pub const CONNECT4: &str = "redirect4";
/// `cgroup/connect6` program.
pub const CONNECT6: &str = "redirect6";
/// `cgroup/sendmsg4` program.
pub const REPLY4: &str = "reply4";
/// `cgroup/sendmsg6` program.
pub const REPLY6: &str = "reply6";

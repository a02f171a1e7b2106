//! Names of the object's maps and programs, as the loader asks for them.
//!
//! A program must not have its section's name (`fn sk_lookup` in section `sk_lookup` fails at link).

/// Rules, [`crate::wire::RuleKey`] to [`crate::wire::RuleValue`].
pub const RULES: &str = "RULES";
/// Who may use rules that are not for all: [`crate::wire::SourceKey`] to 1 (`u8`).
pub const SOURCES: &str = "SOURCES";
/// What accept rules let through the firewall: [`crate::wire::AcceptedKey`] to 1 (`u8`).
pub const ACCEPTED: &str = "ACCEPTED";
/// Bound addresses and ports whose listeners are registered: [`crate::wire::TargetKey`] to 1 (`u8`).
pub const TARGETS: &str = "TARGETS";
/// Registered listeners, [`crate::wire::ListenerKey`] to socket.
pub const LISTENERS: &str = "LISTENERS";
/// Listening sockets of relays, [`crate::wire::RuleKey`] to socket.
pub const RELAYS: &str = "RELAYS";
/// Gateways whose connections look local, [`crate::wire::ViewKey`] to [`crate::wire::LoopbackView`].
pub const LOOPBACK_VIEWS: &str = "LOOPBACK_VIEWS";
/// Namespaces whose localhost may lead to the host: cookie (`u64`) to [`crate::wire::Guest`].
pub const GUESTS: &str = "GUESTS";
/// Where it leads, [`crate::wire::DialKey`] to [`crate::wire::Dial`].
pub const DIALS: &str = "DIALS";
/// Sources of UDP services' datagrams: [`crate::wire::ReplyKey`] to [`crate::wire::Reply`].
pub const REPLIES: &str = "REPLIES";
/// Sources of the daemon's own probes: [`crate::wire::ProberKey`] to 1 (`u8`).
pub const PROBERS: &str = "PROBERS";
/// UDP rules that the daemon probes the firewall for: [`crate::wire::RuleKey`] to the datagrams that arrived (`u64`).
pub const PROBES: &str = "PROBES";
/// Relays' sockets that are about to connect: socket cookie (`u64`) to the container's [`crate::wire::Endpoint`].
pub const RELAY_CONNECTS: &str = "RELAY_CONNECTS";
/// Relayed connections, [`crate::wire::RelayPeerKey`] to [`crate::wire::RelayPeer`].
pub const RELAY_PEERS: &str = "RELAY_PEERS";
/// The container's [`crate::wire::Endpoint`], in the storage of the service's own socket.
pub const PEER_NAMES: &str = "PEER_NAMES";
/// What a service's own socket is shown as its end: [`crate::wire::LoopbackView::target`], in the socket's storage.
pub const LOOPBACK_NAMES: &str = "LOOPBACK_NAMES";
/// What a container's socket dialled: [`crate::wire::Dial`], in the socket's storage.
pub const DIALLED: &str = "DIALLED";
/// Outcomes, per CPU, indexed by [`crate::wire::Counter`].
pub const COUNTERS: &str = "COUNTERS";
/// Ring buffer of [`crate::wire::ListenerEvent`].
pub const EVENTS: &str = "EVENTS";

/// Read-only global: cookie of the network namespace that is "the host", 0 where the kernel does not tell it.
pub const HOST_NETNS: &str = "HOST_NETNS";

/// `sk_lookup`, checks the ingress interface (Linux 5.17 and later).
pub const STEER: &str = "steer";
/// `sk_lookup` without `ingress_ifindex`; its rules have interface 0.
pub const STEER_ANY_INTERFACE: &str = "steer_any_interface";
/// `sock_ops` that registers listeners (needs `bpf_get_netns_cookie` in `sock_ops`, Linux 5.15 and later).
pub const REGISTER: &str = "register";
/// `sock_ops` that only tells the daemon of listeners.
pub const ANNOUNCE: &str = "announce";
/// `cgroup/getpeername4`.
pub const PEERNAME4: &str = "peername4";
/// `cgroup/getpeername6`.
pub const PEERNAME6: &str = "peername6";
/// `cgroup/getsockname4`.
pub const SOCKNAME4: &str = "sockname4";
/// `cgroup/getsockname6`.
pub const SOCKNAME6: &str = "sockname6";
/// `cgroup/connect4`.
pub const CONNECT4: &str = "dial4";
/// `cgroup/connect6`.
pub const CONNECT6: &str = "dial6";
/// `cgroup/sendmsg4`.
pub const REPLY4: &str = "reply4";
/// `cgroup/sendmsg6`.
pub const REPLY6: &str = "reply6";

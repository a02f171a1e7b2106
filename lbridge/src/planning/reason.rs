//! Reasons: why a rule, or one of the addresses that it serves, is in its state. Each has a code, which
//! scripts and tests can rely on, and words for people, which may change.

use std::{io, net::IpAddr, net::SocketAddr};

use super::rule::{Network, RuleId, Target};

/// A reason for a [`State`](super::desired::State).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr, strum::VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum Reason {
    // The service.
    /// No socket listens where the rule leads.
    #[error("nothing listens on {0}")]
    NothingListens(Target),
    /// The kernel puts no MPTCP listener into a SOCKHASH (`sock_map_sk_is_suitable()`, net/core/sock_map.c).
    #[error(
        "the service listens with MPTCP; GODEBUG=multipathtcp=0 in a Go service's environment gets it steered"
    )]
    Mptcp,
    /// The kernel refused to register the listener, with this errno.
    #[error("the kernel refused to register the listener: {}", io::Error::from_raw_os_error(*.0))]
    RegisterRefused(i32),
    /// The map of listeners is full.
    #[error("the kernel's map of listeners is full")]
    ListenersFull,
    /// The kernel gives a connection only to a listener of its family.
    #[error("{} was dialled, the service listens on {listens_on}", family(*.dialled))]
    FamilyMismatch {
        /// The address that containers dial.
        dialled: IpAddr,
        /// The address that the service listens on.
        listens_on: SocketAddr,
    },
    /// The service listens on a Unix socket.
    #[error("the service listens on a Unix socket")]
    UnixSocket,
    /// Another user than the service's could turn the Unix socket's path elsewhere.
    #[error("{0}")]
    UntrustedPath(String),
    /// Another user listens at an address that the rule could mean.
    #[error("{address} belongs to another user (uid {uid}) and gets nothing")]
    ForeignListener {
        /// The address that the socket is bound to.
        address: SocketAddr,
        /// Id of the user who owns the socket.
        uid: u32,
    },
    /// The service is down and another user listens in its place.
    #[error("if that is the service now, deny the rule and allow it again")]
    ForeignListenerInItsPlace,
    /// Before Linux 5.17 a relay has to listen where another user's socket is.
    #[error(
        "a relay cannot listen on {dialled}: {address} belongs to another user (uid {uid}) and gets nothing; \
         stop that listener"
    )]
    ForeignListenerInTheWay {
        /// The address that containers dial.
        dialled: SocketAddr,
        /// The address that the socket is bound to.
        address: SocketAddr,
        /// Id of the user who owns the socket.
        uid: u32,
    },

    // What the rule asks for.
    /// The rule asks for it with `--path relay`.
    #[error("as the rule asks")]
    AsAsked,
    /// The rule is for localhost inside a namespace.
    #[error("a namespace's localhost is always relayed")]
    InsideNamespace,
    /// The rule has options that only a relay can serve.
    #[error("{0}")]
    NeedsRelay(&'static str),
    /// The rule has `--path steer` and leads to a Unix socket.
    #[error("a Unix socket can only be relayed to")]
    UnixSocketNotSteered,
    /// The service at a Unix socket would see the daemon's user as its peer.
    #[error("the service would see root as its peer, not the container; allow it with --source loopback")]
    UnixPeerIsRoot,
    /// A relay's connection would come from `::1`, and nothing could show the service the container behind
    /// it.
    #[error(
        "the service on {service} would take the container for a local client ({missing}); allow it with \
         --source loopback"
    )]
    WouldLookLocal {
        /// The address that the service listens on.
        service: SocketAddr,
        /// The reason why the kernel cannot name the container to the service.
        missing: String,
    },
    /// Another rule has the address.
    #[error("rule {first} has {dialled}{place} already; deny one of them")]
    AddressTaken {
        /// The rule that has the address.
        first: RuleId,
        /// The address that both would serve.
        dialled: SocketAddr,
        /// ` in that namespace` for a namespace, else empty.
        place: &'static str,
    },
    /// Another network's rule has the alias, and the kernel does not tell the networks apart (before Linux
    /// 5.17).
    #[error(
        "another network's rule has {alias}, and this kernel (before Linux 5.17) cannot tell the bridges \
         apart; dial {gateway}"
    )]
    AliasTaken {
        /// The other address of the host.
        alias: SocketAddr,
        /// The network's own gateway.
        gateway: IpAddr,
    },
    /// A UDP service answers a subnet from one address, and another gateway has it already.
    #[error("UDP replies to one subnet come from one address, {0}; dial that")]
    OneAnswerAddress(IpAddr),

    // What the kernel can do.
    /// `sk_lookup` cannot be used.
    #[error("{0}")]
    NoSteering(String),
    /// The getpeername and getsockname hooks cannot be attached.
    #[error("--source loopback without name hooks: {0}")]
    NoNameHooks(String),
    /// The connect hooks cannot be attached.
    #[error("{0}")]
    NoConnectHooks(String),
    /// The sendmsg hooks cannot be attached.
    #[error("UDP services could not answer: {0}")]
    NoReplyHooks(String),
    /// The kernel does not tell the ingress interface, and a datagram with a spoofed source would be served.
    #[error("UDP needs Linux 5.17: this kernel cannot check which bridge a datagram arrives on")]
    UdpNeedsInterface,
    /// UDP sockets cannot be listed.
    #[error("{0}")]
    UdpUnseen(String),

    // The network.
    /// The network is a namespace, not a bridge.
    #[error("it is not a bridge")]
    NoBridge,
    /// No bridge leads to the address.
    #[error("no bridge leads there")]
    NoBridgeLeads,
    /// The interface is no bridge: an uplink would open the port to the LAN.
    #[error("{0} is not a bridge; name the bridge that the containers are on")]
    NotABridge(String),
    /// The engine has several networks of that name.
    #[error("several networks are called {0}; name the id of one")]
    AmbiguousNetwork(String),
    /// The bridge was recreated, and the engine has not reported the new one yet.
    #[error("{0} was recreated, and the engine has not reported it yet")]
    BridgeNewer(String),
    /// The host has no such interface.
    #[error("there is no interface {name}{}", if *.comes { "; it comes with the network's first \
                                                            container" } else { "" })]
    NoInterface {
        /// Name of the interface.
        name: String,
        /// True if the engine makes the interface once the interface is needed.
        comes: bool,
    },
    /// The bridge has no address.
    #[error("{0} has no address that a container could dial")]
    NoGateway(String),
    /// The daemon runs with `--no-docker` and follows no engine.
    #[error("the daemon runs with --no-docker; name the bridge instead: bridge:IFNAME")]
    EngineOff,
    /// The engine does not answer, and the network was not seen before.
    #[error("the engine does not answer, and network {0} was not seen before")]
    EngineAway(String),
    /// The engine has no such network.
    #[error("the engine has no network {name}{hint}")]
    NoSuchNetwork {
        /// The name in the rule.
        name: String,
        /// A suggestion of what the name may have meant, or empty.
        hint: String,
    },
    /// The network is the engine's network `host`.
    #[error("its containers share the host's network namespace, so their localhost is the host's")]
    HostNetwork,
    /// The network's driver makes no bridge on the host.
    #[error("driver {0} creates no bridge on the host; allow its containers one by one: container:NAME")]
    DriverWithoutBridge(String),

    // Namespaces.
    /// The namespace was not looked for yet.
    #[error("not checked yet")]
    NotLookedAt,
    /// There is no such namespace, but it may come.
    #[error("{0}")]
    NoNamespace(String),
    /// The namespace cannot be served.
    #[error("{0}")]
    UnsuitableNamespace(String),
    /// The namespace's `lo` is down.
    #[error("its loopback interface is down; run `ip link set lo up` inside")]
    LoopbackDown,

    // `--localhost`.
    /// No gateway of the rule is served.
    #[error("no gateway of the rule is served")]
    NoGatewayServed,
    /// None of the containers that the rule names runs on the network.
    #[error("none of the rule's containers runs on this network")]
    NoContainerThere,

    // `--from`.
    /// The containers that are served.
    #[error("for {}", .0.join(", "))]
    ForContainers(Vec<String>),
    /// The engine's error about a container.
    #[error("container {name}: {error}")]
    ContainerError {
        /// Name of the container.
        name: String,
        /// The engine's error about it.
        error: String,
    },
    /// The engine has no such container.
    #[error("no container {name}{hint}")]
    NoSuchContainer {
        /// The name in the rule.
        name: String,
        /// A suggestion of what the name may have meant, or empty.
        hint: String,
    },
    /// The engine does not answer, and the container was not seen before.
    #[error("the engine does not answer, and container {0} was not seen before")]
    ContainerUnseen(String),
    /// The container does not run.
    #[error("container {0} is not running")]
    ContainerStopped(String),
    /// The container is on other networks.
    #[error("container {name} is not on {network}{}", elsewhere(.on))]
    ContainerElsewhere {
        /// Name of the container.
        name: String,
        /// The network of the rule.
        network: Network,
        /// Names of the networks that the container is on.
        on: Vec<String>,
    },
    /// The container has no address that could dial this gateway.
    #[error("container {name} has no {} address on the network of {gateway}", family(*.gateway))]
    ContainerWithoutAddress {
        /// Name of the container.
        name: String,
        /// The gateway that it cannot dial.
        gateway: IpAddr,
    },
    /// The rule names a bridge and has `--from`, and the daemon has no engine to ask for the containers'
    /// addresses.
    #[error("the daemon runs with --no-docker and knows no container's address; leave out --from")]
    FromWithoutEngine,
    /// The rule names a bridge and has `--from`, and the engine does not answer.
    #[error("the engine does not answer, and no network of its was seen on {0} before; leave out --from")]
    FromWhileEngineAway(String),
    /// The rule names a bridge and has `--from`, and the bridge belongs to none of the engine's networks.
    #[error(
        "{0} is no bridge of the engine's networks, so no container's address is known there; leave out \
         --from"
    )]
    FromOnForeignBridge(String),

    // What was observed.
    /// The kernel programs are detached.
    #[error("the kernel programs are detached and cannot be attached again; the daemon's log may say why")]
    Detached,
    /// A firewall drops what containers send.
    #[error("{0}")]
    FirewallDrops(String),
    /// The kernel lacks some of the containers that the rule is for.
    #[error("the kernel lacks addresses of some of its containers; the daemon's log may say why")]
    SourcesMissing,
    /// No listener of the service is registered.
    #[error("its listener is not registered; the daemon's log may say why")]
    ListenerUnregistered,
    /// The kernel has no entry for the address.
    #[error("the kernel has no entry for it; the daemon's log may say why")]
    EntryMissing,
    /// The kernel has no entry that leads localhost to the gateway.
    #[error("the kernel has no entry for localhost; the daemon's log may say why")]
    LocalhostEntryMissing,
    /// The relay does not listen.
    #[error("its relay is not open; the daemon's log may say why")]
    RelayClosed,
    /// A change that the rule needs failed.
    #[error("{0}")]
    Failed(String),
}

impl Reason {
    /// Returns the reason's name in the control API. It stays the same when the words change.
    pub fn code(&self) -> &'static str {
        self.into()
    }
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn elsewhere(networks: &[String]) -> String {
    if networks.is_empty() { String::new() } else { format!(", but on {}", networks.join(" and ")) }
}

/// Joins all of the reasons in one line of text.
pub fn in_words(reasons: &[Reason]) -> String {
    reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use strum::VariantNames as _;

    use super::Reason;

    /// The codes that scripts match. A renamed variant keeps its code with `#[strum(serialize = "...")]`.
    const CODES: [&str; 61] = [
        "nothing_listens",
        "mptcp",
        "register_refused",
        "listeners_full",
        "family_mismatch",
        "unix_socket",
        "untrusted_path",
        "foreign_listener",
        "foreign_listener_in_its_place",
        "foreign_listener_in_the_way",
        "as_asked",
        "inside_namespace",
        "needs_relay",
        "unix_socket_not_steered",
        "unix_peer_is_root",
        "would_look_local",
        "address_taken",
        "alias_taken",
        "one_answer_address",
        "no_steering",
        "no_name_hooks",
        "no_connect_hooks",
        "no_reply_hooks",
        "udp_needs_interface",
        "udp_unseen",
        "no_bridge",
        "no_bridge_leads",
        "not_a_bridge",
        "ambiguous_network",
        "bridge_newer",
        "no_interface",
        "no_gateway",
        "engine_off",
        "engine_away",
        "no_such_network",
        "host_network",
        "driver_without_bridge",
        "not_looked_at",
        "no_namespace",
        "unsuitable_namespace",
        "loopback_down",
        "no_gateway_served",
        "no_container_there",
        "for_containers",
        "container_error",
        "no_such_container",
        "container_unseen",
        "container_stopped",
        "container_elsewhere",
        "container_without_address",
        "from_without_engine",
        "from_while_engine_away",
        "from_on_foreign_bridge",
        "detached",
        "firewall_drops",
        "sources_missing",
        "listener_unregistered",
        "entry_missing",
        "localhost_entry_missing",
        "relay_closed",
        "failed",
    ];

    #[test]
    fn codes_stay_the_same() {
        assert_eq!(Reason::VARIANTS, CODES);
    }
}

//! Inventory: the observed state of the host, and the features of its kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::{
    hooks::PerHookSet,
    rule::{Network, ProcessStart, Protocol},
};

/// One observation of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Docker's networks; the last known ones while the engine is away.
    pub docker_networks: Vec<DockerNetwork>,
    /// Reachability of the engine. Unless it is reachable, a network that is not in the list may still exist.
    pub docker: EngineAvailability,
    /// Containers by the names that rules use, or the engine's error for a name; the last known ones while
    /// the engine is away.
    pub containers: BTreeMap<String, Result<Container, String>>,
    /// Names of all of the engine's containers. Listed only if a name that rules use matches no container.
    pub container_names: Vec<String>,
    /// Addresses that the engine is configured to give containers for `host-gateway`. Without such a setting
    /// it gives them the address of its default bridge.
    pub host_gateways: Vec<IpAddr>,
    /// Further addresses by which containers know the host, from `aliases` in the configuration.
    pub aliases: BTreeSet<IpAddr>,
    /// Every interface of the host's network namespace.
    pub interfaces: Vec<Interface>,
    /// Every listening TCP socket of the host's network namespace.
    pub listeners: Vec<Listener>,
    /// UDP sockets of the host's network namespace that take datagrams from everybody. Listed only if a rule
    /// asks for UDP.
    pub udp_sockets: Vec<Listener>,
    /// The error, if a rule asks for UDP and the UDP sockets could not be listed.
    pub udp_unseen: Option<String>,
    /// Paths of listening Unix stream sockets.
    pub unix_listeners: BTreeSet<PathBuf>,
    /// Unix socket paths of rules that lead over another user's symbolic link, each with the error. lbridge
    /// does not follow them.
    pub untrusted_paths: BTreeMap<PathBuf, String>,
    /// The network namespaces that rules name, or the reason why there is none.
    pub namespaces: BTreeMap<Network, Result<Namespace, NetnsUnavailable>>,
    /// The owner of the service on each port of the rules. For a service that is down, the owner when it was
    /// last seen.
    pub incumbents: Incumbents,
}

impl Inventory {
    /// Returns the sockets that take connections (TCP) or datagrams (UDP).
    pub fn sockets(&self, protocol: Protocol) -> &[Listener] {
        match protocol {
            Protocol::Tcp => &self.listeners,
            Protocol::Udp => &self.udp_sockets,
        }
    }

    /// Returns the interface of that name.
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|i| i.name == name)
    }

    /// Returns true if the name of some network's bridge belongs to another interface than when the engine
    /// last reported it. The engine must then be asked again.
    pub fn outruns_engine(&self) -> bool {
        self.docker_networks.iter().any(|network| {
            let there = network.bridge.as_deref().and_then(|name| self.interface(name));
            there.is_some_and(|interface| !network.means(interface))
        })
    }
}

/// Name of the engine's default network, whose bridge is `docker0`.
pub const DEFAULT_NETWORK: &str = "bridge";

/// Returns the networks that `name` may mean, as Docker resolves it: the network with that id; else those
/// with that name, of which the engine's API allows several; else those whose id starts with it.
pub fn find_networks<'a>(networks: &'a [DockerNetwork], name: &str) -> Vec<&'a DockerNetwork> {
    // Docker prints this many digits of an id. Anything shorter is a name.
    const SHORT_ID: usize = 12;
    let select =
        |fits: &dyn Fn(&DockerNetwork) -> bool| networks.iter().filter(|n| fits(n)).collect::<Vec<_>>();
    let by_id = select(&|n| n.id == name);
    if !by_id.is_empty() {
        return by_id;
    }
    let by_name = select(&|n| n.name == name || n.other_name.as_deref() == Some(name));
    let is_id = name.len() >= SHORT_ID && name.bytes().all(|b| b.is_ascii_hexdigit());
    if by_name.is_empty() && is_id { select(&|n| n.id.starts_with(name)) } else { by_name }
}

/// The reachability of a Docker Engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EngineAvailability {
    /// The daemon runs with `--no-docker` and asks no engine.
    #[default]
    Off,
    /// The engine does not answer, or was not asked yet.
    Away,
    /// The engine answers, and its list is current.
    Reachable,
}

/// The product that an engine is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// The Docker Engine, or any engine that does not say otherwise.
    #[default]
    Docker,
    /// Podman, which speaks Docker's API and one of its own.
    Podman,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Docker => "Docker",
            Self::Podman => "Podman",
        })
    }
}

/// A network as the engine describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DockerNetwork {
    /// The engine's network id, 64 hexadecimal digits.
    pub id: String,
    /// The network's name. Unique among the engine's networks, unless somebody asked the engine's API for a
    /// duplicate.
    pub name: String,
    /// The network's driver: `bridge`, `macvlan`, `host`, ...
    pub driver: String,
    /// Name of the bridge interface on the host; `None` if the network has no bridge there.
    pub bridge: Option<String>,
    /// Set only if the engine gives the name of a bridge to another network once the name is free (Podman):
    /// the index of the interface that had the name when the engine reported it, 0 if none had it. `None` if
    /// the name belongs to this network for as long as the network exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge_index: Option<u32>,
    /// The name that Docker's API has for the network, if it differs from Podman's own (`name`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_name: Option<String>,
}

impl DockerNetwork {
    /// Returns true if `interface`, which has the name of the network's bridge, is that bridge.
    pub fn means(&self, interface: &Interface) -> bool {
        self.bridge_index.is_none_or(|index| index == interface.index)
    }
}

/// A container as the engine describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Container {
    /// True if the container runs.
    pub running: bool,
    /// The container's networks, in order of name.
    pub attachments: Vec<Attachment>,
    /// Cookie of the container's network namespace. Set only if a rule with `localhost` names the container
    /// and the namespace can be entered: it tells the container's localhost from its neighbours'.
    pub netns: Option<u64>,
}

/// A container that ran when it was last seen; saved for a start while the engine is away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenContainer {
    /// The name by which rules refer to the container.
    pub name: String,
    /// The engine's container id, 64 hexadecimal digits.
    pub id: String,
    /// Process id of the container's first process.
    pub pid: u32,
    /// Start of that process, which tells it from a later process with the same number.
    pub start: ProcessStart,
    /// The container's networks, in order of name.
    #[serde(default, rename = "attachment", skip_serializing_if = "Vec::is_empty")]
    pub attachments: Vec<Attachment>,
}

/// A container's place on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The name of the network.
    pub network: String,
    /// The id of the network; `None` if the engine does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Addresses that the engine gave the container on that network, while the container runs.
    pub addresses: Vec<IpAddr>,
}

impl Attachment {
    /// Returns true if the attachment is to that network. Compares ids where they are known, since the
    /// engine's API allows several networks of one name.
    pub fn is_on(&self, network: &DockerNetwork) -> bool {
        self.id.as_ref().map_or(self.network == network.name, |id| *id == network.id)
    }
}

/// A network namespace other than the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// The namespace's identity, and the way to enter it.
    pub key: NamespaceKey,
    /// Loopback addresses that a relay can listen on inside: `::1` only if IPv6 is on, none while `lo` is
    /// down.
    pub loopback: Vec<IpAddr>,
    /// The address of whoever is inside, if a trustworthy source (Docker) reports it. Whoever is inside
    /// chooses the addresses of the interfaces there, so these are not trusted.
    pub address: Option<IpAddr>,
}

/// A network namespace, and the way to enter it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceKey {
    /// The namespace's identity.
    pub id: NamespaceId,
    /// The way to enter the namespace.
    pub entrance: NetnsRef,
}

/// The identity of a namespace for as long as it exists: that of its file on nsfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId {
    /// Device number of the file (`st_dev`).
    pub device: u64,
    /// Inode number of the file (`st_ino`).
    pub inode: u64,
}

/// A way into a namespace. Once the way closes, the namespace counts as gone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NetnsRef {
    /// Through a process that is inside.
    Process {
        /// Process id of that process.
        pid: u32,
        /// Start of the process, which tells it from a later process with the same number; `None` if unknown.
        start: Option<ProcessStart>,
        /// Id of the container whose cgroup the process must be in. Set if the process id is hearsay: an
        /// engine on another host, or in another pid namespace, reports numbers of other processes.
        container: Option<String>,
    },
    /// Through a file on nsfs.
    Path(PathBuf),
}

/// The reason why there is no namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetnsUnavailable {
    /// The namespace is not there, but it may come.
    NotThere(String),
    /// The namespace cannot be served.
    Unsuitable(String),
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Interface index, unique in the namespace.
    pub index: u32,
    /// Interface name, unique in the namespace.
    pub name: String,
    /// True if the interface is a Linux bridge.
    pub is_bridge: bool,
    /// True if the interface is a port of a bridge, or part of another interface. The host's stack sees its
    /// packets arrive on that other interface.
    pub is_port: bool,
    /// The interface's addresses except link-local ones, each with its prefix length in bits.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// The kind of a listening socket, as far as the kernel treats kinds differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenerKind {
    /// Plain TCP, which a SOCKHASH takes.
    Tcp,
    /// MPTCP, which a SOCKHASH does not take.
    Mptcp,
    /// UDP, not connected.
    Udp,
    /// Plain TCP or UDP that the kernel refused to register, with the errno.
    Refused(i32),
    /// Plain TCP or UDP, for which the kernel's map of listeners has no room.
    NoRoom,
}

/// A listening TCP socket of the host's namespace, or a UDP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Address and port that the socket is bound to.
    pub address: SocketAddr,
    /// Inode number on sockfs, which identifies the socket.
    pub inode: u64,
    /// Id of the user who made the socket (`idiag_uid` of sock_diag).
    pub uid: u32,
    /// True if the socket serves one family only: it is IPv4, or has `IPV6_V6ONLY` set.
    pub single_family: bool,
    /// Interface index set with `SO_BINDTODEVICE`, 0 for none.
    pub bound_interface: u32,
    /// The socket's kind, which decides how the kernel treats it.
    pub kind: ListenerKind,
}

/// Features of the kernel here: tried, not guessed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFeatures {
    /// `sk_lookup` steering, or the reason why the kernel cannot steer.
    pub steer: Result<Steering, String>,
    /// For each set of hooks, `Ok` if it can be attached, or the reason why not.
    pub hooks: PerHookSet<Result<(), String>>,
}

/// The features of steering on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steering {
    /// True if the program checks the ingress interface (Linux 5.17 and later), not only the source subnet.
    pub interface_check: bool,
    /// True if the kernel registers new listeners itself (Linux 5.15 and later). Otherwise the daemon
    /// registers them.
    pub kernel_registers: bool,
}

/// The owner of each port's service when it was last seen.
pub type Incumbents = BTreeMap<(Protocol, u16), Owner>;

/// The user whose sockets are a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Id of the user.
    pub uid: u32,
    /// True if the user's sockets take connections to 127.0.0.1.
    pub(super) v4: bool,
    /// True if the user's sockets take connections to `::1`.
    pub(super) v6: bool,
}

impl Owner {
    pub(super) fn listens(self, v4: bool) -> bool {
        if v4 { self.v4 } else { self.v6 }
    }
}

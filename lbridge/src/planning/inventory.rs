//! Inventory: what was observed of the host, and what this kernel is able to do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::{
    hooks::PerHookSet,
    owner::Incumbents,
    rule::{Network, ProcessStart, Protocol},
};

/// One look at the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Docker's networks; the last known while the engine is away.
    pub docker_networks: Vec<DockerNetwork>,
    /// Whether the engine could ever be asked; until then a network that is not known may still exist.
    pub docker: DockerPresence,
    /// Containers by the names that rules use, or what the engine has against a name; the last known while it is away.
    pub containers: BTreeMap<String, Result<Container, String>>,
    /// The names of all of the engine's containers, where a name that rules use is nobody's.
    pub container_names: Vec<String>,
    /// What the engine gives containers for the host's address, where it was told to; else it is its default bridge's.
    pub host_gateways: Vec<IpAddr>,
    /// Other addresses that containers know the host by, as the configuration says.
    pub aliases: BTreeSet<IpAddr>,
    /// Every interface of the host's namespace.
    pub interfaces: Vec<Interface>,
    /// Every listening TCP socket of the host's namespace.
    pub listeners: Vec<Listener>,
    /// The UDP sockets of the host's namespace that take datagrams from everybody, where a rule asks for UDP.
    pub udp_sockets: Vec<Listener>,
    /// Why those could not be listed, if a rule asks for UDP.
    pub udp_unseen: Option<String>,
    /// Paths of listening Unix stream sockets.
    pub unix_listeners: BTreeSet<PathBuf>,
    /// Paths of rules that are not followed, and why: over a link of somebody else.
    pub untrusted_paths: BTreeMap<PathBuf, String>,
    /// The namespaces that rules name, or why there is none.
    pub namespaces: BTreeMap<Network, Result<Namespace, Absence>>,
    /// Whose the services of rules' ports are, or were when they were last seen.
    pub incumbents: Incumbents,
}

impl Inventory {
    /// What takes connections, or datagrams.
    pub fn sockets(&self, protocol: Protocol) -> &[Listener] {
        match protocol {
            Protocol::Tcp => &self.listeners,
            Protocol::Udp => &self.udp_sockets,
        }
    }

    /// The interface of that name.
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|i| i.name == name)
    }

    /// Whether some network's bridge is another interface than when the engine told of it, so that the engine is to be asked
    /// anew.
    pub fn outruns_engine(&self) -> bool {
        self.docker_networks.iter().any(|network| {
            let there = network.bridge.as_deref().and_then(|name| self.interface(name));
            there.is_some_and(|interface| !network.means(interface))
        })
    }
}

/// The engine's own network, which its bridge `docker0` is of.
pub const DEFAULT_NETWORK: &str = "bridge";

/// The networks that `name` may mean, as Docker reads it: the one with that id; else those of that name, of which the
/// engine's API allows several; else those whose id starts so.
pub fn find_networks<'a>(networks: &'a [DockerNetwork], name: &str) -> Vec<&'a DockerNetwork> {
    // What Docker prints of an id; anything shorter is a name.
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

/// Whether a Docker Engine can be asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DockerPresence {
    /// `--no-docker`.
    #[default]
    Off,
    /// It does not answer.
    Away,
    /// Its list is current.
    Reachable,
}

/// Whose engine it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Product {
    /// The Docker Engine, or whoever does not say otherwise.
    #[default]
    Docker,
    /// Podman, which speaks Docker's API and one of its own.
    Podman,
}

impl fmt::Display for Product {
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
    /// 64 hexadecimal digits.
    pub id: String,
    /// Unique among the engine's networks, unless somebody asked its API otherwise.
    pub name: String,
    /// `bridge`, `macvlan`, `host`, ...
    pub driver: String,
    /// The host's interface, for the bridge driver.
    pub bridge: Option<String>,
    /// Where the engine gives the name of a bridge to another network once it is free: the index of the interface that had
    /// it when the engine told, 0 where none had. `None` where the name is this network's for as long as that exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge_index: Option<u32>,
    /// What the engine calls it elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_name: Option<String>,
}

impl DockerNetwork {
    /// Whether an interface that is called as the network's bridge is that bridge.
    pub fn means(&self, interface: &Interface) -> bool {
        self.bridge_index.is_none_or(|index| index == interface.index)
    }
}

/// A container as the engine describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Container {
    /// Whether it runs.
    pub running: bool,
    /// Its networks, in order of name.
    pub attachments: Vec<Attachment>,
    /// The cookie of its network namespace, where its localhost is to be told from its neighbours'.
    pub netns: Option<u64>,
}

/// A container that ran when it was last seen, for a start while the engine is away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenContainer {
    /// The name that it was asked for by.
    pub name: String,
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its first process.
    pub pid: u32,
    /// Which process the number meant.
    pub start: ProcessStart,
    /// Its networks, in order of name.
    #[serde(default, rename = "attachment", skip_serializing_if = "Vec::is_empty")]
    pub attachments: Vec<Attachment>,
}

/// A container's place on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network's name.
    pub network: String,
    /// Its id, where the engine tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The addresses that the engine gave the container there, while it runs.
    pub addresses: Vec<IpAddr>,
}

impl Attachment {
    /// Whether it is on that network: by id, since the engine's API allows several of one name.
    pub fn is_on(&self, network: &DockerNetwork) -> bool {
        self.id.as_ref().map_or(self.network == network.name, |id| *id == network.id)
    }
}

/// A network namespace other than the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Which, and how to get there.
    pub key: NamespaceKey,
    /// The loopback addresses that can be listened on inside: ::1 only where IPv6 is on, none while `lo` is down.
    pub loopback: Vec<IpAddr>,
    /// The address of whoever is inside, if somebody trustworthy tells it: Docker. What an interface inside says is the
    /// choice of whoever is inside.
    pub address: Option<IpAddr>,
}

/// A network namespace, and how to get there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceKey {
    /// Which.
    pub id: NamespaceId,
    /// How to get there.
    pub entrance: Entrance,
}

/// A namespace's identity for as long as it exists: that of its file on nsfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// A way into a namespace; where it closes, the namespace counts as gone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entrance {
    /// A process inside.
    Process {
        /// Its number.
        pid: u32,
        /// Which process the number means, where that is known.
        start: Option<ProcessStart>,
        /// The container whose cgroup it must be in, by its id, where the number is hearsay: an engine on another host, or in
        /// another pid namespace, tells numbers of other processes.
        container: Option<String>,
    },
    /// A file on nsfs.
    Path(PathBuf),
}

/// Why there is no namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Absence {
    /// It may come.
    NotThere(String),
    /// It is none that can be served.
    Unsuitable(String),
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Interface index.
    pub index: u32,
    /// Name, unique in the namespace.
    pub name: String,
    /// Whether it is a Linux bridge.
    pub is_bridge: bool,
    /// It is a port of a bridge, or part of another interface: the host's stack sees its packets come in by that one.
    pub is_port: bool,
    /// Its addresses but link-local ones, with the length of their prefix in bits.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// How the kernel treats a listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenerKind {
    /// Plain TCP.
    Tcp,
    /// MPTCP, which a SOCKHASH does not take.
    Mptcp,
    /// UDP, and not connected.
    Udp,
    /// Plain TCP or UDP that the kernel refused to register, with this errno.
    Refused(i32),
    /// Plain TCP or UDP, for which the kernel's map of listeners has no room.
    NoRoom,
}

/// A listening TCP socket of the host's namespace, or a UDP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Where it is bound.
    pub address: SocketAddr,
    /// Inode on sockfs: its identity.
    pub inode: u64,
    /// The user who made it (`idiag_uid` of sock_diag).
    pub uid: u32,
    /// `IPV6_V6ONLY`, or IPv4.
    pub single_family: bool,
    /// `SO_BINDTODEVICE`: an interface index, 0 for none.
    pub bound_interface: u32,
    /// How the kernel treats it.
    pub kind: ListenerKind,
}

/// What the kernel is able to do here; tried, not guessed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abilities {
    /// `sk_lookup` steering, or why not.
    pub steer: Result<Steering, String>,
    /// Whether each set of hooks can be attached, or why not.
    pub hooks: PerHookSet<Result<(), String>>,
}

/// How steering is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steering {
    /// The program checks the ingress interface, not the source subnet alone (Linux 5.17 and later).
    pub interface_check: bool,
    /// The kernel registers new listeners itself (Linux 5.15 and later); else the daemon does.
    pub kernel_registers: bool,
}

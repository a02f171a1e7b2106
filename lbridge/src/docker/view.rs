//! View: the last known state of the engine.

use std::{collections::BTreeMap, net::IpAddr};

use jiff::Timestamp;

use crate::planning::{
    inventory::{Attachment, DockerNetwork, EngineKind},
    labels::Labelled,
};

/// The state of the connection to the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineStatus {
    /// The engine was not asked yet.
    Unknown,
    /// The engine answers.
    Reachable {
        /// Docker or Podman.
        engine: EngineKind,
        /// The engine's version, as it reports it.
        version: String,
    },
    /// The engine does not answer.
    Away {
        /// Docker or Podman, as the engine last answered; Docker if it never did.
        engine: EngineKind,
        /// The time of the first failure since the engine last answered.
        since: Timestamp,
        /// The error of the latest attempt, in one line.
        error: String,
    },
}

/// The last known state of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The state of the connection to the engine.
    pub presence: EngineStatus,
    /// The engine's networks; the last known ones while it is away.
    pub networks: Vec<DockerNetwork>,
    /// The containers that were asked for, each under the name that was asked for; the last known ones while
    /// the engine is away.
    pub containers: BTreeMap<String, ContainerLookup>,
    /// The names of all containers, if one that was asked for does not exist; otherwise empty.
    pub container_names: Vec<String>,
    /// The networks and containers with lbridge's labels, if labels are followed; the last known ones while
    /// the engine is away.
    pub labelled: Vec<Labelled>,
    /// The addresses that the engine gives containers for `host-gateway`, if it was configured with any.
    pub host_gateways: Vec<IpAddr>,
}

/// The engine's answer to a lookup of a container by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerLookup {
    /// The container of this name.
    Found(Container),
    /// No container has this name.
    NotFound,
    /// The engine's error, which concerns this name only.
    Failed(String),
}

impl ContainerLookup {
    /// Returns the container, if there is one.
    pub fn found(&self) -> Option<&Container> {
        if let Self::Found(container) = self { Some(container) } else { None }
    }

    /// Returns the container to be changed, if there is one.
    pub fn found_mut(&mut self) -> Option<&mut Container> {
        if let Self::Found(container) = self { Some(container) } else { None }
    }
}

/// A container as the engine describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// The engine's container id, 64 hexadecimal digits.
    pub id: String,
    /// The number of its first process in the engine's pid namespace; `None` if the container does not run.
    pub pid: Option<u32>,
    /// True if the container runs; false as soon as the engine has reported its end.
    pub running: bool,
    /// The container's networks, sorted by name.
    pub attachments: Vec<Attachment>,
}

impl Container {
    /// Returns the container's address on the first of its networks that gives it one.
    pub fn address(&self) -> Option<IpAddr> {
        self.attachments.iter().flat_map(|there| &there.addresses).next().copied()
    }
}

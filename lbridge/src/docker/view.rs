//! What is known of the engine.

use std::{collections::BTreeMap, net::IpAddr};

use jiff::Timestamp;

use crate::planning::{
    inventory::{Attachment, DockerNetwork, Product},
    labels::Labelled,
};

/// Whether the engine answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// Not asked yet.
    Unknown,
    /// It does.
    Reachable {
        /// Which it is.
        engine: Product,
        /// Its version.
        version: String,
    },
    /// It does not.
    Away {
        /// Which it was, when it last did.
        engine: Product,
        /// Since when.
        since: Timestamp,
        /// Why.
        error: String,
    },
}

/// What is known of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Whether it answers.
    pub presence: Presence,
    /// Its networks; the last known while it is away.
    pub networks: Vec<DockerNetwork>,
    /// The containers that were asked for, by the name that was asked for; the last known while it is away.
    pub containers: BTreeMap<String, Sighting>,
    /// The names of all containers, where one that was asked for is nobody's.
    pub container_names: Vec<String>,
    /// What asks for something by labels, where these are followed; the last known while it is away.
    pub labelled: Vec<Labelled>,
    /// What the engine gives containers for the host's address, where it was told to.
    pub host_gateways: Vec<IpAddr>,
}

/// What the engine says of a name: a container, none, or what is wrong with it.
pub type Sighting = Result<Option<Container>, String>;

/// A container as the engine describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its first process, in the engine's pid namespace, while it runs.
    pub pid: Option<u32>,
    /// Whether it runs; not if the engine has told of its end.
    pub running: bool,
    /// Its networks, in order of name.
    pub attachments: Vec<Attachment>,
}

impl Container {
    /// Its address on the first of its networks that gives it one.
    pub fn address(&self) -> Option<IpAddr> {
        self.attachments.iter().flat_map(|there| &there.addresses).next().copied()
    }
}

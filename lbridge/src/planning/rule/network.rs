//! Network: a network as the administrator names it.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::{Invalid, invalid};

/// Longest network name taken, in bytes. Docker's own limit is lower in practice.
const MAX_NAME: usize = 255;
/// `IFNAMSIZ` less the terminating zero (include/uapi/linux/if.h).
const MAX_INTERFACE_NAME: usize = 15;

/// A network as the administrator names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Network {
    /// A Docker network, by its name or id.
    Docker(String),
    /// `bridge:IFNAME`: a Linux bridge, whoever made it.
    Bridge(String),
    /// `container:NAME`: the network namespace of a Docker container, by its name or id.
    Container(String),
    /// `netns:PATH`: the network namespace that the file at PATH refers to.
    Netns(PathBuf),
    /// `pid:N`: the network namespace of that process, for as long as it runs.
    Process(u32),
}

impl Network {
    /// Returns true if the network is a namespace, served by a relay on loopback inside, and not a bridge of
    /// the host.
    pub fn is_namespace(&self) -> bool {
        match self {
            Self::Docker(_) | Self::Bridge(_) => false,
            Self::Container(_) | Self::Netns(_) | Self::Process(_) => true,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Docker(name) => f.write_str(name),
            Self::Bridge(name) => write!(f, "bridge:{name}"),
            Self::Container(name) => write!(f, "container:{name}"),
            Self::Netns(path) => write!(f, "netns:{}", path.display()),
            Self::Process(pid) => write!(f, "pid:{pid}"),
        }
    }
}

impl FromStr for Network {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if let Some(name) = text.strip_prefix("bridge:") {
            let fits = !name.is_empty() && name.len() <= MAX_INTERFACE_NAME && name != "." && name != "..";
            if !fits || name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
                return invalid(format!(
                    "{text:?} is not an interface name; write bridge:IFNAME, e.g. bridge:docker0"
                ));
            }
            return Ok(Self::Bridge(name.to_owned()));
        }
        if let Some(path) = text.strip_prefix("netns:") {
            // PATH_MAX (limits.h), its terminating zero included.
            let fits = Path::new(path).is_absolute() && path.len() < 4096;
            if !fits || path.chars().any(char::is_control) {
                return invalid(format!(
                    "{text:?} is not a namespace; write netns:PATH with an absolute path, e.g. \
                     netns:/run/netns/sandbox"
                ));
            }
            return Ok(Self::Netns(PathBuf::from(path)));
        }
        if let Some(pid) = text.strip_prefix("pid:") {
            let number = pid.parse().ok().filter(|_| pid.bytes().all(|b| b.is_ascii_digit()));
            return match number {
                // pid_t is signed.
                Some(pid @ 1..=0x7fff_ffff) => Ok(Self::Process(pid)),
                _ => invalid(format!("{text:?} is not a process; write pid:N, e.g. pid:4711")),
            };
        }
        let (name, container) = match text.strip_prefix("container:") {
            Some(name) => (name, true),
            None => (text, false),
        };
        if name.is_empty()
            || name.len() > MAX_NAME
            || name
                .chars()
                .any(|c| c.is_control() || c.is_whitespace() || c == '/' || (container && c == ':'))
        {
            return invalid(format!(
                "{text:?} is not a network; write a Docker network's name or id, bridge:IFNAME, \
                 container:NAME, netns:PATH or pid:N"
            ));
        }
        if container {
            return Ok(Self::Container(name.to_owned()));
        }
        Ok(Self::Docker(text.to_owned()))
    }
}

/// Parses a container's name or id as `--from` takes it. It contains no comma, which separates two of them.
pub fn container_name(text: &str) -> Result<String, Invalid> {
    match format!("container:{text}").parse() {
        Ok(Network::Container(name)) if !name.contains(',') => Ok(name),
        _ => invalid(format!("{text:?} is not a container; write its name or id")),
    }
}

//! Port: a port that is dialled, its protocol, and the service that it leads to.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use lbridge_common::wire;
use serde::{Deserialize, Serialize};

use super::{Invalid, invalid};

/// The loopback service that a rule leads to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// A port on the loopback address of the family that was dialled, or of the other family if only that one
    /// listens.
    Port(u16),
    /// One loopback address and port.
    Address(SocketAddr),
    /// A Unix stream socket, by its path.
    Unix(PathBuf),
}

impl Target {
    /// Returns the port; `None` for a Unix socket.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Port(port) => Some(*port),
            Self::Address(address) => Some(address.port()),
            Self::Unix(_) => None,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "127.0.0.1:{port}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The protocol of a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP, including MPTCP.
    #[default]
    Tcp,
    /// UDP, which is steered and never relayed.
    Udp,
}

impl Protocol {
    /// Returns the protocol's number, as the kernel program's keys hold it.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => wire::TCP,
            Self::Udp => wire::UDP,
        }
    }

    /// Returns a phrase for what a service gets by this protocol.
    pub fn what(self) -> &'static str {
        match self {
            Self::Tcp => "the connection",
            Self::Udp => "the datagram",
        }
    }

    /// Returns the protocol's name, as firewalls use it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// Returns the suffix of a port number, as Docker writes it: empty for TCP.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Tcp => "",
            Self::Udp => "/udp",
        }
    }
}

/// A port argument: `5432`, `5432=15432`, `80=127.0.0.1:3000`, `80=[::1]:3000`, `5432=unix:/path`, `53/udp`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortSpec {
    /// The port that is dialled, never 0.
    pub port: u16,
    /// The protocol of the dialled port and of the service.
    pub protocol: Protocol,
    /// The service that the port leads to.
    pub target: Target,
}

impl PortSpec {
    /// Parses one argument. A range (`8000-8010`) gives several ports.
    pub fn parse_many(text: &str) -> Result<Vec<Self>, Invalid> {
        let (ports, protocol) = split_protocol(text);
        if let Some((first, last)) = ports.split_once('-').filter(|(first, _)| !first.contains('=')) {
            let (first, last) = (parse_port(first, text)?, parse_port(last, text)?);
            if first > last {
                return invalid(format!("port range {text} is empty; write the lower port first"));
            }
            let spec = |port| Self { port, protocol, target: Target::Port(port) };
            return Ok((first..=last).map(spec).collect());
        }
        Ok(vec![text.parse()?])
    }
}

/// Splits `53/udp` into what is before the slash, and the protocol. A Unix socket's path has slashes of its
/// own, and no protocol.
fn split_protocol(text: &str) -> (&str, Protocol) {
    if text.contains("unix:") {
        return (text, Protocol::Tcp);
    }
    let with = |suffix, protocol| text.strip_suffix(suffix).map(|ports| (ports, protocol));
    with("/udp", Protocol::Udp).or_else(|| with("/tcp", Protocol::Tcp)).unwrap_or((text, Protocol::Tcp))
}

impl PortSpec {
    /// Creates a specification that leads a TCP port to the same port of loopback.
    pub fn same(port: u16) -> Self {
        Self { port, protocol: Protocol::Tcp, target: Target::Port(port) }
    }
}

impl FromStr for PortSpec {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (ports, protocol) = split_protocol(text);
        let Some((dialled, target)) = ports.split_once('=') else {
            if ports == "all" {
                return invalid(
                    "\"all\" is not a port, it would be every service of the host; name the ports".to_owned(),
                );
            }
            let port = parse_port(ports, text)?;
            return Ok(Self { port, protocol, target: Target::Port(port) });
        };
        let port = parse_port(dialled, text)?;
        if let Some(path) = target.strip_prefix("unix:") {
            return Ok(Self { port, protocol, target: Target::Unix(unix_path(path, text)?) });
        }
        if let Ok(address) = target.parse::<SocketAddr>() {
            if !address.ip().is_loopback() {
                return invalid(format!(
                    "target {address} is not on loopback; lbridge leads to 127.0.0.0/8, [::1] and unix: \
                     sockets only"
                ));
            }
            if address.port() == 0 {
                return invalid(format!("port 0 in {text:?}; ports are 1 to 65535"));
            }
            return Ok(Self { port, protocol, target: Target::Address(address) });
        }
        if target.bytes().all(|b| b.is_ascii_digit()) {
            return Ok(Self { port, protocol, target: Target::Port(parse_port(target, text)?) });
        }
        invalid(format!(
            "{target:?} in {text:?} is not a target; write 5432=15432, 80=127.0.0.1:3000, 80=[::1]:3000 or \
             5432=unix:/path"
        ))
    }
}

impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Port(target) if *target == self.port => write!(f, "{}", self.port),
            Target::Port(target) => write!(f, "{}={target}", self.port),
            target => write!(f, "{}={target}", self.port),
        }?;
        f.write_str(self.protocol.suffix())
    }
}

fn parse_port(text: &str, whole: &str) -> Result<u16, Invalid> {
    // Digits alone: FromStr would take a sign.
    let number = text.parse::<u64>().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
    match number.map(u16::try_from) {
        Some(Ok(port)) if port != 0 => Ok(port),
        Some(_) => invalid(format!("port {text} in {whole:?}; ports are 1 to 65535")),
        None => invalid(format!(
            "{whole:?} is not a port; write 5432, 5432=15432, 80=127.0.0.1:3000, 8000-8010 or 53/udp"
        )),
    }
}

fn unix_path(path: &str, whole: &str) -> Result<PathBuf, Invalid> {
    // sun_path less its terminating zero (unix(7)).
    if path.len() > 107 || path.chars().any(char::is_control) || !Path::new(path).is_absolute() {
        return invalid(format!(
            "{whole:?}: a Unix socket's path is absolute, at most 107 bytes long, and has no control \
             characters"
        ));
    }
    Ok(PathBuf::from(path))
}

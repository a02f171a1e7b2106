//! Relay: carries the connections that the kernel cannot steer. Imports planning, and from host the function
//! that opens the Unix socket of a rule.
//!
//! - [`set`]: the relays that are open;
//! - [`socket`]: the listening sockets;
//! - `listener`: one relay: accepts and checks;
//! - `limits`: the number of connections that may be open;
//! - `meter`: the counters of a rule;
//! - `log_rate_limit`: keeps frequent events from filling the log;
//! - `connection`: the life of one connection, which reaches the service;
//! - [`splice`]: moves the bytes of one connection;
//! - [`workers`]: the threads that relays run on.

mod connection;
mod limits;
mod listener;
mod log_rate_limit;
mod meter;
pub mod set;
pub mod socket;
mod splice;
mod workers;

use std::net::SocketAddr;

use rustix::process::{Resource, getrlimit, setrlimit};

/// Makes the service see the container as the peer of a relayed connection, where the kernel can (name
/// hooks). Naming takes two steps, since the service may ask for its peer as soon as it is connected:
/// [`PeerNames::announce`] before connect(), which lets the kernel enter the name as soon as the socket has
/// its port; [`PeerNames::confirm`] after it.
pub trait PeerNames: Send + Sync + std::fmt::Debug {
    /// Announces that the socket with this cookie will connect on behalf of `container`.
    fn announce(&self, cookie: u64, container: SocketAddr) -> anyhow::Result<()>;
    /// Confirms that its connect() has returned. `relay` is the address it connected from. Fails if the
    /// service may see a peer other than `container`.
    fn confirm(
        &self,
        cookie: u64,
        relay: SocketAddr,
        service: SocketAddr,
        container: SocketAddr,
    ) -> anyhow::Result<()>;
    /// Withdraws an announcement: the socket will not connect, or not be confirmed.
    fn withdraw(&self, cookie: u64);
}

/// Raises the soft limit of open files to the hard limit. A relayed connection takes two descriptors, and two
/// more for each direction that holds bytes in a pipe. The soft limit is 1,024 nearly everywhere, for the
/// sake of programs that use select(2).
pub fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "could not raise the limit of open files");
    }
}

#[cfg(test)]
mod tests {
    use crate::planning::desired::stand_in_for_container as stand_in;

    #[test]
    fn a_stand_in_is_never_localhost() {
        for (container, stands_in) in [
            ("172.18.0.2", "127.146.0.2"),
            ("10.0.0.1", "127.128.0.1"),
            ("10.255.255.255", "127.255.255.254"),
            ("::ffff:10.1.2.3", "127.129.2.3"),
            ("fd00::aa:1:203", "127.129.2.3"),
            ("127.129.2.3", "127.129.2.3"),
        ] {
            assert_eq!(stand_in(container.parse().unwrap()).to_string(), stands_in, "{container}");
        }
    }
}

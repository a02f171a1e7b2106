//! The relay: carries what the kernel cannot steer. Imports planning, and of host how to find the Unix socket that a rule means.
//!
//! - [`set`]: which relays are open;
//! - [`listener`]: one of them: accepts, checks, connects;
//! - [`splice`]: moves the bytes of one connection;
//! - [`workers`]: the threads that it all runs on.

pub mod listener;
pub mod set;
mod splice;
mod workers;

use std::net::SocketAddr;

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::{host::trusted, planning::policy::stand_in_for_container as stand_in};

/// Tells the service who is behind a relayed connection, where the kernel can (name hooks).
pub trait PeerNames: Send + Sync + std::fmt::Debug {
    /// The socket of this cookie is about to connect on behalf of `container`.
    fn announce(&self, cookie: u64, container: SocketAddr) -> anyhow::Result<()>;
    /// Its connect() has returned; an error where the service may see another peer than `container`. `relay` is where it
    /// connected from.
    fn confirm(
        &self,
        cookie: u64,
        relay: SocketAddr,
        service: SocketAddr,
        container: SocketAddr,
    ) -> anyhow::Result<()>;
    /// It will not connect, or not be confirmed.
    fn withdraw(&self, cookie: u64);
}

/// A relayed connection takes two descriptors, or four; the soft limit is 1,024 nearly everywhere, for the sake of
/// programs that use select(2).
pub fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("the limit of open files stays: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

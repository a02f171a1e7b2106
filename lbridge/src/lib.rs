//! lbridge lets containers reach services that listen only on the host's loopback, per allowlisted network
//! and port.
//!
//! ```text
//! lbridge_common <- planning <- { store docker host firewall kernel relay sandbox migrate api }
//!   <- { daemon sandbox_relay verify doctor import service } <- cli
//! ```
//!
//! The shells in the first braces do not import each other, with these exceptions: `firewall` tests with
//! `host`, `relay` uses it to find Unix sockets, and `kernel` to find the pin directory.
//! `docs/architecture.md` has the map, `docs/data-path.md` follows a connection, a datagram and a connect()
//! to localhost.

pub mod api;
pub mod cli;
pub mod daemon;
pub mod docker;
pub mod doctor;
pub mod firewall;
pub mod host;
pub mod import;
pub mod kernel;
pub mod migrate;
pub mod planning;
pub mod relay;
pub mod sandbox;
pub mod sandbox_relay;
pub mod service;
pub mod store;
pub mod verify;

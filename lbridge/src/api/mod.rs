//! The control API: HTTP/1.1 and JSON on a Unix socket.
//!
//! - [`protocol`]: what is said, plain data;
//! - [`events`]: what happens, to whoever listens;
//! - [`server`]: the daemon's end;
//! - [`client`]: the CLI's end.

pub mod client;
pub mod events;
pub mod protocol;
pub mod server;

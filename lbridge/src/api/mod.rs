//! The control API: HTTP/1.1 and JSON on a Unix socket.
//!
//! - [`protocol`]: what is said, plain data;
//! - [`server`]: the daemon's end;
//! - [`client`]: the CLI's end.

pub mod client;
pub mod protocol;
pub mod server;

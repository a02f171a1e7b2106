//! api: the control API: HTTP/1.1 and JSON on a Unix socket.
//!
//! - [`protocol`]: the requests and answers, plain data;
//! - [`events`]: the event bus;
//! - [`server`]: the daemon's end;
//! - [`client`]: the CLI's end.

pub mod client;
pub mod events;
pub mod protocol;
pub mod server;

#[cfg(test)]
mod contract;

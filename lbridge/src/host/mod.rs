//! What is there on the host: interfaces and their addresses, listening sockets. Netlink, /proc and pidfds; the only
//! room that knows the netlink crates. Imports planning's inventory.

pub mod interfaces;
pub mod listeners;
pub mod netns;

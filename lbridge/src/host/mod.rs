//! What is there on the host: interfaces and their addresses, who is on which bridge, listening sockets, network namespaces,
//! processes, users; throw-away neighbours of the host, to try things from; and paths that others cannot turn elsewhere. Netlink, /proc
//! and pidfds; the only room that knows the netlink crates, but for the firewall's wake-ups and conntrack. Imports planning's inventory.

pub mod cgroup;
pub mod guests;
pub mod interfaces;
pub mod listeners;
pub mod netlink;
pub mod netns;
pub mod privileges;
pub mod processes;
pub mod scratch;
pub mod trusted;
pub mod users;

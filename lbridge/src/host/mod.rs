//! Host: observes the host from netlink, /proc and pidfds. Covers interfaces and their addresses,
//! guests on bridges, listening sockets, network namespaces, processes and users. Also makes throw-away
//! neighbours of the host to test reachability from, and opens paths that other users cannot redirect. The
//! only module that uses the netlink crates, except for the firewall's wake-ups and conntrack. Imports
//! planning's inventory.

pub mod cgroup;
pub mod guests;
pub mod holders;
pub mod interfaces;
pub mod listeners;
pub mod netlink;
pub mod netns;
pub mod privileges;
pub mod processes;
pub mod scratch;
pub mod socket_fd;
pub mod trusted;
pub mod users;

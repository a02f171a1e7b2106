//! lbridge-tests: tests of `lbridge` against real parts. The suites share the [`harness`], which
//! `cargo xtask run --lab` and `cargo xtask bench` use as well.
//!
//! | suite | real parts | needs |
//! |---|---|---|
//! | `harness` | namespaces: that packets flow, and nothing leaks | root, cgroup2 |
//! | `kernel` | the kernel's hooks, on the kernel that runs | and a built lbridge |
//! | `cli` | commands, files, the control API | and setpriv, curl |
//! | `verify` | holes that are made on purpose, for `lbridge verify` to find | and iptables, nft, setpriv |
//! | `sandbox` | sandboxes of a user who is not root | and bwrap, unshare, setpriv, strace |
//! | `clients` | clients and servers that people use, over the relay; crowds, endings, exhaustion | and PostgreSQL, Redis, Apache |
//! | `systemd` | a systemd that restarts the daemon under traffic | and systemd |
//! | `docker` | a Docker Engine | and dockerd, iptables, busybox |
//! | `podman` | Podman, of root and of a user | and podman, runc, netavark, iptables, busybox |
//! | `firewall` | nftables, both kinds of iptables, UFW, in front of everything | and nft, iptables, ufw, dockerd |
//! | `packages` | packages that are installed, upgraded and removed | and systemd, dpkg, rpm; `cargo xtask test` makes them |
//! | `vm` | the `kernel` suite on Debian's 5.10 and 6.1 | qemu, kernels; no root |
//!
//! `docker` and `podman` share the tests in `suites/engines`: what holds for both engines is written once,
//! and the constants of [`harness::engine::Engine`] name the differences.
//!
//! A suite is a program of its own (`cargo test -p lbridge-tests --test kernel -- restart`). To look around
//! where the tests run: `cargo run -p lbridge-tests --example sandbox -- bash`.

pub mod harness;

//! harness: a host for tests: a [`sandbox`] that nothing leaks from, a [`lab`] of network namespaces inside
//! it, [`service`]s that report their name and the peer that they see, and the [`daemon`] under test.
//!
//! Every test runs in a sandbox, and thus in a process, of its own: what it leaves behind dies with it, and a
//! test that hangs can be killed.

mod bpf;
pub mod client;
pub mod daemon;
pub mod docker;
pub mod doctor;
pub mod engine;
pub mod follow;
pub mod forge;
pub mod kernel;
pub mod lab;
pub mod links;
pub mod logs;
pub mod netns;
pub mod packages;
pub mod patience;
pub mod pins;
pub mod podman;
pub mod programs;
pub mod sandbox;
pub mod scene;
pub mod server;
pub mod service;
pub mod suite;
pub mod systemd;
pub mod traffic;
pub mod udp;
pub mod usage;
pub mod vm;

//! setup: `cargo xtask setup` installs everything that the tests and the check of the object need, on Debian.

use anyhow::Result;

use crate::bpf_toolchain::{self, Toolchain};
use crate::{apt, kernels, package, roots};

/// Packages that the suites use, in addition to the toolchain of the kernel programs.
const PACKAGES: [&str; 32] = [
    "aardvark-dns",   // Podman's names
    "apache2-bin",    // a web server, without the service that the package apache2 is
    "bubblewrap",     // sandboxes of users
    "busybox-static", // the containers' image, and the virtual machines' user space
    "codespell",      // the spelling, in `cargo xtask ci`
    "cpio",           // their initial file systems
    "curl",           // a client that is not ours
    "dnsmasq-base",   // a server that speaks UDP, without its service
    "docker-compose",
    "docker.io", // the engine; without recommendations, or it brings cgroupfs-mount
    "fish",      // a shell whose completion is tested
    "haproxy",   // what the benchmark compares with, as socat
    "iproute2",
    "iptables",
    "man-db",     // renders the man pages
    "mmdebstrap", // the root of a newer Debian
    "netavark",   // Podman's networks
    "nftables",
    "nodejs",     // a client that dials localhost
    "podman",     // the other engine
    "postgresql", // its server; without a cluster, see apt.rs
    "qemu-system-x86",
    "redis-tools", // the server is in it, under another name; redis-server would be a service
    "rpm",         // looks at the package for other distributions, and installs it
    "slirp4netns", // networks of a user's Podman
    "socat",
    "strace",   // a tracer that is there already
    "systemd",  // the suite that restarts lbridge under it
    "ufw",      // a firewall in the way
    "uidmap",   // a user's Podman
    "xz-utils", // kernel modules are compressed
    "zsh",      // another shell
];

/// Installs what is missing. If everything is installed already, it does nothing and needs no root.
pub(crate) fn handle() -> Result<()> {
    let packages: Vec<_> = PACKAGES.into_iter().chain(bpf_toolchain::PACKAGES).collect();
    let missing = apt::missing(&packages);
    if !missing.is_empty() {
        println!("installing {}", missing.join(" "));
        apt::install(&missing)?;
    }
    Toolchain::find()?;
    kernels::fetch()?;
    roots::make()?;
    package::install_test_tools()
}

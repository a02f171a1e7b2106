//! The packages that people install, in the hands of dpkg, rpm and systemd.

mod deb;
mod rpm;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Greeting};
use lbridge_tests::harness::daemon::Output;
use lbridge_tests::harness::lab::{Bridge, Lab};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::packages;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Suite};
use lbridge_tests::harness::systemd::Systemd;

/// Those of systemd's harness without a built `lbridge`: it comes with the package.
const NEEDS: [Need; 6] = [
    Need::Root,
    Need::Cgroup2,
    Need::Program("ip"),
    Need::Program("nsenter"),
    Need::Program("systemctl"),
    Need::Package("2.deb"),
];

fn main() {
    let mut suite = Suite::new(&[], [deb::tests(), rpm::tests()].concat());
    suite.needs = NEEDS.to_vec();
    suite.main()
}

const UNIT: &str = "lbridge.service";
const PROGRAM: &str = "/usr/bin/lbridge";
const CONFIG: &str = "/etc/lbridge/lbridge.toml";
const RULES: &str = "/var/lib/lbridge/rules.toml";
const PINS: &str = "/sys/fs/bpf/lbridge";

/// A host with systemd, a bridge, and a container on it. No lbridge yet.
struct Host {
    /// The root file system below.
    root: PathBuf,
    lab: Lab,
    bridge: Bridge,
    container: NetNs,
    systemd: Systemd,
}

impl Host {
    fn boot(root: &Path) -> Result<Host> {
        let systemd = Systemd::boot_root(root)?;
        let lab = Lab::with_host(systemd.netns().clone());
        let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
        let container = lab.container(&bridge, "10.7.0.2/24")?;
        // Otherwise dpkg has an index of all of the machine's man pages made anew, which takes seconds.
        let index = systemd.path("/var/lib/man-db/auto-update");
        if index.exists() {
            fs::remove_file(index)?;
        }
        Ok(Host { root: root.to_owned(), lab, bridge, container, systemd })
    }

    /// Copies a package inside; its path there.
    fn bring(&self, package: &str) -> Result<String> {
        let inside = format!("/tmp/{package}");
        fs::copy(packages::package(package)?, self.systemd.path(&inside)).context("bring the package")?;
        Ok(inside)
    }

    /// Runs a command inside, which must succeed.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let output = self.systemd.run(program, arguments)?;
        ensure!(output.status == 0, "{program} {arguments:?}: {output:?}");
        Ok(output)
    }

    /// An `lbridge` command, which must succeed.
    fn lbridge(&self, arguments: &[&str]) -> Result<Output> {
        self.run(PROGRAM, arguments)
    }

    fn exists(&self, path: &str) -> bool {
        self.systemd.path(path).symlink_metadata().is_ok()
    }

    fn property(&self, name: &str) -> Result<String> {
        self.systemd.property(UNIT, name)
    }

    /// A rule by which `name` is steered to, at 8080.
    fn steer(&self, name: &str) -> Result<Service> {
        // The rule first: the kernel notes the socket. The daemon does not see the test's processes.
        self.lbridge(&["allow", "bridge:lab0", "8080", "--path", "steer"])?;
        let service = Service::start(self.lab.host(), name, "127.0.0.1:8080")?;
        self.served(8080, name)?;
        Ok(service)
    }

    /// A rule by which `name` is relayed to, at 8081.
    fn relay(&self, name: &str) -> Result<Service> {
        let service = Service::start(self.lab.host(), name, "127.0.0.1:8081")?;
        self.lbridge(&["allow", "bridge:lab0", "8081", "--path", "relay"])?;
        self.served(8081, name)?;
        Ok(service)
    }

    fn gateway(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.bridge.gateway(), port)
    }

    fn served(&self, port: u16, service: &str) -> Result<Greeting> {
        client::served_by(&self.container, self.gateway(port), service)
    }

    fn refused(&self, port: u16) -> Result<()> {
        client::refused(&self.container, self.gateway(port))
    }

    /// Nothing is in force: no daemon, no socket, no pin, and who dials is refused.
    fn is_as_before(&self) -> Result<()> {
        ensure!(!self.exists("/run/lbridge/lbridge.sock"), "the control socket");
        ensure!(!self.exists(PINS), "the pins");
        self.refused(8080)?;
        self.refused(8081)
    }
}

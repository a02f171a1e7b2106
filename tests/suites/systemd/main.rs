//! lbridge as a unit of a real systemd: starts, stops, and restarts that refuse nobody.

mod handover;
mod migrate;
mod privileges;
mod service;
mod unit;

use std::net::SocketAddr;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Greeting};
use lbridge_tests::harness::daemon::Output;
use lbridge_tests::harness::lab::{Bridge, Lab};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Suite;
use lbridge_tests::harness::systemd::{self, Systemd};

fn main() {
    Suite::new(
        &systemd::NEEDS,
        [unit::tests(), privileges::tests(), service::tests(), handover::tests(), migrate::tests()].concat(),
    )
    .main()
}

/// The unit's name.
const UNIT: &str = "lbridge.service";

/// The configuration with one relayed rule, for port 8080.
const RELAY_8080: &str = "[[rule]]\nnetwork = \"bridge:lab0\"\nport = \"8080\"\npath = \"relay\"\n";

/// The settings of the unit that tests vary: descriptors that systemd keeps, how long it waits for a stop and
/// for a sign of life, and whether Docker is followed.
#[derive(Clone, Copy, Debug)]
struct Unit {
    store: u32,
    stop: &'static str,
    watchdog: &'static str,
    docker: bool,
}

impl Default for Unit {
    fn default() -> Unit {
        Unit { store: 512, stop: "90s", watchdog: "60s", docker: false }
    }
}

/// The unit that packages install.
const PACKAGED: &str = include_str!("../../../packaging/lbridge.service");

impl Unit {
    /// Returns the drop-in with what differs here from the packaged unit.
    fn drop_in(self) -> String {
        let Unit { store, stop, watchdog, docker } = self;
        let (lbridge, docker) = (systemd::LBRIDGE, if docker { "" } else { " --no-docker" });
        // The limit of starts is for what fails again and again; these tests start it often.
        format!(
            "[Unit]\nStartLimitIntervalSec=0\n\n\
             [Service]\nExecStart=\nExecStart={lbridge} run{docker}\nExecReload=\n\
             ExecReload={lbridge} reload\n\
             FileDescriptorStoreMax={store}\nTimeoutStopSec={stop}\nWatchdogSec={watchdog}\n"
        )
    }
}

/// A host with systemd and a unit for lbridge, a bridge, and a container on it.
struct Scene {
    lab: Lab,
    bridge: Bridge,
    container: NetNs,
    systemd: Systemd,
}

impl Scene {
    /// Not started yet, with this configuration.
    fn prepare(unit: Unit, config: &str) -> Result<Scene> {
        let scene = Scene::bare()?;
        scene.drop_in(UNIT, "tests.conf", &unit.drop_in())?;
        scene.systemd.install_unit(UNIT, PACKAGED)?;
        scene.configure(config)?;
        Ok(scene)
    }

    /// Without a unit for lbridge.
    fn bare() -> Result<Scene> {
        let systemd = Systemd::boot()?;
        let lab = Lab::with_host(systemd.netns().clone());
        let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
        let container = lab.container(&bridge, "10.7.0.2/24")?;
        Ok(Scene { lab, bridge, container, systemd })
    }

    /// Started, with relayed connections that may take as long as they want.
    fn new() -> Result<Scene> {
        Scene::with("drain_timeout = \"1m\"\n")
    }

    fn with(config: &str) -> Result<Scene> {
        let scene = Scene::prepare(Unit::default(), config)?;
        scene.systemd.must(&["start", UNIT])?;
        Ok(scene)
    }

    /// Writes a drop-in, for the next time that systemd reads units.
    fn drop_in(&self, unit: &str, name: &str, text: &str) -> Result<()> {
        let folder = self.systemd.path("/etc/systemd/system").join(format!("{unit}.d"));
        fs::create_dir_all(&folder)?;
        Ok(fs::write(folder.join(name), text)?)
    }

    /// The configuration for the next start.
    fn configure(&self, config: &str) -> Result<()> {
        let folder = self.systemd.path("/etc/lbridge");
        fs::create_dir_all(&folder)?;
        Ok(fs::write(folder.join("lbridge.toml"), config)?)
    }

    fn service(&self, name: &str, address: &str) -> Result<Service> {
        Service::start(self.lab.host(), name, address)
    }

    fn cli(&self, arguments: &[&str]) -> Result<Output> {
        self.systemd.run(systemd::LBRIDGE, arguments)
    }

    /// An `lbridge` command, which must succeed.
    fn lbridge(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.cli(arguments)?;
        ensure!(output.status == 0, "lbridge {arguments:?}: {output:?}");
        Ok(output)
    }

    /// `lbridge allow bridge:lab0 8080 --path relay`.
    fn relay_8080(&self) -> Result<()> {
        self.lbridge(&["allow", "bridge:lab0", "8080", "--path", "relay"])?;
        self.served(8080, "relayed").map(drop)
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

    /// Returns true if anything listens on the gateway at that port, systemd included.
    fn listens(&self, port: u16) -> Result<bool> {
        // The relay of these tests is the only one.
        Ok(self.lab.host().listens(self.gateway(port))? || self.lab.host().has_hidden_relays()?)
    }

    fn property(&self, name: &str) -> Result<String> {
        self.systemd.property(UNIT, name)
    }

    fn wait_for(&self, property: &str, value: &str) -> Result<()> {
        self.systemd.wait_for_property(UNIT, property, value)
    }

    fn main_pid(&self) -> Result<u32> {
        self.property("MainPID")?.parse().context("MainPID")
    }

    /// `systemctl restart`; there must be another process afterwards, and systemd must keep nothing.
    fn restart(&self) -> Result<()> {
        let before = self.main_pid()?;
        self.systemd.must(&["restart", UNIT])?;
        ensure!(self.main_pid()? != before, "not restarted");
        self.wait_for("NFileDescriptorStore", "0")
    }

    /// Begins a restart, and returns when systemd has `kept` sockets. An open connection must hold the stop
    /// up.
    fn begin_restart(&self, kept: &str) -> Result<Restart<'_>> {
        let before = self.main_pid()?;
        self.systemd.must(&["--no-block", "restart", UNIT])?;
        self.wait_for("NFileDescriptorStore", kept)?;
        ensure!(self.property("ActiveState")? == "deactivating", "the stop is held up");
        Ok(Restart { scene: self, before })
    }

    /// Waits for a daemon other than `before` that is ready.
    fn wait_for_another(&self, before: u32) -> Result<()> {
        patience::until("another daemon is ready", || {
            // In this order: a state that is read first may be that of the one before.
            let there = ![0, before].contains(&self.main_pid()?) && self.property("ActiveState")? == "active";
            Ok(there.then_some(()))
        })
    }
}

/// A restart under way.
struct Restart<'a> {
    scene: &'a Scene,
    before: u32,
}

impl Restart<'_> {
    fn wait(self) -> Result<()> {
        self.scene.wait_for_another(self.before)?;
        self.scene.wait_for("NFileDescriptorStore", "0")
    }
}

fn join<T>(thread: thread::JoinHandle<T>) -> Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))
}

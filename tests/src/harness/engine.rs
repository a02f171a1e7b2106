//! engine: a container engine in the [`super::sandbox`], [`super::docker`] or [`super::podman`], and a scene
//! of an engine and a daemon. The engines share a command line; [`Engine`] names their differences. No image
//! is pulled: the image is made of busybox.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::client::{self, Greeting};
use super::daemon::{Daemon, Options, Output};
use super::logs::Log;
use super::netns::NetNs;
use super::patience;
use super::service::Service;
use super::suite::find_program;

/// Name of the image that [`Engine::run`] uses.
pub const IMAGE: &str = "lab";

/// A container engine, reachable or not. Whatever it made ends with the sandbox.
pub trait Engine: Sized {
    /// The product's name, as lbridge prints it.
    const PRODUCT: &'static str;
    /// The network of containers that name none.
    const DEFAULT_NETWORK: &'static str;
    /// The bridge of [`Engine::DEFAULT_NETWORK`].
    const DEFAULT_BRIDGE: &'static str;
    /// The unit of systemd that starts the engine.
    const UNIT: &'static str;
    /// True if a bridge exists as long as its network. Podman makes it with the network's first container,
    /// and removes it with the last: a network without containers has no rule in force.
    const BRIDGE_WITHOUT_CONTAINERS: bool;
    /// True if the engine lists the networks `host` and `none`, which only Docker has as such.
    const LISTS_HOST_AND_NONE: bool;
    /// True if a container that the engine restarts again and again is always listed as running. Podman lists
    /// it only while it runs: the daemon may never see it.
    const LISTS_RESTARTING_CONTAINERS: bool;
    /// True if the engine sends an event when a network comes or goes. Podman 4 sends none: the daemon sees
    /// the network with the next event of a container, the next command, or when it lists networks again (10
    /// s).
    const TELLS_OF_NETWORKS: bool;
    /// True if the next network gets the name of a bridge that has gone; Docker's is made of the network's
    /// id.
    const REUSES_BRIDGE_NAMES: bool;
    /// True if a bridge keeps its hardware address. That of Podman's is the lowest of its containers' links:
    /// once that container has left, the others send to the old address for some seconds, with or without
    /// lbridge.
    const KEEPS_HARDWARE_ADDRESSES: bool;
    /// True if containers of every network find [`Engine::DEFAULT_BRIDGE`]'s address under `host-gateway`.
    /// For Podman of root it is the gateway of their own network.
    const HOST_GATEWAY_IS_SHARED: bool;

    /// Starts an engine with the image.
    fn start() -> Result<Self>;

    /// Starts an engine with the image, whose containers keep running while it is down.
    fn start_lasting() -> Result<Self>;

    /// Starts the engine again, and waits until it answers.
    fn up(&mut self) -> Result<()>;

    /// Stops the engine, and waits until it is gone.
    fn down(&mut self) -> Result<()>;

    /// Returns the path of the socket on which the engine speaks Docker's API.
    fn socket(&self) -> String;

    /// Returns the environment with which an lbridge finds the engine; empty if it does so without.
    fn environment(&self) -> Vec<(String, String)>;

    /// Creates a command of the engine's own client.
    fn client(&self) -> Command;

    /// Returns the log of the engine and its commands.
    fn log(&self) -> &Log;

    /// Inspects a network, by name or id.
    fn network(&self, name: &str) -> Result<Network>;

    /// Runs a command of the engine's client; returns its output, whatever its status.
    fn attempt(&self, arguments: &[&str]) -> Result<Output> {
        let mut client = self.client();
        let output: Output =
            client.args(arguments).stdin(Stdio::null()).output().context("run the client")?.into();
        let (status, said) = (output.status, output.stderr.trim());
        self.log().note(&format!("[harness] {} {arguments:?} -> {status} {said}", Self::PRODUCT));
        Ok(output)
    }

    /// Runs a command of the engine's client that must succeed; returns its standard output without the
    /// newline.
    fn cli(&self, arguments: &[&str]) -> Result<String> {
        let output = self.attempt(arguments)?;
        ensure!(output.status == 0, "{} {arguments:?}: {}", Self::PRODUCT, output.stderr.trim());
        Ok(output.stdout.trim_end().to_owned())
    }

    /// Stops the engine and starts it again.
    fn restart(&mut self) -> Result<()> {
        self.down()?;
        self.up()
    }

    /// Builds the busybox image that [`Engine::run`] uses.
    fn import_image(&self) -> Result<()> {
        let root = tempfile::Builder::new().prefix("image-").tempdir_in("/run")?;
        for folder in ["bin", "etc", "tmp", "root"] {
            fs::create_dir(root.path().join(folder))?;
        }
        let busybox = find_program("busybox").context("no busybox")?;
        fs::copy(busybox, root.path().join("bin/busybox"))?;
        for applet in ["sh", "sleep", "nc", "cat", "echo", "timeout", "ip"] {
            symlink("busybox", root.path().join("bin").join(applet))?;
        }
        let archive = root.path().with_extension("tar");
        let tar =
            Command::new("tar").arg("-C").arg(root.path()).arg("-cf").arg(&archive).arg(".").status()?;
        ensure!(tar.success(), "tar: {tar}");
        self.cli(&["import", archive.to_str().context("path")?, IMAGE])?;
        Ok(fs::remove_file(archive)?)
    }

    /// Creates a network; `more` are further options of `network create`.
    fn create_network(&self, name: &str, more: &[&str]) -> Result<Network> {
        self.cli(&[&["network", "create"], more, &["--", name]].concat())?;
        self.network(name)
    }

    /// Removes a network by name or id.
    fn remove_network(&self, name: &str) -> Result<()> {
        self.cli(&["network", "rm", "--", name]).map(drop)
    }

    /// Starts a container that sleeps, on a network; `more` are further options of `run`.
    fn run(&self, network: &str, more: &[&str]) -> Result<Container> {
        let fixed = ["run", "--detach", "--stop-timeout", "0", "--network", network];
        let id = self.cli(&[&fixed, more, &[IMAGE, "sleep", "1000000"]].concat())?;
        Ok(Container { id })
    }

    /// Runs a command in a container; returns its output, whatever its status.
    fn exec(&self, container: &Container, command: &[&str]) -> Result<Output> {
        self.attempt(&[&["exec", &container.id], command].concat())
    }

    /// Removes a container, running or not.
    fn remove(&self, container: &Container) -> Result<()> {
        self.cli(&["rm", "--force", &container.id]).map(drop)
    }

    /// Returns the process id of a running container, as seen in the sandbox.
    fn pid(&self, container: &Container) -> Result<u32> {
        Ok(self.cli(&["inspect", "--format", "{{.State.Pid}}", &container.id])?.parse()?)
    }

    /// Returns the container's current network namespace.
    fn netns(&self, container: &Container) -> Result<NetNs> {
        NetNs::of_process(self.pid(container)?)
    }

    /// Returns the container's own address on a network.
    fn address(&self, container: &Container, network: &Network) -> Result<String> {
        let inspected: Value = serde_json::from_str(&self.cli(&["inspect", &container.id])?)?;
        let of_network = &inspected[0]["NetworkSettings"]["Networks"][&network.name];
        Ok(of_network["IPAddress"].as_str().context("an address")?.to_owned())
    }
}

/// A network, as the engine reports it.
#[derive(Clone, Debug)]
pub struct Network {
    /// The engine's network id, in full.
    pub id: String,
    /// The network's name.
    pub name: String,
    /// The name of the network's bridge.
    pub bridge: String,
    /// The address that containers dial.
    pub gateway: IpAddr,
}

impl Network {
    /// Returns the gateway's endpoint at a port.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.gateway, port)
    }
}

/// A running or stopped container.
#[derive(Clone, Debug)]
pub struct Container {
    /// The engine's container id, in full.
    pub id: String,
}

/// The process that answers on an engine's socket, running or stopped. Dropping it kills the process.
#[derive(Debug)]
pub(super) struct Process {
    child: Option<Child>,
    pub(super) log: Log,
}

impl Process {
    /// Creates a process that is not started yet; `name` heads its log.
    pub(super) fn new(name: &str) -> Process {
        Process { child: None, log: Log::new(name) }
    }

    /// Starts the process and waits until it is ready.
    pub(super) fn start(&mut self, mut command: Command, ready: impl Fn() -> Result<bool>) -> Result<()> {
        ensure!(self.child.is_none(), "the engine is running");
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdout.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        child.stderr.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        let child = self.child.insert(child);
        patience::until("the engine answers", || {
            if let Some(status) = child.try_wait()? {
                anyhow::bail!("the engine ended: {status}");
            }
            Ok(ready()?.then_some(()))
        })
    }

    /// Stops the process with SIGTERM and waits until it is gone.
    pub(super) fn stop(&mut self) -> Result<()> {
        let mut child = self.child.take().context("the engine is not running")?;
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
        patience::until("the engine ends after SIGTERM", || Ok(child.try_wait()?)).map(drop)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Containers end with the sandbox.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// An engine and a daemon that follows it, both in the sandbox' own network namespace.
#[derive(Debug)]
pub struct Scene<E> {
    /// The engine, in the sandbox's namespaces.
    pub engine: E,
    /// The daemon that follows the engine.
    pub daemon: Daemon,
    /// The sandbox' own network namespace.
    pub host: NetNs,
}

impl<E: Engine> Scene<E> {
    /// Starts an engine and a daemon.
    pub fn new() -> Result<Scene<E>> {
        Scene::with(E::start()?)
    }

    /// Starts a daemon, and an engine whose containers keep running while it is down.
    pub fn lasting() -> Result<Scene<E>> {
        Scene::with(E::start_lasting()?)
    }

    /// Starts a daemon beside an engine.
    pub fn with(engine: E) -> Result<Scene<E>> {
        Scene::with_options(engine, Options::default())
    }

    /// Starts a daemon with these options beside an engine.
    pub fn with_options(engine: E, options: Options) -> Result<Scene<E>> {
        let host = NetNs::current()?;
        // The last of a name holds.
        let env = [engine.environment(), options.env].concat();
        let daemon = Daemon::start_with(&host, Options { docker: true, env, ..options })?;
        Ok(Scene { engine, daemon, host })
    }

    /// Starts a daemon with this text of a configuration file beside an engine.
    pub fn configured(engine: E, config: &str) -> Result<Scene<E>> {
        Scene::with_options(engine, Options { config: config.to_owned(), ..Options::default() })
    }

    /// Starts an echo service on the host.
    pub fn service(&self, name: &str, address: &str) -> Result<Service> {
        Service::start(&self.host, name, address)
    }

    /// Requires that a rule is in this state now.
    pub fn must_be(&self, network: &str, port: u16, state: &str) -> Result<()> {
        let now = self.daemon.rule_state(network, port)?;
        ensure!(now.state == state, "{network} {port} should be {state}: {now:?}");
        Ok(())
    }

    /// Returns the container's network namespace, where it is to find the hardware address of its gateway
    /// anew.
    fn netns(&self, container: &Container) -> Result<NetNs> {
        let netns = self.engine.netns(container)?;
        if !E::KEEPS_HARDWARE_ADDRESSES {
            netns.ip("neigh flush all")?;
        }
        Ok(netns)
    }

    /// Requires that the container reaches the service of that name when it dials `to`.
    pub fn served(&self, container: &Container, to: SocketAddr, service: &str) -> Result<Greeting> {
        client::served_by(&self.netns(container)?, to, service)
    }

    /// Requires that the container is refused at once when it dials `to`.
    pub fn refused(&self, container: &Container, to: SocketAddr) -> Result<()> {
        client::refused(&self.netns(container)?, to)
    }

    /// Requires that the container is not served when it dials `to`: the host may refuse or be silent.
    pub fn not_served(&self, container: &Container, to: SocketAddr) -> Result<()> {
        client::not_served(&self.netns(container)?, None, to)
    }

    /// Returns the container's own address on a network.
    pub fn address(&self, container: &Container, network: &Network) -> Result<String> {
        self.engine.address(container, network)
    }

    /// Returns the daemon's state of the engine, `reachable` or `away`, and since when it is away.
    pub fn engine_state(&self) -> Result<(String, Option<String>)> {
        let status = self.daemon.status()?;
        let state = status["docker"]["state"].as_str().context("a state of the engine")?.to_owned();
        Ok((state, status["docker"]["since"].as_str().map(str::to_owned)))
    }

    /// Waits until the engine is in that state for the daemon.
    pub fn wait_for_engine(&self, wanted: &str) -> Result<()> {
        patience::until(&format!("the engine is {wanted}"), || {
            Ok((self.engine_state()?.0 == wanted).then_some(()))
        })
    }

    /// Writes the configuration file and has the daemon read it; returns the command's output.
    pub fn reload(&self, config: &str) -> Result<Output> {
        fs::write(self.daemon.config(), config)?;
        let output = self.daemon.cli(&["reload"])?;
        ensure!(output.status == 0, "{output:?}");
        Ok(output)
    }
}

//! docker: a real Docker Engine in the [`super::sandbox`], on its default socket. No image is pulled: the
//! image is made of busybox.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::daemon::Output;
use super::logs::Log;
use super::netns::NetNs;
use super::suite::find_program;
use super::{patience, sandbox};

/// Name of the image that [`Engine::run`] uses.
const IMAGE: &str = "lab";
const SOCKET: &str = "/run/docker.sock";
/// The engine's data folder, on the sandbox's tmpfs, so that nothing is left on the machine.
const DATA: &str = "/run/docker-data";

/// A Docker Engine, running or stopped.
#[derive(Debug)]
pub struct Engine {
    process: Option<Child>,
    live_restore: bool,
    log: Log,
}

impl Engine {
    /// Starts an Engine whose containers end with it.
    pub fn start() -> Result<Engine> {
        Engine::start_with(false)
    }

    /// Starts an Engine; with `live_restore` its containers survive it.
    pub fn start_with(live_restore: bool) -> Result<Engine> {
        let mut engine = Engine::prepare(live_restore)?;
        engine.up()?;
        engine.import_image()?;
        Ok(engine)
    }

    /// Prepares an Engine without starting it; the first [`Engine::up`] has no image yet.
    pub fn prepare(live_restore: bool) -> Result<Engine> {
        // A key is written to the first, containerd's folders to the second; nothing may stay on the machine.
        sandbox::shadow("/etc")?;
        sandbox::shadow("/opt")?;
        Ok(Engine { process: None, live_restore, log: Log::new("dockerd") })
    }

    /// Starts the stopped Engine again and waits until it answers.
    pub fn up(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the Engine is running");
        let mut command = Command::new("dockerd");
        command
            .args(["--data-root", DATA, "--log-level", "warn"])
            .env_remove("DOCKER_HOST")
            .env_remove("NOTIFY_SOCKET");
        if self.live_restore {
            command.arg("--live-restore");
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdout.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        child.stderr.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        let process = self.process.insert(child);
        patience::until("the Engine answers", || {
            if let Some(status) = process.try_wait()? {
                anyhow::bail!("dockerd ended: {status}");
            }
            Ok((Path::new(SOCKET).exists() && docker(&["version"])?.status == 0).then_some(()))
        })
    }

    /// Stops the Engine with SIGTERM and waits until it is gone.
    pub fn down(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the Engine is not running")?;
        kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGTERM)?;
        patience::until("dockerd ends after SIGTERM", || Ok(process.try_wait()?)).map(drop)
    }

    /// Stops the Engine and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.down()?;
        self.up()
    }

    /// Builds the busybox image that [`Engine::run`] uses.
    pub fn import_image(&self) -> Result<()> {
        let root = tempfile::Builder::new().prefix("image.").tempdir_in("/run")?;
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
        self.docker(&["import", archive.to_str().context("path")?, IMAGE])?;
        fs::remove_file(archive)?;
        Ok(())
    }

    /// Runs a `docker` command that must succeed; returns its standard output without the newline.
    pub fn docker(&self, arguments: &[&str]) -> Result<String> {
        let output = docker(arguments)?;
        self.log.note(&format!(
            "[harness] docker {arguments:?} -> {} {}",
            output.status,
            output.stderr.trim()
        ));
        ensure!(output.status == 0, "docker {arguments:?}: {}", output.stderr.trim());
        Ok(output.stdout.trim_end().to_owned())
    }

    /// Creates a bridge network; `more` are further options of `docker network create`.
    pub fn create_network(&self, name: &str, more: &[&str]) -> Result<Network> {
        let id = self.docker(&[&["network", "create"], more, &["--", name]].concat())?;
        self.network(&id)
    }

    /// Inspects a network, by name or id.
    pub fn network(&self, name: &str) -> Result<Network> {
        let text = self.docker(&["network", "inspect", "--", name])?;
        let networks: serde_json::Value = serde_json::from_str(&text)?;
        let network = &networks[0];
        let word = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        let id = word(&network["Id"]).context("a network without an id")?;
        let name = word(&network["Name"]).context("a network without a name")?;
        let mut configurations = network["IPAM"]["Config"].as_array().into_iter().flatten();
        let gateway = configurations.find_map(|one| word(&one["Gateway"])).unwrap_or_default();
        // The Engine of Debian 12 adds the prefix for the networks it numbers itself.
        let gateway = gateway.split('/').next().unwrap_or_default().parse().context("gateway")?;
        Ok(Network { id, name, gateway })
    }

    /// Removes a network by name or id.
    pub fn remove_network(&self, name: &str) -> Result<()> {
        self.docker(&["network", "rm", "--", name]).map(drop)
    }

    /// Starts a container that sleeps, on a network; `more` are further options of `docker run`.
    pub fn run(&self, network: &str, more: &[&str]) -> Result<Container> {
        let fixed = ["run", "--detach", "--stop-timeout", "0", "--network", network];
        let id = self.docker(&[&fixed, more, &[IMAGE, "sleep", "1000000"]].concat())?;
        Ok(Container { id })
    }

    /// Returns the container's current network namespace.
    pub fn netns(&self, container: &Container) -> Result<NetNs> {
        let pid = self.docker(&["inspect", "--format", "{{.State.Pid}}", &container.id])?;
        NetNs::of_process(pid.parse()?)
    }

    /// Runs a command in a container.
    pub fn exec(&self, container: &Container, command: &[&str]) -> Result<Output> {
        docker(&[&["exec", &container.id], command].concat())
    }

    /// Removes a container, running or not.
    pub fn remove(&self, container: &Container) -> Result<()> {
        self.docker(&["rm", "--force", &container.id]).map(drop)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Its containers and containerd end with the sandbox.
            drop(process.kill());
            drop(process.wait());
        }
    }
}

/// A network, as the Engine reports it.
#[derive(Clone, Debug)]
pub struct Network {
    /// Docker's network id, in full.
    pub id: String,
    /// The network's name.
    pub name: String,
    /// The address that containers dial.
    pub gateway: std::net::IpAddr,
}

/// A running or stopped container.
#[derive(Clone, Debug)]
pub struct Container {
    /// Docker's container id, in full.
    pub id: String,
}

fn docker(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new("docker");
    command.env("DOCKER_HOST", format!("unix://{SOCKET}")).env("DOCKER_CONFIG", "/run/docker-client");
    Ok(command.args(arguments).stdin(Stdio::null()).output().context("run docker")?.into())
}

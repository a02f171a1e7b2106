//! podman: a real Podman in the [`super::sandbox`], with the service that provides Docker's API. No image is
//! pulled: the image is made of busybox.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;
use serde_json::Value;

use super::daemon::Output;
use super::logs::Log;
use super::netns::NetNs;
use super::suite::find_program;
use super::{patience, sandbox};

/// Name of the image that [`Podman::run`] uses.
const IMAGE: &str = "localhost/lab";
/// Folder of everything that is Podman's own, on the sandbox's tmpfs, so that nothing is left on the machine.
const FOLDER: &str = "/run/podman-lab";

/// Podman and its service, running or stopped. Containers do not need the service.
#[derive(Debug)]
pub struct Podman {
    folder: PathBuf,
    rootless: bool,
    service: Option<Child>,
    log: Log,
}

/// The uid of the user who runs it without root; no user of the machine has it.
const USER: u32 = 4711;
/// The user's cgroup.
const USER_CGROUP: &str = "/sys/fs/cgroup/user/session";

impl Podman {
    /// Starts Podman as root, with the service running and the image built.
    pub fn start() -> Result<Podman> {
        Podman::start_as(false)
    }

    /// Like [`Podman::start`], run by a user without privileges, who has a cgroup.
    pub fn rootless() -> Result<Podman> {
        admit_user()?;
        give_to_user(Path::new(USER_CGROUP).parent().context("a parent")?)?;
        Podman::start_as(true)
    }

    /// Like [`Podman::rootless`], but the cgroup belongs to root.
    pub fn rootless_without_cgroup() -> Result<Podman> {
        admit_user()?;
        Podman::start_as(true)
    }

    fn start_as(rootless: bool) -> Result<Podman> {
        // A cache of the images' layers is written there, whatever the configuration says.
        sandbox::shadow("/var/lib")?;
        let folder = PathBuf::from(FOLDER);
        fs::create_dir_all(&folder)?;
        let mut podman = Podman { folder, rootless, service: None, log: Log::new("podman") };
        podman.configure()?;
        if rootless {
            fs::create_dir(podman.folder.join("run"))?;
            give_to_user(&podman.folder)?;
        }
        podman.import_image()?;
        podman.up()?;
        Ok(podman)
    }

    /// Writes a configuration that uses nothing of the machine's: neither its configuration nor its storage.
    /// Sets no limits, whose controllers may be on cgroup v1.
    fn configure(&self) -> Result<()> {
        let folder = self.folder.display();
        fs::write(
            self.folder.join("containers.conf"),
            format!(
                "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\n\
                 tmp_dir = \"{folder}/tmp\"\nstatic_dir = \"{folder}/static\"\n\
                 volume_path = \"{folder}/volumes\"\n\
                 [network]\nnetwork_backend = \"netavark\"\nnetwork_config_dir = \"{folder}/networks\"\n\
                 [containers]\nlog_driver = \"k8s-file\"\npids_limit = 0\n"
            ),
        )?;
        fs::write(
            self.folder.join("storage.conf"),
            format!(
                "[storage]\ndriver = \"vfs\"\nrunroot = \"{folder}/runroot\"\n\
                 graphroot = \"{folder}/storage\"\n"
            ),
        )?;
        Ok(())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(if self.rootless { "sh" } else { "podman" });
        if self.rootless {
            let drop = format!("setpriv --reuid={USER} --regid={USER} --clear-groups");
            let enter = format!("echo 0 > {USER_CGROUP}/cgroup.procs && exec {drop} podman \"$@\"");
            command.args(["-c", &enter, "podman"]);
            command.env("HOME", &self.folder).env("XDG_RUNTIME_DIR", self.folder.join("run"));
            command.current_dir(&self.folder);
        }
        command
            .env("CONTAINERS_CONF", self.folder.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.folder.join("storage.conf"))
            .env("TMPDIR", &self.folder)
            .env_remove("NOTIFY_SOCKET")
            .env_remove("DOCKER_HOST")
            .stdin(Stdio::null());
        command
    }

    /// Returns the value for `DOCKER_HOST`.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("podman.sock")
    }

    /// Starts the service again and waits until it listens.
    pub fn up(&mut self) -> Result<()> {
        ensure!(self.service.is_none(), "the service is running");
        drop(fs::remove_file(self.socket()));
        let mut command = self.command();
        command.args(["system", "service", "--time=0", &self.address()]);
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("run podman")?;
        child.stdout.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        child.stderr.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        let socket = self.socket();
        let service = self.service.insert(child);
        patience::until("Podman's service listens", || {
            if let Some(status) = service.try_wait()? {
                anyhow::bail!("podman system service ended: {status}");
            }
            Ok(socket.exists().then_some(()))
        })
    }

    /// Stops the service and waits until it is gone. Containers keep running.
    pub fn down(&mut self) -> Result<()> {
        let mut service = self.service.take().context("the service is not running")?;
        kill(Pid::from_raw(service.id().cast_signed()), Signal::SIGTERM)?;
        patience::until("Podman's service ends after SIGTERM", || Ok(service.try_wait()?)).map(drop)
    }

    fn import_image(&self) -> Result<()> {
        let root = tempfile::Builder::new().prefix("image.").tempdir_in("/run")?;
        for folder in ["bin", "etc", "tmp", "root"] {
            fs::create_dir(root.path().join(folder))?;
        }
        let busybox = find_program("busybox").context("no busybox")?;
        fs::copy(busybox, root.path().join("bin/busybox"))?;
        for applet in ["sh", "sleep", "nc", "cat", "echo", "timeout", "ip"] {
            symlink("busybox", root.path().join("bin").join(applet))?;
        }
        let archive = self.folder.join("image.tar");
        let tar =
            Command::new("tar").arg("-C").arg(root.path()).arg("-cf").arg(&archive).arg(".").status()?;
        ensure!(tar.success(), "tar: {tar}");
        self.podman(&["import", "--quiet", archive.to_str().context("path")?, IMAGE])?;
        fs::remove_file(archive)?;
        Ok(())
    }

    /// Runs a `podman` command that must succeed; returns its standard output without the newline. Does not
    /// need the service.
    pub fn podman(&self, arguments: &[&str]) -> Result<String> {
        let output = self.attempt(arguments)?;
        ensure!(output.status == 0, "podman {arguments:?}: {}", output.stderr.trim());
        Ok(output.stdout.trim_end().to_owned())
    }

    fn attempt(&self, arguments: &[&str]) -> Result<Output> {
        let output: Output = self.command().args(arguments).output().context("run podman")?.into();
        let (status, said) = (output.status, output.stderr.trim());
        self.log.note(&format!("[harness] podman {arguments:?} -> {status} {said}"));
        Ok(output)
    }

    /// Creates a network; `more` are further options of `podman network create`.
    pub fn create_network(&self, name: &str, more: &[&str]) -> Result<Network> {
        self.podman(&[&["network", "create"], more, &[name]].concat())?;
        self.network(name)
    }

    /// Inspects a network.
    pub fn network(&self, name: &str) -> Result<Network> {
        let networks: Value = serde_json::from_str(&self.podman(&["network", "inspect", name])?)?;
        let word = |value: &Value| value.as_str().map(str::to_owned).context("a word");
        let network = &networks[0];
        Ok(Network {
            id: word(&network["id"])?,
            name: word(&network["name"])?,
            bridge: word(&network["network_interface"])?,
            gateway: word(&network["subnets"][0]["gateway"])?.parse()?,
        })
    }

    /// Starts a container that sleeps, on a network; `more` are further options of `podman run`.
    pub fn run(&self, network: &str, more: &[&str]) -> Result<Container> {
        let fixed = ["run", "--detach", "--stop-timeout", "0", "--network", network];
        let id = self.podman(&[&fixed, more, &[IMAGE, "sleep", "1000000"]].concat())?;
        Ok(Container { id })
    }

    /// Returns the container's current network namespace.
    pub fn netns(&self, container: &Container) -> Result<NetNs> {
        let pid = self.podman(&["inspect", "--format", "{{.State.Pid}}", &container.id])?;
        NetNs::of_process(pid.parse()?)
    }

    /// Runs a command in a container.
    pub fn exec(&self, container: &Container, command: &[&str]) -> Result<Output> {
        self.attempt(&[&["exec", &container.id], command].concat())
    }

    /// Removes a container, running or not.
    pub fn remove(&self, container: &Container) -> Result<()> {
        self.podman(&["rm", "--force", "--time", "0", &container.id]).map(drop)
    }
}

/// Creates the user, with id ranges for containers and access to /dev/net/tun.
fn admit_user() -> Result<()> {
    sandbox::shadow("/etc")?;
    let add = |file: &str, line: String| -> Result<()> {
        let before = fs::read_to_string(file).unwrap_or_default();
        Ok(fs::write(file, format!("{before}{line}\n"))?)
    };
    add("/etc/passwd", format!("lab:x:{USER}:{USER}::{FOLDER}:/bin/sh"))?;
    add("/etc/group", format!("lab:x:{USER}:"))?;
    for file in ["/etc/subuid", "/etc/subgid"] {
        fs::write(file, "lab:200000:65536\n")?;
    }
    fs::create_dir_all(USER_CGROUP)?;
    // The machine's device may belong to root alone.
    let (tun, there) = ("/run/tun", "/dev/net/tun");
    mknod(tun, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(10, 200))?;
    fs::set_permissions(tun, fs::Permissions::from_mode(0o666))?;
    let none: Option<&str> = None;
    mount(Some(tun), there, none, MsFlags::MS_BIND, none).with_context(|| format!("bind {there}"))
}

fn give_to_user(folder: &Path) -> Result<()> {
    chown(folder, Some(USER), Some(USER))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        chown(entry.path(), Some(USER), Some(USER))?;
        if entry.file_type()?.is_dir() {
            give_to_user(&entry.path())?;
        }
    }
    Ok(())
}

impl Drop for Podman {
    fn drop(&mut self) {
        if let Some(mut service) = self.service.take() {
            // Containers end with the sandbox.
            drop(service.kill());
            drop(service.wait());
        }
    }
}

/// A network, as Podman reports it.
#[derive(Clone, Debug)]
pub struct Network {
    /// Podman's network id, in full.
    pub id: String,
    /// The network's name.
    pub name: String,
    /// The bridge's name; the bridge exists while a container is on it.
    pub bridge: String,
    /// The address that containers dial.
    pub gateway: IpAddr,
}

/// A running or stopped container.
#[derive(Clone, Debug)]
pub struct Container {
    /// Podman's container id, in full.
    pub id: String,
}

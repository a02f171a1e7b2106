//! podman: Podman as an [`Engine`]: its command line, and the service that provides Docker's API. Containers
//! do not need the service.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::Value;

use super::engine::{Engine, Network, Process};
use super::logs::Log;
use super::sandbox;

/// Folder of everything that is Podman's own, on the sandbox's tmpfs, so that nothing is left on the machine.
const FOLDER: &str = "/run/podman-lab";

/// Podman and its service, running or stopped.
#[derive(Debug)]
pub struct Podman {
    folder: PathBuf,
    rootless: bool,
    process: Process,
}

/// The uid of the user who runs it without root; no user of the machine has it.
const USER: u32 = 4711;
/// The user's cgroup.
const USER_CGROUP: &str = "/sys/fs/cgroup/user/session";

impl Podman {
    /// Starts Podman as a user without privileges, who has a cgroup.
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
        let mut podman = Podman { folder, rootless, process: Process::new("podman") };
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
                 tmp_dir = \"{folder}/tmp\"\nstatic_dir = \"{folder}/storage/libpod\"\n\
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
}

impl Engine for Podman {
    const PRODUCT: &'static str = "Podman";
    const DEFAULT_NETWORK: &'static str = "podman";
    const DEFAULT_BRIDGE: &'static str = "podman0";
    const UNIT: &'static str = "podman.socket";
    const BRIDGE_WITHOUT_CONTAINERS: bool = false;
    const LISTS_HOST_AND_NONE: bool = false;
    const LISTS_RESTARTING_CONTAINERS: bool = false;
    const TELLS_OF_NETWORKS: bool = false;
    const REUSES_BRIDGE_NAMES: bool = true;
    const KEEPS_HARDWARE_ADDRESSES: bool = false;
    const HOST_GATEWAY_IS_SHARED: bool = false;

    fn start() -> Result<Podman> {
        Podman::start_as(false)
    }

    fn start_lasting() -> Result<Podman> {
        Podman::start()
    }

    fn up(&mut self) -> Result<()> {
        let socket = self.socket();
        drop(fs::remove_file(&socket));
        let mut command = self.client();
        command.args(["system", "service", "--time=0", &format!("unix://{socket}")]);
        self.process.start(command, || Ok(Path::new(&socket).exists()))
    }

    fn down(&mut self) -> Result<()> {
        self.process.stop()
    }

    fn socket(&self) -> String {
        format!("{}/podman.sock", self.folder.display())
    }

    fn environment(&self) -> Vec<(String, String)> {
        vec![("DOCKER_HOST".to_owned(), format!("unix://{}", self.socket()))]
    }

    fn client(&self) -> Command {
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
            .env_remove("DOCKER_HOST");
        command
    }

    fn log(&self) -> &Log {
        &self.process.log
    }

    fn network(&self, name: &str) -> Result<Network> {
        let networks: Value = serde_json::from_str(&self.cli(&["network", "inspect", "--", name])?)?;
        let word = |value: &Value| value.as_str().map(str::to_owned).context("a word");
        let network = &networks[0];
        Ok(Network {
            id: word(&network["id"])?,
            name: word(&network["name"])?,
            bridge: word(&network["network_interface"])?,
            gateway: word(&network["subnets"][0]["gateway"])?.parse()?,
        })
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

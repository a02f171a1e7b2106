//! store: the files. These are the rules that `allow` made, the networks, containers and labels last seen,
//! and the configuration ([`config`]). Owns their format; imports planning.
//!
//! Writes are atomic and durable: a new file is written next to the old one, synced and renamed over it, then
//! the directory is synced.

pub mod config;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::planning::{
    inventory::{DockerNetwork, SeenContainer},
    labels::Labelled,
    rule::Rule,
};

/// Version of the format of the files in the state directory.
const VERSION: u32 = 1;
const RULES_FILE: &str = "rules.toml";

/// The state directory.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RulesFile {
    version: u32,
    #[serde(default, rename = "rule", skip_serializing_if = "Vec::is_empty")]
    rules: Vec<Rule>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworksFile {
    version: u32,
    /// The id of the boot in which the interface indices are valid.
    #[serde(default)]
    boot: String,
    #[serde(default, rename = "network", skip_serializing_if = "Vec::is_empty")]
    networks: Vec<DockerNetwork>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LabelsFile {
    version: u32,
    #[serde(default, rename = "labelled", skip_serializing_if = "Vec::is_empty")]
    labelled: Vec<Labelled>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContainersFile {
    version: u32,
    #[serde(default, rename = "container", skip_serializing_if = "Vec::is_empty")]
    containers: Vec<SeenContainer>,
}

impl Store {
    /// Opens the directory; creates it with access for its owner only if it does not exist. The daemon has
    /// checked who owns the path.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("cannot make the state directory {}", directory.display()))?;
        Ok(Self::at(directory))
    }

    /// Uses the directory as it is, for reading.
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Takes the lock, which the one daemon that uses the directory holds.
    pub fn lock(&self) -> anyhow::Result<Flock<File>> {
        // A separate file: everyone who may read a directory can lock it.
        let path = self.path("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            Errno::EWOULDBLOCK => {
                anyhow::anyhow!("another lbridge daemon uses {}; stop it first", self.directory.display())
            }
            error => anyhow::anyhow!("cannot lock {}: {error}", self.directory.display()),
        })
    }

    /// Returns the path of the file with the rules that `allow` made.
    pub fn rules_file(&self) -> PathBuf {
        self.path(RULES_FILE)
    }

    /// Reads the rules that `allow` made. If the file cannot be parsed, returns an error that names the line:
    /// a start without its rules would cut off the connections that they serve.
    pub fn rules(&self) -> anyhow::Result<Vec<Rule>> {
        let path = self.rules_file();
        let file: RulesFile = match read_toml(&path)? {
            None => return Ok(vec![]),
            Some(file) => file,
        };
        if file.version != VERSION {
            bail!(
                "{} has version {}, this lbridge writes {VERSION}; use the lbridge that wrote it",
                path.display(),
                file.version
            );
        }
        Ok(file.rules)
    }

    /// Replaces the rules that `allow` made.
    pub fn save_rules(&self, rules: Vec<Rule>) -> anyhow::Result<()> {
        self.write(RULES_FILE, &toml::to_string(&RulesFile { version: VERSION, rules })?)
    }

    /// Reads Docker's networks as last seen, for a start while the engine is unreachable. They are only an
    /// aid, so an unreadable file counts as an empty one.
    pub fn networks(&self) -> Vec<DockerNetwork> {
        match read_toml::<NetworksFile>(&self.path("networks.toml")) {
            Ok(Some(file)) if file.version == VERSION => {
                let of_now = !file.boot.is_empty() && file.boot == boot();
                let mut networks = file.networks;
                let indices = networks.iter_mut().filter_map(|network| network.bridge_index.as_mut());
                // After a reboot the index may be another interface's.
                indices.filter(|_| !of_now).for_each(|index| *index = 0);
                networks
            }
            Ok(_) => vec![],
            Err(error) => {
                log_unreadable("networks", &error);
                vec![]
            }
        }
    }

    /// Replaces the networks last seen.
    pub fn save_networks(&self, networks: Vec<DockerNetwork>) -> anyhow::Result<()> {
        let file = NetworksFile { version: VERSION, boot: boot(), networks };
        self.write("networks.toml", &toml::to_string(&file)?)
    }

    /// Reads the containers that rules name, as last seen; see [`Store::networks`]. An entry stays valid for
    /// as long as its process exists.
    pub fn containers(&self) -> Vec<SeenContainer> {
        match read_toml::<ContainersFile>(&self.path("containers.toml")) {
            Ok(Some(file)) if file.version == VERSION => file.containers,
            Ok(_) => vec![],
            Err(error) => {
                log_unreadable("containers", &error);
                vec![]
            }
        }
    }

    /// Replaces the containers last seen.
    pub fn save_containers(&self, containers: Vec<SeenContainer>) -> anyhow::Result<()> {
        self.write("containers.toml", &toml::to_string(&ContainersFile { version: VERSION, containers })?)
    }

    /// Reads what asked for something by labels, as last seen; see [`Store::networks`].
    pub fn labelled(&self) -> Vec<Labelled> {
        match read_toml::<LabelsFile>(&self.path("labels.toml")) {
            Ok(Some(file)) if file.version == VERSION => file.labelled,
            Ok(_) => vec![],
            Err(error) => {
                log_unreadable("labels", &error);
                vec![]
            }
        }
    }

    /// Replaces the labels last seen.
    pub fn save_labelled(&self, labelled: Vec<Labelled>) -> anyhow::Result<()> {
        self.write("labels.toml", &toml::to_string(&LabelsFile { version: VERSION, labelled })?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path(name);
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
            file.write_all(text.as_bytes())?;
            file.as_file().set_permissions(fs::Permissions::from_mode(0o600))?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|e| e.error)?;
            File::open(&self.directory)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Returns the id of this boot; empty if the kernel does not provide it, as in files of versions that did not
/// store it.
fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

fn log_unreadable(what: &str, error: &anyhow::Error) {
    tracing::warn!(
        what,
        error = format!("{error:#}"),
        "could not read the last seen state; starting without it"
    );
}

fn read_toml<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    toml::from_str(&text).map(Some).map_err(|error| {
        let place = error.span().map_or_else(String::new, |span| place(&text, span.start));
        let message = error.message().replace('\n', " ");
        anyhow::anyhow!("{}{place}: {message}; fix or remove the file, then start again", path.display())
    })
}

/// Returns `:LINE:COLUMN` of a byte offset.
fn place(text: &str, start: usize) -> String {
    let before = text.get(..start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1;
    format!(":{line}:{column}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("state")).unwrap();
        (directory, store)
    }

    #[test]
    fn rules_survive() {
        let (_directory, store) = store();
        assert_eq!(store.rules().unwrap(), []);
        let file: RulesFile = toml::from_str(
            "version = 1\n[[rule]]\nnetwork = \"app\"\nport = \"80=[::1]:3000\"\nsource = \"loopback\"\n\
             path = \"relay\"\ncomment = \"a \\\"b\\\"\"\n[[rule]]\nnetwork = \"bridge:br0\"\n\
             port = \"22\"\n",
        )
        .unwrap();
        store.save_rules(file.rules.clone()).unwrap();
        assert_eq!(store.rules().unwrap(), file.rules);
        let mode = fs::metadata(store.path("rules.toml")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    /// Rules written by every version stay readable, and a rule without options stays short.
    #[test]
    fn the_file_of_rules_has_what_was_given_and_no_defaults() {
        let text = "version = 1\n\n[[rule]]\nnetwork = \"app\"\nport = \"80=[::1]:3000\"\n\
                    from = [\"db\", \"web\"]\nlocalhost = true\nsource = \"loopback\"\npath = \"relay\"\n\
                    max_connections = 100\nidle_timeout = \"10m 500ms\"\nproxy_protocol = \"v2\"\n\
                    comment = 'a \"b\"'\n\n[[rule]]\nnetwork = \"pid:7\"\nport = \"22\"\nlocalhost = true\n\
                    process = \"12@a-b\"\n\n[[rule]]\nnetwork = \"bridge:br0\"\nport = \"53/udp\"\n";
        let (_directory, store) = store();
        fs::write(store.rules_file(), text).unwrap();
        store.save_rules(store.rules().unwrap()).unwrap();
        assert_eq!(fs::read_to_string(store.rules_file()).unwrap(), text);
    }

    #[test]
    fn an_interface_of_another_boot_is_nobodys() {
        let (_directory, store) = store();
        let network = |bridge_index| DockerNetwork { bridge_index, ..DockerNetwork::default() };
        store.save_networks(vec![network(Some(7)), network(None)]).unwrap();
        assert_eq!(store.networks(), [network(Some(7)), network(None)]);
        let path = store.path("networks.toml");
        let text = fs::read_to_string(&path).unwrap().replace(&boot(), "another");
        fs::write(&path, text).unwrap();
        assert_eq!(store.networks(), [network(Some(0)), network(None)]);
    }

    #[test]
    fn a_broken_file_is_named_with_its_line() {
        let (_directory, store) = store();
        for (text, place) in [
            ("version = 1\n[[rule]]\nnetwork = \"a\"\nport = \"0\"\n", ":4:"),
            ("version = 1\n[[rule]]\nnetwork = \"a\"\n", ":2:"),
            ("version = 1\n[[rule]]\nnetwork = \"a\"\nport = \"1\"\nsource = \"x\"\n", ":5:10: "),
            ("version = 1\n[[rule]]\nnetwork = \"a\"\nport = \"1\"\nfrom = [\"a\", 1]\n", ":5:14: "),
            ("version = 1\n[[rule]]\nnetwork = \"a\"\nport = \"1\"\n\n[[rule]]\nnetwork = \"b\"\n", ":6:"),
            ("version = 1\ngarbage", ":2:"),
            ("version = 1\n[[rule]]\nnetwork = \"a\"\nport = \"1\"\nprot = 1\n", ":5:"),
        ] {
            fs::write(store.path("rules.toml"), text).unwrap();
            let error = format!("{:#}", store.rules().unwrap_err());
            assert!(error.contains(place) && !error.contains('\n'), "{text:?}: {error}");
        }
    }
}

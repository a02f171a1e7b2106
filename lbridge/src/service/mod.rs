//! service: lbridge as a systemd service on this host, and its complete removal. Imports the shells. Does not
//! need the daemon, which must not run when its traces are removed.

mod systemd;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::{
    firewall::{self, conntrack},
    host::{netns::HostNetns, processes},
    kernel::{
        pins,
        strays::{self, Stray},
    },
    store::Store,
};

/// The daemon's default control socket.
pub const SOCKET: &str = "/run/lbridge/lbridge.sock";
/// The default directory of the rules that `allow` makes.
pub const STATE_DIR: &str = "/var/lib/lbridge";
/// The default configuration file.
pub const CONFIG: &str = "/etc/lbridge/lbridge.toml";
/// The default directory on a bpffs for the pins.
pub const BPFFS: &str = "/sys/fs/bpf/lbridge";

/// An example configuration to start from.
const EXAMPLE: &str = include_str!("../../../packaging/lbridge.toml");

/// The paths at which a daemon may have left something.
#[derive(Debug, Clone)]
pub struct Traces {
    /// The control socket.
    pub socket: PathBuf,
    /// The state directory.
    pub state_dir: PathBuf,
    /// The pin directory, on a bpffs.
    pub bpffs: PathBuf,
}

impl Default for Traces {
    fn default() -> Self {
        Self { socket: SOCKET.into(), state_dir: STATE_DIR.into(), bpffs: BPFFS.into() }
    }
}

/// A named step. It returns the change that it made; `None` if there was nothing to do.
type Step<'a> = (&'static str, Box<dyn FnOnce() -> anyhow::Result<Option<String>> + 'a>);

/// Takes the steps in order; returns the changes. An error names the steps that are left.
fn take(steps: Vec<Step<'_>>) -> anyhow::Result<Vec<String>> {
    let names: Vec<_> = steps.iter().map(|(name, _)| *name).collect();
    let mut changed = vec![];
    for (number, (_, step)) in steps.into_iter().enumerate() {
        match step() {
            Ok(change) => changed.extend(change),
            Err(error) => bail!("{error:#}; left to do: {}", names[number..].join(", ")),
        }
    }
    Ok(changed)
}

/// Makes systemd run this program, now and at every boot. If run again, it applies only what has changed
/// since.
pub fn install() -> anyhow::Result<Vec<String>> {
    needs_root("install")?;
    let unit = systemd::Unit::for_this_program()?;
    if !unit.runs_already()? {
        // Otherwise the start would fail, with a reason that only the journal shows.
        no_daemon(Path::new(STATE_DIR))?;
    }
    take(vec![
        ("write the configuration", Box::new(write_example)),
        ("write the unit", Box::new(|| unit.write())),
        ("enable the unit", Box::new(systemd::enable)),
        ("start the unit", Box::new(|| unit.start())),
    ])
}

/// Undoes [`install`] and removes what the daemon left; with `purge` also rules and configuration.
pub fn uninstall(purge: bool) -> anyhow::Result<Vec<String>> {
    needs_root("uninstall")?;
    systemd::may_be_removed()?;
    let traces = Traces::default();
    let mut steps: Vec<Step<'_>> =
        vec![("stop and disable the unit", Box::new(|| systemd::disable().map(|()| None)))];
    steps.push(("remove what the daemon left (`lbridge service cleanup`)", {
        let traces = traces.clone();
        Box::new(move || Ok(one_line(&cleanup(&traces)?)))
    }));
    steps.push(("remove the unit", Box::new(systemd::remove)));
    if purge {
        let remove = |path: &'static str| -> Step<'static> {
            (path, Box::new(move || Ok(remove_tree(Path::new(path))?.then(|| format!("removed {path}")))))
        };
        steps.push(remove(STATE_DIR));
        steps.push(remove("/etc/lbridge"));
        steps.push(remove(systemd::DROP_INS));
    }
    let mut changes = take(steps)?;
    if !purge {
        changes.push(format!("kept {STATE_DIR} and /etc/lbridge; --purge removes them"));
    }
    Ok(changes)
}

/// Removes what the daemon leaves in the kernel so that it works without the daemon. Rules and configuration
/// stay.
pub fn cleanup(traces: &Traces) -> anyhow::Result<Vec<String>> {
    needs_root("cleanup")?;
    let _lock = no_daemon(&traces.state_dir)?;
    take(vec![
        // First, while the kernel programs still keep what these rules let in from the host's other services.
        ("remove the firewall's accept rules", Box::new(|| accept_rules(&traces.bpffs))),
        (
            "detach the kernel programs",
            Box::new(|| {
                let removed = pins::remove_all(&traces.bpffs)?;
                let strays = end_strays(&traces.bpffs)?;
                Ok(match (removed, strays) {
                    (true, _) => {
                        Some(format!("detached the kernel programs, removed {}", traces.bpffs.display()))
                    }
                    (false, 0) => None,
                    (false, _) => Some("detached kernel programs that had no pins".to_owned()),
                })
            }),
        ),
        // A tool that a killed daemon had started may have added one meanwhile.
        ("look for accept rules once more", Box::new(|| accept_rules(&traces.bpffs))),
        ("remove the control socket", Box::new(|| remove_socket(&traces.socket))),
    ])
}

/// Ends programs that serve this network namespace though no pin names them; returns their number.
fn end_strays(bpffs: &Path) -> anyhow::Result<usize> {
    let netns = HostNetns::open()?;
    let strays = strays::find(bpffs, &netns.file, netns.cookie)?;
    let programs: Vec<u32> = strays.iter().map(|stray| stray.program).collect();
    if let Some(pid) = processes::with_program(&programs) {
        bail!("another lbridge daemon (process {pid}) serves this network namespace; stop it first");
    }
    strays.iter().try_for_each(Stray::end)?;
    Ok(strays.len())
}

fn accept_rules(bpffs: &Path) -> anyhow::Result<Option<String>> {
    // The packets that accept rules let in, or did when the daemon last looked.
    let mut accepted = pins::accepted(bpffs)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (removed, let_in) = runtime.block_on(firewall::remove_all(bpffs.exists()))?;
    accepted.extend(let_in);
    // If this fails, nothing more can be done about flows.
    let flows = match conntrack::forget(&accepted) {
        Ok(()) => String::new(),
        Err(error) => {
            format!("; conntrack could not forget the connections that they let in, which time out: {error}")
        }
    };
    Ok(match removed {
        0 if flows.is_empty() => None,
        1 => Some(format!("removed 1 accept rule from the firewall{flows}")),
        rules => Some(format!("removed {rules} accept rules from the firewall{flows}")),
    })
}

fn needs_root(command: &str) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("lbridge service {command} needs root; use sudo");
    }
    Ok(())
}

/// Takes the daemon's lock: no daemon runs while it is held.
fn no_daemon(state_dir: &Path) -> anyhow::Result<Option<impl Drop + use<>>> {
    state_dir.is_dir().then(|| Store::at(state_dir).lock()).transpose()
}

fn write_example() -> anyhow::Result<Option<String>> {
    let path = Path::new(CONFIG);
    if path.try_exists()? {
        return Ok(None);
    }
    write(path, EXAMPLE)?;
    Ok(Some(format!("wrote {CONFIG}, an example")))
}

/// Writes a file of this program that everybody can read, atomically.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::{io::Write as _, os::unix::fs::PermissionsExt as _};

    let write = || -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Removes the socket, and its folder if that is lbridge's own, which systemd removes when the unit stops.
fn remove_socket(path: &Path) -> anyhow::Result<Option<String>> {
    let mut removed = is_done(path, fs::remove_file(path))?;
    if let Some(folder) = path.parent().filter(|folder| Some(*folder) == Path::new(SOCKET).parent()) {
        removed |= is_done(folder, fs::remove_dir(folder))?;
    }
    Ok(removed.then(|| format!("removed {}", path.display())))
}

fn remove_tree(path: &Path) -> anyhow::Result<bool> {
    is_done(path, fs::remove_dir_all(path))
}

/// Returns true if something was removed; false if there was nothing to remove.
fn is_done(path: &Path, removed: io::Result<()>) -> anyhow::Result<bool> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        done => done.map(|()| true).with_context(|| format!("cannot remove {}", path.display())),
    }
}

fn one_line(changes: &[String]) -> Option<String> {
    (!changes.is_empty()).then(|| changes.join("; "))
}

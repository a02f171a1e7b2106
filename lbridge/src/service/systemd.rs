//! systemd: the unit. It is written for the program that runs, and never over a unit that somebody else
//! wrote.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

const NAME: &str = "lbridge.service";
const FILE: &str = "/etc/systemd/system/lbridge.service";
/// The administrator's folder of drop-ins.
pub(super) const DROP_INS: &str = "/etc/systemd/system/lbridge.service.d";
/// The paths of a package's unit; on most hosts both are the same file.
const OF_PACKAGES: [&str; 2] =
    ["/usr/lib/systemd/system/lbridge.service", "/lib/systemd/system/lbridge.service"];
/// First line of the units that lbridge writes; tells them from an administrator's.
const MARK: &str = "# Written by `lbridge service install`, and removed by `lbridge service uninstall`.\n";
const TEXT: &str = include_str!("../../../packaging/lbridge.service");
/// The path of the program in the packaged unit's text.
const PACKAGED_PROGRAM: &str = "/usr/bin/lbridge ";

/// The unit that should be installed.
pub(super) struct Unit {
    text: String,
    /// The text of the installed unit; `None` if there is none.
    before: Option<String>,
    program: PathBuf,
}

impl Unit {
    /// Creates the unit for this program. Returns an error if the installed unit is not ours, or if the unit
    /// would run as root what other users can change.
    pub(super) fn for_this_program() -> anyhow::Result<Self> {
        if !is_booted() {
            bail!("systemd does not run here; have your service manager start `lbridge run`");
        }
        if let Some(path) = of_package() {
            bail!("{path} is a package's unit; `systemctl enable --now lbridge` starts it");
        }
        let program = std::env::current_exe().context("cannot find this program's file")?;
        check(&program)?;
        let text = format!("{MARK}{}", TEXT.replace(PACKAGED_PROGRAM, &format!("{} ", program.display())));
        Ok(Self { text, before: own()?, program })
    }

    /// Writes the unit if it is missing or different; returns the change.
    pub(super) fn write(&self) -> anyhow::Result<Option<String>> {
        if self.is_there() {
            return Ok(None);
        }
        super::write(Path::new(FILE), &self.text)?;
        Ok(Some(format!("wrote {FILE}")))
    }

    /// Returns true if systemd runs lbridge with a unit of ours.
    pub(super) fn runs_already(&self) -> anyhow::Result<bool> {
        Ok(self.before.is_some() && property("ActiveState")? == "active")
    }

    /// Starts the unit, or makes this program and this unit replace what runs.
    pub(super) fn start(&self) -> anyhow::Result<Option<String>> {
        let runs = self.runs_already()?;
        if runs && self.is_there() && self.is_program_of(&property("MainPID")?) {
            return Ok(None);
        }
        let (command, done) = if runs { ("restart", "restarted") } else { ("start", "started") };
        systemctl(&[command, NAME]).with_context(|| format!("`journalctl -u {NAME}` may say why"))?;
        Ok(Some(format!("{done} {NAME}")))
    }

    fn is_there(&self) -> bool {
        self.before.as_ref() == Some(&self.text)
    }

    /// Returns true if the process runs this program's file. A file that was replaced has another inode.
    fn is_program_of(&self, pid: &str) -> bool {
        let file = |path: &Path| fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        file(&self.program).is_some()
            && file(&self.program) == file(&PathBuf::from(format!("/proc/{pid}/exe")))
    }
}

/// Returns an error unless only root can change the program that root will run, including the folders on its
/// path.
fn check(program: &Path) -> anyhow::Result<()> {
    let shown = program.display();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '+');
    if !program.to_str().is_some_and(|path| path.chars().all(plain)) {
        bail!("{shown} would have to be quoted in a unit; copy lbridge to /usr/local/bin, and run that copy");
    }
    for path in program.ancestors() {
        let metadata =
            fs::symlink_metadata(path).with_context(|| format!("cannot inspect {}", path.display()))?;
        if metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
            bail!(
                "users other than root can change {}, which systemd would run as root; `sudo install \
                 {shown} /usr/local/bin/lbridge`, and run that one",
                path.display()
            );
        }
    }
    Ok(())
}

/// Returns the text of our unit; an error if somebody else wrote the unit that is there.
fn own() -> anyhow::Result<Option<String>> {
    match fs::read_to_string(FILE) {
        Ok(text) if text.starts_with(MARK) => Ok(Some(text)),
        Ok(_) => bail!("{FILE} was not written by `lbridge service install`; remove it, then try again"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {FILE}")),
    }
}

fn of_package() -> Option<&'static str> {
    OF_PACKAGES.into_iter().find(|path| Path::new(path).exists())
}

/// Returns an error if the unit is not ours.
pub(super) fn may_be_removed() -> anyhow::Result<()> {
    if own()?.is_none()
        && let Some(path) = of_package()
    {
        bail!("{path} is a package's unit; remove the package");
    }
    Ok(())
}

/// Makes the unit known to systemd, and starts it at every boot.
pub(super) fn enable() -> anyhow::Result<Option<String>> {
    systemctl(&["daemon-reload"])?;
    let was = systemctl(&["is-enabled", NAME]).is_ok();
    systemctl(&["enable", NAME])?;
    Ok((!was).then(|| format!("enabled {NAME}")))
}

pub(super) fn disable() -> anyhow::Result<()> {
    if own()?.is_none() || !is_booted() {
        return Ok(());
    }
    systemctl(&["disable", "--now", NAME])
}

pub(super) fn remove() -> anyhow::Result<Option<String>> {
    let removed = super::is_done(Path::new(FILE), fs::remove_file(FILE))?;
    if removed && is_booted() {
        systemctl(&["daemon-reload"])?;
    }
    Ok(removed.then(|| format!("removed {FILE}")))
}

/// Returns true if systemd runs as the init system, as in sd_booted(3).
fn is_booted() -> bool {
    sd_notify::booted().unwrap_or(false)
}

fn property(name: &str) -> anyhow::Result<String> {
    output(&["show", "--value", "--property", name, NAME])
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<()> {
    output(arguments).map(drop)
}

fn output(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("systemctl").args(arguments).output().context("cannot run systemctl")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !output.status.success() {
        let said = text(&output.stderr);
        bail!(
            "`systemctl {}` failed: {}",
            arguments.join(" "),
            said.lines().next().unwrap_or("it gave no reason")
        );
    }
    Ok(text(&output.stdout))
}

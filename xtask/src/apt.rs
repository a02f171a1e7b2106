//! apt: Debian's packages: which are installed, how to install more without removing any, and where the
//! mirror is.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::suite::find_program;

use crate::workspace::{output, run};

/// The keys of every Debian release that is still signed.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Lists those of `packages` that are not installed.
pub(crate) fn missing(packages: &[&'static str]) -> Vec<&'static str> {
    let is_installed = |package: &&&str| {
        output(Command::new("dpkg-query").args(["--show", "--showformat", "${db:Status-Status}", package]))
            .is_ok_and(|status| status == "installed")
    };
    packages.iter().filter(|package| !is_installed(package)).copied().collect()
}

/// Installs packages, without their recommendations and without removing any other.
pub(crate) fn install(packages: &[&'static str]) -> Result<()> {
    let command_line = format!("apt-get install -y --no-install-recommends {}", packages.join(" "));
    ensure!(find_program("apt-get").is_some(), "no apt-get here; on Debian it would be: {command_line}");
    ensure!(nix::unistd::geteuid().is_root(), "only root can install packages: {command_line}");
    if let Err(error) = run(apt_get().args(["--quiet", "update"])) {
        // One of several sources may fail without being needed.
        eprintln!("{error:#}; going on with what apt knows");
    }
    let obstacles = removed_by(packages, &[])?;
    if obstacles.is_empty() {
        return install_now(packages, &[]);
    }
    // A machine may have one of QEMU's packages from backports; the release's own QEMU would replace it.
    let release = release()?;
    let folder = tempfolder("backports")?;
    let source = State::new(&folder, &[format!("{release}-backports main")], Status::Real)?;
    let mut options = source.options.clone();
    options.push(format!("-t={release}-backports"));
    let obstacles_there = source.update().and_then(|()| removed_by(packages, &options));
    let done = match obstacles_there {
        Ok(obstacles) if obstacles.is_empty() => install_now(packages, &options),
        _ => Err(anyhow::anyhow!("apt would remove {}; do it by hand: {command_line}", join(&obstacles))),
    };
    drop(fs::remove_dir_all(&folder));
    done
}

fn install_now(packages: &[&str], options: &[String]) -> Result<()> {
    let path = shadowed_path()?;
    run(apt_get()
        .arg(path)
        .args(options)
        .args(["--quiet", "--yes", "--no-install-recommends", "install"])
        .args(packages))
}

/// Returns apt's option for the PATH of the packages' own scripts. When `postgresql` is installed, Debian
/// creates and starts a database with the program that this PATH shadows. The tests create their own, and the
/// machine must not get one that nobody asked for. An existing one is left alone.
fn shadowed_path() -> Result<String> {
    let folder = tempfolder("shadows")?;
    let program = folder.join("pg_createcluster");
    fs::write(&program, "#!/bin/sh\necho 'no cluster: the tests make their own'\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(format!("-o=DPkg::Path={}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()))
}

/// Lists what apt would remove to install `packages`, apart from a `busybox` that `busybox-static` replaces.
fn removed_by(packages: &[&str], options: &[String]) -> Result<BTreeSet<String>> {
    let plan = output(
        apt_get().args(options).args(["--simulate", "--no-install-recommends", "install"]).args(packages),
    )?;
    let mut removed = removals(&plan);
    if packages.contains(&"busybox-static") {
        removed.remove("busybox");
    }
    Ok(removed)
}

/// Parses the plan that `apt-get --simulate` prints.
fn removals(plan: &str) -> BTreeSet<String> {
    plan.lines()
        .filter_map(|line| line.strip_prefix("Remv ")?.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

fn join(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn apt_get() -> Command {
    let mut apt_get = Command::new("apt-get");
    apt_get
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-o=Dpkg::Use-Pty=0", "-o=DPkg::Lock::Timeout=120"]);
    apt_get
}

/// Returns the code name of the running release.
fn release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release has no VERSION_CODENAME")
}

fn tempfolder(name: &str) -> Result<PathBuf> {
    let folder = crate::workspace::target().join("apt").join(name);
    drop(fs::remove_dir_all(&folder));
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

/// The addresses of Debian's package archives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mirror {
    pub(crate) main: String,
    /// The archive of security updates, if it is known; it has the updates of old releases, too.
    pub(crate) security: Option<String>,
}

impl Mirror {
    /// Returns the mirror that apt already uses, or `LBRIDGE_DEBIAN_MIRROR`.
    pub(crate) fn find() -> Result<Mirror> {
        if let Ok(main) = env::var("LBRIDGE_DEBIAN_MIRROR") {
            return Ok(Mirror { main, security: None });
        }
        let targets = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)",
        ]))?;
        Mirror::parse(&targets).context(
            "apt knows no mirror of Debian (or has never updated its lists): set LBRIDGE_DEBIAN_MIRROR to \
             the address of one",
        )
    }

    fn parse(targets: &str) -> Option<Mirror> {
        let find = |label: &str| {
            targets.lines().find_map(|line| {
                let address = line.strip_prefix("Debian\t")?.strip_prefix(label)?.strip_prefix('\t')?;
                Some(address.trim_end_matches('/').to_owned())
            })
        };
        Some(Mirror { main: find("Debian")?, security: find("Debian-Security") })
    }
}

/// The installation status that apt works with: the machine's own, or an empty one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Real,
    Empty,
}

/// An apt state in a folder of ours, with sources of ours: the machine's own stays unchanged, and root is not
/// needed.
#[derive(Debug)]
pub(crate) struct State {
    options: Vec<String>,
}

impl State {
    /// Creates a state from suites of the main mirror with their components (`bookworm main`).
    fn new(folder: &Path, suites: &[String], status: Status) -> Result<State> {
        let mirror = Mirror::find()?;
        let sources: Vec<_> = suites.iter().map(|suite| format!("{} {suite}", mirror.main)).collect();
        State::with_sources(folder, &sources, status)
    }

    /// Creates a state from addresses with a suite and its components.
    pub(crate) fn with_sources(folder: &Path, sources: &[String], status: Status) -> Result<State> {
        ensure!(Path::new(KEYRING).exists(), "no {KEYRING} (Debian package debian-archive-keyring)");
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part)).with_context(|| format!("make {}", folder.display()))?;
        }
        let list = folder.join("sources.list");
        let lines: Vec<_> =
            sources.iter().map(|source| format!("deb [arch=amd64 signed-by={KEYRING}] {source}\n")).collect();
        fs::write(&list, lines.concat())?;
        let mut options = vec![
            format!("-o=Dir::State::lists={}", folder.join("lists").display()),
            format!("-o=Dir::Cache={}", folder.join("cache").display()),
            "-o=APT::Sandbox::User=root".to_owned(),
            "-o=Acquire::Languages=none".to_owned(),
            // The signatures of a release whose support has ended are no longer renewed.
            "-o=Acquire::Check-Valid-Until=false".to_owned(),
        ];
        match status {
            Status::Real => {
                // The machine's own sources are used, too: dependencies may be satisfied from either.
                let parts = folder.join("sources.list.d");
                fs::create_dir_all(&parts)?;
                fs::copy(&list, parts.join("lbridge.list"))?;
                for entry in fs::read_dir("/etc/apt/sources.list.d")?.flatten() {
                    fs::copy(entry.path(), parts.join(entry.file_name()))?;
                }
                options.push(format!("-o=Dir::Etc::sourceparts={}", parts.display()));
            }
            Status::Empty => {
                options.push(format!("-o=Dir::Etc::sourcelist={}", list.display()));
                options.push("-o=Dir::Etc::sourceparts=-".to_owned());
                options.push("-o=Dir::State::status=/dev/null".to_owned());
            }
        }
        Ok(State { options })
    }

    /// Fetches the package lists.
    pub(crate) fn update(&self) -> Result<()> {
        let mut command = apt_get();
        let output =
            command.args(&self.options).args(["-o=APT::Update::Error-Mode=any", "-qq", "update"]).output();
        let output = output.context("run apt-get")?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!("apt-get update: {}", complaint.lines().next().unwrap_or("failed"));
        }
        Ok(())
    }

    /// Lists the packages that `package` depends on and whose names start with one of `prefixes`.
    pub(crate) fn depends(&self, package: &str, prefixes: &[&str]) -> Result<Vec<String>> {
        let text = output(Command::new("apt-cache").args(&self.options).args(["depends", package]))?;
        Ok(text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
            .map(str::to_owned)
            .collect())
    }

    /// Downloads packages into a folder and unpacks them there.
    pub(crate) fn unpack(&self, packages: &[String], folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        run(apt_get().current_dir(folder).args(&self.options).args(["-qq", "download"]).args(packages))?;
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                run(Command::new("dpkg").arg("--extract").arg(&path).arg(folder))?;
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_debians_not_another_origins() {
        let targets = "Docker\tDocker CE\thttp://docker.example/linux/\n\
                       Debian\tDebian-Security\thttp://mirror.example/debian-security/\n\
                       Debian\tDebian\thttp://mirror.example/debian/\n\
                       Debian\tDebian\thttp://other.example/debian/\n";
        let mirror = Mirror {
            main: "http://mirror.example/debian".into(),
            security: Some("http://mirror.example/debian-security".into()),
        };
        assert_eq!(Mirror::parse(targets), Some(mirror));
        assert_eq!(Mirror::parse("Ubuntu\tUbuntu\thttp://mirror.example/ubuntu/\n"), None);
        assert_eq!(Mirror::parse("Debian\tDebian Backports\thttp://mirror.example/debian/\n"), None);
    }

    #[test]
    fn removals_are_read_from_apts_plan() {
        let plan = "The following packages will be REMOVED:\n  qemu-utils\nRemv qemu-utils [1:10.0]\n\
                    Inst qemu-system-x86 (1:7.2 Debian:12 [amd64])\nRemv busybox [1:1.35] [libc6:amd64 ]\n";
        assert_eq!(removals(plan), BTreeSet::from(["busybox".to_owned(), "qemu-utils".to_owned()]));
        assert_eq!(removals("Inst socat (1.7.4.4-2 Debian:12 [amd64])\n"), BTreeSet::new());
    }
}

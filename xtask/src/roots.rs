//! roots: root file systems of other Debian releases, for the suite that installs packages in them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Mirror;
use crate::workspace::{output, target};

/// Debian releases newer than the one that the tests run on.
const RELEASES: [&str; 1] = ["trixie"];

/// Packages of a host on which somebody would install lbridge, in addition to what every Debian has.
const PACKAGES: &str = "dbus,firewalld,iproute2,iptables,nftables,systemd,systemd-sysv";

/// Returns the folder that holds the root file systems.
pub(crate) fn roots_folder() -> PathBuf {
    target().join("roots")
}

/// Builds in `target/roots/RELEASE` those that are missing or were built from other packages.
pub(crate) fn make() -> Result<()> {
    RELEASES.into_iter().try_for_each(|release| {
        make_one(release).with_context(|| format!("make a root file system of Debian {release}"))
    })
}

fn make_one(release: &str) -> Result<()> {
    let folder = roots_folder().join(release);
    let record = folder.with_extension("packages");
    if folder.is_dir() && fs::read_to_string(&record).is_ok_and(|packages| packages == PACKAGES) {
        return Ok(());
    }
    drop(fs::remove_dir_all(&folder));
    fs::create_dir_all(roots_folder()).with_context(|| format!("make {}", roots_folder().display()))?;
    let mirror = Mirror::find()?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--variant=minbase", "--quiet", &format!("--include={PACKAGES}"), release]);
    output(mmdebstrap.arg(&folder).arg(&mirror.main))?;
    // The last step: a folder with this record counts as complete.
    fs::write(&record, PACKAGES)?;
    println!("{}", folder.display());
    Ok(())
}

//! packages: what `cargo xtask` makes for tests that install lbridge: packages, and root file systems of
//! other Debian releases.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Returns the path of a package by its file name: `1.deb` is the first version, `2.deb` the upgrade. Looks
/// under `LBRIDGE_PACKAGES_DIR`, or `package/test` in the target folder.
pub fn package(name: &str) -> Result<PathBuf> {
    find("LBRIDGE_PACKAGES_DIR", "package/test", name)
        .with_context(|| format!("no package {name}: cargo xtask test --setup packages"))
}

/// Returns the root file system of a Debian release. Looks under `LBRIDGE_ROOTS_DIR`, or `roots` in the
/// target folder.
pub fn root(release: &str) -> Result<PathBuf> {
    find("LBRIDGE_ROOTS_DIR", "roots", release)
        .with_context(|| format!("no root file system of {release}: cargo xtask test --setup"))
}

fn find(variable: &str, in_target: &str, name: &str) -> Option<PathBuf> {
    let folder = match env::var_os(variable) {
        Some(folder) => PathBuf::from(folder),
        // target/debug/deps/suite-0123
        None => env::current_exe().ok()?.ancestors().nth(3)?.join(in_target),
    };
    Some(folder.join(name)).filter(|path| path.exists())
}

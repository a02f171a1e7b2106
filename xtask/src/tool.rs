//! tool: programs from the registry that the project uses, in the versions named here. They are built into
//! `target/tools`, once.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::workspace::{cargo, run, target};

/// The packager for Debian and Ubuntu.
pub(crate) const CARGO_DEB: Tool = Tool { name: "cargo-deb", version: "3.8.0", options: &[] };
/// The packager for Fedora, RHEL and openSUSE.
pub(crate) const CARGO_RPM: Tool = Tool { name: "cargo-generate-rpm", version: "0.21.1", options: &[] };
/// The program that lists the components of the binary.
pub(crate) const CARGO_CYCLONEDX: Tool = Tool { name: "cargo-cyclonedx", version: "0.5.9", options: &[] };
/// The program that checks the dependencies against deny.toml.
pub(crate) const CARGO_DENY: Tool = Tool {
    name: "cargo-deny",
    version: "0.20.2",
    // The default features fetch databases, which the checks here do not need.
    options: &["--no-default-features"],
};

/// The program that builds the guide.
pub(crate) const MDBOOK: Tool = Tool {
    name: "mdbook",
    version: "0.5.4",
    // The default features search, serve and watch.
    options: &["--no-default-features"],
};

/// A program from a package of the registry, which has the same name.
pub(crate) struct Tool {
    name: &'static str,
    version: &'static str,
    options: &'static [&'static str],
}

impl Tool {
    fn root() -> PathBuf {
        target().join("tools")
    }

    /// Returns true if the program is installed in this version.
    pub(crate) fn is_there(&self) -> bool {
        let Tool { name, version, .. } = self;
        // Cargo's own record of what it has installed there.
        let record = fs::read_to_string(Tool::root().join(".crates.toml")).unwrap_or_default();
        record.contains(&format!("\"{name} {version} ("))
    }

    /// Returns the program; builds it if it is missing or has another version.
    pub(crate) fn find(&self) -> Result<PathBuf> {
        if !self.is_there() {
            eprintln!("building {} {}, once (a minute or two)", self.name, self.version);
            run(&mut self.install())?;
        }
        Ok(self.program())
    }

    /// Returns the path of the program, which [`Self::install`] builds.
    pub(crate) fn program(&self) -> PathBuf {
        Tool::root().join("bin").join(self.name)
    }

    /// Returns the command that builds the program.
    pub(crate) fn install(&self) -> Command {
        let Tool { name, version, options } = self;
        let mut install = cargo();
        install.args(["install", name, "--version", version, "--locked", "--force", "--quiet"]);
        // The programs run only a few times, so a fast build matters more than a fast program. Their common
        // dependencies are built once.
        install.env("CARGO_TARGET_DIR", Tool::root().join("build"));
        install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0").env("CARGO_PROFILE_RELEASE_LTO", "off");
        install.args(*options).arg("--root").arg(Tool::root());
        install
    }
}

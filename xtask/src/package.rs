//! package: `cargo xtask package` builds what people install: a Debian package, an RPM package, and an
//! archive with a static binary. All use one stage: the binary, and what is generated from the definition of
//! its command line. Their metadata is in `lbridge/Cargo.toml`, the unit and the scripts are in `packaging/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::tool::{CARGO_CYCLONEDX, CARGO_DEB, CARGO_RPM};
use crate::workspace::{build_release, cargo, hex, output, root, run, target};

/// Target of a binary that needs nothing of the machine but its kernel.
const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// Options of `cargo xtask package`.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "a switch for each kind of result")]
pub(crate) struct Arguments {
    /// Make the package for Debian and Ubuntu
    #[arg(long)]
    deb: bool,
    /// Make the package for Fedora, RHEL and openSUSE
    #[arg(long)]
    rpm: bool,
    /// Make the archive with the static binary
    #[arg(long)]
    musl: bool,
    /// Make the list of components (SBOM), in CycloneDX's format
    #[arg(long)]
    sbom: bool,
}

/// Builds what the arguments name, or everything, in `target/package`.
pub(crate) fn handle(arguments: &Arguments) -> Result<()> {
    let all = !(arguments.deb || arguments.rpm || arguments.musl || arguments.sbom);
    let results = folder();
    let stage = results.join("stage");
    fs::create_dir_all(&results).with_context(|| format!("make {}", results.display()))?;
    let mut made = Vec::new();
    // The archive contains it, too.
    let sbom = if all || arguments.sbom || arguments.musl { Some(sbom(&results)?) } else { None };
    made.extend(sbom.clone());
    if all || arguments.deb || arguments.rpm {
        fill(&stage, &build_release()?)?;
    }
    if all || arguments.deb {
        let package = results.join(format!("lbridge_{VERSION}-1_amd64.deb"));
        deb(&stage, &package, &[])?;
        made.push(package);
    }
    if all || arguments.rpm {
        let package = results.join(format!("lbridge-{VERSION}-1.x86_64.rpm"));
        rpm(&stage, &package, &[])?;
        made.push(package);
    }
    if let Some(sbom) = sbom.filter(|_| all || arguments.musl) {
        made.push(archive(&results, &sbom)?);
    }
    for file in &made {
        println!("{:>9} {}", fs::metadata(file)?.len(), file.display());
    }
    checksums(&results)
}

/// The maintainer, as in the packages' metadata.
const MAINTAINER: &str = env!("CARGO_PKG_AUTHORS");

/// The version that the workspace's packages share.
const VERSION: &str = env!("CARGO_PKG_VERSION");

fn folder() -> PathBuf {
    target().join("package")
}

/// Returns the folder where the suite `packages` finds what [`for_tests`] built.
pub(crate) fn test_folder() -> PathBuf {
    folder().join("test")
}

/// Builds the tools that [`for_tests`] needs, if they are missing.
pub(crate) fn install_test_tools() -> Result<()> {
    CARGO_DEB.find()?;
    CARGO_RPM.find().map(drop)
}

/// Builds packages of the debug binary, each in two versions, for an upgrade. Builds none without the tools.
pub(crate) fn for_tests() -> Result<()> {
    let results = test_folder();
    drop(fs::remove_dir_all(&results));
    if !(CARGO_DEB.is_there() && CARGO_RPM.is_there()) {
        eprintln!("no packages for the tests: cargo xtask test --setup");
        return Ok(());
    }
    let stage = results.join("stage");
    fill(&stage, &target().join("debug/lbridge"))?;
    for release in ["1", "2"] {
        let version = format!("{VERSION}-{release}");
        // Compressed quickly rather than well.
        let options = ["--fast", "--deb-version", &version];
        deb(&stage, &results.join(format!("{release}.deb")), &options)?;
        let release_is = format!("release = \"{release}\"");
        let options = ["--payload-compress=gzip", "--set-metadata", &release_is];
        rpm(&stage, &results.join(format!("{release}.rpm")), &options)?;
    }
    Ok(())
}

/// Fills a folder that packagers take for Cargo's target folder: they look in `release/` there for the binary
/// and for generated files.
fn fill(stage: &Path, binary: &Path) -> Result<()> {
    let folder = stage.join("release");
    drop(fs::remove_dir_all(&folder));
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let staged = folder.join("lbridge");
    fs::copy(binary, &staged).with_context(|| format!("copy {}", binary.display()))?;
    run(Command::new("strip").arg("--strip-debug").arg(&staged))?;
    // Debian requires a changelog in a format of its own.
    let changelog = folder.join("changelog.Debian");
    let written =
        output(Command::new("date").args(["--utc", "--rfc-email", "--date", &format!("@{}", date()?)]))?;
    let text = format!(
        "lbridge ({VERSION}-1) unstable; urgency=medium\n\n  * See changelog.gz.\n\
         \n -- {MAINTAINER}  {written}"
    );
    fs::write(&changelog, text).with_context(|| format!("write {}", changelog.display()))?;
    let manual_folder = folder.join("manual");
    manual(&manual_folder)?;
    // Both kinds of distribution require compressed man pages; without a time stamp.
    let mut gzip = Command::new("gzip");
    gzip.args(["--best", "--no-name"]).arg(&changelog);
    for entry in fs::read_dir(&manual_folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|section| section == "1" || section == "5") {
            gzip.arg(path);
        }
    }
    run(&mut gzip)
}

/// Generates man pages and completion scripts. The program that writes them does not depend on the profile.
fn manual(folder: &Path) -> Result<()> {
    let mut manual = dated(cargo())?;
    run(manual.args(["run", "--quiet", "--package", "lbridge", "--example", "manual", "--"]).arg(folder))
}

fn deb(stage: &Path, package: &Path, options: &[&str]) -> Result<()> {
    let mut cargo_deb = dated(Command::new(CARGO_DEB.find()?))?;
    cargo_deb.current_dir(root()).env("CARGO_TARGET_DIR", stage);
    cargo_deb.args(["deb", "--package=lbridge", "--locked", "--no-build", "--no-strip", "--quiet"]);
    run(cargo_deb.args(options).arg("--output").arg(package))
}

fn rpm(stage: &Path, package: &Path, options: &[&str]) -> Result<()> {
    let mut cargo_rpm = dated(Command::new(CARGO_RPM.find()?))?;
    // With `builtin` instead of the machine's own rpm, the result is the same with and without it.
    cargo_rpm.current_dir(root().join("lbridge")).args(["generate-rpm", "--auto-req=builtin"]);
    run(cargo_rpm.arg("--target-dir").arg(stage).args(options).arg("--output").arg(package))
}

/// Builds the archive for every other distribution.
fn archive(results: &Path, sbom: &Path) -> Result<PathBuf> {
    let name = format!("lbridge-{VERSION}-x86_64-linux");
    let folder = results.join("archive").join(&name);
    drop(fs::remove_dir_all(&folder));
    manual(&folder.join("manual"))?;
    let binary = folder.join("lbridge");
    fs::copy(build_static()?, &binary).context("copy the static binary")?;
    let headers = output(Command::new("readelf").arg("--program-headers").arg(&binary))?;
    ensure!(!headers.contains("INTERP"), "the binary for {STATIC_TARGET} wants a dynamic linker");

    let guide = "docs/guide/src";
    fs::create_dir_all(folder.join(guide)).with_context(|| format!("make {guide}"))?;
    let chapters = fs::read_dir(root().join(guide))?.map(|chapter| Ok(chapter?.file_name()));
    let chapters = chapters.collect::<Result<Vec<_>>>()?.into_iter().map(|name| Path::new(guide).join(name));
    let texts =
        ["README.md", "SECURITY.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"].map(PathBuf::from);
    for file in texts.into_iter().chain(chapters) {
        fs::copy(root().join(&file), folder.join(&file))
            .with_context(|| format!("copy {}", file.display()))?;
    }
    for file in ["lbridge.toml", "lbridge.sysusers"] {
        fs::copy(root().join("packaging").join(file), folder.join(file))
            .with_context(|| format!("copy {file}"))?;
    }
    fs::copy(sbom, folder.join("lbridge.cdx.json"))?;
    // /usr/local is for programs that no package manager installed.
    let unit = fs::read_to_string(root().join("packaging/lbridge.service"))?;
    fs::write(folder.join("lbridge.service"), unit.replace("/usr/bin/lbridge", "/usr/local/bin/lbridge"))?;

    let archive = results.join(format!("{name}.tar.xz"));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--xz", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.args(["--mode=u=rwX,go=rX", &format!("--mtime=@{}", date()?)]);
    tar.arg("--file").arg(&archive).arg("--directory").arg(results.join("archive"));
    run(tar.arg(&name))?;
    Ok(archive)
}

fn build_static() -> Result<PathBuf> {
    let libraries = output(Command::new("rustc").args(["--print=target-libdir", "--target", STATIC_TARGET]))?;
    if !Path::new(libraries.trim_end()).exists() {
        run(Command::new("rustup").args(["target", "add", STATIC_TARGET]).current_dir(root()))
            .with_context(|| format!("Rust's libraries for {STATIC_TARGET} are needed"))?;
    }
    run(cargo()
        .args(["build", "--release", "--locked", "--package", "lbridge", "--bin", "lbridge"])
        .args(["--target", STATIC_TARGET]))?;
    Ok(target().join(STATIC_TARGET).join("release/lbridge"))
}

/// Writes a list of every crate in the binary, with its version and licence.
fn sbom(results: &Path) -> Result<PathBuf> {
    let mut cyclonedx = dated(Command::new(CARGO_CYCLONEDX.find()?))?;
    let name = "lbridge-sbom";
    cyclonedx.current_dir(root()).args(["cyclonedx", "--format=json", "--spec-version=1.5", "--quiet"]);
    cyclonedx.args(["--manifest-path=lbridge/Cargo.toml", "--override-filename", name]);
    let done = run(&mut cyclonedx);
    let file = results.join(format!("lbridge-{VERSION}.cdx.json"));
    // The tool writes one next to each manifest of the workspace.
    for entry in fs::read_dir(root())? {
        let folder = entry?.path();
        let written = folder.join(name).with_extension("json");
        if folder.ends_with("lbridge") && done.is_ok() {
            let text = fs::read_to_string(&written).with_context(|| format!("read {}", written.display()))?;
            // The path of the checkout does not belong in it.
            let text = text.replace(&format!("file://{}/", root().display()), "file:///");
            fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        }
        if written.exists() {
            fs::remove_file(&written)?;
        }
    }
    done.map(|()| file)
}

/// Writes checksums in the format of `sha256sum`, so that `sha256sum --check SHA256SUMS` reads them.
fn checksums(results: &Path) -> Result<()> {
    const LIST: &str = "SHA256SUMS";
    let mut names = Vec::new();
    for entry in fs::read_dir(results)? {
        let entry = entry?;
        if entry.file_type()?.is_file() && entry.file_name() != LIST {
            names.push(entry.file_name());
        }
    }
    names.sort();
    let mut lines = Vec::new();
    for name in names {
        let digest = hex(Sha256::digest(fs::read(results.join(&name))?));
        lines.push(format!("{digest}  {}\n", name.display()));
    }
    fs::write(results.join(LIST), lines.concat())?;
    println!("{}", results.join(LIST).display());
    Ok(())
}

/// Makes a packager use the last commit's time for every file.
fn dated(mut command: Command) -> Result<Command> {
    command.env("SOURCE_DATE_EPOCH", date()?);
    Ok(command)
}

/// Returns the last commit's time, unless the environment sets another.
fn date() -> Result<String> {
    if let Ok(date) = std::env::var("SOURCE_DATE_EPOCH") {
        return Ok(date);
    }
    let date = output(Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(root()));
    Ok(date.context("not a checkout of git: set SOURCE_DATE_EPOCH")?.trim_end().to_owned())
}

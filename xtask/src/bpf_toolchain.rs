//! bpf_toolchain: the compiler of the kernel programs: Debian's `rustc-web` with the matching library
//! sources, LLVM's tools, and a `bpf-linker` built here that uses the same LLVM. Rust's stable releases do
//! not include what is needed to build `core` for BPF, and a nightly's output differs from day to day.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fmt, fs};

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::suite::find_program;
use serde::{Deserialize, Serialize};

use crate::workspace::{cargo, output, run, target};

/// Packages that `apt-get` has to install.
pub(crate) const PACKAGES: [&str; 3] = ["rustc-web", "rust-web-src", "llvm-22"];

/// The compilation target of the kernel programs.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

const RUSTC: &str = "/usr/bin/rustc";
const OBJCOPY: &str = "llvm-objcopy-22";
/// The major version of LLVM that compiler, tools and linker share; `bpf-linker` has a feature for each.
const LLVM: u32 = 22;
const BPF_LINKER: &str = "0.13.0";

/// A complete toolchain whose parts fit together.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) bpf_linker: PathBuf,
    /// The folder from which the compiler reads `core`.
    pub(crate) library_sources: PathBuf,
    pub(crate) versions: Versions,
}

/// Everything besides the sources that determines the object's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Versions {
    rustc: String,
    rust_src: String,
    llvm: String,
    bpf_linker: String,
}

impl Toolchain {
    /// Finds the toolchain; builds `bpf-linker` if it is missing.
    pub(crate) fn find() -> Result<Toolchain> {
        let missing = missing();
        ensure!(
            missing.is_empty(),
            "no eBPF toolchain ({}): apt-get install -y --no-install-recommends {}",
            missing.join(", "),
            PACKAGES.join(" "),
        );
        let version = output(Command::new(RUSTC).arg("-vV"))?;
        let rustc = Rustc::parse(&version).with_context(|| format!("{RUSTC} -vV printed\n{version}"))?;
        ensure!(
            rustc.llvm.split('.').next() == Some(&LLVM.to_string()),
            "{RUSTC} {} has LLVM {}, but the linker is built with LLVM {LLVM}: xtask/src/bpf_toolchain.rs \
             has to follow Debian's rustc-web",
            rustc.release,
            rustc.llvm,
        );
        let objcopy = output(Command::new(OBJCOPY).arg("--version"))?;
        let llvm =
            word_after(&objcopy, "LLVM version").with_context(|| format!("{OBJCOPY} printed\n{objcopy}"))?;
        let bpf_linker = bpf_linker()?;

        let versions = Versions {
            rustc: format!("{}, LLVM {}", rustc.release, rustc.llvm),
            rust_src: package_version("rust-web-src"),
            llvm: llvm.to_owned(),
            bpf_linker: BPF_LINKER.to_owned(),
        };
        Ok(Toolchain { bpf_linker, library_sources: sources()?, versions })
    }
}

/// Returns Cargo set up for this toolchain: with Debian's compiler, which may use unstable features, and
/// without the user's environment variables for builds.
pub(crate) fn bpf_cargo() -> Result<Command> {
    let mut cargo = clean_cargo();
    cargo
        .env("RUSTC", RUSTC)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTC_WRAPPER", std::env::current_exe().context("find the current program")?)
        .env(WRAPPER, "yes")
        .env("CARGO_INCREMENTAL", "0")
        .env("SOURCE_DATE_EPOCH", "0");
    Ok(cargo)
}

/// Environment variable, set if Cargo runs this program as its compiler.
const WRAPPER: &str = "LBRIDGE_XTASK_IS_RUSTC";

/// Runs the compiler, and does not return, if Cargo runs this program in its place. Call it before anything
/// else in `main`.
///
/// Cargo tells crates apart by a hash. For a package outside the workspace that hash includes the absolute
/// path of the checkout. The hash gets into the names of functions, the names into the order in which LLVM
/// processes them, and the order into the registers and stack slots that it picks. Name and version are
/// enough to tell apart what is built here.
pub(crate) fn wrapper_hook() {
    if std::env::var_os(WRAPPER).is_none() {
        return;
    }
    let mut arguments = std::env::args_os().skip(1);
    let rustc = arguments.next().unwrap_or_default();
    let version = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let arguments = without_paths(arguments.collect(), &version);
    let error = Command::new(&rustc).args(arguments).env_remove(WRAPPER).exec();
    eprintln!("xtask: {}: {error}", rustc.display());
    std::process::exit(1);
}

/// Replaces the compiler's `-C metadata=` argument by one without paths.
fn without_paths(mut arguments: Vec<OsString>, version: &str) -> Vec<OsString> {
    let name_follows = |pair: &[OsString]| pair[0] == "--crate-name";
    let name =
        arguments.windows(2).find(|pair| name_follows(pair)).map(|pair| pair[1].clone()).unwrap_or_default();
    let for_the_kernel = arguments.iter().any(|argument| argument == TARGET);
    for argument in &mut arguments {
        if for_the_kernel && argument.to_string_lossy().starts_with("metadata=") {
            *argument = format!("metadata={}-{version}", name.display()).into();
        }
    }
    arguments
}

/// Removes the debug information of `raw`, which neither the kernel nor the loader uses, and writes the
/// result to `stripped`. BTF stays.
pub(crate) fn strip(raw: &Path, stripped: &Path) -> Result<()> {
    // GNU objcopy refuses BPF files.
    run(Command::new(OBJCOPY).arg("--strip-debug").arg(raw).arg(stripped))
}

/// Lists the packages that are missing.
pub(crate) fn missing() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !Path::new(RUSTC).exists() {
        missing.push(PACKAGES[0]);
    }
    if missing.is_empty() && !sources().is_ok_and(|sources| sources.join("library/core/src/lib.rs").exists())
    {
        missing.push(PACKAGES[1]);
    }
    if find_program(OBJCOPY).is_none() || llvm_library().is_err() {
        missing.push(PACKAGES[2]);
    }
    missing
}

impl Versions {
    /// Lists the differences between the recorded versions `self` and `here`, one line each.
    pub(crate) fn differences(&self, here: &Versions) -> Vec<String> {
        [
            ("rustc", &self.rustc, &here.rustc),
            ("rust-src", &self.rust_src, &here.rust_src),
            ("llvm", &self.llvm, &here.llvm),
            ("bpf-linker", &self.bpf_linker, &here.bpf_linker),
        ]
        .into_iter()
        .filter(|(_, recorded, here)| recorded != here)
        .map(|(name, recorded, here)| format!("{name}: recorded {recorded}, here {here}"))
        .collect()
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Versions { rustc, rust_src, llvm, bpf_linker } = self;
        write!(f, "rustc {rustc}; rust-src {rust_src}; llvm {llvm}; bpf-linker {bpf_linker}")
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Rustc<'a> {
    release: &'a str,
    llvm: &'a str,
}

impl Rustc<'_> {
    /// Parses the output of `rustc -vV`.
    fn parse(text: &str) -> Option<Rustc<'_>> {
        let first = text.lines().next()?.strip_prefix("rustc ")?;
        // "1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)": the packaging does not matter.
        let release = first.split_inclusive(')').next()?;
        Some(Rustc { release, llvm: word_after(text, "LLVM version:")? })
    }
}

fn word_after<'a>(text: &'a str, words: &str) -> Option<&'a str> {
    text.split_once(words)?.1.split_whitespace().next()
}

/// Returns the folder where the compiler looks for the library sources.
fn sources() -> Result<PathBuf> {
    let sysroot = output(Command::new(RUSTC).args(["--print", "sysroot"]))?;
    Ok(Path::new(sysroot.trim_end()).join("lib/rustlib/src/rust"))
}

/// Returns the version of a Debian package: Debian patches the library now and then without a new version of
/// Rust.
fn package_version(package: &str) -> String {
    output(Command::new("dpkg-query").args(["--show", "--showformat", "${Version}", package]))
        .unwrap_or_else(|_| "not a package".to_owned())
}

/// Returns LLVM's shared library; Debian has it in the folder of the machine's architecture.
fn llvm_library() -> Result<PathBuf> {
    let prefix = format!("libLLVM.so.{LLVM}.");
    let mut folders = vec![PathBuf::from(format!("/usr/lib/llvm-{LLVM}/lib"))];
    folders.extend(fs::read_dir("/usr/lib")?.flatten().map(|entry| entry.path()));
    folders
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(Iterator::flatten)
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .with_context(|| format!("no {prefix}* in /usr/lib"))
}

/// Returns the linker; builds it if it is missing or has another version.
fn bpf_linker() -> Result<PathBuf> {
    let folder = target().join("bpf-toolchain");
    let program = folder.join("bin/bpf-linker");
    if output(Command::new(&program).arg("--version"))
        .is_ok_and(|text| text.trim() == format!("bpf-linker {BPF_LINKER}"))
    {
        return Ok(program);
    }
    eprintln!("building bpf-linker {BPF_LINKER}, once (a minute or two)");
    // The linker's build needs `libLLVM.so`, a name that Debian has only in a development package of 200 MB.
    let prefix = folder.join("llvm");
    let link = prefix.join("lib/libLLVM.so");
    fs::create_dir_all(prefix.join("lib")).with_context(|| format!("make {}", prefix.display()))?;
    drop(fs::remove_file(&link));
    std::os::unix::fs::symlink(llvm_library()?, &link).with_context(|| format!("make {}", link.display()))?;
    let mut install = clean_cargo();
    install
        .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force", "--quiet"])
        .args(["--no-default-features", "--features", &format!("llvm-{LLVM}")])
        .arg("--root")
        .arg(&folder)
        .env("LLVM_PREFIX", &prefix);
    run(&mut install)?;
    ensure!(program.exists(), "cargo install did not leave a {}", program.display());
    Ok(program)
}

/// Returns Cargo without the environment variables that change what it builds and where.
fn clean_cargo() -> Command {
    let mut cargo = cargo();
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let about_builds = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_"]
            .iter()
            .any(|prefix| text.starts_with(prefix));
        let named = [
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_INCREMENTAL",
            "LD_LIBRARY_PATH", // Cargo's own compiler's libraries, not Debian's
            "RUSTC",
            "RUSTC_BOOTSTRAP",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTC_WRAPPER",
            "RUSTFLAGS",
        ];
        if about_builds || named.contains(&&*text) {
            cargo.env_remove(&name);
        }
    }
    cargo
}

/// Returns the version of a package in `lock`, the text of a `Cargo.lock`.
pub(crate) fn locked_version(lock: &str, package: &str) -> Result<String> {
    let lock: toml::Table = lock.parse().context("read Cargo.lock")?;
    let packages = lock.get("package").and_then(toml::Value::as_array).map_or(&[][..], Vec::as_slice);
    let is_named = |entry: &&toml::Value| entry.get("name").and_then(toml::Value::as_str) == Some(package);
    let Some(version) = packages.iter().find(is_named).and_then(|entry| entry.get("version")?.as_str())
    else {
        bail!("Cargo.lock has no {package}");
    };
    Ok(version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compilers_version_leaves_out_how_it_was_packaged() {
        let text = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
                    LLVM version: 22.1.8\n";
        assert_eq!(
            Rustc::parse(text),
            Some(Rustc { release: "1.96.0 (ac68faa20 2026-05-25)", llvm: "22.1.8" })
        );
        assert_eq!(Rustc::parse("cargo 1.96.0"), None);
    }

    #[test]
    fn crates_are_told_apart_by_name_and_version_only() {
        let arguments = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let ours =
            "--crate-name aya_ebpf lib.rs --target bpfel-unknown-none -C metadata=0123 -C extra-filename=-45";
        assert_eq!(
            without_paths(arguments(ours), "0.2.1"),
            arguments(&ours.replace("metadata=0123", "metadata=aya_ebpf-0.2.1"))
        );
        let hosts = "--crate-name syn lib.rs -C metadata=0123";
        assert_eq!(without_paths(arguments(hosts), "2.0.0"), arguments(hosts));
        assert_eq!(without_paths(arguments("-vV"), ""), arguments("-vV"));
    }

    #[test]
    fn a_lock_files_versions_are_found() {
        let lock = "version = 4\n[[package]]\nname = \"aya-ebpf\"\nversion = \"0.2.1\"\n";
        assert_eq!(locked_version(lock, "aya-ebpf").unwrap(), "0.2.1");
        assert!(locked_version(lock, "aya").is_err());
        assert!(locked_version("nonsense", "aya").is_err());
    }

    #[test]
    fn differing_versions_are_named() {
        let recorded = Versions {
            rustc: "1.96.0".into(),
            rust_src: "1.96.0-1".into(),
            llvm: "22.1.8".into(),
            bpf_linker: "0.13.0".into(),
        };
        assert_eq!(recorded.differences(&recorded), Vec::<String>::new());
        let here = Versions { rust_src: "1.96.0-2".into(), ..recorded.clone() };
        assert_eq!(recorded.differences(&here), ["rust-src: recorded 1.96.0-1, here 1.96.0-2"]);
    }
}

//! build_ebpf: `cargo xtask build-ebpf` builds the object with the kernel programs, byte for byte the same on
//! every machine that has the same toolchain. The object is committed, together with a record of its
//! toolchain, so that users need no toolchain.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::bpf_toolchain::{TARGET, Toolchain, Versions, bpf_cargo, locked_version, strip};
use crate::workspace::{hex, replace, root, run, target};

/// The folder of the object and of its record, relative to the checkout's root.
const FOLDER: &str = "lbridge/bpf";
const OBJECT: &str = "lbridge.bpf.o";
const RECORD: &str = "lbridge.bpf.toml";
/// The sources of the object.
const SOURCES: [&str; 5] = [
    "lbridge-common/Cargo.toml",
    "lbridge-common/src",
    "lbridge-ebpf/Cargo.lock",
    "lbridge-ebpf/Cargo.toml",
    "lbridge-ebpf/src",
];
const CRATE: &str = "lbridge-ebpf";

/// Options of `cargo xtask build-ebpf`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Build, but compare with the committed object instead of replacing it
    #[arg(long)]
    check: bool,
    /// Build the variant that logs, to target/bpf/lbridge-log.bpf.o, and leave the committed object alone
    #[arg(long, conflicts_with = "check")]
    log: bool,
}

/// The record next to the object.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Record {
    object_sha256: String,
    source_sha256: String,
    aya_ebpf: String,
    toolchain: Versions,
}

pub(crate) fn handle(arguments: &Arguments) -> Result<()> {
    if arguments.check {
        check()
    } else if arguments.log {
        let path = target().join("bpf/lbridge-log.bpf.o");
        build(&Toolchain::find()?, &["--features", "log"], &path)?;
        println!("{}", path.display());
        Ok(())
    } else {
        update()
    }
}

/// Builds the object, and replaces what is committed.
fn update() -> Result<()> {
    let toolchain = Toolchain::find()?;
    let object = build(&toolchain, &[], &target().join("bpf").join(OBJECT))?;
    let interface = Interface::of(&object)?;
    let record = Record {
        object_sha256: hex(Sha256::digest(&object)),
        source_sha256: source_digest(&root())?,
        aya_ebpf: locked_version(&fs::read_to_string(root().join(CRATE).join("Cargo.lock"))?, "aya-ebpf")?,
        toolchain: toolchain.versions,
    };
    let folder = root().join(FOLDER);
    fs::create_dir_all(&folder)?;
    replace(&folder.join(OBJECT), &object)?;
    let text = toml::to_string(&record)?;
    let text = format!("# What {OBJECT} was made of and with, written by `cargo xtask build-ebpf`.\n{text}");
    replace(&folder.join(RECORD), text.as_bytes())?;
    println!("{FOLDER}/{OBJECT}: {} bytes, {interface}, sha256 {}", object.len(), record.object_sha256);
    Ok(())
}

/// Builds the object, and compares it with what is committed.
fn check() -> Result<()> {
    let folder = root().join(FOLDER);
    let read = |name: &str| {
        fs::read(folder.join(name))
            .with_context(|| format!("read {FOLDER}/{name} (made by: cargo xtask build-ebpf)"))
    };
    let committed = read(OBJECT)?;
    let record: Record =
        toml::from_slice(&read(RECORD)?).with_context(|| format!("read {FOLDER}/{RECORD}"))?;
    ensure!(
        hex(Sha256::digest(&committed)) == record.object_sha256,
        "{FOLDER}/{OBJECT} is not the object that {RECORD} describes: run cargo xtask build-ebpf, commit both"
    );
    ensure!(
        source_digest(&root())? == record.source_sha256,
        "{FOLDER}/{OBJECT} is stale, its sources have changed since: run cargo xtask build-ebpf, commit the \
         result"
    );

    let toolchain = Toolchain::find()?;
    let built = build(&toolchain, &[], &target().join("bpf").join(OBJECT))?;
    let differences = record.toolchain.differences(&toolchain.versions);
    if differences.is_empty() {
        ensure!(
            built == committed,
            "{FOLDER}/{OBJECT} is not what its sources and its toolchain give ({} bytes, sha256 {}): run \
             cargo xtask build-ebpf and look at what changed",
            built.len(),
            hex(Sha256::digest(&built)),
        );
        println!("{FOLDER}/{OBJECT}: the same {} bytes, built with {}", built.len(), toolchain.versions);
    } else {
        println!("another toolchain than the committed object's, so the bytes say nothing:");
        for difference in &differences {
            println!("  {difference}");
        }
        let (committed, built) = (Interface::of(&committed)?, Interface::of(&built)?);
        ensure!(
            committed == built,
            "the object built here has other programs or maps than {FOLDER}/{OBJECT}\n\
             committed: {committed:#?}\n\
             built: {built:#?}"
        );
        println!("{FOLDER}/{OBJECT}: the sources are those recorded, and give the same {built}");
    }
    Ok(())
}

/// Builds the crate into `stripped` and returns the bytes.
fn build(toolchain: &Toolchain, options: &[&str], stripped: &Path) -> Result<Vec<u8>> {
    let folder = target().join("bpf/build");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let in_crate = |subcommand: &str| {
        let mut cargo = bpf_cargo()?;
        cargo.current_dir(root().join(CRATE)).args([subcommand, "--locked", "--quiet"]);
        anyhow::Ok(cargo)
    };
    // The registry's folder must exist before its path can be remapped.
    run(&mut in_crate("fetch")?)?;
    run(in_crate("build")?
        .args(["--release", "-Zbuild-std=core", "--target", TARGET])
        .args(options)
        .arg("--target-dir")
        .arg(&folder)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(toolchain, &folder)?))?;
    strip(&folder.join(TARGET).join("release").join(CRATE), stripped)?;
    fs::read(stripped).with_context(|| format!("read {}", stripped.display()))
}

/// Returns the compiler's flags, separated as Cargo requires. Paths get into BTF's line information, so every
/// path that differs between machines is mapped to a fixed one.
fn flags(toolchain: &Toolchain, target: &Path) -> Result<OsString> {
    let mut flags: Vec<OsString> = vec![
        "--cfg".into(),
        // Determines the register layout of a traced kernel, which no program here reads; fixed, to be the
        // same everywhere.
        r#"bpf_target_arch="x86_64""#.into(),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
    ];
    let mut linker = OsString::from("-Clinker=");
    linker.push(&toolchain.bpf_linker);
    flags.push(linker);
    // If several fit, the last one applies: the target folder may be inside the checkout.
    let mut remap = |from: &Path, to: &str| {
        for path in [Some(from.to_path_buf()), fs::canonicalize(from).ok()].into_iter().flatten() {
            let mut flag = OsString::from("--remap-path-prefix=");
            flag.push(path);
            flag.push("=");
            flag.push(to);
            if !flags.contains(&flag) {
                flags.push(flag);
            }
        }
    };
    remap(&root(), "/lbridge");
    remap(target, "/target");
    remap(&toolchain.library_sources, "/rustc");
    for registry in registries()? {
        remap(&registry, "/cargo");
    }
    Ok(flags.join(std::ffi::OsStr::new("\x1f")))
}

/// Lists the folders where Cargo unpacks packages, one for each registry.
fn registries() -> Result<Vec<PathBuf>> {
    let home = match env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => env::home_dir().context("neither CARGO_HOME nor a home folder")?.join(".cargo"),
    };
    let folder = home.join("registry/src");
    let mut registries = fs::read_dir(&folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>())
        .with_context(|| format!("list {}", folder.display()))?;
    registries.sort();
    Ok(registries)
}

/// Computes a digest of the sources' names and contents.
fn source_digest(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(root, Path::new(source), &mut files)?;
    }
    files.sort();
    let mut digest = Sha256::new();
    for file in files {
        let bytes = fs::read(root.join(&file))?;
        digest.update(format!("{}\0{}\0", file.display(), bytes.len()));
        digest.update(bytes);
    }
    Ok(hex(digest.finalize()))
}

fn collect(root: &Path, path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let full = root.join(path);
    let metadata = fs::metadata(&full).with_context(|| format!("read {}", full.display()))?;
    if metadata.is_file() {
        files.push(path.to_path_buf());
        return Ok(());
    }
    for entry in fs::read_dir(&full)? {
        let name = entry?.file_name();
        // Editors' files are not sources.
        if path.join(&name).extension().is_some_and(|extension| extension == "rs")
            || full.join(&name).is_dir()
        {
            collect(root, &path.join(name), files)?;
        }
    }
    Ok(())
}

/// The parts of an object that a loader sees.
#[derive(Debug, PartialEq, Eq)]
struct Interface {
    /// The section, which names the hook, by program name.
    programs: BTreeMap<String, String>,
    /// Type, key size, value size, number of entries and flags, by map name.
    maps: BTreeMap<String, [u32; 5]>,
}

impl Interface {
    fn of(object: &[u8]) -> Result<Interface> {
        let object = aya_obj::Object::parse(object).context("the loader cannot read the object")?;
        let programs: BTreeMap<_, _> = object
            .programs
            .iter()
            .map(|(name, program)| (name.clone(), format!("{:?}", program.section)))
            .collect();
        let maps = object
            .maps
            .iter()
            // Without the maps that hold the program's variables: the compiler chooses their size.
            .filter(|(name, _)| !name.starts_with('.'))
            .map(|(name, map)| {
                let shape =
                    [map.map_type(), map.key_size(), map.value_size(), map.max_entries(), map.map_flags()];
                (name.clone(), shape)
            })
            .collect();
        if programs.is_empty() {
            bail!("the object has no program");
        }
        Ok(Interface { programs, maps })
    }
}

impl std::fmt::Display for Interface {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} programs, {} maps", self.programs.len(), self.maps.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkout() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for source in SOURCES {
            let path = folder.path().join(source);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if source.ends_with("src") {
                fs::create_dir_all(path.join("deep")).unwrap();
                fs::write(path.join("main.rs"), source).unwrap();
                fs::write(path.join("deep/deeper.rs"), source).unwrap();
            } else {
                fs::write(path, source).unwrap();
            }
        }
        folder
    }

    #[test]
    fn the_source_digest_does_not_depend_on_the_place() {
        let (one, two) = (checkout(), checkout());
        assert_eq!(source_digest(one.path()).unwrap(), source_digest(two.path()).unwrap());
    }

    #[test]
    fn the_source_digest_depends_on_every_source_and_on_nothing_else() {
        let folder = checkout();
        let original = source_digest(folder.path()).unwrap();
        fs::write(folder.path().join("lbridge-ebpf/src/.main.rs.swp"), "an editor's").unwrap();
        assert_eq!(source_digest(folder.path()).unwrap(), original);
        for file in ["lbridge-common/src/deep/deeper.rs", "lbridge-ebpf/Cargo.lock"] {
            let path = folder.path().join(file);
            let text = fs::read(&path).unwrap();
            fs::write(&path, "changed").unwrap();
            assert_ne!(source_digest(folder.path()).unwrap(), original, "{file}");
            fs::write(&path, text).unwrap();
        }
        let file = folder.path().join("lbridge-ebpf/src/main.rs");
        fs::rename(&file, file.with_file_name("other.rs")).unwrap();
        assert_ne!(source_digest(folder.path()).unwrap(), original, "a renamed file");
        fs::remove_dir_all(folder.path().join("lbridge-common")).unwrap();
        assert!(source_digest(folder.path()).is_err());
    }

    #[test]
    fn the_committed_object_can_be_loaded() {
        let object = fs::read(root().join(FOLDER).join(OBJECT)).unwrap();
        let interface = Interface::of(&object).unwrap();
        assert!(interface.programs.values().any(|section| section.starts_with("SkLookup")), "{interface:?}");
        assert!(!interface.maps.is_empty());
        assert!(Interface::of(&object[..100]).is_err());
    }

    #[test]
    fn a_digest_is_printed_as_sha256sum_does() {
        assert_eq!(
            hex(Sha256::digest("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}

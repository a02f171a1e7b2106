//! kernels: the kernels of other Debian releases, unpacked for the suite that boots them in a virtual
//! machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};

use crate::apt::{Mirror, State, Status};
use crate::workspace::vm_folder;

/// Debian releases. The kernel of the first, 5.10, gives programs no ingress interface and has no MPTCP; that
/// of the second, 6.1, is the oldest with both that Debian supports.
const RELEASES: [&str; 2] = ["bullseye", "bookworm"];

/// The package of the kernel for virtual machines: small and quick to boot.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// Fetches missing kernels into `target/vm/RELEASE/{vmlinuz,modules}`.
pub(crate) fn fetch() -> Result<()> {
    let missing: Vec<_> = RELEASES.into_iter().filter(|release| !is_there(release)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mirror = Mirror::find()?;
    let fetched: Vec<Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> =
            missing.iter().map(|release| (release, scope.spawn(|| fetch_one(release, &mirror)))).collect();
        threads
            .into_iter()
            .map(|(release, thread)| {
                let fetched = thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")));
                fetched.with_context(|| format!("fetch the kernel of Debian {release}"))
            })
            .collect()
    });
    fetched.into_iter().collect()
}

fn is_there(release: &str) -> bool {
    let folder = vm_folder().join(release);
    folder.join("vmlinuz").is_file() && folder.join("modules").is_dir()
}

fn fetch_one(release: &str, mirror: &Mirror) -> Result<()> {
    let folder = vm_folder().join(release);
    drop(fs::remove_dir_all(&folder));
    let apt = folder.join("apt");
    let (state, image) = find_image(release, mirror, &apt)?;
    let mut packages = state.depends(&image, &["linux-binary-", "linux-modules-"])?;
    packages.push(image.clone());
    let unpacked = folder.join("unpacked");
    state.unpack(&packages, &unpacked)?;

    let kernel = child(&unpacked.join("boot"), "vmlinuz-")?;
    // Newer releases have /lib in /usr.
    let modules =
        child(&unpacked.join("lib/modules"), "").or_else(|_| child(&unpacked.join("usr/lib/modules"), ""))?;
    fs::rename(modules, folder.join("modules"))?;
    // The last step: a release whose kernel is in place counts as fetched.
    fs::rename(kernel, folder.join("vmlinuz"))?;
    fs::remove_dir_all(&apt)?;
    fs::remove_dir_all(&unpacked)?;
    println!("{}: {image}", folder.display());
    Ok(())
}

/// Finds the newest kernel of a release, including its security updates if the mirror still has them.
fn find_image(release: &str, mirror: &Mirror, apt: &Path) -> Result<(State, String)> {
    let released = format!("{} {release} main", mirror.main);
    let updates = mirror.security.as_ref().map(|security| format!("{security} {release}-security main"));
    let mut attempts = vec![vec![released.clone()]];
    if let Some(updates) = updates {
        attempts.insert(0, vec![released, updates]);
    }
    let mut result = Err(anyhow::anyhow!("no source"));
    for sources in &attempts {
        result = find_image_in(sources, apt);
        if result.is_ok() {
            return result;
        }
    }
    result.with_context(|| {
        format!(
            "{} no longer has it, it seems: set LBRIDGE_DEBIAN_MIRROR to the address of a mirror that does, \
             Debian's archive of old releases for instance",
            mirror.main
        )
    })
}

fn find_image_in(sources: &[String], apt: &Path) -> Result<(State, String)> {
    drop(fs::remove_dir_all(apt));
    let state = State::with_sources(apt, sources, Status::Empty)?;
    state.update()?;
    let image = state.depends(PACKAGE, &["linux-image-"])?.into_iter().next();
    Ok((state, image.with_context(|| format!("{PACKAGE} depends on no kernel"))?))
}

/// Returns the entry of a folder whose name starts with `prefix`.
fn child(folder: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(folder)
        .with_context(|| format!("list {}", folder.display()))?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .with_context(|| format!("{} has no {prefix}*", folder.display()))
}

//! Stand-ins for the host's firewall tool, in the mount namespace of the test.

use anyhow::{Context, Result};

/// `nft` that fails with arguments of that pattern, in the place of the real one for as long as this lives.
pub(crate) fn broken_nft(fails: &str) -> Result<impl Drop + use<>> {
    instead_of_nft(&format!("case \"$*\" in {fails}) echo broken >&2; exit 1;; esac"))
}

/// `nft` that runs these lines of a shell's first.
pub(crate) fn instead_of_nft(lines: &str) -> Result<impl Drop + use<>> {
    std::fs::copy("/usr/sbin/nft", "/run/nft-of-the-host")?;
    in_place_of_nft(&format!("#!/bin/sh\n{lines}\nexec /run/nft-of-the-host \"$@\"\n"))
}

fn in_place_of_nft(script: &str) -> Result<impl Drop + use<>> {
    struct Mounted;
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = nix::mount::umount2("/usr/sbin/nft", nix::mount::MntFlags::MNT_DETACH);
        }
    }
    std::fs::write("/run/nft-instead", script)?;
    std::fs::set_permissions("/run/nft-instead", std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let flags = nix::mount::MsFlags::MS_BIND;
    nix::mount::mount(Some("/run/nft-instead"), "/usr/sbin/nft", None::<&str>, flags, None::<&str>)
        .context("mount over nft")?;
    Ok(Mounted)
}

/// For as long as this lives execve(2) of `nft` fails as if it was not there: ENOENT, of an interpreter that
/// is not.
pub(crate) fn without_nft() -> Result<impl Drop> {
    in_place_of_nft("#!/nowhere\n")
}

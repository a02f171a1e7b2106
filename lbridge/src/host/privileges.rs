//! What of root's privileges the daemon keeps. `docs/adr/0008-the-units-privileges.md` says what each is for;
//! `packaging/lbridge.service` bounds them to the same.

use std::io;

use rustix::{
    io::Errno,
    thread::{CapabilitySet, capabilities, remove_capability_from_bounding_set, set_capabilities},
};

/// Programs, maps and namespaces; the firewall; other processes' sockets and files; ports below 1024.
const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_OVERRIDE);

/// Gives up what is needed at the start alone, for this thread and those that it will start (capset(2) is of one thread).
/// What they run has no more either: root's programs get what is in the bounding set.
///
/// # Errors
///
/// If the kernel refuses it.
pub fn give_up() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    // Without it a service manager has bounded them already.
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        // Those, too, that are newer than this program.
        for bit in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            if KEPT.contains(capability) {
                continue;
            }
            match remove_capability_from_bounding_set(capability) {
                // The first that this kernel does not know.
                Err(Errno::INVAL) => break,
                removed => removed?,
            }
        }
    }
    sets.permitted &= KEPT;
    sets.effective &= KEPT;
    sets.inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, sets)?)
}

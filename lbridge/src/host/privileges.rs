//! Privileges: drops the capabilities of root that the daemon does not need.
//! `docs/adr/0008-the-units-privileges.md` explains what each remaining one is for;
//! `packaging/lbridge.service` limits the service to the same set.

use std::io;

use rustix::{
    io::Errno,
    thread::{CapabilitySet, capabilities, remove_capability_from_bounding_set, set_capabilities},
};

/// The capabilities that the daemon keeps: for eBPF programs, maps and namespaces; for the firewall; for
/// other processes' sockets and files; and for ports below 1024.
const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_OVERRIDE);

/// Drops the capabilities that are needed only at the start, for this thread and for the threads that it will
/// start (capset(2) applies to a single thread). Programs that these threads run get no more either: root's
/// programs get only what is in the bounding set.
///
/// # Errors
///
/// Fails if the kernel refuses one of the calls.
pub fn drop_capabilities() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    // Without CAP_SETPCAP, a service manager has limited the bounding set already.
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        // All 64 bits, to include capabilities that are newer than this program.
        for bit in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            if KEPT.contains(capability) {
                continue;
            }
            match remove_capability_from_bounding_set(capability) {
                // EINVAL: the first capability that this kernel does not know.
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

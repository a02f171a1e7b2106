//! What of root's privileges the daemon keeps. `docs/adr/0008-the-units-privileges.md` says what each is for;
//! `packaging/lbridge.service` bounds them to the same.

use std::io;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// Programs, maps and namespaces; the firewall; other processes' sockets and files; ports below 1024.
const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_OVERRIDE);

/// Gives up what is needed at the start alone, for this thread and those that it will start (capset(2) is of one thread).
/// What they run, where `NoNewPrivileges=` is set, has no more either.
pub fn give_up() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    sets.permitted &= KEPT;
    sets.effective &= KEPT;
    sets.inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, sets)?)
}

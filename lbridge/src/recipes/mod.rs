//! What people used before lbridge: socat in systemd units, and UFW's rules for them. Reads, changes nothing. Imports
//! planning's rules.
//!
//! - [`mod@unit`]: unit files, as far as it takes to know what a service runs;
//! - [`socat`]: what a socat command line forwards;
//! - [`ufw`]: the rules that UFW was given.

pub mod socat;
pub mod ufw;
pub mod unit;

//! Migrate: reads what people used before lbridge: socat in systemd units, and UFW's rules for them. Changes
//! nothing. Imports planning's rules.
//!
//! - [`mod@unit`]: unit files, as far as needed to know what a service runs;
//! - [`socat`]: what a socat command line forwards;
//! - [`ufw`]: the rules that were given to UFW.

pub mod socat;
pub mod ufw;
pub mod unit;

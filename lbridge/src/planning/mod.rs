//! The decisions. PURE: no I/O, no clock, no async, deterministic.
//!
//! ```text
//! Labels --derive--> Rules
//! Rules + Inventory + Abilities --resolve--> Policy --plan(policy, reality)--> Steps
//! ```
//!
//! May import `lbridge_common` and nothing else of lbridge's; of other crates those that do no I/O: serde, with jiff's words for
//! durations (the types are what files and the API say), strsim, strum, thiserror. Every shell may import this room.

pub mod explain;
pub mod firewall;
pub mod grant;
mod hint;
pub mod hooks;
pub mod inventory;
pub mod labels;
pub mod owner;
pub mod plan;
pub mod policy;
pub mod reality;
pub mod reason;
pub mod resolve;
pub mod rule;
pub mod text;

#[cfg(test)]
mod tests;

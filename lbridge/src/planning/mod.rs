//! The decisions. PURE: no I/O, no clock, no async, deterministic.
//!
//! ```text
//! Rules + Inventory + Abilities --resolve--> Policy --plan(policy, reality)--> Steps
//! ```
//!
//! May import `lbridge_common`, serde (the types are what files and the API say), strsim and nothing of lbridge's; every shell
//! may import this room.

pub mod explain;
pub mod firewall;
mod hint;
pub mod inventory;
pub mod labels;
pub mod plan;
pub mod policy;
pub mod reality;
pub mod resolve;
pub mod rule;

#[cfg(test)]
mod tests;

//! Planning: the decisions. PURE: no I/O, no clock, no async, deterministic.
//!
//! ```text
//! Labels --derive--> Rules
//! Rules + Inventory + KernelFeatures --resolve--> Desired --plan(desired, actual)--> Steps
//! ```
//!
//! May import `lbridge_common`, and nothing else of lbridge. From other crates it may import those that do no
//! I/O: serde, jiff for its format of durations (files and the API contain these types), ipnet, strsim,
//! strum, thiserror. Every shell may import planning.

pub mod actual;
pub mod desired;
pub mod explain;
pub mod firewall;
pub mod grant;
mod hint;
pub mod hooks;
pub mod inventory;
pub mod kernel_state;
pub mod labels;
pub mod owner;
pub mod plan;
pub mod reason;
pub mod resolve;
pub mod rule;
pub mod text;

#[cfg(test)]
mod tests;

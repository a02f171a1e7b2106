//! Docker: its networks and containers, and the wake-ups when they change. The only room that knows bollard. Imports planning's
//! inventory.
//!
//! Level-triggered: an event only wakes, the list is read afresh.

pub mod look;
mod snapshot;
pub mod watch;

//! Docker, or Podman in its place: networks and containers, and the wake-ups when they change. The only room that knows bollard.
//! Imports planning.
//!
//! - [`watch`]: the task that follows the engine, and [`view`], what it knows;
//! - `snapshot`: what the engine says of networks, containers and labels; `engine` and `libpod`: which engine it is, and what
//!   only Podman's own words tell;
//! - `ended`: what is gone before the engine's lists say so;
//! - [`look`]: one look, for commands.
//!
//! Level-triggered: an event only wakes, the list is read afresh. But that a container has ended or left a network is believed at
//! once: the list says so later, when its address may be another's.

mod ended;
mod engine;
mod host_gateway;
mod libpod;
pub mod look;
mod snapshot;
pub mod view;
pub mod watch;

/// The cause alone: what is around it tells of libraries' insides.
fn plain(error: bollard::errors::Error) -> anyhow::Error {
    let error = anyhow::Error::from(error);
    match error.chain().len() {
        1 => error,
        _ => anyhow::anyhow!("the engine cannot be reached: {}", error.root_cause()),
    }
}

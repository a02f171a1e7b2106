//! Docker, or Podman in its place: lists networks and containers, and wakes the caller when they change. The
//! only module that uses bollard. Imports planning.
//!
//! - [`watch`]: the task that follows the engine, and [`view`], the state it publishes;
//! - `snapshot`: lists networks, containers and labels; `engine` and `libpod`: identify the engine, and read
//!   what only Podman's own API reports;
//! - `endings`: containers that are gone before the engine's lists show it;
//! - [`client`]: a single look at the engine, for commands.
//!
//! Level-triggered: an event only wakes, then the list is read again. The exception is that a container has
//! ended or left a network. This takes effect at once: the list shows it later, when another container may
//! have its address.

pub mod client;
mod endings;
mod engine;
mod host_gateway;
mod libpod;
mod snapshot;
pub mod view;
pub mod watch;

pub use engine::address;

/// Reduces an error to its root cause; the outer layers only describe the libraries' internals.
fn plain(error: bollard::errors::Error) -> anyhow::Error {
    let error = anyhow::Error::from(error);
    match error.chain().len() {
        1 => error,
        _ => anyhow::anyhow!("could not reach the engine: {}", error.root_cause()),
    }
}

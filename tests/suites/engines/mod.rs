//! Tests that hold for every engine: they are in the suite of each, which names its engine `Tested`. Where
//! an engine differs, the constants of [`Engine`] say so, and why.

mod containers;
mod doctor;
mod engine;
pub(crate) mod from;
mod labels;
mod localhost;
mod names;
mod networks;
mod walled;

pub(crate) use lbridge_tests::harness::engine::IMAGE;
use lbridge_tests::harness::engine::{self as harness, Engine};
use lbridge_tests::harness::suite::Test;

pub(crate) use crate::Tested;

pub(crate) type Scene = harness::Scene<Tested>;

/// The state of a rule for a network that has no container.
pub(crate) const WITHOUT_CONTAINERS: &str =
    if Tested::BRIDGE_WITHOUT_CONTAINERS { "steered" } else { "waiting" };

pub(crate) fn tests() -> Vec<Test> {
    [
        networks::tests(),
        names::tests(),
        engine::tests(),
        containers::tests(),
        from::tests(),
        labels::tests(),
        localhost::tests(),
        doctor::tests(),
        walled::tests(),
    ]
    .concat()
}

//! lbridge beside a real Docker Engine: networks and containers that come, go and change under its rules.

mod aliases;
mod complete;
mod compose;
mod doctor;
mod engine;
#[path = "../engines/mod.rs"]
mod engines;
mod networks;
mod revocation;
mod swarm;

pub(crate) use engines::Scene;
pub(crate) use lbridge_tests::harness::docker::Docker as Tested;
use lbridge_tests::harness::suite::{Need, Suite};

fn main() {
    const NEEDS: &[Need] = &[
        Need::Program("dockerd"),
        Need::Program("docker"),
        Need::Program("iptables"),
        Need::Program("busybox"),
        Need::Program("tar"),
    ];
    let tests = [
        engines::tests(),
        networks::tests(),
        revocation::tests(),
        engine::tests(),
        aliases::tests(),
        doctor::tests(),
        compose::tests(),
        swarm::tests(),
        complete::tests(),
    ];
    let mut suite = Suite::new(NEEDS, tests.concat());
    suite.threads = 1;
    suite.main()
}

//! lbridge on a kernel: real hooks in network namespaces, bridges without Docker.

mod attached;
mod decision;
mod doctor;
mod explain;
mod families;
mod inside;
mod isolation;
mod lifecycle;
mod limits;
mod listeners;
mod localhost;
mod names;
mod neighbours;
mod relay;
mod steer;
mod udp;
mod verified;

use lbridge_tests::harness::suite::Suite;

pub(crate) fn suite() -> Suite {
    let tests = [
        decision::tests(),
        steer::tests(),
        isolation::tests(),
        listeners::tests(),
        relay::tests(),
        names::tests(),
        neighbours::tests(),
        lifecycle::tests(),
        attached::tests(),
        inside::tests(),
        limits::tests(),
        verified::tests(),
        doctor::tests(),
        explain::tests(),
        families::tests(),
        localhost::tests(),
        udp::tests(),
    ];
    Suite::new(&[], tests.concat())
}

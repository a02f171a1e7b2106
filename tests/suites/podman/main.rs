//! lbridge beside a real Podman, which speaks Docker's API in words of its own.

#[path = "../engines/mod.rs"]
mod engines;
mod networks;
mod rootless;
mod service;

pub(crate) use engines::Scene;
pub(crate) use lbridge_tests::harness::podman::Podman as Tested;
use lbridge_tests::harness::suite::{Need, Suite};

fn main() {
    const NEEDS: &[Need] = &[
        Need::Program("podman"),
        Need::Program("runc"),
        Need::File("/usr/lib/podman/netavark"),
        Need::Program("iptables"),
        Need::Program("busybox"),
        Need::Program("tar"),
    ];
    let tests = [engines::tests(), networks::tests(), service::tests(), rootless::tests()];
    let mut suite = Suite::new(NEEDS, tests.concat());
    suite.threads = 1;
    suite.main()
}

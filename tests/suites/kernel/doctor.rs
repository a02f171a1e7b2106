//! The doctor says of a kernel what the kernel does.

use anyhow::{Result, ensure};
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::kernel;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![the_doctor_knows_what_the_kernel_does]
}

fn the_doctor_knows_what_the_kernel_does() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.served(8080, "service")?;
    let report = Report::of(&scene.daemon)?;
    ensure!(report.complaints().is_empty(), "{report:?}");
    let steering = report.must("steering", "ok")?;
    ensure!(steering.text.contains("tested with a connection"), "{steering:?}");
    let names_namespaces = kernel::version() >= (5, 14);
    for (check, can) in [
        ("ingress", kernel::has_ingress_ifindex()),
        ("registering", kernel::registers_listeners_alone()),
        ("localhost", names_namespaces),
        ("udp", names_namespaces),
    ] {
        if can {
            report.must_not(check)?;
        } else {
            report.must(check, "note")?;
        }
    }
    report.must_not("taking")?;
    report.must_not("names")
}

//! The kernel suite on the kernels of Debian 11 and 12, booted in qemu. The same program runs inside: what is
//! tested there is what was built here.

mod kernel;

use anyhow::{Result, ensure};
use lbridge_tests::harness::suite::{Need, Suite};
use lbridge_tests::harness::vm::{self, Guest};
use lbridge_tests::tests;

fn main() {
    const NEEDS: &[Need] = &[
        Need::Lbridge,
        Need::Program("qemu-system-x86_64"),
        Need::Program("busybox"),
        Need::Program("ip"),
        Need::Program("ldd"),
    ];
    if vm::is_inside() {
        kernel::suite().main();
    }
    let tests = tests![
        // No MPTCP, no ingress_ifindex, and socket programs cannot tell namespaces apart.
        linux_5_10: [Need::Kernel("bullseye")],
        linux_6_1: [Need::Kernel("bookworm")],
    ];
    let mut suite = Suite::new(&[], tests);
    suite.needs = NEEDS.to_vec();
    suite.threads = 1;
    suite.sandboxed = false;
    suite.main()
}

/// The needs that neither kernel meets.
const LACK: [Need; 2] = [Need::PortRanges, Need::WholeSystem];

fn linux_5_10() -> Result<()> {
    let lacks = [Need::Mptcp, Need::RegistersAlone, Need::NamesNamespaces, Need::TellsInterfaces];
    every_test_passes("bullseye", "5.10", &[&lacks[..], &LACK].concat())
}

fn linux_6_1() -> Result<()> {
    every_test_passes("bookworm", "6.1", &LACK)
}

/// Boots, runs, and counts: a test that was not run is no test passed. Only what needs one of `lacks` is
/// ignored.
fn every_test_passes(suite: &str, version: &str, lacks: &[Need]) -> Result<()> {
    let tests = kernel::suite().tests;
    let ignored = tests.iter().filter(|test| test.needs.iter().any(|need| lacks.contains(need))).count();
    let report = Guest::boot(suite)?;
    // Marked, since the summaries inside are not those of this suite.
    let console: String = report.console.lines().flat_map(|line| ["guest| ", line, "\n"]).collect();
    ensure!(report.release.starts_with(version), "booted {}\n{console}", report.release);
    let expected = (tests.len() - ignored, 0, ignored);
    ensure!(
        report.status == Some(0) && report.counts == Some(expected),
        "(passed, failed, ignored) should be {expected:?}, are {:?}, status {:?}\n{console}",
        report.counts,
        report.status
    );
    eprintln!("{}: {} passed, {ignored} ignored, {:.0?}", report.release, expected.0, report.took);
    Ok(())
}

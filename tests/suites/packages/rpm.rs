//! The package for distributions with RPM: on this machine, where rpm has a database of its own and knows no
//! other package.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::Output;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::traffic::Traffic;
use lbridge_tests::tests;

use crate::{CONFIG, Host, PROGRAM, RULES, UNIT};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        the_rpm_has_what_the_deb_has: [Need::Program("rpm"), Need::Package("2.rpm")],
        the_rpm_is_installed_upgraded_and_erased:
            [Need::Program("rpm"), Need::Package("2.rpm"), Need::RegistersAlone],
    ]
}

/// rpm does not know what dpkg has installed.
fn rpm(host: &Host, arguments: &[&str]) -> Result<Output> {
    host.run("rpm", &[&["--nodeps"], arguments].concat())
}

fn the_rpm_has_what_the_deb_has() -> Result<()> {
    let host = Host::boot(Path::new("/"))?;
    let (rpm, deb) = (host.bring("1.rpm")?, host.bring("1.deb")?);
    let contents = host.run("dpkg-deb", &["--contents", &deb])?.stdout;
    let name = |line: &str| {
        let path = line.split_whitespace().nth(5)?.strip_prefix('.')?;
        // Each distribution's names and places for the same.
        let path = path.replace("zsh/vendor-completions", "zsh/site-functions");
        Some(path.replace("changelog.gz", "CHANGELOG.md")).filter(|path| !path.ends_with('/'))
    };
    let debians = ["/usr/share/doc/lbridge/changelog.Debian.gz", "/usr/share/doc/lbridge/copyright"];
    let in_deb: BTreeSet<_> =
        contents.lines().filter_map(name).filter(|path| !debians.contains(&path.as_str())).collect();
    ensure!(in_deb.len() > 20, "{contents}");
    let contents = host.run("rpm", &["--query", "--list", "--package", &rpm])?.stdout;
    let in_rpm: BTreeSet<_> =
        contents.lines().map(str::to_owned).filter(|path| !path.contains("/licenses/")).collect();
    ensure!(in_deb == in_rpm, "{:?}", in_deb.symmetric_difference(&in_rpm).collect::<Vec<_>>());

    let requires = host.run("rpm", &["--query", "--requires", "--package", &rpm])?.stdout;
    ensure!(requires.contains("libc.so.6"), "{requires}");
    let files = host.run("rpm", &["--query", "--configfiles", "--package", &rpm])?.stdout;
    ensure!(files.trim() == CONFIG, "{files}");
    Ok(())
}

fn the_rpm_is_installed_upgraded_and_erased() -> Result<()> {
    let host = Host::boot(Path::new("/"))?;
    rpm(&host, &["--install", &host.bring("1.rpm")?])?;
    host.run("getent", &["group", "lbridge"])?;
    // Whether it is enabled is the distribution's choice; none of them starts it.
    ensure!(host.property("ActiveState")? == "inactive");
    host.systemd.must(&["enable", "--now", UNIT])?;

    let (_steered, _relayed) = (host.steer("steered")?, host.relay("relayed")?);
    let mut open = client::connect(&host.container, host.gateway(8080))?;
    let traffic = [(8080, "steered"), (8081, "relayed")]
        .map(|(port, service)| Traffic::start(&host.container, host.gateway(port), service));
    let flows = || traffic.iter().try_for_each(|traffic| traffic.flows(50));
    flows()?;
    let before = host.property("MainPID")?;
    rpm(&host, &["--upgrade", &host.bring("2.rpm")?])?;
    ensure!(host.property("MainPID")? != before && host.property("ActiveState")? == "active", "restarted");
    flows()?;
    open.echo(b"still here")?;
    traffic.into_iter().try_for_each(Traffic::all_served)?;

    rpm(&host, &["--erase", "lbridge"])?;
    ensure!(!host.exists(PROGRAM) && host.exists(RULES));
    ensure!(host.property("ActiveState")? == "inactive");
    ensure!(host.systemd.systemctl(&["is-enabled", UNIT])?.status != 0);
    host.is_as_before()
}

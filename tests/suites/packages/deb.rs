//! The package for Debian, on this machine's release and on a newer one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::Output;
use lbridge_tests::harness::packages;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::traffic::Traffic;
use lbridge_tests::tests;

use crate::{CONFIG, Host, PINS, PROGRAM, RULES, UNIT};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        installed_it_runs,
        installed_it_runs_on_trixie: [Need::DebianRoot("trixie")],
        an_upgrade_refuses_nobody: [Need::RegistersAlone],
        an_upgrade_refuses_nobody_on_trixie: [Need::RegistersAlone, Need::DebianRoot("trixie")],
        removed_it_takes_back_what_is_in_force: [Need::RegistersAlone],
        removed_it_takes_back_what_is_in_force_on_trixie: [Need::RegistersAlone, Need::DebianRoot("trixie")],
        purged_it_leaves_nothing,
        purged_it_leaves_nothing_on_trixie: [Need::DebianRoot("trixie")],
        a_start_that_fails_does_not_stop_dpkg,
        what_the_administrator_disabled_stays_disabled,
    ]
}

/// Each on this machine's root file system, and on trixie's.
macro_rules! on_both {
    ($($name:ident, $on_trixie:ident: $test:ident),+ $(,)?) => {$(
        fn $name() -> Result<()> {
            $test(&Host::boot(Path::new("/"))?)
        }

        fn $on_trixie() -> Result<()> {
            $test(&Host::boot(&packages::root("trixie")?)?)
        }
    )+};
}

on_both! {
    installed_it_runs, installed_it_runs_on_trixie: runs,
    an_upgrade_refuses_nobody, an_upgrade_refuses_nobody_on_trixie: upgrade,
    removed_it_takes_back_what_is_in_force, removed_it_takes_back_what_is_in_force_on_trixie: removal,
    purged_it_leaves_nothing, purged_it_leaves_nothing_on_trixie: purge,
}

fn dpkg(host: &Host, arguments: &[&str]) -> Result<Output> {
    // Nobody is there to answer questions.
    host.run("dpkg", &[&["--force-confold"], arguments].concat())
}

fn install(host: &Host, package: &str) -> Result<Output> {
    dpkg(host, &["--install", &host.bring(package)?])
}

/// `installed`, `config-files`, or why not.
fn state(host: &Host) -> Result<String> {
    let arguments = ["--show", "--showformat=${db:Status-Status} ${Version}", "lbridge"];
    Ok(host.systemd.run("dpkg-query", &arguments)?.stdout)
}

fn runs(host: &Host) -> Result<()> {
    let output = install(host, "1.deb")?;
    ensure!(state(host)?.starts_with("installed"), "{output:?}");
    ensure!(host.systemd.systemctl(&["is-enabled", UNIT])?.stdout.trim() == "enabled");
    ensure!(host.property("ActiveState")? == "active", "{output:?}");
    ensure!(host.property("FragmentPath")?.ends_with("/lib/systemd/system/lbridge.service"));
    ensure!(host.property("ExecStart")?.contains("path=/usr/bin/lbridge"), "{}", host.property("ExecStart")?);
    host.lbridge(&["status"])?;
    // Who is in the group may use the socket, so there must be one.
    let socket = host.run("stat", &["--format=%G %a", "/run/lbridge/lbridge.sock"])?.stdout;
    ensure!(socket.trim() == "lbridge 660", "{socket}");
    let files = host.run("dpkg", &["--listfiles", "lbridge"])?.stdout;
    for file in [
        "/usr/share/man/man1/lbridge.1.gz",
        "/usr/share/man/man1/lbridge-allow.1.gz",
        "/usr/share/man/man5/lbridge.toml.5.gz",
        "/usr/share/bash-completion/completions/lbridge",
        "/usr/share/zsh/vendor-completions/_lbridge",
        "/usr/share/fish/vendor_completions.d/lbridge.fish",
        "/usr/share/doc/lbridge/copyright",
    ] {
        ensure!(files.lines().any(|line| line == file), "{file} is not among\n{files}");
    }
    let description = host.run("dpkg-query", &["--show", "--showformat=${Description}", "lbridge"])?.stdout;
    ensure!(description.lines().nth(1).is_some_and(|line| line.starts_with(" Containers")), "{description}");
    let configuration = host.run("dpkg-query", &["--show", "--showformat=${Conffiles}", "lbridge"])?.stdout;
    ensure!(configuration.trim().starts_with(CONFIG) && configuration.trim().lines().count() == 1);
    let changed = host.run("dpkg", &["--verify", "lbridge"])?.stdout;
    // Where documentation is not wanted it is not unpacked.
    ensure!(changed.lines().all(|line| line.contains("/usr/share/")), "{changed}");
    host.steer("steered").map(drop)
}

fn upgrade(host: &Host) -> Result<()> {
    install(host, "1.deb")?;
    let (_steered, _relayed) = (host.steer("steered")?, host.relay("relayed")?);
    let mut open = client::connect(&host.container, host.gateway(8080))?;
    let traffic = [(8080, "steered"), (8081, "relayed")]
        .map(|(port, service)| Traffic::start(&host.container, host.gateway(port), service));
    let flows = || traffic.iter().try_for_each(|traffic| traffic.flows(50));
    flows()?;
    let (before, version) = (host.property("MainPID")?, state(host)?);
    install(host, "2.deb")?;
    ensure!(state(host)?.starts_with("installed") && state(host)? != version, "{}", state(host)?);
    ensure!(host.property("MainPID")? != before && host.property("ActiveState")? == "active", "restarted");
    flows()?;
    open.echo(b"still here")?;
    traffic.into_iter().try_for_each(Traffic::all_served)
}

fn removal(host: &Host) -> Result<()> {
    install(host, "1.deb")?;
    let (steered, relayed) = (host.steer("steered")?, host.relay("relayed")?);
    ensure!(host.exists(PINS));
    let output = dpkg(host, &["--remove", "lbridge"])?;
    ensure!(state(host)?.starts_with("config-files"), "{}", state(host)?);
    ensure!(!host.exists(PROGRAM) && host.exists(CONFIG) && host.exists(RULES));
    ensure!(host.property("ActiveState")? == "inactive", "{output:?}");
    host.is_as_before().with_context(|| format!("{output:?}"))?;
    drop((steered, relayed));

    // The rules are as they were.
    install(host, "1.deb")?;
    ensure!(host.property("ActiveState")? == "active");
    ensure!(host.systemd.systemctl(&["is-enabled", UNIT])?.stdout.trim() == "enabled");
    let (_steered, _relayed) = (host.steer("steered again")?, host.relay("relayed again")?);
    Ok(())
}

fn purge(host: &Host) -> Result<()> {
    let before = written(host)?;
    install(host, "1.deb")?;
    host.lbridge(&["allow", "bridge:lab0", "8080", "8081"])?;
    ensure!(written(host)?.len() > before.len() + 10, "the test sees what is installed");
    dpkg(host, &["--purge", "lbridge"])?;
    ensure!(!state(host)?.contains("installed") && !state(host)?.contains("config-files"));
    let left: Vec<_> = written(host)?.difference(&before).cloned().collect();
    ensure!(left.is_empty(), "left: {left:?}");
    host.is_as_before()?;
    // As groups of other packages do: a file of somebody's may belong to it.
    host.run("getent", &["group", "lbridge"]).map(drop)
}

/// Lists the files that are there, but for what packages' managers and systemd note for themselves.
fn written(host: &Host) -> Result<BTreeSet<PathBuf>> {
    let own = [
        "/etc/.pwd.lock",
        "/etc/group",
        "/etc/group-",
        "/etc/gshadow",
        "/etc/gshadow-",
        "/var/cache",
        "/var/lib/dpkg",
        "/var/lib/systemd",
        "/var/log",
    ];
    let mut written = BTreeSet::new();
    for folder in ["/etc", "/usr", "/var"] {
        written.extend(host.systemd.written(folder)?);
    }
    written
        .retain(|path| host.exists(&path.to_string_lossy()) && !own.iter().any(|own| path.starts_with(own)));
    // A folder that was there before is new only in what is in it.
    written.retain(|path| {
        !host.root.join(path.strip_prefix("/").unwrap_or(path)).is_dir() || !host.systemd.path(path).is_dir()
    });
    let state = host.systemd.written("/var/lib/systemd")?;
    written.extend(state.into_iter().filter(|path| path.to_string_lossy().contains("lbridge")));
    Ok(written)
}

fn a_start_that_fails_does_not_stop_dpkg() -> Result<()> {
    let host = Host::boot(Path::new("/"))?;
    install(&host, "1.deb")?;
    fs::write(host.systemd.path(CONFIG), "[[rule]\n")?;
    install(&host, "2.deb")?;
    ensure!(state(&host)?.starts_with("installed"));
    ensure!(host.property("ActiveState")? != "active", "the configuration cannot be read");
    ensure!(fs::read_to_string(host.systemd.path(CONFIG))? == "[[rule]\n", "the administrator's file");
    fs::write(host.systemd.path(CONFIG), "")?;
    // systemd has tried again and again.
    host.systemd.must(&["reset-failed", UNIT])?;
    host.systemd.must(&["restart", UNIT])?;
    fs::write(host.systemd.path(CONFIG), "[[rule]\n")?;
    dpkg(&host, &["--remove", "lbridge"])?;
    host.is_as_before()
}

fn what_the_administrator_disabled_stays_disabled() -> Result<()> {
    let host = Host::boot(Path::new("/"))?;
    install(&host, "1.deb")?;
    host.systemd.must(&["disable", "--now", UNIT])?;
    install(&host, "2.deb")?;
    ensure!(host.property("ActiveState")? == "inactive", "disabled and stopped");
    ensure!(host.systemd.systemctl(&["is-enabled", UNIT])?.stdout.trim() == "disabled");
    Ok(())
}

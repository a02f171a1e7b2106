//! Starts of the daemon on a host that is not as it should be, and what is left then: everything as it was.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::suite::Test;
use lbridge_tests::harness::{pins, sandbox};
use lbridge_tests::tests;

use crate::{CONFIG, one_line, state};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        rules_that_cannot_be_saved_are_not_in_force,
        corrupted_rules_file_is_refused,
        corrupted_configuration_is_refused,
        no_cgroup2_is_refused,
        no_bpffs_is_refused,
        pins_of_others_are_left_alone,
        folders_of_others_are_refused,
        files_that_others_can_change_are_refused,
        cleanup_leaves_folders_of_others_alone,
    ]
}

/// A state folder that cannot be written to.
fn rules_that_cannot_be_saved_are_not_in_force() -> Result<()> {
    use nix::mount::{MsFlags, mount, umount};

    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let _other = scene.service("other", "127.0.0.1:8081")?;
    scene.allow(&["8080"])?;
    let before = state(&scene.daemon)?;
    let folder = scene.daemon.state_dir();
    let none: Option<&str> = None;
    mount(Some(&folder), &folder, none, MsFlags::MS_BIND, none)?;
    mount(none, &folder, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)?;
    for arguments in [["allow", "bridge:lab0", "8081"], ["deny", "bridge:lab0", "8080"]] {
        let output = scene.daemon.cli(&arguments)?;
        let line = one_line(&output, 1)?;
        ensure!(line.contains("rules.toml") || line.contains("state"), "says what: {line}");
        ensure!(state(&scene.daemon)? == before, "{arguments:?} changed {before:?}");
    }
    scene.refused(8081)?;
    scene.served(8080, "service")?;
    umount(&folder)?;
    scene.allow(&["8081"])?;
    scene.served(8081, "other")?;
    scene.daemon.restart()?;
    scene.served(8081, "other").map(drop)
}

/// `file:4:8: …` or `… line 4 …`
fn names_line(said: &str, line: usize) -> bool {
    said.contains(&format!(".toml:{line}:")) || said.contains(&format!("line {line}"))
}

/// Starting without these rules would cut off what they serve.
fn corrupted_rules_file_is_refused() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.allow(&["81=8080", "--source", "loopback"])?;
    scene.daemon.terminate()?;
    let path = scene.daemon.rules_file();
    let good = fs::read_to_string(&path)?;
    let files = pins::files(scene.daemon.bpffs())?;
    let entries = pins::entries(scene.daemon.bpffs())?;
    ensure!(!files.is_empty() && good.contains("8080"), "{good}");

    let line_with = |what: &str| -> Result<usize> {
        Ok(good.lines().position(|line| line.contains(what)).context("a line")? + 1)
    };
    let broken: Vec<(String, usize)> = vec![
        // Text that is not TOML, at the end.
        (format!("{good}this is no rule\n"), good.lines().count() + 1),
        // A port that is none.
        (good.replacen("\"8080\"", "\"80800\"", 1), line_with("\"8080\"")?),
        // A target that is not loopback.
        (good.replacen("\"81=8080\"", "\"81=10.0.0.1:8080\"", 1), line_with("\"81=8080\"")?),
        // A word that is none.
        (good.replacen("\"loopback\"", "\"loopbak\"", 1), line_with("\"loopback\"")?),
        // Cut off in the middle of a string, as by a full disk.
        (good[..good.rfind("loopb").context("a place")?].to_owned(), line_with("\"loopback\"")?),
    ];
    for (text, line) in broken {
        ensure!(text != good, "not broken");
        fs::write(&path, &text)?;
        let output = scene.daemon.start_refused()?;
        ensure!(output.status == 1, "{output:?}");
        let said = output.stderr.lines().last().unwrap_or_default().to_owned();
        ensure!(said.contains("rules.toml"), "names the file: {output:?}");
        ensure!(names_line(&said, line), "names line {line} of\n{text}\nbut says {said}");
        ensure!(fs::read_to_string(&path)? == text, "the file is untouched");
        ensure!(pins::files(scene.daemon.bpffs())? == files, "the pins are untouched");
        ensure!(pins::entries(scene.daemon.bpffs())? == entries, "the maps are untouched");
        scene.served(8080, "service")?;
    }
    fs::write(&path, good)?;
    scene.daemon.restart()?;
    scene.must_be(8080, "steered")?;
    scene.served(81, "service").map(drop)
}

fn corrupted_configuration_is_refused() -> Result<()> {
    let mut scene = Scene::with(V4, Options { config: CONFIG.to_owned(), ..Options::default() })?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.soon_served(8080, "service")?;
    scene.daemon.terminate()?;
    let files = pins::files(scene.daemon.bpffs())?;
    for (text, line) in [
        (CONFIG.replace("port = \"8080\"", "port = \"0\""), 4),
        (CONFIG.replace("source = \"loopback\"", "sauce = \"loopback\""), 10),
        (format!("{CONFIG}\n[rule"), 12),
    ] {
        fs::write(scene.daemon.config(), &text)?;
        let output = scene.daemon.start_refused()?;
        let said = output.stderr.lines().last().unwrap_or_default().to_owned();
        ensure!(output.status == 1 && said.contains("lbridge.toml"), "{output:?}");
        ensure!(names_line(&said, line), "names line {line} of\n{text}\nbut says {said}");
        ensure!(pins::files(scene.daemon.bpffs())? == files, "the pins are untouched");
        scene.served(8080, "service")?;
    }
    Ok(())
}

/// Refused with one line; no file, no pin.
fn refused_at_start(options: Options, word: &str) -> Result<()> {
    let lab = Lab::new()?;
    let mut daemon = Daemon::prepare(lab.host(), options)?;
    let output = daemon.start_refused()?;
    let line = one_line(&output, 1)?;
    ensure!(line.contains(word), "says what is missing ({word}): {line}");
    ensure!(
        pins::files(Path::new(sandbox::BPFFS))?.iter().all(|path| path.extension().is_some()),
        "pins are left"
    );
    ensure!(!daemon.socket().exists(), "a socket is left");
    Ok(())
}

fn no_cgroup2_is_refused() -> Result<()> {
    let folder = tempfile::tempdir_in("/run")?;
    refused_at_start(Options { cgroup: folder.path().to_owned(), ..Options::default() }, "cgroup2")?;
    let missing = folder.path().join("missing");
    refused_at_start(Options { cgroup: missing, ..Options::default() }, "missing")
}

fn no_bpffs_is_refused() -> Result<()> {
    let folder = tempfile::tempdir_in("/run")?;
    refused_at_start(Options { bpffs: folder.path().to_owned(), ..Options::default() }, "bpffs")?;
    ensure!(fs::read_dir(folder.path())?.next().is_none(), "nothing was left in it");
    refused_at_start(Options { bpffs: folder.path().join("not/there"), ..Options::default() }, "bpffs")
}

/// Other programs pin on the same file system, and a slip of the pin directory must not cost them theirs.
fn pins_of_others_are_left_alone() -> Result<()> {
    let root = Path::new(sandbox::BPFFS);
    let others = [root.join("cilium/v7"), root.join("v7")];
    for folder in &others {
        fs::create_dir_all(folder)?;
    }
    refused_at_start(Options { bpffs: root.to_owned(), ..Options::default() }, "mount point")?;
    ensure!(others.iter().all(|folder| folder.exists()), "what is not ours was removed");

    let own = root.join("own");
    let (foreign, outdated) = (own.join("foreign"), own.join("v7"));
    fs::create_dir_all(&foreign)?;
    fs::create_dir_all(&outdated)?;
    let lab = Lab::new()?;
    let _daemon = Daemon::start_with(lab.host(), Options { bpffs: own, ..Options::default() })?;
    ensure!(foreign.exists(), "what is not ours was removed");
    ensure!(!outdated.exists(), "what another version pinned goes once this one's is in force");
    Ok(())
}

/// Any user but root.
const USER: u32 = 54_321;

/// Runs a shell command as a user without privileges.
fn as_user(command: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", command]).uid(USER).gid(USER).current_dir("/").status()?;
    ensure!(status.success(), "{command}: {status}");
    Ok(())
}

fn as_root(command: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", command]).status()?;
    ensure!(status.success(), "{command}: {status}");
    Ok(())
}

/// Everything below the bpffs, with owners and modes.
fn everything_pinned() -> Result<String> {
    let output = Command::new("find").args([sandbox::BPFFS, "-printf", "%p %U %m %y\\n"]).output()?;
    ensure!(output.status.success(), "{output:?}");
    let mut lines: Vec<_> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines.join("\n"))
}

/// On a bpffs that was mounted without options everybody may make a folder, rename it later, and keep old
/// programs attached by that.
fn folders_of_others_are_refused() -> Result<()> {
    let lab = Lab::new()?;
    let root = Path::new(sandbox::BPFFS);
    ensure!(fs::metadata(root)?.permissions().mode() & 0o7777 == 0o1777, "as mount(8) makes it");
    let attempt = |daemon: &mut Daemon, culprit: &Path, remedy: &str| -> Result<()> {
        let before = everything_pinned()?;
        let output = daemon.start_refused()?;
        let line = one_line(&output, 1)?;
        ensure!(line.contains(&culprit.display().to_string()), "says what: {line}");
        ensure!(line.ends_with(&format!("type: {remedy}")), "says what to type ({remedy}): {line}");
        let finding = Report::of(daemon)?.must("bpffs", "problem")?;
        ensure!(finding.remedy == [remedy], "{finding:?}");
        ensure!(everything_pinned()? == before, "nothing is changed");
        ensure!(!daemon.socket().exists(), "a socket is left");
        Ok(())
    };

    let default = root.join("lbridge");
    let mut daemon = Daemon::prepare(lab.host(), Options::default())?;
    let remove = format!("rm -r {}", default.display());
    for trap in [
        "mkdir -m 700 /sys/fs/bpf/lbridge",
        "mkdir -m 777 /sys/fs/bpf/lbridge",
        "mkdir -p /sys/fs/bpf/lbridge/v1",
        "mkdir /sys/fs/bpf/mine && ln -s mine /sys/fs/bpf/lbridge",
        "mkdir -p /sys/fs/bpf/mine && ln -s /sys/fs/bpf/mine /sys/fs/bpf/lbridge",
    ] {
        as_user(trap)?;
        attempt(&mut daemon, &default, &remove).context(trap)?;
        as_root(&remove)?;
        daemon.restart().with_context(|| format!("after {remove}"))?;
        daemon.terminate()?;
        as_root(&remove)?;
    }

    // Root's own, but open to others: what is in it may be theirs.
    for mode in ["777", "1777", "770"] {
        as_root(&format!("mkdir -m {mode} {0} && chgrp {USER} {0}", default.display()))?;
        let remedy = format!("chmod go-w {}", default.display());
        attempt(&mut daemon, &default, &remedy).context(mode)?;
        as_root(&remedy)?;
        daemon.restart()?;
        daemon.terminate()?;
        as_root(&remove)?;
    }
    // The folder of the version in it.
    daemon.restart()?;
    daemon.terminate()?;
    let version = fs::read_dir(&default)?.next().context("a version")??.path();
    as_root(&format!("rm -r {} && chmod 777 {}", version.display(), default.display()))?;
    as_user(&format!("mkdir {}", version.display()))?;
    as_root("chmod 700 /sys/fs/bpf/lbridge")?;
    attempt(&mut daemon, &version, &format!("rm -r {}", version.display()))?;
    // And a pin in that.
    as_root(&format!("chown root {0} && chmod 777 {0} {1}", version.display(), default.display()))?;
    let pin = version.join("ENTRIES");
    as_user(&format!("mkdir {}", pin.display()))?;
    as_root(&format!("chmod 700 {} {}", version.display(), default.display()))?;
    let line = daemon.start_refused()?.stderr;
    ensure!(line.contains(&format!("type: rm -r {}", pin.display())), "{line}");
    as_root(&remove)?;

    // A folder of root's in one of somebody else's.
    as_user("mkdir -p /sys/fs/bpf/theirs")?;
    as_root("mkdir -m 700 /sys/fs/bpf/theirs/lbridge")?;
    let options = Options { bpffs: root.join("theirs/lbridge"), ..Options::default() };
    let mut inside = Daemon::prepare(lab.host(), options)?;
    attempt(&mut inside, &root.join("theirs"), "chown root:root /sys/fs/bpf/theirs")?;
    as_root("chown root:root /sys/fs/bpf/theirs")?;
    inside.restart()?;
    Ok(())
}

/// Whoever can change the rules, or the configuration, has root open ports.
fn files_that_others_can_change_are_refused() -> Result<()> {
    let lab = Lab::new()?;
    let mut daemon =
        Daemon::start_with(lab.host(), Options { config: CONFIG.to_owned(), ..Options::default() })?;
    let (state, config) = (daemon.state_dir(), daemon.config());
    let socket = daemon.socket().parent().context("a folder")?.to_owned();
    let own = |path: &Path| format!("chown root:root {}", path.display());
    let narrow = |path: &Path| format!("chmod go-w {}", path.display());
    let theirs = |path: &Path| format!("chown {USER} {}", path.display());
    let open = |path: &Path| format!("chmod 666 {}", path.display());
    let open_folder = |path: &Path| format!("chmod 777 {}", path.display());
    let traps = [
        (theirs(&state), own(&state)),
        (open_folder(&state), narrow(&state)),
        (theirs(&config), own(&config)),
        (open(&config), narrow(&config)),
        (theirs(&socket), own(&socket)),
        (open_folder(&socket), narrow(&socket)),
    ];
    // A reload reads the file again.
    as_root(&traps[2].0)?;
    let line = one_line(&daemon.cli(&["reload"])?, 1)?.to_owned();
    ensure!(line.contains(&own(&config)) && line.contains("what was read before is in force"), "{line}");
    as_root(&own(&config))?;
    ensure!(daemon.cli(&["reload"])?.status == 0);
    daemon.terminate()?;
    for (trap, remedy) in traps {
        as_root(&trap)?;
        let output = daemon.start_refused()?;
        let line = one_line(&output, 1)?;
        ensure!(line.ends_with(&format!("type: {remedy}")), "after {trap}: {line}");
        as_root(&remedy)?;
        daemon.restart().with_context(|| format!("after {remedy}"))?;
        daemon.terminate()?;
    }
    Ok(())
}

/// Root is not to remove or detach what somebody has put where the daemon's things are to be.
fn cleanup_leaves_folders_of_others_alone() -> Result<()> {
    let lab = Lab::new()?;
    let daemon = Daemon::prepare(lab.host(), Options::default())?;
    let cleanup = || {
        let (bpffs, state) = (daemon.bpffs().display().to_string(), daemon.state_dir().display().to_string());
        daemon.cli(&["service", "cleanup", "--bpffs", &bpffs, "--state-dir", &state])
    };
    // It would follow the link, and detach what is pinned there.
    as_root("mkdir -p /sys/fs/bpf/other/v2")?;
    for trap in ["mkdir -p /sys/fs/bpf/lbridge/v2", "ln -s other /sys/fs/bpf/lbridge"] {
        as_user(trap)?;
        let before = everything_pinned()?;
        let output = cleanup()?;
        let line = one_line(&output, 1)?;
        ensure!(line.contains("/sys/fs/bpf/lbridge ") && line.contains("user 54321"), "{line}");
        ensure!(everything_pinned()? == before, "nothing is removed");
        as_root("rm -r /sys/fs/bpf/lbridge")?;
    }
    as_root("mkdir -p -m 700 /sys/fs/bpf/lbridge && ln -s ../other/v2 /sys/fs/bpf/lbridge/v2")?;
    ensure!(cleanup()?.status == 0);
    ensure!(!Path::new("/sys/fs/bpf/lbridge").exists() && Path::new("/sys/fs/bpf/other/v2").exists());
    Ok(())
}

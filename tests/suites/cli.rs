//! The contract of commands, files and the control API: what is said, with which exit status, and that nothing is
//! half-applied.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{self, Daemon, Options, Output};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::suite::{Need, Suite};
use lbridge_tests::harness::{pins, sandbox};
use lbridge_tests::tests;

fn main() {
    const NEEDS: &[Need] = &[Need::Root, Need::Cgroup2, Need::Program("ip"), Need::Lbridge];
    const SETPRIV: Need = Need::Program("setpriv");
    const CURL: Need = Need::Program("curl");
    let tests = tests![
        bad_arguments_are_usage_errors,
        one_bad_port_spoils_the_whole_command,
        no_daemon_is_status_3,
        help_version_and_completions_need_no_daemon,
        allow_is_idempotent,
        conflict_is_status_4_and_changes_nothing,
        deny_of_a_missing_rule_is_status_4,
        config_rules_are_read_only,
        rules_survive_restarts,
        many_commands_at_once,
        list_and_status_tell_people_and_programs,
        rules_that_cannot_be_saved_are_not_in_force,
        corrupted_rules_file_is_refused,
        corrupted_configuration_is_refused,
        no_cgroup2_is_refused,
        no_bpffs_is_refused,
        pins_of_others_are_left_alone,
        daemon_without_privilege_is_refused: [SETPRIV],
        command_without_privilege_is_refused: [SETPRIV],
        members_of_the_group_are_served: [SETPRIV],
        api_over_curl: [CURL],
        api_refuses_others: [CURL, SETPRIV],
        api_validates_what_it_gets: [CURL],
    ];
    Suite::new(NEEDS, tests).main()
}

/// Failed with this status, silent on stdout and one line on stderr.
fn one_line(output: &Output, status: i32) -> Result<&str> {
    ensure!(output.status == status, "status {status} expected: {output:?}");
    ensure!(output.stdout.is_empty(), "nothing on stdout: {output:?}");
    let lines: Vec<_> = output.stderr.lines().collect();
    ensure!(lines.len() == 1 && lines[0].len() > 10, "one line on stderr: {output:?}");
    Ok(lines[0])
}

/// What a command might have changed.
#[derive(Debug, PartialEq, Eq)]
struct State {
    rules: serde_json::Value,
    file: Option<Vec<u8>>,
    entries: std::collections::BTreeMap<String, usize>,
}

fn state(daemon: &Daemon) -> Result<State> {
    let rules = daemon.status()?["rules"].take();
    let entries = pins::entries(daemon.bpffs())?;
    Ok(State { rules, file: fs::read(daemon.rules_file()).ok(), entries })
}

fn bad_arguments_are_usage_errors() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let before = state(&scene.daemon)?;
    let ports = [
        "",
        "0",
        "65536",
        "70000",
        "99999999999999999999999",
        "-1",
        "+80",
        "abc",
        "8o8o",
        "0x50",
        "1.5",
        " 8080",
        "8080 ",
        "８０８０",
        "8080,8081",
        "8080=",
        "=8080",
        "=",
        "8080=0",
        "8080=65536",
        "8080=127.0.0.1",
        "8080=127.0.0.1:0",
        "8080=127.0.0.1:65536",
        "8080=10.0.0.1:80",
        "8080=0.0.0.0:80",
        "8080=192.168.1.1:5432",
        "8080=128.0.0.1:80",
        "8080=[::]:80",
        "8080=[::2]:80",
        "8080=[fe80::1]:80",
        "8080=[::ffff:10.0.0.1]:80",
        "8080=::1:80",
        "8080=localhost:80",
        "8080=example.org:80",
        "8080=unix:relative/path",
        "8080=unix:",
        "8080=tcp:80",
        "8080=8081=8082",
        "8010-8000",
        "0-10",
        "65530-65536",
        "8000-",
        "-8010",
        "8000-8010-8020",
        "8000-8010=9000",
        "all",
        "*",
    ];
    for port in ports {
        for command in ["allow", "deny"] {
            let output = scene.daemon.cli(&[command, "bridge:lab0", "--", port])?;
            let line = one_line(&output, 2).with_context(|| format!("{command} {port:?}"))?;
            ensure!(!line.contains("panicked"), "{line}");
        }
    }
    let networks = [
        "",
        " ",
        "bridge:",
        "bridge:a/b",
        "bridge:a b",
        "bridge:sixteen_letters_",
        "bridge:..",
        "container:web",
        "netns:/run/netns/x",
        "pid:1",
        "pid:",
        "two words",
        "new\nline",
        "\u{1b}[31m",
    ];
    for network in networks {
        for command in ["allow", "deny"] {
            let output = scene.daemon.cli(&[command, "--", network, "8080"])?;
            let line = one_line(&output, 2).with_context(|| format!("{command} {network:?}"))?;
            ensure!(!line.contains('\u{1b}'), "acts on the terminal: {line:?}");
        }
    }
    let others: &[&[&str]] = &[
        &[],
        &["allow"],
        &["allow", "bridge:lab0"],
        &["deny"],
        &["deny", "bridge:lab0"],
        &["bogus"],
        &["allow", "bridge:lab0", "8081", "--source", "nobody"],
        &["allow", "bridge:lab0", "8081", "--path", "fast"],
        &["allow", "bridge:lab0", "8081", "--bogus"],
        &["allow", "bridge:lab0", "8081", "--comment", "two\nlines"],
        &["status", "extra"],
        &["completions", "tcsh"],
    ];
    for arguments in others {
        let output = scene.daemon.cli(arguments)?;
        ensure!(output.status == 2, "{arguments:?}: {output:?}");
        ensure!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}: {output:?}");
        if !arguments.is_empty() {
            one_line(&output, 2).with_context(|| format!("{arguments:?}"))?;
        }
    }
    ensure!(state(&scene.daemon)? == before, "something was applied: {before:?}");
    scene.served(8080, "service").map(drop)
}

fn one_bad_port_spoils_the_whole_command() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let before = state(&scene.daemon)?;
    for ports in [["8080", "0"], ["0", "8080"], ["8080", "8081=10.0.0.1:80"]] {
        let output = scene.daemon.cli(&[&["allow", "bridge:lab0"], ports.as_slice()].concat())?;
        one_line(&output, 2)?;
    }
    // One dialled port, two targets.
    let output = scene.daemon.cli(&["allow", "bridge:lab0", "8080", "8080=9090"])?;
    ensure!(output.status == 2 || output.status == 4, "{output:?}");
    one_line(&output, output.status)?;
    ensure!(state(&scene.daemon)? == before);
    scene.refused(8080)
}

fn no_daemon_is_status_3() -> Result<()> {
    let lab = Lab::new()?;
    let mut daemon = Daemon::prepare(lab.host(), Options::default())?;
    let commands: &[&[&str]] = &[
        &["allow", "bridge:lab0", "8080"],
        &["deny", "bridge:lab0", "8080"],
        &["list"],
        &["status"],
        &["status", "--json"],
    ];
    let all_say_so = |daemon: &Daemon| -> Result<()> {
        for command in commands {
            let output = daemon.cli(command)?;
            let line = one_line(&output, 3)?;
            ensure!(line.contains("lbridge run") || line.contains("systemctl"), "says what to do: {line}");
        }
        Ok(())
    };
    all_say_so(&daemon).context("never started")?;
    // With the socket's file left behind.
    daemon.restart()?;
    ensure!(daemon.cli(&["status"])?.status == 0);
    daemon.kill9()?;
    all_say_so(&daemon).context("killed")?;
    daemon.restart()?;
    daemon.terminate()?;
    all_say_so(&daemon).context("terminated")?;
    ensure!(fs::read_dir(daemon.state_dir())?.flatten().all(|entry| entry.file_name() != "rules.toml.tmp"));
    // A bad argument is a bad argument, daemon or not.
    one_line(&daemon.cli(&["allow", "bridge:lab0", "0"])?, 2).map(drop)
}

fn help_version_and_completions_need_no_daemon() -> Result<()> {
    let lab = Lab::new()?;
    let daemon = Daemon::prepare(lab.host(), Options::default())?;
    for arguments in [["--help"].as_slice(), &["allow", "--help"], &["--version"], &["help"]] {
        let output = daemon.cli(arguments)?;
        ensure!(output.status == 0 && !output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let output = daemon.cli(&["completions", shell])?;
        ensure!(output.status == 0 && output.stderr.is_empty(), "{shell}: {output:?}");
        ensure!(output.stdout.contains("lbridge") && output.stdout.contains("allow"), "{shell}: {output:?}");
    }
    let script = daemon.cli(&["completions", "bash"])?.stdout;
    let parsed = Command::new("bash").args(["-n", "-c", &script]).output()?;
    ensure!(parsed.status.success() && parsed.stderr.is_empty(), "{parsed:?}");
    Ok(())
}

fn allow_is_idempotent() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080", "8090-8094"])?;
    let before = state(&scene.daemon)?;
    scene.allow(&["8080", "8090-8094"])?;
    scene.allow(&["8092"])?;
    // The same, spelled out.
    scene.allow(&["8080=8080", "--source", "container", "--path", "auto"])?;
    ensure!(state(&scene.daemon)? == before, "{before:?}");
    scene.served(8080, "service").map(drop)
}

fn conflict_is_status_4_and_changes_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let _other = scene.service("other", "127.0.0.1:9090")?;
    scene.allow(&["8080"])?;
    let before = state(&scene.daemon)?;
    let conflicts: &[&[&str]] = &[
        &["8080=9090"],
        &["8080=[::1]:8080"],
        &["8080", "--source", "loopback"],
        &["8080", "--path", "relay"],
        // The other ports of the same command are not opened either.
        &["8070", "8080=9090", "8090"],
        &["8079-8081", "--source", "loopback"],
    ];
    for arguments in conflicts {
        let output = scene.daemon.cli(&[&["allow", "bridge:lab0"], *arguments].concat())?;
        let line = one_line(&output, 4).with_context(|| format!("{arguments:?}"))?;
        ensure!(line.contains("8080") && line.contains("deny"), "says with what, and what to do: {line}");
        ensure!(state(&scene.daemon)? == before, "{arguments:?} changed {before:?}");
    }
    scene.served(8080, "service").map(drop)
}

fn deny_of_a_missing_rule_is_status_4() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let before = state(&scene.daemon)?;
    for arguments in [
        ["bridge:lab0", "8081"].as_slice(),
        &["bridge:lab1", "8080"],
        &["lab0", "8080"],
        // One of them is there.
        &["bridge:lab0", "8080", "8081"],
        &["bridge:lab0", "8079-8080"],
    ] {
        let output = scene.daemon.cli(&[&["deny"], arguments].concat())?;
        one_line(&output, 4).with_context(|| format!("{arguments:?}"))?;
        ensure!(state(&scene.daemon)? == before, "{arguments:?} changed {before:?}");
    }
    scene.deny(&["8080"])?;
    one_line(&scene.daemon.cli(&["deny", "bridge:lab0", "8080"])?, 4)?;
    scene.refused(8080)
}

const CONFIG: &str = r#"
[[rule]]
network = "bridge:lab0"
port = "8080"
comment = "from the file"

[[rule]]
network = "bridge:lab0"
port = "82=127.0.0.1:8082"
source = "loopback"
"#;

fn config_rules_are_read_only() -> Result<()> {
    let scene = Scene::with(V4, Options { config: CONFIG.to_owned(), ..Options::default() })?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let _other = scene.service("other", "127.0.0.1:8082")?;
    scene.soon_served(8080, "service")?;
    let greeting = scene.soon_served(82, "other")?;
    ensure!(greeting.peer.ip().is_loopback(), "{greeting:?}");
    let rule = scene.daemon.rule("bridge:lab0", 8080)?.context("the rule")?;
    ensure!(rule["origin"] == "config" && rule["comment"] == "from the file", "{rule}");
    let before = state(&scene.daemon)?;
    one_line(&scene.daemon.cli(&["deny", "bridge:lab0", "8080"])?, 4)?;
    one_line(&scene.daemon.cli(&["allow", "bridge:lab0", "8080=9090"])?, 4)?;
    // The same rule once more is no conflict, and does not become the CLI's.
    scene.allow(&["8080"])?;
    ensure!(state(&scene.daemon)?.rules == before.rules);
    ensure!(fs::read_to_string(scene.daemon.config())? == CONFIG, "the file is the administrator's");
    scene.served(8080, "service").map(drop)
}

fn rules_survive_restarts() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let comment = "\"quotes\", 'more' # and [brackets] = grün \\ $HOME";
    scene.allow(&["8080", "--comment", comment])?;
    scene.allow(&["81=8080", "--source", "loopback"])?;
    scene.allow(&["83=127.0.0.1:8080", "--path", "relay"])?;
    scene.allow(&["84=[::1]:8080", "9000-9003"])?;
    scene.daemon.allow(&["network-to-come", "8080"])?;
    let rules = |daemon: &Daemon| -> Result<Vec<serde_json::Value>> {
        let mut rules = daemon.status()?["rules"].as_array().context("rules")?.clone();
        for rule in &mut rules {
            rule["gateways"].take();
        }
        Ok(rules)
    };
    let before = rules(&scene.daemon)?;
    ensure!(before.len() == 9, "{before:?}");
    ensure!(before.iter().any(|rule| rule["comment"] == comment && rule["origin"] == "cli"), "{before:?}");
    for kill in [false, true] {
        if kill {
            scene.daemon.kill9()?;
        }
        scene.daemon.restart()?;
        ensure!(rules(&scene.daemon)? == before, "{before:?}");
        scene.served(8080, "service")?;
        scene.served(81, "service")?;
        scene.served(83, "service")?;
    }
    Ok(())
}

fn many_commands_at_once() -> Result<()> {
    let mut scene = Scene::new()?;
    let daemon = &scene.daemon;
    thread::scope(|scope| {
        let commands: Vec<_> = (9000..9016)
            .map(|port: u16| scope.spawn(move || daemon.allow(&["bridge:lab0", &port.to_string()])))
            .collect();
        commands.into_iter().try_for_each(|command| {
            command.join().map_err(|_| anyhow::anyhow!("a command's thread"))?.map(drop)
        })
    })?;
    let rules = |daemon: &Daemon| Ok::<_, anyhow::Error>(daemon.status()?["rules"].as_array().map(Vec::len));
    ensure!(rules(&scene.daemon)? == Some(16));
    scene.daemon.restart()?;
    ensure!(rules(&scene.daemon)? == Some(16), "every one was saved");
    Ok(())
}

fn list_and_status_tell_people_and_programs() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    for command in ["list", "status"] {
        let output = scene.daemon.cli(&[command])?;
        ensure!(output.status == 0 && !output.stdout.is_empty(), "no rules is no error: {output:?}");
    }
    let output = scene.daemon.allow(&["bridge:lab0", "8080", "--comment", "for the app"])?;
    ensure!(output.stdout.contains("steered") && output.stdout.lines().count() == 1, "{output:?}");
    scene.allow(&["8081"])?;

    let list = scene.daemon.cli(&["list"])?;
    ensure!(list.stdout.contains("bridge:lab0") && list.stdout.contains("for the app"), "{list:?}");
    let status = scene.daemon.cli(&["status"])?;
    for word in ["bridge:lab0", "10.7.0.1:8080", "127.0.0.1:8080", "steered", "waiting", "nothing listens"] {
        ensure!(status.stdout.contains(word), "{word} in {status:?}");
    }
    ensure!(!status.stdout.contains('\u{1b}'), "no colours in a pipe: {status:?}");

    let list = scene.daemon.cli(&["list", "--json"])?;
    let list: serde_json::Value = serde_json::from_str(&list.stdout).with_context(|| list.stdout.clone())?;
    ensure!(!list.is_null(), "{list}");
    let allowed = scene.daemon.allow(&["bridge:lab0", "8080", "--json"])?;
    let allowed: serde_json::Value = serde_json::from_str(&allowed.stdout)?;
    ensure!(allowed[0]["state"] == "steered", "{allowed}");

    let status = scene.daemon.status()?;
    ensure!(status["version"].is_string() && status["docker"]["state"] == "off", "{status}");
    let rule = scene.daemon.rule("bridge:lab0", 8080)?.context("the rule")?;
    for (field, value) in [
        ("target", "127.0.0.1:8080"),
        ("source", "container"),
        ("path", "auto"),
        ("comment", "for the app"),
        ("origin", "cli"),
        ("state", "steered"),
    ] {
        ensure!(rule[field] == value, "{field} should be {value}: {rule}");
    }
    let gateway = &rule["gateways"][0];
    ensure!(gateway["address"] == "10.7.0.1" && gateway["interface"] == "lab0", "{rule}");
    Ok(())
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

/// The program where every user can execute it.
fn public_binary() -> Result<PathBuf> {
    let folder = Path::new("/run/bin");
    fs::create_dir_all(folder)?;
    let path = folder.join("lbridge");
    fs::copy(daemon::binary()?, &path)?;
    Ok(path)
}

/// As nobody, with these supplementary groups.
fn as_nobody(groups: &str, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", groups]).arg(program).current_dir("/");
    command
}

fn output_of(command: &mut Command) -> Result<Output> {
    Ok(command.output().with_context(|| format!("{command:?}"))?.into())
}

fn daemon_without_privilege_is_refused() -> Result<()> {
    let program = public_binary()?;
    let folder = Path::new("/run/nobody");
    fs::create_dir(folder)?;
    nix::unistd::chown(folder, Some(65534.into()), Some(65534.into()))?;
    let mut command = as_nobody("--clear-groups", &program);
    command.args(["run", "--no-docker", "--socket", "/run/nobody/sock", "--state-dir", "/run/nobody/state"]);
    command.args(["--config", "/run/nobody/none.toml", "--cgroup", sandbox::CGROUP_ROOT]);
    let output = output_of(&mut command)?;
    let line = one_line(&output, 1)?;
    ensure!(line.contains("root"), "says what is needed: {line}");
    ensure!(!folder.join("sock").exists(), "a socket is left");
    Ok(())
}

/// A scene whose socket every user can get at, as far as the folders go.
fn public_scene() -> Result<Scene> {
    let folder = PathBuf::from("/run/public");
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    Scene::with(V4, Options { folder: Some(folder), ..Options::default() })
}

fn command_without_privilege_is_refused() -> Result<()> {
    let program = public_binary()?;
    let scene = public_scene()?;
    let before = state(&scene.daemon)?;
    for arguments in [["status"].as_slice(), &["allow", "bridge:lab0", "8080"]] {
        let mut command = as_nobody("--clear-groups", &program);
        let output = output_of(command.args(arguments).env("LBRIDGE_SOCKET", scene.daemon.socket()))?;
        let line = one_line(&output, 1)?;
        ensure!(line.contains("root") || line.contains("group"), "says who may: {line}");
    }
    // A socket whose mode somebody widened is still not for everybody.
    fs::set_permissions(scene.daemon.socket(), fs::Permissions::from_mode(0o666))?;
    let mut command = as_nobody("--clear-groups", &program);
    command.args(["allow", "bridge:lab0", "8080"]).env("LBRIDGE_SOCKET", scene.daemon.socket());
    one_line(&output_of(&mut command)?, 1)?;
    ensure!(state(&scene.daemon)? == before);
    let mode = fs::metadata(scene.daemon.state_dir())?.permissions().mode();
    ensure!(mode & 0o022 == 0, "others may write the state: {mode:o}");
    Ok(())
}

fn with_group() -> Result<()> {
    sandbox::shadow("/etc")?;
    let groups = fs::read_to_string("/etc/group")?;
    let mut lines: Vec<_> = groups.lines().filter(|line| !line.starts_with("lbridge:")).collect();
    lines.push("lbridge:x:4242:\n");
    Ok(fs::write("/etc/group", lines.join("\n"))?)
}

fn members_of_the_group_are_served() -> Result<()> {
    with_group()?;
    let program = public_binary()?;
    let scene = public_scene()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let mut command = as_nobody("--groups=4242", &program);
    command.args(["allow", "bridge:lab0", "8080"]).env("LBRIDGE_SOCKET", scene.daemon.socket());
    let output = output_of(&mut command)?;
    ensure!(output.status == 0 && output.stdout.contains("steered"), "{output:?}");
    scene.served(8080, "service")?;
    let mut command = as_nobody("--groups=4243", &program);
    command.args(["deny", "bridge:lab0", "8080"]).env("LBRIDGE_SOCKET", scene.daemon.socket());
    one_line(&output_of(&mut command)?, 1)?;
    scene.served(8080, "service").map(drop)
}

/// The answer's status and body.
fn curl(daemon: &Daemon, mut command: Command, arguments: &[&str]) -> Result<(String, String)> {
    command.args(["--silent", "--show-error", "--max-time", "5", "--write-out", "\n%{http_code}"]);
    command.arg("--unix-socket").arg(daemon.socket()).args(arguments);
    let output = output_of(&mut command)?;
    ensure!(output.status == 0, "{output:?}");
    let (body, status) = output.stdout.rsplit_once('\n').context("a status")?;
    Ok((status.to_owned(), body.to_owned()))
}

fn api_over_curl() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let (status, body) = curl(&scene.daemon, Command::new("curl"), &["http://localhost/v1/status"])?;
    let body: serde_json::Value = serde_json::from_str(&body)?;
    ensure!(status == "200", "{status} {body}");
    let mut told = scene.daemon.status()?;
    // Whatever counts may have gone on.
    let mut body = body;
    body["kernel"]["counters"].take();
    told["kernel"]["counters"].take();
    ensure!(body == told, "the CLI tells what the API tells: {body}");
    let (status, _) = curl(&scene.daemon, Command::new("curl"), &["http://localhost/nothing/here"])?;
    ensure!(status.starts_with('4'), "{status}");
    Ok(())
}

fn api_refuses_others() -> Result<()> {
    let scene = public_scene()?;
    // The file's mode first, then what the peer is.
    let refused = output_of(
        as_nobody("--clear-groups", Path::new("curl"))
            .args(["--silent", "--unix-socket"])
            .arg(scene.daemon.socket())
            .arg("http://localhost/v1/status"),
    )?;
    ensure!(refused.status != 0 && refused.stdout.is_empty(), "{refused:?}");
    fs::set_permissions(scene.daemon.socket(), fs::Permissions::from_mode(0o666))?;
    let nobody = as_nobody("--clear-groups", Path::new("curl"));
    let (status, body) = curl(&scene.daemon, nobody, &["http://localhost/v1/status"])?;
    ensure!(status == "403" && !body.contains("rules"), "{status} {body}");
    let (status, _) = curl(&scene.daemon, Command::new("curl"), &["http://localhost/v1/status"])?;
    ensure!(status == "200", "{status}");
    Ok(())
}

/// Whoever speaks HTTP instead of using the commands gets no more than they do.
fn api_validates_what_it_gets() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let before = state(&scene.daemon)?;
    let rule = |rule: &str| format!(r#"{{"rules":[{{"network":"bridge:lab0","port":"8080"}},{rule}]}}"#);
    let bodies = [
        String::new(),
        "{".to_owned(),
        "[]".to_owned(),
        "null".to_owned(),
        "{\"rules\": 5}".to_owned(),
        rule(r#"{"network":"bridge:lab0","port":"0"}"#),
        rule(r#"{"network":"bridge:lab0","port":8081}"#),
        rule(r#"{"network":"bridge:lab0","port":"81=10.0.0.1:80"}"#),
        rule(r#"{"network":"bridge:a/b","port":"81"}"#),
        rule(r#"{"network":"","port":"81"}"#),
        rule(r#"{"network":"bridge:lab0","port":"81","source":"nobody"}"#),
        rule(r#"{"network":"bridge:lab0","port":"81","sauce":"loopback"}"#),
        "[".repeat(100_000),
    ];
    for body in &bodies {
        let file = tempfile::NamedTempFile::new_in("/run")?;
        fs::write(file.path(), body)?;
        let data = format!("@{}", file.path().display());
        let json = "Content-Type: application/json";
        let arguments = ["--data-binary", &data, "--header", json, "http://localhost/v1/allow"];
        let (status, answer) = curl(&scene.daemon, Command::new("curl"), &arguments)?;
        ensure!(status.starts_with('4'), "{body:.80} -> {status} {answer}");
        ensure!(state(&scene.daemon)? == before, "{body:.80} changed {before:?}");
    }
    let (status, _) = curl(&scene.daemon, Command::new("curl"), &["http://localhost/v1/allow"])?;
    ensure!(status == "405", "GET is not POST: {status}");
    scene.refused(8080)
}

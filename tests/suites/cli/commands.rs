//! `allow`, `deny`, `list`, `status`: what they say, with which exit status, and that nothing is
//! half-applied.

use std::process::Command;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use crate::{CONFIG, one_line, state};

pub(crate) fn tests() -> Vec<Test> {
    tests![
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
        ranges_are_told_in_one_line,
        networks_in_two_words,
    ]
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
        "container:",
        "container:a/b",
        "netns:relative",
        "pid:",
        "pid:self",
        "pid:0",
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
        // It would remove whatever rule the dialled port has.
        &["deny", "bridge:lab0", "8080=9090"],
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
        &["explain", "bridge:lab0", "8080"],
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
        ensure!(output.stdout.contains("lbridge complete"), "{shell}: {output:?}");
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

fn ranges_are_told_in_one_line() -> Result<()> {
    let scene = Scene::with(("10.7.0.1/24 fd07::1/64", "10.7.0.2/24"), Options::default())?;
    let _service = scene.service("service", "127.0.0.1:8003")?;
    scene.allow(&["8000-8010"])?;
    scene.allow(&["80=9000", "81=9001"])?;
    scene.served(8003, "service")?;
    let list = scene.daemon.cli(&["list"])?.stdout;
    let words: Vec<Vec<_>> = list.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    let rows = [
        ["NETWORK", "PORT", "TARGET"],
        ["bridge:lab0", "80-81", "127.0.0.1:9000-9001"],
        ["bridge:lab0", "8000-8010", "127.0.0.1:8000-8010"],
    ];
    ensure!(words == rows, "{list}");
    let status = scene.daemon.cli(&["status"])?.stdout;
    for line in [
        "10.7.0.1:8000-8002   127.0.0.1:8000-8002  0       waiting (nothing listens on 127.0.0.1:8000-8002)",
        "[fd07::1]:8000-8002  127.0.0.1:8000-8002  0       waiting (nothing listens on [::1]:8000-8002)",
        "10.7.0.1:8003        127.0.0.1:8003       1       steered",
        "10.7.0.1:8004-8010   127.0.0.1:8004-8010  0       waiting",
        "10.7.0.1:80-81       127.0.0.1:9000-9001  0       waiting (nothing listens on 127.0.0.1:9000-9001)",
    ] {
        ensure!(status.contains(line), "{line}\nin\n{status}");
    }
    let rules = scene.daemon.status()?["rules"].as_array().map(Vec::len);
    ensure!(rules == Some(13), "one each for programs: {rules:?}");

    let allowed = scene.daemon.cli(&["allow", "bridge:lab0", "9100-9110"])?.stdout;
    let wanted = "\
bridge:lab0 9100-9110: 10.7.0.1:9100-9110 -> 127.0.0.1:9100-9110 waiting (nothing listens on \
127.0.0.1:9100-9110)
bridge:lab0 9100-9110: [fd07::1]:9100-9110 -> 127.0.0.1:9100-9110 waiting (nothing listens on [::1]:9100-9110)
";
    ensure!(allowed == wanted, "{allowed}");
    let denied = scene.daemon.cli(&["deny", "bridge:lab0", "9100-9110"])?.stdout;
    ensure!(denied == "bridge:lab0 9100-9110: denied; open connections go on\n", "{denied}");

    // Contradictions name both.
    for (ports, words) in [
        (
            ["8005=9000", "8011"],
            "bridge:lab0 8005=9000 contradicts bridge:lab0 8005, which is allowed already",
        ),
        (["7000-7010", "7005=9000"], "7005=9000 contradicts bridge:lab0 7005, both asked for at once"),
    ] {
        let output = scene.daemon.cli(&[&["allow", "bridge:lab0"], &ports[..]].concat())?;
        let line = one_line(&output, 4)?;
        ensure!(line.contains(words), "{words} in {line}");
    }
    let rules = scene.daemon.status()?["rules"].as_array().map(Vec::len);
    ensure!(rules == Some(13), "nothing half-applied: {rules:?}");
    Ok(())
}

fn networks_in_two_words() -> Result<()> {
    let scene = Scene::new()?;
    for (arguments, hint) in [
        (["allow", "pid", "29", "8080"], "did you mean pid:29?"),
        (["allow", "container", "db", "8080"], "did you mean container:db?"),
        (["allow", "bridge", "lab0", "8080"], "did you mean bridge:lab0?"),
        (["deny", "netns", "/run/netns/x", "8080"], "did you mean netns:/run/netns/x?"),
        (["explain", "pid", "29", "8080"], "did you mean pid:29?"),
    ] {
        let output = scene.daemon.cli(&arguments)?;
        let line = one_line(&output, 2)?;
        ensure!(line.contains(hint), "{hint} in {line}");
    }
    ensure!(scene.daemon.status()?["rules"] == serde_json::json!([]), "nothing was made");
    // Docker's own network; here it cannot be followed.
    scene.daemon.allow(&["bridge", "8080", "8081"]).map(drop)
}

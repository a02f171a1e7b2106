//! Completion: what `lbridge complete` offers, and what becomes of a TAB in bash, zsh and fish.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{self, Daemon, Options, Output};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;

use crate::CONFIG;
use crate::follow::terminal;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        networks_and_ports_are_offered,
        commands_options_and_values_are_offered_without_a_daemon,
        names_that_a_shell_would_interpret_are_left_out,
        no_answer_is_no_offer_and_no_error: [Need::Program("setpriv")],
        bash_completes,
        zsh_completes: [Need::Program("zsh")],
        fish_completes: [Need::Program("fish")],
    ]
}

/// Runs `lbridge complete` for these words behind `lbridge`; the last is completed.
fn complete(daemon: &Daemon, words: &[&str]) -> Result<Output> {
    daemon.cli(&[&["complete", "--", "lbridge"], words].concat())
}

/// The candidates, without what is said about them.
fn offered(daemon: &Daemon, words: &[&str]) -> Result<Vec<String>> {
    let output = complete(daemon, words)?;
    ensure!(output.status == 0 && output.stderr.is_empty(), "{words:?}: {output:?}");
    Ok(output.stdout.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect())
}

fn networks_and_ports_are_offered() -> Result<()> {
    let scene = Scene::with(V4, Options { config: CONFIG.to_owned(), ..Options::default() })?;
    scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    scene.allow(&["8070", "9000", "53/udp"])?;
    scene.daemon.allow(&["network-to-come", "8080"])?;
    let offers = [
        // The bridges of the host, and networks that rules name.
        (["allow", ""].as_slice(), ["bridge:lab0", "bridge:lab1", "network-to-come"].as_slice()),
        (&["allow", "bridge:lab1"], &["bridge:lab1"]),
        (&["deny", ""], &["bridge:lab0", "network-to-come"]),
        (&["explain", "net"], &["network-to-come"]),
        (&["verify", "bridge:"], &["bridge:lab0"]),
        // The file's rules, 8080 and 82, are not for `deny`.
        (&["deny", "bridge:lab0", ""], &["53/udp", "8070", "9000"]),
        (&["deny", "bridge:lab0", "8070", ""], &["53/udp", "9000"]),
        (&["explain", "bridge:lab0", "8"], &["82", "8070", "8080"]),
        (&["verify", "--json", "network-to-come", ""], &["8080"]),
        (&["explain", "bridge:lab0", "8080", ""], &[]),
        (&["deny", "nowhere", ""], &[]),
        (&["allow", "bridge:lab0", ""], &[]),
    ];
    for (words, expected) in offers {
        let (mut offered, mut expected) = (offered(&scene.daemon, words)?, expected.to_vec());
        offered.sort_unstable();
        expected.sort_unstable();
        ensure!(offered == expected, "{words:?}: {offered:?}, not {expected:?}");
    }
    Ok(())
}

fn commands_options_and_values_are_offered_without_a_daemon() -> Result<()> {
    let lab = Lab::new()?;
    let daemon = Daemon::prepare(lab.host(), Options::default())?;
    let offers = [
        (["al"].as_slice(), ["allow"].as_slice()),
        (&["c"], &["check-config", "completions"]),
        (&["--socket", "/x", "service", ""], &["install", "uninstall", "cleanup", "help"]),
        (&["allow", "--so"], &["--source", "--socket"]),
        (&["allow", "a", "80", "--source", ""], &["container", "loopback"]),
        (&["allow", "a", "80", "--source=l"], &["--source=loopback"]),
        (&["allow", "a", "80", "--path", "s"], &["steer"]),
        (&["completions", ""], &["bash", "zsh", "fish"]),
        // The shell completes files.
        (&["check-config", "--config", "/et"], &["/"]),
        (&["relay", "80", "--", "bwrap", "--ro"], &["/"]),
        (&["allow", "a", "--", "--so"], &[]),
        (&["bogus", ""], &[]),
        (&[], &[]),
    ];
    for (words, expected) in offers {
        let (mut offered, mut expected) = (offered(&daemon, words)?, expected.to_vec());
        offered.sort_unstable();
        expected.sort_unstable();
        ensure!(offered == expected, "{words:?}: {offered:?}, not {expected:?}");
    }
    Ok(())
}

fn names_that_a_shell_would_interpret_are_left_out() -> Result<()> {
    let scene = Scene::new()?;
    for network in ["$(id)", "`id`", "a;b", "*", "a'b", "-dash", "--purge", "~", "a\\b", "grün", "plain"] {
        scene.daemon.allow(&["--", network, "8080"])?;
    }
    let mut offered = offered(&scene.daemon, &["deny", ""])?;
    offered.sort_unstable();
    ensure!(offered == ["grün", "plain"], "{offered:?}");
    Ok(())
}

fn no_answer_is_no_offer_and_no_error() -> Result<()> {
    let silent = |output: &Output| -> Result<()> {
        ensure!(output.status == 0 && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
        Ok(())
    };
    let mut scene = Scene::new()?;
    scene.allow(&["8080"])?;
    // A user who may not use the socket.
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(daemon::binary()?);
    command.args(["complete", "--", "lbridge", "deny", ""]).env("LBRIDGE_SOCKET", scene.daemon.socket());
    silent(&command.current_dir("/").output()?.into()).context("forbidden")?;
    ensure!(offered(&scene.daemon, &["deny", ""])? == ["bridge:lab0"], "root may");
    // A daemon that does not answer.
    let start = Instant::now();
    scene.daemon.paused(|| silent(&complete(&scene.daemon, &["deny", ""])?).context("paused"))?;
    ensure!(start.elapsed() < patience::seconds(3), "it takes {:?}", start.elapsed());
    scene.daemon.terminate()?;
    for words in [["allow", ""].as_slice(), &["deny", "bridge:lab0", ""], &["allow", "app", "--from", ""]] {
        silent(&complete(&scene.daemon, words)?).context("ended")?;
    }
    Ok(())
}

/// A shell at a terminal, with lbridge's completion loaded.
struct Shell {
    terminal: File,
    said: mpsc::Receiver<Vec<u8>>,
    process: Child,
    seen: String,
}

impl Shell {
    /// Starts a shell; `setup` loads the completion and then prints `ready`.
    fn start(scene: &Scene, program: &[&str], setup: &str) -> Result<Shell> {
        let (ours, theirs) = terminal()?;
        let path = daemon::binary()?.parent().context("a folder")?.display().to_string();
        let path = format!("{path}:{}", std::env::var("PATH")?);
        // Job control wants a terminal of its own.
        let mut command = scene.lab.host().command("setsid");
        command.args(["--ctty", "--wait"]).args(program);
        command.env("PATH", path).env("LBRIDGE_SOCKET", scene.daemon.socket()).env("TERM", "xterm");
        let home = scene.daemon.state_dir();
        command.env("HOME", &home).env("LC_ALL", "C.UTF-8").current_dir(&home);
        command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
        let process = command.spawn().with_context(|| format!("start {}", program[0]))?;
        let (sender, said) = mpsc::channel();
        let mut reader = ours.try_clone()?;
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO once the other end is closed.
            while let Ok(length) = reader.read(&mut buffer)
                && length > 0
                && sender.send(buffer[..length].to_vec()).is_ok()
            {}
        });
        let mut shell = Shell { terminal: ours, said, process, seen: String::new() };
        shell.type_keys(&format!("{setup}; echo re''ady\r"))?;
        shell.wait_for("ready")?;
        Ok(shell)
    }

    fn type_keys(&mut self, keys: &str) -> Result<()> {
        Ok(self.terminal.write_all(keys.as_bytes())?)
    }

    /// Waits until the terminal shows a text; returns what it showed until then, and forgets it.
    fn wait_for(&mut self, text: &str) -> Result<String> {
        patience::until(text, || {
            while let Ok(bytes) = self.said.recv_timeout(Duration::from_millis(20)) {
                self.seen += &String::from_utf8_lossy(&bytes);
            }
            Ok(self.seen.contains(text).then(|| std::mem::take(&mut self.seen)))
        })
        .with_context(|| format!("the terminal shows {:?}", self.seen))
    }

    /// Types the keys, and has the shell print the line that they made.
    fn line(&mut self, keys: &str) -> Result<String> {
        self.type_keys(keys)?;
        // A mark at the end of the line, and echo at its start, which prints the line rather than runs it.
        self.type_keys("\u{5}'#'\u{1}echo '<''<'\r")?;
        let shown = self.wait_for("#\r\n")?;
        let line = shown.rsplit("<<").next().and_then(|rest| rest.split('#').next());
        Ok(line.unwrap_or_default().trim_end().to_owned())
    }

    fn all_complete(&mut self) -> Result<()> {
        for (keys, line) in [
            ("lbridge al\t", "lbridge allow"),
            ("lbridge deny bri\t80\t", "lbridge deny bridge:lab0 8080"),
            // The second word begins behind a colon that bash takes for a break.
            ("lbridge allow bridge:l\t", "lbridge allow bridge:lab0"),
            ("lbridge explain net\t\t", "lbridge explain network-to-come 53/udp"),
            (
                "lbridge allow a 80=127.0.0.1:3000 --pa\tst\t",
                "lbridge allow a 80=127.0.0.1:3000 --path steer",
            ),
            ("lbridge allow a 80 --source=lo\t", "lbridge allow a 80 --source=loopback"),
            ("lbridge check-config --config file-in-f\t", "lbridge check-config --config file-in-folder"),
            ("lbridge check-config --config=file-in-f\t", "lbridge check-config --config=file-in-folder"),
        ] {
            let completed = self.line(keys)?;
            ensure!(completed == line, "{keys:?} became {completed:?}");
        }
        Ok(())
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn scene() -> Result<Scene> {
    let scene = Scene::new()?;
    scene.allow(&["8080"])?;
    scene.daemon.allow(&["network-to-come", "53/udp"])?;
    fs::write(scene.daemon.state_dir().join("file-in-folder"), "")?;
    Ok(scene)
}

fn bash_completes() -> Result<()> {
    let scene = scene()?;
    let setup = "source <(lbridge completions bash)";
    Shell::start(&scene, &["bash", "--norc", "--noprofile", "-i"], setup)?.all_complete()
}

fn zsh_completes() -> Result<()> {
    let scene = scene()?;
    let setup = "autoload -U compinit; compinit -u -D; source <(lbridge completions zsh); bindkey -e";
    Shell::start(&scene, &["zsh", "-f", "-i"], setup)?.all_complete()
}

fn fish_completes() -> Result<()> {
    let scene = scene()?;
    let setup = "lbridge completions fish | source";
    Shell::start(&scene, &["fish", "--no-config", "--interactive"], setup)?.all_complete()
}

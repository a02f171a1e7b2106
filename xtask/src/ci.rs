//! ci: `cargo xtask ci` runs everything that must hold before a change goes in, step by step: the checks of
//! the sources, then the suites. `--fast` runs what needs neither root nor an engine.

use std::env;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use lbridge_tests::harness::suite::find_program;

use crate::tool::{CARGO_DENY, MDBOOK};
use crate::workspace::{line, root, run};

/// The oldest compiler that builds the workspace, from Cargo.toml.
const OLDEST_RUST: &str = env!("CARGO_PKG_RUST_VERSION");

/// Target of the static binary, whose C library declares ioctl and others with other types.
const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// Options of `cargo xtask ci`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Run only what needs neither root nor an engine: the checks of the sources, and the unit tests
    #[arg(long)]
    fast: bool,
}

/// Runs every step, also after one that failed, so that one run shows all there is to mend. The last step of
/// a full run is the suites: their summary is the last line of standard output.
///
/// # Errors
///
/// If a step failed. The error names each one.
pub(crate) fn handle(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    let mut results = Vec::new();
    for step in steps(arguments.fast) {
        results.push(step.run());
    }
    print_table(&results, start.elapsed());
    if !arguments.fast {
        results.push(suites().run());
    }
    let failed: Vec<_> = results
        .iter()
        .filter(|result| result.outcome == Outcome::Failed)
        .map(|result| result.line.as_str())
        .collect();
    if !failed.is_empty() {
        bail!("{} of {} steps failed: {}", failed.len(), results.len(), failed.join("; "));
    }
    Ok(())
}

/// Returns the suites' step, the command that README.md gives.
fn suites() -> Step {
    Step::new(cargo(&["xtask", "test", "--setup"]))
}

/// Returns the steps before the suites, in the order in which they run.
fn steps(fast: bool) -> Vec<Step> {
    let mut steps = vec![
        Step::new(cargo(&["fmt", "--all", "--check"])),
        Step::new(cargo(&["fmt", "--manifest-path=lbridge-ebpf/Cargo.toml", "--check"])),
        Step::new(cargo(&["xtask", "lint"])),
        // With all features, as for clippy: their dependencies are compiled once.
        Step::new(cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--locked",
            "--",
            "--deny=warnings",
        ])),
        Step::new(with(
            ("RUSTDOCFLAGS", "--deny=warnings"),
            cargo(&[
                "doc",
                "--workspace",
                "--no-deps",
                "--document-private-items",
                "--all-features",
                "--locked",
            ]),
        )),
    ];
    if !has_toolchain(OLDEST_RUST) {
        let mut install = Command::new("rustup");
        install.args(["toolchain", "install", OLDEST_RUST, "--profile=minimal", "--no-self-update"]);
        steps.push(Step::new(install));
    }
    let oldest = format!("+{OLDEST_RUST}");
    let toolchain = format!("--toolchain={OLDEST_RUST}");
    let target = format!("--target={STATIC_TARGET}");
    let packages: &[&str] = if fast {
        &["--workspace", "--all-targets"]
    } else {
        // One check serves two ends, as a full run's time is scarce: that the oldest compiler builds what
        // people install, and that the static binary's C library has the types that it is built with.
        let mut add = Command::new("rustup");
        add.args(["target", "add", STATIC_TARGET, &toolchain]);
        steps.push(Step::new(add));
        &[&target, "--package=lbridge"]
    };
    // In a folder of its own, or each compiler would discard what the other has made.
    steps.push(Step::new(with(
        ("CARGO_TARGET_DIR", "target/oldest-rust"),
        cargo(&[&[&oldest, "check", "--locked"], packages].concat()),
    )));
    if !fast {
        steps.push(Step::new(cargo(&["xtask", "setup"])));
        steps.push(Step::new(cargo(&["xtask", "build-ebpf", "--check"])));
    }
    // What is right is in .codespellrc.
    steps.push(Step::new(Command::new("codespell")).needs("codespell"));
    let mut subjects = Command::new("sh");
    subjects.args(["-c", "git log --no-merges --format=%s | codespell -"]);
    steps.push(Step::new(subjects).needs("codespell"));
    for tool in [&MDBOOK, &CARGO_DENY] {
        if !tool.is_there() {
            steps.push(Step::new(tool.install()));
        }
    }
    let mut book = Command::new(MDBOOK.program());
    book.args(["build", "docs/guide"]);
    steps.push(Step::new(book));
    let mut deny = Command::new(CARGO_DENY.program());
    deny.args(["--locked", "check", "bans", "licenses", "sources"]);
    steps.push(Step::new(deny));
    if fast {
        steps.push(Step::new(cargo(&["test", "--workspace", "--lib", "--bins", "--locked"])));
        steps.push(Step::new(cargo(&["test", "--workspace", "--doc", "--locked"])));
    }
    steps
}

/// Returns the Cargo on PATH, rustup's, which takes a toolchain as its first argument.
fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new("cargo");
    // With this set, Cargo takes another toolchain's for itself.
    cargo.args(arguments).env_remove("CARGO");
    cargo
}

fn with((name, value): (&str, &str), mut command: Command) -> Command {
    command.env(name, value);
    command
}

/// Returns true if rustup has this version installed, whatever the machine's target is.
fn has_toolchain(version: &str) -> bool {
    let list = crate::workspace::output(Command::new("rustup").args(["toolchain", "list"]));
    let prefix = format!("{version}-");
    list.is_ok_and(|list| list.lines().any(|name| name.starts_with(&prefix)))
}

/// A command that must succeed.
struct Step {
    command: Command,
    /// The program without which the step fails under `CI=true`, as a test's missing tool does, and is
    /// skipped elsewhere.
    needs: Option<&'static str>,
}

impl Step {
    fn new(command: Command) -> Step {
        Step { command, needs: None }
    }

    fn needs(mut self, program: &'static str) -> Step {
        self.needs = Some(program);
        self
    }

    /// Prints the command line, runs it in the root of the checkout, and prints the time that it took.
    fn run(mut self) -> StepResult {
        let line = line(&self.command);
        println!("\n== {line}");
        let start = Instant::now();
        let outcome = match self.needs {
            Some(program) if find_program(program).is_none() => {
                println!("no {program} on PATH");
                if env::var_os("CI").is_some() { Outcome::Failed } else { Outcome::Skipped }
            }
            _ => match run(self.command.current_dir(root())) {
                Ok(()) => Outcome::Passed,
                Err(error) => {
                    println!("{error:#}");
                    Outcome::Failed
                }
            },
        };
        let time = start.elapsed();
        println!("-- {outcome} after {:.1} s", time.as_secs_f64());
        StepResult { line, outcome, time }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    Skipped,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Outcome::Passed => "passed",
            Outcome::Failed => "FAILED",
            Outcome::Skipped => "skipped",
        })
    }
}

/// A step after it ran.
struct StepResult {
    line: String,
    outcome: Outcome,
    time: Duration,
}

fn print_table(results: &[StepResult], total: Duration) {
    println!();
    for StepResult { line, outcome, time } in results {
        println!("{outcome:8} {:>7.1} s  {line}", time.as_secs_f64());
    }
    println!("{:8} {:>7.1} s", "in all", total.as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Step {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Step::new(command)
    }

    #[test]
    fn an_exit_status_is_a_result() {
        assert_eq!(shell("exit 0").run().outcome, Outcome::Passed);
        assert_eq!(shell("exit 1").run().outcome, Outcome::Failed);
        assert_eq!(Step::new(Command::new("lbridge-no-such-program")).run().outcome, Outcome::Failed);
    }

    #[test]
    fn a_missing_program_is_never_a_pass() {
        let step = || shell("exit 0").needs("lbridge-no-such-program");
        assert_ne!(step().run().outcome, Outcome::Passed);
        let here = || shell("exit 1").needs("sh");
        assert_eq!(here().run().outcome, Outcome::Failed);
    }

    #[test]
    fn the_suites_are_run_by_the_readmes_command() {
        let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
        assert!(readme.lines().any(|line_there| line_there.starts_with(&line(&suites().command))));
    }
}

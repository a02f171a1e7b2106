//! test: `cargo xtask test` runs the unit tests of every package, then the suites of `lbridge-tests`, and
//! prints one summary.

use std::io::{self, BufRead, BufReader, Write};
use std::ops::AddAssign;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fmt, fs};

use anyhow::{Context, Result, ensure};

use crate::roots::roots_folder;
use crate::workspace::{cargo, root, run, target, vm_folder};
use crate::{package, setup};

/// The name of the unit tests on the command line.
const UNIT: &str = "unit";
/// The suite that installs packages.
const PACKAGES: &str = "packages";

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// First install what the suites need (Debian, root)
    #[arg(long)]
    setup: bool,
    /// Suites to run: `unit`, or a test target of tests/Cargo.toml [default: all]
    #[arg(value_name = "SUITE")]
    suites: Vec<String>,
}

/// Suites that run one test at a time, and so leave a processor to each other. They share no state.
const ONE_BY_ONE: [&str; 2] = ["docker", "podman"];

/// Runs the tests; returns true if all passed.
pub(crate) fn handle(arguments: &Arguments) -> Result<bool> {
    let known = suites(&fs::read_to_string(root().join("tests/Cargo.toml"))?)?;
    for suite in &arguments.suites {
        ensure!(known.contains(suite), "no suite {suite}, only {}", known.join(", "));
    }
    if arguments.setup {
        setup::handle()?;
    }
    // All at once: packages that are selected together are built with the same features, once.
    run(cargo().args(["build", "--workspace", "--all-targets"]))?;

    let wanted: Vec<_> = known
        .iter()
        .filter(|suite| arguments.suites.is_empty() || arguments.suites.contains(suite))
        .map(String::as_str)
        .collect();
    let mut results = Vec::new();
    for group in wanted.chunk_by(|a, b| [a, b].iter().all(|suite| ONE_BY_ONE.contains(suite))) {
        results.extend(run_group(group)?);
    }

    let mut total = Counts::default();
    println!();
    for (suite, counts, time) in results {
        println!("{suite:12} {:>7}   {counts}", Seconds(time).to_string());
        total += counts;
    }
    println!();
    println!("{total}");
    Ok(total.failed == 0)
}

/// Runs suites at the same time. The first one's output is copied as it comes, those of the others follow.
fn run_group<'a>(suites: &[&'a str]) -> Result<Vec<(&'a str, Counts, Duration)>> {
    let (first, others) = suites.split_first().context("no suite")?;
    std::thread::scope(|scope| {
        let others: Vec<_> = others
            .iter()
            .map(|suite| {
                let run = move || {
                    let mut output = Vec::new();
                    timed(suite, &mut output).map(|result| (result, output))
                };
                scope.spawn(run)
            })
            .collect();
        let mut results = vec![timed(first, &mut io::stdout())?];
        for other in others {
            let (result, output) =
                other.join().map_err(|_| anyhow::anyhow!("a suite's thread panicked"))??;
            io::stdout().write_all(&output)?;
            results.push(result);
        }
        Ok(results)
    })
}

/// Prepares and runs a suite.
fn timed<'a>(suite: &'a str, out: &mut impl Write) -> Result<(&'a str, Counts, Duration)> {
    let start = Instant::now();
    let prepared = if suite == PACKAGES { package::for_tests() } else { Ok(()) };
    let counts = match prepared {
        Ok(()) => run_suite(suite, out)?,
        // The other suites are still worth running.
        Err(error) => {
            writeln!(out, "\n== {suite}\nno packages to test: {error:#}: counted as a failure")?;
            Counts { failed: 1, ..Counts::default() }
        }
    };
    Ok((suite, counts, start.elapsed()))
}

fn run_suite(suite: &str, out: &mut impl Write) -> Result<Counts> {
    writeln!(out, "\n== {suite}")?;
    let mut counts = Counts::default();
    let selections: &[&[&str]] =
        if suite == UNIT { &[&["--lib", "--bins"], &["--doc"]] } else { &[&["--test", suite]] };
    for selection in selections {
        let mut command = cargo();
        command
            .args(["test", "--workspace", "--no-fail-fast"])
            .args(*selection)
            .env("LBRIDGE_BIN", target().join("debug/lbridge"))
            .env("LBRIDGE_VM_DIR", vm_folder())
            .env("LBRIDGE_ROOTS_DIR", roots_folder())
            .env("LBRIDGE_PACKAGES_DIR", package::test_folder());
        counts += run_counted(&mut command, out)?;
    }
    Ok(counts)
}

/// Runs a test command, copies its output to `out`, and counts the results in its summaries.
fn run_counted(command: &mut Command, out: &mut impl Write) -> Result<Counts> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("run cargo test")?;
    let mut lines = BufReader::new(child.stdout.take().context("no pipe")?);
    let mut counts = Counts::default();
    let mut summaries = 0;
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        out.write_all(&line)?;
        out.flush()?;
        if let Some(summary) = Counts::parse(&String::from_utf8_lossy(&line)) {
            counts += summary;
            summaries += 1;
        }
        line.clear();
    }
    let status = child.wait()?;
    // A test program that was killed or never built prints no summary.
    if (!status.success() && counts.failed == 0) || summaries == 0 {
        writeln!(
            out,
            "cargo test: {status}, {summaries} summaries, none of a failure: counted as a failure"
        )?;
        counts.failed += 1;
    }
    Ok(counts)
}

/// Lists the names of the suites: the unit tests, and the test targets in a manifest.
fn suites(manifest: &str) -> Result<Vec<String>> {
    let manifest: toml::Table = manifest.parse().context("read tests/Cargo.toml")?;
    let targets = manifest.get("test").and_then(toml::Value::as_array).map_or(&[][..], Vec::as_slice);
    let names = targets.iter().filter_map(|target| target.get("name")?.as_str());
    Ok(std::iter::once(UNIT).chain(names).map(str::to_owned).collect())
}

/// Numbers of tests by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    /// Parses `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn parse(line: &str) -> Option<Counts> {
        let (_, counts) = line.trim_start().strip_prefix("test result: ")?.split_once(". ")?;
        let count = |what: &str| {
            counts.split(';').find_map(|part| part.trim().strip_suffix(what)?.trim_end().parse().ok())
        };
        Some(Counts { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} s", self.0.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Counts {
        // Not to this program's own output, where the summaries would be counted.
        run_counted(Command::new("sh").args(["-c", script]), &mut io::sink()).unwrap()
    }

    #[test]
    fn summaries_are_read() {
        let line = "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in \
                    0.01s\n";
        assert_eq!(Counts::parse(line), Some(Counts { passed: 12, failed: 0, skipped: 3 }));
        let line = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(Counts::parse(line), Some(Counts { passed: 1, failed: 2, skipped: 0 }));
        assert_eq!(Counts::parse("test result_is_printed ... ok"), None);
        assert_eq!(Counts::parse("test result: unheard of"), None);
    }

    #[test]
    fn all_summaries_of_a_run_count() {
        let one = "echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured'";
        let two = "echo 'test result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured'; exit 101";
        assert_eq!(shell(&format!("{one}; {two}")), Counts { passed: 2, failed: 2, skipped: 1 });
    }

    #[test]
    fn a_run_that_dies_is_a_failure() {
        let one = "echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured'";
        assert_eq!(shell(&format!("{one}; kill -9 $$")), Counts { passed: 1, failed: 1, skipped: 0 });
        assert_eq!(shell("exit 0").failed, 1, "no summary at all");
    }

    #[test]
    fn the_total_is_printed_in_one_line() {
        assert_eq!(Counts { passed: 7, failed: 0, skipped: 0 }.to_string(), "7 passed, 0 failed");
        assert_eq!(Counts { passed: 7, failed: 1, skipped: 2 }.to_string(), "7 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn suites_come_from_the_manifest() {
        let manifest = "[[test]]\nname = \"kernel\"\n[[test]]\nname = \"vm\"\n";
        assert_eq!(suites(manifest).unwrap(), ["unit", "kernel", "vm"]);
        assert_eq!(suites("[package]").unwrap(), ["unit"]);
    }
}

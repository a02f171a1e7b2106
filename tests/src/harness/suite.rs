//! suite: runs a suite: every test in a [`sandbox`] of its own, with a time limit. Shows the output of a test
//! that fails.
//!
//! If a machine lacks what a suite needs, the tests are not failed but ignored, with a notice. If `CI` is set
//! in the environment they fail instead.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::{env, fs, panic};

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};

use super::{daemon, kernel, logs, packages, patience, sandbox, systemd, vm};

/// Environment variable that the parent sets: the test to run in this process.
const TEST: &str = "LBRIDGE_TEST";

/// A requirement that a machine may not meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// The test runs as root.
    Root,
    /// A cgroup2 mount.
    Cgroup2,
    /// A program on the PATH.
    Program(&'static str),
    /// A file of the machine.
    File(&'static str),
    /// A PostgreSQL server.
    Postgres,
    /// A built `lbridge`.
    Lbridge,
    /// The kernel has MPTCP sockets.
    Mptcp,
    /// A kernel to boot, by the name of its folder.
    Kernel(&'static str),
    /// A package made for tests, by its file name.
    Package(&'static str),
    /// The root file system of a Debian release.
    DebianRoot(&'static str),
    /// A kernel where socket programs can tell namespaces apart (5.15).
    RegistersAlone,
    /// A kernel that gives a network namespace's cookie to programs outside of it (5.14).
    NamesNamespaces,
    /// A kernel that tells programs a packet's ingress interface (5.17).
    TellsInterfaces,
    /// A kernel that lets a socket choose its range of ports (6.3).
    PortRanges,
    /// A whole system: a guest has little more than a kernel, and is emulated.
    WholeSystem,
}

impl Need {
    /// Returns the reason why the need is not met and what to do about it; `None` if it is met.
    fn missing(self) -> Option<String> {
        match self {
            Need::Root if !nix::unistd::geteuid().is_root() => Some("not root: run as root".to_owned()),
            Need::Cgroup2 => sandbox::cgroup2_mount().err().map(|error| format!("{error}")),
            Need::Program(name) if find_program(name).is_none() => {
                Some(format!("no {name} on the PATH: cargo xtask test --setup"))
            }
            Need::File(path) if !Path::new(path).exists() => {
                Some(format!("no {path}: cargo xtask test --setup"))
            }
            Need::Postgres if postgres_folder().is_none() => {
                Some("no PostgreSQL server: cargo xtask test --setup".to_owned())
            }
            Need::Lbridge => daemon::binary().err().map(|error| format!("{error:#}")),
            Need::Mptcp if !kernel::has_mptcp() => Some("the kernel has no MPTCP".to_owned()),
            Need::Kernel(name) if vm::kernel(name).is_none() => {
                Some(format!("no kernel {name} to boot: cargo xtask test --setup"))
            }
            Need::Package(name) => packages::package(name).err().map(|error| format!("{error:#}")),
            Need::DebianRoot(name) => packages::root(name).err().map(|error| format!("{error:#}")),
            Need::RegistersAlone if !kernel::registers_listeners_alone() => {
                Some("the kernel is older than 5.15".to_owned())
            }
            Need::NamesNamespaces if kernel::version() < (5, 14) => {
                Some("the kernel is older than 5.14".to_owned())
            }
            Need::WholeSystem if vm::is_inside() => Some("a guest has too little of a system".to_owned()),
            Need::PortRanges if kernel::version() < (6, 3) => Some("the kernel is older than 6.3".to_owned()),
            Need::TellsInterfaces if !kernel::has_ingress_ifindex() => {
                Some("the kernel is older than 5.17".to_owned())
            }
            _ => None,
        }
    }
}

/// The needs of a test in a sandbox that runs `lbridge` beside a [`super::lab`] or an engine.
const BASE: [Need; 4] = [Need::Root, Need::Cgroup2, Need::Program("ip"), Need::Lbridge];

/// Finds a program on the PATH.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// Returns the folder with the programs of PostgreSQL's server, the newest if there are several. Debian keeps
/// them off the PATH.
pub fn postgres_folder() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let folders = versions.map(|version| version.path().join("bin"));
    let version = |folder: &PathBuf| -> Option<u32> { folder.parent()?.file_name()?.to_str()?.parse().ok() };
    let on_the_path = || find_program("initdb")?.parent().map(Path::to_owned);
    folders.filter(|folder| folder.join("initdb").is_file()).max_by_key(version).or_else(on_the_path)
}

/// A test of a suite.
#[derive(Clone, Debug)]
pub struct Test {
    /// The test's name: its function's name.
    pub name: &'static str,
    /// The test's needs, in addition to the suite's.
    pub needs: &'static [Need],
    /// The function that runs the test.
    pub run: fn() -> Result<()>,
}

/// Lists tests: `tests![one, two, three: [Need::Mptcp]]`.
#[macro_export]
macro_rules! tests {
    ($($name:ident $(: [$($need:expr),+])?),+ $(,)?) => {
        vec![$($crate::harness::suite::Test {
            name: stringify!($name),
            needs: &[$($($need),+)?],
            run: $name,
        }),+]
    };
}

/// A suite, and how to run it.
#[derive(Clone, Debug)]
pub struct Suite {
    /// The needs of every test.
    pub needs: Vec<Need>,
    /// Number of tests that run at the same time, unless the command line says otherwise.
    pub threads: usize,
    /// Time limit of a test, in seconds.
    pub limit: u64,
    /// True if the tests run in sandboxes; a suite that brings machines of its own needs none.
    pub sandboxed: bool,
    /// The tests of the suite.
    pub tests: Vec<Test>,
}

impl Suite {
    /// Creates a suite of sandboxed tests, two at a time, with a limit of a minute each. They need root,
    /// cgroup2, iproute2 and a built `lbridge`, and `more`.
    pub fn new(more: &[Need], tests: Vec<Test>) -> Suite {
        Suite { needs: [&BASE, more].concat(), threads: 2, limit: 60, sandboxed: true, tests }
    }

    /// Runs the suite as its `main`, and ends the process.
    pub fn main(self) -> ! {
        // A program keeps ignoring the signals that were ignored when it was started, as by nohup(1) or in a
        // script's background, and a shell cannot catch them.
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
            // SAFETY: the default action is not a function.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        sandbox::hook();
        systemd::hook();
        if let Some(name) = env::var_os(TEST) {
            let test = self.tests.iter().find(|test| name == test.name);
            let status = test.map_or_else(
                || {
                    eprintln!("no such test: {}", name.display());
                    2
                },
                run_here,
            );
            process::exit(status);
        }
        if let Err(error) = sandbox::kill_on_signals() {
            eprintln!("signals: {error:#}");
        }
        self.conduct().exit()
    }

    fn conduct(self) -> Conclusion {
        let mut arguments = Arguments::from_args();
        arguments.test_threads.get_or_insert(self.threads);
        let in_ci = env::var_os("CI").is_some_and(|value| !value.is_empty());
        let mut complaints: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        let mut trials = Vec::new();
        for test in &self.tests {
            let missing: Vec<String> =
                self.needs.iter().chain(test.needs).filter_map(|need| need.missing()).collect();
            let name = test.name;
            let capture = !arguments.nocapture;
            let (limit, sandboxed) = (self.limit, self.sandboxed);
            let run = test.run;
            let trial =
                if missing.is_empty() {
                    Trial::test(name, move || {
                        if sandboxed { run_sandboxed(name, limit, capture) } else { Ok(run()?) }
                    })
                } else if in_ci {
                    let why = missing.join("; ");
                    Trial::test(name, move || Err(Failed::from(format!("cannot run, and CI is set: {why}"))))
                } else {
                    complaints.entry(missing.join("; ")).or_default().push(name);
                    Trial::test(name, || Ok(())).with_ignored_flag(true)
                };
            trials.push(trial);
        }
        if !arguments.list {
            for (why, names) in &complaints {
                let (count, names) = (names.len(), names.join(" "));
                eprintln!("\x1b[1;33mNOT RUN, {count} of {} tests: {why}\x1b[0m ({names})", self.tests.len());
            }
        }
        libtest_mimic::run(&arguments, trials)
    }
}

/// Runs a test in this process; returns the exit status.
fn run_here(test: &Test) -> i32 {
    let outcome = panic::catch_unwind(test.run);
    match outcome {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            logs::dump();
            eprintln!("---- {} ----\n{error:?}", test.name);
            1
        }
        Err(_) => {
            logs::dump();
            101
        }
    }
}

fn run_sandboxed(name: &str, limit: u64, capture: bool) -> Result<(), Failed> {
    let limit = patience::seconds(limit);
    let mut command = Command::new(env::current_exe().context("find the current program")?);
    command.env(TEST, name);
    // A panic deserves its backtrace; an error's context is enough.
    command.env("RUST_LIB_BACKTRACE", "0");
    command.current_dir(Path::new("/"));
    let (status, output) = sandbox::run(&command, limit, capture)?;
    let said = || {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        text(&output.stdout) + &text(&output.stderr)
    };
    match status {
        Some(status) if status.success() => Ok(()),
        // The status of the test's own process, not of a command that it ran; the problem is in the last
        // lines of its output.
        Some(status) => Err(Failed::from(format!("the test ended with {status}\n{}", said()))),
        None => Err(Failed::from(format!("killed after {limit:?}\n{}", said()))),
    }
}

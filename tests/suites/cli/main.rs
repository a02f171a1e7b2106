//! The contract of commands, files and the control API: what is said, with which exit status, and that
//! nothing is half-applied.

mod access;
mod commands;
mod complete;
mod doctor;
mod follow;
mod log;
mod manual;
mod reload;
mod start;

use std::fs;

use anyhow::{Result, ensure};
use lbridge_tests::harness::daemon::{Daemon, Output};
use lbridge_tests::harness::pins;
use lbridge_tests::harness::suite::Suite;

fn main() {
    let tests = [
        commands::tests(),
        start::tests(),
        access::tests(),
        doctor::tests(),
        follow::tests(),
        log::tests(),
        reload::tests(),
        complete::tests(),
        manual::tests(),
    ];
    Suite::new(&[], tests.concat()).main()
}

/// Failed with this status, silent on stdout and one line on stderr.
fn one_line(output: &Output, status: i32) -> Result<&str> {
    ensure!(output.status == status, "status {status} expected: {output:?}");
    ensure!(output.stdout.is_empty(), "nothing on stdout: {output:?}");
    let lines: Vec<_> = output.stderr.lines().collect();
    ensure!(lines.len() == 1 && lines[0].len() > 10, "one line on stderr: {output:?}");
    Ok(lines[0])
}

/// The state that a command might have changed.
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

/// A configuration with two rules. Tests spoil it.
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

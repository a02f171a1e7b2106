//! Runs a command in the sandbox that the suites use, to look around in: `cargo run --example sandbox --
//! bash`.

use std::process::{Command, exit};

use anyhow::{Context, Result};
use lbridge_tests::harness::sandbox;

fn main() -> Result<()> {
    sandbox::hook();
    sandbox::enter()?;
    let mut arguments = std::env::args_os().skip(1);
    let program = arguments.next().unwrap_or_else(|| "bash".into());
    let status =
        Command::new(&program).args(arguments).status().with_context(|| program.display().to_string())?;
    exit(status.code().unwrap_or(1));
}

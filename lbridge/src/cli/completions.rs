//! `lbridge completions`: prints a completion script for a shell.

use clap::Args;
use clap_complete::Shell;

use super::{Failure, render};

/// Arguments of `lbridge completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// For which shell
    shell: Shell,
}

pub(super) fn handle(args: &CompletionsArgs, command: &mut clap::Command) -> Result<(), Failure> {
    // Generated in memory first: clap_complete panics if standard output is closed (`| head`).
    let mut script = vec![];
    clap_complete::generate(args.shell, command, "lbridge", &mut script);
    render::script(&script)
}

//! `lbridge completions`

use clap::Args;
use clap_complete::Shell;

/// Arguments of `lbridge completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// For which shell
    shell: Shell,
}

pub(super) fn handle(args: &CompletionsArgs, command: &mut clap::Command) {
    // Into memory first: clap_complete panics where standard output is closed (`| head`).
    let mut script = vec![];
    clap_complete::generate(args.shell, command, "lbridge", &mut script);
    let _ = std::io::Write::write_all(&mut std::io::stdout(), &script);
}

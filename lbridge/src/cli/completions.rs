//! `lbridge completions`: prints a completion script for a shell. The scripts ask `lbridge complete` for
//! everything, so that they know the networks and rules of the moment and stay right after an upgrade.

use clap::{Args, ValueEnum};

use super::{Failure, render};

/// Arguments of `lbridge completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// For which shell
    shell: Shell,
}

/// A shell that there is a completion script for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU Bash 4.3 or later, with or without bash-completion.
    Bash,
    /// zsh with compinit.
    Zsh,
    /// fish 3 or later.
    Fish,
}

impl Shell {
    /// Every shell that there is a script for.
    pub const ALL: [Self; 3] = [Self::Bash, Self::Zsh, Self::Fish];

    /// Returns the name of the script's file where the shell looks for it.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Bash => "lbridge.bash",
            Self::Zsh => "_lbridge",
            Self::Fish => "lbridge.fish",
        }
    }

    /// Returns the completion script.
    pub fn script(self) -> &'static str {
        match self {
            Self::Bash => include_str!("completions/lbridge.bash"),
            Self::Zsh => include_str!("completions/_lbridge"),
            Self::Fish => include_str!("completions/lbridge.fish"),
        }
    }
}

pub(super) fn handle(args: &CompletionsArgs) -> Result<(), Failure> {
    render::script(args.shell.script().as_bytes())
}

//! `lbridge service`: installs lbridge as a systemd service, or removes it.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Failure, render};
use crate::service::{self, Traces};

/// Arguments of `lbridge service`.
#[derive(Debug, Args)]
pub(super) struct ServiceArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Have systemd run this program, now and at every boot; again after an upgrade
    Install,
    /// Take that back, and what the daemon left in the kernel
    Uninstall {
        /// Remove rules and configuration, too
        #[arg(long)]
        purge: bool,
    },
    /// Remove what a daemon that does not run any more left in the kernel; for packages
    Cleanup {
        /// Directory of the rules that `allow` makes
        #[arg(long, env = "LBRIDGE_STATE_DIR", default_value = service::STATE_DIR)]
        state_dir: PathBuf,
        /// Directory on a bpffs where what the kernel serves is pinned
        #[arg(long, env = "LBRIDGE_BPFFS", default_value = service::BPFFS)]
        bpffs: PathBuf,
    },
}

pub(super) fn handle(args: ServiceArgs, socket: PathBuf) -> Result<(), Failure> {
    let changed = match args.command {
        Command::Install => service::install()?,
        Command::Uninstall { purge } => service::uninstall(purge)?,
        Command::Cleanup { state_dir, bpffs } => service::cleanup(&Traces { socket, state_dir, bpffs })?,
    };
    render::changes(&changed)
}

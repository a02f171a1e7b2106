//! `lbridge doctor`: diagnoses this host and its rules.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{Exit, Failure, render};
use crate::{
    api::client::Client,
    doctor::{self, Level, Options},
    service,
};

/// Arguments of `lbridge doctor`.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// The daemon's directory of rules
    #[arg(long, env = "LBRIDGE_STATE_DIR", default_value = service::STATE_DIR)]
    state_dir: PathBuf,
    /// Configuration file of the daemon
    #[arg(long, env = "LBRIDGE_CONFIG", default_value = service::CONFIG)]
    config: PathBuf,
    /// Directory on a bpffs where the daemon pins its objects
    #[arg(long, env = "LBRIDGE_BPFFS", default_value = service::BPFFS)]
    bpffs: PathBuf,
    /// cgroup2 that the daemon attaches to [default: the mount point in /proc/mounts]
    #[arg(long, env = "LBRIDGE_CGROUP")]
    cgroup: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints the report; exits with 1 if there is a problem.
pub(super) fn handle(args: DoctorArgs, client: &Client) -> Result<ExitCode, Failure> {
    let options =
        Options { state_dir: args.state_dir, config: args.config, bpffs: args.bpffs, cgroup: args.cgroup };
    let mut exit = Exit::Done;
    super::block_on(async {
        let report = doctor::examine(&options, client).await;
        if report.worst == Level::Problem {
            exit = Exit::Failed;
        }
        if args.json { render::json(&report) } else { render::examination(&report) }
    })?;
    Ok(exit.into())
}

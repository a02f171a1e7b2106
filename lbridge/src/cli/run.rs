//! `lbridge run`: runs the daemon.

use std::path::PathBuf;

use clap::Args;

use super::{
    Failure,
    log::{self, Style},
};
use crate::{
    daemon::{self, Options},
    host::privileges,
    service,
};

/// Arguments of `lbridge run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Directory of the rules that `allow` makes
    #[arg(long, env = "LBRIDGE_STATE_DIR", default_value = service::STATE_DIR)]
    state_dir: PathBuf,
    /// Configuration file; may be absent
    #[arg(long, env = "LBRIDGE_CONFIG", default_value = service::CONFIG)]
    config: PathBuf,
    /// Directory on a bpffs where what the kernel serves is pinned
    #[arg(long, env = "LBRIDGE_BPFFS", default_value = service::BPFFS)]
    bpffs: PathBuf,
    /// cgroup2 whose services are watched [default: the mount point in /proc/mounts]
    #[arg(long, env = "LBRIDGE_CGROUP")]
    cgroup: Option<PathBuf>,
    /// Do not follow a Docker Engine; bridge:, netns: and pid: networks exist without one
    #[arg(long)]
    no_docker: bool,
}

pub(super) fn handle(args: RunArgs, socket: PathBuf) -> Result<(), Failure> {
    // systemd sets this if standard error is its journal (systemd.exec(5)).
    let style = if std::env::var_os("JOURNAL_STREAM").is_some() { Style::Journal } else { Style::Timed };
    log::start(style, "info")?;
    let options = Options {
        socket,
        state_dir: args.state_dir,
        config: args.config,
        bpffs: args.bpffs,
        cgroup: args.cgroup,
        docker: !args.no_docker,
    };
    // One worker for the API beside the loop; relays have threads of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        // Only the main thread does what needs privileges at the start.
        .on_thread_start(|| {
            if let Err(error) = privileges::drop_capabilities() {
                tracing::warn!(%error, "could not drop a thread's privileges");
            }
        })
        .build()
        .map_err(anyhow::Error::from)?;
    Ok(runtime.block_on(daemon::run(options))?)
}

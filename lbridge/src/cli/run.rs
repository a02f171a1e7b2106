//! `lbridge run`

use std::{fmt, io::IsTerminal as _, path::PathBuf};

use clap::Args;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, format, format::Writer},
    registry::LookupSpan,
};

use super::Failure;
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
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_env("LBRIDGE_LOG").unwrap_or_else(|_| EnvFilter::new("info")))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // Set by systemd where standard error is its journal (systemd.exec(5)).
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        let format = format().without_time().with_level(false).with_target(false);
        log.event_format(Journal(format)).init();
    } else {
        log.init();
    }
    let options = Options {
        socket,
        state_dir: args.state_dir,
        config: args.config,
        bpffs: args.bpffs,
        cgroup: args.cgroup,
        docker: !args.no_docker,
    };
    // One for the API beside the loop; relays have threads of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        // What is needed at the start alone is done on this thread.
        .on_thread_start(|| {
            if let Err(error) = privileges::give_up() {
                tracing::warn!("a thread keeps its privileges: {error}");
            }
        })
        .build()
        .map_err(anyhow::Error::from)?;
    Ok(runtime.block_on(daemon::run(options))?)
}

/// For the journal, which knows the time, and takes the severity from what a line begins with (sd-daemon(3)).
struct Journal<F>(F);

impl<S, N, F> FormatEvent<S, N> for Journal<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let severity = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        write!(writer, "<{severity}>")?;
        self.0.format_event(context, writer, event)
    }
}

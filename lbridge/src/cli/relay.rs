//! `lbridge relay`: relays in the foreground, without the daemon and without privileges.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{ArgGroup, Args};

use super::{
    Exit, Failure, Limits, Ports,
    log::{self, Style},
    parse_ports, parse_source, render,
};
use crate::{
    planning::rule::Source,
    sandbox::launch::NotStarted,
    sandbox_relay::{self, Options, Sandbox},
};

/// Arguments of `lbridge relay`.
#[derive(Debug, Args)]
#[command(
    override_usage = "lbridge relay [OPTIONS] PORT... -- COMMAND...\n       lbridge relay [OPTIONS] --pid \
                      PID PORT...\n       lbridge relay [OPTIONS] --netns PATH PORT...",
    group = ArgGroup::new("place").required(true).args(["pid", "netns", "command"]),
)]
pub(super) struct RelayArgs {
    /// 5432, 5432=15432, 80=127.0.0.1:3000, 80=[::1]:3000, 5432=unix:/path or 8000-8010
    #[expect(rustdoc::broken_intra_doc_links, reason = "an address, for --help")]
    #[arg(value_parser = parse_ports, required = true, value_name = "PORT")]
    ports: Vec<Ports>,
    /// A process in the sandbox, or the one that has made it (bwrap)
    #[arg(long, value_name = "PID", value_parser = parse_pid)]
    pid: Option<u32>,
    /// The sandbox whose network namespace is at this path
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Address that the service sees: one that stands for the sandbox, or 127.0.0.1, which it may trust
    #[arg(long, value_parser = parse_source, default_value = "container", value_name = "container|loopback")]
    source: Source,
    #[command(flatten)]
    limits: Limits,
    /// Start this, find the sandbox that it makes, and have the ports ready before its program runs
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn parse_pid(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(pid @ 1..) => Ok(pid),
        _ => Err("write the number of a process, e.g. 4711".to_owned()),
    }
}

/// Relays; returns the command's exit status, if there is a command.
pub(super) fn handle(args: RelayArgs) -> Result<ExitCode, Failure> {
    // Our log must not mix with the command's own output while all is well.
    let level = if args.command.is_empty() { "info" } else { "warn" };
    log::start(Style::Plain, level)?;
    let sandbox = match (args.pid, args.netns) {
        (Some(pid), _) => Sandbox::Process(pid),
        (None, Some(path)) => Sandbox::Path(path),
        (None, None) => Sandbox::Command(args.command),
    };
    let options = Options {
        sandbox,
        ports: args.ports.into_iter().flat_map(|Ports(specs)| specs).collect(),
        source: args.source,
        max_connections: args.limits.max_connections,
        idle_timeout: args.limits.idle_timeout,
        proxy_protocol: args.limits.proxy_protocol,
    };
    options.check().map_err(|message| Failure { exit: Exit::Usage, message })?;
    sandbox_relay::run(&options).map(ExitCode::from).or_else(|error| {
        match error.downcast_ref::<NotStarted>() {
            Some(not_started) => {
                let status = not_started.exit_status();
                render::error(&format!("{error:#}"));
                Ok(status.into())
            }
            None => Err(error.into()),
        }
    })
}

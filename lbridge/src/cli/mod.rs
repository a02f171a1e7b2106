//! cli: the command line. Each command has a file with a `handle()`; all output comes from [`render`]. Talks
//! to the daemon only through the control API.

mod allow;
mod check_config;
mod complete;
mod completions;
mod deny;
mod doctor;
mod events;
mod explain;
mod import;
mod list;
mod load;
mod log;
pub mod manual;
mod options;
mod relay;
mod reload;
mod render;
mod run;
mod service;
mod status;
mod top;
mod usage;
mod verify;

use std::{num::NonZeroU32, path::PathBuf, process::ExitCode, str::FromStr as _, time::Duration};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

pub use self::completions::Shell;
use crate::{
    api::{
        client::{Client, ClientError},
        protocol::ErrorCode,
    },
    planning::rule::{DatapathChoice, Invalid, Network, PortSpec, ProxyProtocol, Source, container_name},
};

/// The exit statuses that scripts can rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The command succeeded.
    Done = 0,
    /// The command failed, or standard output could not be written to.
    Failed = 1,
    /// The command line is invalid.
    Usage = 2,
    /// The daemon is not reachable.
    NoDaemon = 3,
    /// There is no such rule, or it conflicts with another.
    Rule = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// The commands that a new user needs most.
const FIRST_STEPS: &str = "\
First steps:
  lbridge doctor               what is wrong with this host or a rule, and what to type
  lbridge allow app_net 5432   Docker network app_net reaches 127.0.0.1:5432
  lbridge status               the rules, what containers dial, what is missing
  lbridge deny app_net 5432    takes it back";

/// Lets containers reach services that listen only on the host's loopback, per allowlisted network and port.
#[derive(Debug, Parser)]
#[command(name = "lbridge", version, max_term_width = 100)]
pub struct Cli {
    /// Control socket of the daemon
    #[arg(long, global = true, env = "LBRIDGE_SOCKET", default_value = crate::service::SOCKET)]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon, in the foreground
    Run(run::RunArgs),
    /// Let a network's containers reach loopback ports; returns when that is in force
    Allow(allow::AllowArgs),
    /// Take ports back from a network; returns when that is in force
    Deny(deny::DenyArgs),
    /// List the rules
    List(OutputArgs),
    /// Show what becomes of each rule, as observed
    Status(OutputArgs),
    /// Have the daemon read its configuration again; returns when that is in force
    Reload(OutputArgs),
    /// Check a configuration file; needs no daemon
    CheckConfig(check_config::CheckConfigArgs),
    /// Dial, and see that each rule is open to whom it should be and to nobody else; as root
    ///
    /// Makes throw-away network namespaces on the bridges, and one that stands for the LAN, and dials from
    /// there. Services see connections that are closed at once; nothing else is sent, and nothing is left
    /// behind. Exit status 0 if everything was as it should be, 1 if not, or if something could not be tried.
    Verify(verify::VerifyArgs),
    /// Say what this host can and cannot do, and what to do about it; exit status 1 if something is a problem
    Doctor(doctor::DoctorArgs),
    /// Turn socat units into rules; without --yes say what would be done
    Import(import::ImportArgs),
    /// Follow what happens, until interrupted: rules' states, listeners, Docker, who allows and denies
    Events(OutputArgs),
    /// Show which rules are in use: connections per second and in total, and what relays carry
    Top(top::TopArgs),
    /// Explain what would become of a connection, step by step, by what is in force now
    Explain(explain::ExplainArgs),
    /// Bridge a sandbox of your own (bwrap, unshare), in the foreground, without the daemon and without root
    Relay(relay::RelayArgs),
    /// Install lbridge as a service of systemd, or remove it
    Service(service::ServiceArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Print what the last of the words could become; for the completion scripts
    #[command(hide = true)]
    Complete(complete::CompleteArgs),
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The limits on a rule's connections that only a relay can keep.
#[derive(Debug, Args)]
struct Limits {
    /// Connections to a port at a time, at most; relayed rules keep limits, so a rule with one is relayed
    #[arg(long, value_name = "N", value_parser = parse_connections)]
    max_connections: Option<NonZeroU32>,
    /// Reset a connection that has been without a byte for that long (30s, 10m, 2h); as above
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    idle_timeout: Option<Duration>,
    /// Tell the service who connects in the PROXY protocol's header; as above
    #[arg(long, value_parser = parse_proxy_protocol, value_name = "v1|v2")]
    proxy_protocol: Option<ProxyProtocol>,
}

/// A failed command: the message and the exit status.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    message: String,
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            ClientError::Unreachable { .. }
            | ClientError::Silent { .. }
            | ClientError::Unanswered { .. }
            | ClientError::Ended { .. } => Exit::NoDaemon,
            ClientError::Api(error) => match error.code {
                ErrorCode::Usage => Exit::Usage,
                ErrorCode::Conflict | ErrorCode::NoSuchRule => Exit::Rule,
                ErrorCode::Failed => Exit::Failed,
            },
            ClientError::Forbidden { .. } | ClientError::Garbled(_) => Exit::Failed,
        };
        Self { exit, message: error.to_string() }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { exit: Exit::Failed, message: format!("{error:#}") }
    }
}

/// Returns the definition of the command line, from which `--help`, the completion scripts and the man pages
/// are made.
pub fn command() -> clap::Command {
    manual::with_examples(Cli::command(), FIRST_STEPS)
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let exit = run();
    log::finish();
    exit
}

fn run() -> ExitCode {
    let parsed = command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return usage::handle(&error),
    };
    let client = Client::new(&cli.socket);
    let done = match cli.command {
        Command::Run(args) => run::handle(args, cli.socket),
        Command::Allow(args) => block_on(allow::handle(args, &client)),
        Command::Deny(args) => block_on(deny::handle(args, &client)),
        Command::List(args) => block_on(list::handle(&args, &client)),
        Command::Status(args) => block_on(status::handle(&args, &client)),
        Command::Reload(args) => block_on(reload::handle(&args, &client)),
        Command::CheckConfig(args) => check_config::handle(&args),
        Command::Verify(args) => match block_on(verify::handle(args, &client)) {
            Ok(true) => Ok(()),
            // The command has printed the problem.
            Ok(false) => return Exit::Failed.into(),
            Err(failure) => Err(failure),
        },
        Command::Doctor(args) => {
            return doctor::handle(args, &client).unwrap_or_else(|failure| failed(&failure));
        }
        Command::Import(args) => block_on(import::handle(args, &client)),
        Command::Events(args) => block_on(events::handle(&args, &client)),
        Command::Top(args) => block_on(top::handle(&args, &client)),
        Command::Explain(args) => block_on(explain::handle(args, &client)),
        Command::Service(args) => service::handle(args, cli.socket),
        Command::Relay(args) => return relay::handle(args).unwrap_or_else(|failure| failed(&failure)),
        Command::Completions(args) => completions::handle(&args),
        Command::Complete(args) => complete::handle(&args, cli.socket),
    };
    match done {
        Ok(()) => Exit::Done.into(),
        Err(failure) => failed(&failure),
    }
}

fn failed(failure: &Failure) -> ExitCode {
    render::error(&failure.message);
    failure.exit.into()
}

/// Prefixes of the networks that are not Docker's.
const NETWORKS: [&str; 4] = ["bridge:", "container:", "netns:", "pid:"];

fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(anyhow::Error::from)?;
    runtime.block_on(command)
}

fn parse_network(text: &str) -> Result<Network, String> {
    text.parse().map_err(|error: Invalid| error.to_string())
}

/// Like [`parse_network`], but rejects slips that would make a rule for a Docker network that can never
/// exist: `pid 29 8080`.
fn parse_new_network(text: &str) -> Result<Network, String> {
    match NETWORKS.iter().find(|kind| kind.strip_suffix(':') == Some(text)) {
        // Docker has a network of that name.
        Some(&"bridge:") | None => parse_network(text),
        Some(kind) => Err(format!(
            "{text} says what kind of network, not which; write {kind}WHICH (a Docker network of that name \
             goes by its id)"
        )),
    }
}

fn parse_container(text: &str) -> Result<String, String> {
    container_name(text).map_err(|error| error.to_string())
}

fn parse_source(text: &str) -> Result<Source, String> {
    text.parse().map_err(|error: Invalid| error.to_string())
}

fn parse_path(text: &str) -> Result<DatapathChoice, String> {
    text.parse().map_err(|error: Invalid| error.to_string())
}

fn parse_proxy_protocol(text: &str) -> Result<ProxyProtocol, String> {
    text.parse().map_err(|error: Invalid| error.to_string())
}

fn parse_connections(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| "write a number of connections, at least 1".to_owned())
}

/// Parses a non-zero duration in the format of a configuration file: `30s`, `10m`.
fn parse_time(text: &str) -> Result<Duration, String> {
    let time = jiff::SignedDuration::from_str(text).ok().and_then(|time| Duration::try_from(time).ok());
    time.filter(|time| !time.is_zero())
        .ok_or_else(|| "write a time like 30s, 10m or 2h, longer than none".to_owned())
}

fn parse_ports(text: &str) -> Result<Ports, String> {
    PortSpec::parse_many(text).map(Ports).map_err(|error| error.to_string())
}

/// The ports of one argument; a range has several.
#[derive(Debug, Clone)]
struct Ports(Vec<PortSpec>);

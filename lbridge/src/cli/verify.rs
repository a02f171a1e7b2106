//! `lbridge verify`: tests with real connections that each rule is open to its containers and to nobody else.

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{Exit, Failure, explain::parse_port, parse_network, render};
use crate::{
    api::client::Client,
    planning::rule::{Network, Protocol, RuleError, RuleId},
    verify::verify,
};

/// Arguments of `lbridge verify`.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The network, as the rule names it, with the port; all rules if both are left out
    #[arg(value_parser = parse_network, requires = "port")]
    network: Option<Network>,
    /// The dialled port
    #[arg(value_parser = parse_port)]
    port: Option<(u16, Protocol)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Returns true if every check passed.
pub(super) async fn handle(args: VerifyArgs, client: &Client) -> Result<bool, Failure> {
    if !nix::unistd::geteuid().is_root() {
        let message = "verify makes network namespaces on the bridges, so it needs root; use sudo".to_owned();
        return Err(Failure { exit: Exit::Failed, message });
    }
    let wanted =
        args.network.zip(args.port).map(|(network, (port, protocol))| RuleId { network, port, protocol });
    let status = client.status().await?;
    if let Some(wanted) = &wanted
        && !status.rules.iter().any(|rule| rule.id() == *wanted)
    {
        let message = RuleError::NoSuchRule { id: wanted.clone() }.for_cli().to_string();
        return Err(Failure { exit: Exit::Rule, message });
    }
    let daemon = client.daemon().await;
    let mut terminate = signal(SignalKind::terminate()).map_err(anyhow::Error::from)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(anyhow::Error::from)?;
    // Dropping the future at any point removes everything that it has created.
    let report = tokio::select! {
        report = verify(&status, daemon, wanted.as_ref()) => report?,
        _ = terminate.recv() => return Err(interrupted()),
        _ = interrupt.recv() => return Err(interrupted()),
    };
    let printed = if args.json { render::json(&report) } else { render::verification(&report) };
    printed?;
    Ok(report.verified)
}

fn interrupted() -> Failure {
    Failure { exit: Exit::Failed, message: "interrupted; nothing was verified".to_owned() }
}

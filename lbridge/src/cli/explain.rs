//! `lbridge explain`: asks the daemon what would happen to a connection, step by step.

use std::net::IpAddr;

use clap::Args;

use super::{Failure, parse_new_network, render};
use crate::{
    api::client::Client,
    planning::{
        explain::Question,
        rule::{Network, PortSpec, Protocol, Target},
    },
};

/// Arguments of `lbridge explain`.
#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// Where the connection comes from: a network as `allow` takes it
    #[arg(value_parser = parse_new_network)]
    network: Network,
    /// The port that is dialled
    #[arg(value_parser = parse_port)]
    port: (u16, Protocol),
    /// The container's address [default: some address of the network]
    #[arg(long, value_name = "ADDRESS")]
    source: Option<IpAddr>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Parses a single dialled port.
pub(super) fn parse_port(text: &str) -> Result<(u16, Protocol), String> {
    match PortSpec::parse_many(text).as_deref() {
        Ok([PortSpec { port, protocol, target }]) if *target == Target::Port(*port) => Ok((*port, *protocol)),
        Ok(_) => Err("a connection dials one port, e.g. 5432".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) async fn handle(args: ExplainArgs, client: &Client) -> Result<(), Failure> {
    let (port, protocol) = args.port;
    let question = Question { network: args.network, port, protocol, source: args.source };
    let explanation = client.explain(&question).await?;
    if args.json { render::json(&explanation) } else { render::explanation(&explanation) }
}

//! `lbridge deny`: removes rules.

use clap::Args;

use super::{Exit, Failure, Ports, parse_network, parse_ports, render};
use crate::{
    api::{client::Client, protocol::Deny},
    planning::rule::{Network, PortSpec, Protocol, Target},
};

/// Arguments of `lbridge deny`.
#[derive(Debug, Args)]
pub(super) struct DenyArgs {
    /// The network, as the rule names it
    #[arg(value_parser = parse_network)]
    network: Network,
    /// Dialled ports: 5432, 8000-8010 or 53/udp
    #[arg(value_parser = parse_ports, required = true, value_name = "PORT")]
    ports: Vec<Ports>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn handle(args: DenyArgs, client: &Client) -> Result<(), Failure> {
    let remapped =
        args.ports.iter().flat_map(|Ports(specs)| specs).find(|spec| spec.target != Target::Port(spec.port));
    if let Some(spec) = remapped {
        let message = format!(
            "{spec} says where it leads; deny takes the dialled port alone: {}{}",
            spec.port,
            spec.protocol.suffix()
        );
        return Err(Failure { exit: Exit::Usage, message });
    }
    let (udp, tcp): (Vec<_>, Vec<_>) =
        args.ports.iter().flat_map(|Ports(specs)| specs).partition(|spec| spec.protocol == Protocol::Udp);
    let ports = |specs: Vec<&PortSpec>| specs.iter().map(|spec| spec.port).collect();
    let deny = Deny { network: args.network, ports: ports(tcp), udp_ports: ports(udp) };
    let rules = client.deny(&deny).await?;
    if args.json { render::json(&rules) } else { render::denied(&rules) }
}

//! `lbridge allow`: adds rules.

use clap::Args;

use super::{Failure, Ports, options::OptionArgs, parse_new_network, parse_ports, render};
use crate::{
    api::{client::Client, protocol::Allow},
    planning::rule::{Network, Options, Rule},
};

/// Arguments of `lbridge allow`.
#[derive(Debug, Args)]
pub(super) struct AllowArgs {
    /// A Docker network's name or id, or bridge:IFNAME; container:NAME, netns:PATH or pid:N for localhost
    /// inside
    #[arg(value_parser = parse_new_network)]
    network: Network,
    /// 5432, 5432=15432, 80=127.0.0.1:3000, 80=[::1]:3000, 5432=unix:/path, 8000-8010 or 53/udp
    #[expect(rustdoc::broken_intra_doc_links, reason = "an address, for --help")]
    #[arg(value_parser = parse_ports, required = true, value_name = "PORT")]
    ports: Vec<Ports>,
    #[command(flatten)]
    options: OptionArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn handle(args: AllowArgs, client: &Client) -> Result<(), Failure> {
    let options = Options::from(args.options);
    let specs = args.ports.into_iter().flat_map(|Ports(specs)| specs);
    let rules = specs.map(|spec| Rule { options: options.clone(), ..Rule::new(args.network.clone(), spec) });
    let rules = client.allow(&Allow { rules: rules.collect() }).await?;
    if args.json { render::json(&rules) } else { render::states(&rules) }
}

//! `lbridge allow`: adds rules.

use clap::Args;

use super::{
    Failure, Limits, Ports, parse_container, parse_new_network, parse_path, parse_ports, parse_source, render,
};
use crate::{
    api::{client::Client, protocol::Allow},
    planning::rule::{Network, PathChoice, Rule, Source, comment},
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
    /// Address that the service sees: the container's address, or a loopback one, which it may trust
    #[arg(long, value_parser = parse_source, default_value = "container", value_name = "container|loopback")]
    source: Source,
    /// Steer in the kernel, relay through the daemon, or whichever is possible
    #[arg(long, value_parser = parse_path, default_value = "auto", value_name = "auto|steer|relay")]
    path: PathChoice,
    /// Only these containers of the network, by name
    #[arg(long, value_name = "CONTAINER", value_delimiter = ',', value_parser = parse_container)]
    from: Vec<String>,
    /// Lead the port of the containers' own localhost there, too
    #[arg(long)]
    localhost: bool,
    #[command(flatten)]
    limits: Limits,
    /// A remark, shown by `list`
    #[arg(long, value_name = "TEXT", value_parser = parse_comment)]
    comment: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn parse_comment(text: &str) -> Result<String, String> {
    comment(text).map_err(|error| error.to_string())
}

pub(super) async fn handle(args: AllowArgs, client: &Client) -> Result<(), Failure> {
    let rules = args.ports.into_iter().flat_map(|Ports(specs)| specs).map(|spec| Rule {
        from: args.from.iter().cloned().collect(),
        localhost: args.localhost,
        source: args.source,
        path: args.path,
        max_connections: args.limits.max_connections,
        idle_timeout: args.limits.idle_timeout,
        proxy_protocol: args.limits.proxy_protocol,
        comment: args.comment.clone(),
        ..Rule::new(args.network.clone(), spec)
    });
    let rules = client.allow(&Allow { rules: rules.collect() }).await?;
    if args.json { render::json(&rules) } else { render::states(&rules) }
}

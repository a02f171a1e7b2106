//! `lbridge import`: turns socat units into rules.

use clap::Args;

use super::{Exit, Failure, parse_source, render};
use crate::{
    api::{client::Client, protocol::Allow},
    import::{self, Standing},
    planning::rule::Source,
};

/// Arguments of `lbridge import`.
#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// Say what would be done; so it is without --yes
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Make the rules
    #[arg(long)]
    yes: bool,
    /// Address that the services see: the container's address, or a loopback one, as with socat
    #[arg(long, value_parser = parse_source, default_value = "container", value_name = "container|loopback")]
    source: Source,
}

pub(super) async fn handle(args: ImportArgs, client: &Client) -> Result<(), Failure> {
    let plan = import::plan(args.source, &client.status().await?).await?;
    let conflict = plan.taken.iter().find_map(|taken| match &taken.standing {
        Standing::Conflict(target) => Some((taken, target)),
        Standing::New | Standing::There => None,
    });
    if !args.yes || args.dry_run {
        render::import_plan(&plan)?;
    }
    if let Some((taken, target)) = conflict {
        let (id, unit) = (taken.rule.id(), &taken.unit);
        let message = format!(
            "{id} leads to {target} already, {unit} to {}; nothing was changed: `lbridge deny {id}`, or \
             disable the unit",
            taken.rule.spec.target
        );
        return Err(Failure { exit: Exit::Rule, message });
    }
    if args.yes {
        let new = plan.taken.iter().filter(|taken| taken.standing == Standing::New);
        let rules: Vec<_> = new.map(|taken| taken.rule.clone()).collect();
        let rules = if rules.is_empty() { vec![] } else { client.allow(&Allow { rules }).await? };
        render::imported(&plan, &rules, &client.status().await?.rules)?;
    }
    Ok(())
}

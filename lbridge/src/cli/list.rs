//! `lbridge list`: lists the rules.

use super::{Failure, OutputArgs, render};
use crate::api::client::Client;

pub(super) async fn handle(args: &OutputArgs, client: &Client) -> Result<(), Failure> {
    let rules = client.status().await?.rules;
    if args.json { render::json(&rules) } else { render::rules(&rules) }
}

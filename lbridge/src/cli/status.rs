//! `lbridge status`: prints the daemon's whole status.

use super::{Failure, OutputArgs, render};
use crate::api::client::Client;

pub(super) async fn handle(args: &OutputArgs, client: &Client) -> Result<(), Failure> {
    let status = client.status().await?;
    if args.json { render::json(&status) } else { render::status(&status) }
}

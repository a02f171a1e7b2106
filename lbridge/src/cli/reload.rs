//! `lbridge reload`: makes the daemon read its configuration again.

use super::{Failure, OutputArgs, render};
use crate::api::client::Client;

pub(super) async fn handle(args: &OutputArgs, client: &Client) -> Result<(), Failure> {
    let reloaded = client.reload().await?;
    if args.json { render::json(&reloaded) } else { render::reloaded(&reloaded) }
}

//! `lbridge events`: prints the daemon's events.

use std::ops::ControlFlow;

use super::{Failure, OutputArgs, render};
use crate::api::client::Client;

pub(super) async fn handle(args: &OutputArgs, client: &Client) -> Result<(), Failure> {
    let told = client.follow(|event| {
        match if args.json { render::json_line(&event) } else { render::event(&event) } {
            Ok(true) => ControlFlow::Continue(()),
            // The reader of standard output has gone.
            Ok(false) => ControlFlow::Break(Ok(())),
            Err(failure) => ControlFlow::Break(Err(failure)),
        }
    });
    told.await?
}

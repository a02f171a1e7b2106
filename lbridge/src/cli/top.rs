//! `lbridge top`: shows the counts of `status`, repeatedly.

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use clap::Args;
use jiff::Timestamp;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};

use super::{
    Failure,
    load::{counts, look},
    parse_time, render,
};
use crate::api::client::Client;

/// Arguments of `lbridge top`.
#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// Time between two looks, over which connections per second are counted
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "1s")]
    interval: Duration,
    /// Print one table, after one interval, and end
    #[arg(long)]
    once: bool,
    /// Print JSON, a line for each look
    #[arg(long)]
    json: bool,
}

pub(super) async fn handle(args: &TopArgs, client: &Client) -> Result<(), Failure> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(anyhow::Error::from)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(anyhow::Error::from)?;
    let mut before = counts(&client.status().await?.rules);
    let mut looked = Instant::now();
    let in_place = !args.once && !args.json && io::stdout().is_terminal();
    let screen = if in_place { Some(render::Screen::enter()?) } else { None };
    loop {
        tokio::select! {
            () = sleep_until(looked + args.interval) => {}
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        }
        let rules = client.status().await?.rules;
        let (now, counted) = (Instant::now(), counts(&rules));
        let look = look(rules, &before, now - looked, Timestamp::now());
        (before, looked) = (counted, now);
        let goes_on = match &screen {
            Some(_) => render::load_in_place(&look)?,
            None if args.json => render::json_line(&look)?,
            None => render::load(&look)?,
        };
        if args.once || !goes_on {
            return Ok(());
        }
    }
}

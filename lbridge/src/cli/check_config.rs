//! `lbridge check-config`: reports how `lbridge run` and `lbridge reload` would read the file. Needs no
//! daemon.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;

use super::{Failure, render};
use crate::{
    service,
    store::{Store, config::Config},
};

/// Arguments of `lbridge check-config`.
#[derive(Debug, Args)]
pub(super) struct CheckConfigArgs {
    /// Configuration file
    #[arg(long, env = "LBRIDGE_CONFIG", default_value = service::CONFIG)]
    config: PathBuf,
    /// Directory of the rules that `allow` makes, which must not contradict the file
    #[arg(long, env = "LBRIDGE_STATE_DIR", default_value = service::STATE_DIR)]
    state_dir: PathBuf,
}

pub(super) fn handle(args: &CheckConfigArgs) -> Result<(), Failure> {
    let there = args.config.try_exists().map_err(anyhow::Error::from)?;
    let config = Config::load(&args.config).map_err(|error| {
        // If the file cannot be read, nothing in it needs fixing.
        let remedy = match error.downcast_ref::<std::io::Error>() {
            Some(_) if is_forbidden(&error) => "; use sudo",
            Some(_) => "",
            None => "; fix the file",
        };
        anyhow!("{error:#}{remedy}")
    })?;
    let store = Store::at(&args.state_dir);
    // The directory usually belongs to root alone.
    let (allowed, unreadable) = match store.rules() {
        Ok(allowed) => (allowed, false),
        Err(error) if is_forbidden(&error) => (vec![], true),
        Err(error) => return Err(error.into()),
    };
    config.rules_with(allowed, &store.rules_file()).map_err(anyhow::Error::from)?;
    render::config(&args.config, there, &config, unreadable.then(|| store.rules_file()).as_deref())
}

fn is_forbidden(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::PermissionDenied)
}

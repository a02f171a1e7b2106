//! options: the flags of a rule's options.

use clap::Args;

use super::{Limits, parse_container, parse_path, parse_source};
use crate::planning::rule::{DatapathChoice, Options, Source, comment};

/// The flags of `lbridge allow` for [`Options`], one for each.
#[derive(Debug, Args)]
pub(super) struct OptionArgs {
    /// Address that the service sees: the container's address, or a loopback one, which it may trust
    #[arg(long, value_parser = parse_source, default_value = "container", value_name = "container|loopback")]
    source: Source,
    /// Steer in the kernel, relay through the daemon, or whichever is possible
    #[arg(long, value_parser = parse_path, default_value = "auto", value_name = "auto|steer|relay")]
    path: DatapathChoice,
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
}

fn parse_comment(text: &str) -> Result<String, String> {
    comment(text).map_err(|error| error.to_string())
}

impl From<OptionArgs> for Options {
    fn from(args: OptionArgs) -> Self {
        let OptionArgs { source, path, from, localhost, limits, comment } = args;
        let Limits { max_connections, idle_timeout, proxy_protocol } = limits;
        let from = from.into_iter().collect();
        Self { from, localhost, source, path, max_connections, idle_timeout, proxy_protocol, comment }
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;
    use crate::planning::rule::Spelling;

    fn parsed(arguments: &[&str]) -> Options {
        let command = OptionArgs::augment_args(clap::Command::new("allow"));
        let matches = command.get_matches_from([&["allow"], arguments].concat());
        OptionArgs::from_arg_matches(&matches).unwrap().into()
    }

    #[test]
    fn each_option_has_a_flag() {
        let command = OptionArgs::augment_args(clap::Command::new("allow"));
        let mut flags: Vec<_> = command.get_arguments().filter_map(|arg| arg.get_long()).collect();
        let mut names: Vec<_> = Options::NAMES.iter().map(|name| name.replace('_', "-")).collect();
        flags.sort_unstable();
        names.sort_unstable();
        assert_eq!(flags, names);
        assert_eq!(parsed(&[]), Options::default());
    }

    #[test]
    fn options_are_shown_as_they_are_typed() {
        let arguments = [
            "--from=db,web",
            "--localhost",
            "--source=loopback",
            "--path=relay",
            "--max-connections=5",
            "--idle-timeout=10m",
            "--proxy-protocol=v2",
            "--comment=why",
        ];
        let options = parsed(&arguments);
        let shown: Vec<_> = options
            .given()
            .map(|(name, value)| Spelling::Command.option(name, &value).replace(' ', "="))
            .collect();
        assert_eq!(shown, arguments);
    }
}

//! usage: reports an invalid command line in one line, where clap prints a paragraph.

use std::error::Error as _;

use clap::{
    CommandFactory as _,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::{Cli, Exit, NETWORKS, render};
use crate::planning::rule::PortSpec;

/// Prints help to standard output, or an error to standard error; returns the exit status.
pub(super) fn handle(error: &clap::Error) -> std::process::ExitCode {
    if !error.use_stderr() {
        return match render::help(error) {
            Ok(()) => Exit::Done.into(),
            Err(failure) => super::failed(&failure),
        };
    }
    // Neither command nor argument: the user wants to see what commands exist.
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return Exit::Usage.into();
    }
    // Global options may come before the command.
    let words: Vec<_> = std::env::args().skip(1).collect();
    let command = words.iter().find(|word| Cli::command().find_subcommand(word).is_some());
    let wrong = wrong(error);
    let help = match command {
        _ if wrong.contains("--help") => String::new(),
        Some(command) => format!("; see lbridge {command} --help"),
        None => "; see lbridge --help".to_owned(),
    };
    let hint = hint(error, command.map(String::as_str), &words);
    render::error(&format!("{wrong}{}{hint}{help}", instead(error)));
    Exit::Usage.into()
}

/// Returns the strings that clap recorded for an error.
fn context(error: &clap::Error, kind: ContextKind) -> Vec<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => vec![text.clone()],
        Some(ContextValue::Strings(texts)) => texts.clone(),
        _ => vec![],
    }
}

/// Describes the error in one line.
fn wrong(error: &clap::Error) -> String {
    let of = |kind| context(error, kind).join(" ");
    let argument = || of(ContextKind::InvalidArg);
    match error.kind() {
        ErrorKind::MissingRequiredArgument => {
            format!("the following required arguments were not provided: {}", argument())
        }
        ErrorKind::UnknownArgument => format!("unexpected argument '{}' found", argument()),
        ErrorKind::InvalidSubcommand => {
            format!("unrecognized subcommand '{}'", of(ContextKind::InvalidSubcommand))
        }
        ErrorKind::ArgumentConflict => {
            format!("the argument '{}' cannot be used with '{}'", argument(), of(ContextKind::PriorArg))
        }
        ErrorKind::InvalidValue if of(ContextKind::InvalidValue).is_empty() => {
            format!("a value is required for '{}' but none was supplied", argument())
        }
        ErrorKind::InvalidValue => {
            format!("invalid value '{}' for '{}'", of(ContextKind::InvalidValue), argument())
        }
        ErrorKind::ValueValidation => {
            let why = error.source().map_or_else(String::new, |why| format!(": {why}"));
            format!("invalid value '{}' for '{}'{why}", of(ContextKind::InvalidValue), argument())
        }
        // As far as is known, no lbridge command line causes the other errors.
        _ => {
            let text = error.to_string();
            text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        }
    }
}

/// Returns clap's suggestion, if any.
fn instead(error: &clap::Error) -> String {
    for (kind, what) in
        [(ContextKind::SuggestedArg, "argument"), (ContextKind::SuggestedSubcommand, "subcommand")]
    {
        if let Some(similar) = context(error, kind).first() {
            return format!("; a similar {what} exists: '{similar}'");
        }
    }
    match &context(error, ContextKind::ValidValue)[..] {
        [] => String::new(),
        values => format!("; possible values: {}", values.join(", ")),
    }
}

/// Returns lbridge's own suggestion, if it recognizes the mistake.
fn hint(error: &clap::Error, command: Option<&str>, words: &[String]) -> String {
    let has = |kind, part: &str| context(error, kind).iter().any(|text| text.contains(part));
    let is_network = || NETWORKS.iter().any(|kind| has(ContextKind::InvalidValue, kind));
    let names = |option: &str| words.iter().any(|word| word.starts_with(option));
    match command {
        Some("relay") if !words.iter().any(|word| word == "--") && !names("--pid") && !names("--netns") => {
            "; a command goes after --".to_owned()
        }
        Some("allow" | "deny")
            if has(ContextKind::InvalidArg, "<PORT>") && (is_network() || port_comes_first(words)) =>
        {
            "; the network goes before the ports".to_owned()
        }
        Some("explain" | "verify") if port_comes_first(words) => {
            "; the network goes before the port".to_owned()
        }
        // As in `bridge lab0 80`: the name was taken for a port.
        Some("allow" | "deny" | "explain") => one_word(words).unwrap_or_default(),
        _ => String::new(),
    }
}

/// Returns true if a port stands in the network's place.
fn port_comes_first(words: &[String]) -> bool {
    let mut rest = words.iter().skip_while(|word| Cli::command().find_subcommand(word).is_none()).skip(1);
    rest.find(|word| !word.starts_with('-')).is_some_and(|word| word.parse::<PortSpec>().is_ok())
}

/// Returns a suggestion if the network was written as two words.
fn one_word(words: &[String]) -> Option<String> {
    let pairs =
        words.windows(2).filter(|pair| NETWORKS.iter().any(|kind| kind.strip_suffix(':') == Some(&pair[0])));
    // Docker has a network called bridge.
    let mut meant = pairs.filter(|pair| pair[0] != "bridge" || pair[1].parse::<PortSpec>().is_err());
    meant.next().map(|pair| format!("; did you mean {}:{}?", pair[0], pair[1]))
}

//! manual: what the man pages and `--help` say beyond the definition of the command line: examples, the exit
//! statuses, the states of rules, files, environment variables. Plain data; `examples/manual.rs` makes pages
//! of it.
//!
//! - `pages`: one entry for each command;
//! - [`configuration`]: lbridge.toml, key by key.

pub mod configuration;
mod pages;

use std::fmt::Write as _;

use clap::Command;

use super::Exit;
use crate::service;

pub use pages::PAGES;

/// The manual's text about one command.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// The command's name without `lbridge`, such as `service install`; empty for `lbridge` itself.
    pub command: &'static str,
    /// The paragraphs of the description, if the command's own text in `--help` is too short for one.
    pub description: &'static [&'static str],
    /// Commands that a user would type, with what comes of it.
    pub examples: &'static [Example],
    /// The exit statuses that the command can have.
    pub exits: &'static [Exit],
    /// A sentence about exit statuses that hold for this command alone; may be empty.
    pub exit_note: &'static str,
    /// True if the page explains the states of rules.
    pub has_states: bool,
    /// Files that matter to the command.
    pub files: &'static [Entry],
    /// Environment variables that are not options of the command.
    pub environment: &'static [Entry],
    /// Other pages to read, each with its section, as in `docker(1)`.
    pub see_also: &'static [&'static str],
}

/// A name and what it means.
pub type Entry = (&'static str, &'static str);

/// An example of a command.
#[derive(Debug, Clone, Copy)]
pub struct Example {
    /// The purpose, as the beginning of a sentence that ends with a colon.
    pub purpose: &'static str,
    /// The command behind its prompt, `#` for root and `$` for a user; then what it prints.
    pub lines: &'static [&'static str],
}

/// The exit statuses, each with a word for `lbridge --help` and a sentence for the pages.
pub const EXIT_STATUS: [(Exit, &str, &str); 5] = [
    (Exit::Done, "done", "Done, also for a rule that waits or is blocked."),
    (
        Exit::Failed,
        "failed or output not written",
        "Failed, or standard output could not be written to. One line on standard error says why, and what \
         to type.",
    ),
    (Exit::Usage, "usage", "The command line is invalid."),
    (Exit::NoDaemon, "no daemon", "The daemon is not reachable, or ended before it answered."),
    (Exit::Rule, "no such rule or a conflict", "There is no such rule, or it conflicts with another."),
];

/// The states of a rule, as `status`, `allow` and `events` print them.
pub const STATES: [Entry; 4] = [
    (
        "steered",
        "The kernel gives connections to the service's own socket. They need no daemon, and outlive it.",
    ),
    (
        "relayed (why)",
        "The daemon carries the connections, since the kernel cannot: they end with the daemon. The reason \
         says what would have them steered, if anything.",
    ),
    (
        "waiting (why)",
        "The service, the container or the network is not there yet. Connections are refused; the rule takes \
         effect by itself once it is there.",
    ),
    (
        "blocked (why)",
        "The rule cannot be served until something is changed. The reason says what; lbridge doctor says \
         what to type.",
    ),
];

const CONFIG_FILE: Entry =
    (service::CONFIG, "The administrator's rules and settings; see lbridge.toml(5). It may be absent.");
const RULES_FILE: Entry = ("/var/lib/lbridge/rules.toml", "The rules that lbridge allow made.");
const SOCKET: Entry =
    (service::SOCKET, "The control socket: for root, and for members of the group lbridge if there is one.");
const PINS: Entry =
    (service::BPFFS, "The kernel's programs and maps, which stay in force without the daemon.");
const UNIT: Entry = ("/etc/systemd/system/lbridge.service", "The unit that lbridge service install writes.");
const DOCUMENTATION: Entry =
    ("/usr/share/doc/lbridge", "The guide: how it works, its limits, security, troubleshooting.");

const LOG: Entry =
    ("LBRIDGE_LOG", "What is logged to standard error: error, warn, info, debug or trace. By default info.");
const QUIET_LOG: Entry = (
    "LBRIDGE_LOG",
    "What is logged to standard error: error, warn, info, debug or trace. By default warn with a COMMAND, \
     info without.",
);
const DOCKER_HOST: Entry = (
    "DOCKER_HOST",
    "The engine, Docker or Podman, as unix:///run/podman/podman.sock. By default \
     unix:///var/run/docker.sock.",
);

/// Returns what the manual says about a command, by [`Page::command`].
pub fn page(command: &str) -> Option<&'static Page> {
    PAGES.iter().find(|page| page.command == command)
}

/// Adds the examples to `--help` of each command, but not to `-h`; and the exit statuses to that of
/// `lbridge`.
pub(super) fn with_examples(command: Command, first_steps: &str) -> Command {
    let statuses = EXIT_STATUS.map(|(exit, word, _)| format!("{} {word}", exit as u8)).join(", ");
    commands_with_examples(command, "").after_help(format!("{first_steps}\n\nExit status: {statuses}."))
}

fn commands_with_examples(command: Command, path: &str) -> Command {
    let names: Vec<_> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let command = names.iter().fold(command, |command, name| {
        let path = format!("{path} {name}").trim_start().to_owned();
        command.mut_subcommand(name, |command| commands_with_examples(command, &path))
    });
    match page(path) {
        Some(page) if !path.is_empty() => command.after_long_help(examples_text(page.examples)),
        _ => command,
    }
}

fn examples_text(examples: &[Example]) -> String {
    let mut text = "Examples:".to_owned();
    for example in examples {
        let _ = write!(text, "\n  {}:\n", example.purpose);
        for line in example.lines {
            let _ = write!(text, "\n    {line}");
        }
        text.push('\n');
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    /// Returns all commands that people use, by their paths.
    fn commands(command: &Command, path: &str) -> Vec<(String, Command)> {
        let mut all = vec![(path.to_owned(), command.clone())];
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            all.extend(commands(command, format!("{path} {}", command.get_name()).trim_start()));
        }
        all
    }

    #[test]
    fn every_command_has_a_page_and_every_page_a_command() {
        let commands = commands(&cli::command(), "");
        for (path, command) in &commands {
            let page = page(path).unwrap_or_else(|| panic!("no page for {path:?}"));
            let is_parent = command.has_subcommands() && !path.is_empty();
            let enough = if is_parent || *path == "service cleanup" { 1 } else { 2 };
            assert!(page.examples.len() >= enough, "{path:?}: {} examples", page.examples.len());
            assert!(page.exits.contains(&Exit::Done) && page.exits.contains(&Exit::Usage), "{path:?}");
        }
        assert_eq!(commands.len(), PAGES.len());
    }

    /// The words of a command, as a shell splits one without quotes; without what its output is piped to.
    fn words(line: &str) -> Vec<&str> {
        line.split(' ').take_while(|word| !["|", ">", "#", "<", "&&", "\\"].contains(word)).collect()
    }

    #[test]
    fn every_example_is_a_command_line_that_is_taken() {
        let mut tried = 0;
        for page in PAGES {
            let mut is_shown = false;
            for example in page.examples {
                let prompts = ["# ", "$ "].map(|prompt| example.lines[0].starts_with(prompt));
                assert!(prompts.contains(&true), "{}", example.lines[0]);
                assert!(!example.purpose.ends_with([':', '.']), "{}", example.purpose);
                for line in example.lines {
                    let command = line.strip_prefix("# ").or_else(|| line.strip_prefix("$ "));
                    let Some(words) = command.map(words).filter(|words| words[0] == "lbridge") else {
                        continue;
                    };
                    cli::command()
                        .try_get_matches_from(&words)
                        .unwrap_or_else(|error| panic!("{line}: {error}"));
                    is_shown |= words[1..].join(" ").starts_with(page.command);
                    tried += 1;
                }
            }
            assert!(is_shown, "no example of {:?}", page.command);
        }
        assert!(tried > 30, "{tried}");
    }

    #[test]
    fn examples_fit_into_80_columns() {
        for page in PAGES {
            for example in page.examples {
                // A man page indents them twice, by 7 and by 4.
                let longest = example.lines.iter().map(|line| line.chars().count()).max();
                assert!(longest.unwrap_or_default() <= 69, "{:?}", example.lines);
                assert!(example.purpose.chars().count() <= 76, "{}", example.purpose);
            }
        }
    }

    #[test]
    fn help_is_long_and_h_is_short() {
        let help = |words: &[&str]| cli::command().try_get_matches_from(words).unwrap_err().to_string();
        let (long, short) = (help(&["lbridge", "allow", "--help"]), help(&["lbridge", "allow", "-h"]));
        assert!(
            long.contains("Examples:") && long.contains("\n    # lbridge allow app_net 5432\n"),
            "{long}"
        );
        assert!(!short.contains("Examples:"), "{short}");
        assert!(help(&["lbridge", "--help"]).contains("3 no daemon, 4 no such rule"));
    }
}

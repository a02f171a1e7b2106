//! `lbridge complete`: prints what the last word of a command line could become, for the completion scripts.
//! Asks the daemon for networks, rules and ports, and the engine for containers; without their answers these
//! are left out. Never fails, and prints no error: it runs whenever somebody presses TAB.

use std::{path::PathBuf, time::Duration};

use clap::{Arg, Args, Command, ValueHint};
use tokio::time::timeout;

use super::{Failure, render};
use crate::{
    api::{
        client::Client,
        protocol::{RuleStatus, Status},
    },
    docker::client,
    host::interfaces,
    planning::rule::{Network, Origin},
};

/// Longest wait for the daemon or the engine. Somebody is waiting, with a hand at the keyboard.
const LIMIT: Duration = Duration::from_millis(500);

/// Printed alone in place of candidates: the shell should complete a file.
const FILES: &str = "/";

/// Arguments of `lbridge complete`.
#[derive(Debug, Args)]
pub(super) struct CompleteArgs {
    /// The words up to the cursor, the program's name included; the last is completed, and may be empty
    #[arg(last = true)]
    words: Vec<String>,
}

/// A word that could stand at the cursor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    /// The whole word, with what was typed of it.
    pub(super) word: String,
    /// A few words about it; may be empty.
    pub(super) about: String,
}

pub(super) fn handle(args: &CompleteArgs, socket: PathBuf) -> Result<(), Failure> {
    let mut command = super::command();
    command.build();
    let Some((current, before)) = args.words.split_last() else { return Ok(()) };
    let line = Line::read(&command, before.get(1..).unwrap_or_default());
    let candidates = super::block_on(async { Ok(line.candidates(current, socket).await) })?;
    render::candidates(candidates.iter().map(|candidate| (&*candidate.word, &*candidate.about)))
}

/// The part of a command line before the cursor.
struct Line<'a> {
    /// The command that the words lead to.
    command: &'a Command,
    /// The words that are neither commands nor options.
    positionals: Vec<&'a str>,
    /// The daemon's socket, if the words name it.
    socket: Option<&'a str>,
    /// The option whose value the current word is.
    pending: Option<&'a Arg>,
    /// True after `--`: what follows are no options.
    is_escaped: bool,
}

impl<'a> Line<'a> {
    fn read(command: &'a Command, words: &'a [String]) -> Self {
        let mut line = Self { command, positionals: vec![], socket: None, pending: None, is_escaped: false };
        for word in words {
            line.take(word);
        }
        line
    }

    fn take(&mut self, word: &'a str) {
        if let Some(option) = self.pending.take() {
            self.set(option, word);
        } else if self.is_escaped {
            self.positionals.push(word);
        } else if word == "--" {
            self.is_escaped = true;
        } else if let Some(long) = word.strip_prefix("--") {
            let (name, value) =
                long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
            let option = self.option(name).filter(|option| option.get_action().takes_values());
            match (option, value) {
                (Some(option), Some(value)) => self.set(option, value),
                (option, _) => self.pending = option,
            }
        } else if word.len() > 1 && word.starts_with('-') {
            // The short options, -h and -V, take no values.
        } else {
            match self.command.find_subcommand(word).filter(|_| self.positionals.is_empty()) {
                Some(command) => self.command = command,
                None => self.positionals.push(word),
            }
        }
    }

    fn set(&mut self, option: &Arg, value: &'a str) {
        if option.get_id() == "socket" {
            self.socket = Some(value);
        }
    }

    fn option(&self, name: &str) -> Option<&'a Arg> {
        self.command.get_arguments().find(|arg| arg.get_long() == Some(name))
    }

    /// Returns the positional argument that the current word is.
    fn positional(&self) -> Option<&'a Arg> {
        let (last, others): (Vec<_>, Vec<_>) =
            self.command.get_positionals().partition(|positional| positional.is_last_set());
        if self.is_escaped && !last.is_empty() {
            return last.first().copied();
        }
        let takes_more = |arg: &&&Arg| arg.get_num_args().is_some_and(|range| range.max_values() > 1);
        others.get(self.positionals.len()).or_else(|| others.last().filter(takes_more)).copied()
    }

    async fn candidates(&self, current: &str, socket: PathBuf) -> Vec<Candidate> {
        let socket = self.socket.map_or(socket, PathBuf::from);
        let typed_option = current.strip_prefix("--").filter(|_| !self.is_escaped);
        let candidates = if let Some(option) = self.pending {
            self.values(option, current, socket).await
        } else if let Some((name, value)) = typed_option.and_then(|option| option.split_once('=')) {
            let Some(option) = self.option(name) else { return vec![] };
            let values = self.values(option, value, socket).await;
            if values.iter().any(|value| value.word == FILES) {
                return values;
            }
            values.into_iter().map(|value| value.behind(&format!("--{name}="))).collect()
        } else if !self.is_escaped && current.starts_with('-') {
            let options = self.command.get_arguments().filter(|arg| !arg.is_hide_set());
            options
                .filter_map(|arg| Some(Candidate::new(format!("--{}", arg.get_long()?), &help(arg))))
                .collect()
        } else if self.positionals.is_empty() && self.command.has_subcommands() && !self.is_escaped {
            let commands = self.command.get_subcommands().filter(|command| !command.is_hide_set());
            let about = |command: &Command| command.get_about().map(ToString::to_string).unwrap_or_default();
            commands.map(|command| Candidate::new(command.get_name().to_owned(), &about(command))).collect()
        } else if let Some(positional) = self.positional() {
            self.values(positional, current, socket).await
        } else {
            vec![]
        };
        let fits = |candidate: &Candidate| candidate.word == FILES || candidate.word.starts_with(current);
        candidates.into_iter().filter(fits).collect()
    }

    /// Returns the values that an argument could have.
    async fn values(&self, arg: &Arg, current: &str, socket: PathBuf) -> Vec<Candidate> {
        let client = Client::new(&socket);
        match (self.command.get_name(), arg.get_id().as_str()) {
            ("allow", "network") => match status(&client).await {
                Some(status) => networks(status).await,
                None => vec![],
            },
            ("deny" | "explain" | "verify", "network") => {
                let rules = self.rules(&client).await;
                let mut networks: Vec<_> = rules.iter().map(|rule| rule.network.to_string()).collect();
                networks.dedup();
                networks.into_iter().filter_map(|network| Candidate::of_name(network, "")).collect()
            }
            ("deny", "ports") | ("explain" | "verify", "port") => {
                let Some((network, typed)) = self.positionals.split_first() else { return vec![] };
                let rules = self.rules(&client).await.into_iter();
                let of_network = rules.filter(|rule| rule.network.to_string() == **network);
                let ports = of_network.filter_map(|rule| {
                    Candidate::of_name(format!("{}{}", rule.port, rule.protocol.suffix()), &rule.target)
                });
                ports.filter(|port| !typed.contains(&port.word.as_str())).collect()
            }
            ("allow", "from") => {
                let Some(Ok(Network::Docker(network))) = self.positionals.first().map(|text| text.parse())
                else {
                    return vec![];
                };
                let typed = current.rfind(',').map_or("", |comma| &current[..=comma]);
                let names = timeout(LIMIT, client::containers_of(&network)).await;
                let names = names.ok().and_then(Result::ok).unwrap_or_default().into_iter();
                let names = names.filter(|name| !typed.split(',').any(|typed| typed == name));
                names.filter_map(|name| Candidate::of_name(name, "")).map(|name| name.behind(typed)).collect()
            }
            _ => simple_values(arg),
        }
    }

    /// Returns the rules that the command could name.
    async fn rules(&self, client: &Client) -> Vec<RuleStatus> {
        let rules = status(client).await.map(|status| status.rules).unwrap_or_default();
        // The rules of the file and of labels are not removed by `deny`.
        let is_meant = |rule: &RuleStatus| self.command.get_name() != "deny" || rule.origin == Origin::Cli;
        rules.into_iter().filter(is_meant).collect()
    }
}

impl Candidate {
    fn new(word: String, about: &str) -> Self {
        let about = about.lines().next().unwrap_or_default();
        Self { word, about: about.to_owned() }
    }

    /// Creates a candidate of a name that others have chosen; `None` if a shell would read it as more than a
    /// word, or a command as an option.
    fn of_name(name: String, about: &str) -> Option<Self> {
        let is_plain = |c: char| c.is_alphanumeric() || "_.-:/".contains(c);
        let fits = !name.is_empty() && !name.starts_with('-') && name != FILES && name.chars().all(is_plain);
        fits.then(|| Self::new(name, about))
    }

    fn behind(self, typed: &str) -> Self {
        Self { word: format!("{typed}{}", self.word), ..self }
    }
}

async fn status(client: &Client) -> Option<Status> {
    timeout(LIMIT, client.status()).await.ok()?.ok()
}

/// Lists the networks that a rule could be for: the engine's, the host's other bridges, and what rules name.
async fn networks(status: Status) -> Vec<Candidate> {
    let interfaces = interfaces::list().await.unwrap_or_default();
    let is_engines =
        |name: &String| status.docker_networks.iter().any(|network| network.bridge.as_ref() == Some(name));
    let bridges = interfaces.into_iter().filter(|interface| interface.is_bridge).map(|bridge| bridge.name);
    let bridges = bridges.filter(|name| !is_engines(name)).map(|name| (format!("bridge:{name}"), "bridge"));
    let engines = status.docker_networks.iter();
    let engines = engines.map(|network| (network.name.clone(), network.driver.as_str()));
    let ruled = status.rules.iter().map(|rule| (rule.network.to_string(), "has rules"));
    let mut candidates: Vec<Candidate> = vec![];
    for (name, about) in engines.chain(bridges).chain(ruled) {
        let is_new = |name: &String| candidates.iter().all(|candidate| candidate.word != *name);
        if let Some(candidate) = Some(name).filter(is_new).and_then(|name| Candidate::of_name(name, about)) {
            candidates.push(candidate);
        }
    }
    candidates
}

/// Returns the values that the definition of the command line alone tells.
fn simple_values(arg: &Arg) -> Vec<Candidate> {
    let possible = arg.get_possible_values();
    if !possible.is_empty() {
        let help = |value: &clap::builder::PossibleValue| value.get_help().map(ToString::to_string);
        let named = possible
            .iter()
            .map(|value| Candidate::new(value.get_name().to_owned(), &help(value).unwrap_or_default()));
        return named.collect();
    }
    // As in --source <container|loopback>.
    let names = arg.get_value_names().and_then(|names| names.first()).map_or("", |name| name.as_str());
    if names.contains('|') {
        return names.split('|').map(|name| Candidate::new(name.to_owned(), "")).collect();
    }
    let is_path = arg.get_value_hint() == ValueHint::AnyPath || arg.is_last_set();
    let files = is_path.then(|| Candidate::new(FILES.to_owned(), ""));
    files.into_iter().collect()
}

fn help(arg: &Arg) -> String {
    arg.get_help().map(ToString::to_string).unwrap_or_default()
}

//! commands: the command lines in a document. What it shows of `lbridge` and of `cargo xtask` must be
//! accepted by the definitions of their command lines.

use std::path::Path;

use clap::CommandFactory as _;
use clap::error::ErrorKind;

use super::{Finding, markdown};

/// Checks the command lines of a document: those in its blocks of shell commands as a whole; of those in the
/// text, where words stand for values, the subcommands and the options.
pub(super) fn check(path: &Path, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut continued: Option<(usize, String)> = None;
    for line in markdown::lines(text) {
        let Some(block) = line.block else {
            let faults = spans(line.text).filter_map(|span| synopsis_fault(split(&span).first()?));
            findings.extend(faults.map(|fault| Finding::new(path, line.number, fault)));
            continue;
        };
        let typed = match (&continued, block) {
            (Some(_), _) | (None, "sh") => line.text,
            (None, "console") => match line.text.strip_prefix("# ").or(line.text.strip_prefix("$ ")) {
                Some(typed) => typed,
                None => continue,
            },
            _ => continue,
        };
        let (number, mut command) = continued.take().unwrap_or((line.number, String::new()));
        if let Some(part) = typed.strip_suffix('\\') {
            command += part;
            continued = Some((number, command));
            continue;
        }
        command += typed;
        let faults = split(&command).into_iter().filter_map(|words| command_fault(&words));
        findings.extend(faults.map(|fault| Finding::new(path, number, fault)));
    }
    findings
}

/// Returns the definition of the command line that the words are for, and the words that it parses.
fn definition(words: &[String]) -> Option<(clap::Command, &[String])> {
    // The program's own words, after those that set its surroundings.
    let is_prefix = |word: &&String| *word == "sudo" || (word.contains('=') && !word.starts_with('-'));
    let words = &words[words.iter().take_while(is_prefix).count()..];
    match words {
        [program, ..] if program.rsplit('/').next() == Some("lbridge") => {
            Some((lbridge::cli::command(), words))
        }
        [cargo, xtask, ..] if cargo == "cargo" && xtask == "xtask" => {
            Some((crate::Cli::command(), &words[1..]))
        }
        _ => None,
    }
}

/// Returns the reason why a command line is not accepted.
fn command_fault(words: &[String]) -> Option<String> {
    // A value's name, such as NETWORK, is not meant to be typed.
    let is_name = |word: &String| word.len() > 1 && word.chars().all(|c| c.is_ascii_uppercase());
    if words.iter().any(is_name) {
        return synopsis_fault(words);
    }
    let (definition, words) = definition(words)?;
    let error = definition.try_get_matches_from(words).err()?;
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return None;
    }
    let message = error.to_string();
    let message = message.lines().next().unwrap_or_default().trim_start_matches("error: ");
    Some(format!("`{}`: {message}", words.join(" ")))
}

/// Returns the reason why a command line with names in place of values cannot be right.
fn synopsis_fault(words: &[String]) -> Option<String> {
    let (mut command, words) = definition(words)?;
    let line = words.join(" ");
    command.build();
    let mut options = options(&command);
    let mut words = words[1..].iter().peekable();
    while let Some(below) = words.peek().and_then(|word| command.find_subcommand(word)) {
        command = below.clone();
        options.extend(self::options(&command));
        words.next();
    }
    let is_a_name = |word: &str| word.starts_with(|c: char| c.is_ascii_lowercase());
    if command.has_subcommands()
        && let Some(word) = words.peek().filter(|word| is_a_name(word))
    {
        return Some(format!("`{line}`: there is no command {word}"));
    }
    // After `--` comes the command line of another program.
    let unknown = words.take_while(|word| *word != "--").find(|word| {
        let name = word.split(['=', '[']).next().unwrap_or_default();
        name.starts_with("--") && !options.iter().any(|option| *option == name[2..])
    })?;
    Some(format!("`{line}`: there is no option {unknown}"))
}

fn options(command: &clap::Command) -> Vec<String> {
    command.get_arguments().filter_map(|argument| argument.get_long().map(str::to_owned)).collect()
}

/// Lists the code spans of a line.
fn spans(line: &str) -> impl Iterator<Item = String> {
    // After the last quote there is none.
    let count = line.matches('`').count() / 2;
    line.split('`').skip(1).step_by(2).take(count).map(str::to_owned)
}

/// Splits a line of a shell into the words of its commands. Comments and redirections are dropped.
fn split(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (Some('"') | None, '\\') => word.get_or_insert_default().extend(chars.next()),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, ' ' | '\t' | '|' | '&' | ';' | '(' | ')' | '>' | '<') => {
                if let Some(word) = word.take() {
                    commands.last_mut().expect("one at least").push(word);
                }
                // A redirection's file becomes a command of its own, which nothing here defines.
                if !c.is_whitespace() {
                    commands.push(Vec::new());
                }
            }
            _ => word.get_or_insert_default().push(c),
        }
    }
    commands.last_mut().expect("one at least").extend(word);
    commands.retain(|words| !words.is_empty());
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    fn found(text: &str) -> Vec<usize> {
        check(Path::new("a.md"), text).into_iter().filter_map(|finding| finding.line).collect()
    }

    #[test]
    fn blocks_are_parsed_as_they_would_be_run() {
        let right = "```console\n# lbridge allow app_net 5432 --from web | cat\n\
                     lbridge nonsense, in the output\n\
                     $ sudo LBRIDGE_LOG=debug lbridge status --json   # a comment\n```\n\
                     ```sh\ncargo xtask test --setup && cargo build --nonsense\n\
                     lbridge allow \\\n  app_net 80\n```\n";
        assert_eq!(found(right), NONE);
        let wrong = "```console\n# lbridge allow app_net 99999\n$ true; lbridge nonsense\n```\n\
                     ```sh\ncargo xtask --nonsense\nlbridge allow \\\n  app_net 80 --nonsense\n```\n\
                     ```text\nlbridge nonsense\n```\n";
        assert_eq!(found(wrong), [2, 3, 6, 7]);
    }

    #[test]
    fn spans_name_commands_and_options() {
        let right = "`lbridge explain NETWORK PORT --json`, `lbridge`, `lbridge relay 80 -- curl --fail`, \
                     `other --option`\n";
        assert_eq!(found(right), NONE);
        assert_eq!(found("```sh\nlbridge explain NETWORK PORT\n```\n"), NONE);
        assert_eq!(found("```sh\nlbridge explain NETWORK PORT --nonsense\n```\n"), [2]);
        assert_eq!(found("a `lbridge nonsense`\n"), [1]);
        assert_eq!(found("\n`lbridge allow NETWORK PORT --nonsense=5`\n"), [2]);
    }

    #[test]
    fn words_are_split_as_by_a_shell() {
        let words = |line| split(line).into_iter().map(|words| words.join("_")).collect::<Vec<_>>();
        assert_eq!(words("a 'b c' \"d e\"f | g;h # i"), ["a_b c_d ef", "g", "h"]);
        assert_eq!(words("a b\\ c >d 2>&1"), ["a_b c", "d_2", "1"]);
        assert_eq!(words("# all of it"), Vec::<String>::new());
    }
}

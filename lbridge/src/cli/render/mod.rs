//! render: all output, with one file for each kind and the shared parts here. Names come from elsewhere
//! (networks, comments), so everything that could act on a terminal is escaped.

mod configuration;
mod doctor;
mod events;
mod explain;
mod import;
mod rules;
mod status;
mod top;
mod verify;

use std::{
    fmt::{Display, Write as _},
    io::{self, Write as _},
};

use jiff::{Timestamp, tz::TimeZone};
use serde::Serialize;

use super::{Failure, log};
use crate::planning::{
    desired::State,
    text::{is_unprintable, shown},
};
pub(super) use {
    configuration::{changes, config, reloaded},
    doctor::examination,
    events::event,
    explain::explanation,
    import::{import_plan, imported},
    rules::{denied, rules, states},
    status::status,
    top::{Screen, load, load_in_place},
    verify::verification,
};

const NO_RULES: &str = "No rules. Allow a network's containers a port: lbridge allow NETWORK PORT\n";

/// Prints lines whose cells were already escaped with [`shown`]. Escapes again, so that a cell that was
/// forgotten cannot act on a terminal.
fn print(text: &str) -> Result<(), Failure> {
    print_on(text).map(drop)
}

/// Like [`print()`]; returns true if standard output still has a reader.
fn print_on(text: &str) -> Result<bool, Failure> {
    let lines: Vec<_> = text.split('\n').map(shown).collect();
    write(lines.join("\n").as_bytes())
}

/// Writes bytes to standard output unchanged; returns true if it still has a reader.
fn write(bytes: &[u8]) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    read_on(out.write_all(bytes).and_then(|()| out.flush()))
}

fn read_on(written: io::Result<()>) -> Result<bool, Failure> {
    match written {
        Ok(()) => Ok(true),
        // The reader, such as `| head`, has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to standard output").into()),
    }
}

/// Prints an error in one line, whatever the message contains.
pub(super) fn error(message: &str) {
    log::say(&format!("lbridge: {}", shown(&message.replace(['\n', '\r'], " "))));
}

/// Prints the output of `--help` and `--version`, in colour where clap decides so.
pub(super) fn help(help: &clap::Error) -> Result<(), Failure> {
    read_on(help.print().and_then(|()| io::stdout().flush())).map(drop)
}

/// Prints a shell's completion script.
pub(super) fn script(script: &[u8]) -> Result<(), Failure> {
    write(script).map(drop)
}

/// Prints the candidates for a completion, each a word and a text about it, which may be empty: one a line,
/// with a tab before the text.
pub(super) fn candidates<'a>(candidates: impl Iterator<Item = (&'a str, &'a str)>) -> Result<(), Failure> {
    let line = |(word, about)| match about {
        "" => shown(word) + "\n",
        about => format!("{}\t{}\n", shown(word), shown(about)),
    };
    write(candidates.map(line).collect::<String>().as_bytes()).map(drop)
}

/// Prints JSON for programs.
pub(super) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    write((escaped(&text) + "\n").as_bytes()).map(drop)
}

/// Prints one line of a JSON stream; returns true if standard output still has a reader.
pub(super) fn json_line(value: &impl Serialize) -> Result<bool, Failure> {
    let text = serde_json::to_string(value).map_err(anyhow::Error::from)?;
    write((escaped(&text) + "\n").as_bytes())
}

/// Escapes JSON without loss, so that it cannot act on a terminal. Serde escapes only what JSON demands,
/// which is C0. The other control characters occur only within strings, since JSON has none of them
/// elsewhere.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if is_unprintable(c) && !c.is_ascii_whitespace() {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                let _ = write!(text, "\\u{unit:04x}");
            });
        } else {
            text.push(c);
        }
    }
    text
}

fn described(state: State, why: Option<&str>) -> String {
    let state = match state {
        State::Steered => "steered",
        State::Relayed => "relayed",
        State::Waiting => "waiting",
        State::Blocked => "blocked",
    };
    match why {
        Some(why) => format!("{state} ({})", shown(why)),
        None => state.to_owned(),
    }
}

fn time(at: Timestamp) -> impl Display {
    at.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S")
}

/// A table whose columns are as wide as their widest cell; the last column is not padded.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|&h| h.to_owned()).collect()] }
    }

    fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    fn to_text(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, "{cell:width$}  ");
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_escaped_and_loses_nothing() {
        let text = "a\u{1b}[2J\u{7f}\u{9b}\u{202e}\u{2028}\u{e0041}b\n\"grün\"\\";
        for json in [serde_json::to_string(&[text]), serde_json::to_string_pretty(&[text])] {
            let escaped = escaped(&json.unwrap());
            assert!(escaped.chars().all(|c| c == '\n' || !is_unprintable(c)), "{escaped}");
            assert!(escaped.contains(r"\u202e") && escaped.contains("grün"), "{escaped}");
            assert_eq!(serde_json::from_str::<Vec<String>>(&escaped).unwrap(), [text]);
        }
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["A", "B", "C"]);
        table.row(["long".to_owned(), "x".to_owned(), String::new()]);
        assert_eq!(table.to_text(), "A     B  C\nlong  x\n");
    }
}

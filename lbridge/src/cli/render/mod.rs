//! All output, in a file for each kind; here is what they share. Names come from elsewhere (networks, remarks), so whatever
//! could act on a terminal is escaped.

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

use super::Failure;
use crate::planning::policy::State;
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

fn print(text: &str) -> Result<(), Failure> {
    print_on(text).map(drop)
}

/// Whether anybody reads on.
fn print_on(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        // `| head` has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to standard output").into()),
    }
}

/// What went wrong: one line, whatever the message holds.
pub(super) fn error(message: &str) {
    eprintln!("lbridge: {}", shown(&message.replace(['\n', '\r'], " ")));
}

/// JSON, for programs.
pub(super) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    text.push('\n');
    print(&text)
}

/// JSON in one line, of many; whether anybody reads on.
pub(super) fn json_line(value: &impl Serialize) -> Result<bool, Failure> {
    print_on(&(serde_json::to_string(value).map_err(anyhow::Error::from)? + "\n"))
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

/// Without anything that a terminal would act on.
fn shown(text: &str) -> String {
    // Bidirectional controls would let a name change how the rest of its line reads.
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let shown = |c: char| if acts(c) { c.escape_default().collect() } else { vec![c] };
    text.chars().flat_map(shown).collect()
}

/// Columns as wide as their widest cell, the last one free.
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
    fn names_cannot_act_on_the_terminal() {
        assert_eq!(shown("a\u{1b}[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(shown("grün"), "grün");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["A", "B", "C"]);
        table.row(["long".to_owned(), "x".to_owned(), String::new()]);
        assert_eq!(table.to_text(), "A     B  C\nlong  x\n");
    }
}

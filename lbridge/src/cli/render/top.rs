//! `top`: prints the table, and the screen that it is drawn on.

use std::io;

use super::{NO_RULES, Table, described, print_on, shown, time, write};
use crate::cli::{
    Failure,
    load::{Look, Relayed},
};

/// Prints the rules by load; returns true if standard output still has a reader.
pub(in crate::cli) fn load(look: &Look) -> Result<bool, Failure> {
    print_on(&(load_text(look) + "\n"))
}

/// Like [`load`], but draws over the previous table on the [`Screen`], as far as its height allows.
pub(in crate::cli) fn load_in_place(look: &Look) -> Result<bool, Failure> {
    let text = load_text(look);
    let lines: Vec<_> = text.lines().take(terminal_height()).map(shown).collect();
    write((CLEARED.to_owned() + &lines.join("\r\n")).as_bytes())
}

fn load_text(look: &Look) -> String {
    let mut table =
        Table::new(&["NETWORK", "PORT", "STATE", "CONN/S", "TOTAL", "OPEN", "TO SERVICE", "BACK"]);
    for rule in &look.rules {
        let relayed =
            |cell: fn(&Relayed) -> String| rule.relayed.as_ref().map_or_else(|| "-".to_owned(), cell);
        table.row([
            shown(&rule.network.to_string()),
            format!("{}{}", rule.port, rule.protocol.suffix()),
            described(rule.state, None),
            format!("{:.1}", rule.per_second),
            rule.connections.to_string(),
            relayed(|relayed| relayed.open.to_string()),
            relayed(|relayed| bytes(relayed.to_service)),
            relayed(|relayed| bytes(relayed.to_client)),
        ]);
    }
    format!(
        "{}\n{}",
        time(look.at),
        if look.rules.is_empty() { NO_RULES.to_owned() } else { table.to_text() }
    )
}

/// Formats a number of bytes: `512`, `1.5 KiB`, `3.0 GiB`.
fn bytes(count: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let Some(unit) = (1..=units.len()).rev().find(|unit| count >> (10 * unit) > 0) else {
        return count.to_string();
    };
    // Computed in tenths, without floating point.
    let tenths = (u128::from(count) * 10) >> (10 * unit);
    format!("{}.{} {}", tenths / 10, tenths % 10, units[unit - 1])
}

/// Control sequences for a terminal's alternate screen, with the cursor hidden and long lines cut off
/// (xterm's control sequences, console_codes(4)).
const ENTERED: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEFT: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
const CLEARED: &str = "\x1b[H\x1b[2J";

/// A terminal that is drawn on; restored when this is dropped.
pub(in crate::cli) struct Screen;

impl Screen {
    pub(in crate::cli) fn enter() -> Result<Self, Failure> {
        write(ENTERED.as_bytes())?;
        Ok(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // If this fails, the terminal's owner is gone, too.
        let _ = write(LEFT.as_bytes());
    }
}

/// Returns the number of lines that fit on the terminal.
fn terminal_height() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stdout());
    // If the terminal does not report its size, assume the smallest usual one.
    size.ok().map(|size| usize::from(size.ws_row)).filter(|rows| *rows > 0).unwrap_or(24)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_rounded_down() {
        let told = [0, 1023, 1024, 1535, 1536, 1 << 20, (1 << 40) - 1, u64::MAX].map(bytes);
        assert_eq!(told, ["0", "1023", "1.0 KiB", "1.4 KiB", "1.5 KiB", "1.0 MiB", "1023.9 GiB", "15.9 EiB"]);
    }
}

//! `reload`, `check-config`, `service`: prints the changes that were made, or would be.

use std::{fmt::Write as _, path::Path};

use super::{print, rules::states_text, shown};
use crate::{api::protocol::Reloaded, cli::Failure, store::config::Config};

/// Prints the changes that `reload` made.
pub(in crate::cli) fn reloaded(reloaded: &Reloaded) -> Result<(), Failure> {
    let Reloaded { added, changed, removed, settings } = reloaded;
    let mut text = states_text(added, "added    ");
    text += &states_text(changed, "changed  ");
    for rule in removed {
        let what = format!("{} {}", shown(&rule.network.to_string()), rule.port);
        let _ = writeln!(text, "removed  {what}; open connections go on");
    }
    for setting in settings {
        let _ = writeln!(text, "changed  {}", shown(&setting.to_string()));
    }
    print(if text.is_empty() { "nothing has changed\n" } else { &text })
}

/// Prints the result of `check-config`. `unread` are rules that could not be compared.
pub(in crate::cli) fn config(
    path: &Path,
    there: bool,
    config: &Config,
    unread: Option<&Path>,
) -> Result<(), Failure> {
    let mut text = shown(&path.display().to_string());
    let _ = match (there, config.len()) {
        (false, _) => write!(text, " does not exist, which is not an error: no rules"),
        (true, 0) => write!(text, ": no rules"),
        (true, 1) => write!(text, ": 1 rule"),
        (true, count) => write!(text, ": {count} rules"),
    };
    // The settings for labels do not matter while labels are off.
    let matters = |name: &str| match name {
        "aliases" => !config.aliases.is_empty(),
        _ => config.labels.enabled || !name.starts_with("label"),
    };
    for (name, value) in config.settings().into_iter().filter(|(name, _)| matters(name)) {
        let _ = write!(text, ", {name} {}", shown(&value));
    }
    if let Some(path) = unread {
        let _ =
            write!(text, "; not compared with {}, which root may read", shown(&path.display().to_string()));
    }
    text.push('\n');
    print(&text)
}

/// Prints the changes that `service` made, one per line.
pub(in crate::cli) fn changes(changes: &[String]) -> Result<(), Failure> {
    if changes.is_empty() {
        return print("nothing had to be changed\n");
    }
    let lines = changes.iter().map(|change| shown(change) + "\n");
    print(&lines.collect::<String>())
}

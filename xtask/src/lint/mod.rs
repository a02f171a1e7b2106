//! lint: `cargo xtask lint` checks the form of what no compiler reads: the width of lines, doc comments, the
//! links and the commands in the documents, and the subjects of commits.
//!
//! [`rust`] and [`markdown`] each check a file's text, [`commands`] the command lines in a document.

mod commands;
mod markdown;
mod rust;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::{output, root};

/// The length of a commit's subject, in columns, that still fits in a line of `git log --oneline`.
const SUBJECT_WIDTH: usize = 72;

/// A place that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    /// The file or the commit.
    place: String,
    /// The line's number, from 1, if the place has lines.
    line: Option<usize>,
    text: String,
}

impl Finding {
    fn new(file: &Path, line: usize, text: impl Into<String>) -> Finding {
        Finding { place: file.display().to_string(), line: Some(line), text: text.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { place, line, text } = self;
        match line {
            Some(line) => write!(f, "{place}:{line}: {text}"),
            None => write!(f, "{place}: {text}"),
        }
    }
}

/// Checks every file that git does not ignore, and the commits that the main branch does not have yet.
///
/// # Errors
///
/// If there is a finding. They are printed first.
pub(crate) fn handle() -> Result<()> {
    let files = files()?;
    let mut findings = check(&files, rust_width()?);
    findings.extend(subjects()?);
    for finding in &findings {
        println!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} findings in the form of sources, documents and commits", findings.len());
    }
    println!("{} files: nothing to mend", files.len());
    Ok(())
}

/// Reads every text file that is in git, or could be added, by its path from the root of the checkout.
fn files() -> Result<BTreeMap<PathBuf, String>> {
    let list = output(
        Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root()),
    )
    .context("list the files of the checkout")?;
    let mut files = BTreeMap::new();
    for name in list.split_terminator('\0') {
        // A deleted file is still listed, and the object is no text.
        if let Ok(text) = fs::read_to_string(root().join(name)) {
            files.insert(name.into(), text);
        }
    }
    Ok(files)
}

fn check(files: &BTreeMap<PathBuf, String>, rust_width: usize) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in files {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => findings.extend(rust::check(path, text, rust_width)),
            Some("md") => {
                findings.extend(markdown::check(path, text));
                findings.extend(commands::check(path, text));
            }
            _ => (),
        }
        findings.extend(markdown::mentions(path, text));
    }
    findings.extend(markdown::links(files));
    findings.extend(markdown::summary(files));
    findings.sort_by(|a, b| (&a.place, a.line).cmp(&(&b.place, b.line)));
    findings
}

/// Returns the width of a line of Rust, from rustfmt.toml: rustfmt keeps code within it, but neither comments
/// nor strings.
fn rust_width() -> Result<usize> {
    let path = root().join("rustfmt.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let table: toml::Table = text.parse().with_context(|| format!("read {}", path.display()))?;
    let width = table.get("max_width").and_then(toml::Value::as_integer).context("no max_width")?;
    Ok(usize::try_from(width)?)
}

/// Checks the subjects of the commits that are on top of the main branch; older ones stay as they are.
fn subjects() -> Result<Vec<Finding>> {
    let git = |arguments: &[&str]| output(Command::new("git").args(arguments).current_dir(root()));
    let main = ["origin/main", "main"]
        .into_iter()
        .find(|branch| git(&["rev-parse", "--verify", "--quiet", &format!("{branch}^{{commit}}")]).is_ok());
    // A clone of a single commit has no other branch.
    let Some(main) = main else { return Ok(Vec::new()) };
    let log = git(&["log", "--no-merges", "--format=%h %s", &format!("{main}..HEAD")])?;
    Ok(log.lines().filter_map(|line| line.split_once(' ')).filter_map(|(id, s)| subject(id, s)).collect())
}

fn subject(id: &str, subject: &str) -> Option<Finding> {
    let width = subject.chars().count();
    let text = if width > SUBJECT_WIDTH {
        format!("the subject has {width} columns, {SUBJECT_WIDTH} at most: {subject}")
    } else if !subject.contains(": ") && !subject.starts_with("Revert ") {
        format!("the subject is not of the form `area: summary`: {subject}")
    } else {
        return None;
    };
    Some(Finding { place: format!("commit {id}"), line: None, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_short_and_name_an_area() {
        assert_eq!(subject("abc", "relay: close both ends"), None);
        assert_eq!(subject("abc", "Revert \"relay: close both ends\""), None);
        assert!(subject("abc", "Close both ends").unwrap().text.contains("area: summary"));
        assert!(subject("abc", &format!("relay: {}", "x".repeat(66))).unwrap().text.contains("73 columns"));
    }
}

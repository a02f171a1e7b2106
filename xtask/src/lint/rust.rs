//! rust: the width of lines of Rust, and the form of doc comments.

use std::path::Path;

use super::Finding;

/// Words that open a fragment, not a sentence about the item.
const FRAGMENT_OPENINGS: [&str; 6] = ["What", "Which", "Whether", "How", "Its", "Who"];

/// A doc comment of so many words repeats the item's name.
const TOO_FEW_WORDS: usize = 2;

/// Checks the text of a source file.
pub(super) fn check(path: &Path, text: &str, width: usize) -> Vec<Finding> {
    let lines = scan(text);
    let mut findings = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let columns = line.text.chars().count();
        if columns > width && !line.is_fixed() {
            findings.push(Finding::new(path, index + 1, format!("{columns} columns, {width} at most")));
        }
    }
    for comment in doc_comments(&lines) {
        if let Some(text) = comment.fault() {
            findings.push(Finding::new(path, comment.line, text));
        }
    }
    findings
}

/// A line, and the parts of literals in it.
struct Line<'a> {
    text: &'a str,
    /// True if the line starts inside a literal whose value has the line break.
    starts_in_literal: bool,
    /// True if a raw string, which cannot be continued on another line, is in the line.
    has_raw_string: bool,
}

impl Line<'_> {
    /// Returns true if a line break would change the program, a link or a table.
    fn is_fixed(&self) -> bool {
        let comment =
            self.text.trim().strip_prefix("//").map(|text| text.trim_start_matches(['/', '!']).trim());
        let is_row_or_word = comment.is_some_and(|text| text.starts_with('|') || !text.contains(' '));
        self.starts_in_literal || self.has_raw_string || is_row_or_word
    }

    /// Returns the text of a doc comment, and its kind, `/` or `!`.
    fn doc(&self) -> Option<(char, &str)> {
        if self.starts_in_literal {
            return None;
        }
        let comment = self.text.trim_start().strip_prefix("//")?;
        match comment.chars().next()? {
            '/' if !comment.starts_with("//") => Some(('/', &comment[1..])),
            '!' => Some(('!', &comment[1..])),
            _ => None,
        }
    }
}

/// The scanner's place in the grammar.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Code,
    /// A block comment, with the number of those that it is nested in.
    Comment(usize),
    Literal,
    /// A raw literal, with the number of its `#`.
    Raw(usize),
}

/// Splits a source text into lines and finds the literals that span or fill them.
fn scan(text: &str) -> Vec<Line<'_>> {
    let mut state = State::Code;
    let mut is_continued = false;
    let mut lines = Vec::new();
    for text in text.lines() {
        let starts_in_literal = match state {
            State::Literal => !is_continued,
            State::Raw(_) => true,
            State::Code | State::Comment(_) => false,
        };
        let mut has_raw_string = false;
        is_continued = false;
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let mut length = c.len_utf8();
            match state {
                State::Code if rest.starts_with("//") => break,
                State::Code if rest.starts_with("/*") => (state, length) = (State::Comment(0), 2),
                State::Code if c == '"' => state = State::Literal,
                State::Code if c == '\'' => length = character(rest),
                State::Code if c.is_alphanumeric() || c == '_' => {
                    length = word(rest);
                    if let Some((hashes, opening)) = raw_opening(&rest[..length], &rest[length..]) {
                        (state, has_raw_string) = (State::Raw(hashes), true);
                        length += opening;
                    }
                }
                State::Comment(depth) if rest.starts_with("*/") => {
                    length = 2;
                    state = depth.checked_sub(1).map_or(State::Code, State::Comment);
                }
                State::Comment(depth) if rest.starts_with("/*") => {
                    (state, length) = (State::Comment(depth + 1), 2);
                }
                State::Literal if rest == "\\" => is_continued = true,
                State::Literal if c == '\\' => length += rest[1..].chars().next().map_or(0, char::len_utf8),
                State::Literal if c == '"' => state = State::Code,
                State::Raw(hashes) if c == '"' && rest[1..].starts_with(&"#".repeat(hashes)) => {
                    (state, length) = (State::Code, 1 + hashes);
                }
                State::Code | State::Comment(_) | State::Literal | State::Raw(_) => (),
            }
            rest = &rest[length..];
        }
        lines.push(Line { text, starts_in_literal, has_raw_string });
    }
    lines
}

/// Returns the length of a character literal, or 1, of the quote of a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    let closing = match chars.next() {
        Some((_, '\\')) => {
            let escaped = chars.next().map_or(1, |(at, c)| at + c.len_utf8());
            text[escaped..].find('\'').map(|at| escaped + at)
        }
        _ => chars.next().filter(|(_, c)| *c == '\'').map(|(at, _)| at),
    };
    closing.map_or(1, |at| at + 1)
}

/// Returns the length of the identifier, keyword or number at the start.
fn word(text: &str) -> usize {
    text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())
}

/// Returns the number of `#`, and the length from the first of them to the quote, if a raw literal opens
/// here.
fn raw_opening(prefix: &str, rest: &str) -> Option<(usize, usize)> {
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    (matches!(prefix, "r" | "br" | "cr") && rest[hashes..].starts_with('"')).then_some((hashes, hashes + 1))
}

/// The doc comment of an item.
struct DocComment {
    /// The number of the first line, from 1.
    line: usize,
    /// The text without code blocks.
    text: String,
    /// True if the text is a line of `--help`, which is an imperative or a noun of its own.
    is_help: bool,
}

impl DocComment {
    fn fault(&self) -> Option<String> {
        let mut words = self.text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty());
        let count = words.clone().count();
        let first = words.next()?;
        if FRAGMENT_OPENINGS.contains(&first) && self.text.starts_with(first) {
            return Some(format!("a doc comment opens with {first}; make it a sentence about the item"));
        }
        (count <= TOO_FEW_WORDS && !self.is_help)
            .then(|| format!("a doc comment of {count} words; say more than the name does, or nothing"))
    }
}

fn doc_comments(lines: &[Line<'_>]) -> Vec<DocComment> {
    let mut comments = Vec::new();
    let mut index = 0;
    while index < lines.len() {
        let Some((kind, _)) = lines[index].doc() else {
            index += 1;
            continue;
        };
        let line = index + 1;
        let mut text = String::new();
        let mut is_code = false;
        while let Some((_, part)) = lines.get(index).and_then(Line::doc).filter(|(other, _)| *other == kind) {
            if part.trim_start().starts_with("```") {
                is_code = !is_code;
            } else if !is_code {
                text += part.trim();
                text.push(' ');
            }
            index += 1;
        }
        let item = lines.get(index).map_or("", |line| line.text.trim_start());
        let is_help = ["#[arg(", "#[arg]", "#[command("].iter().any(|attribute| item.starts_with(attribute));
        comments.push(DocComment { line, text: text.trim().to_owned(), is_help });
    }
    comments
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    /// Checks a text at a width of 30 columns.
    fn found(text: &str) -> Vec<(usize, String)> {
        let findings = check(Path::new("a.rs"), text, 30);
        findings.into_iter().map(|finding| (finding.line.unwrap(), finding.text)).collect()
    }

    fn lines(text: &str) -> Vec<usize> {
        found(text).into_iter().map(|(line, _)| line).collect()
    }

    #[test]
    fn comments_strings_and_code_have_a_width() {
        assert_eq!(lines("// a comment that goes on and on\n"), [1]);
        assert_eq!(lines("let a = \"a string that goes on\";\n"), [1]);
        assert_eq!(lines("let a = \"a string \\\n         that goes on and on and on\";\n"), [2]);
        assert_eq!(lines("let seven_times_four = 7 * 4;\n"), NONE);
        // Characters are counted, not bytes.
        assert_eq!(lines("// ää ää ää ää ää ää ää ää ää\n"), NONE);
    }

    #[test]
    fn lines_that_cannot_be_broken_may_be_wide() {
        assert_eq!(lines("// https://example.org/a/long/path\n"), NONE);
        assert_eq!(lines("/// | a row of a table that | goes on |\n"), NONE);
        assert_eq!(lines("let a = r#\"a \"raw\" string that goes on\"#;\n"), NONE);
        assert_eq!(lines("let a = \"\na line of the value that goes on\";\n"), NONE);
        // What follows the literal is code again.
        assert_eq!(lines("let a = \"\nb\";\n// a comment that goes on and on\n"), [3]);
    }

    #[test]
    fn quotes_that_open_no_string_are_known() {
        let wide = "// a comment that goes on and on\n";
        for code in ["'\"'", "'\\''", "b'\"'", "&'a str", "\"\\\"\"", "/* \" /* */ \" */", "r#type", "// \""]
        {
            assert_eq!(lines(&format!("{code}\n{wide}")), [2], "{code}");
        }
    }

    #[test]
    fn doc_comments_are_sentences() {
        let openings = found("/// What it is.\nstruct A;\n//! How it is\n//! made.\n");
        assert_eq!(openings.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 3]);
        assert!(openings[0].1.contains("opens with What"));
        assert_eq!(lines("/// The socket.\nsocket: Socket,\n"), [1]);
        assert_eq!(lines("/// A socket of the host's.\n"), NONE);
        assert_eq!(lines("/// Whatever the kernel says.\n"), NONE);
        assert_eq!(lines("/// Reads it. What is\n/// What it is\n"), NONE);
        // A line of --help.
        assert_eq!(lines("/// Print JSON\n#[arg(long)]\njson: bool,\n"), NONE);
        // Code, comments that are none, and text in a literal.
        assert_eq!(lines("/// As in this example:\n/// ```\n/// What\n/// ```\n"), NONE);
        assert_eq!(lines("//// What\n// What\nlet a = \"\n/// What\";\n"), NONE);
    }
}

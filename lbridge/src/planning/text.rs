//! Text: escapes text from elsewhere (Docker's names, labels, comments, process names, errors of other
//! programs) for the log and the commands. Whoever chooses such a text must not be able to begin a new line,
//! to act on a terminal, or to change how the rest of the line reads.

/// Returns true if `c` acts where it should only be shown: control characters (C0, DEL, C1), line and
/// paragraph separators, controls of writing direction, and characters that show nothing (Unicode's
/// categories Cc, Zl, Zp, and most of Cf).
///
/// U+200C and U+200D (the non-joiner and the joiner) are excluded: Persian, Hindi and emoji cannot be written
/// without them.
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'
                | '\u{200e}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// Returns the text in one line, with escapes (`\n`, `\u{202e}`) for what [`is_unprintable`].
pub fn shown(text: &str) -> String {
    let mut told = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unprintable(c) { told.extend(c.escape_default()) } else { told.push(c) }
    }
    told
}

/// Returns the first `max` characters of the text as [`shown`] does, with `...` for the rest.
pub fn excerpt(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        Some((end, _)) => shown(&text[..end]) + "...",
        None => shown(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_act_on_the_line_that_shows_them() {
        assert_eq!(shown("a\u{1b}[2Jb\r\n\t\u{7f}\u{9b}"), r"a\u{1b}[2Jb\r\n\t\u{7f}\u{9b}");
        let direction = "\u{61c}\u{200e}\u{200f}\u{202a}\u{202e}\u{2066}\u{2069}";
        assert_eq!(shown(direction), r"\u{61c}\u{200e}\u{200f}\u{202a}\u{202e}\u{2066}\u{2069}");
        assert_eq!(shown("a\u{85}\u{2028}\u{2029}b"), r"a\u{85}\u{2028}\u{2029}b");
        assert_eq!(shown("a\u{200b}\u{feff}\u{ad}\u{e0041}b"), r"a\u{200b}\u{feff}\u{ad}\u{e0041}b");
        for harmless in ["grün", "e\u{301}", "می\u{200c}خواهم", "👩\u{200d}💻", r"C:\x", "\"'"] {
            assert_eq!(shown(harmless), harmless);
        }
        assert!(shown(&('\0'..=char::MAX).collect::<String>()).chars().all(|c| !is_unprintable(c)));
    }

    #[test]
    fn long_texts_are_cut_before_they_are_escaped() {
        assert_eq!(excerpt("grün", 4), "grün");
        assert_eq!(excerpt("grün\n", 4), "grün...");
        assert_eq!(excerpt("\n\n\n", 2), r"\n\n...");
    }
}

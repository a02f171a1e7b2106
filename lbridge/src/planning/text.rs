//! Text: escapes text from elsewhere (Docker's names, labels, comments, process names, errors of other
//! programs) for the log and the commands, and quotes it as the value of a log field. Whoever chooses such a
//! text must not be able to begin a new line, to act on a terminal, or to change how the rest of the line
//! reads.

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

/// Returns the text as the value of a log field, `key=value`: as it is if it is one plain word, otherwise in
/// double quotes and as [`shown`] does.
///
/// A quote is escaped with a backslash. A backslash is doubled only where it stands before a quote, and stays
/// as it is elsewhere: a text that was escaped before is not escaped again. So no text can end its own value
/// and begin another field.
pub fn field_value(text: &str) -> String {
    let needs_quotes = |c: char| c.is_whitespace() || matches!(c, '"' | '=' | '\\') || is_unprintable(c);
    if !text.is_empty() && !text.contains(needs_quotes) {
        return text.to_owned();
    }
    let (mut value, mut backslashes) = ("\"".to_owned(), 0);
    for c in shown(text).chars() {
        if c == '"' {
            value.extend(std::iter::repeat_n('\\', backslashes + 1));
        }
        backslashes = if c == '\\' { backslashes + 1 } else { 0 };
        value.push(c);
    }
    value.extend(std::iter::repeat_n('\\', backslashes));
    value.push('"');
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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

    #[test]
    fn values_are_quoted_only_if_they_must_be_and_escaped_once() {
        for plain in ["bridge:lab0", "172.18.0.1:80/tcp", "[::1]:80", "/run/netns/a", "a,b", "grün", "it's"]
        {
            assert_eq!(field_value(plain), plain);
        }
        assert_eq!(field_value(""), r#""""#);
        assert_eq!(field_value("two words"), r#""two words""#);
        assert_eq!(field_value("a=b"), r#""a=b""#);
        assert_eq!(field_value("say \"no\""), r#""say \"no\"""#);
        assert_eq!(field_value("x\n<0>y\u{2028}"), r#""x\n<0>y\u{2028}""#);
        assert_eq!(field_value(r"x\n<0>y"), r#""x\n<0>y""#, "escaped already");
        assert_eq!(field_value(r"C:\"), r#""C:\\""#);
        assert_eq!(field_value(r#"\" state=steered"#), r#""\\\" state=steered""#);
    }

    proptest! {
        /// A reader that knows only that a backslash escapes the next character finds the end of the value.
        #[test]
        fn a_value_ends_where_it_ends(text in r#"[\\" =a\n]{0,12}|\PC{0,12}"#) {
            let value = field_value(&text);
            if let Some(quoted) = value.strip_prefix('"') {
                let mut rest = quoted.chars();
                let end = loop {
                    match rest.next() {
                        Some('\\') => drop(rest.next()),
                        Some('"') => break true,
                        Some(_) => {}
                        None => break false,
                    }
                };
                prop_assert!(end && rest.as_str().is_empty(), "{value}");
            } else {
                prop_assert!(!value.contains(['"', '=', ' ', '\n']) && value == text, "{value}");
            }
        }
    }
}

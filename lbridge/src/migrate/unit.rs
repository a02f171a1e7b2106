//! unit: reads systemd's service units, as far as needed to know the commands that they start:
//! systemd.syntax(7), systemd.unit(5), systemd.service(5). If a command depends on more than the files
//! (variables, most specifiers), returns an error that says so.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

/// The administrator's unit folders, in order of precedence.
pub const FOLDERS: [&str; 2] = ["/etc/systemd/system", "/run/systemd/system"];

/// Maximum length of a unit file in bytes; a longer file is not a unit.
const MAX_LENGTH: u64 = 1024 * 1024;

/// A service and the commands that it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// The unit's name: `socat-app.service`.
    pub name: String,
    /// True if a unit that is started wants it.
    pub enabled: bool,
    /// The words of each command of `ExecStart=`, in order; or the reason why they cannot be determined.
    pub commands: Vec<Result<Vec<String>, String>>,
}

/// Lists the services in these folders, sorted by name; templates by their instances that are enabled there.
/// A folder that does not exist has none.
pub fn services(folders: &[&Path]) -> io::Result<Vec<Service>> {
    let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut enabled: BTreeSet<String> = BTreeSet::new();
    for folder in folders {
        for (name, path) in entries(folder)? {
            let kind = kind(&name);
            if kind == "wants" || kind == "requires" {
                enabled.extend(entries(&path)?.into_iter().map(|(name, _)| name));
            } else if kind == "service" && !is_alias(&name, &path) {
                files.entry(name).or_insert(path);
            }
        }
    }
    let mut services = vec![];
    let plain = files.keys().filter(|name| !name.ends_with("@.service")).cloned();
    let instances = enabled.iter().filter(|name| template_of(name).is_some()).cloned();
    for name in plain.chain(instances).collect::<BTreeSet<_>>() {
        let template = template_of(&name);
        let Some(file) = files.get(&name).or_else(|| files.get(template.as_ref()?)) else { continue };
        let mut texts = vec![read(file)];
        texts.extend(drop_ins(folders, &name, template.as_deref())?.iter().map(|file| read(file)));
        let commands = match texts.into_iter().collect::<Result<Vec<_>, _>>() {
            Ok(texts) => commands(&texts, &name),
            Err(why) => vec![Err(why)],
        };
        services.push(Service { enabled: enabled.contains(&name), name, commands });
    }
    Ok(services)
}

/// Returns `service` for `socat.service`.
fn kind(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(_, kind)| kind)
}

/// Returns `socat@.service` for `socat@app.service`.
fn template_of(name: &str) -> Option<String> {
    let (prefix, instance) = name.strip_suffix(".service")?.split_once('@')?;
    (!instance.is_empty()).then(|| format!("{prefix}@.service"))
}

fn entries(folder: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(vec![]);
        }
        entries => entries?,
    };
    // A name that is not valid UTF-8 is not a unit's.
    let entries = entries.flatten().filter_map(|e| Some((e.file_name().into_string().ok()?, e.path())));
    Ok(entries.collect())
}

/// Returns true if this is an alias of a unit: a link to a unit with another name.
fn is_alias(name: &str, path: &Path) -> bool {
    let target = fs::read_link(path).ok();
    let target = target.as_deref().and_then(Path::file_name).and_then(|target| target.to_str());
    target.is_some_and(|target| target != name && kind(target) == "service")
}

/// Lists the drop-ins of a unit in the order in which they apply: by their own name, in whichever folder they
/// are.
fn drop_ins(folders: &[&Path], name: &str, template: Option<&str>) -> io::Result<Vec<PathBuf>> {
    let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
    for unit in [Some(name), template].into_iter().flatten() {
        for folder in folders {
            for (file, path) in entries(&folder.join(format!("{unit}.d")))? {
                if kind(&file) == "conf" {
                    found.entry(file).or_insert(path);
                }
            }
        }
    }
    Ok(found.into_values().collect())
}

fn read(path: &Path) -> Result<String, String> {
    let cannot = |error: io::Error| format!("{} cannot be read: {error}", path.display());
    let metadata = fs::metadata(path).map_err(cannot)?;
    // A link to /dev/null masks a unit.
    if !metadata.is_file() || metadata.len() > MAX_LENGTH {
        return Ok(String::new());
    }
    Ok(String::from_utf8_lossy(&fs::read(path).map_err(cannot)?).into_owned())
}

/// Returns the commands that a unit starts, from its file and its drop-ins.
fn commands(texts: &[String], name: &str) -> Vec<Result<Vec<String>, String>> {
    let mut commands = vec![];
    for text in texts {
        for (section, key, value) in assignments(text) {
            if section != "Service" || key != "ExecStart" {
                continue;
            }
            if value.is_empty() {
                commands.clear();
                continue;
            }
            match split(&value) {
                Ok(split) => commands.extend(split.into_iter().map(|words| expanded(words, name))),
                Err(why) => commands.push(Err(why)),
            }
        }
    }
    commands
}

/// Lists (section, key, value) of every assignment.
fn assignments(text: &str) -> Vec<(String, String, String)> {
    let mut found = vec![];
    let mut section = String::new();
    let mut continued = String::new();
    for line in text.lines() {
        let line = line.trim_start();
        // Comments may stand between the lines of one assignment.
        if line.starts_with(['#', ';']) {
            continue;
        }
        continued += line;
        let backslashes = continued.len() - continued.trim_end_matches('\\').len();
        if backslashes % 2 == 1 {
            continued.pop();
            continued.push(' ');
            continue;
        }
        let line = std::mem::take(&mut continued);
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            name.clone_into(&mut section);
        } else if let Some((key, value)) = line.split_once('=') {
            found.push((section.clone(), key.trim_end().to_owned(), value.trim_start().to_owned()));
        }
    }
    found
}

/// Splits one `ExecStart=` into commands and their words; ` ; ` separates commands.
fn split(value: &str) -> Result<Vec<Vec<String>>, String> {
    let mut commands = vec![vec![]];
    let mut rest = value.trim_start();
    while !rest.is_empty() {
        let separator =
            rest.strip_prefix(';').filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        if let Some(after) = separator {
            commands.push(vec![]);
            rest = after.trim_start();
            continue;
        }
        let (word, after) = match rest.strip_prefix("\\;") {
            Some(after) if after.is_empty() || after.starts_with([' ', '\t']) => (";".to_owned(), after),
            _ => word(rest)?,
        };
        if let Some(command) = commands.last_mut() {
            command.push(word);
        }
        rest = after.trim_start();
    }
    commands.retain(|command| !command.is_empty());
    Ok(commands)
}

/// Returns the first word, without its quotes and escapes, and the rest of the text.
fn word(text: &str) -> Result<(String, &str), String> {
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            ('"' | '\'', None) => quote = Some(c),
            (' ' | '\t', None) => return Ok((word, &text[at..])),
            ('\\', _) => {
                let (c, length) = unescaped(chars.as_str());
                word.push(c);
                for _ in 0..length {
                    chars.next();
                }
            }
            _ => word.push(c),
        }
    }
    if quote.is_some() {
        return Err("a quotation mark of its ExecStart= is not closed".to_owned());
    }
    Ok((word, ""))
}

/// Returns the character of an escape, and how many characters of `text`, which follows the backslash, belong
/// to it. An unknown escape is a backslash, as in systemd.
fn unescaped(text: &str) -> (char, usize) {
    let number = |from: usize, length: usize, radix| {
        let digits =
            text.get(from..from + length).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
        let c = u32::from_str_radix(digits, radix).ok().and_then(char::from_u32)?;
        (c != '\0').then_some((c, from + length))
    };
    let found = match text.chars().next() {
        Some('a') => Some(('\u{7}', 1)),
        Some('b') => Some(('\u{8}', 1)),
        Some('f') => Some(('\u{c}', 1)),
        Some('n') => Some(('\n', 1)),
        Some('r') => Some(('\r', 1)),
        Some('t') => Some(('\t', 1)),
        Some('v') => Some(('\u{b}', 1)),
        Some('s') => Some((' ', 1)),
        Some(c @ ('\\' | '"' | '\'')) => Some((c, 1)),
        Some('x') => number(1, 2, 16),
        Some('u') => number(1, 4, 16),
        Some('U') => number(1, 8, 16),
        Some('0'..='7') => number(0, 3, 8),
        _ => None,
    };
    found.unwrap_or(('\\', 0))
}

/// Returns a command as it is run: without the prefixes of its program, and with its specifiers and dollar
/// signs replaced.
fn expanded(mut words: Vec<String>, unit: &str) -> Result<Vec<String>, String> {
    let Some(program) = words.first_mut() else { return Ok(words) };
    let prefixes: String = program.chars().take_while(|c| "-@:+!|".contains(*c)).collect();
    program.drain(..prefixes.len());
    if prefixes.contains('@') && words.len() > 1 {
        // The name that the program sees as its own.
        words.remove(1);
    }
    for word in &mut words {
        *word = specified(word, unit)?;
        if !prefixes.contains(':') {
            *word = without_variables(word)?;
        }
    }
    Ok(words)
}

fn specified(word: &str, unit: &str) -> Result<String, String> {
    let bare = unit.strip_suffix(".service").unwrap_or(unit);
    let (prefix, instance) = bare.split_once('@').unwrap_or((bare, ""));
    let mut text = String::new();
    let mut chars = word.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        match chars.next() {
            Some('%') | None => text.push('%'),
            Some('i') => text += instance,
            // Escaped, the instance would be different.
            Some('I') if !instance.contains(['-', '\\']) => text += instance,
            Some('n') => text += unit,
            Some('N') => text += bare,
            Some('p') => text += prefix,
            Some(other) => {
                return Err(format!("its ExecStart= has the specifier %{other}, which is not read here"));
            }
        }
    }
    Ok(text)
}

fn without_variables(word: &str) -> Result<String, String> {
    let text = word.replace("$$", "\0");
    if let Some((_, name)) = text.split_once('$') {
        let name: String =
            name.trim_start_matches('{').chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        return Err(format!("its ExecStart= has the variable ${name}, which is not read here"));
    }
    Ok(text.replace('\0', "$"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    fn of(text: &str) -> Vec<Result<Vec<String>, String>> {
        commands(&[format!("[Service]\n{text}\n")], "socat@app.service")
    }

    #[test]
    fn lines_are_continued_and_comments_skipped() {
        let text = "# [Service]\n[Unit]\nExecStart=/bin/no\n[Service]\n  ExecStart = /usr/bin/socat \\\n\
                    # a comment between\n    ; another\n  one \\\n two  \nExecStartPre=/bin/no\n";
        assert_eq!(commands(&[text.to_owned()], "a.service"), [Ok(words("/usr/bin/socat one two"))]);
        // The end of the file ends the line, and so does an empty line; two backslashes are one.
        assert_eq!(of("ExecStart=a \\\n\nb"), [Ok(words("a"))]);
        assert_eq!(of("ExecStart=a \\\\\nExecStart=b"), [Ok(words("a \\")), Ok(words("b"))]);
    }

    #[test]
    fn an_empty_assignment_forgets_those_before() {
        let texts = ["[Service]\nExecStart=a\nExecStart=b\n", "[Service]\nExecStart=\nExecStart=c\n"];
        assert_eq!(commands(&texts.map(str::to_owned), "a.service"), [Ok(words("c"))]);
    }

    #[test]
    fn words_are_quoted_as_systemd_has_it() {
        for (text, expected) in [
            (r#"ExecStart=a "b c" d"#, vec!["a", "b c", "d"]),
            (r#"ExecStart=a 'b "c' d"#, vec!["a", "b \"c", "d"]),
            (r#"ExecStart=a x="b c"d"#, vec!["a", "x=b cd"]),
            (r"ExecStart=a b\x20c\sd\\e", vec!["a", "b c d\\e"]),
            (r"ExecStart=a \q b\040c", vec!["a", "\\q", "b c"]),
            (r"ExecStart=a '' b", vec!["a", "", "b"]),
            (r"ExecStart=a \; b", vec!["a", ";", "b"]),
            ("ExecStart=-@+!!a zero one", vec!["a", "one"]),
            ("ExecStart=a %i %% %p %n $$x", vec!["a", "app", "%", "socat", "socat@app.service", "$x"]),
            ("ExecStart=:a $x", vec!["a", "$x"]),
        ] {
            assert_eq!(of(text), [Ok(expected.into_iter().map(str::to_owned).collect())], "{text}");
        }
        assert_eq!(of("ExecStart=a b ; c;d ;"), [Ok(words("a b")), Ok(words("c;d"))]);
    }

    #[test]
    fn what_the_file_does_not_say_is_an_error() {
        for (text, says) in [
            ("ExecStart=a $PORT", "$PORT"),
            ("ExecStart=a ${PORT}x", "$PORT"),
            ("ExecStart=a %h/x", "%h"),
            ("ExecStart=a \"b", "quotation"),
        ] {
            let found = of(text);
            assert!(matches!(&found[..], [Err(why)] if why.contains(says)), "{text}: {found:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(value in r#"[-@:a-z %$\\{}"';xuU0-9\u{e4}\n=\[\]#]*"#) {
            of(&format!("ExecStart={value}"));
            of(&value);
        }

        /// Quoting any word and reading it again returns the word.
        #[test]
        fn what_is_quoted_comes_back(word in "[^\u{0}\n\r]*") {
            let quoted: String = word.chars().flat_map(|c| match c {
                '\\' | '"' => vec!['\\', c],
                '%' | '$' => vec![c, c],
                c => vec![c],
            }).collect();
            proptest::prop_assert_eq!(of(&format!("ExecStart=a \
                                                   \"{quoted}\"")), [Ok(vec!["a".to_owned(), word])]);
        }
    }

    #[test]
    fn services_are_found_with_their_drop_ins() {
        let folder = tempfile::tempdir().unwrap();
        let (etc, run) = (folder.path().join("etc"), folder.path().join("run"));
        let write = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(etc.join("plain.service"), "[Service]\nExecStart=etc\n");
        write(run.join("plain.service"), "[Service]\nExecStart=run\n");
        write(run.join("plain.service.d/20.conf"), "[Service]\nExecStart=\nExecStart=twenty\n");
        write(etc.join("plain.service.d/10.conf"), "[Service]\nExecStart=\nExecStart=ten\n");
        write(etc.join("plain.service.d/30.txt"), "[Service]\nExecStart=\n");
        write(etc.join("t@.service"), "[Service]\nExecStart=t %i\n");
        fs::create_dir_all(etc.join("multi-user.target.wants")).unwrap();
        std::os::unix::fs::symlink("../t@.service", etc.join("multi-user.target.wants/t@x.service")).unwrap();
        std::os::unix::fs::symlink("plain.service", etc.join("alias.service")).unwrap();
        std::os::unix::fs::symlink("/dev/null", etc.join("masked.service")).unwrap();
        let found = services(&[&etc, &run, &folder.path().join("none")]).unwrap();
        let service = |name: &str, commands| Service {
            name: name.to_owned(),
            enabled: name == "t@x.service",
            commands,
        };
        assert_eq!(
            found,
            [
                service("masked.service", vec![]),
                service("plain.service", vec![Ok(words("twenty"))]),
                service("t@x.service", vec![Ok(words("t x"))]),
            ]
        );
    }
}

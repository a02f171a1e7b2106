//! Writes the man pages and the completion scripts. `cargo xtask package` ships them.
//!
//! Names, synopses and options come from the definition of the command line, and everything else from
//! `lbridge::cli::manual`.

use std::{
    env,
    error::Error,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Arg, Command};
use clap_mangen::{
    Man,
    roff::{Inline, Roff, bold, italic, roman},
};
use lbridge::cli::{
    Shell,
    manual::{self, EXIT_STATUS, Entry, Example, Page, STATES, configuration, configuration::Key},
};

const SOURCE: &str = concat!("lbridge ", env!("CARGO_PKG_VERSION"));
const MANUAL: &str = "lbridge's manual";

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(env::args_os().nth(1).ok_or("manual FOLDER")?);
    fs::create_dir_all(&folder)?;
    for shell in Shell::ALL {
        fs::write(folder.join(shell.file_name()), shell.script())?;
    }
    let mut command = lbridge::cli::command().disable_help_subcommand(true);
    command.build();
    pages(&command, "", &[], &folder)?;
    configuration_page(&folder)?;
    Ok(())
}

/// Returns the date for the foot of the pages, from `SOURCE_DATE_EPOCH`; else a blank, since roff leaves an
/// empty text out and takes the next one for the date.
fn date() -> String {
    let seconds = env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    let time = seconds.and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map_or_else(|| " ".to_owned(), |time| time.strftime("%Y-%m-%d").to_string())
}

/// Writes the pages of a command and of those below it.
fn pages(command: &Command, path: &str, above: &[String], folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let below: Vec<_> = command.get_subcommands().filter(|command| !command.is_hide_set()).collect();
    page(command, path, above, &below, folder)?;
    let above = [above, &[name]].concat();
    below.into_iter().try_for_each(|command| {
        pages(command, format!("{path} {}", command.get_name()).trim_start(), &above, folder)
    })
}

fn page(
    command: &Command,
    path: &str,
    above: &[String],
    below: &[&Command],
    folder: &Path,
) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let page = manual::page(path).ok_or_else(|| io::Error::other(format!("no page for {name}")))?;
    // The line of --help, which clap_mangen's own lacks the options' values and the `...` of.
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim().to_owned();
    let man = Man::new(command.clone().override_usage(usage)).date(date()).source(SOURCE).manual(MANUAL);
    let mut file = File::create(folder.join(man.get_filename()))?;
    man.render_title(&mut file)?;
    man.render_name_section(&mut file)?;
    man.render_synopsis_section(&mut file)?;
    match page.description {
        [] => man.render_description_section(&mut file)?,
        description => {
            let mut roff = Roff::default();
            paragraphs(&mut roff, "DESCRIPTION", description);
            roff.to_writer(&mut file)?;
        }
    }
    man.render_options_section(&mut file)?;
    let mut rest = Roff::default();
    if !below.is_empty() {
        rest.control("SH", ["COMMANDS"]);
        for command in below {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            let name = command.get_display_name().unwrap_or_else(|| command.get_name());
            tagged(&mut rest, vec![bold(name), roman("(1)")], &about);
        }
    }
    examples(&mut rest, page.examples);
    if page.has_states {
        list(&mut rest, "RULE STATES", &STATES);
    }
    exit_status(&mut rest, page);
    if !page.files.is_empty() {
        list(&mut rest, "FILES", page.files);
    }
    environment(&mut rest, command, page);
    let above = above.iter().map(|name| format!("{name}(1)"));
    let below = below.iter().filter_map(|command| Some(format!("{}(1)", command.get_display_name()?)));
    see_also(&mut rest, above.chain(below).chain(page.see_also.iter().map(|name| (*name).to_owned())));
    rest.to_writer(&mut file)?;
    file.flush().map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
}

fn examples(roff: &mut Roff, examples: &[Example]) {
    roff.control("SH", ["EXAMPLES"]);
    for example in examples {
        roff.control("PP", []);
        roff.text([roman(format!("{}:", example.purpose))]);
        literal(roff, example.lines.iter().copied());
    }
}

/// Adds lines as they are, indented.
fn literal<'a>(roff: &mut Roff, lines: impl Iterator<Item = &'a str>) {
    roff.control("PP", []);
    roff.control("RS", ["4"]);
    roff.control("EX", []);
    for line in lines {
        roff.text([roman(line)]);
    }
    roff.control("EE", []);
    roff.control("RE", []);
}

fn exit_status(roff: &mut Roff, page: &Page) {
    roff.control("SH", ["EXIT STATUS"]);
    for (exit, _, text) in EXIT_STATUS.iter().filter(|(exit, ..)| page.exits.contains(exit)) {
        tagged(roff, vec![bold((*exit as u8).to_string())], text);
    }
    if !page.exit_note.is_empty() {
        roff.control("PP", []);
        roff.text([roman(page.exit_note)]);
    }
}

fn environment(roff: &mut Roff, command: &Command, page: &Page) {
    let named = |arg: &Arg| {
        let variable = arg.get_env()?.to_string_lossy().into_owned();
        Some((variable, format!("The default of --{}.", arg.get_long()?)))
    };
    let of_options = command.get_arguments().filter_map(named);
    let others = page.environment.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
    let entries: Vec<_> = of_options.chain(others).collect();
    if !entries.is_empty() {
        roff.control("SH", ["ENVIRONMENT"]);
    }
    for (name, text) in entries {
        tagged(roff, vec![bold(name)], &text);
    }
}

fn see_also(roff: &mut Roff, pages: impl Iterator<Item = String>) {
    roff.control("SH", ["SEE ALSO"]);
    let mut seen: Vec<String> = vec![];
    for page in pages {
        if !seen.contains(&page) {
            seen.push(page);
        }
    }
    let mut line = vec![];
    for (index, page) in seen.iter().enumerate() {
        let (name, section) = page.split_once('(').unwrap_or((page, ""));
        let end = if index + 1 < seen.len() { ", " } else { "" };
        line.extend([bold(name), roman(format!("({section}{end}"))]);
    }
    roff.text(line);
}

fn list(roff: &mut Roff, heading: &str, entries: &[Entry]) {
    roff.control("SH", [heading]);
    for (name, text) in entries {
        tagged(roff, vec![bold(*name)], text);
    }
}

fn tagged(roff: &mut Roff, tag: Vec<Inline>, text: &str) {
    roff.control("TP", []);
    roff.text(tag);
    roff.text([roman(text)]);
}

/// Writes lbridge.toml(5).
fn configuration_page(folder: &Path) -> io::Result<()> {
    use configuration::{DESCRIPTION, EXAMPLE, FILES, LABELS, LABELS_TEXT, RELOAD, RULE, SEE_ALSO, SETTINGS};

    let mut roff = Roff::default();
    roff.control("TH", ["lbridge.toml", "5", &date(), SOURCE, MANUAL]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("lbridge.toml - rules and settings of lbridge")]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([italic(FILES[0].0)]);
    paragraphs(&mut roff, "DESCRIPTION", &DESCRIPTION);
    keys(&mut roff, "SETTINGS", SETTINGS);
    keys(&mut roff, "RULES", RULE);
    paragraphs(&mut roff, "LABELS", &[LABELS_TEXT]);
    for (name, text) in LABELS {
        tagged(&mut roff, vec![bold(name)], text);
    }
    paragraphs(&mut roff, "RELOAD", &RELOAD);
    roff.control("SH", ["EXAMPLES"]);
    roff.text([roman("A whole file:")]);
    literal(&mut roff, EXAMPLE.lines());
    list(&mut roff, "FILES", &FILES);
    see_also(&mut roff, SEE_ALSO.iter().map(|name| (*name).to_owned()));
    fs::write(folder.join("lbridge.toml.5"), roff.render())
}

fn paragraphs(roff: &mut Roff, heading: &str, paragraphs: &[&str]) {
    roff.control("SH", [heading]);
    for paragraph in paragraphs {
        roff.control("PP", []);
        roff.text([roman(*paragraph)]);
    }
}

fn keys(roff: &mut Roff, heading: &str, keys: &[Key]) {
    roff.control("SH", [heading]);
    for key in keys {
        tagged(roff, vec![bold(key.name)], key.text);
        roff.control("RS", []);
        roff.control("PP", []);
        let default = key.default.map_or_else(|| "Has to be there.".to_owned(), |d| format!("Default: {d}."));
        roff.text([roman(format!("Type: {}. {default} {}", key.value, on_reload(key)))]);
        roff.control("RE", []);
        roff.control("RS", []);
        literal(roff, key.example.lines());
        roff.control("RE", []);
    }
}

fn on_reload(key: &Key) -> String {
    match key.on_reload {
        "" => String::new(),
        text => format!("On reload: {text}"),
    }
}

//! `manual FOLDER` writes what is made from the definition of the command line: the man pages, `lbridge.1`
//! and one for each command, and the completion scripts. `cargo xtask package` ships them.

use std::{
    env,
    error::Error,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

/// The page of the command itself: what holds for every command.
const EXIT_STATUS: [(&str, &str); 5] = [
    ("0", "Done, also for a rule that waits or is blocked."),
    ("1", "Failed; one line on standard error says why, and what to do."),
    ("2", "The command line makes no sense."),
    ("3", "The daemon is not reachable."),
    ("4", "No such rule, or a conflict with one."),
];

const FILES: [(&str, &str); 5] = [
    ("/etc/lbridge/lbridge.toml", "The administrator's rules and settings, with a comment for each."),
    ("/var/lib/lbridge/rules.toml", "The rules that lbridge allow made."),
    ("/run/lbridge/lbridge.sock", "The control socket: for root, and for the group lbridge if there is one."),
    ("/sys/fs/bpf/lbridge", "What the kernel serves, with and without the daemon."),
    ("/usr/share/doc/lbridge", "How it works, what it does not do, and examples."),
];

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(env::args_os().nth(1).ok_or("manual FOLDER")?);
    fs::create_dir_all(&folder)?;
    let mut command = lbridge::cli::command().disable_help_subcommand(true);
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "lbridge", &folder)?;
    }
    command.build();
    pages(&command, &[], &folder)?;
    Ok(())
}

/// The pages of a command and of those below it.
fn pages(command: &Command, above: &[String], folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let below: Vec<_> = command.get_subcommands().filter(|command| !command.is_hide_set()).collect();
    page(command, above, below.is_empty(), folder)?;
    let above = [above, &[name]].concat();
    below.into_iter().try_for_each(|command| pages(command, &above, folder))
}

fn page(command: &Command, above: &[String], is_leaf: bool, folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    // The line of --help, which clap_mangen's own lacks the options' values and the `...` of.
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim().to_owned();
    let man = Man::new(command.clone().override_usage(usage))
        .source(concat!("lbridge ", env!("CARGO_PKG_VERSION")))
        .manual("lbridge");
    let mut page = File::create(folder.join(man.get_filename()))?;
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if !is_leaf {
        man.render_subcommands_section(&mut page)?;
    }
    let mut rest = Roff::default();
    if above.is_empty() {
        list(&mut rest, "EXIT STATUS", &EXIT_STATUS);
        list(&mut rest, "FILES", &FILES);
    } else {
        rest.control("SH", ["SEE ALSO"]);
        let pages: Vec<_> = above.iter().flat_map(|name| [bold(name), roman("(1) ")]).collect();
        rest.text(pages);
    }
    rest.to_writer(&mut page)?;
    page.flush().map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
}

fn list(roff: &mut Roff, heading: &str, entries: &[(&str, &str)]) {
    roff.control("SH", [heading]);
    for (name, text) in entries {
        roff.control("TP", []);
        roff.text([bold(*name)]);
        roff.text([roman(*text)]);
    }
}

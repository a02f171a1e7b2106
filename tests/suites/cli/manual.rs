//! The man pages: that they render without a warning, within the terminal, and have what people look for.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{self, Daemon, Options};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;
use tempfile::TempDir;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        pages_render_without_a_warning: [Need::Program("man")],
        every_command_has_a_page_with_what_people_look_for,
        the_examples_of_the_configurations_page_are_taken,
    ]
}

/// Has the pages written.
fn pages() -> Result<(TempDir, Vec<PathBuf>)> {
    let writer = daemon::binary()?.with_file_name("examples").join("manual");
    ensure!(writer.exists(), "no {}: cargo build -p lbridge --example manual", writer.display());
    let folder = TempDir::new()?;
    let status = Command::new(writer).arg(folder.path()).status()?;
    ensure!(status.success(), "{status}");
    let files = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let is_page = |path: &PathBuf| path.extension().is_some_and(|section| section == "1" || section == "5");
    let pages: Vec<_> = files.into_iter().filter(is_page).collect();
    ensure!(pages.len() > 20, "{pages:?}");
    Ok((folder, pages))
}

/// Renders a page for a terminal of 80 columns.
fn rendered(page: &Path) -> Result<String> {
    let mut man = Command::new("man");
    man.args(["--warnings", "--encoding=UTF-8", "--local-file"]).arg(page);
    man.env("MANWIDTH", "80").env("LC_ALL", "C.UTF-8").env("MANPAGER", "cat");
    let output = man.output()?;
    let warnings = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && warnings.is_empty(), "{}: {warnings}", page.display());
    Ok(String::from_utf8(output.stdout)?)
}

fn pages_render_without_a_warning() -> Result<()> {
    let (folder, pages) = pages()?;
    for page in &pages {
        let text = rendered(page)?;
        let longest = text.lines().max_by_key(|line| line.chars().count()).unwrap_or_default();
        ensure!(longest.chars().count() <= 80, "{}: {longest}", page.display());
        ensure!(
            !text.contains("General Commands Manual"),
            "{}: the title's words are shifted",
            page.display()
        );
    }
    // The check sees what is wrong.
    let bad = folder.path().join("bad.1");
    fs::write(&bad, ".TH bad 1\n.SH NAME\nbad \\[no such character]\n")?;
    ensure!(rendered(&bad).is_err(), "a bad page renders");
    Ok(())
}

fn every_command_has_a_page_with_what_people_look_for() -> Result<()> {
    let lab = Lab::new()?;
    let daemon = Daemon::prepare(lab.host(), Options::default())?;
    let (_folder, pages) = pages()?;
    let name = |page: &PathBuf| page.file_name().map(|name| name.to_string_lossy().into_owned());
    let names: BTreeSet<_> = pages.iter().filter_map(name).collect();
    let help = daemon.cli(&["--help"])?.stdout;
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<_> =
        commands.filter(|line| line.starts_with("  ") && !line.starts_with("   ")).collect();
    ensure!(commands.len() > 15, "{help}");
    for command in
        commands.iter().filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help")
    {
        ensure!(names.contains(&format!("lbridge-{command}.1")), "{command} is not among {names:?}");
    }
    ensure!(names.contains("lbridge.1") && names.contains("lbridge.toml.5"), "{names:?}");
    ensure!(!names.contains("lbridge-complete.1"), "it is for scripts");
    for page in pages {
        let text = fs::read_to_string(&page)?;
        let headings: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(".SH ")).collect();
        let headings: Vec<_> = headings.iter().map(|heading| heading.trim_matches('"')).collect();
        let wanted = ["NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "SEE ALSO"];
        let of_command = page.extension().is_some_and(|section| section == "1");
        let wanted = wanted.into_iter().chain(of_command.then_some("EXIT STATUS"));
        for heading in wanted {
            ensure!(headings.contains(&heading), "{}: no {heading} in {headings:?}", page.display());
        }
    }
    Ok(())
}

fn the_examples_of_the_configurations_page_are_taken() -> Result<()> {
    let lab = Lab::new()?;
    let daemon = Daemon::prepare(lab.host(), Options::default())?;
    let (_folder, pages) = pages()?;
    let page = pages.iter().find(|page| page.ends_with("lbridge.toml.5")).context("the page")?;
    let text = fs::read_to_string(page)?;
    let blocks: Vec<_> = text.split(".EX\n").skip(1).filter_map(|rest| rest.split(".EE\n").next()).collect();
    ensure!(blocks.len() > 15, "{text}");
    for block in blocks {
        let block = block.replace("\\-", "-").replace("\\&", "").replace("\\*(Aq", "'").replace("\\\\", "\\");
        fs::write(daemon.config(), &block)?;
        let config = daemon.config().display().to_string();
        let output = daemon.cli(&["check-config", "--config", &config])?;
        ensure!(output.status == 0, "{block}{output:?}");
    }
    Ok(())
}

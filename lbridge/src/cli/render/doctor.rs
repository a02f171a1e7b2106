//! `doctor`: prints the findings, each with its remedy.

use std::{cmp::Reverse, fmt::Write as _};

use super::{print, shown};
use crate::{
    cli::Failure,
    doctor::{Finding, Level, Report},
};

/// Prints the findings, the worst first, each with its remedy.
pub(in crate::cli) fn examination(report: &Report) -> Result<(), Failure> {
    let mut text = String::new();
    let mut findings: Vec<_> = report.findings.iter().collect();
    findings.sort_by_key(|finding| Reverse(finding.level));
    for finding in findings {
        let word = match finding.level {
            Level::Problem => "PROBLEM",
            Level::Warning => "WARNING",
            Level::Note => "note",
            Level::Ok => "ok",
        };
        let _ = writeln!(text, "{word:8} {}", shown(&finding.what));
        if let Some(why) = &finding.why {
            let _ = writeln!(text, "         {}", shown(why));
        }
        for line in &finding.remedy {
            let _ = writeln!(text, "           {}", shown(line));
        }
    }
    let count = |level| report.findings.iter().filter(|finding| finding.level == level).count();
    let (problems, warnings) = (count(Level::Problem), count(Level::Warning));
    let several = |count: usize| if count == 1 { "" } else { "s" };
    let _ = match (problems, warnings) {
        (0, 0) if report.findings.iter().any(Finding::is_for_root) => {
            writeln!(
                text,
                "\nNothing is wrong with what could be checked; the rest needs root: sudo lbridge doctor"
            )
        }
        (0, 0) => writeln!(text, "\nNothing is wrong."),
        (problems, warnings) => writeln!(
            text,
            "\n{problems} problem{}, {warnings} warning{}.",
            several(problems),
            several(warnings)
        ),
    };
    print(&text)
}

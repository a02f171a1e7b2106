//! `verify`: prints a table of the checks.

use std::{collections::BTreeSet, fmt::Write as _};

use super::{NO_RULES, Table, print, shown};
use crate::{
    cli::Failure,
    verify::{Check, Expected, Found, Report, Verdict},
};

/// Prints the checks of `verify`. Checks that expect a closed port share one line for each place and finding.
pub(in crate::cli) fn verification(report: &Report) -> Result<(), Failure> {
    if report.checks.is_empty() {
        return print(NO_RULES);
    }
    let kind = |check: &Check| {
        let rule = (check.network.clone(), check.port, check.protocol);
        (rule, check.from.clone(), check.expected, check.verdict, check.why.clone())
    };
    let mut lines: Vec<Vec<&Check>> = vec![];
    for check in &report.checks {
        let same = |line: &&mut Vec<&Check>| kind(line[0]) == kind(check);
        match lines.iter_mut().find(same) {
            Some(line) if check.expected == Expected::Closed => line.push(check),
            _ => lines.push(vec![check]),
        }
    }
    let mut table = Table::new(&["RULE", "FROM", "TO", "EXPECTED", "FOUND", "VERDICT"]);
    for line in lines {
        let first = line[0];
        let found: BTreeSet<_> = line.iter().map(|check| found(check.found)).collect();
        let mut to = shown(&first.to);
        if let more @ 1.. = line.len() - 1 {
            let _ = write!(to, " and {more} more");
        }
        table.row([
            format!("{} {}{}", shown(&first.network.to_string()), first.port, first.protocol.suffix()),
            shown(&first.from),
            to,
            expected(first.expected).to_owned(),
            found.into_iter().collect::<Vec<_>>().join(", "),
            match (first.verdict, &first.why) {
                (Verdict::Ok, _) => "ok".to_owned(),
                (Verdict::Failed, why) => format!("FAILED ({})", shown(why.as_deref().unwrap_or_default())),
                (Verdict::Unverified, why) => {
                    format!("not verified ({})", shown(why.as_deref().unwrap_or_default()))
                }
            },
        ]);
    }
    let count = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    let all = report.checks.len();
    let summary = match (count(Verdict::Failed), count(Verdict::Unverified)) {
        (0, 0) => format!("Verified: {all} checks, all as they should be."),
        (0, unverified) => format!("NOT verified: {unverified} of {all} checks could not be made."),
        (failed, 0) => format!("FAILED: {failed} of {all} checks."),
        (failed, unverified) => {
            format!("FAILED: {failed} of {all} checks, and {unverified} could not be made.")
        }
    };
    print(&format!("{}\n{summary}\n", table.to_text()))
}

fn expected(expected: Expected) -> &'static str {
    match expected {
        Expected::Open => "open",
        Expected::Refused => "refused",
        Expected::Closed => "closed",
    }
}

fn found(found: Found) -> &'static str {
    match found {
        Found::Open => "open",
        Found::Refused => "refused",
        Found::Unreachable => "unreachable",
        Found::TimedOut => "no answer",
        Found::Nobody => "nobody",
        Found::NotTried => "-",
    }
}

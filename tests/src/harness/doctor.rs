//! What `lbridge doctor --json` found.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::daemon::{Daemon, Output};

/// A doctor's report.
#[derive(Debug)]
pub struct Report {
    /// The exit status.
    pub status: i32,
    findings: Vec<Value>,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// `ok`, `note`, `warning` or `problem`.
    pub level: String,
    /// What it says, the reason included.
    pub text: String,
    /// What to type.
    pub remedy: Vec<String>,
}

impl Report {
    /// From what a command printed. The exit status must fit what was found.
    pub fn read(output: &Output) -> Result<Report> {
        let report: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        let findings = report["findings"].as_array().context("findings")?.clone();
        let problem = findings.iter().any(|finding| finding["level"] == "problem");
        ensure!(output.status == i32::from(problem), "{output:?}");
        ensure!(output.stderr.is_empty(), "{output:?}");
        Ok(Report { status: output.status, findings })
    }

    /// Of the daemon's host, and with its paths.
    pub fn of(daemon: &Daemon) -> Result<Report> {
        let paths = paths(daemon);
        let arguments = ["doctor", "--json"].into_iter().chain(paths.iter().map(String::as_str));
        Report::read(&daemon.cli(&arguments.collect::<Vec<_>>())?)
    }

    /// What a check found, in order.
    pub fn of_check(&self, check: &str) -> Vec<Finding> {
        let found = self.findings.iter().filter(|finding| finding["check"] == check);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        found
            .map(|finding| Finding {
                level: text(&finding["level"]),
                text: format!("{} {}", text(&finding["what"]), text(&finding["why"])),
                remedy: finding["remedy"].as_array().into_iter().flatten().map(text).collect(),
            })
            .collect()
    }

    /// The one finding of a check, which must be of this level.
    pub fn must(&self, check: &str, level: &str) -> Result<Finding> {
        match &self.of_check(check)[..] {
            [finding] if finding.level == level => Ok(finding.clone()),
            other => anyhow::bail!("{check} should be one {level}: {other:?}, of {self:?}"),
        }
    }

    /// A check must have found nothing.
    pub fn must_not(&self, check: &str) -> Result<()> {
        ensure!(self.of_check(check).is_empty(), "{check}: {self:?}");
        Ok(())
    }

    /// Everything that is worse than a note, by check.
    pub fn complaints(&self) -> Vec<String> {
        let bad = |finding: &&Value| finding["level"] == "warning" || finding["level"] == "problem";
        self.findings.iter().filter(bad).map(ToString::to_string).collect()
    }
}

/// Options that tell the doctor the daemon's paths.
pub fn paths(daemon: &Daemon) -> [String; 3] {
    let option = |name: &str, path: &Path| format!("--{name}={}", path.display());
    [
        option("state-dir", &daemon.state_dir()),
        option("config", &daemon.config()),
        option("bpffs", daemon.bpffs()),
    ]
}

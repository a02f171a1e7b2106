//! doctor: the report of `lbridge doctor --json`.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::daemon::{Daemon, Output};

/// A parsed report of the doctor.
#[derive(Debug)]
pub struct Report {
    /// The exit status of the command.
    pub status: i32,
    findings: Vec<Value>,
}

/// A finding of the doctor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The severity: `ok`, `note`, `warning` or `problem`.
    pub level: String,
    /// The finding's text, with the reason.
    pub text: String,
    /// The remedy: what to type, one line each.
    pub remedy: Vec<String>,
}

impl Report {
    /// Parses the output of a command. The exit status must agree with the findings.
    pub fn read(output: &Output) -> Result<Report> {
        let report: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        let findings = report["findings"].as_array().context("findings")?.clone();
        let problem = findings.iter().any(|finding| finding["level"] == "problem");
        ensure!(output.status == i32::from(problem), "{output:?}");
        ensure!(output.stderr.is_empty(), "{output:?}");
        Ok(Report { status: output.status, findings })
    }

    /// Runs the doctor on the daemon's host and with its paths.
    pub fn of(daemon: &Daemon) -> Result<Report> {
        let paths = paths(daemon);
        let arguments = ["doctor", "--json"].into_iter().chain(paths.iter().map(String::as_str));
        Report::read(&daemon.cli(&arguments.collect::<Vec<_>>())?)
    }

    /// Returns the findings of a check, in order.
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

    /// Requires that a check has one finding, of this level; returns it.
    pub fn must(&self, check: &str, level: &str) -> Result<Finding> {
        match &self.of_check(check)[..] {
            [finding] if finding.level == level => Ok(finding.clone()),
            other => anyhow::bail!("{check} should be one {level}: {other:?}, of {self:?}"),
        }
    }

    /// Requires that a check has found nothing.
    pub fn must_not(&self, check: &str) -> Result<()> {
        ensure!(self.of_check(check).is_empty(), "{check}: {self:?}");
        Ok(())
    }

    /// Lists every finding worse than a note.
    pub fn complaints(&self) -> Vec<String> {
        let bad = |finding: &&Value| finding["level"] == "warning" || finding["level"] == "problem";
        self.findings.iter().filter(bad).map(ToString::to_string).collect()
    }
}

/// Returns options that give the doctor the daemon's paths.
pub fn paths(daemon: &Daemon) -> [String; 3] {
    let option = |name: &str, path: &Path| format!("--{name}={}", path.display());
    [
        option("state-dir", &daemon.state_dir()),
        option("config", &daemon.config()),
        option("bpffs", daemon.bpffs()),
    ]
}

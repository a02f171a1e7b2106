//! usage: the resources that a running process uses, as the kernel reports them.

use std::fs;

use anyhow::{Context, Result};

/// The pid of a process to measure.
#[derive(Clone, Copy, Debug)]
pub struct Process(pub u32);

impl Process {
    /// Returns the resident memory, in KiB.
    pub fn resident(self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// Returns the user and system time used so far, in hundredths of a second.
    pub fn ticks(self) -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        // Fields 14 and 15; the name and everything before it are cut off.
        Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
    }

    /// Returns the number of open descriptors.
    pub fn descriptors(self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.0))?.count())
    }

    /// Returns the number of open descriptors that are ends of pipes.
    pub fn pipe_ends(self) -> Result<usize> {
        let links = fs::read_dir(format!("/proc/{}/fd", self.0))?.flatten();
        let targets = links.filter_map(|link| fs::read_link(link.path()).ok());
        Ok(targets.filter(|target| target.to_string_lossy().starts_with("pipe:")).count())
    }

    /// Returns the hard limit of open files.
    pub fn open_files_limit(self) -> Result<usize> {
        let limits = fs::read_to_string(format!("/proc/{}/limits", self.0))?;
        let line = limits.lines().find(|line| line.starts_with("Max open files")).context("no limit")?;
        let hard = line.split_whitespace().nth(4).context("no hard limit")?;
        Ok(if hard == "unlimited" { usize::MAX } else { hard.parse()? })
    }
}

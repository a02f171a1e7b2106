//! errors: what is wrong with the configuration, where, and what to write instead.

use std::path::PathBuf;

use crate::planning::rule::{Rule, RuleError, RuleId, Spelling};

/// An error in the file that keeps it from being read.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {mistake}")]
pub struct ConfigError {
    /// The file's name, the line and the column.
    pub(super) place: String,
    pub(super) mistake: Mistake,
}

/// A mistake at one place of the file.
#[derive(Debug, thiserror::Error)]
pub(super) enum Mistake {
    #[error("[rule] is a single table; write [[rule]], once for each rule")]
    SingleTable,
    #[error("{0} is a setting of the whole file; put it before the first [[rule]]")]
    SettingInRule(String),
    #[error("{0} is part of a rule; put it below [[rule]]")]
    OptionOutside(String),
    #[error("there is no {name:?}; write {nearest}")]
    Misspelt { name: String, nearest: &'static str },
    #[error("there is no {name:?}; there are {}", known.join(", "))]
    Unknown { name: String, known: Vec<&'static str> },
    #[error("the rule has no network; add network = \"app_net\"")]
    NoNetwork,
    #[error("the rule has no port; add port = 5432")]
    NoPort,
    #[error("the rule has port and ports; remove one")]
    PortAndPorts,
    /// The parser or serde found it, and has the words for it; in one line, like every error.
    #[error("{}", .0.message().lines().collect::<Vec<_>>().join(" "))]
    Unparsed(toml::de::Error),
}

/// The reason why the file's rules cannot be in force: what is wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// The file cannot be used at all; holds the reason.
    #[error("{0}")]
    File(String),
    /// A rule of the file is refused.
    #[error("{place}: {}", error.for_file())]
    Rule {
        /// The place of the rule; the file's name if the error is about all rules.
        place: String,
        /// The reason, which says what to write instead.
        error: RuleError,
    },
    /// Two rules of the file are for the same network, port and protocol, and differ.
    #[error("{second}: {} has a rule already, {}, at {first}; remove \
             one", existing.id(), Spelling::File.rule(existing))]
    Twice {
        /// The place of the first rule.
        first: String,
        /// The place of the second rule.
        second: String,
        /// The first rule.
        existing: Box<Rule>,
    },
    /// A rule of the file contradicts one that `allow` made.
    #[error(
        "{place}: {id} is allowed differently in {}; remove the rule from one of them, there with `lbridge \
         deny {id}`",
        allowed_in.display()
    )]
    Contradiction {
        /// The place of the file's rule.
        place: String,
        /// Id of both rules.
        id: RuleId,
        /// The file with the rules that `allow` made.
        allowed_in: PathBuf,
    },
    /// The rules of the file and those of `allow` cannot be in force together.
    #[error("{file} and {}: {}", allowed_in.display(), error.for_file())]
    Together {
        /// The configuration file.
        file: String,
        /// The file with the rules that `allow` made.
        allowed_in: PathBuf,
        /// The reason, which says what to write instead.
        error: RuleError,
    },
}

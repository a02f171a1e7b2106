//! The rules, and what `allow` and `deny` make of them.

use std::collections::BTreeMap;

use lbridge_common::wire;

use super::{Invalid, Network, Origin, PathChoice, Rule, RuleId, Source, Target};

/// Why a change was refused; nothing of it was applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The same (network, port) with other options.
    #[error(
        "{network} {wanted} contradicts {network} {existing}, which is allowed already; run `lbridge deny {id}` first",
        network = .id.network
    )]
    Conflict {
        /// Which.
        id: RuleId,
        /// The port argument and options that were to be added.
        wanted: String,
        /// Those that there are.
        existing: String,
    },
    /// As [`Refused::Conflict`], among what was to be added at once.
    #[error("{network} {wanted} contradicts {network} {existing}, both asked for at once; leave one of them out", network = .id.network)]
    ConflictWithin {
        /// Which.
        id: RuleId,
        /// The later one.
        wanted: String,
        /// The earlier one.
        existing: String,
    },
    /// There is no such rule.
    #[error("no rule for {id}; `lbridge list` shows those there are")]
    NoSuchRule {
        /// Which.
        id: RuleId,
    },
    /// The rule is the config's.
    #[error("{id} comes from the configuration file; change it there")]
    ReadOnly {
        /// Which.
        id: RuleId,
    },
    /// The rule is a label's.
    #[error(
        "{id} comes from a label of a container or a network; make that anew without it, or take the port out of label_ports in lbridge.toml"
    )]
    FromLabel {
        /// Which.
        id: RuleId,
    },
    /// A rule that could never serve.
    #[error(
        "{id} leads to a Unix socket, whose service would see root as its peer; allow it with --source loopback"
    )]
    NeedsLoopback {
        /// Which.
        id: RuleId,
    },
    /// A rule that contradicts itself.
    #[error("{id}: --path steer cannot be: {obstacle}; leave it out")]
    NeedsRelay {
        /// Which.
        id: RuleId,
        /// What keeps the kernel from serving it.
        obstacle: &'static str,
    },
    /// Options that do not go together.
    #[error("{id}: {why}")]
    Contradiction {
        /// Which.
        id: RuleId,
        /// Which they are, and what to leave out.
        why: &'static str,
    },
    /// A name or a comment that cannot be one.
    #[error("{id}: {invalid}")]
    Invalid {
        /// Which.
        id: RuleId,
        /// What is wrong with it, and what to write instead.
        invalid: Invalid,
    },
    /// A number that says nothing.
    #[error(
        "{id}: a process's number means nothing after its end; use `lbridge allow`, container:NAME or netns:PATH"
    )]
    ProcessUnknown {
        /// Which.
        id: RuleId,
    },
    /// More than the kernel map holds.
    #[error("{count} rules are more than the {max} that can be in force")]
    TooMany {
        /// Wanted.
        count: usize,
        /// Limit.
        max: usize,
    },
}

/// All rules, desired. Ordered, so that whatever follows from them is deterministic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules(BTreeMap<RuleId, (Rule, Origin)>);

impl Rules {
    /// In order of network and port.
    pub fn iter(&self) -> impl Iterator<Item = (&RuleId, &Rule, Origin)> {
        self.0.iter().map(|(id, (rule, origin))| (id, rule, *origin))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// With `added`, or nothing of it. Adding what is there already is no change; a remark replaces the old one.
    pub fn allow(&self, added: impl IntoIterator<Item = Rule>, origin: Origin) -> Result<Self, Refused> {
        let mut rules = self.0.clone();
        for rule in added {
            let id = rule.id();
            if let Err(invalid) = rule.check_text() {
                return Err(Refused::Invalid { id, invalid });
            }
            if matches!(rule.spec.target, Target::Unix(_)) && rule.source == Source::Container {
                return Err(Refused::NeedsLoopback { id });
            }
            if let (PathChoice::Steer, Some(obstacle)) = (rule.path, rule.needs_relay()) {
                return Err(Refused::NeedsRelay { id, obstacle });
            }
            if let Some(why) = rule.contradiction() {
                return Err(Refused::Contradiction { id, why });
            }
            if matches!(rule.network, Network::Process(_)) && rule.process.is_none() {
                return Err(Refused::ProcessUnknown { id });
            }
            if rule.process.is_some() {
                // What was for a process that had the number before it will never serve again.
                rules.retain(|_, (other, _)| other.network != rule.network || other.process == rule.process);
            }
            match rules.get(&id) {
                Some((existing, Origin::Config)) if origin == Origin::Cli && !existing.same_effect(&rule) => {
                    return Err(Refused::ReadOnly { id });
                }
                Some((existing, _)) if !existing.same_effect(&rule) => {
                    let (wanted, existing) = (rule.options(), existing.options());
                    return Err(if self.0.contains_key(&id) {
                        Refused::Conflict { id, wanted, existing }
                    } else {
                        Refused::ConflictWithin { id, wanted, existing }
                    });
                }
                // A config rule stays the config's, whatever remark the CLI gives.
                Some((_, Origin::Config | Origin::Label)) => {}
                Some((existing, Origin::Cli)) if rule.comment.is_none() && existing.comment.is_some() => {}
                _ => {
                    rules.insert(id, (rule, origin));
                }
            }
        }
        let max = wire::MAX_RULES as usize;
        if rules.len() > max {
            return Err(Refused::TooMany { count: rules.len(), max });
        }
        Ok(Self(rules))
    }

    /// Without `removed`, or nothing of it.
    pub fn deny(&self, removed: impl IntoIterator<Item = RuleId>) -> Result<Self, Refused> {
        let mut rules = self.0.clone();
        for id in removed {
            match self.0.get(&id) {
                None => return Err(Refused::NoSuchRule { id }),
                Some((_, Origin::Config)) => return Err(Refused::ReadOnly { id }),
                Some((_, Origin::Label)) => return Err(Refused::FromLabel { id }),
                Some((_, Origin::Cli)) => rules.remove(&id),
            };
        }
        Ok(Self(rules))
    }
}

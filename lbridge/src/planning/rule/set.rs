//! Set: all rules, and the changes that `allow` and `deny` make to them.

use std::collections::BTreeMap;

use lbridge_common::wire;

use super::{Invalid, Network, Origin, PathChoice, Rule, RuleId, Source, Target};

/// The reason why a change was refused. Nothing of the change was applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A rule with the same (network, port) and other options exists.
    #[error(
        "{network} {wanted} contradicts {network} {existing}, which is allowed already; run `lbridge deny \
         {id}` first",
        network = .id.network
    )]
    Conflict {
        /// Id of the rule.
        id: RuleId,
        /// The port argument and options of the rule that was to be added.
        wanted: String,
        /// The port argument and options of the rule that exists.
        existing: String,
    },
    /// Like [`Refused::Conflict`], between two rules that were to be added at once.
    #[error(
        "{network} {wanted} contradicts {network} {existing}, both asked for at once; leave one of them out",
        network = .id.network
    )]
    ConflictWithin {
        /// Id of both rules.
        id: RuleId,
        /// The port argument and options of the later rule.
        wanted: String,
        /// The port argument and options of the earlier rule.
        existing: String,
    },
    /// There is no rule with this id.
    #[error("no rule for {id}; `lbridge list` shows those there are")]
    NoSuchRule {
        /// The id that was asked for.
        id: RuleId,
    },
    /// The rule comes from the configuration file.
    #[error("{id} comes from the configuration file; change it there")]
    ReadOnly {
        /// Id of the rule.
        id: RuleId,
    },
    /// The rule comes from a label.
    #[error(
        "{id} comes from a label of a container or a network; make that anew without it, or take the port \
         out of label_ports in lbridge.toml"
    )]
    FromLabel {
        /// Id of the rule.
        id: RuleId,
    },
    /// The rule leads to a Unix socket without `--source loopback`, and could never serve.
    #[error(
        "{id} leads to a Unix socket, whose service would see root as its peer; allow it with --source \
         loopback"
    )]
    NeedsLoopback {
        /// Id of the rule.
        id: RuleId,
    },
    /// The rule contradicts itself: it has `--path steer`, and the kernel can never serve it.
    #[error("{id}: --path steer cannot be: {obstacle}; leave it out")]
    NeedsRelay {
        /// Id of the rule.
        id: RuleId,
        /// The reason why the kernel cannot serve it.
        obstacle: &'static str,
    },
    /// The rule has options that do not go together.
    #[error("{id}: {why}")]
    Contradiction {
        /// Id of the rule.
        id: RuleId,
        /// The options that do not go together, and which one to leave out.
        why: &'static str,
    },
    /// The rule has a container name or a comment that is not valid.
    #[error("{id}: {invalid}")]
    Invalid {
        /// Id of the rule.
        id: RuleId,
        /// The error in the text, and what to write instead.
        invalid: Invalid,
    },
    /// The rule names a process by a number, without the process's start: the number alone says nothing.
    #[error(
        "{id}: a process's number means nothing after its end; use `lbridge allow`, container:NAME or \
         netns:PATH"
    )]
    ProcessUnknown {
        /// Id of the rule.
        id: RuleId,
    },
    /// The rules are more than the kernel's map holds.
    #[error("{count} rules are more than the {max} that can be in force")]
    TooMany {
        /// Number of rules that were wanted.
        count: usize,
        /// Largest number of rules that can be in force.
        max: usize,
    },
}

/// All rules: the desired state. Ordered, so that everything derived from them is deterministic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules(BTreeMap<RuleId, (Rule, Origin)>);

impl Rules {
    /// Iterates over the rules in order of network and port.
    pub fn iter(&self) -> impl Iterator<Item = (&RuleId, &Rule, Origin)> {
        self.0.iter().map(|(id, (rule, origin))| (id, rule, *origin))
    }

    /// Returns the number of rules.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if there are no rules.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the rules with all of `added`, or the reason why none of it was added. A rule that is there
    /// already stays as it is, except that a new comment replaces the old one of a rule that `lbridge allow`
    /// made.
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
                // Rules for a process that had the number before will never serve again.
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
                // A rule of the configuration or of a label keeps its origin and comment, whatever comment
                // the CLI gives.
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

    /// Returns the rules without `removed`, or the reason why none of it was removed.
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

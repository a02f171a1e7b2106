//! Set: all rules, and the changes that `allow` and `deny` make to them.

use std::collections::BTreeMap;

use lbridge_common::wire;

use super::{DatapathChoice, Network, Origin, Rule, RuleError, RuleId, Source, Target};

/// All rules, from which the desired state is resolved. Ordered, so that everything derived from them is
/// deterministic.
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
    pub fn allow(&self, added: impl IntoIterator<Item = Rule>, origin: Origin) -> Result<Self, RuleError> {
        let mut rules = self.0.clone();
        for rule in added {
            let id = rule.id();
            if let Err(invalid) = rule.check_text() {
                return Err(RuleError::Invalid { id, invalid });
            }
            if matches!(rule.spec.target, Target::Unix(_)) && rule.options.source == Source::Container {
                return Err(RuleError::NeedsLoopback { id });
            }
            if let (DatapathChoice::Steer, Some(obstacle)) = (rule.options.path, rule.needs_relay()) {
                return Err(RuleError::NeedsRelay { id, obstacle });
            }
            if let Some(contradiction) = rule.contradiction() {
                return Err(RuleError::Contradiction { id, contradiction });
            }
            if matches!(rule.network, Network::Process(_)) && rule.process.is_none() {
                return Err(RuleError::ProcessUnknown { id });
            }
            if rule.process.is_some() {
                // Rules for a process that had the number before will never serve again.
                rules.retain(|_, (other, _)| other.network != rule.network || other.process == rule.process);
            }
            match rules.get(&id) {
                Some((existing, Origin::Config)) if origin == Origin::Cli && !existing.same_effect(&rule) => {
                    return Err(RuleError::ReadOnly { id });
                }
                Some((existing, _)) if !existing.same_effect(&rule) => {
                    let (wanted, existing) = (Box::new(rule), Box::new(existing.clone()));
                    return Err(if self.0.contains_key(&id) {
                        RuleError::Conflict { wanted, existing }
                    } else {
                        RuleError::ConflictWithin { wanted, existing }
                    });
                }
                // A rule of the configuration or of a label keeps its origin and comment, whatever comment
                // the CLI gives.
                Some((_, Origin::Config | Origin::Label)) => {}
                Some((existing, Origin::Cli))
                    if rule.options.comment.is_none() && existing.options.comment.is_some() => {}
                _ => {
                    rules.insert(id, (rule, origin));
                }
            }
        }
        let max = wire::MAX_ENTRIES as usize;
        if rules.len() > max {
            return Err(RuleError::TooMany { count: rules.len(), max });
        }
        Ok(Self(rules))
    }

    /// Returns the rules without `removed`, or the reason why none of it was removed.
    pub fn deny(&self, removed: impl IntoIterator<Item = RuleId>) -> Result<Self, RuleError> {
        let mut rules = self.0.clone();
        for id in removed {
            match self.0.get(&id) {
                None => return Err(RuleError::NoSuchRule { id }),
                Some((_, Origin::Config)) => return Err(RuleError::ReadOnly { id }),
                Some((_, Origin::Label)) => return Err(RuleError::FromLabel { id }),
                Some((_, Origin::Cli)) => rules.remove(&id),
            };
        }
        Ok(Self(rules))
    }
}

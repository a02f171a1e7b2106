//! Configuration: the one in force, and how a reload replaces it. Does not decide what follows from a change.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::anyhow;
use jiff::Timestamp;

use crate::{
    api::protocol::{ApiError, ErrorCode, RefusedReload, SettingChange},
    host::trusted,
    planning::rule::{Origin, Rule, RuleId, Rules},
    store::{
        Store,
        config::{Config, Unfit},
    },
};

/// The configuration file and what was read from it.
#[derive(Debug)]
pub(super) struct Configuration {
    path: PathBuf,
    config: Config,
    /// Rules made by `allow` that the file contains, too: `allow` owns them again once the file no longer
    /// does.
    repeated: Vec<Rule>,
    refused: Option<RefusedReload>,
}

/// The effect of a new configuration, before it is in force.
#[derive(Debug)]
pub(super) struct Change {
    config: Config,
    /// All rules under the new configuration, those of `allow` included.
    pub(super) rules: Rules,
    repeated: Vec<Rule>,
    /// Ids of the file's own rules that are new; then of those that changed, and of those that are gone.
    pub(super) added: Vec<RuleId>,
    pub(super) changed: Vec<RuleId>,
    pub(super) removed: Vec<RuleId>,
    pub(super) settings: Vec<SettingChange>,
}

impl Configuration {
    /// Reads the configuration for a start, and returns all rules with it.
    pub(super) fn load(path: PathBuf, store: &Store) -> anyhow::Result<(Self, Rules)> {
        super::check(trusted::check_file(&path), "the configuration", &path)?;
        let config =
            Config::load(&path).map_err(|e| anyhow!("{e:#}; fix or remove the file, then start again"))?;
        let allowed = store.rules()?;
        let rules = config.rules_with(allowed.clone(), &store.rules_file());
        let rules = rules.map_err(|unfit| anyhow!("{unfit}, then start again"))?;
        let repeated = repeated(&rules, allowed);
        Ok((Self { path, config, repeated, refused: None }, rules))
    }

    /// Returns the configuration in force.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the last reload's failure; `None` if the last reload succeeded or there was none.
    pub(super) fn refused(&self) -> Option<&RefusedReload> {
        self.refused.as_ref()
    }

    /// Lists the rules of `allow` among `rules`, as they are to be kept on disk.
    pub(super) fn allowed(&self, rules: &Rules) -> Vec<Rule> {
        let own =
            rules.iter().filter(|(_, _, origin)| *origin == Origin::Cli).map(|(_, rule, _)| rule.clone());
        own.chain(self.repeated.iter().cloned()).collect()
    }

    /// Reads the file again, and compares it with what is in force. Changes nothing, except that it remembers
    /// that an invalid file was refused.
    pub(super) fn read_again(&mut self, rules: &Rules, store: &Store) -> Result<Change, ApiError> {
        let own = super::check(trusted::check_file(&self.path), "the configuration", &self.path);
        let read = own
            .map_err(|e| Unfit::File(e.to_string()))
            .and_then(|()| Config::load(&self.path).map_err(|e| Unfit::File(format!("{e:#}; fix the file"))));
        let read = read.and_then(|config| {
            let allowed = self.allowed(rules);
            let all = config.rules_with(allowed.clone(), &store.rules_file())?;
            Ok(self.change(config, rules, all, allowed))
        });
        read.map_err(|unfit| {
            let code = match &unfit {
                Unfit::File(_) | Unfit::Rule { .. } | Unfit::Twice { .. } => ErrorCode::Failed,
                Unfit::Contradiction { .. } | Unfit::Together { .. } => ErrorCode::Conflict,
            };
            let since = self.refused.as_ref().map_or_else(Timestamp::now, |refused| refused.since);
            self.refused = Some(RefusedReload { since, error: unfit.to_string() });
            ApiError {
                code,
                message: format!("{unfit}, then `lbridge reload`; what was read before is in force"),
            }
        })
    }

    fn change(&self, config: Config, before: &Rules, rules: Rules, allowed: Vec<Rule>) -> Change {
        let of_file = |rules: &Rules| -> BTreeMap<RuleId, Rule> {
            let of_file = rules.iter().filter(|(_, _, origin)| *origin == Origin::Config);
            of_file.map(|(id, rule, _)| (id.clone(), rule.clone())).collect()
        };
        let (old, new) = (of_file(before), of_file(&rules));
        let ids = |wanted: &dyn Fn(&RuleId, &Rule) -> bool, among: &BTreeMap<RuleId, Rule>| {
            among.iter().filter(|(id, rule)| wanted(id, rule)).map(|(id, _)| id.clone()).collect()
        };
        let settings = self.config.settings().into_iter().zip(config.settings());
        let settings = settings
            .filter(|(before, now)| before != now)
            .map(|((name, before), (_, now))| SettingChange { name: name.to_owned(), before, now });
        Change {
            added: ids(&|id, _| !old.contains_key(id), &new),
            changed: ids(&|id, rule| old.get(id).is_some_and(|old| old != rule), &new),
            removed: ids(&|id, _| !new.contains_key(id), &old),
            settings: settings.collect(),
            repeated: repeated(&rules, allowed),
            config,
            rules,
        }
    }

    /// Puts a change in force, and returns all rules.
    pub(super) fn adopt(&mut self, change: Change) -> Rules {
        self.config = change.config;
        self.repeated = change.repeated;
        self.refused = None;
        change.rules
    }
}

fn repeated(rules: &Rules, mut allowed: Vec<Rule>) -> Vec<Rule> {
    let of_file: std::collections::BTreeSet<_> =
        rules.iter().filter(|(_, _, origin)| *origin == Origin::Config).map(|(id, ..)| id).collect();
    allowed.retain(|rule| of_file.contains(&rule.id()));
    allowed
}

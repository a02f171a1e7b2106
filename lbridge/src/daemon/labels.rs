//! Labels: the rules that labels ask for, as last derived. They are derived again only if an input has
//! changed.

use std::collections::BTreeSet;

use crate::{
    api::protocol::{EventKind, LabelStatus},
    docker::view::View,
    planning::{
        inventory::DockerNetwork,
        labels::{self, Derived, Labelled, Problem, Settings},
        rule::{Origin, RuleId, Rules},
    },
};

/// Limit on the problems that are remembered as logged. When it is reached they are forgotten, and may be
/// logged again.
const MAX_TOLD: usize = 1024;

/// The rules that labels ask for, with the inputs that they were derived from.
#[derive(Debug, Default)]
pub(super) struct Labels {
    settings: Settings,
    labelled: Vec<Labelled>,
    networks: Vec<DockerNetwork>,
    own: Rules,
    derived: Derived,
    told: BTreeSet<Problem>,
}

impl Labels {
    /// Derives the rules again if an input has changed, and returns what has happened. `own` are the rules of
    /// others, which take precedence.
    pub(super) fn update(&mut self, settings: &Settings, view: Option<&View>, own: &Rules) -> Vec<EventKind> {
        let without_docker = view.is_none();
        let view = view.filter(|_| settings.enabled);
        let (labelled, networks) =
            view.map_or((&[][..], &[][..]), |view| (&view.labelled[..], &view.networks[..]));
        if !settings.enabled && !self.settings.enabled {
            return vec![];
        }
        if *settings == self.settings
            && labelled == self.labelled
            && networks == self.networks
            && *own == self.own
        {
            return vec![];
        }
        let before = std::mem::replace(&mut self.derived, labels::derive(labelled, settings, networks, own));
        if settings.enabled && without_docker {
            self.derived.problems.push(Problem {
                object: "all of them".to_owned(),
                label: labels::ALLOW.to_owned(),
                wrong: "the daemon runs with --no-docker, and sees no label".to_owned(),
                remedy: "start it without that, or remove labels = true from lbridge.toml".to_owned(),
            });
        }
        self.settings = settings.clone();
        self.labelled = labelled.to_vec();
        self.networks = networks.to_vec();
        self.own = own.clone();
        self.changed_since(&before).into_iter().chain(self.new_problems()).collect()
    }

    /// Returns all rules that are to be in force.
    pub(super) fn rules<'a>(&'a self, own: &'a Rules) -> &'a Rules {
        if self.settings.enabled { &self.derived.rules } else { own }
    }

    /// Lists the rules that labels ask for and nobody else has made.
    pub(super) fn ids(&self) -> BTreeSet<RuleId> {
        ids(&self.derived)
    }

    pub(super) fn status(&self) -> LabelStatus {
        LabelStatus {
            enabled: self.settings.enabled,
            problems: self.derived.problems.clone(),
            more_problems: self.derived.more,
        }
    }

    fn changed_since(&self, before: &Derived) -> Vec<EventKind> {
        let (before, now) = (ids(before), ids(&self.derived));
        let happened = |id: &RuleId, asked| {
            let RuleId { network, port, protocol } = id.clone();
            EventKind::Labelled { network, port, protocol, asked }
        };
        let gone = before.difference(&now).map(|id| happened(id, false));
        gone.chain(now.difference(&before).map(|id| happened(id, true))).collect()
    }

    /// Logs and returns each new problem. A problem is reported once, however often its container starts
    /// again.
    fn new_problems(&mut self) -> Vec<EventKind> {
        let mut new = vec![];
        for problem in &self.derived.problems {
            if self.told.len() >= MAX_TOLD {
                self.told.clear();
            }
            if self.told.insert(problem.clone()) {
                let of = |kind| problem.object.strip_prefix(kind);
                tracing::warn!(
                    container = of("container "),
                    network = of("network "),
                    label = problem.label,
                    error = problem.wrong,
                    remedy = problem.remedy,
                    "label has a problem"
                );
                new.push(EventKind::BadLabel(problem.clone()));
            }
        }
        new
    }
}

fn ids(derived: &Derived) -> BTreeSet<RuleId> {
    let of_labels = derived.rules.iter().filter(|(.., origin)| *origin == Origin::Label);
    of_labels.map(|(id, ..)| id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_nobody_sees_are_told_of_once() {
        let on = Settings { enabled: true, ..Settings::default() };
        let (mut labels, own) = (Labels::default(), Rules::default());
        let happened = labels.update(&on, None, &own);
        assert!(
            matches!(&happened[..], [EventKind::BadLabel(problem)] if problem.wrong.contains("--no-docker"))
        );
        assert_eq!((labels.update(&on, None, &own), labels.status().problems.len()), (vec![], 1));
        labels.update(&Settings::default(), None, &own);
        assert_eq!(labels.status(), LabelStatus::default());
        labels.update(&on, None, &own);
        assert_eq!(labels.status().problems.len(), 1);
    }
}

//! Rule: the rule that a question is about, and the nearest ones if there is none.

use std::net::IpAddr;

use super::{Answer, Explainer, Stage, Step, Trace, render::step};
use crate::planning::{
    desired::{BindScope, Outcome, RuleOutcome},
    hooks::HookSet,
    resolve::bridge_of,
    rule::{Origin, RuleId},
};

/// Most rules that are named where none matches.
const MAX_NEAREST: usize = 4;
/// Largest distance from the dialled port at which another port may have been meant.
const NEAR: u16 = 2;

impl Explainer<'_> {
    pub(super) fn id(&self) -> RuleId {
        RuleId {
            network: self.question.network.clone(),
            port: self.question.port,
            protocol: self.question.protocol,
        }
    }

    /// Returns the question's rule, or whichever rule has one of the question's addresses: two names may mean
    /// one bridge.
    pub(super) fn rule(&self) -> Option<&RuleOutcome> {
        let outcomes = &self.known.desired.outcomes;
        let by_name = outcomes.iter().find(|meant| meant.rule.id() == self.id());
        by_name.or_else(|| {
            let bridge = bridge_of(&self.question.network, self.known.inventory, self.known.features).ok()?;
            outcomes.iter().find(|meant| {
                let here = |place: &BindScope| {
                    matches!(place, BindScope::Bridge { ifindex, .. } if *ifindex == bridge.index)
                };
                meant.rule.spec.port == self.question.port
                    && meant.rule.spec.protocol == self.question.protocol
                    && meant.gateways.iter().any(|gateway| here(&gateway.relay_key.place))
            })
        })
    }

    pub(super) fn rule_step(&self) -> Step {
        let Some(meant) = self.rule() else {
            let nearest = self.nearest();
            let text = if nearest.is_empty() {
                format!("no rule for {}", self.id())
            } else {
                format!("no rule for {}; nearest: {}", self.id(), nearest.join(", "))
            };
            return step(Stage::Rule, Answer::No, text);
        };
        let by = match meant.origin {
            Origin::Cli => "made by lbridge allow".to_owned(),
            Origin::Config => "from the configuration file".to_owned(),
            Origin::Label if meant.rule.options.from.is_empty() => "from the network's label".to_owned(),
            Origin::Label => {
                let names =
                    meant.rule.options.from.iter().take(MAX_NEAREST).map(String::as_str).collect::<Vec<_>>();
                format!("from the label of {}", names.join(", "))
            }
        };
        let shared =
            if meant.rule.network == self.question.network { "" } else { ", which means the same bridge" };
        let text = format!("{} -> {}, {by}{shared}", meant.rule.id(), meant.rule.spec.target);
        step(Stage::Rule, Answer::Yes, text)
    }

    /// Returns a step about the containers' own localhost, if the rule leads it anywhere.
    pub(super) fn localhost_step(&self) -> Option<Step> {
        let meant = self.rule().filter(|meant| !meant.redirects.is_empty())?;
        let actual = self.known.actual;
        let told = meant.redirects.iter().map(|dial| {
            let address = dial.address;
            let there = dial.keys.first().and_then(|key| actual.kernel.redirects.get(key));
            match (there.filter(|_| actual.kernel.hooks[HookSet::Connect]), dial.outcome.why()) {
                (Some(there), _) => {
                    let containers = actual.whose_localhost(dial);
                    let gateway = IpAddr::from(there.gateway.address);
                    let whose = if containers == 1 { "container" } else { "containers" };
                    (
                        true,
                        format!(
                            "{address} in {containers} {whose} leads to {gateway}, unless it is \
                             listened on there"
                        ),
                    )
                }
                (None, Some(why)) => (false, format!("{address} leads nowhere: {why}")),
                (None, None) => (false, format!("{address} leads nowhere: the kernel has no entry for it")),
            }
        });
        let (there, told): (Vec<bool>, Vec<String>) = told.unzip();
        let answer = if there.contains(&false) { Answer::No } else { Answer::Yes };
        Some(step(Stage::Localhost, answer, told.join("; ")))
    }

    /// Lists other ports of this network, and other networks that have this port or one near it.
    fn nearest(&self) -> Vec<String> {
        let distance = |meant: &RuleOutcome| meant.rule.spec.port.abs_diff(self.question.port);
        let is_other = |meant: &RuleOutcome| meant.rule.network != self.question.network;
        let leads_there = |meant: &RuleOutcome| meant.rule.spec.target.port() == Some(self.question.port);
        let outcomes = self.known.desired.outcomes.iter();
        let mut near: Vec<_> = outcomes
            .filter(|meant| !is_other(meant) || distance(meant) <= NEAR)
            .map(|meant| (!leads_there(meant) || is_other(meant), distance(meant), is_other(meant), meant))
            .collect();
        near.sort_by_key(|(leads, distance, other, meant)| (*leads, *distance, *other, meant.rule.id()));
        let told = |meant: &RuleOutcome| format!("{} {}", meant.rule.network, meant.rule.spec);
        near.into_iter().take(MAX_NEAREST).map(|(.., meant)| told(meant)).collect()
    }

    /// Returns the outcome that the rule means for this way.
    pub(super) fn meant(&self, way: &Trace) -> Option<&Outcome> {
        let gateways = &self.rule()?.gateways;
        Some(&gateways.iter().find(|gateway| gateway.relay_key.address == way.dialled)?.outcome)
    }
}

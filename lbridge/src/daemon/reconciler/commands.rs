//! Commands: carries out the commands of the control API, one after the other.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use lbridge_common::wire::Counter;

use super::{DOCKER_REFRESH, Reconciler, Scene};
use crate::{
    api::{
        protocol::{
            Allow, ApiError, Counters, Deny, ErrorCode, KernelDatapath, KernelStatus, Reloaded, RuleStatus,
            Status,
        },
        server::Command,
    },
    daemon::{explain, report},
    host::netns::process_start,
    planning::{
        self,
        explain::{Explanation, Known, Question},
        rule::{Network, Origin, Protocol, Rule, RuleError, RuleId, Rules},
    },
};

impl Reconciler {
    pub(super) async fn command(&mut self, command: Command) {
        // The client may have gone; the change stands all the same.
        match command {
            Command::Status(answer) => drop(answer.send(self.status().await)),
            Command::Reload(answer) => drop(answer.send(self.reload().await)),
            Command::Allow(allow, uid, answer) => drop(answer.send(self.allow(allow, uid).await)),
            Command::Deny(deny, uid, answer) => drop(answer.send(self.deny(deny, uid).await)),
            Command::Explain(question, answer) => drop(answer.send(self.explain(&question).await)),
        }
    }

    async fn allow(&mut self, allow: Allow, uid: Option<u32>) -> Result<Vec<RuleStatus>, ApiError> {
        let ids: HashSet<RuleId> = allow.rules.iter().map(Rule::id).collect();
        let added = allow.rules.into_iter().map(with_process).collect::<Result<Vec<_>, _>>()?;
        let rules = self.rules.allow(added, Origin::Cli).map_err(|error| refusal(&error))?;
        self.ask_docker(&rules, ids.iter().map(|id| &id.network)).await;
        self.executor.retry_firewall();
        self.change(rules, uid).await?;
        Ok(self.last.rules().into_iter().filter(|rule| ids.contains(&rule.id())).collect())
    }

    async fn deny(&mut self, deny: Deny, uid: Option<u32>) -> Result<Vec<RuleStatus>, ApiError> {
        let ids = |ports: &[u16], protocol| -> Vec<RuleId> {
            ports.iter().map(|port| RuleId { network: deny.network.clone(), port: *port, protocol }).collect()
        };
        let ids: BTreeSet<RuleId> = [ids(&deny.ports, Protocol::Tcp), ids(&deny.udp_ports, Protocol::Udp)]
            .concat()
            .into_iter()
            .collect();
        let rules = self.rules.deny(ids.iter().cloned()).map_err(|error| match error {
            RuleError::NoSuchRule { id } if self.labels.ids().contains(&id) => {
                refusal(&RuleError::FromLabel { id })
            }
            error => refusal(&error),
        })?;
        let mut denied: Vec<_> =
            self.last.rules().into_iter().filter(|rule| ids.contains(&rule.id())).collect();
        self.change(rules, uid).await?;
        // A rule that a label asks for, too, stays in force.
        let labels = self.labels.ids();
        let goes_on = |rule: &RuleStatus| ids.contains(&rule.id()) && labels.contains(&rule.id());
        for rule in self.last.rules().into_iter().filter(goes_on) {
            denied.iter_mut().filter(|old| old.id() == rule.id()).for_each(|old| *old = rule.clone());
        }
        match self.last.failures.others.first() {
            // Something that should be gone may not be.
            Some(failure) => Err(ApiError { code: ErrorCode::Failed, message: failure.clone() }),
            None => Ok(denied),
        }
    }

    /// Puts rules in force. Saves them first: a rule in force but not on disk would be lost at a restart,
    /// unseen.
    async fn change(&mut self, rules: Rules, uid: Option<u32>) -> Result<(), ApiError> {
        if rules != self.rules {
            self.memory
                .store()
                .save_rules(self.configuration.allowed(&rules))
                .map_err(|error| failed(&error))?;
            self.journal.publish(report::changed_by(&self.rules, &rules, uid));
            self.rules = rules;
        }
        self.pass().await.map_err(|error| failed(&error))
    }

    /// Reads the configuration again. An invalid file is rejected, and changes nothing.
    async fn reload(&mut self) -> Result<Reloaded, ApiError> {
        let change = self.configuration.read_again(&self.rules, self.memory.store()).inspect_err(|error| {
            tracing::error!(%error, "configuration not reloaded; the previous one stays in force");
        });
        let change = match change {
            Ok(change) => change,
            Err(error) => {
                self.tell();
                return Err(error);
            }
        };
        let ids: HashSet<RuleId> = change.added.iter().chain(&change.changed).cloned().collect();
        self.ask_docker(&change.rules, ids.iter().map(|id| &id.network)).await;
        let find = |rules: Vec<RuleStatus>, ids: &[RuleId]| -> Vec<RuleStatus> {
            let ids: HashSet<_> = ids.iter().collect();
            rules.into_iter().filter(|rule| ids.contains(&rule.id())).collect()
        };
        let removed = find(self.last.rules(), &change.removed);
        let (added, changed, settings) =
            (change.added.clone(), change.changed.clone(), change.settings.clone());
        tracing::info!(
            added = added.len(),
            changed = changed.len(),
            removed = removed.len(),
            "configuration reloaded"
        );
        for setting in &settings {
            tracing::info!(
                setting = setting.name,
                value = setting.now,
                before = setting.before,
                "setting changed"
            );
        }
        self.rules = self.configuration.adopt(change);
        self.follow_labels().await;
        let looked = self.pass().await;
        self.tell();
        looked.map_err(|error| failed(&error))?;
        match self.last.failures.others.first() {
            // Something that should be gone may not be.
            Some(failure) if !removed.is_empty() || !changed.is_empty() => {
                Err(ApiError { code: ErrorCode::Failed, message: failure.clone() })
            }
            _ => Ok(Reloaded {
                added: find(self.last.rules(), &added),
                changed: find(self.last.rules(), &changed),
                removed,
                settings,
            }),
        }
    }

    /// Tells the Docker watcher whether to follow labels. If they were off before, waits until it has listed
    /// them.
    async fn follow_labels(&mut self) {
        let Some(docker) = &self.docker else { return };
        let enabled = self.configuration.config().labels.enabled;
        docker.follow_labels(enabled);
        if enabled && !self.labels.status().enabled {
            docker.refresh(DOCKER_REFRESH).await;
        }
    }

    /// Observes and explains, and changes nothing: the answer is about what is in force, whoever put it
    /// there.
    async fn explain(&mut self, question: &Question) -> Result<Explanation, ApiError> {
        if question.port == 0 {
            let message = "port 0; ports are 1 to 65535".to_owned();
            return Err(ApiError { code: ErrorCode::Usage, message });
        }
        let asked = explain::with_network(self.rules(), &question.network);
        self.ask_docker(&asked, std::iter::once(&question.network)).await;
        let scene = self.look(Some(&asked)).await.map_err(|error| failed(&error))?;
        let Scene { inventory, mut desired } = scene;
        let features = self.executor.features().clone();
        let openings = planning::explain::openings(question, &inventory, &features);
        desired.openings.extend(openings.clone());
        let actual = self.executor.inspect(&desired, &openings).await.map_err(|error| failed(&error))?;
        let known = Known {
            desired: &desired,
            inventory: &inventory,
            features: &features,
            actual: &actual,
            relay_failures: &self.last.failures.relays,
            entry_failures: &self.last.failures.entries,
            holders: &BTreeMap::new(),
            inside: &explain::inside(&inventory, &question.network, self.observer.host()),
        };
        let holders = explain::holders(question, &known, &mut self.observer.users).await;
        Ok(planning::explain::explain(question, &Known { holders: &holders, ..known }))
    }

    async fn status(&mut self) -> Result<Status, ApiError> {
        self.pass().await.map_err(|error| failed(&error))?;
        let steering = self.executor.features().steer.as_ref();
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: KernelStatus {
                path: if steering.is_ok() { KernelDatapath::Steer } else { KernelDatapath::None },
                why: steering.err().cloned(),
                interface_check: steering.is_ok_and(|s| s.interface_check),
                registers_listeners: steering.is_ok_and(|s| s.kernel_registers),
                counters: self.counters().map_err(|error| failed(&error))?,
            },
            docker: self.docker_status(),
            firewall: self.last.firewall(),
            docker_networks: self
                .inventory
                .iter()
                .flat_map(|seen| &seen.docker_networks)
                .map(Into::into)
                .collect(),
            rules: self.last.rules(),
            labels: self.labels.status(),
            refused_reload: self.configuration.refused().cloned(),
        })
    }

    fn counters(&self) -> anyhow::Result<Option<Counters>> {
        if self.executor.counter(Counter::Steered)?.is_none() {
            return Ok(None);
        }
        let count = |counter| Ok::<_, anyhow::Error>(self.executor.counter(counter)?.unwrap_or_default());
        Ok(Some(Counters {
            steered: count(Counter::Steered)?,
            foreign_source: count(Counter::ForeignSource)?,
            no_listener: count(Counter::NoListener)?,
            assign_failed: count(Counter::AssignFailed)?,
            registered: count(Counter::Registered)?,
            register_refused: count(Counter::RegisterRefused)?,
            not_listed: count(Counter::NotListed)?,
            denied: count(Counter::Denied)?,
            looks_local: count(Counter::LooksLocal)?,
            relayed: count(Counter::Relayed)?,
        }))
    }
}

/// Binds a rule for a process to the one that has the pid now, not to the next one that gets it.
fn with_process(mut rule: Rule) -> Result<Rule, ApiError> {
    rule.process = match rule.network {
        Network::Process(pid) => {
            let missing = |_| format!("there is no process {pid}; allow a process while it runs");
            let start = process_start(pid).map_err(missing);
            Some(start.map_err(|message| ApiError { code: ErrorCode::Failed, message })?)
        }
        _ => None,
    };
    Ok(rule)
}

fn refusal(error: &RuleError) -> ApiError {
    let code = match error {
        RuleError::Conflict { .. }
        | RuleError::ConflictWithin { .. }
        | RuleError::ReadOnly { .. }
        | RuleError::FromLabel { .. } => ErrorCode::Conflict,
        RuleError::NoSuchRule { .. } => ErrorCode::NoSuchRule,
        RuleError::TooMany { .. }
        | RuleError::NeedsLoopback { .. }
        | RuleError::NeedsRelay { .. }
        | RuleError::Contradiction { .. }
        | RuleError::Invalid { .. }
        | RuleError::ProcessUnknown { .. } => ErrorCode::Usage,
    };
    ApiError { code, message: error.for_cli().to_string() }
}

fn failed(error: &anyhow::Error) -> ApiError {
    ApiError { code: ErrorCode::Failed, message: format!("{error:#}") }
}

//! Executor: carries out steps. It makes no meaningful choices: the plan has decided what a step means. A
//! step that fails does not stop the others; its failure is reported.

mod arrivals;
mod failures;
mod flows;
mod relays;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use lbridge_common::wire::Counter;
use tokio::sync::mpsc;

pub(super) use self::failures::Failures;
use self::{
    arrivals::Arrivals,
    failures::{Mptcp, unmet},
    flows::GoneFlows,
};
use super::{
    guests::Guests,
    handover::{self, Inherited},
    sources::SourceGate,
};
use crate::{
    firewall::{self, Firewall, conntrack},
    host::socket_fd::{self, SocketFdTaker},
    kernel::{loader::Kernel, maps::RelayNames},
    planning::{
        actual::Actual,
        desired::{Desired, RelayKey},
        firewall::{FirewallState, Opening, ProbeRoute},
        hooks::{HookSet, PerHookSet},
        inventory::{KernelFeatures, NamespaceId},
        kernel_state::KernelState,
        plan::{self, Step},
    },
    relay::{
        self,
        set::{Counts, RelaySet},
    },
};

/// Error of a kernel step if no kernel half is loaded.
const NO_KERNEL: &str = "no kernel programs are loaded";

/// The state that steps change: the kernel's maps, the relays and the firewall.
#[derive(Debug)]
pub(super) struct Executor {
    /// The kernel half; `None` if none is loaded.
    kernel: Option<Kernel>,
    /// Every relay of this process.
    relays: RelaySet,
    /// The host's firewall and lbridge's accept rules in it.
    firewall: Firewall,
    /// The features of the kernel half. A set of hooks that cannot be attached is no longer one of them.
    features: KernelFeatures,
    /// Id of the host's network namespace.
    host: NamespaceId,
    /// Handle to the owner of `REDIRECT_NETNS`; `None` if localhost cannot lead to the host.
    guests: Option<Guests>,
    /// The source gate, which owns `SOURCES`; there is one wherever there is a kernel half.
    sources: Option<SourceGate>,
    /// Listening sockets of the previous daemon that no relay has taken.
    inherited: Inherited,
    /// Flows of accept rules that are gone.
    gone_flows: GoneFlows,
    /// Processes that hold sockets in the way of a relay, by inode; `None` if the process is unknown.
    holders: HashMap<u64, Option<String>>,
    /// True if the name hooks were needed since the start. They stay until the next start: services may hold
    /// sockets whose peers they name.
    name_hooks_used: bool,
}

impl Executor {
    /// Takes ownership of the kernel half. `wake` gets a unit when a relay or the firewall needs a pass.
    ///
    /// # Errors
    ///
    /// If the relays' threads cannot be started.
    pub(super) fn new(
        kernel: Option<Kernel>,
        features: KernelFeatures,
        guests: Option<Guests>,
        sources: Option<SourceGate>,
        host: NamespaceId,
        wake: mpsc::Sender<()>,
    ) -> anyhow::Result<Self> {
        let names = kernel.as_ref().filter(|_| features.hooks[HookSet::Names].is_ok());
        let names = names.map(|kernel| Arc::new(kernel.maps.peers.clone()) as Arc<dyn relay::PeerNames>);
        Ok(Self {
            kernel,
            relays: RelaySet::new(names, wake.clone())?,
            firewall: Firewall::follow(wake),
            features,
            host,
            guests,
            sources,
            inherited: Inherited::take(),
            gone_flows: GoneFlows::default(),
            holders: HashMap::new(),
            name_hooks_used: false,
        })
    }

    /// Returns the features of the kernel half.
    pub(super) fn features(&self) -> &KernelFeatures {
        &self.features
    }

    /// Brings the namespaces whose localhost leads to the host up to the desired state, and adds their
    /// numbers and the state of the host's firewall to `in_force`. This may take as long as the firewall's
    /// tools do.
    pub(super) async fn look(&mut self, desired: &Desired, in_force: Actual) -> Actual {
        if let Some(guests) = &mut self.guests {
            guests.want(desired.kernel.redirects.keys().map(|key| key.ifindex).collect()).await;
        }
        self.complete(desired, in_force).await
    }

    /// Reads back the actual state, probes `openings`, and changes nothing.
    pub(super) async fn inspect(
        &mut self,
        desired: &Desired,
        openings: &BTreeMap<Opening, ProbeRoute>,
    ) -> anyhow::Result<Actual> {
        self.firewall.look(&desired.openings).await;
        self.probe(openings).await;
        let in_force = self.in_force()?;
        Ok(self.complete(desired, in_force).await)
    }

    /// Adds the state of the firewall, conntrack's flows and the numbers of guests to what is in force.
    async fn complete(&mut self, desired: &Desired, in_force: Actual) -> Actual {
        let firewall_state = self.firewall.look(&desired.openings).await.clone();
        let gone: BTreeSet<_> = in_force.accepted.difference(&firewall_state.accepted()).copied().collect();
        let flows = self.gone_flows.look(&gone);
        Actual { firewall_state, flows, guests: self.guests(), ..in_force }
    }

    /// Has accept rules that could not be put tried again.
    pub(super) fn retry_firewall(&mut self) {
        self.firewall.try_again();
    }

    /// Returns the number of connections and bytes of each relay that the desired state wants.
    pub(super) fn relayed(&self, desired: &Desired) -> BTreeMap<RelayKey, Counts> {
        desired.relays.keys().map(|key| (key.clone(), self.relays.counts(key))).collect()
    }

    /// Returns how often the kernel programs have come to an outcome; `None` without a kernel half.
    pub(super) fn counter(&self, counter: Counter) -> anyhow::Result<Option<u64>> {
        self.kernel.as_ref().map(|kernel| kernel.maps.counter(counter)).transpose()
    }

    /// Drops the steps of the kernel if there is no kernel half for them.
    pub(super) fn without_kernel_steps(&self, mut steps: Vec<Step>) -> Vec<Step> {
        if self.kernel.is_none() {
            steps.retain(|step| !step.is_of_kernel());
        }
        steps
    }

    /// Stops using the hooks that could not be attached: another attempt would fail again.
    pub(super) fn give_up_hooks(&mut self, failures: &mut Failures) {
        for set in HookSet::ALL {
            if let Some(why) = failures.hooks[set].take() {
                self.features.hooks[set] = Err(why);
            }
        }
    }

    /// Restores pins that somebody removed, and ends programs of lbridge's that no pin names.
    pub(super) fn keep_pinned(&mut self) {
        if let Some(kernel) = &mut self.kernel {
            kernel.keep_pinned();
            kernel.end_strays();
        }
    }

    /// Closes inherited sockets that no relay took, and removes what other versions left. A socket that the
    /// rules no longer want must not stay open with nobody to accept.
    pub(super) fn retire_predecessors(&mut self) -> anyhow::Result<()> {
        self.inherited.close();
        self.kernel.as_mut().map_or(Ok(()), Kernel::retire_others)
    }

    /// Stops accepting connections, and waits at most `limit` for those that are open. A service manager that
    /// keeps sockets gets the listening ones for the next daemon, and new connections wait for that. Returns
    /// the number of connections that were cut off.
    pub(super) async fn drain(&mut self, limit: Duration) -> usize {
        handover::keep(self.relays.sockets());
        self.relays.drain(limit).await
    }

    /// Withdraws what the desired state does not grant, and waits for nobody. Returns what is in force then,
    /// without the state of the firewall.
    pub(super) async fn revoke(&mut self, desired: &Desired) -> anyhow::Result<Actual> {
        if let Some(sources) = &self.sources {
            sources.want(&desired.grants);
        }
        let found = self.in_force()?;
        let steps = plan::revocations(desired, &found);
        if steps.is_empty() {
            return Ok(found);
        }
        // What fails is still in force, so it is planned, tried again and reported with everything else.
        self.execute(&steps).await;
        self.in_force()
    }

    /// Returns what is in force in the kernel and the relay set.
    fn in_force(&mut self) -> anyhow::Result<Actual> {
        let relays = self.relays.specs();
        let lingering = self.relays.lingering();
        let Some(kernel) = &self.kernel else {
            return Ok(Actual { relays, lingering, ..Actual::default() });
        };
        let (entries, steered) = kernel.maps.entries()?;
        Ok(Actual {
            kernel: KernelState {
                targets: kernel.maps.targets()?,
                entries,
                sources: kernel.maps.sources()?,
                overrides: kernel.maps.overrides()?,
                reply_sources: kernel.maps.reply_sources()?,
                redirects: kernel.maps.redirects()?,
                hooks: PerHookSet::from_fn(|set| kernel.hooks_attached(set)),
            },
            steered,
            accepted: kernel.maps.accepted()?,
            flows: BTreeMap::new(),
            registered: kernel.maps.registered()?,
            relay_sockets: kernel.maps.relays()?,
            relays,
            lingering,
            name_hooks_in_use: self.name_hooks_used,
            guests: BTreeMap::new(),
            detached: !kernel.attached(),
            firewall_state: FirewallState::default(),
        })
    }

    /// Counts the network namespaces whose localhost leads to the host, by the interface index of their
    /// bridge.
    fn guests(&self) -> BTreeMap<u32, usize> {
        self.guests.as_ref().map(Guests::counts).unwrap_or_default()
    }

    /// Carries out `steps` in their order, and returns the failures.
    pub(super) async fn execute(&mut self, steps: &[Step]) -> Failures {
        let mut failures = Failures::default();
        let wanted: HashSet<u64> = steps
            .iter()
            .filter_map(|s| if let Step::Register { inode, .. } = s { Some(*inode) } else { None })
            .collect();
        let mut taker = SocketFdTaker::default();
        for step in steps {
            tracing::debug!(%step, "carrying out a step");
            if let Err(error) = self.step(step, &mut taker, &wanted, &failures).await {
                failures.add(step, &error);
            }
        }
        failures
    }

    async fn step(
        &mut self,
        step: &Step,
        taker: &mut SocketFdTaker,
        wanted: &HashSet<u64>,
        failures: &Failures,
    ) -> anyhow::Result<()> {
        // The next round decides again, with what has failed in this one.
        if let Some(missing) = step.prerequisites().iter().find(|it| failures.rule_out(it)) {
            bail!("{}", unmet(missing));
        }
        match step {
            Step::ForgetFlows(keys) => {
                let forgotten = conntrack::forget(keys);
                return forgotten.with_context(|| format!("failed to {step}"));
            }
            Step::OpenRelay(key, spec) => return self.open_relay(key, spec),
            Step::CloseRelay { key, handed_over } => {
                self.relays.close(key, *handed_over).await;
                return Ok(());
            }
            Step::Accept { chain, opening } => return self.firewall.accept(chain, opening).await,
            Step::RemoveAccept { chain, opening } => {
                return self.firewall.remove_accept(chain, opening).await;
            }
            Step::Probe(openings) => {
                self.probe(openings).await;
                return Ok(());
            }
            _ => {}
        }
        let kernel = self.kernel.as_mut().context(NO_KERNEL)?;
        match step {
            Step::Attach => kernel.attach(),
            Step::AddTarget(port) => kernel.maps.add_target(port),
            Step::AttachHooks(set) => {
                self.name_hooks_used |= *set == HookSet::Names;
                kernel.attach_hooks(*set)
            }
            Step::PutOverride(key, view) => kernel.maps.put_override(*key, view),
            Step::Register { key, inode } => {
                let socket = taker.take(*inode, wanted)?;
                if socket_fd::is_mptcp(&socket) {
                    return Err(Mptcp.into());
                }
                kernel.maps.register(*key, &socket)
            }
            Step::AddAccepted(key) => kernel.maps.add_accepted(*key),
            Step::RemoveAccepted(key) => kernel.maps.remove_accepted(*key),
            Step::AddSource(key) => self.sources.as_ref().context(NO_KERNEL)?.add(key),
            Step::RemoveSource(key) => self.sources.as_ref().context(NO_KERNEL)?.remove(key),
            Step::PutEntry(key, value) => kernel.maps.put_entry(key, *value),
            Step::PutRedirect(key, dial) => kernel.maps.put_redirect(key, dial),
            Step::RemoveRedirect(key) => kernel.maps.remove_redirect(key),
            Step::RemoveEntry(key) => kernel.maps.remove_entry(key),
            Step::RemoveOverride(key) => kernel.maps.remove_override(*key),
            Step::DetachHooks(set) => kernel.detach_hooks(*set),
            Step::PutReplySource(key, reply) => kernel.maps.put_reply_source(*key, reply),
            Step::RemoveReplySource(key) => kernel.maps.remove_reply_source(*key),
            Step::Unregister(key) => kernel.maps.unregister(key),
            Step::RemoveTarget(port) => kernel.maps.remove_target(port),
            Step::OpenRelay(..)
            | Step::CloseRelay { .. }
            | Step::Accept { .. }
            | Step::RemoveAccept { .. }
            | Step::ForgetFlows(_)
            | Step::Probe(_) => Ok(()),
        }
        .with_context(|| format!("failed to {step}"))
    }

    /// Probes whether the firewall lets these openings through.
    async fn probe(&mut self, openings: &BTreeMap<Opening, ProbeRoute>) {
        let checked = self.features.steer.as_ref().is_ok_and(|steering| steering.interface_check);
        let arrivals =
            self.kernel.as_ref().map(|kernel| Arrivals { probes: kernel.maps.probes.clone(), checked });
        let arrivals = arrivals.as_ref().map(|arrivals| arrivals as &dyn firewall::Arrivals);
        self.firewall.probe(openings, arrivals).await;
    }
}

impl relay::PeerNames for RelayNames {
    fn announce(&self, cookie: u64, container: SocketAddr) -> anyhow::Result<()> {
        self.put_connect(cookie, container)
    }

    fn confirm(
        &self,
        cookie: u64,
        relay: SocketAddr,
        service: SocketAddr,
        container: SocketAddr,
    ) -> anyhow::Result<()> {
        self.remove_connect(cookie)?;
        ensure!(
            self.is_named(cookie, relay, service, container),
            "the kernel did not give the service {container} as its peer"
        );
        Ok(())
    }

    fn withdraw(&self, cookie: u64) {
        if let Err(error) = self.remove_connect(cookie) {
            tracing::warn!(
                cookie,
                error = format!("{error:#}"),
                "could not withdraw the name of a relayed connection"
            );
        }
    }
}

//! Executor: carries out steps. It makes no meaningful choices: the plan has decided what a step means. A
//! step that fails does not stop the others; its failure is reported.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    future::Pending,
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use lbridge_common::wire::{AcceptedKey, ProberKey, RuleKey, SourceKey};

use super::{
    guests::Guests,
    handover::Inherited,
    sources::{Contradicted, SourceGate},
};
use crate::{
    firewall::{self, Firewall, conntrack},
    host::{
        holders, listeners,
        netns::{LOOPBACK, Namespace},
        socket_fd::{self, Taker},
    },
    kernel::{
        loader::Kernel,
        maps::{Probes, RelayNames},
    },
    planning::{
        firewall::{Filtering, Link, Opening},
        hooks::{HookSet, PerHookSet},
        inventory::{Absence, ListenerKind, NamespaceId},
        plan::{self, Step},
        policy::{Place, Policy, RelayKey, RelaySpec},
        reality::{Flows, Reality},
    },
    relay::{self, set::RelaySet, socket::Listening},
};

/// Error of a kernel step if no kernel half is loaded.
const NO_KERNEL: &str = "there is no kernel half";
/// Least time between two searches for flows if all keys have open connections.
const FLOWS_PAUSE: Duration = Duration::from_secs(5);
/// Limit on remembered holders of sockets; above it all are forgotten.
const MAX_HOLDERS: usize = 1024;

/// The state that steps change: the kernel's maps, the relays and the firewall.
#[derive(Debug)]
pub(super) struct Executor {
    /// The kernel half; `None` if none is loaded.
    pub(super) kernel: Option<Kernel>,
    /// Every relay of this process.
    pub(super) relays: RelaySet,
    /// The host's firewall and lbridge's accept rules in it.
    pub(super) firewall: Firewall,
    /// True if the kernel program checks the ingress interface.
    pub(super) interface_check: bool,
    /// Id of the host's network namespace.
    pub(super) host: NamespaceId,
    /// Handle to the owner of `GUESTS`; `None` if localhost cannot lead to the host.
    pub(super) guests: Option<Guests>,
    /// The source gate, which owns `SOURCES`; there is one wherever there is a kernel half.
    pub(super) sources: Option<SourceGate>,
    /// Listening sockets of the previous daemon that no relay has taken.
    pub(super) inherited: Inherited,
    /// Last answer of conntrack about accept rules that are gone; `None` if there are no such rules.
    pub(super) seen_flows: Option<SeenFlows>,
    /// Processes that hold sockets in the way of a relay, by inode; `None` if the process is unknown.
    pub(super) holders: HashMap<u64, Option<String>>,
    /// True if the name hooks were needed since the start. They stay until the next start: services may hold
    /// sockets whose peers they name.
    pub(super) name_hooks_used: bool,
}

/// Failures of one round of steps, each with its reason.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// Relays that could not be opened.
    pub(super) relays: BTreeMap<RelayKey, String>,
    /// Entries that could not be put, or whose sources could not be added.
    pub(super) entries: BTreeMap<RuleKey, String>,
    /// Keys of accept rules whose flows conntrack could not forget.
    pub(super) flows: BTreeMap<(AcceptedKey, u32), String>,
    /// Keys of accept rules that could not be added to `ACCEPTED`.
    pub(super) accepted: BTreeMap<(AcceptedKey, u32), String>,
    /// Listeners, by inode, that the kernel cannot be given.
    pub(super) refused: BTreeMap<u64, ListenerKind>,
    /// Ports whose listeners could not be registered.
    pub(super) listeners: BTreeMap<u16, String>,
    /// Sets of hooks that could not be attached; `None` for a set that did not fail.
    pub(super) hooks: PerHookSet<Option<String>>,
    /// Openings that no accept rule could be put for.
    pub(super) openings: BTreeMap<Opening, String>,
    /// Failures of all other steps.
    pub(super) others: Vec<String>,
    /// The steps that failed, and those of sources that the gate refused to add.
    pub(super) steps: Vec<Step>,
}

impl Failures {
    /// Lists the failures to log that are not in `before`. A relay's failure is news, but not a new reason
    /// for it: the process that holds its port may change its name every moment.
    pub(super) fn since(&self, before: &Self) -> Vec<String> {
        let relays = self.relays.iter().filter(|(key, _)| !before.relays.contains_key(key));
        let relays = relays.map(|(key, why)| format!("cannot relay {}: {why}", key.address));
        let known: Vec<_> = before.others().collect();
        relays.chain(self.others().filter(|text| !known.contains(text)).cloned()).collect()
    }

    fn others(&self) -> impl Iterator<Item = &String> {
        let specific = self.entries.values().chain(self.listeners.values()).chain(self.openings.values());
        specific
            .chain(self.accepted.values())
            .chain(self.flows.values().take(1))
            .chain(self.hooks.iter().filter_map(|(_, why)| why.as_ref()))
            .chain(&self.others)
    }
}

/// Last answer of conntrack about the flows of keys, and its time.
#[derive(Debug)]
pub(super) struct SeenFlows {
    at: Instant,
    flows: BTreeMap<(AcceptedKey, u32), Flows>,
    error: Option<String>,
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
            "the kernel has not named {container} to the service"
        );
        Ok(())
    }

    fn withdraw(&self, cookie: u64) {
        if let Err(error) = self.remove_connect(cookie) {
            tracing::warn!("{error:#}");
        }
    }
}

impl Executor {
    /// Reads back what is in force.
    pub(super) async fn reality(&mut self, policy: &Policy) -> anyhow::Result<Reality> {
        let in_force = self.in_force()?;
        Ok(self.with_firewall(policy, in_force).await)
    }

    /// Adds the state of the host's firewall to `in_force`, which may take as long as the firewall's tools
    /// do.
    pub(super) async fn with_firewall(&mut self, policy: &Policy, in_force: Reality) -> Reality {
        let filtering = self.firewall.look(&policy.openings).await.clone();
        let gone: BTreeSet<_> = in_force.accepted.difference(&filtering.accepted()).copied().collect();
        Reality { filtering, flows: self.flows(&gone), ..in_force }
    }

    /// Returns the flows of what no accept rule lets in any more. While all keys have open connections,
    /// conntrack is not asked every time: its table may be long.
    fn flows(&mut self, gone: &BTreeSet<(AcceptedKey, u32)>) -> BTreeMap<(AcceptedKey, u32), Flows> {
        if gone.is_empty() {
            self.seen_flows = None;
            return BTreeMap::new();
        }
        if let Some(seen) = &self.seen_flows
            && seen.at.elapsed() < FLOWS_PAUSE
            && gone.iter().all(|key| seen.flows.get(key).is_some_and(|flows| flows.open > 0))
        {
            return seen.flows.clone();
        }
        let (flows, error) = match conntrack::flows(gone) {
            Ok(flows) => (flows, None),
            // For all that is known, they may be open.
            Err(error) => {
                let unknown = Flows { open: 1, forgettable: 0 };
                (gone.iter().map(|key| (*key, unknown)).collect(), Some(error.to_string()))
            }
        };
        if let Some(error) = &error
            && self.seen_flows.as_ref().is_none_or(|seen| seen.error.is_none())
        {
            tracing::warn!(
                "could not list conntrack's flows; what denied rules opened stays refused: {error}"
            );
        }
        self.seen_flows = Some(SeenFlows { at: Instant::now(), flows: flows.clone(), error });
        flows
    }

    /// Withdraws what the policy does not grant, and waits for nobody. Returns what is in force then, without
    /// the state of the firewall.
    pub(super) async fn revoke(&mut self, policy: &Policy) -> anyhow::Result<Reality> {
        if let Some(sources) = &self.sources {
            sources.want(&policy.grants);
        }
        let found = self.in_force()?;
        let steps = plan::revocations(policy, &found);
        if steps.is_empty() {
            return Ok(found);
        }
        // What fails is still in force, so it is planned, tried again and reported with everything else.
        self.execute(&steps).await;
        self.in_force()
    }

    /// Returns what is in force in the kernel and the relay set.
    fn in_force(&mut self) -> anyhow::Result<Reality> {
        let relays = self.relays.specs();
        let lingering = self.relays.lingering();
        let Some(kernel) = &self.kernel else {
            return Ok(Reality { relays, lingering, ..Reality::default() });
        };
        Ok(Reality {
            targets: kernel.maps.targets()?,
            entries: kernel.maps.entries()?,
            sources: kernel.maps.sources()?,
            accepted: kernel.maps.accepted()?,
            flows: BTreeMap::new(),
            dials: kernel.maps.dials()?,
            views: kernel.maps.views()?,
            registered: kernel.maps.registered()?,
            relay_sockets: kernel.maps.relays()?,
            relays,
            lingering,
            replies: kernel.maps.replies()?,
            hooks: PerHookSet::from_fn(|set| kernel.hooks_attached(set)),
            name_hooks_in_use: self.name_hooks_used,
            guests: self.guests(),
            detached: !kernel.attached(),
            filtering: Filtering::default(),
        })
    }

    /// Counts the network namespaces whose localhost leads to the host, by the interface index of their
    /// bridge.
    pub(super) fn guests(&self) -> BTreeMap<u32, usize> {
        self.guests.as_ref().map(Guests::counts).unwrap_or_default()
    }

    /// Carries out `steps` in their order, and returns the failures.
    pub(super) async fn execute(&mut self, steps: &[Step]) -> Failures {
        let mut failures = Failures::default();
        let wanted: HashSet<u64> = steps
            .iter()
            .filter_map(|s| if let Step::Register { inode, .. } = s { Some(*inode) } else { None })
            .collect();
        let mut taker = Taker::default();
        for step in steps {
            tracing::debug!(?step);
            if let Err(error) = self.step(step, &mut taker, &wanted, &failures).await {
                let text = format!("{error:#}");
                match step {
                    // No failure: the engine's view has changed since the plan was made, and the next round
                    // makes a new plan.
                    Step::AddSource(_) if error.is::<Contradicted>() => tracing::debug!("{text}"),
                    Step::OpenRelay(key, _) => drop(failures.relays.insert(key.clone(), text)),
                    Step::PutEntry(key, _) | Step::AddSource(SourceKey { rule: key, .. }) => {
                        drop(failures.entries.insert(*key, text));
                    }
                    Step::ForgetFlows(keys) => {
                        failures.flows.extend(keys.iter().map(|key| (*key, text.clone())));
                    }
                    Step::AddAccepted(key) => drop(failures.accepted.insert(*key, text)),
                    Step::Register { inode, key } => match unsuitable(&error) {
                        Some(kind) => drop(failures.refused.insert(*inode, kind)),
                        None => drop(failures.listeners.insert(key.port, text)),
                    },
                    Step::Accept { opening, .. } => drop(failures.openings.insert(opening.clone(), text)),
                    Step::AttachHooks(set) => failures.hooks[*set] = Some(text),
                    _ => failures.others.push(text),
                }
                failures.steps.push(step.clone());
            }
        }
        failures
    }

    async fn step(
        &mut self,
        step: &Step,
        taker: &mut Taker,
        wanted: &HashSet<u64>,
        failures: &Failures,
    ) -> anyhow::Result<()> {
        // The next round decides again, without these hooks; until then nothing that relies on them is
        // opened.
        if step.relies_on().iter().any(|set| failures.hooks[*set].is_some()) {
            bail!("hooks that it relies on could not be attached");
        }
        match step {
            // Packets that it lets in would reach any service that listens on every address.
            Step::Accept { opening, .. } if failures.accepted.contains_key(&opening.accepted()) => {
                bail!("the kernel could not be told to refuse the others that it lets in")
            }
            Step::RemoveAccepted(key) if failures.flows.contains_key(key) => {
                bail!("its flows are not forgotten yet, so it stays refused")
            }
            Step::ForgetFlows(keys) => {
                let forgotten = conntrack::forget(keys);
                return forgotten.context("conntrack could not forget flows that accept rules let in");
            }
            Step::OpenRelay(key, spec) => return self.open_relay(key, spec),
            Step::CloseRelay { key, handed_over } => {
                self.relays.close(key, *handed_over).await;
                return Ok(());
            }
            Step::Accept { chain, opening } => return self.firewall.accept(chain, opening).await,
            Step::Unaccept { chain, opening } => return self.firewall.unaccept(chain, opening).await,
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
            Step::PutView(key, view) => kernel.maps.put_view(*key, view),
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
            Step::PutEntry(key, value) => kernel.maps.put_entry(key, value),
            Step::PutDial(key, dial) => kernel.maps.put_dial(key, dial),
            Step::RemoveDial(key) => kernel.maps.remove_dial(key),
            Step::RemoveEntry(key) => kernel.maps.remove_entry(key),
            Step::RemoveView(key) => kernel.maps.remove_view(*key),
            Step::DetachHooks(set) => kernel.detach_hooks(*set),
            Step::PutReply(key, reply) => kernel.maps.put_reply(*key, reply),
            Step::RemoveReply(key) => kernel.maps.remove_reply(*key),
            Step::Unregister(key) => kernel.maps.unregister(key),
            Step::RemoveTarget(port) => kernel.maps.remove_target(port),
            Step::OpenRelay(..)
            | Step::CloseRelay { .. }
            | Step::Accept { .. }
            | Step::Unaccept { .. }
            | Step::ForgetFlows(_)
            | Step::Probe(_) => Ok(()),
        }
        .with_context(|| format!("{step:?}"))
    }
}

impl Executor {
    /// Probes whether the firewall lets these openings through.
    pub(super) async fn probe(&mut self, openings: &BTreeMap<Opening, Link>) {
        let checked = self.interface_check;
        let arrivals =
            self.kernel.as_ref().map(|kernel| Arrivals { probes: kernel.maps.probes.clone(), checked });
        let arrivals = arrivals.as_ref().map(|arrivals| arrivals as &dyn firewall::Arrivals);
        self.firewall.probe(openings, arrivals).await;
    }

    fn open_relay(&mut self, key: &RelayKey, spec: &RelaySpec) -> anyhow::Result<()> {
        if !self.relays.change(key, spec) {
            self.begin_relay(key, spec)?;
        }
        let entry = key.entry().filter(|_| spec.by_entry);
        let Some((entry, kernel)) = entry.zip(self.kernel.as_mut()) else { return Ok(()) };
        let socket = self.relays.socket(key).context("it does not listen")?;
        kernel.maps.put_relay(entry, &socket)
    }

    fn begin_relay(&mut self, key: &RelayKey, spec: &RelaySpec) -> anyhow::Result<()> {
        let inherited = self.inherited.find(key, spec.by_entry, self.host);
        match &key.place {
            Place::Bridge { ifindex, .. } => {
                let index = NonZeroU32::new(*ifindex).context("an interface without an index")?;
                let socket = match inherited {
                    Some(socket) => socket,
                    None if spec.by_entry => relay::socket::listen_by_entry(key.address, index)?,
                    None => self.listen(key.address, index)?,
                };
                self.relays.open(key, spec.clone(), socket, None::<Pending<()>>)
            }
            Place::Namespace(wanted) => {
                let namespace = match Namespace::open(&wanted.entrance, self.host) {
                    Ok(namespace) if namespace.key == *wanted => namespace,
                    Ok(_) => bail!("the namespace was replaced meanwhile"),
                    Err(Absence::NotThere(why) | Absence::Unsuitable(why)) => bail!(why),
                };
                let socket = match inherited {
                    Some(socket) => socket,
                    None => namespace.within(|| self.listen(key.address, LOOPBACK))??,
                };
                self.relays.open(key, spec.clone(), socket, Some(namespace.gone()))
            }
        }
    }

    /// Listens in this thread's network namespace. If the port is in use, the error names the process that
    /// holds it.
    fn listen(&mut self, address: SocketAddr, interface: NonZeroU32) -> anyhow::Result<Listening> {
        relay::socket::listen(address, interface).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => match self.who_listens(address) {
                Some(who) => anyhow!("in use by {who}"),
                None => anyhow!("in use: another socket has {address}"),
            },
            _ => anyhow::Error::new(error).context(format!("cannot listen on {address}")),
        })
    }

    /// Finds the process that listens on an address. A port that is taken is tried again at every pass; the
    /// holder of a socket is looked up once.
    fn who_listens(&mut self, address: SocketAddr) -> Option<String> {
        let inode = listeners::in_the_way(address)?;
        if self.holders.len() > MAX_HOLDERS {
            self.holders.clear();
        }
        self.holders.entry(inode).or_insert_with(|| holders::holder(inode)).clone()
    }
}

/// The daemon's own probes, as the kernel program sees them.
struct Arrivals {
    probes: Probes,
    /// True if entries name the ingress interface.
    checked: bool,
}

impl Arrivals {
    fn prober(&self, source: IpAddr, ifindex: u32) -> ProberKey {
        ProberKey { source: source.into(), ifindex: if self.checked { ifindex } else { 0 } }
    }
}

impl firewall::Arrivals for Arrivals {
    fn begin(&self, source: IpAddr, ifindex: u32) -> anyhow::Result<()> {
        self.probes.add_source(&self.prober(source, ifindex))
    }

    fn end(&self, source: IpAddr, ifindex: u32) {
        if let Err(error) = self.probes.remove_source(&self.prober(source, ifindex)) {
            tracing::warn!("{error:#}");
        }
    }

    fn count(&self, opening: &Opening, link: Link) -> anyhow::Result<()> {
        self.probes.count(&opening.entry(link.ifindex))
    }

    fn any(&self, opening: &Opening, link: Link) -> bool {
        self.probes.counted(&opening.entry(link.ifindex)).is_ok_and(|count| count > 0)
    }

    fn forget(&self, opening: &Opening, link: Link) {
        if let Err(error) = self.probes.forget(&opening.entry(link.ifindex)) {
            tracing::warn!("{error:#}");
        }
    }
}

/// Error of registering an MPTCP listener: a SOCKHASH takes plain TCP and UDP sockets only.
#[derive(Debug, thiserror::Error)]
#[error("the listener is MPTCP")]
struct Mptcp;

/// Returns why the kernel cannot be given the socket, if the failed registration shows it. The reason is
/// either the socket itself, and holds for as long as it lives, or a full map. If the socket is gone
/// meanwhile, it shows nothing.
fn unsuitable(error: &anyhow::Error) -> Option<ListenerKind> {
    if error.is::<Mptcp>() {
        return Some(ListenerKind::Mptcp);
    }
    let errno = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())?;
    if errno == libc::E2BIG {
        return Some(ListenerKind::NoRoom);
    }
    matches!(errno, libc::EOPNOTSUPP | libc::EINVAL | libc::EBUSY).then_some(ListenerKind::Refused(errno))
}

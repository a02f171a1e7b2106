//! Carries out steps. No meaningful choices: what a step means was decided by the plan. A step that fails does not keep
//! the others from being carried out; what failed is told.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    future::Pending,
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use lbridge_common::wire::{AcceptedKey, ProberKey, RuleKey, SourceKey};

use super::{
    guests::Guests,
    handover::Inherited,
    sources::{Contradicted, SourceGate},
};
use crate::{
    firewall::{self, Firewall, conntrack},
    host::{
        listeners::{self, Taker},
        netns::{LOOPBACK, Namespace},
    },
    kernel::{
        loader::Kernel,
        maps::{PeerNames, Probes},
    },
    planning::{
        firewall::{Filtering, Link, Opening},
        hooks::{HookSet, PerHookSet},
        inventory::{Absence, ListenerKind, NamespaceId},
        plan::{self, Step},
        policy::{Place, Policy, RelayKey, RelaySpec},
        reality::{Flows, Reality},
    },
    relay::{self, listener::Listening, set::RelaySet},
};

/// The error of a kernel step where no kernel half is loaded.
const NO_KERNEL: &str = "there is no kernel half";
/// Flows of open connections are not looked for more often.
const FLOWS_PAUSE: Duration = Duration::from_secs(5);
/// More than these are not remembered.
const MAX_HOLDERS: usize = 1024;

/// What is changed: the kernel's maps, the relays and the firewall.
#[derive(Debug)]
pub(super) struct Executor {
    /// The kernel half, where there is one.
    pub(super) kernel: Option<Kernel>,
    /// The relays.
    pub(super) relays: RelaySet,
    /// The host's firewall.
    pub(super) firewall: Firewall,
    /// The kernel program checks the ingress interface.
    pub(super) interface_check: bool,
    /// The host's network namespace.
    pub(super) host: NamespaceId,
    /// Whose localhost leads to the host.
    pub(super) guests: Option<Guests>,
    /// The map of who may use the entries that are not for all; there is one wherever there is a kernel half.
    pub(super) sources: Option<SourceGate>,
    /// Listening sockets of the daemon before this one.
    pub(super) inherited: Inherited,
    /// What conntrack told last of accept rules that are gone.
    pub(super) seen_flows: Option<SeenFlows>,
    /// Who holds sockets, by inode, that were in the way of a relay.
    pub(super) holders: HashMap<u64, Option<String>>,
    /// Whether the name hooks were needed since the start. They stay until the next: services may hold sockets whose
    /// peers they name.
    pub(super) name_hooks_used: bool,
}

/// What went wrong in one round of steps.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// Relays that could not be opened.
    pub(super) relays: BTreeMap<RelayKey, String>,
    /// Entries that could not be put.
    pub(super) entries: BTreeMap<RuleKey, String>,
    /// Why conntrack could not forget the flows of an accept rule, by its key.
    pub(super) flows: BTreeMap<(AcceptedKey, u32), String>,
    /// What accept rules let in that the kernel could not be told of.
    pub(super) accepted: BTreeMap<(AcceptedKey, u32), String>,
    /// Listeners, by inode, that the kernel cannot be given.
    pub(super) refused: BTreeMap<u64, ListenerKind>,
    /// Ports whose listeners could not be registered.
    pub(super) listeners: BTreeMap<u16, String>,
    /// Why a set of hooks could not be attached.
    pub(super) hooks: PerHookSet<Option<String>>,
    /// What could not be let through the firewall.
    pub(super) openings: BTreeMap<Opening, String>,
    /// Everything else.
    pub(super) others: Vec<String>,
    /// The steps behind all of it.
    pub(super) steps: Vec<Step>,
}

impl Failures {
    /// What to tell the administrator that `before` had not. Of a relay it is news that it fails, not why: who holds its port
    /// may change its name every moment.
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

/// What conntrack told of keys, and when.
#[derive(Debug)]
pub(super) struct SeenFlows {
    at: Instant,
    flows: BTreeMap<(AcceptedKey, u32), Flows>,
    error: Option<String>,
}

impl relay::PeerNames for PeerNames {
    fn announce(&self, cookie: u64, container: SocketAddr) -> anyhow::Result<()> {
        Self::announce(self, cookie, container)
    }

    fn confirm(
        &self,
        cookie: u64,
        relay: SocketAddr,
        service: SocketAddr,
        container: SocketAddr,
    ) -> anyhow::Result<()> {
        Self::confirm(self, cookie, relay, service, container)
    }

    fn withdraw(&self, cookie: u64) {
        Self::withdraw(self, cookie);
    }
}

impl Executor {
    /// What is in force, read back.
    pub(super) async fn reality(&mut self, policy: &Policy) -> anyhow::Result<Reality> {
        let in_force = self.in_force()?;
        Ok(self.with_firewall(policy, in_force).await)
    }

    /// With the state of the host's firewall, which may take as long as its tools do.
    pub(super) async fn with_firewall(&mut self, policy: &Policy, in_force: Reality) -> Reality {
        let filtering = self.firewall.look(&policy.openings).await.clone();
        let gone: BTreeSet<_> = in_force.accepted.difference(&filtering.accepted()).copied().collect();
        Reality { filtering, flows: self.flows(&gone), ..in_force }
    }

    /// The flows of what no accept rule lets in any more. Those of keys that have open connections alone are not looked for every
    /// time: conntrack's table may be long.
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
            // They may be open, for all that is known.
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

    /// Withdraws what the policy does not grant, and waits for nobody. What else is in force then; nothing of the firewall.
    pub(super) async fn revoke(&mut self, policy: &Policy) -> anyhow::Result<Reality> {
        if let Some(sources) = &self.sources {
            sources.want(&policy.grants);
        }
        let found = self.in_force()?;
        let steps = plan::revocations(policy, &found);
        if steps.is_empty() {
            return Ok(found);
        }
        // What fails is there still, and so is planned, tried again and told with everything else.
        self.execute(&steps).await;
        self.in_force()
    }

    /// What is in force in the kernel and the relay set.
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

    /// How many network namespaces are on each bridge whose localhost leads to the host.
    pub(super) fn guests(&self) -> BTreeMap<u32, usize> {
        self.guests.as_ref().map(Guests::counts).unwrap_or_default()
    }

    /// Carries out `steps` in their order.
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
                    // No failure: the engine has told something else since the plan was made, and the next round plans anew.
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
        // The next round decides anew, knowing that there are none; until then nothing that counts on them opens.
        if step.relies_on().iter().any(|set| failures.hooks[*set].is_some()) {
            bail!("hooks that it relies on could not be attached");
        }
        match step {
            // What it lets in would reach whoever listens on every address.
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
                if listeners::is_mptcp(&socket) {
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
    /// Tries whether the firewall lets these through.
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
                    None if spec.by_entry => relay::listener::listen_by_entry(key.address, index)?,
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

    /// Listens in this thread's network namespace, or tells who does.
    fn listen(&mut self, address: SocketAddr, interface: NonZeroU32) -> anyhow::Result<Listening> {
        relay::listener::listen(address, interface).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => match self.who_listens(address) {
                Some(who) => anyhow!("in use by {who}"),
                None => anyhow!("in use: another socket has {address}"),
            },
            _ => anyhow::Error::new(error).context(format!("cannot listen on {address}")),
        })
    }

    /// A port that is taken is tried again at every look; whose socket has it is looked for once.
    fn who_listens(&mut self, address: SocketAddr) -> Option<String> {
        let inode = listeners::in_the_way(address)?;
        if self.holders.len() > MAX_HOLDERS {
            self.holders.clear();
        }
        self.holders.entry(inode).or_insert_with(|| listeners::holder(inode)).clone()
    }
}

/// The kernel program's view of the daemon's own probes.
struct Arrivals {
    probes: Probes,
    /// Entries name the ingress interface.
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

/// A SOCKHASH takes plain TCP and UDP sockets only.
#[derive(Debug, thiserror::Error)]
#[error("the listener is MPTCP")]
struct Mptcp;

/// Why the kernel cannot be given the socket, if the failed registration tells: either of the socket itself, which stays true for
/// as long as it lives, or that the map is full. Of a socket that is gone meanwhile it tells nothing.
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

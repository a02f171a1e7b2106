//! Plan: the steps from reality to policy, in an order that leaves no gap and no hole.
//!
//! - a port is watched before its listeners are looked for, a listener is ready before the entry that names it;
//! - the name hooks are attached before the connections that need them can come, and detached after the last one;
//! - a relay listens before the kernel's entry goes, the entry is there before the relay stops;
//! - a UDP service's replies get their source before the entry that leads to it, and leave as they are after it;
//! - an entry goes before its listener, and before the firewall is closed;
//! - who may use an entry is entered before it, and forgotten after it; at once, if it stays for others;
//! - what only takes access away, and needs nothing new, comes first ([`revocations`]);
//! - what leads to a gateway is entered after what answers there, and goes before it; its hooks come before it, and go after it;
//! - the firewall is tried last, when everything that answers is there;
//! - before an accept rule is put, and for as long as it or a flow that it let in is there, the kernel refuses what no entry admits of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use lbridge_common::wire::{
    AcceptedKey, Address, Dial, DialKey, Endpoint, ListenerKey, LoopbackView, Reply, ReplyKey, RuleKey,
    RuleValue, SLOTS, SourceKey, TCP, TargetKey, UDP, ViewKey,
};

use super::{
    firewall::{self, Chain, Link, Opening},
    hooks::HookSet,
    policy::{Clients, GatewayOutcome, Place, Policy, RelayKey, RelaySpec, State},
    reality::Reality,
};

/// One change, to be carried out as it says: what it means was decided before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Attach the programs that are always attached: a link of theirs is detached, or runs another program.
    Attach,
    /// Have listeners at an address and port registered.
    AddTarget(TargetKey),
    /// Attach a set of hooks.
    AttachHooks(HookSet),
    /// Make a gateway's connections look local, or otherwise so.
    PutView((ViewKey, u32), LoopbackView),
    /// Give replies their source, or another one.
    PutReply((ReplyKey, u32), Reply),
    /// Register the socket of this inode.
    Register {
        /// Under which key.
        key: ListenerKey,
        /// Which socket.
        inode: u64,
    },
    /// Listen as a relay; or, where it does, relay otherwise.
    OpenRelay(RelayKey, RelaySpec),
    /// Let an address use an entry that is not for all.
    AddSource(SourceKey),
    /// Refuse what an accept rule lets in, unless an entry admits it.
    AddAccepted((AcceptedKey, u32)),
    /// Stop refusing what an accept rule let in.
    RemoveAccepted((AcceptedKey, u32)),
    /// Have conntrack forget what accept rules let in, open connections excepted.
    ForgetFlows(BTreeSet<(AcceptedKey, u32)>),
    /// Put an entry, or change where it leads.
    PutEntry(RuleKey, RuleValue),
    /// Remove an entry.
    RemoveEntry(RuleKey),
    /// Let an address use it no more.
    RemoveSource(SourceKey),
    /// Lead what containers dial to their gateway.
    PutDial(DialKey, Dial),
    /// Leave it alone.
    RemoveDial(DialKey),
    /// Stop listening as a relay.
    CloseRelay {
        /// Which.
        key: RelayKey,
        /// Whether the kernel has taken over: handshakes that are under way are then still completed.
        handed_over: bool,
    },
    /// Make a gateway's connections look as they are.
    RemoveView((ViewKey, u32)),
    /// Detach a set of hooks.
    DetachHooks(HookSet),
    /// Leave replies as they are.
    RemoveReply((ReplyKey, u32)),
    /// Forget a listener.
    Unregister(ListenerKey),
    /// Watch a port no more.
    RemoveTarget(TargetKey),
    /// Put an accept rule first in one of the firewall's chains.
    Accept {
        /// Where.
        chain: Chain,
        /// For what.
        opening: Opening,
    },
    /// Remove an accept rule from the firewall.
    Unaccept {
        /// Where.
        chain: Chain,
        /// For what.
        opening: Opening,
    },
    /// Try whether the firewall lets these through.
    Probe(BTreeMap<Opening, Link>),
}

impl Step {
    /// Whether it is the kernel programs' and their maps'.
    pub fn is_of_kernel(&self) -> bool {
        !matches!(
            self,
            Self::OpenRelay(..)
                | Self::CloseRelay { .. }
                | Self::Accept { .. }
                | Self::Unaccept { .. }
                | Self::ForgetFlows(_)
                | Self::Probe(_)
        )
    }
}

impl Step {
    /// The hooks without which it must not be carried out: connections would come that need them.
    pub fn relies_on(&self) -> &'static [HookSet] {
        match self {
            // It leads to nobody.
            Self::PutEntry(_, value) if value.target_port == 0 && !value.has(RuleValue::RELAYED) => &[],
            Self::PutEntry(key, _) if key.protocol == u16::from(UDP) => &[HookSet::Names, HookSet::Replies],
            Self::PutEntry(..) | Self::OpenRelay(..) => &[HookSet::Names],
            Self::PutDial(..) => &[HookSet::Connect],
            _ => &[],
        }
    }
}

/// The steps that only take access away, and that nothing new has to be in force for. They come first in every plan, and can be
/// carried out before the firewall is looked at.
pub fn revocations(policy: &Policy, reality: &Reality) -> Vec<Step> {
    let mut steps: Vec<_> = left(policy, reality).map(Step::RemoveSource).collect();
    steps.extend(views_of_others(policy, reality).into_iter().map(Step::RemoveView));
    for (key, there) in &reality.relays {
        let meant = policy.relays.get(key).map(|spec| &spec.clients);
        let clients = match (&there.clients, meant) {
            (Clients::Listed(there), Some(Clients::Listed(meant))) => {
                there.intersection(meant).copied().collect()
            }
            (Clients::Subnet(_), Some(Clients::Listed(meant))) => meant.clone(),
            _ => continue,
        };
        let clients = Clients::Listed(clients);
        if clients != there.clients {
            steps.push(Step::OpenRelay(key.clone(), RelaySpec { clients, ..there.clone() }));
        }
    }
    // Dials before what they lead to, entries before their relays.
    let dials = reality.dials.keys().filter(|key| !policy.dials.contains_key(key));
    steps.extend(dials.map(|key| Step::RemoveDial(*key)));
    let denied = reality.entries.keys().filter(|key| is_denied(policy, key));
    steps.extend(denied.map(|key| Step::RemoveEntry(*key)));
    let handed_over = handed_over(policy);
    let denied = |key: &&RelayKey| {
        !policy.relays.contains_key(key) && !handed_over.contains(key) && !is_moved(policy, key)
    };
    // Those that linger, too. Where an entry that refuses takes its place, a relay closes after it.
    for key in reality.relays.keys().chain(&reality.lingering).filter(denied) {
        if !is_refused(policy, key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
        }
    }
    steps
}

/// Whether an entry that leads to nobody is meant where a relay of a bridge listens.
fn is_refused(policy: &Policy, key: &RelayKey) -> bool {
    let anywhere = key.entry().map(|entry| RuleKey { ifindex: 0, ..entry });
    let entries = key.entry().into_iter().chain(anywhere).filter_map(|key| policy.entries.get(&key));
    entries.into_iter().any(|entry| entry.target_port == 0 && !entry.has(RuleValue::RELAYED))
}

/// Addresses that may use an entry no more, where the entry goes on to be for some: nothing needs them any more, and they may be
/// others' by now.
fn left<'a>(policy: &'a Policy, reality: &'a Reality) -> impl Iterator<Item = SourceKey> + 'a {
    let listed =
        |key: &&SourceKey| policy.entries.get(&key.rule).is_some_and(|entry| entry.has(RuleValue::LISTED));
    reality.sources.difference(&policy.sources).filter(listed).copied()
}

/// Views of single addresses whose holders may be others by now: those at the gateways of entries that are for some.
fn views_of_others(policy: &Policy, reality: &Reality) -> BTreeSet<(ViewKey, u32)> {
    let single = ViewKey::prefix_len(&Address([u32::MAX; 4]));
    let mut stale =
        reality.views.keys().filter(|view| view.1 == single && !policy.views.contains_key(view)).peekable();
    if stale.peek().is_none() {
        return BTreeSet::new();
    }
    let listed = policy.entries.values().filter(|entry| entry.has(RuleValue::LISTED));
    let gateways: BTreeSet<_> =
        listed.map(|entry| Endpoint::new(entry.key.gateway, entry.key.port)).collect();
    stale.filter(|(key, _)| gateways.contains(&key.gateway)).copied().collect()
}

/// Whether an entry goes, and no relay comes in its place, which would have to listen first.
fn is_denied(policy: &Policy, key: &RuleKey) -> bool {
    let address = SocketAddr::new(key.gateway.into(), key.port);
    let is_relayed = |relay: &RelayKey| match relay.place {
        Place::Bridge { ifindex, .. } => [0, ifindex].contains(&key.ifindex),
        Place::Namespace(_) => false,
    };
    let first = RelayKey { address, place: Place::Bridge { interface: String::new(), ifindex: 0 } };
    let mut relays =
        policy.relays.range(first..).map(|(relay, _)| relay).take_while(|r| r.address == address);
    !policy.entries.contains_key(key) && !relays.any(is_relayed)
}

/// Whether a relay's namespace is found by another way now.
fn is_moved(policy: &Policy, key: &RelayKey) -> bool {
    policy.relays.keys().any(|new| new.address == key.address && new.is_beside(key))
}

/// The relays whose work the kernel takes over: by the entry of their own rule, since where entries do not name the interface
/// another network's may have that address, too.
fn handed_over(policy: &Policy) -> BTreeSet<&RelayKey> {
    // One that leads to a relay, or to nobody, takes nothing over.
    let steers = |key: &RuleKey| policy.entries.get(key).is_some_and(|entry| entry.target_port != 0);
    let is_entered = |key: &RuleKey| key.protocol == u16::from(TCP) && steers(key);
    let taken_over = |gateway: &&GatewayOutcome| {
        gateway.outcome.state != State::Blocked && gateway.rule_key.as_ref().is_some_and(is_entered)
    };
    let gateways = policy.outcomes.iter().flat_map(|outcome| &outcome.gateways);
    gateways.filter(taken_over).map(|gateway| &gateway.relay_key).collect()
}

/// The steps from `reality` to `policy`. None, where they agree.
pub fn plan(policy: &Policy, reality: &Reality) -> Vec<Step> {
    let mut steps = revocations(policy, reality);
    let firewall = firewall::plan(&guarded(policy, reality), policy.firewall, &reality.filtering);
    let accepted = accepted(policy, reality, &firewall);
    let entries = entries(policy, reality);
    if reality.detached {
        steps.push(Step::Attach);
    }
    steps.extend(policy.targets.difference(&reality.targets).map(|port| Step::AddTarget(*port)));
    let attach = |set: HookSet| (policy.hooks[set] && !reality.hooks[set]).then_some(Step::AttachHooks(set));
    let detach = |set: HookSet| (reality.hooks[set] && !policy.hooks[set]).then_some(Step::DetachHooks(set));
    steps.extend(attach(HookSet::Names));
    steps.extend(attach(HookSet::Connect));
    for (endpoint, view) in &policy.views {
        if reality.views.get(endpoint) != Some(view) {
            steps.push(Step::PutView(*endpoint, *view));
        }
    }
    steps.extend(attach(HookSet::Replies));
    for (key, reply) in &policy.replies {
        if reality.replies.get(key) != Some(reply) {
            steps.push(Step::PutReply(*key, *reply));
        }
    }
    steps.extend(registrations(policy, reality));
    let stale = |key: &RelayKey| !policy.relays.contains_key(key);
    // Its port has to be free first.
    for key in reality.relays.keys().filter(|key| stale(key) && is_moved(policy, key)) {
        steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
    }
    for (key, spec) in &policy.relays {
        let reached =
            || key.entry().is_some_and(|entry| reality.relay_sockets.contains(&entry)) || !spec.by_entry;
        if reality.relays.get(key) != Some(spec) || !reached() {
            steps.push(Step::OpenRelay(key.clone(), spec.clone()));
        }
    }
    steps.extend(detach(HookSet::Connect));
    steps.extend(policy.sources.difference(&reality.sources).map(|key| Step::AddSource(*key)));
    for (key, value) in &entries {
        if reality.entries.get(key) != Some(value) {
            steps.push(Step::PutEntry(*key, *value));
        }
    }
    let is_replaced = |key: &&RuleKey| !entries.contains_key(key) && !is_denied(policy, key);
    steps.extend(reality.entries.keys().filter(is_replaced).map(|key| Step::RemoveEntry(*key)));
    // With its entry: without one, whoever would look local is refused.
    let gone = views_of_others(policy, reality);
    let views = reality.views.keys().filter(|key| !policy.views.contains_key(key) && !gone.contains(key));
    steps.extend(views.map(|key| Step::RemoveView(*key)));
    let left: BTreeSet<_> = left(policy, reality).collect();
    let later = reality.sources.difference(&policy.sources).filter(|key| !left.contains(key));
    steps.extend(later.map(|key| Step::RemoveSource(*key)));
    for (key, dial) in &policy.dials {
        if reality.dials.get(key) != Some(dial) {
            steps.push(Step::PutDial(*key, *dial));
        }
    }
    let handed_over = handed_over(policy);
    for key in reality.relays.keys().chain(&reality.lingering).filter(|key| stale(key)) {
        if handed_over.contains(key) && reality.relays.contains_key(key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: true });
        } else if !handed_over.contains(key) && is_refused(policy, key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
        }
    }
    steps.extend(detach(HookSet::Names).filter(|_| !reality.name_hooks_in_use));
    steps.extend(
        reality.replies.keys().filter(|k| !policy.replies.contains_key(k)).map(|k| Step::RemoveReply(*k)),
    );
    steps.extend(detach(HookSet::Replies));
    let watched = |key: &ListenerKey| {
        let (address, port, protocol) = (key.address, key.port, key.protocol.into());
        policy.targets.contains(&TargetKey { address, port, protocol })
    };
    let stale = reality.registered.iter().filter(|key| !watched(key));
    steps.extend(stale.map(|k| Step::Unregister(*k)));
    steps.extend(reality.targets.difference(&policy.targets).map(|port| Step::RemoveTarget(*port)));
    steps.extend(accepted.difference(&reality.accepted).map(|key| Step::AddAccepted(*key)));
    // What conntrack knows passes without an accept rule, and would reach whoever listens on every address.
    let flows = |key| reality.flows.get(key).copied().unwrap_or_default();
    // Of one that is open the next look after its end finds that it may be forgotten.
    let gone: Vec<_> = reality.accepted.difference(&accepted).filter(|key| flows(*key).open == 0).collect();
    let known: BTreeSet<_> =
        gone.iter().copied().filter(|key| flows(*key).forgettable > 0).copied().collect();
    steps.extend((!known.is_empty()).then_some(Step::ForgetFlows(known)));
    steps.extend(gone.into_iter().map(|key| Step::RemoveAccepted(*key)));
    steps.extend(firewall);
    steps
}

/// The entries that should be in force, with the counts of those that are: the kernel counts.
fn entries(policy: &Policy, reality: &Reality) -> BTreeMap<RuleKey, RuleValue> {
    let mut entries = policy.entries.clone();
    for (key, entry) in &mut entries {
        if let Some(there) = reality.entries.get(key).filter(|there| there.leads_as(entry)) {
            entry.steered = there.steered;
        }
    }
    entries
}

/// What the kernel is to refuse unless an entry admits it: what lbridge's accept rules let in, now or by a step of `firewall`.
fn accepted(policy: &Policy, reality: &Reality, firewall: &[Step]) -> BTreeSet<(AcceptedKey, u32)> {
    if policy.steering.is_none() {
        return BTreeSet::new();
    }
    let planned = firewall
        .iter()
        .filter_map(|step| if let Step::Accept { opening, .. } = step { Some(opening) } else { None });
    let mut accepted = reality.filtering.accepted();
    accepted.extend(planned.map(Opening::accepted));
    // What could not be read may be there still.
    if reality.filtering.failed {
        accepted.extend(&reality.accepted);
    }
    // No entry admits the clients of a relay that is bound to the gateway, once that listens.
    let bound: Vec<_> = policy.relays.iter().filter(|(key, spec)| is_bound(key, spec)).collect();
    let is_served = |(key, bits): &(AcceptedKey, u32)| {
        key.protocol == u16::from(TCP)
            && bound.iter().any(|(relay, spec)| {
                let (gateway, port) = (Address::from(relay.address.ip()), relay.address.port());
                let client = |source| AcceptedKey { gateway, port, source, ..*key };
                reality.relays.contains_key(relay)
                    && match &spec.clients {
                        Clients::Subnet(subnet) => key.matches(*bits, &client(subnet.base)),
                        Clients::Listed(listed) => {
                            listed.iter().any(|ip| key.matches(*bits, &client((*ip).into())))
                        }
                        Clients::Inside(_) => false,
                    }
            })
    };
    accepted.retain(|key| !is_served(key));
    accepted
}

/// Whether a relay listens on the gateway itself.
fn is_bound(key: &RelayKey, spec: &RelaySpec) -> bool {
    !spec.by_entry && matches!(key.place, Place::Bridge { .. })
}

/// The openings for which a firewall may let packets in now: not those of a relay without an entry that is not open, since
/// what comes through would reach the host's other services.
fn guarded(policy: &Policy, reality: &Reality) -> BTreeMap<Opening, Link> {
    let is_checked = policy.steering.is_some_and(|steering| steering.interface_check);
    let is_guarded = |(opening, link): &(&Opening, &Link)| {
        let entry = opening.entry(if is_checked { link.ifindex } else { 0 });
        is_checked
            || policy.entries.contains_key(&entry)
            || reality.relays.contains_key(&bound_relay(opening, link.ifindex))
    };
    let openings = policy.openings.iter().filter(is_guarded);
    openings.map(|(opening, link)| (opening.clone(), *link)).collect()
}

/// The relay that is bound to what an opening lets packets through to.
fn bound_relay(opening: &Opening, ifindex: u32) -> RelayKey {
    let place = Place::Bridge { interface: opening.interface.clone(), ifindex };
    RelayKey { address: SocketAddr::new(opening.gateway, opening.port), place }
}

/// Fills the free slots of each bound address from its sockets, newest last: an inode's number grows. A socket may come
/// to be registered twice, which does no harm.
fn registrations(policy: &Policy, reality: &Reality) -> Vec<Step> {
    let mut steps = vec![];
    for (bound, inodes) in &policy.listeners {
        let keys = (0..SLOTS).map(|slot| ListenerKey { slot, ..*bound });
        let free: Vec<_> = keys.filter(|key| !reality.registered.contains(key)).collect();
        let missing = inodes.len().min(usize::from(SLOTS)).saturating_sub(usize::from(SLOTS) - free.len());
        let newest = inodes.iter().rev().take(missing);
        steps.extend(free.into_iter().zip(newest).map(|(key, inode)| Step::Register { key, inode: *inode }));
    }
    steps
}

//! Plan: the steps from the actual to the desired state ([`Reality`] to [`Policy`]), in an order that leaves
//! no gap and no hole.
//!
//! - a port is watched before its listeners are looked for, and a listener is ready before the entry that
//!   names it;
//! - the name hooks are attached before connections that need them can come, and detached after the last of
//!   these;
//! - a relay listens before the kernel's entry is removed, and the entry is in place before the relay stops;
//! - the source of a UDP service's replies is set before the entry that leads to the service, and reset after
//!   that entry is removed;
//! - an entry is removed before its listener, and before the firewall is closed;
//! - a source is added before the entry that it may use, and removed after it; at once, if the entry stays
//!   for others;
//! - what only takes access away, and needs nothing new, comes first ([`revocations`]);
//! - a dial is added after what answers at its gateway, and removed before it; the dials' hooks are attached
//!   before the dials, and detached after them;
//! - the firewall is tried last, when everything that answers is in place;
//! - before an accept rule is put, and for as long as the rule or a flow that it let in exists, the kernel
//!   refuses the traffic of that rule that no entry admits.

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

/// One change, to be carried out literally: everything about it was decided before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Attach the programs that must always be attached: one of their links is detached, or runs another
    /// program.
    Attach,
    /// Watch an address and port: have listeners there registered.
    AddTarget(TargetKey),
    /// Attach a set of hooks.
    AttachHooks(HookSet),
    /// Make a gateway's connections look local, or change how they look.
    PutView((ViewKey, u32), LoopbackView),
    /// Give a UDP service's replies their source, or another one.
    PutReply((ReplyKey, u32), Reply),
    /// Register the socket of this inode.
    Register {
        /// The key to register the socket under.
        key: ListenerKey,
        /// Inode number of the socket.
        inode: u64,
    },
    /// Open a relay, or change the specification of one that is open.
    OpenRelay(RelayKey, RelaySpec),
    /// Let a source use an entry that is not for its whole network.
    AddSource(SourceKey),
    /// Refuse the traffic that an accept rule lets in, unless an entry admits it.
    AddAccepted((AcceptedKey, u32)),
    /// Stop refusing the traffic that an accept rule let in.
    RemoveAccepted((AcceptedKey, u32)),
    /// Have conntrack forget the flows that accept rules let in, except open connections.
    ForgetFlows(BTreeSet<(AcceptedKey, u32)>),
    /// Put an entry, or change where it leads.
    PutEntry(RuleKey, RuleValue),
    /// Remove an entry.
    RemoveEntry(RuleKey),
    /// Stop letting a source use an entry.
    RemoveSource(SourceKey),
    /// Lead a dial to its gateway.
    PutDial(DialKey, Dial),
    /// Stop leading a dial to its gateway.
    RemoveDial(DialKey),
    /// Stop listening as a relay.
    CloseRelay {
        /// Key of the relay.
        key: RelayKey,
        /// True if the kernel has taken over: handshakes under way are then still completed.
        handed_over: bool,
    },
    /// Stop making a gateway's connections look local.
    RemoveView((ViewKey, u32)),
    /// Detach a set of hooks.
    DetachHooks(HookSet),
    /// Stop giving a UDP service's replies another source.
    RemoveReply((ReplyKey, u32)),
    /// Remove a listener from the kernel's map.
    Unregister(ListenerKey),
    /// Stop watching an address and port.
    RemoveTarget(TargetKey),
    /// Put an accept rule first in one of the firewall's chains.
    Accept {
        /// The chain that gets the rule.
        chain: Chain,
        /// The traffic that the rule accepts.
        opening: Opening,
    },
    /// Remove an accept rule from the firewall.
    Unaccept {
        /// The chain that has the rule.
        chain: Chain,
        /// The traffic that the rule accepts.
        opening: Opening,
    },
    /// Try whether the firewall lets packets through these openings.
    Probe(BTreeMap<Opening, Link>),
}

impl Step {
    /// Returns true if the step concerns the kernel programs and their maps.
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
    /// Returns the hooks that must be attached before the step is carried out: it lets connections come that
    /// need them.
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

/// Returns the steps that only take access away, and that depend on nothing new. They come first in every
/// plan, and can be carried out before the firewall is looked at.
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
    // Includes relays that linger. Where an entry that refuses replaces a relay, the relay closes after the
    // entry is put.
    for key in reality.relays.keys().chain(&reality.lingering).filter(denied) {
        if !is_refused(policy, key) {
            steps.push(Step::CloseRelay { key: key.clone(), handed_over: false });
        }
    }
    steps
}

/// Returns true if the policy has an entry that leads to nobody where a relay of a bridge listens.
fn is_refused(policy: &Policy, key: &RelayKey) -> bool {
    let anywhere = key.entry().map(|entry| RuleKey { ifindex: 0, ..entry });
    let entries = key.entry().into_iter().chain(anywhere).filter_map(|key| policy.entries.get(&key));
    entries.into_iter().any(|entry| entry.target_port == 0 && !entry.has(RuleValue::RELAYED))
}

/// Returns the sources that may no longer use an entry which stays for other sources. Nothing needs these any
/// more, and the addresses may be other containers' by now.
fn left<'a>(policy: &'a Policy, reality: &'a Reality) -> impl Iterator<Item = SourceKey> + 'a {
    let listed =
        |key: &&SourceKey| policy.entries.get(&key.rule).is_some_and(|entry| entry.has(RuleValue::LISTED));
    reality.sources.difference(&policy.sources).filter(listed).copied()
}

/// Returns the views of single addresses whose holders may be others by now: those at the gateways of entries
/// that are for some sources only.
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

/// Returns true if an entry must be removed and no relay replaces it. Such a relay would have to listen
/// first.
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

/// Returns true if the relay's namespace is found through another entrance now.
fn is_moved(policy: &Policy, key: &RelayKey) -> bool {
    policy.relays.keys().any(|new| new.address == key.address && new.is_beside(key))
}

/// Returns the relays that the kernel takes over from. The entry must be of the relay's own rule: where
/// entries do not name the interface, another network's rule may have that address, too.
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

/// Returns the steps from `reality` to `policy`; empty if they agree.
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
    // A view goes after its entry: without an entry, the kernel refuses connections that would look local.
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
    // A flow that conntrack knows passes without an accept rule, and would reach a service that listens on
    // every address.
    let flows = |key| reality.flows.get(key).copied().unwrap_or_default();
    // While a flow is open, its key stays. The first look after its end finds that it may be forgotten.
    let gone: Vec<_> = reality.accepted.difference(&accepted).filter(|key| flows(*key).open == 0).collect();
    let known: BTreeSet<_> =
        gone.iter().copied().filter(|key| flows(*key).forgettable > 0).copied().collect();
    steps.extend((!known.is_empty()).then_some(Step::ForgetFlows(known)));
    steps.extend(gone.into_iter().map(|key| Step::RemoveAccepted(*key)));
    steps.extend(firewall);
    steps
}

/// Returns the entries that should be in force, with the counts of those that already are: the kernel counts.
fn entries(policy: &Policy, reality: &Reality) -> BTreeMap<RuleKey, RuleValue> {
    let mut entries = policy.entries.clone();
    for (key, entry) in &mut entries {
        if let Some(there) = reality.entries.get(key).filter(|there| there.leads_as(entry)) {
            entry.steered = there.steered;
        }
    }
    entries
}

/// Returns the traffic that the kernel must refuse unless an entry admits it: what lbridge's accept rules let
/// in, now or by a step of `firewall`.
fn accepted(policy: &Policy, reality: &Reality, firewall: &[Step]) -> BTreeSet<(AcceptedKey, u32)> {
    if policy.steering.is_none() {
        return BTreeSet::new();
    }
    let planned = firewall
        .iter()
        .filter_map(|step| if let Step::Accept { opening, .. } = step { Some(opening) } else { None });
    let mut accepted = reality.filtering.accepted();
    accepted.extend(planned.map(Opening::accepted));
    // A rule that could not be read may still be there.
    if reality.filtering.failed {
        accepted.extend(&reality.accepted);
    }
    // No entry admits the clients of a relay that is bound to the gateway: once it listens, they are not
    // refused.
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

/// Returns true if a relay listens on the gateway itself.
fn is_bound(key: &RelayKey, spec: &RelaySpec) -> bool {
    !spec.by_entry && matches!(key.place, Place::Bridge { .. })
}

/// Returns the openings for which a firewall may let packets in now. Leaves out those of a relay without an
/// entry that is not open: what comes through would reach the host's other services.
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

/// Returns the key of the relay that is bound to the address and port of an opening.
fn bound_relay(opening: &Opening, ifindex: u32) -> RelayKey {
    let place = Place::Bridge { interface: opening.interface.clone(), ifindex };
    RelayKey { address: SocketAddr::new(opening.gateway, opening.port), place }
}

/// Fills the free slots of each bound address with its newest sockets. Inode numbers grow, so the newest
/// socket is the last of the list. A socket may be registered twice, which does no harm.
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

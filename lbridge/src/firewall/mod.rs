//! Firewall: probes whether packets arrive, reads which rules are in the way, and keeps accept rules. Decides
//! nothing: `planning/plan/firewall.rs` does.
//!
//! - [`probe`]: a SYN or a datagram from a namespace on the bridge;
//! - [`ruleset`]: nftables' rules, in the types of the `nftables` crate;
//! - [`iptables`]: the tables of `iptables-nft` and `iptables-legacy`, through those programs;
//! - [`firewalld`]: firewalld whose table takes rules from nobody else;
//! - [`tool`]: runs the programs of firewalls;
//! - [`nft_monitor`]: the kernel's notifications that a ruleset has changed;
//! - [`conntrack`]: flows that are let in though their accept rule is gone.

pub mod conntrack;
mod firewalld;
mod iptables;
mod nft_monitor;
mod probe;
mod ruleset;
mod tool;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ipnet::IpNet;
use lbridge_common::wire::AcceptedKey;
use tokio::sync::mpsc;

use crate::planning::{
    firewall::{Backend, Chain, FirewallState, Opening, ProbeResult, ProbeRoute},
    rule::Protocol,
};
use nft_monitor::Changes;
use ruleset::{Ruleset, Unread};
use tool::Problem;

/// Interval of reading the ruleset without a reason: nothing reports `iptables-legacy`'s changes.
const RESYNC_INTERVAL: Duration = Duration::from_secs(60);
/// Pause before an opening that was dropped, or could not be probed, is probed again: not every firewall is a
/// ruleset.
const TRY_AGAIN: Duration = Duration::from_secs(30);
/// Shorter pause than [`TRY_AGAIN`], if the ruleset has changed somewhere since.
const CHANGE_DELAY: Duration = Duration::from_secs(3);
/// Reading takes the longer, the longer the ruleset is. It takes at most one part in this many of the time,
/// even while the ruleset changes.
const DUTY_CYCLE: u32 = 4;
/// Limit on the pause that [`DUTY_CYCLE`] makes: a change is read after this time at the latest.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The kernel program's knowledge of lbridge's own packets. It counts datagrams as they arrive: an answer to
/// one could come from a firewall that refuses it.
pub trait Arrivals: Send + Sync {
    /// Starts to take packets from this address and interface as probes: no connection is counted for them.
    fn begin(&self, source: IpAddr, ifindex: u32) -> anyhow::Result<()>;
    /// Stops taking packets from this address and interface as probes.
    fn end(&self, source: IpAddr, ifindex: u32);
    /// Starts counting the datagrams of an opening.
    fn count(&self, opening: &Opening, link: ProbeRoute) -> anyhow::Result<()>;
    /// Returns true if at least one was counted.
    fn any(&self, opening: &Opening, link: ProbeRoute) -> bool;
    /// Stops counting the datagrams of an opening.
    fn forget(&self, opening: &Opening, link: ProbeRoute);
}

/// The host's firewall, as seen from this process's network namespace.
#[derive(Debug)]
pub struct Firewall {
    /// Wakes the loop at each change; `None` if changes are not to be followed.
    wake: Option<mpsc::Sender<()>>,
    changes: Option<Changes>,
    /// Openings that are to be let through, each with the link that it is probed from.
    openings: BTreeMap<Opening, ProbeRoute>,
    /// Hash of everybody else's rules, as in [`Ruleset::others`].
    others: u64,
    looked: Option<Look>,
    /// Time at which the last reported change was noticed; `None` before the first.
    changed: Option<Instant>,
    seen: FirewallState,
    tried: BTreeMap<Opening, Instant>,
}

/// Time and duration of the last read of the ruleset.
#[derive(Debug, Clone, Copy)]
struct Look {
    begun: Instant,
    took: Duration,
}

impl Firewall {
    /// Creates the firewall's state, which follows the ruleset's changes; each of them wakes the loop.
    pub fn follow(wake: mpsc::Sender<()>) -> Self {
        Self::new(Some(wake))
    }

    fn new(wake: Option<mpsc::Sender<()>>) -> Self {
        Self {
            wake,
            changes: None,
            openings: BTreeMap::new(),
            others: 0,
            looked: None,
            changed: None,
            seen: FirewallState::default(),
            tried: BTreeMap::new(),
        }
    }

    /// Returns what is known now of these openings. Reads the ruleset first if it may have changed.
    pub async fn look(&mut self, openings: &BTreeMap<Opening, ProbeRoute>) -> &FirewallState {
        self.seen.probe_results.retain(|opening, _| openings.contains_key(opening));
        self.seen.needed.retain(|opening| openings.contains_key(opening));
        self.tried.retain(|opening, _| openings.contains_key(opening));
        self.openings.clone_from(openings);
        if self.is_due() {
            self.read().await;
        }
        let stale = |opening: &Opening, result: &ProbeResult| {
            let Some(tried) = self.tried.get(opening) else { return true };
            // A rule on another hook may be gone.
            let changed = self.changed.is_some_and(|changed| changed > *tried);
            *result != ProbeResult::Open && tried.elapsed() >= if changed { CHANGE_DELAY } else { TRY_AGAIN }
        };
        self.seen.probe_results.retain(|opening, result| !stale(opening, result));
        &self.seen
    }

    /// Returns true if the ruleset is to be read, since it may have changed.
    fn is_due(&mut self) -> bool {
        let Some(look) = self.looked else { return true };
        let longest = match self.seen.unreadable {
            Some(_) => CHANGE_DELAY.max(look.took * DUTY_CYCLE),
            None => RESYNC_INTERVAL,
        };
        if look.begun.elapsed() > longest {
            return true;
        }
        let Some(changes) = self.changes.as_mut().filter(|changes| changes.any()) else { return false };
        let pause = (look.took * DUTY_CYCLE).min(LONGEST_PAUSE).saturating_sub(look.begun.elapsed());
        if !pause.is_zero() {
            self.wake_in(pause);
            return false;
        }
        changes.seen();
        self.changed = Some(Instant::now());
        if self.seen.probe_results.values().any(|result| *result != ProbeResult::Open) {
            self.wake_in(CHANGE_DELAY);
        }
        true
    }

    fn wake_in(&self, pause: Duration) {
        let Some(wake) = self.wake.clone() else { return };
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let _ = wake.try_send(());
        });
    }

    async fn read(&mut self) {
        let begun = Instant::now();
        // A kernel that has no nf_tables yet may get it later.
        if let (None, Some(wake)) = (&self.changes, &self.wake) {
            let followed = Changes::follow(wake.clone());
            let followed = followed.inspect_err(
                |error| tracing::debug!(%error, "could not follow changes of the firewall; polling"),
            );
            self.changes = followed.ok();
        }
        let (ruleset, problems) = Ruleset::read(&self.openings).await;
        let unreadable = (!problems.is_empty()).then(|| listed(&problems));
        let failed = problems.iter().any(|unread| matches!(unread.problem, Problem::Failed(_)));
        self.looked = Some(Look { begun, took: begun.elapsed() });
        if ruleset.others != self.others {
            self.seen.probe_results.clear();
        }
        // An accept rule that is there was needed once; if somebody removes it, it is needed again.
        self.seen.needed.extend(ruleset.accepts.keys().map(|(_, opening)| opening.clone()));
        self.seen.chains = ruleset.chains;
        // What could not be read may be there still.
        let mut accepts = std::mem::take(&mut self.seen.accepts);
        accepts.retain(|(chain, _), _| problems.iter().any(|unread| unread.backend.contains(&chain.backend)));
        accepts.extend(ruleset.accepts);
        self.seen.accepts = accepts;
        self.seen.unreadable = unreadable;
        self.seen.failed = failed;
        self.others = ruleset.others;
    }

    /// Has everything that is not open probed again: somebody may have done something about it. If the legacy
    /// tables are in use, whose changes nothing reports, has the ruleset read again, too.
    pub fn try_again(&mut self) {
        if iptables::is_legacy_in_use() {
            self.looked = None;
        }
        self.seen.probe_results.retain(|_, result| *result == ProbeResult::Open);
    }

    /// Probes openings; [`Self::look`] returns the results. Those of UDP need `arrivals` to count datagrams.
    pub async fn probe(&mut self, openings: &BTreeMap<Opening, ProbeRoute>, arrivals: Option<&dyn Arrivals>) {
        self.try_all(openings, arrivals).await;
        let dropped = |opening| self.seen.probe_results.get(opening) == Some(&ProbeResult::Dropped);
        if !openings.keys().any(dropped) {
            return;
        }
        // Not every change is reported. But the results just seen count, for a ruleset that changes all the
        // time, too.
        let mut tried = self.seen.probe_results.clone();
        tried.retain(|opening, _| openings.contains_key(opening));
        self.read().await;
        self.seen.probe_results.extend(tried);
        // If no rule is in the way, something may have gone wrong with the probe itself.
        let doubtful = |opening: &Opening| {
            let result = self.seen.probe_results.get(opening);
            result != Some(&ProbeResult::Open) && self.seen.in_the_way_of(opening).next().is_none()
        };
        let doubtful: BTreeMap<_, _> = openings
            .iter()
            .filter(|(opening, _)| doubtful(opening))
            .map(|(opening, link)| (opening.clone(), *link))
            .collect();
        if !doubtful.is_empty() {
            self.try_all(&doubtful, arrivals).await;
        }
    }

    async fn try_all(&mut self, openings: &BTreeMap<Opening, ProbeRoute>, arrivals: Option<&dyn Arrivals>) {
        let is_udp = |(opening, _): &(&Opening, &ProbeRoute)| opening.protocol == Protocol::Udp;
        let (udp, tcp): (Vec<_>, Vec<_>) = openings.iter().partition(is_udp);
        let mut bridges: BTreeMap<u32, Vec<(&Opening, &ProbeRoute)>> = BTreeMap::new();
        for (opening, link) in tcp {
            bridges.entry(link.ifindex).or_default().push((opening, link));
        }
        // All bridges at a time: a probe that is dropped takes a while, and each bridge has a namespace of
        // its own.
        let tries = bridges.into_iter().map(|(ifindex, openings)| probe::bridge(ifindex, openings, arrivals));
        let accepted: BTreeSet<Opening> =
            self.seen.accepts.keys().map(|(_, opening)| opening.clone()).collect();
        let probe_results = futures_util::future::join_all(tries).await.into_iter().flatten();
        for (opening, result) in probe_results.chain(probe::datagrams(&udp, arrivals).await) {
            match result {
                ProbeResult::Dropped => drop(self.seen.needed.insert(opening.clone())),
                ProbeResult::Open if !accepted.contains(&opening) => drop(self.seen.needed.remove(&opening)),
                ProbeResult::Open | ProbeResult::Unknown(_) => {}
            }
            self.tried.insert(opening.clone(), Instant::now());
            self.seen.probe_results.insert(opening, result);
        }
    }

    /// Puts an accept rule before all others of a chain; moves one that is there already.
    pub async fn accept(&mut self, chain: &Chain, opening: &Opening) -> anyhow::Result<()> {
        anyhow::ensure!(
            opening.has_plain_name(),
            "the bridge's name could match other interfaces in a firewall; rename the bridge, or add the \
             accept rule by hand"
        );
        let put = match chain.backend {
            Backend::Nft => ruleset::accept(chain, opening).await,
            Backend::IptablesNft | Backend::IptablesLegacy => iptables::accept(chain, opening).await,
            Backend::Firewalld => firewalld::accept(opening).await,
        };
        put.with_context(|| format!("failed to add the accept rule for {opening}"))?;
        self.seen.probe_results.remove(opening);
        log_accept_rule(chain, opening, "accept rule added: the firewall dropped what it lets in");
        self.read().await;
        Ok(())
    }

    /// Removes every copy of an accept rule from a chain.
    pub async fn remove_accept(&mut self, chain: &Chain, opening: &Opening) -> anyhow::Result<()> {
        remove(chain, opening).await?;
        log_accept_rule(chain, opening, "accept rule removed");
        self.read().await;
        Ok(())
    }
}

fn log_accept_rule(chain: &Chain, opening: &Opening, message: &str) {
    let Opening { interface, gateway, sources, protocol, port } = opening;
    tracing::info!(interface, %gateway, port, protocol = protocol.name(), %sources, %chain, "{message}");
}

async fn remove(chain: &Chain, opening: &Opening) -> anyhow::Result<()> {
    let removed = match chain.backend {
        Backend::Nft => ruleset::remove(chain, opening).await,
        Backend::IptablesNft | Backend::IptablesLegacy => iptables::remove(chain, opening).await,
        Backend::Firewalld => firewalld::remove(opening).await,
    };
    removed.with_context(|| format!("failed to remove the firewall's accept rule for {opening}"))
}

/// Removes every accept rule of lbridge's, for good. Returns how many there were, and what they let in. Call
/// this only if no daemon runs. `expected` says that there may be some, so that a missing tool is an error.
///
/// # Errors
///
/// If one cannot be removed, or it cannot be determined whether there are any.
pub async fn remove_all(expected: bool) -> anyhow::Result<(usize, BTreeSet<(AcceptedKey, u32)>)> {
    let (ruleset, mut problems) = Ruleset::read(&BTreeMap::new()).await;
    problems.retain(|unread| expected || matches!(unread.problem, Problem::Failed(_)));
    for (chain, opening) in ruleset.accepts.keys() {
        remove(chain, opening).await?;
    }
    anyhow::ensure!(
        problems.is_empty(),
        "could not determine if accept rules are left in the firewall: {}",
        listed(&problems)
    );
    let let_in = ruleset.accepts.keys().map(|(_, opening)| opening.accepted()).collect();
    Ok((ruleset.accepts.len(), let_in))
}

/// Reads the ruleset, and probes each opening. Changes nothing.
pub async fn examine(openings: &BTreeMap<Opening, ProbeRoute>) -> FirewallState {
    let mut firewall = Firewall::new(None);
    firewall.look(openings).await;
    firewall.probe(openings, None).await;
    firewall.look(openings).await.clone()
}

/// Returns the sources of an accept rule that names none, as older versions of lbridge put them.
fn everybody(gateway: IpAddr) -> IpNet {
    let any: IpAddr =
        if gateway.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    IpNet::new_assert(any, 0)
}

fn listed(problems: &[Unread]) -> String {
    problems.iter().map(|unread| unread.problem.to_string()).collect::<Vec<_>>().join("; ")
}

//! verify: `lbridge verify` tests with real connections that each rule is open to its containers and to
//! nobody else. It creates throw-away network namespaces on the bridges and one that stands for the LAN, and
//! dials from there. Runs in the command's own process, as root.
//!
//! The following can be proved:
//!
//! - A rule is open: a connection succeeds. For the right listener it asks the kernel which one would get
//!   such a connection, see [`listeners::lookup`]; for a steered rule that must be the service's, for a
//!   relayed one a socket that the daemon holds. For the relay's service, it checks that the relay does not
//!   reset the connection.
//! - A rule is closed to others: their connections fail. Refused, reset, unreachable and no answer count the
//!   same.
//! - A source address of the network does not help a sender elsewhere: it asks the kernel as above, since a
//!   sender with a forged source never sees an answer.
//!
//! Nothing is sent by UDP: only the service could answer, and a datagram of ours may mean anything to it. The
//! kernel is asked which socket would get one.
//!
//! A check that could not be made is unverified, and counts as a failure.

mod ground;
mod plan;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, bail};
use futures_util::{StreamExt as _, stream};
use lbridge_common::verdict::listening_addresses;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::{
    api::protocol::Status,
    host::{interfaces::Interfaces, listeners, netns},
    planning::{
        inventory::{Listener, ListenerKind},
        rule::{Network, Protocol, RuleId},
    },
};

use ground::{Aim, Dialled, Grounds};
use plan::{Attempt, By, Place, Plan, Trial, plan};

/// Maximum number of connections at the same time; the soft limit of open files is 1,024 nearly everywhere.
const AT_A_TIME: usize = 256;
const FIREWALL: &str =
    "a firewall drops it; `nft list ruleset` or `iptables -vnL INPUT` shows the rule whose count grows";
const REJECTS: &str =
    "a firewall rejects it; `nft list ruleset` or `iptables -vnL INPUT` shows the rule whose count grows";

/// The expected result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expected {
    /// The rule's service or relay answers.
    Open,
    /// The connection is refused at once.
    Refused,
    /// No service takes the connection.
    Closed,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// A service or relay answered.
    Open,
    /// The connection was refused or reset.
    Refused,
    /// The address was unreachable.
    Unreachable,
    /// There was no answer in time.
    TimedOut,
    /// The kernel reports that no socket would get the packet.
    Nobody,
    /// The check was not made.
    NotTried,
}

/// The comparison of result and expectation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The result is as expected.
    Ok,
    /// The result is not as expected.
    Failed,
    /// The check could not be made.
    Unverified,
}

/// One check and its result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The rule's network.
    pub network: Network,
    /// The rule's dialled port.
    pub port: u16,
    /// The rule's IP protocol.
    pub protocol: Protocol,
    /// The place or source that was dialled from.
    pub from: String,
    /// The address that was dialled.
    pub to: String,
    /// The expected result.
    pub expected: Expected,
    /// The actual result.
    pub found: Found,
    /// The comparison of the two.
    pub verdict: Verdict,
    /// The reason for a verdict other than ok; `None` if there is nothing to say.
    pub why: Option<String>,
}

/// All checks and the overall result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// True if every result is as expected.
    pub verified: bool,
    /// The checks, in the order of the rules.
    pub checks: Vec<Check>,
}

/// Verifies all rules of `status`, or only `wanted`. `daemon` is the daemon's process id.
pub async fn verify(status: &Status, daemon: Option<u32>, wanted: Option<&RuleId>) -> anyhow::Result<Report> {
    is_the_daemons_host(daemon)?;
    // A channel without a reader: the interfaces are listed only once.
    let interfaces = Interfaces::connect(mpsc::channel(1).0)?.list().await?;
    let plan = plan(status, &interfaces, wanted);
    let grounds = Grounds::make(&plan).await?;
    let dialled = dial_all(&plan, &grounds).await;
    let udp = plan.trials.iter().any(|trial| trial.rule.protocol == Protocol::Udp);
    let sockets = if udp { listeners::udp()? } else { vec![] };
    let judge = Judge { status, daemon, grounds: &grounds, dialled, listeners: listeners::tcp()?, sockets };
    let checks: Vec<_> = plan.trials.iter().map(|trial| judge.check(trial)).collect();
    let verified = checks.iter().all(|check| check.verdict == Verdict::Ok);
    Ok(Report { verified, checks })
}

/// Returns an error in a network namespace other than the daemon's, where everything would be closed.
fn is_the_daemons_host(daemon: Option<u32>) -> anyhow::Result<()> {
    let Some(pid) = daemon else { return Ok(()) };
    let of = |process: &str| {
        let file = std::fs::File::open(format!("/proc/{process}/ns/net"))?;
        netns::id_of(&file)
    };
    if of("self")? != of(&pid.to_string()).context("cannot look at the daemon")? {
        bail!(
            "the daemon's host is another network namespace; run it there: nsenter --net=/proc/{pid}/ns/net"
        );
    }
    Ok(())
}

/// Makes every connection of the plan once: several trials may need the same one.
async fn dial_all(plan: &Plan, grounds: &Grounds) -> BTreeMap<(Place, SocketAddr), Dialled> {
    let mut wanted = BTreeMap::new();
    for trial in &plan.trials {
        if let Attempt::Connect { from, to, by } = &trial.attempt {
            let aim = match (trial.expected, by) {
                (Expected::Closed, _) => Aim::Closed,
                (_, Some(By::Relay)) => Aim::Relayed,
                (_, _) => Aim::Answered,
            };
            let wanted = wanted.entry((from.clone(), *to)).or_insert(aim);
            *wanted = aim.max(*wanted);
        }
    }
    let dials = wanted.into_iter().map(async |((from, to), aim)| {
        let dialled = grounds.dial(&from, to, aim).await;
        ((from, to), dialled)
    });
    stream::iter(dials).buffer_unordered(AT_A_TIME).collect().await
}

struct Judge<'a> {
    status: &'a Status,
    daemon: Option<u32>,
    grounds: &'a Grounds,
    dialled: BTreeMap<(Place, SocketAddr), Dialled>,
    /// The host's TCP listeners.
    listeners: Vec<Listener>,
    /// The host's UDP sockets.
    sockets: Vec<Listener>,
}

impl Judge<'_> {
    fn check(&self, trial: &Trial) -> Check {
        let (from, to) = match &trial.attempt {
            Attempt::Connect { from, to, .. } | Attempt::Ask { from, to, .. } => {
                (self.name(from), to.to_string())
            }
            Attempt::Borrow { of, at, to } => {
                let source =
                    match self.grounds.borrowed(trial.rule.protocol, &Place::Bridge(of.clone()), at, *to) {
                        Ok((source, _)) => source.to_string(),
                        Err(_) => self.name(&Place::Bridge(of.clone())),
                    };
                (format!("{}, as {source}", self.name(at)), to.to_string())
            }
            Attempt::Listed { source, at, to, .. } => {
                (format!("{}, as {source}", self.name(at)), to.to_string())
            }
            Attempt::Foreign { at, to } => {
                let source = match self.grounds.foreign(trial.rule.protocol, at, *to) {
                    Ok((source, _)) => source.to_string(),
                    Err(_) => "a stranger".to_owned(),
                };
                (format!("{}, as {source}", self.name(at)), to.to_string())
            }
            Attempt::Wire { within, to } => (format!("{}, not lo", self.name(within)), to.to_string()),
            Attempt::Nothing { what, .. } => (trial.rule.network.to_string(), what.clone()),
        };
        let (found, verdict, why) = self.judge(trial);
        Check {
            network: trial.rule.network.clone(),
            port: trial.rule.port,
            protocol: trial.rule.protocol,
            from,
            to,
            expected: trial.expected,
            found,
            verdict,
            why,
        }
    }

    fn name(&self, place: &Place) -> String {
        match place {
            Place::Lan => "the LAN".to_owned(),
            Place::Interface { name, .. } => name.clone(),
            Place::Inside(rule) => rule.network.to_string(),
            Place::Bridge(bridge) => {
                let is_its = |bridge_of: &Option<String>| bridge_of.as_ref() == Some(bridge);
                let network = self.status.docker_networks.iter().find(|network| is_its(&network.bridge));
                network.map_or_else(|| format!("bridge:{bridge}"), |network| network.name.clone())
            }
        }
    }

    fn judge(&self, trial: &Trial) -> (Found, Verdict, Option<String>) {
        let failed = |found, why: String| (found, Verdict::Failed, Some(why));
        match &trial.attempt {
            Attempt::Nothing { why, .. } => unverified(why),
            Attempt::Connect { from, to, by } => match self.dialled.get(&(from.clone(), *to)) {
                None => unverified("it was not tried"),
                Some(Dialled::NotTried(why)) => unverified(why),
                Some(dialled) => match (trial.expected, dialled) {
                    (Expected::Open, Dialled::Open(taker)) => {
                        match self.is_right(by.as_ref(), taker.as_ref(), *to) {
                            Ok(()) => (Found::Open, Verdict::Ok, None),
                            Err(why) => failed(Found::Open, why),
                        }
                    }
                    (Expected::Closed | Expected::Refused, Dialled::Open(taker)) => {
                        failed(Found::Open, who_answers(taker.as_ref(), *to))
                    }
                    (Expected::Closed, _) => match self.behind_a_firewall(from, *to) {
                        Some(why) => (found(dialled), Verdict::Unverified, Some(why)),
                        None => (found(dialled), Verdict::Ok, None),
                    },
                    (Expected::Refused, Dialled::Refused) => (Found::Refused, Verdict::Ok, None),
                    (Expected::Open, Dialled::Refused) => {
                        let why = match (by, self.grounds.taker(from, *to)) {
                            (Some(By::Relay), Some(_)) => {
                                "its relay resets it, or a firewall rejects it; the daemon's log may say why"
                            }
                            (_, Some(_)) => REJECTS,
                            (_, None) => "nobody takes it; the daemon's log may say why",
                        };
                        failed(Found::Refused, why.to_owned())
                    }
                    (_, Dialled::TimedOut) => failed(Found::TimedOut, FIREWALL.to_owned()),
                    (_, _) => failed(
                        found(dialled),
                        "a firewall rejects it, or a route leads elsewhere; see `nft list ruleset` and `ip \
                         route`"
                            .to_owned(),
                    ),
                },
            },
            Attempt::Ask { from, to, by } => {
                match (trial.expected, self.grounds.asked(trial.rule.protocol, from, *to)) {
                    (_, Err(why)) => unverified(&why),
                    (Expected::Open, Ok(taker)) => match self.is_right(by.as_ref(), taker.as_ref(), *to) {
                        Ok(()) => (Found::Open, Verdict::Ok, None),
                        Err(_) if taker.is_none() => {
                            failed(Found::Nobody, "nobody takes it; the daemon's log may say why".to_owned())
                        }
                        Err(why) => failed(Found::Open, why),
                    },
                    (_, Ok(None)) => (Found::Nobody, Verdict::Ok, None),
                    (_, Ok(taker)) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
                }
            }
            Attempt::Borrow { of, at, to } => {
                match self.grounds.borrowed(trial.rule.protocol, &Place::Bridge(of.clone()), at, *to) {
                    Err(why) => unverified(&why),
                    Ok((_, None)) => (Found::Nobody, Verdict::Ok, None),
                    Ok((_, taker)) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
                }
            }
            Attempt::Listed { source, at, to, by } => {
                match (self.grounds.taker_of(trial.rule.protocol, *source, at, *to), by) {
                    (Err(why), _) => unverified(&why),
                    (Ok(taker), Some(by)) => match self.is_right(Some(by), taker.as_ref(), *to) {
                        Ok(()) => (Found::Open, Verdict::Ok, None),
                        Err(_) if taker.is_none() => failed(
                            Found::Nobody,
                            "nobody would get it; the daemon's log may say why".to_owned(),
                        ),
                        Err(why) => failed(Found::Open, why),
                    },
                    (Ok(None), None) => (Found::Nobody, Verdict::Ok, None),
                    (Ok(taker), None) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
                }
            }
            Attempt::Foreign { at, to } => match self.grounds.foreign(trial.rule.protocol, at, *to) {
                Err(why) => unverified(&why),
                Ok((_, None)) => (Found::Nobody, Verdict::Ok, None),
                Ok((_, taker)) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
            },
            Attempt::Wire { within, to } => match self.grounds.wire(within, *to) {
                Err(why) => unverified(&why),
                Ok(None) => (Found::Nobody, Verdict::Ok, None),
                Ok(taker) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
            },
        }
    }

    /// Explains a connection from the LAN that nobody answers although a listener exists. A firewall may
    /// treat a newly created interface differently from the LAN's. Localhost over the wire is excluded: the
    /// kernel stops it, not a firewall.
    fn behind_a_firewall(&self, from: &Place, to: SocketAddr) -> Option<String> {
        if *from != Place::Lan || to.ip().is_loopback() {
            return None;
        }
        let taker = self.grounds.taker(from, to)?;
        Some(format!(
            "only a firewall keeps it closed, and may not do so on every interface: {}; have it listen on \
             127.0.0.1",
            shown(&taker)
        ))
    }

    /// Returns an error with the reason unless the right socket takes the connections to `to`.
    fn is_right(&self, by: Option<&By>, taker: Option<&Listener>, to: SocketAddr) -> Result<(), String> {
        let Some(taker) = taker else { return Err(who_answers(None, to)) };
        match by {
            Some(By::Service(target)) if self.serves(taker, *target) => Ok(()),
            Some(By::Service(target)) => {
                Err(format!("given to {}, not to the service on {target}", shown(taker)))
            }
            Some(By::Relay) => match self.daemon {
                None => Err("the daemon's process cannot be told, and so not its relays".to_owned()),
                Some(daemon) if listeners::is_held_by(taker.inode, daemon) => Ok(()),
                Some(_) => Err(format!("given to {}, which is no relay of the daemon", shown(taker))),
            },
            None => Err("where the rule leads cannot be told".to_owned()),
        }
    }

    /// Returns true if `taker` is the socket that a client on the host would reach at `target`: a listener on
    /// that address, or else on a wildcard address.
    fn serves(&self, taker: &Listener, target: SocketAddr) -> bool {
        let at = |ip: IpAddr| -> Vec<_> {
            let there = SocketAddr::new(ip, target.port());
            let fits = |listener: &&Listener| {
                listener.address == there
                    && listener.bound_interface == 0
                    && (listener.address.is_ipv4() == target.is_ipv4() || !listener.single_family)
            };
            let udp = taker.kind == ListenerKind::Udp;
            let sockets = if udp { &self.sockets } else { &self.listeners };
            sockets.iter().filter(fits).collect()
        };
        let address = target.ip().into();
        let mut found = listening_addresses(&address).map(|ip| at(ip.into()));
        let first = found.find(|there| !there.is_empty());
        first.unwrap_or_default().iter().any(|listener| listener.inode == taker.inode)
    }
}

fn unverified(why: &str) -> (Found, Verdict, Option<String>) {
    (Found::NotTried, Verdict::Unverified, Some(why.to_owned()))
}

fn found(dialled: &Dialled) -> Found {
    match dialled {
        Dialled::Open(_) => Found::Open,
        Dialled::Refused => Found::Refused,
        Dialled::Unreachable => Found::Unreachable,
        Dialled::TimedOut => Found::TimedOut,
        Dialled::NotTried(_) => Found::NotTried,
    }
}

/// Describes the socket that answers although it should not.
fn who_answers(taker: Option<&Listener>, to: SocketAddr) -> String {
    let port = to.port();
    match taker {
        None => "something answers that does not listen on the host: a NAT rule sends it there; \
                 `nft list ruleset` or `iptables -t nat -vnL` shows which"
            .to_owned(),
        Some(taker) if taker.address.ip().is_loopback() => {
            format!("given to {}, though no rule says so; restart the daemon", shown(taker))
        }
        Some(taker) if taker.address.ip().is_unspecified() => format!(
            "the service itself, or something else, listens on all addresses: {}; have it listen on \
             127.0.0.1 (ss -lntup sport = :{port})",
            shown(taker)
        ),
        Some(taker) => format!("somebody listens there: {} (ss -lntup sport = :{port})", shown(taker)),
    }
}

fn shown(listener: &Listener) -> String {
    match listeners::holder(listener.inode) {
        Some(holder) => format!("{holder} on {}", listener.address),
        None => listener.address.to_string(),
    }
}

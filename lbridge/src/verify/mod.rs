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
mod judge;
mod plan;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context as _, bail};
use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::{
    api::protocol::Status,
    host::{interfaces::Interfaces, listeners, netns},
    planning::rule::{Network, Protocol, RuleId},
};

use ground::{Aim, Dialled, Grounds};
use judge::Judge;
use plan::{Attempt, By, Plan, Vantage, plan};

/// Maximum number of connections at the same time; the soft limit of open files is 1,024 nearly everywhere.
const AT_A_TIME: usize = 256;

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
async fn dial_all(plan: &Plan, grounds: &Grounds) -> BTreeMap<(Vantage, SocketAddr), Dialled> {
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

//! firewall: checks what keeps packets from lbridge: netfilter's INPUT chains come first. Tested from the
//! bridges of the rules.

use std::collections::BTreeMap;

use super::{Finding, Host, Level, daemon};
use crate::{
    api::protocol::Status,
    firewall,
    planning::{
        self,
        firewall::{FirewallMode, FirewallState, Opening, ProbeResult, ProbeRoute},
        rule::Protocol,
    },
};

const CHECK: &str = "firewall";

/// Reports rules whose packets the firewall drops. `status` is the daemon's, if it runs.
pub(super) async fn findings(host: &Host, status: Option<&Status>) -> Vec<Finding> {
    if !nix::unistd::geteuid().is_root() {
        return vec![Finding::needs_root(CHECK, "whether the firewall lets the rules' packets in")];
    }
    let openings = openings(host);
    let seen = firewall::examine(&openings).await;
    let mut findings = vec![];
    for (opening, result) in &seen.probe_results {
        match result {
            ProbeResult::Open => {}
            ProbeResult::Dropped => findings.push(dropped(opening, &seen, status)),
            ProbeResult::Unknown(why) => {
                let what = format!("could not test if a firewall drops packets for {opening}: {why}");
                findings.push(Finding::new(CHECK, Level::Note, what));
            }
        }
    }
    if let Some(why) = &seen.unreadable {
        findings.push(Finding::new(CHECK, Level::Note, format!("could not read the ruleset: {why}")));
    }
    if findings.is_empty() {
        let firewalls: Vec<_> = seen.firewall_kinds().iter().map(ToString::to_string).collect();
        let who = if firewalls.is_empty() { "no firewall".to_owned() } else { firewalls.join(", ") };
        let what = match openings.len() {
            0 => format!("{who} on the input hook; there is no rule to test"),
            1 => format!(
                "{who} on the input hook; packets for the one rule's gateway and port arrive (tested)"
            ),
            rules => format!(
                "{who} on the input hook; packets for all {rules} gateways and ports of rules arrive (tested)"
            ),
        };
        findings.push(Finding::ok(CHECK, what));
    }
    findings
}

fn dropped(opening: &Opening, seen: &FirewallState, status: Option<&Status>) -> Finding {
    let remedy = seen.remedy(opening);
    let who = remedy.as_ref().map_or_else(|| "a firewall".to_owned(), |(who, _)| who.to_string());
    let finding = Finding::new(CHECK, Level::Problem, format!("{who} drops packets for {opening}"))
        .because("Packets pass the firewall before lbridge sees them: containers get a timeout.");
    let managed = status.is_some_and(|status| status.firewall.mode == FirewallMode::Manage);
    match remedy {
        Some(_) if managed => {
            finding.type_this(["lbridge status    # which says why lbridge's accept rule does not help"])
        }
        Some((_, Some(command))) if status.is_none() => {
            finding.type_this([format!("{}    # which lets them in; or:", daemon::start()), command])
        }
        Some((_, Some(command))) => finding.type_this([command]),
        Some((_, None)) => finding.type_this(["nft list ruleset    # and let it through there, by hand"]),
        None => finding.type_this([
            "nft list ruleset    # chains on prerouting, bridge and netdev tables; and: bpftool net",
        ]),
    }
}

fn openings(host: &Host) -> BTreeMap<Opening, ProbeRoute> {
    let of_rule = |rule: &super::Wanted| {
        let bridge = host.bridge(&rule.network);
        let (protocol, port) = (rule.spec.protocol, rule.spec.port);
        bridge
            .into_iter()
            .flat_map(move |bridge| planning::firewall::openings(bridge, protocol, port))
            .collect::<Vec<_>>()
    };
    // Only the daemon can tell whether datagrams arrive, and it does: `status` reports it.
    let tcp = host.rules.iter().filter(|rule| rule.spec.protocol == Protocol::Tcp);
    tcp.flat_map(of_rule).collect()
}

//! `status`: prints the daemon's whole status.

use std::fmt::Write as _;

use super::{
    NO_RULES, Table, described, print,
    rules::{dialled, listener_notes, states_of},
    shown,
};
use crate::{
    api::protocol::{DockerStatus, FirewallStatus, KernelDatapath, LabelStatus, RuleStatus, Status},
    cli::Failure,
    planning::firewall::FirewallMode,
};

/// Prints the whole status, for a person at 3 a.m.
pub(in crate::cli) fn status(status: &Status) -> Result<(), Failure> {
    let mut text = format!("lbridge {}\n", shown(&status.version));
    let kernel = &status.kernel;
    let _ = match kernel.path {
        KernelDatapath::Steer => writeln!(
            text,
            "kernel   steers{}{}",
            if kernel.interface_check {
                ""
            } else {
                "; checks source subnets only (interfaces from Linux 5.17 on)"
            },
            if kernel.registers_listeners {
                ""
            } else {
                "; a service that restarts is found while the daemon runs"
            },
        ),
        KernelDatapath::None => {
            writeln!(text, "kernel   does not steer: {}", shown(kernel.why.as_deref().unwrap_or_default()))
        }
    };
    let _ = match &status.docker {
        DockerStatus::Off => writeln!(text, "Docker   not followed (--no-docker)"),
        DockerStatus::Reachable { engine, version } => {
            writeln!(text, "{engine:8} {} answers", shown(version))
        }
        DockerStatus::Away { engine, since, error } => {
            let since = since.map_or_else(String::new, |since| format!(" since {since:.0}"));
            writeln!(text, "{engine:8} away{since}; rules in force stay in force ({})", shown(error))
        }
    };
    text += &firewall_line(&status.firewall);
    if let Some(refused) = &status.refused_reload {
        let error = shown(&refused.error);
        let _ = writeln!(
            text,
            "config   not reloaded since {:.0}; what was read before is in force ({error})",
            refused.since
        );
    }
    text += &label_lines(&status.labels);
    for note in listener_notes(&status.rules) {
        let _ = writeln!(text, "note     {note}");
    }
    text.push('\n');
    if status.rules.is_empty() {
        text += NO_RULES;
        return print(&text);
    }
    let mut table = Table::new(&["NETWORK", "CONTAINERS DIAL", "SERVICE", "SERVED", "STATE"]);
    for range in states_of(&status.rules) {
        let rule = range.first;
        let (network, target) = (shown(&rule.network.to_string()), range.target());
        if rule.gateways.is_empty() {
            let state = described(rule.state, rule.why.as_ref().map(|why| range.said(why)).as_deref());
            table.row([network, format!("port {}", range.ports()), target, "-".to_owned(), state]);
            continue;
        }
        let refused: u64 = range.all.iter().map(|rule| rule.refused).sum();
        for (index, gateway) in rule.gateways.iter().enumerate() {
            let mut state =
                described(gateway.state, gateway.why.as_ref().map(|why| range.said(why)).as_deref());
            if refused > 0 {
                let _ = write!(state, "; {refused} connections over the limit were refused");
            }
            let of_gateway =
                |rule: &RuleStatus| rule.gateways.get(index).map_or(0, |gateway| gateway.connections);
            let alias = gateway.alias.map_or_else(String::new, |alias| format!(" as {alias}"));
            table.row([
                network.clone(),
                range.dialled(gateway.address) + rule.protocol.suffix() + &alias,
                target.clone(),
                range.all.iter().map(of_gateway).sum::<u64>().to_string(),
                state,
            ]);
        }
        for dial in &rule.dials {
            let why = dial.why.as_ref().map(|why| range.said(why));
            table.row([
                network.clone(),
                dialled(dial, range.ports()),
                target.clone(),
                // The gateway counts these connections.
                "-".to_owned(),
                described(dial.state, why.as_deref()),
            ]);
        }
    }
    text += &table.to_text();
    print(&text)
}

/// Lists the problems with labels, the first few; empty if there are none.
fn label_lines(status: &LabelStatus) -> String {
    const MAX: usize = 10;
    let mut text = String::new();
    for problem in status.problems.iter().take(MAX) {
        let _ = writeln!(text, "label    {}", shown(&problem.to_string()));
    }
    let more = status.more_problems + status.problems.len().saturating_sub(MAX);
    if more > 0 {
        let _ = writeln!(text, "label    {more} more problems; `lbridge status --json` has the first");
    }
    text
}

/// Describes the firewall in one line.
fn firewall_line(status: &FirewallStatus) -> String {
    let mut line = match &status.firewalls[..] {
        [] => "firewall nothing that denies".to_owned(),
        firewalls => format!("firewall {}", shown(&firewalls.join(", "))),
    };
    let _ = match (status.mode, status.accept_rules) {
        (FirewallMode::Off, _) => write!(line, "; left alone (firewall = \"off\")"),
        (FirewallMode::Manage, 0) => Ok(()),
        (FirewallMode::Manage, 1) => write!(line, "; 1 accept rule of lbridge's"),
        (FirewallMode::Manage, rules) => write!(line, "; {rules} accept rules of lbridge's"),
    };
    if let Some(why) = &status.unreadable {
        let _ = write!(line, "; could not be read: {}", shown(why));
    }
    if let Some(why) = &status.untried {
        let _ = write!(line, "; could not test if packets arrive: {}", shown(why));
    }
    line.push('\n');
    line
}

//! daemon: checks whether the daemon runs, how it runs, and what it reports of its rules.

use std::{os::unix::net::UnixStream, path::Path};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::{Finding, Level, Options, Wanted};
use crate::{
    api::{
        client::{Client, ClientError},
        protocol::{KernelDatapath, RuleStatus, Status},
    },
    host::processes::{self, Unit},
    kernel::pins,
    planning::{desired::State, rule::DatapathChoice},
};

/// Paths at which the unit may be installed.
const UNIT_FILES: [&str; 3] = [
    "/etc/systemd/system/lbridge.service",
    "/usr/lib/systemd/system/lbridge.service",
    "/lib/systemd/system/lbridge.service",
];

/// The process behind the control socket.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) pid: u32,
    unit: Option<Unit>,
}

/// Finds the process that listens at the control socket, and fetches its status.
pub(super) async fn look(client: &Client) -> (Option<Daemon>, Result<Status, ClientError>) {
    let daemon = UnixStream::connect(client.path()).ok().and_then(|stream| {
        // The process that called listen(); 0 for a process that is not visible from here.
        let pid = getsockopt(&stream, PeerCredentials).ok()?.pid();
        let pid = u32::try_from(pid).ok().filter(|pid| *pid != 0)?;
        Some(Daemon { pid, unit: processes::unit(pid) })
    });
    (daemon, client.status().await)
}

/// Converts a rule from its status; `None` if the target cannot be parsed.
pub(super) fn wanted(rule: &RuleStatus) -> Option<Wanted> {
    let limited = rule.options.max_connections.is_some()
        || rule.options.idle_timeout.is_some()
        || rule.options.proxy_protocol.is_some();
    Some(Wanted {
        network: rule.network.clone(),
        // A target `127.0.0.1:80` may stand for a port of either family; the address family does not matter
        // here.
        spec: format!("{}={}{}", rule.port, rule.target, rule.protocol.suffix()).parse().ok()?,
        steerable: rule.options.path != DatapathChoice::Relay && !limited && !rule.network.is_namespace(),
        user: rule.gateways.iter().find_map(|gateway| Some(gateway.listener_user.as_ref()?.uid)),
    })
}

pub(super) fn findings(
    options: &Options,
    client: &Client,
    daemon: Option<&Daemon>,
    status: &Result<Status, ClientError>,
) -> Vec<Finding> {
    match status {
        Ok(status) => answered(options, daemon, status),
        Err(error) => vec![unanswered(options, client, error)],
    }
}

fn unanswered(options: &Options, client: &Client, error: &ClientError) -> Finding {
    const CHECK: &str = "daemon";
    let socket = client.path().display();
    match error {
        ClientError::Forbidden { .. } => Finding::needs_root(CHECK, "the daemon and its rules"),
        ClientError::Unreachable { .. } => {
            let why = match pins::in_place(&options.bpffs) {
                Ok(true) => "Steered rules stay in force; nothing is relayed, and rules cannot be changed.",
                Ok(false) => "No rule is in force.",
                Err(_) => "Nothing is relayed, and rules cannot be changed.",
            };
            let finding = Finding::new(CHECK, Level::Problem, format!("no daemon at {socket}")).because(why);
            finding.type_this([start()])
        }
        other => Finding::new(CHECK, Level::Problem, other.to_string())
            .type_this(["systemctl restart lbridge.service"]),
    }
}

fn answered(options: &Options, daemon: Option<&Daemon>, status: &Status) -> Vec<Finding> {
    const CHECK: &str = "daemon";
    let mut findings = vec![];
    let unit = daemon.and_then(|daemon| daemon.unit.as_ref());
    let restart = unit.map_or("systemctl restart lbridge.service".to_owned(), |unit| {
        format!("systemctl restart {}", unit.name)
    });
    let (own, its) = (env!("CARGO_PKG_VERSION"), &status.version);
    if own == its {
        let unit = unit.map_or_else(String::new, |unit| format!(" as {}", unit.name));
        findings.push(Finding::ok(CHECK, format!("lbridge {its} runs{unit}")));
    } else {
        let what = format!("the daemon is lbridge {its}, this is {own}");
        let why = "They may not be compatible.";
        findings.push(Finding::new(CHECK, Level::Warning, what).because(why).type_this([restart.clone()]));
    }
    if let (Some(daemon), None) = (daemon, unit) {
        let what = format!("the daemon (process {}) is not a systemd unit", daemon.pid);
        let why = "Nothing starts it again after a crash or a boot. Stop it, and have systemd run it.";
        findings.push(
            Finding::new("systemd", Level::Note, what).because(why).type_this(["lbridge service install"]),
        );
    }
    if status.kernel.path == KernelDatapath::Steer {
        match pins::in_place(&options.bpffs) {
            Ok(true) => {}
            Ok(false) => {
                let what = format!("nothing is pinned below {}", options.bpffs.display());
                let why = "Unless the daemon uses another --bpffs, somebody has removed the pins, and \
                           nothing is steered.";
                findings.push(Finding::new("pins", Level::Problem, what).because(why).type_this([restart]));
            }
            Err(_) => findings.push(Finding::needs_root("pins", "whether the pins are in place")),
        }
    }
    if let Some(why) = &status.kernel.why {
        findings.push(Finding::new("steering", Level::Warning, format!("the daemon does not steer: {why}")));
    }
    findings.extend(status.rules.iter().filter_map(about_rule));
    let bad = status.labels.problems.iter();
    findings.extend(bad.map(|problem| Finding::new("labels", Level::Warning, format!("label of {problem}"))));
    let served =
        status.rules.iter().filter(|rule| matches!(rule.state, State::Steered | State::Relayed)).count();
    if served == status.rules.len() {
        findings.push(match served {
            0 => Finding::new("rules", Level::Note, "there are no rules")
                .type_this(["lbridge allow NETWORK PORT"]),
            1 => Finding::ok("rules", "the one rule is served"),
            all => Finding::ok("rules", format!("all {all} rules are served")),
        });
    }
    findings
}

fn about_rule(rule: &RuleStatus) -> Option<Finding> {
    let (level, state) = match rule.state {
        State::Steered | State::Relayed => return None,
        State::Waiting => (Level::Warning, "waits"),
        State::Blocked => (Level::Problem, "is blocked"),
    };
    let why = rule.why.as_deref().unwrap_or("no reason given");
    Some(Finding::new("rules", level, format!("rule {} {state}: {why}", rule.id())))
}

/// Returns the command that starts a daemon on this host.
pub(super) fn start() -> &'static str {
    if UNIT_FILES.iter().any(|file| Path::new(file).exists()) {
        "systemctl start lbridge.service"
    } else if sd_notify::booted().unwrap_or(false) {
        "lbridge service install"
    } else {
        "lbridge run"
    }
}

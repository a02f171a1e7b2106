//! All output. Names come from elsewhere (networks, remarks), so whatever could act on a terminal is escaped.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    fmt::Write as _,
    io::{self, Write as _},
    net::SocketAddr,
    path::Path,
};

use jiff::{Timestamp, tz::TimeZone};
use nix::unistd::User;
use serde::Serialize;

use super::{
    Failure,
    top::{Look, Relayed},
};
use crate::{
    api::protocol::{
        DockerStatus, Event, FirewallStatus, GatewayStatus, Happening, KernelPath, Reloaded, RuleStatus,
        Status,
    },
    doctor::{self, Level},
    import::{Plan, Standing, Taken},
    planning::{
        explain::{Answer, Explanation, Stage, Step},
        firewall::FirewallMode,
        policy::State,
        rule::{Network, Origin, PathChoice, ProxyProtocol, Source},
    },
    store::config::Config,
    verify::{self, Check, Expected, Found, Verdict},
};

fn print(text: &str) -> Result<(), Failure> {
    print_on(text).map(drop)
}

/// Whether anybody reads on.
fn print_on(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        // `| head` has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to standard output").into()),
    }
}

/// What went wrong: one line, whatever the message holds.
pub(super) fn error(message: &str) {
    eprintln!("lbridge: {}", shown(&message.replace(['\n', '\r'], " ")));
}

/// JSON, for programs.
pub(super) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    text.push('\n');
    print(&text)
}

/// JSON in one line, of many; whether anybody reads on.
pub(super) fn json_line(value: &impl Serialize) -> Result<bool, Failure> {
    print_on(&(serde_json::to_string(value).map_err(anyhow::Error::from)? + "\n"))
}

/// An event in one line, with the local time; whether anybody reads on.
pub(super) fn event(event: &Event) -> Result<bool, Failure> {
    let rule = |network: &Network, port: &u16| format!("{} {port}", shown(&network.to_string()));
    let by = |uid: &Option<u32>| {
        let name = |uid: u32| User::from_uid(uid.into()).ok().flatten().map(|user| shown(&user.name));
        uid.map_or_else(String::new, |uid| match name(uid) {
            Some(name) => format!(" by {name}"),
            None => format!(" by user {uid}"),
        })
    };
    let text = match &event.what {
        Happening::Following { version } => format!("following lbridge {}", shown(version)),
        Happening::Allowed { network, port, uid } => format!("{}: allowed{}", rule(network, port), by(uid)),
        Happening::Denied { network, port, uid } => format!("{}: denied{}", rule(network, port), by(uid)),
        Happening::State { network, port, state, why } => {
            format!("{}: {}", rule(network, port), described(*state, why.as_deref()))
        }
        Happening::Listening { port } => format!("port {port}: a service listens"),
        Happening::Unregistered { port, error } => {
            format!("port {port}: a service listens, which the kernel cannot be given: {}", shown(error))
        }
        Happening::Closed { port } => format!("port {port}: a service listens no more"),
        Happening::Docker { version: Some(version), .. } => format!("Docker {} answers", shown(version)),
        Happening::Docker { version: None, error } => {
            format!("Docker is away ({})", shown(error.as_deref().unwrap_or_default()))
        }
        Happening::Refused { network, port, connections } => {
            format!("{}: {connections} connections over the limit were refused", rule(network, port))
        }
        Happening::Missed { events } => format!("{events} events were missed: this reads too slowly"),
        Happening::Unknown => "something that this version does not know of; see --json".to_owned(),
    };
    print_on(&format!("{} {text}\n", time(event.at)))
}

/// What `allow` brought about, one line for each gateway.
pub(super) fn states(rules: &[RuleStatus]) -> Result<(), Failure> {
    print(&states_text(rules, ""))
}

fn states_text(rules: &[RuleStatus], prefix: &str) -> String {
    let mut text = String::new();
    for rule in rules {
        let what = format!("{prefix}{} {}", shown(&rule.network.to_string()), rule.port);
        let target = shown(&rule.target);
        for gateway in &rule.gateways {
            let (dialled, state) = (
                SocketAddr::new(gateway.address, rule.port),
                described(gateway.state, gateway.why.as_deref()),
            );
            let _ = writeln!(text, "{what}: {dialled} -> {target} {state}");
        }
        if rule.gateways.is_empty() {
            let _ = writeln!(text, "{what}: {target} {}", described(rule.state, rule.why.as_deref()));
        }
    }
    text
}

/// What `reload` brought about.
pub(super) fn reloaded(reloaded: &Reloaded) -> Result<(), Failure> {
    let Reloaded { added, changed, removed, settings } = reloaded;
    let mut text = states_text(added, "added    ");
    text += &states_text(changed, "changed  ");
    for rule in removed {
        let what = format!("{} {}", shown(&rule.network.to_string()), rule.port);
        let _ = writeln!(text, "removed  {what}; open connections go on");
    }
    for setting in settings {
        let _ = writeln!(text, "changed  {}", shown(&setting.to_string()));
    }
    print(if text.is_empty() { "nothing has changed\n" } else { &text })
}

/// What `service` has changed, one line for each.
pub(super) fn changes(changes: &[String]) -> Result<(), Failure> {
    if changes.is_empty() {
        return print("nothing had to be changed\n");
    }
    let lines = changes.iter().map(|change| shown(change) + "\n");
    print(&lines.collect::<String>())
}

/// What `check-config` found. `unread` are rules that could not be compared.
pub(super) fn config(
    path: &Path,
    there: bool,
    config: &Config,
    unread: Option<&Path>,
) -> Result<(), Failure> {
    let mut text = shown(&path.display().to_string());
    let _ = match (there, config.len()) {
        (false, _) => write!(text, " is not there, which is no error: no rules"),
        (true, 0) => write!(text, ": no rules"),
        (true, 1) => write!(text, ": 1 rule"),
        (true, count) => write!(text, ": {count} rules"),
    };
    for (name, value) in config.settings() {
        let _ = write!(text, ", {name} {}", shown(&value));
    }
    if let Some(path) = unread {
        let _ =
            write!(text, "; not compared with {}, which root may read", shown(&path.display().to_string()));
    }
    text.push('\n');
    print(&text)
}

/// What `deny` took back.
pub(super) fn denied(rules: &[RuleStatus]) -> Result<(), Failure> {
    let mut text = String::new();
    for rule in rules {
        let _ = writeln!(
            text,
            "{} {}: denied; open connections go on",
            shown(&rule.network.to_string()),
            rule.port
        );
    }
    print(&text)
}

/// The rules, as they were given.
pub(super) fn rules(rules: &[RuleStatus]) -> Result<(), Failure> {
    if rules.is_empty() {
        return print(NO_RULES);
    }
    let mut table = Table::new(&["NETWORK", "PORT", "TARGET", "SOURCE", "PATH", "FROM", "LIMITS", "COMMENT"]);
    for range in ranges(rules, |_| ()) {
        let rule = range.first;
        table.row([
            shown(&rule.network.to_string()),
            range.ports(),
            range.target(),
            match rule.source {
                Source::Container => "container".to_owned(),
                Source::Loopback => "loopback".to_owned(),
            },
            match rule.path {
                PathChoice::Auto => "auto".to_owned(),
                PathChoice::Steer => "steer".to_owned(),
                PathChoice::Relay => "relay".to_owned(),
            },
            match rule.origin {
                Origin::Cli => "allow".to_owned(),
                Origin::Config => "config".to_owned(),
            },
            options(rule),
            rule.comment.as_deref().map(shown).unwrap_or_default(),
        ]);
    }
    print(&table.to_text())
}

/// Rules of one network for ports that follow each other, which are the same but for that.
struct Range<'a> {
    first: &'a RuleStatus,
    all: &'a [RuleStatus],
}

impl Range<'_> {
    /// `8000-8010`, or a port alone.
    fn ports(&self) -> String {
        self.to_last(self.first.port)
    }

    /// Where it leads, in the same way.
    fn target(&self) -> String {
        shown(&self.said(&self.first.target))
    }

    fn to_last(&self, first: u16) -> String {
        match u16::try_from(self.all.len()) {
            Ok(count @ 2..) => format!("{first}-{}", first.saturating_add(count - 1)),
            _ => first.to_string(),
        }
    }

    /// A text of the first rule's, which may name its ports, said of all of them.
    fn said(&self, text: &str) -> String {
        with_ports(self.first, text, |port| self.to_last(port))
    }
}

/// With other words for the rule's ports, wherever `text` names one behind an address.
fn with_ports(rule: &RuleStatus, text: &str, words: impl Fn(u16) -> String) -> String {
    let target = rule.target.parse::<SocketAddr>().ok().map(|target| target.port());
    let ports = target.into_iter().chain((target != Some(rule.port)).then_some(rule.port));
    ports.fold(text.to_owned(), |text, port| {
        let named = format!(":{port}");
        let mut pieces = text.split(&named);
        let mut told = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            // `:80` is no part of `:8080`.
            let is_other = piece.starts_with(|c: char| c.is_ascii_digit());
            let words = if is_other { port.to_string() } else { words(port) };
            told.extend([":", &words, piece]);
        }
        told
    })
}

/// Folds rules, in their order. `more` is what has to be the same beside what they were given.
fn ranges<K: PartialEq>(rules: &[RuleStatus], more: impl Fn(&RuleStatus) -> K) -> Vec<Range<'_>> {
    // As it would be, were it the port before.
    let follows = |before: &RuleStatus, rule: &RuleStatus| {
        let target = |rule: &RuleStatus| rule.target.parse::<SocketAddr>().ok();
        let leads_on = match (target(before), target(rule)) {
            (Some(a), Some(b)) => a.ip() == b.ip() && a.port().checked_add(1) == Some(b.port()),
            _ => false,
        };
        leads_on
            && before.port.checked_add(1) == Some(rule.port)
            && before.network == rule.network
            && (before.source, before.path, before.origin) == (rule.source, rule.path, rule.origin)
            && before.comment == rule.comment
            && options(before) == options(rule)
            && more(before) == more(rule)
    };
    let runs = rules.chunk_by(follows);
    runs.filter_map(|all| Some(Range { first: all.first()?, all })).collect()
}

/// What only a relay can keep, as `allow` takes it.
fn options(rule: &RuleStatus) -> String {
    let connections = rule.max_connections.map(|max| format!("--max-connections {max}"));
    let idle = rule.idle_timeout.map(|idle| {
        let idle = jiff::SignedDuration::try_from(idle).unwrap_or_default();
        format!("--idle-timeout {idle:#}")
    });
    let proxy = rule.proxy_protocol.map(|version| match version {
        ProxyProtocol::V1 => "--proxy-protocol v1".to_owned(),
        ProxyProtocol::V2 => "--proxy-protocol v2".to_owned(),
    });
    let options: Vec<_> = [connections, idle, proxy].into_iter().flatten().collect();
    if options.is_empty() { "-".to_owned() } else { options.join(" ") }
}

const NO_RULES: &str = "No rules. Allow a network's containers a port: lbridge allow NETWORK PORT\n";

/// Everything, for a person at 3 a.m.
pub(super) fn status(status: &Status) -> Result<(), Failure> {
    let mut text = format!("lbridge {}\n", status.version);
    let kernel = &status.kernel;
    let _ = match kernel.path {
        KernelPath::Steer => writeln!(
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
        KernelPath::None => {
            writeln!(text, "kernel   does not steer: {}", shown(kernel.why.as_deref().unwrap_or_default()))
        }
    };
    let _ = match &status.docker {
        DockerStatus::Off => writeln!(text, "Docker   not followed (--no-docker)"),
        DockerStatus::Reachable { version } => writeln!(text, "Docker   {} answers", shown(version)),
        DockerStatus::Away { since, error } => {
            let since = since.map_or_else(String::new, |since| format!(" since {since:.0}"));
            writeln!(text, "Docker   away{since}; rules in force stay in force ({})", shown(error))
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
    text.push('\n');
    if status.rules.is_empty() {
        text += NO_RULES;
        return print(&text);
    }
    let mut table = Table::new(&["NETWORK", "CONTAINERS DIAL", "SERVICE", "SERVED", "STATE"]);
    let why = |rule: &RuleStatus, why: &Option<String>| {
        why.as_ref().map(|why| with_ports(rule, why, |_| String::new()))
    };
    let state = |rule: &RuleStatus| {
        let gateway = |gateway: &GatewayStatus| {
            (gateway.address, gateway.interface.clone(), gateway.state, why(rule, &gateway.why))
        };
        let gateways: Vec<_> = rule.gateways.iter().map(gateway).collect();
        (rule.state, why(rule, &rule.why), gateways)
    };
    for range in ranges(&status.rules, state) {
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
            let dialled = SocketAddr::new(gateway.address, rule.port).to_string();
            let last = range.ports();
            let last = last.split_once('-').map_or_else(String::new, |(_, last)| format!("-{last}"));
            let of_gateway =
                |rule: &RuleStatus| rule.gateways.get(index).map_or(0, |gateway| gateway.connections);
            table.row([
                network.clone(),
                dialled + &last,
                target.clone(),
                range.all.iter().map(of_gateway).sum::<u64>().to_string(),
                state,
            ]);
        }
    }
    text += &table.to_text();
    print(&text)
}

/// What stands in front of the rules, in a line.
fn firewall_line(status: &FirewallStatus) -> String {
    let mut line = match &status.firewalls[..] {
        [] => "firewall nothing that denies".to_owned(),
        firewalls => format!("firewall {}", firewalls.join(", ")),
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
        let _ = write!(line, "; not tried whether packets arrive: {}", shown(why));
    }
    line.push('\n');
    line
}

/// What `verify` has tried. What should be closed is told in one line for each place and finding.
pub(super) fn verification(report: &verify::Report) -> Result<(), Failure> {
    if report.checks.is_empty() {
        return print(NO_RULES);
    }
    let kind = |check: &Check| {
        let rule = (check.network.clone(), check.port);
        (rule, check.from.clone(), check.expected, check.verdict, check.why.clone())
    };
    let mut lines: Vec<Vec<&Check>> = vec![];
    for check in &report.checks {
        let same = |line: &&mut Vec<&Check>| kind(line[0]) == kind(check);
        match lines.iter_mut().find(same) {
            Some(line) if check.expected == Expected::Closed => line.push(check),
            _ => lines.push(vec![check]),
        }
    }
    let mut table = Table::new(&["RULE", "FROM", "TO", "EXPECTED", "FOUND", "VERDICT"]);
    for line in lines {
        let first = line[0];
        let found: BTreeSet<_> = line.iter().map(|check| found(check.found)).collect();
        let mut to = shown(&first.to);
        if let more @ 1.. = line.len() - 1 {
            let _ = write!(to, " and {more} more");
        }
        table.row([
            format!("{} {}", shown(&first.network.to_string()), first.port),
            shown(&first.from),
            to,
            expected(first.expected).to_owned(),
            found.into_iter().collect::<Vec<_>>().join(", "),
            match (first.verdict, &first.why) {
                (Verdict::Ok, _) => "ok".to_owned(),
                (Verdict::Failed, why) => format!("FAILED ({})", shown(why.as_deref().unwrap_or_default())),
                (Verdict::Unverified, why) => {
                    format!("not verified ({})", shown(why.as_deref().unwrap_or_default()))
                }
            },
        ]);
    }
    let count = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    let all = report.checks.len();
    let summary = match (count(Verdict::Failed), count(Verdict::Unverified)) {
        (0, 0) => format!("Verified: {all} checks, all as they should be."),
        (0, unverified) => format!("NOT verified: {unverified} of {all} checks could not be made."),
        (failed, 0) => format!("FAILED: {failed} of {all} checks."),
        (failed, unverified) => {
            format!("FAILED: {failed} of {all} checks, and {unverified} could not be made.")
        }
    };
    print(&format!("{}\n{summary}\n", table.to_text()))
}

fn expected(expected: Expected) -> &'static str {
    match expected {
        Expected::Open => "open",
        Expected::Refused => "refused",
        Expected::Closed => "closed",
    }
}

fn found(found: Found) -> &'static str {
    match found {
        Found::Open => "open",
        Found::Refused => "refused",
        Found::Unreachable => "unreachable",
        Found::TimedOut => "no answer",
        Found::Nobody => "nobody",
        Found::NotTried => "-",
    }
}

/// What the doctor found, the worst first, each with what to type.
pub(super) fn examination(report: &doctor::Report) -> Result<(), Failure> {
    let mut text = String::new();
    let mut findings: Vec<_> = report.findings.iter().collect();
    findings.sort_by_key(|finding| Reverse(finding.level));
    for finding in findings {
        let word = match finding.level {
            Level::Problem => "PROBLEM",
            Level::Warning => "WARNING",
            Level::Note => "note",
            Level::Ok => "ok",
        };
        let _ = writeln!(text, "{word:8} {}", shown(&finding.what));
        if let Some(why) = &finding.why {
            let _ = writeln!(text, "         {}", shown(why));
        }
        for line in &finding.remedy {
            let _ = writeln!(text, "           {}", shown(line));
        }
    }
    let count = |level| report.findings.iter().filter(|finding| finding.level == level).count();
    let (problems, warnings) = (count(Level::Problem), count(Level::Warning));
    let several = |count: usize| if count == 1 { "" } else { "s" };
    let _ = match (problems, warnings) {
        (0, 0) => writeln!(text, "\nNothing is wrong."),
        (problems, warnings) => writeln!(
            text,
            "\n{problems} problem{}, {warnings} warning{}.",
            several(problems),
            several(warnings)
        ),
    };
    print(&text)
}

/// What an import would do, and what to type.
pub(super) fn import_plan(plan: &Plan) -> Result<(), Failure> {
    let mut text = String::new();
    for taken in &plan.taken {
        let rule = &taken.rule;
        let standing = match &taken.standing {
            Standing::New => String::new(),
            Standing::There => "; there already".to_owned(),
            Standing::Conflict(target) => format!("; CONFLICT: the rule there is leads to {}", shown(target)),
        };
        let _ = writeln!(
            text,
            "{} {}: {} -> {}, from {}{standing}",
            shown(&rule.network.to_string()),
            rule.spec.port,
            SocketAddr::new(taken.gateway, rule.spec.port),
            shown(&rule.spec.target.to_string()),
            shown(&taken.unit),
        );
    }
    text += &left(plan);
    if plan.taken.is_empty() {
        text += "No socat unit is to be turned into a rule.\n";
        return print(&text);
    }
    text += "\nNothing was changed. Services saw 127.0.0.1; they will see containers, unless --source loopback is given.\n\
             Make the rules first:\n  lbridge import --yes\n\
             The kernel asks lbridge before it looks for socat's socket: new connections go to rules that say steered, none\n\
             is refused. Those that socat carries end with it, so stop it when they may:\n";
    text += &disable(plan.taken.iter());
    text += "A rule that has to be relayed says blocked (in use) until socat is stopped, and serves within a second of that.\n";
    text += &firewall(plan);
    print(&text)
}

/// What an import did, and what is left to type. `made` are the new rules, `all` those there are.
pub(super) fn imported(plan: &Plan, made: &[RuleStatus], all: &[RuleStatus]) -> Result<(), Failure> {
    states(made)?;
    let mut text = left(plan);
    if plan.taken.is_empty() {
        text += "No socat unit is to be turned into a rule.\n";
        return print(&text);
    }
    let is_blocked = |taken: &&Taken| {
        let is_its =
            |rule: &&RuleStatus| rule.network == taken.rule.network && rule.port == taken.rule.spec.port;
        all.iter().find(is_its).is_some_and(|rule| rule.state == State::Blocked)
    };
    let (blocked, served): (Vec<_>, Vec<_>) = plan.taken.iter().partition(is_blocked);
    if !served.is_empty() {
        text +=
            "\nNew connections go to lbridge. Those that socat carries end with it; stop it when they may:\n";
        text += &disable(served.into_iter());
    }
    if !blocked.is_empty() {
        text += "\nRules that are blocked by socat's own socket serve within a second of its end; who connects meanwhile is\n\
                 refused:\n";
        text += &disable(blocked.into_iter());
    }
    text += &firewall(plan);
    print(&text)
}

fn left(plan: &Plan) -> String {
    let line = |(unit, why): &(String, String)| format!("{} stays: {}\n", shown(unit), shown(why));
    plan.left.iter().map(line).collect()
}

fn disable<'a>(taken: impl Iterator<Item = &'a Taken>) -> String {
    let line = |taken: &Taken| {
        let unit = shown(&taken.unit);
        if taken.alone {
            format!("  systemctl disable --now {unit}\n")
        } else {
            format!("  systemctl edit --full {unit}    # it runs other commands, too\n")
        }
    };
    let lines: BTreeSet<_> = taken.map(line).collect();
    lines.into_iter().collect()
}

fn firewall(plan: &Plan) -> String {
    let rules: BTreeSet<_> = plan.taken.iter().flat_map(|taken| &taken.ufw).collect();
    if rules.is_empty() {
        return String::new();
    }
    let lines = rules.iter().map(|rule| format!("  ufw {}\n", shown(rule)));
    let start = "\nKeep these; packets pass the firewall before lbridge sees them:\n";
    std::iter::once(start.to_owned()).chain(lines).collect()
}

fn described(state: State, why: Option<&str>) -> String {
    let state = match state {
        State::Steered => "steered",
        State::Relayed => "relayed",
        State::Waiting => "waiting",
        State::Blocked => "blocked",
    };
    match why {
        Some(why) => format!("{state} ({})", shown(why)),
        None => state.to_owned(),
    }
}

/// A connection, step by step.
pub(super) fn explanation(explanation: &Explanation) -> Result<(), Failure> {
    let mut text = String::new();
    let steps = |text: &mut String, steps: &[Step]| {
        for step in steps {
            let mark = match step.verdict {
                Answer::Yes => '+',
                Answer::No => '-',
                Answer::Note => ' ',
            };
            let stage = match step.stage {
                Stage::Network => "network",
                Stage::Rule => "rule",
                Stage::Arrival => "arrival",
                Stage::Firewall => "firewall",
                Stage::Lookup => "lookup",
                Stage::Source => "source",
                Stage::Listener => "listener",
                Stage::Relay => "relay",
                Stage::Host => "host",
                Stage::Peer => "peer",
            };
            let _ = writeln!(text, "{mark} {stage:9} {}", shown(&step.text));
            for detail in &step.details {
                let _ = writeln!(text, "{:14}{}", "", shown(detail));
            }
        }
    };
    steps(&mut text, &explanation.steps);
    for way in &explanation.ways {
        let _ = writeln!(text, "\n{} dials {}", way.source, way.dialled);
        steps(&mut text, &way.steps);
    }
    let _ = writeln!(text, "\n{}; {}", shown(&explanation.outcome), shown(&explanation.remedy));
    print(&text)
}

fn time(at: Timestamp) -> impl std::fmt::Display {
    at.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S")
}

/// Which rules are in use; whether anybody reads on.
pub(super) fn load(look: &Look) -> Result<bool, Failure> {
    print_on(&(load_text(look) + "\n"))
}

/// As [`load`], over what the [`Screen`] showed before, as far as it reaches.
pub(super) fn load_in_place(look: &Look) -> Result<bool, Failure> {
    let text = load_text(look);
    let lines: Vec<_> = text.lines().take(terminal_height()).collect();
    print_on(&(CLEARED.to_owned() + &lines.join("\r\n")))
}

fn load_text(look: &Look) -> String {
    let mut table =
        Table::new(&["NETWORK", "PORT", "STATE", "CONN/S", "TOTAL", "OPEN", "TO SERVICE", "BACK"]);
    for rule in &look.rules {
        let relayed =
            |cell: fn(&Relayed) -> String| rule.relayed.as_ref().map_or_else(|| "-".to_owned(), cell);
        table.row([
            shown(&rule.network.to_string()),
            rule.port.to_string(),
            described(rule.state, None),
            format!("{:.1}", rule.per_second),
            rule.connections.to_string(),
            relayed(|relayed| relayed.open.to_string()),
            relayed(|relayed| bytes(relayed.to_service)),
            relayed(|relayed| bytes(relayed.to_client)),
        ]);
    }
    format!(
        "{}\n{}",
        time(look.at),
        if look.rules.is_empty() { NO_RULES.to_owned() } else { table.to_text() }
    )
}

/// `512`, `1.5 KiB`, `3.0 GiB`.
fn bytes(count: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let Some(unit) = (1..=units.len()).rev().find(|unit| count >> (10 * unit) > 0) else {
        return count.to_string();
    };
    // In tenths, which need no floating point.
    let tenths = (u128::from(count) * 10) >> (10 * unit);
    format!("{}.{} {}", tenths / 10, tenths % 10, units[unit - 1])
}

/// The other screen of a terminal, cursor hidden, long lines cut off (xterm's control sequences, console_codes(4)).
const ENTERED: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEFT: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
const CLEARED: &str = "\x1b[H\x1b[2J";

/// A terminal that is drawn on; as it was before when this is dropped.
pub(super) struct Screen;

impl Screen {
    pub(super) fn enter() -> Result<Self, Failure> {
        print(ENTERED)?;
        Ok(Self)
    }
}

/// Lines that fit.
fn terminal_height() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stdout());
    // A terminal that does not tell is taken for the smallest usual one.
    size.ok().map(|size| usize::from(size.ws_row)).filter(|rows| *rows > 0).unwrap_or(24)
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Whoever it belongs to has gone with it, where this fails.
        let _ = print(LEFT);
    }
}

/// Without anything that a terminal would act on.
fn shown(text: &str) -> String {
    // Bidirectional controls would let a name change how the rest of its line reads.
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let shown = |c: char| if acts(c) { c.escape_default().collect() } else { vec![c] };
    text.chars().flat_map(shown).collect()
}

/// Columns as wide as their widest cell, the last one free.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|&h| h.to_owned()).collect()] }
    }

    fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    fn to_text(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, "{cell:width$}  ");
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_act_on_the_terminal() {
        assert_eq!(shown("a\u{1b}[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(shown("grün"), "grün");
    }

    fn rule(port: u16, target: &str) -> RuleStatus {
        let rule = serde_json::json!({
            "network": "app", "port": port, "target": target, "source": "container", "path": "auto",
            "origin": "cli", "state": "waiting", "why": format!("nothing listens on {target}"), "gateways": [],
        });
        serde_json::from_value(rule).unwrap()
    }

    fn folded(rules: &[RuleStatus]) -> Vec<String> {
        let ranges = ranges(rules, |rule| rule.comment.clone());
        let told = |range: &Range<'_>| {
            format!(
                "{} {} {}",
                range.ports(),
                range.target(),
                range.said(range.first.why.as_deref().unwrap())
            )
        };
        ranges.iter().map(told).collect()
    }

    #[test]
    fn ranges_of_ports_are_folded() {
        let mut rules: Vec<_> = (8000..=8010).map(|port| rule(port, &format!("127.0.0.1:{port}"))).collect();
        assert_eq!(folded(&rules), ["8000-8010 127.0.0.1:8000-8010 nothing listens on 127.0.0.1:8000-8010"]);
        rules[3].comment = Some("another".to_owned());
        assert_eq!(folded(&rules).len(), 3);
        let remapped = [rule(80, "127.0.0.1:8080"), rule(81, "127.0.0.1:8081"), rule(82, "127.0.0.1:8081")];
        assert_eq!(
            folded(&remapped),
            [
                "80-81 127.0.0.1:8080-8081 nothing listens on 127.0.0.1:8080-8081",
                "82 127.0.0.1:8081 nothing listens on 127.0.0.1:8081"
            ]
        );
        let unix = [rule(1, "unix:/run/x:1"), rule(2, "unix:/run/x:1")];
        assert_eq!(folded(&unix).len(), 2);
        assert_eq!(folded(&[]).len(), 0);
        let tail = rule(80, "127.0.0.1:80");
        assert_eq!(with_ports(&tail, "[::1]:80, :8080, :80", |_| "N".to_owned()), "[::1]:N, :8080, :N");
    }

    #[test]
    fn bytes_are_rounded_down() {
        let told = [0, 1023, 1024, 1535, 1536, 1 << 20, (1 << 40) - 1, u64::MAX].map(bytes);
        assert_eq!(told, ["0", "1023", "1.0 KiB", "1.4 KiB", "1.5 KiB", "1.0 MiB", "1023.9 GiB", "15.9 EiB"]);
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["A", "B", "C"]);
        table.row(["long".to_owned(), "x".to_owned(), String::new()]);
        assert_eq!(table.to_text(), "A     B  C\nlong  x\n");
    }
}

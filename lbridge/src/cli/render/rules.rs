//! `allow`, `deny`, `list`: prints the rules and their status. Consecutive ports are folded into a range.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use super::{NO_RULES, Table, described, print, shown};
use crate::{
    api::protocol::{DialStatus, GatewayStatus, ListenerUser, RuleStatus},
    cli::Failure,
    planning::{
        owner::is_regular,
        rule::{Origin, Spelling},
    },
};

/// Prints the result of `allow`, one line per gateway.
pub(in crate::cli) fn states(rules: &[RuleStatus]) -> Result<(), Failure> {
    let notes = listener_notes(rules).into_iter().map(|note| format!("note: {note}\n"));
    print(&(states_text(rules, "") + &notes.collect::<String>()))
}

/// Returns the rules that lead to listeners owned by people: one note per user, which names the first few
/// rules.
pub(super) fn listener_notes(rules: &[RuleStatus]) -> Vec<String> {
    const MAX: usize = 4;
    let mut users: BTreeMap<u32, (&ListenerUser, Vec<Range<'_>>)> = BTreeMap::new();
    for range in states_of(rules) {
        let user = range.first.gateways.iter().find_map(|gateway| gateway.listener_user.as_ref());
        if let Some(user) = user.filter(|user| is_regular(user.uid)) {
            users.entry(user.uid).or_insert((user, vec![])).1.push(range);
        }
    }
    let note = |(user, ranges): (&ListenerUser, Vec<Range<'_>>)| {
        let (listener, belongs) = match ranges.iter().map(|range| range.all.len()).sum() {
            1 => ("listener", "belongs"),
            _ => ("listeners", "belong"),
        };
        let named = ranges.iter().take(MAX).map(|range| format!("{} {}", range.first.network, range.ports()));
        let named = named.collect::<Vec<_>>().join(", ");
        let more = match ranges.len().saturating_sub(MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        shown(&format!("the {listener} of {named}{more} {belongs} to {user}"))
    };
    users.into_values().map(note).collect()
}

pub(super) fn states_text(rules: &[RuleStatus], prefix: &str) -> String {
    let mut text = String::new();
    for range in states_of(rules) {
        let rule = range.first;
        let what = format!("{prefix}{} {}", shown(&rule.network.to_string()), range.ports());
        let target = range.target();
        let told = |state, why: &Option<String>| {
            described(state, why.as_ref().map(|why| range.said(why)).as_deref())
        };
        for gateway in &rule.gateways {
            let state = told(gateway.state, &gateway.why);
            let alias = gateway.alias.map_or_else(String::new, |alias| format!(" as {alias}"));
            let _ = writeln!(text, "{what}: {}{alias} -> {target} {state}", range.dialled(gateway.address));
        }
        for dial in &rule.dials {
            let dialled = dialled(dial, range.ports());
            let _ = writeln!(text, "{what}: {dialled} -> {target} {}", told(dial.state, &dial.why));
        }
        if rule.gateways.is_empty() {
            let _ = writeln!(text, "{what}: {target} {}", told(rule.state, &rule.why));
        }
    }
    text
}

/// Returns the localhost address of a dial, and whose localhost it is.
pub(super) fn dialled(dial: &DialStatus, port: impl std::fmt::Display) -> String {
    let address = match dial.address {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    let containers = if dial.containers == 1 { "container" } else { "containers" };
    format!("{address}:{port} in {} {containers}", dial.containers)
}

/// Prints the rules that `deny` removed.
pub(in crate::cli) fn denied(rules: &[RuleStatus]) -> Result<(), Failure> {
    let mut text = String::new();
    for range in ranges(rules, |_| ()) {
        let what = format!("{} {}", shown(&range.first.network.to_string()), range.ports());
        let _ = match range.first.origin {
            Origin::Label => writeln!(text, "{what}: denied; a label asks for it, too: see `lbridge list`"),
            Origin::Cli | Origin::Config => writeln!(text, "{what}: denied; open connections go on"),
        };
    }
    print(&text)
}

/// Prints the rules as the administrator gave them.
pub(in crate::cli) fn rules(rules: &[RuleStatus]) -> Result<(), Failure> {
    if rules.is_empty() {
        return print(NO_RULES);
    }
    let mut table =
        Table::new(&["NETWORK", "PORT", "TARGET", "SOURCE", "PATH", "ORIGIN", "OPTIONS", "COMMENT"]);
    for range in ranges(rules, |_| ()) {
        let rule = range.first;
        table.row([
            shown(&rule.network.to_string()),
            range.ports(),
            range.target(),
            rule.options.source.to_string(),
            rule.options.path.to_string(),
            match rule.origin {
                Origin::Cli => "allow".to_owned(),
                Origin::Config => "config".to_owned(),
                Origin::Label => "label".to_owned(),
            },
            options(rule),
            rule.options.comment.as_deref().map(shown).unwrap_or_default(),
        ]);
    }
    print(&table.to_text())
}

/// Rules of one network for consecutive ports that are otherwise the same.
pub(super) struct Range<'a> {
    pub(super) first: &'a RuleStatus,
    pub(super) all: &'a [RuleStatus],
}

impl Range<'_> {
    /// Returns `8000-8010`, or a single port.
    pub(super) fn ports(&self) -> String {
        self.to_last(self.first.port) + self.first.protocol.suffix()
    }

    /// Returns the endpoints that containers dial at `gateway`, as a range.
    pub(super) fn dialled(&self, gateway: IpAddr) -> String {
        let first = SocketAddr::new(gateway, self.first.port).to_string();
        let ports = self.to_last(self.first.port);
        first + ports.strip_prefix(&self.first.port.to_string()).unwrap_or_default()
    }

    /// Returns the targets, as a range.
    pub(super) fn target(&self) -> String {
        shown(&self.said(&self.first.target))
    }

    fn to_last(&self, first: u16) -> String {
        match u16::try_from(self.all.len()) {
            Ok(count @ 2..) => format!("{first}-{}", first.saturating_add(count - 1)),
            _ => first.to_string(),
        }
    }

    /// Adapts a text of the first rule, which may name its ports, to all rules of the range.
    pub(super) fn said(&self, text: &str) -> String {
        with_ports(self.first, text, |port| self.to_last(port))
    }
}

/// Like [`ranges`], but folds only rules in the same state.
pub(super) fn states_of(rules: &[RuleStatus]) -> Vec<Range<'_>> {
    let why = |rule: &RuleStatus, why: &Option<String>| {
        why.as_ref().map(|why| with_ports(rule, why, |_| String::new()))
    };
    let state = |rule: &RuleStatus| {
        let gateway = |gateway: &GatewayStatus| {
            let user = gateway.listener_user.as_ref().map(|user| user.uid);
            (gateway.address, gateway.interface.clone(), gateway.state, why(rule, &gateway.why), user)
        };
        let gateways: Vec<_> = rule.gateways.iter().map(gateway).collect();
        let dials = rule.dials.iter().map(|dial| (dial.address, dial.state, why(rule, &dial.why)));
        (rule.state, why(rule, &rule.why), gateways, dials.collect::<Vec<_>>())
    };
    ranges(rules, state)
}

/// Replaces the rule's ports by other words, wherever `text` has one after an address.
pub(super) fn with_ports(rule: &RuleStatus, text: &str, words: impl Fn(u16) -> String) -> String {
    let target = rule.target.parse::<SocketAddr>().ok().map(|target| target.port());
    let ports = target.into_iter().chain((target != Some(rule.port)).then_some(rule.port));
    ports.fold(text.to_owned(), |text, port| {
        let named = format!(":{port}");
        let mut pieces = text.split(&named);
        let mut told = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            // `:80` does not match within `:8080`.
            let is_other = piece.starts_with(|c: char| c.is_ascii_digit());
            let words = if is_other { port.to_string() } else { words(port) };
            told.extend([":", &words, piece]);
        }
        told
    })
}

/// Folds rules into ranges, in their order. Rules are folded only if they and their `more` values are the
/// same.
pub(super) fn ranges<K: PartialEq>(rules: &[RuleStatus], more: impl Fn(&RuleStatus) -> K) -> Vec<Range<'_>> {
    // True if `rule` is what `before` would be, one port further.
    let follows = |before: &RuleStatus, rule: &RuleStatus| {
        let target = |rule: &RuleStatus| rule.target.parse::<SocketAddr>().ok();
        let leads_on = match (target(before), target(rule)) {
            (Some(a), Some(b)) => a.ip() == b.ip() && a.port().checked_add(1) == Some(b.port()),
            _ => false,
        };
        leads_on
            && before.port.checked_add(1) == Some(rule.port)
            && (&before.network, before.protocol) == (&rule.network, rule.protocol)
            && (before.origin, &before.options) == (rule.origin, &rule.options)
            && more(before) == more(rule)
    };
    let runs = rules.chunk_by(follows);
    runs.filter_map(|all| Some(Range { first: all.first()?, all })).collect()
}

/// Returns the options that have no column of their own, as `allow` takes them.
fn options(rule: &RuleStatus) -> String {
    let others = rule.options.given().filter(|(name, _)| !["source", "path", "comment"].contains(name));
    let options: Vec<_> =
        others.map(|(name, value)| shown(&Spelling::Command.option(name, &value))).collect();
    if options.is_empty() { "-".to_owned() } else { options.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planning::desired::State;

    fn rule(port: u16, target: &str) -> RuleStatus {
        let rule = RuleStatus::example("app", port, target, vec![]);
        RuleStatus { state: State::Waiting, why: Some(format!("nothing listens on {target}")), ..rule }
    }

    fn folded(rules: &[RuleStatus]) -> Vec<String> {
        let ranges = ranges(rules, |_| ());
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
        rules[3].options.comment = Some("another".to_owned());
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
}

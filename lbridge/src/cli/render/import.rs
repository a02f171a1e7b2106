//! `import`: prints what an import would do or has done, and what is left to type.

use std::{collections::BTreeSet, fmt::Write as _, net::SocketAddr};

use super::{print, rules::states, shown};
use crate::{
    api::protocol::RuleStatus,
    cli::Failure,
    doctor::quoted,
    import::{Plan, Standing, Taken},
    planning::desired::State,
};

/// Prints what an import would do, and what to type.
pub(in crate::cli) fn import_plan(plan: &Plan) -> Result<(), Failure> {
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
        text += "No socat unit can be turned into a rule.\n";
        return print(&text);
    }
    // Everything is done, except for the administrator's part.
    if plan.taken.iter().all(|taken| taken.standing == Standing::There) {
        text += "\nThe rules are there. Connections that socat carries end with it; stop it when they may:\n";
        text += &disable(plan.taken.iter());
        text += &firewall(plan);
        return print(&text);
    }
    text += "\nNothing was changed. Services saw 127.0.0.1; they will see containers, unless --source \
             loopback is given.\n\
             Make the rules first:\n  lbridge import --yes\n\
             The kernel asks lbridge before it looks for socat's socket: new connections go to rules that \
             say steered, none\n\
             is refused. Those that socat carries end with it, so stop it when they may:\n";
    text += &disable(plan.taken.iter());
    text += "Before Linux 5.17 a rule that has to be relayed is blocked (in use) until socat is stopped, and \
             serves within a second\nof that.\n";
    text += &firewall(plan);
    print(&text)
}

/// Prints what an import did, and what is left to type. `made` are the new rules, `all` the existing ones.
pub(in crate::cli) fn imported(plan: &Plan, made: &[RuleStatus], all: &[RuleStatus]) -> Result<(), Failure> {
    states(made)?;
    let mut text = left(plan);
    if plan.taken.is_empty() {
        text += "No socat unit can be turned into a rule.\n";
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
        text += "\nRules that are blocked by socat's own socket serve within a second of its end; who \
                 connects meanwhile is\n\
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
    let lines: BTreeSet<_> = taken.map(|taken| disable_line(&taken.unit, taken.alone)).collect();
    lines.into_iter().collect()
}

fn disable_line(unit: &str, alone: bool) -> String {
    // The output of systemd-escape contains backslashes, which a shell would remove.
    let unit = quoted(unit);
    let unit = shown(&unit);
    if alone {
        format!("  systemctl disable --now {unit}\n")
    } else {
        format!("  systemctl edit --full {unit}    # it runs other commands, too\n")
    }
}

fn firewall(plan: &Plan) -> String {
    let rules: BTreeSet<_> = plan.taken.iter().flat_map(|taken| &taken.ufw).collect();
    if rules.is_empty() {
        return String::new();
    }
    let lines = rules.iter().map(|rule| format!("  ufw delete {}\n", shown(rule)));
    let start = "\nUFW's rules may go last: within seconds lbridge puts accept rules of its own. With \
                 firewall = \"off\" keep them.\n";
    std::iter::once(start.to_owned()).chain(lines).collect()
}

#[cfg(test)]
mod tests {
    use super::disable_line;

    #[test]
    fn names_cannot_act_on_the_shell() {
        assert_eq!(disable_line("socat-pg.service", true), "  systemctl disable --now socat-pg.service\n");
        for (unit, quoted) in [("socat-a\\x2db.service", "'socat-a\\x2db.service'"), ("a;id", "'a;id'")] {
            assert_eq!(disable_line(unit, true), format!("  systemctl disable --now {quoted}\n"));
        }
    }
}

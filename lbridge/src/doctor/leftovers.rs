//! leftovers: finds what was used before lbridge and is still there.

use std::{collections::BTreeSet, fs, net::SocketAddr, path::Path};

use super::{Finding, Host, Level, quoted};
use crate::{
    host::{
        listeners,
        processes::{self, Process},
    },
    migrate::{socat, ufw, unit},
};

const LETS_IN: &str = "Whoever reaches its address gets in, and looks local to the service.";
const ROUTE_LOCALNET: &str = "/proc/sys/net/ipv4/conf";

pub(super) fn findings(host: &Host) -> Vec<Finding> {
    let mut findings = vec![];
    let socats: Vec<_> = processes::all()
        .into_iter()
        .filter(|process| socat::is_socat(&process.words) && socat::leads_to_loopback(&process.words))
        .collect();
    let numbers: Vec<_> = socats.iter().map(|process| process.pid).collect();
    let units = socat_units(&numbers, &mut findings);
    socat_processes(&socats, &units, &mut findings);
    route_localnet(&mut findings);
    ufw_rules(host, &mut findings);
    findings
}

/// Reports units that run a socat; returns their names.
fn socat_units(socats: &[u32], findings: &mut Vec<Finding>) -> BTreeSet<String> {
    const CHECK: &str = "socat";
    let folders = unit::FOLDERS.map(Path::new);
    let services = match unit::services(&folders) {
        Ok(services) => services,
        Err(error) => {
            findings.push(Finding::new(CHECK, Level::Note, format!("could not read the units: {error}")));
            return BTreeSet::new();
        }
    };
    let running: BTreeSet<_> =
        socats.iter().filter_map(|pid| processes::unit(*pid)).map(|unit| unit.name).collect();
    let mut found = BTreeSet::new();
    for service in services {
        let runs = |command: &Result<Vec<String>, String>| {
            command.as_ref().is_ok_and(|words| socat::is_socat(words) && socat::leads_to_loopback(words))
        };
        // The importer explains commands that cannot be determined.
        let untold = service.name.starts_with("socat") && service.commands.iter().any(Result::is_err);
        if !untold && !service.commands.iter().any(runs) {
            continue;
        }
        let runs_now = running.contains(&service.name);
        let file = Path::new(unit::FOLDERS[0]).join(&service.name);
        findings.push(if service.enabled || runs_now {
            Finding::new(CHECK, Level::Warning, format!("{} runs socat in front of loopback", service.name))
                .because(LETS_IN)
                .type_this(["lbridge import"])
        } else {
            Finding::new(
                CHECK,
                Level::Note,
                format!("{} would run socat in front of loopback; it is disabled", service.name),
            )
            .because("Whoever starts it opens its address again.")
            .type_this([format!(
                "rm {} && systemctl daemon-reload    # if nobody needs it",
                quoted(&file.to_string_lossy())
            )])
        });
        found.insert(service.name);
    }
    found
}

fn socat_processes(all: &[Process], units: &BTreeSet<String>, findings: &mut Vec<Finding>) {
    if !nix::unistd::geteuid().is_root() {
        return findings.push(Finding::needs_root("socat", "the socat processes of others"));
    }
    for process in all {
        // A socat that forks has a child for each connection.
        let is_child = all.iter().any(|other| other.pid == process.parent && other.words == process.words);
        let unit = processes::unit(process.pid);
        if is_child || unit.as_ref().is_some_and(|unit| units.contains(&unit.name)) {
            continue;
        }
        let end = match unit {
            Some(unit) => {
                let user = if unit.of_user { "--user " } else { "" };
                format!("systemctl {user}disable --now {}", quoted(&unit.name))
            }
            None => format!("kill {}", process.pid),
        };
        let what =
            format!("process {} is a socat in front of loopback: {}", process.pid, process.words.join(" "));
        let finding = Finding::new("socat", Level::Warning, what);
        findings.push(finding.because(LETS_IN).type_this(["lbridge allow NETWORK PORT".to_owned(), end]));
    }
}

fn route_localnet(findings: &mut Vec<Finding>) {
    let interfaces = fs::read_dir(ROUTE_LOCALNET).into_iter().flatten().flatten();
    let on = interfaces.filter(|interface| {
        fs::read_to_string(interface.path().join("route_localnet")).is_ok_and(|value| value.trim() != "0")
    });
    let mut on: Vec<_> = on.filter_map(|interface| interface.file_name().into_string().ok()).collect();
    on.sort();
    // The loopback interface needs none of this to be reachable.
    on.retain(|interface| interface != "lo");
    if on.is_empty() {
        return;
    }
    let what = format!("packets for 127.0.0.0/8 are routed from {} (route_localnet)", on.join(", "));
    findings.push(
        Finding::new("route_localnet", Level::Warning, what)
            .because(
                "With a DNAT rule, or an address forged on that link, services on loopback are reached from \
                 outside. lbridge does not need it; Docker without its userland proxy and kube-proxy set it \
                 for themselves.",
            )
            .type_this(on.iter().map(|interface| {
                let name = quoted(&format!("net/ipv4/conf/{interface}/route_localnet=0"));
                format!("sysctl -w {name}")
            })),
    );
}

/// Reports UFW's rules for a bridge's address and a port that neither one of our rules nor any listener
/// needs.
fn ufw_rules(host: &Host, findings: &mut Vec<Finding>) {
    const CHECK: &str = "ufw";
    let Ok(allowed) = ufw::allowed(Path::new(ufw::FOLDER)) else {
        return findings.push(Finding::needs_root(CHECK, "UFW's rules for socat"));
    };
    let listening = listeners::tcp().unwrap_or_default();
    for rule in allowed {
        let (Some((address, port)), Some(words)) = (rule.endpoint(), rule.words()) else { continue };
        let bridge = host.interfaces.iter().filter(|interface| interface.is_bridge);
        let mut bridge = bridge.filter(|bridge| bridge.addresses.iter().any(|(its, _)| *its == address));
        let Some(bridge) = bridge.next() else { continue };
        let is_ours = host.rules.iter().any(|rule| {
            rule.spec.port == port && host.bridge(&rule.network).is_some_and(|its| its.name == bridge.name)
        });
        let used = listening.iter().any(|listener| {
            let there = listener.address;
            there.port() == port && (there.ip() == address || there.ip().is_unspecified())
        });
        if is_ours || used {
            continue;
        }
        let what = format!("UFW allows packets to {}, which no rule serves", SocketAddr::new(address, port));
        let finding =
            Finding::new(CHECK, Level::Note, what).because("It may be left over from an older recipe.");
        findings.push(finding.type_this([format!("ufw delete {words}")]));
    }
}

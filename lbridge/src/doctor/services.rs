//! services: checks the services that rules lead to: how they listen, and who else can reach them.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{Finding, Host, Level, listed, quoted};
use crate::{
    host::{
        holders::processes_of,
        listeners,
        processes::{self, Unit},
        socket_fd::{SocketFdTaker, is_mptcp},
    },
    planning::inventory::Listener,
};

/// The process that holds a listener.
struct Holder {
    /// A description of the process for people.
    name: String,
    unit: Option<Unit>,
    program: Option<String>,
}

pub(super) fn findings(host: &Host) -> Vec<Finding> {
    const CHECK: &str = "services";
    let listeners = match listeners::tcp() {
        Ok(listeners) => listeners,
        Err(error) => return vec![Finding::new(CHECK, Level::Problem, format!("{error:#}"))],
    };
    let is_meant = |listener: &&Listener| {
        let address = listener.address;
        listener.bound_interface == 0
            && host.rules.iter().any(|rule| rule.leads_to(address.ip(), address.port()))
    };
    let mut meant: Vec<_> = listeners.iter().filter(is_meant).collect();
    meant.sort_by_key(|listener| (listener.address.port(), listener.address));
    let inodes: HashSet<_> = meant.iter().map(|listener| listener.inode).collect();
    let holders = processes_of(&inodes.iter().copied().collect()).unwrap_or_default();
    let mut taker = SocketFdTaker::default();
    let mut findings = vec![];
    let mut unseen = false;
    // A group that shares its port is one service.
    let mut told = BTreeSet::new();
    for listener in meant {
        let holder = holder(&holders, listener.inode);
        let rules: Vec<_> = host
            .rules
            .iter()
            .filter(|rule| rule.leads_to(listener.address.ip(), listener.address.port()))
            .collect();
        let names: Vec<_> = rules.iter().map(|rule| format!("{} {}", rule.network, rule.spec.port)).collect();
        if !told.insert((listener.address, holder.name.clone())) {
            continue;
        }
        if let Some(engine @ ("dockerd" | "conmon")) = holder.program.as_deref() {
            findings.push(held_by_the_engine(listener, engine, &names));
        }
        if listener.address.ip().is_unspecified() {
            findings.push(exposed(listener, &holder));
        }
        if rules.iter().any(|rule| rule.steerable) {
            match taker.take(listener.inode, &inodes) {
                Ok(socket) if is_mptcp(&socket) => findings.push(mptcp(listener, &holder, &names)),
                Ok(_) => {}
                Err(_) => unseen = true,
            }
        }
    }
    if unseen && !nix::unistd::geteuid().is_root() {
        findings.push(Finding::needs_root("mptcp", "whether services listen with MPTCP"));
    }
    findings
}

fn holder(holders: &BTreeMap<u64, BTreeSet<u32>>, inode: u64) -> Holder {
    let Some(pid) = holders.get(&inode).and_then(|pids| pids.first()) else {
        return Holder { name: "a service".to_owned(), unit: None, program: None };
    };
    let (program, unit) = (processes::name(*pid), processes::unit(*pid));
    let name = match (&program, &unit) {
        (Some(program), Some(unit)) => format!("{program} ({})", unit.name),
        (Some(program), None) => format!("{program} (process {pid})"),
        (None, _) => format!("process {pid}"),
    };
    Holder { name, unit, program }
}

fn mptcp(listener: &Listener, holder: &Holder, rules: &[String]) -> Finding {
    let what = format!("{} listens on {} with MPTCP", holder.name, listener.address);
    let finding = Finding::new("mptcp", Level::Note, what).because(format!(
        "The kernel cannot steer to it; relayed: {}. In Go programs MPTCP can be turned off.",
        listed(rules)
    ));
    match &holder.unit {
        None => finding.type_this(["GODEBUG=multipathtcp=0    # in the environment that starts it"]),
        Some(unit) => {
            let user = if unit.of_user { "--user " } else { "" };
            finding.type_this([
                format!("systemctl {user}edit {}    # and paste the next two lines", quoted(&unit.name)),
                "[Service]".to_owned(),
                "Environment=GODEBUG=multipathtcp=0".to_owned(),
                format!("systemctl {user}restart {}", quoted(&unit.name)),
            ])
        }
    }
}

fn exposed(listener: &Listener, holder: &Holder) -> Finding {
    let port = listener.address.port();
    let what = format!(
        "{} listens on {}: everybody who reaches this host reaches it",
        holder.name, listener.address
    );
    let finding = Finding::new("exposed", Level::Warning, what);
    let see = format!("ss -ltnp 'sport = :{port}'");
    if holder.program.as_deref() == Some("docker-proxy") {
        return finding
            .because(
                "Rules do not restrict that. Publish the port only on loopback; the rule keeps serving it.",
            )
            .type_this([see, format!("docker run --publish 127.0.0.1:{port}:PORT ...")]);
    }
    let finding = finding.because(
        "Rules do not restrict that: not the LAN, not other networks. Have it bind 127.0.0.1; the rule keeps \
         serving it.",
    );
    let edit = holder.unit.as_ref().map(|unit| {
        let user = if unit.of_user { "--user " } else { "" };
        format!("systemctl {user}cat {}    # its options, and where its configuration is", quoted(&unit.name))
    });
    finding.type_this([Some(see), edit].into_iter().flatten())
}

/// Docker with `userland-proxy: false` and Podman of root (its program `conmon`) listen on published ports to
/// reserve them, but never accept: connections reach the container by NAT.
fn held_by_the_engine(listener: &Listener, engine: &str, rules: &[String]) -> Finding {
    let (client, why) = match engine {
        "dockerd" => ("docker", "its userland proxy is off"),
        _ => ("podman", "Podman publishes ports by NAT"),
    };
    let what = format!("{engine} itself holds {}: {why}", listener.address);
    Finding::new("docker-proxy", Level::Warning, what)
        .because(format!(
            "It holds the port of a published container but answers nobody there, so these rules' \
             connections hang: {}.",
            listed(rules)
        ))
        .type_this([format!(
            "{client} network connect NETWORK CONTAINER    # no rule needed between containers"
        )])
}

//! owners: checks who owns the listeners that rules lead to: people, and other users on the same port.

use std::collections::BTreeMap;

use super::{Finding, Host, Level, Wanted, listed};
use crate::{
    api::protocol::ListenerUser,
    host::{listeners, users},
    planning::{
        inventory::{Inventory, Listener},
        owner::{Sockets, is_regular},
        rule::{Protocol, Rule, Target},
    },
};

pub(super) fn findings(host: &Host) -> Vec<Finding> {
    let has_udp = host.rules.iter().any(|rule| rule.spec.protocol == Protocol::Udp);
    // If the listeners cannot be listed, the checks of services and the daemon report it.
    let inventory = Inventory {
        listeners: listeners::tcp().unwrap_or_default(),
        udp_sockets: if has_udp { listeners::udp().unwrap_or_default() } else { vec![] },
        ..Inventory::default()
    };
    let sockets = Sockets::new(&inventory);
    let user_of = |wanted: &Wanted| {
        wanted.user.or_else(|| sockets.user_of(&Rule::new(wanted.network.clone(), wanted.spec.clone())))
    };
    let owned: Vec<_> = host.rules.iter().filter_map(|wanted| Some((wanted, user_of(wanted)?))).collect();
    let mut findings = people(&owned);
    // A port that several rules lead to is reported once.
    let mut strangers: BTreeMap<_, (&Listener, Vec<String>)> = BTreeMap::new();
    for (wanted, owner) in &owned {
        let beside = |socket: &&Listener| is_beside(wanted, *owner, socket);
        for stranger in inventory.sockets(wanted.spec.protocol).iter().filter(beside) {
            let key = (wanted.spec.protocol, stranger.address, stranger.uid);
            strangers.entry(key).or_insert((stranger, vec![])).1.push(wanted.told());
        }
    }
    findings.extend(strangers.into_values().map(|(stranger, rules)| beside_service(stranger, &rules)));
    findings
}

/// Returns true if a socket has the port of a rule's service but belongs to another user.
fn is_beside(wanted: &Wanted, owner: u32, socket: &Listener) -> bool {
    let port = match wanted.spec.target {
        Target::Port(port) => port,
        // The daemon shows a port of either family with this address. It shows [::1] only if the rule names
        // it.
        Target::Address(target) if target.is_ipv4() => target.port(),
        Target::Address(_) | Target::Unix(_) => return false,
    };
    let bound = socket.address;
    let reaches_localhost = bound.ip().to_canonical().is_loopback() || bound.ip().is_unspecified();
    bound.port() == port && reaches_localhost && socket.bound_interface == 0 && socket.uid != owner
}

/// Reports each person whose listeners rules lead to, in one finding.
fn people(owned: &[(&Wanted, u32)]) -> Vec<Finding> {
    let mut people: BTreeMap<u32, Vec<&Wanted>> = BTreeMap::new();
    for (wanted, uid) in owned.iter().filter(|(_, uid)| is_regular(*uid)) {
        people.entry(*uid).or_default().push(wanted);
    }
    let finding = |(uid, rules): (u32, Vec<&Wanted>)| {
        let (listener, belongs) =
            if rules.len() == 1 { ("listener", "belongs") } else { ("listeners", "belong") };
        let names: Vec<_> = rules.iter().map(|rule| rule.told()).collect();
        let what = format!("the {listener} of {} {belongs} to {}", listed(&names), user(uid));
        let port = rules.first().and_then(|rule| rule.spec.target.port());
        Finding::new("users", Level::Note, what)
            .because(
                "Any program of that user may listen there, and gets what containers send. Ignore this if it \
                 is you on your own machine; else have a service manager bind the port under a system user, \
                 or use a port below 1024.",
            )
            .type_this(port.map(|port| format!("ss -lntup 'sport = :{port}'")))
    };
    people.into_iter().map(finding).collect()
}

fn beside_service(stranger: &Listener, rules: &[String]) -> Finding {
    let (address, port) = (stranger.address, stranger.address.port());
    let what =
        format!("{address} belongs to {}, unlike the service of {}", user(stranger.uid), listed(rules));
    Finding::new("users", Level::Warning, what)
        .because(
            "One user's sockets are the service, and the rules lead nothing there. Clients on the host \
             may reach either.",
        )
        .type_this([format!("ss -lntup 'sport = :{port}'")])
}

fn user(uid: u32) -> ListenerUser {
    ListenerUser { uid, name: users::name(uid) }
}

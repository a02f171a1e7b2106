//! Rules that reach further than a network's gateway, or less far: some containers of it, their localhost,
//! what they call the host, UDP.

use std::{collections::BTreeSet, net::IpAddr};

use lbridge_common::wire::{Entry, SourceKey, UDP};

use super::Host;
use crate::planning::{
    actual::Actual,
    desired::Clients,
    hooks::HookSet,
    inventory::{EngineAvailability, Steering},
    plan::{Step, plan, revocations},
    rule::{DatapathChoice, Source},
};

fn from(host: Host, containers: &[&str], source: Source, path: DatapathChoice) -> Host {
    host.allow_for("app", "80", source, path, containers)
}

/// Containers on two networks, and a service.
fn crowd() -> Host {
    let host = Host::new().network("db", "br-db").bridge("br-db", 8, &["172.19.0.1/16"]);
    host.listens("127.0.0.1:80")
        .container("web", &[("app", &["172.18.0.2"]), ("db", &["172.19.0.2"])])
        .container("api", &[("app", &["172.18.0.3"])])
        .container("far", &[("db", &["172.19.0.3"])])
        .container("odd", &[("app", &["172.20.0.9"])])
}

#[test]
fn a_rule_for_some_containers_lists_their_addresses() {
    let host = from(crowd(), &["web", "api"], Source::Container, DatapathChoice::Auto);
    assert_eq!(host.states(), ["172.18.0.1:80 steered (for api, web)"]);
    let desired = host.desired();
    let (key, entry) = desired.kernel.entries.first_key_value().unwrap();
    assert_eq!(entry.flags, Entry::LISTED);
    let source = |ip: &str| SourceKey { entry: *key, source: ip.parse::<IpAddr>().unwrap().into() };
    assert_eq!(desired.kernel.sources, [source("172.18.0.2"), source("172.18.0.3")].into());

    let relayed = from(crowd(), &["web"], Source::Container, DatapathChoice::Relay);
    assert_eq!(relayed.states(), ["172.18.0.1:80 relayed (as the rule asks; for web)"]);
    let desired = relayed.desired();
    let clients = &desired.relays.first_key_value().unwrap().1.clients;
    assert_eq!(*clients, Clients::Listed(["172.18.0.2".parse().unwrap()].into()));
    let (key, entry) = desired.kernel.entries.first_key_value().unwrap();
    assert_eq!(entry.flags, Entry::LISTED | Entry::RELAYED);
    assert_eq!(desired.kernel.sources, [SourceKey { entry: *key, ..source("172.18.0.2") }].into());
}

#[test]
fn a_rule_for_containers_that_are_not_there_is_for_nobody() {
    for path in [DatapathChoice::Auto, DatapathChoice::Relay] {
        let mut host = from(crowd(), &["far", "odd", "gone"], Source::Container, path);
        host.inventory.container_names = vec!["shop-gone-1".to_owned(), "web".to_owned()];
        let missing = "container far is not on app, but on db; no container gone; did you mean shop-gone-1?; \
                       container odd has no IPv4 address on the network of 172.18.0.1";
        assert_eq!(host.states(), [format!("172.18.0.1:80 waiting ({missing})")]);
        let desired = host.desired();
        assert!(desired.relays.is_empty() && desired.kernel.sources.is_empty());
        // In the kernel the entry keeps everybody from whoever else listens there.
        assert!(desired.kernel.entries.values().all(|entry| entry.flags == Entry::LISTED));
        assert_eq!(desired.kernel.entries.len(), usize::from(path == DatapathChoice::Auto));
    }
}

#[test]
fn a_rule_serves_those_of_its_containers_that_are_there() {
    let mut host = from(crowd(), &["web", "api"], Source::Container, DatapathChoice::Auto);
    host.inventory.containers.get_mut("api").unwrap().as_mut().unwrap().running = false;
    assert_eq!(host.states(), ["172.18.0.1:80 steered (for web; container api is not running)"]);
    host.inventory.containers.insert("api".to_owned(), Err("Docker says: no".to_owned()));
    assert_eq!(host.states(), ["172.18.0.1:80 steered (for web; container api: Docker says: no)"]);
    host.inventory.listeners.clear();
    assert_eq!(
        host.states(),
        ["172.18.0.1:80 waiting (nothing listens on 127.0.0.1:80; for web; container api: Docker says: no)"]
    );
    host.inventory.containers.clear();
    host.inventory.docker = EngineAvailability::Away;
    let unknown = |name| format!("the engine does not answer, and container {name} was not seen before");
    let why = format!("nothing listens on 127.0.0.1:80; {}; {}", unknown("api"), unknown("web"));
    assert_eq!(host.states(), [format!("172.18.0.1:80 waiting ({why})")]);
}

#[test]
fn networks_of_one_name_are_told_by_their_id() {
    let mut host = from(crowd(), &["web"], Source::Container, DatapathChoice::Auto);
    // Another network was called so when the container joined it.
    let web = host.inventory.containers.get_mut("web").unwrap().as_mut().unwrap();
    web.attachments[0].id = Some("ff".repeat(32));
    assert_eq!(host.states(), ["172.18.0.1:80 waiting (container web is not on app, but on app and db)"]);
}

#[test]
fn a_bridges_containers_are_those_of_its_docker_network() {
    let on_bridge = |bridge: &str, docker| {
        let mut host = crowd().bridge("br-own", 9, &["10.9.0.1/24"]);
        host.inventory.docker = docker;
        if docker == EngineAvailability::Off {
            host.inventory.docker_networks.clear();
        }
        let host = host.allow_for(bridge, "80", Source::Container, DatapathChoice::Auto, &["web"]);
        host.states().remove(0)
    };
    let here = EngineAvailability::Reachable;
    assert_eq!(on_bridge("bridge:br-app", here), "172.18.0.1:80 steered (for web)");
    assert_eq!(
        on_bridge("bridge:br-own", here),
        "bridge:br-own 80 blocked (br-own is no bridge of the engine's networks, so no container's address \
         is known there; leave out --from)"
    );
    assert_eq!(
        on_bridge("bridge:br-app", EngineAvailability::Off),
        "bridge:br-app 80 blocked (the daemon runs with --no-docker and knows no container's address; leave \
         out --from)"
    );
}

/// Whoever is let in is known before the entry, and who leaves is out before anything else is done.
#[test]
fn an_entry_is_never_open_to_those_that_it_is_not_for() {
    let all = crowd().allow("app", "80");
    let some = from(crowd(), &["web"], Source::Container, DatapathChoice::Auto);
    let other = from(crowd(), &["api"], Source::Container, DatapathChoice::Auto);
    let steps = |before: &Host, after: &Host| {
        let desired = before.desired();
        let actual = Actual { kernel: desired.kernel, ..Actual::default() };
        let steps = plan(&after.desired(), &actual).into_iter();
        let told = steps.filter_map(|step| match step {
            Step::PutEntry(..) => Some("put"),
            Step::RemoveEntry(_) => Some("remove"),
            Step::AddSource(_) => Some("add source"),
            Step::RemoveSource(_) => Some("remove source"),
            _ => None,
        });
        told.collect::<Vec<_>>()
    };
    assert_eq!(steps(&all, &some), ["add source", "put"]);
    assert_eq!(steps(&some, &all), ["put", "remove source"]);
    assert_eq!(steps(&some, &other), ["remove source", "add source"]);
    assert_eq!(steps(&some, &Host::new()), ["remove", "remove source"]);
}

/// It needs nothing new, and so does not wait for the firewall; what something else replaces does.
#[test]
fn what_only_takes_access_away_comes_first() {
    let by = |path, containers: &[&str]| from(crowd(), containers, Source::Container, path);
    let first = |before: &Host, after: &Host| {
        let desired = before.desired();
        let actual = Actual { kernel: desired.kernel, relays: desired.relays, ..Actual::default() };
        let (steps, revocations) = (plan(&after.desired(), &actual), revocations(&after.desired(), &actual));
        assert!(steps.starts_with(&revocations), "{steps:?}");
        let told = revocations.into_iter().map(|step| match step {
            Step::RemoveEntry(_) => "remove entry".to_owned(),
            Step::RemoveSource(key) => format!("remove {}", IpAddr::from(key.source)),
            Step::RemoveOverride((key, _)) => format!("remove the view of {}", IpAddr::from(key.peer)),
            Step::CloseRelay { handed_over, .. } => format!("close relay, handed over: {handed_over}"),
            Step::OpenRelay(_, spec) => format!("{:?}", spec.clients),
            step => panic!("{step:?}"),
        });
        told.collect::<Vec<_>>()
    };
    let (steer, relay) = (DatapathChoice::Auto, DatapathChoice::Relay);
    assert_eq!(first(&by(steer, &["web"]), &by(steer, &["api"])), ["remove 172.18.0.2"]);
    assert_eq!(first(&by(steer, &["web"]), &Host::new()), ["remove entry"]);
    let narrowed = first(&by(relay, &["web", "api"]), &by(relay, &["api"]));
    assert_eq!(narrowed, ["remove 172.18.0.2", "Listed({172.18.0.3})"]);
    let nobody = first(&by(relay, &["web"]), &by(relay, &["far"]));
    assert_eq!(nobody, ["remove entry", "close relay, handed over: false"]);
    assert_eq!(
        first(&crowd().allow_with("app", "80", Source::Container, relay), &by(relay, &["web"])),
        ["Listed({172.18.0.2})"]
    );
    let local = |containers: &[&str]| from(crowd(), containers, Source::Loopback, steer);
    let views = ["remove 172.18.0.2", "remove the view of 172.18.0.2"];
    assert_eq!(first(&local(&["web", "api"]), &local(&["api"])), views);
    for (before, after) in [(steer, relay), (relay, steer)] {
        assert_eq!(
            first(&by(before, &["web"]), &by(after, &["web"])),
            [""; 0],
            "one makes way for the other"
        );
    }
}

#[test]
fn localhost_leads_to_the_gateway_that_serves_best() {
    let dual =
        || Host::new().network("dual", "br-dual").bridge("br-dual", 9, &["172.20.0.1/16", "fd00::1/64"]);
    let one = Host::new().listens("127.0.0.1:80").allow("app", "80").with_localhost("app", 80);
    assert_eq!(one.dials(), ["127.0.0.1:80 to 172.18.0.1 steered", "[::1]:80 to 172.18.0.1 steered"]);
    let both =
        dual().listens("127.0.0.1:80").listens("[::1]:80").allow("dual", "80").with_localhost("dual", 80);
    assert_eq!(both.dials(), ["127.0.0.1:80 to 172.20.0.1 steered", "[::1]:80 to fd00::1 steered"]);
    // IPv6 would be relayed.
    let four = dual().listens("127.0.0.1:80").allow("dual", "80").with_localhost("dual", 80);
    assert_eq!(four.dials(), ["127.0.0.1:80 to 172.20.0.1 steered", "[::1]:80 to 172.20.0.1 steered"]);
    let waits = dual().allow("dual", "80").with_localhost("dual", 80);
    assert_eq!(waits.dials(), ["127.0.0.1:80 to 172.20.0.1 steered", "[::1]:80 to fd00::1 steered"]);
    let six = Host::new().network("six", "br-six").bridge("br-six", 9, &["fd00::1/64"]);
    let six = six.listens("[::1]:80").allow("six", "80").with_localhost("six", 80);
    assert_eq!(six.dials(), ["[::1]:80 to fd00::1 steered"], "an IPv4 socket gets to no IPv6 gateway");
}

#[test]
fn localhost_leads_nowhere_where_nothing_is_served() {
    let second = Host::new().listens("127.0.0.1:80").allow("bridge:br-app", "80").allow("app", "80=81");
    let second = second.with_localhost("bridge:br-app", 80);
    let nowhere = "blocked (no gateway of the rule is served)";
    // Of two names of one bridge the first has the port.
    assert_eq!(second.dials(), [format!("127.0.0.1:80 {nowhere}"), format!("[::1]:80 {nowhere}")]);
    assert!(second.desired().kernel.redirects.is_empty());
    let gone = Host::new().allow("gone", "80").with_localhost("gone", 80);
    assert!(gone.dials().is_empty() && gone.desired().kernel.hooks[HookSet::Connect]);
    let mut old = Host::new().listens("127.0.0.1:80").allow("app", "80").with_localhost("app", 80);
    old.features.hooks[HookSet::Connect] = Err("needs Linux 5.14".to_owned());
    assert_eq!(old.states(), ["172.18.0.1:80 steered"], "the gateway is served all the same");
    assert_eq!(
        old.dials(),
        [
            "127.0.0.1:80 to 172.18.0.1 blocked (needs Linux 5.14)",
            "[::1]:80 to 172.18.0.1 blocked (needs Linux 5.14)"
        ]
    );
    assert!(old.desired().kernel.redirects.is_empty() && !old.desired().kernel.hooks[HookSet::Connect]);
}

/// Their neighbours' localhost is their neighbours'.
#[test]
fn localhost_of_some_containers_is_theirs_alone() {
    let mut host =
        crowd().allow_for("app", "80", Source::Container, DatapathChoice::Auto, &["web", "api", "far"]);
    host = host.with_localhost("app", 80);
    let waiting = "waiting (none of the rule's containers runs on this network)";
    assert_eq!(host.dials()[0], format!("127.0.0.1:80 to 172.18.0.1 {waiting}"), "not seen yet");
    for (name, netns) in [("web", 41), ("api", 42), ("far", 43)] {
        host.inventory.containers.get_mut(name).unwrap().as_mut().unwrap().netns = Some(netns);
    }
    let whose =
        |host: &Host| host.desired().kernel.redirects.keys().map(|key| key.netns).collect::<BTreeSet<_>>();
    assert_eq!(whose(&host), [41, 42].into(), "far is on another network");
    host.inventory.containers.get_mut("api").unwrap().as_mut().unwrap().running = false;
    assert_eq!(whose(&host), [41].into());
    let all = crowd().allow("app", "80").with_localhost("app", 80);
    assert_eq!(whose(&all), [0].into());
}

#[test]
fn what_is_dialled_is_named_where_that_can_be() {
    let mut host = Host::new().listens("127.0.0.1:80").allow("app", "80").with_localhost("app", 80);
    assert!(host.desired().kernel.hooks[HookSet::Names]);
    host.features.hooks[HookSet::Names] = Err("none".to_owned());
    assert!(
        !host.desired().kernel.hooks[HookSet::Names] && host.desired().kernel.redirects.len() == 2,
        "it is served all the same"
    );
}

/// Docker's own bridge, another network, and services.
fn beside_docker0() -> Host {
    let host = Host::new().network("bridge", "docker0").bridge("docker0", 3, &["172.17.0.1/16"]);
    let host = host.network("db", "br-db").bridge("br-db", 8, &["172.19.0.1/16"]);
    host.listens("127.0.0.1:80").listens("127.0.0.1:81")
}

#[test]
fn what_docker_calls_the_host_is_served_as_the_gateway() {
    let host = beside_docker0().allow("app", "80").allow("db", "80=81").allow("bridge", "80");
    assert_eq!(
        host.states(),
        [
            "172.18.0.1:80 steered",
            "172.17.0.1:80 steered",
            // Its own.
            "172.17.0.1:80 steered",
            "172.19.0.1:80 steered",
            "172.17.0.1:80 steered",
        ]
    );
    let desired = host.desired();
    let at_alias =
        desired.kernel.entries.values().filter(|e| IpAddr::from(e.key.gateway).to_string() == "172.17.0.1");
    let told: Vec<_> = at_alias
        .map(|entry| (entry.key.ifindex, IpAddr::from(entry.subnet).to_string(), entry.target_port))
        .collect();
    let subnet = |ip: &str| ip.to_owned();
    assert_eq!(
        told,
        [(3, subnet("172.17.0.0"), 80), (7, subnet("172.18.0.0"), 80), (8, subnet("172.19.0.0"), 81)]
    );
    let via: Vec<_> = desired.openings.values().filter_map(|link| link.via).collect();
    assert_eq!(via, ["172.18.0.1", "172.19.0.1"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    let relays = beside_docker0().allow_with("app", "80", Source::Container, DatapathChoice::Relay);
    let relays = relays.allow_with("db", "80", Source::Container, DatapathChoice::Relay).desired().relays;
    assert_eq!(relays.keys().filter(|key| key.address.ip().to_string() == "172.17.0.1").count(), 2);
}

#[test]
fn only_addresses_of_the_host_are_aliases() {
    let with = |host_gateways: &[&str], aliases: &[&str]| {
        let mut host = Host::new().listens("127.0.0.1:80").allow("app", "80").allow("bridge:br-own", "80");
        host = host.bridge("br-own", 9, &["10.9.0.1/24"]).bridge("eth0", 2, &["10.0.0.5/24", "fd00::5/64"]);
        host = host.bridge("lo", 1, &["10.1.1.1/32"]);
        host.inventory.host_gateways = host_gateways.iter().map(|ip| ip.parse().unwrap()).collect();
        host.inventory.aliases = aliases.iter().map(|ip| ip.parse().unwrap()).collect();
        host.states()
    };
    let (app, own) = ("172.18.0.1:80 steered", "10.9.0.1:80 steered");
    // Of another family, nobody's, and loopback's.
    assert_eq!(with(&["fd00::5", "192.0.2.1"], &["10.1.1.1"]), [app, own]);
    let alias = "10.0.0.5:80 steered";
    assert_eq!(with(&["10.0.0.5"], &[]), [app, alias, own], "which is no network of Docker's");
    assert_eq!(with(&[], &["10.0.0.5"]), [app, alias, own, alias]);
    assert_eq!(with(&[], &["172.18.0.1"]), [app, own, "172.18.0.1:80 steered"]);
}

/// By the subnet alone an entry at one address can be one network's.
#[test]
fn an_alias_goes_to_the_first_where_the_interface_is_not_told() {
    let mut host =
        beside_docker0().allow("app", "80").allow("db", "80").allow("db", "81").allow("bridge", "81");
    host.features.steer = Ok(Steering { interface_check: false, kernel_registers: true });
    let taken = |port, dial| {
        format!(
            "172.17.0.1:{port} blocked (another network's rule has 172.17.0.1:{port}, and this kernel \
             (before Linux 5.17) cannot tell the bridges apart; dial {dial})"
        )
    };
    assert_eq!(
        host.states(),
        [
            "172.18.0.1:80 steered".to_owned(),
            "172.17.0.1:80 steered".to_owned(),
            "172.17.0.1:81 steered".to_owned(),
            "172.19.0.1:80 steered".to_owned(),
            taken(80, "172.19.0.1"),
            "172.19.0.1:81 steered".to_owned(),
            taken(81, "172.19.0.1"),
        ]
    );
}

#[test]
fn an_alias_is_for_the_named_containers_alone() {
    let host = beside_docker0().container("web", &[("app", &["172.18.0.2"])]);
    let host = host.allow_for("app", "80", Source::Loopback, DatapathChoice::Auto, &["web"]);
    assert_eq!(host.states(), ["172.18.0.1:80 steered (for web)", "172.17.0.1:80 steered (for web)"]);
    let desired = host.desired();
    assert_eq!((desired.kernel.sources.len(), desired.kernel.overrides.len()), (2, 2));
    assert!(desired.kernel.entries.values().all(|entry| entry.flags == Entry::LISTED));
}

#[test]
fn udp_is_steered_to_udp_sockets_alone() {
    let host = || Host::new().allow("app", "53/udp");
    let waiting = ["172.18.0.1:53 waiting (nothing listens on 127.0.0.1:53)"];
    assert_eq!(host().listens("127.0.0.1:53").states(), waiting);
    let host = host().takes_datagrams("127.0.0.1:53");
    assert_eq!(host.states(), ["172.18.0.1:53 steered"]);
    let desired = host.desired();
    assert!(desired.listeners.keys().all(|key| key.protocol == UDP));
    let opening = desired.openings.keys().next().unwrap();
    assert_eq!(opening.to_string(), "172.18.0.1 port 53/udp from br-app");
    // Both of one port.
    let both = host.allow("app", "53").listens("127.0.0.1:53");
    assert_eq!(both.states(), ["172.18.0.1:53 steered", "172.18.0.1:53 steered"]);
    assert_eq!((both.desired().kernel.entries.len(), both.desired().openings.len()), (2, 2));
}

/// Replies to the subnet leave from the gateway, what the host's own addresses get leaves as it is.
#[test]
fn udp_replies_leave_from_the_gateway() {
    let host = Host::new().takes_datagrams("127.0.0.1:53").allow("app", "53/udp");
    let desired = host.desired();
    let told: Vec<_> = desired
        .kernel
        .reply_sources
        .iter()
        .map(|((key, bits), reply)| {
            (IpAddr::from(key.peer).to_string(), bits - 160, IpAddr::from(reply.gateway))
        })
        .collect();
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    assert_eq!(
        told,
        [("172.18.0.0".to_owned(), 112, ip("172.18.0.1")), ("172.18.0.1".to_owned(), 128, ip("::"))]
    );
    // Nothing tells which of two addresses was dialled.
    let two = Host::new().takes_datagrams("127.0.0.1:53").bridge("br-2", 8, &["10.1.0.1/24", "10.1.0.9/24"]);
    assert_eq!(
        two.allow("bridge:br-2", "53/udp").states(),
        [
            "10.1.0.1:53 steered",
            "10.1.0.9:53 blocked (UDP replies to one subnet come from one address, 10.1.0.1; dial \
             that)"
        ]
    );
}

#[test]
fn udp_is_never_relayed() {
    let mut host = Host::new().takes_datagrams("[::1]:53").allow("app", "53/udp");
    let blocked = "172.18.0.1:53 blocked (IPv4 was dialled, the service listens on [::1]:53)";
    assert_eq!(host.states(), [blocked]);
    host.features.steer = Ok(Steering { interface_check: false, kernel_registers: false });
    assert_eq!(
        host.states(),
        ["172.18.0.1:53 blocked (UDP needs Linux 5.17: this kernel cannot check which bridge a datagram \
             arrives on)"]
    );
    host.features.steer = Err("none".to_owned());
    assert_eq!(host.states(), ["172.18.0.1:53 blocked (none)"]);
    host.features.steer = Ok(Steering { interface_check: true, kernel_registers: true });
    host.inventory.udp_unseen = Some("cannot list UDP sockets".to_owned());
    assert_eq!(host.states(), ["172.18.0.1:53 blocked (cannot list UDP sockets)"]);
    assert!(host.desired().relays.is_empty() && host.desired().kernel.reply_sources.is_empty());
}

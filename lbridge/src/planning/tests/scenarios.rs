use std::{collections::BTreeSet, net::IpAddr};

use lbridge_common::wire::{Address, Endpoint, Entry, TCP, TargetKey};

use super::{Host, br_app, in_force};
use crate::planning::{
    actual::Actual,
    desired::{Clients, RelayKey, Service},
    firewall::{FirewallState, ProbeResult},
    hooks::HookSet,
    inventory::{EngineAvailability, ListenerKind, NetnsUnavailable, Steering},
    plan::{Step, plan},
    rule::{DatapathChoice, Origin, Rules, Source},
};

const MPTCP: &str =
    "the service listens with MPTCP; GODEBUG=multipathtcp=0 in a Go service's environment gets it steered";

#[test]
fn a_loopback_service_is_steered_to() {
    let host = Host::new().listens("127.0.0.1:5432").allow("app", "5432");
    assert_eq!(host.states(), ["172.18.0.1:5432 steered"]);
    let desired = host.desired();
    let (key, value) = desired.kernel.entries.first_key_value().unwrap();
    assert_eq!((IpAddr::from(key.gateway), key.ifindex, key.port), ("172.18.0.1".parse().unwrap(), 7, 5432));
    assert_eq!(IpAddr::from(value.subnet), "172.18.0.0".parse::<IpAddr>().unwrap());
    assert!(
        desired.relays.is_empty()
            && !desired.kernel.hooks[HookSet::Names]
            && desired.kernel.overrides.is_empty()
    );
}

#[test]
fn a_service_that_is_down_has_its_entry_ready() {
    let host = Host::new().allow("app", "80=3000");
    assert_eq!(host.states(), ["172.18.0.1:80 waiting (nothing listens on 127.0.0.1:3000)"]);
    assert_eq!(host.desired().kernel.entries.len(), 1);
    let target = |address: &str| TargetKey {
        address: address.parse::<IpAddr>().unwrap().into(),
        port: 3000,
        protocol: TCP.into(),
    };
    assert_eq!(host.desired().kernel.targets, ["127.0.0.1", "::1", "0.0.0.0", "::"].map(target).into());
}

#[test]
fn wildcards_serve_and_loopback_comes_first() {
    for address in ["0.0.0.0:80", "[::]:80"] {
        assert_eq!(Host::new().listens(address).allow("app", "80").states(), ["172.18.0.1:80 steered"]);
    }
    let both = Host::new().listens("0.0.0.0:80").listens("127.0.0.1:80").allow("app", "80");
    assert_eq!(both.desired().listeners.len(), 2);
    let elsewhere = Host::new().listens("192.168.1.5:80").listens("127.0.0.2:80").allow("app", "80");
    assert_eq!(elsewhere.states(), ["172.18.0.1:80 waiting (nothing listens on 127.0.0.1:80)"]);
    assert!(elsewhere.desired().listeners.is_empty());
}

#[test]
fn what_the_kernel_cannot_take_is_relayed_with_the_reason() {
    let mptcp = Host::new().listens_as("127.0.0.1:80", ListenerKind::Mptcp).allow("app", "80");
    assert_eq!(mptcp.states(), [format!("172.18.0.1:80 relayed ({MPTCP})")]);
    let desired = mptcp.desired();
    assert!(
        desired.kernel.entries.values().all(|entry| entry.flags == Entry::RELAYED),
        "the entry leads to the relay"
    );
    assert!(desired.relays.values().all(|relay| relay.by_entry) && desired.listeners.is_empty());
    let mut old = mptcp;
    old.features.steer = Ok(Steering { interface_check: false, kernel_registers: false });
    assert!(old.desired().kernel.entries.is_empty(), "an entry would refuse what the relay is to serve");
    assert!(old.desired().relays.values().all(|relay| !relay.by_entry));

    let v6 = Host::new().listens("[::1]:80").allow("app", "80");
    assert_eq!(v6.states(), ["172.18.0.1:80 relayed (IPv4 was dialled, the service listens on [::1]:80)"]);
    assert!(
        v6.desired().kernel.hooks[HookSet::Names],
        "the service must not take the container for a local client"
    );

    let mut old = Host::new().listens("127.0.0.1:80").allow("app", "80");
    old.features.steer = Err("no sk_lookup".to_owned());
    old.features.hooks[HookSet::Names] = Err("no hooks".to_owned());
    assert_eq!(old.states(), ["172.18.0.1:80 relayed (no sk_lookup)"]);
    assert!(!old.desired().kernel.hooks[HookSet::Names]);
}

#[test]
fn a_plain_listener_beside_an_mptcp_one_is_steered_to() {
    let host =
        Host::new().listens_as("0.0.0.0:80", ListenerKind::Mptcp).listens("127.0.0.1:80").allow("app", "80");
    assert_eq!(host.states(), ["172.18.0.1:80 steered"]);
}

#[test]
fn the_service_is_the_one_that_a_local_client_reaches() {
    let host =
        Host::new().listens_as("127.0.0.1:80", ListenerKind::Mptcp).listens("0.0.0.0:80").allow("app", "80");
    assert_eq!(host.states(), [format!("172.18.0.1:80 relayed ({MPTCP})")]);
}

#[test]
fn steer_or_nothing() {
    let host = Host::new().listens_as("127.0.0.1:80", ListenerKind::Mptcp);
    let host = host.allow_with("app", "80", Source::Container, DatapathChoice::Steer);
    assert_eq!(host.states(), [format!("172.18.0.1:80 blocked ({MPTCP})")]);
    let mut impossible = Host::new().allow_with("app", "80", Source::Container, DatapathChoice::Steer);
    impossible.features.steer = Err("no sk_lookup".to_owned());
    assert_eq!(
        impossible.states(),
        ["172.18.0.1:80 blocked (no sk_lookup)"],
        "whether the service is up or not"
    );
    let unix = Host::new().allow_with("app", "80=unix:/run/x", Source::Loopback, DatapathChoice::Steer);
    assert_eq!(unix.states(), ["172.18.0.1:80 blocked (a Unix socket can only be relayed to)"]);
}

#[test]
fn relay_if_asked_and_only_while_the_service_listens() {
    let rule = |host: Host| host.allow_with("app", "80", Source::Container, DatapathChoice::Relay);
    assert_eq!(
        rule(Host::new().listens("127.0.0.1:80")).states(),
        ["172.18.0.1:80 relayed (as the rule asks)"]
    );
    let down = rule(Host::new());
    assert_eq!(down.states(), ["172.18.0.1:80 waiting (nothing listens on 127.0.0.1:80)"]);
    let (relays, entries) = (down.desired().relays, down.desired().kernel.entries);
    assert!(
        relays.is_empty() && entries.values().all(|entry| entry.target_port == 0),
        "nobody gets it meanwhile"
    );
}

#[test]
fn unix_sockets_are_relayed_to() {
    let mut host = Host::new().allow_with("app", "5432=unix:/run/pg", Source::Loopback, DatapathChoice::Auto);
    assert_eq!(host.states(), ["172.18.0.1:5432 waiting (nothing listens on unix:/run/pg)"]);
    host.inventory.unix_listeners.insert("/run/pg".into());
    assert_eq!(host.states(), ["172.18.0.1:5432 relayed (the service listens on a Unix socket)"]);
    assert!(matches!(host.desired().relays.values().next().unwrap().service, Service::Unix(_)));
}

#[test]
fn both_families_of_a_network() {
    let dual =
        || Host::new().network("dual", "br-dual").bridge("br-dual", 9, &["172.20.0.1/16", "fd00::1/64"]);
    let both = dual().listens("127.0.0.1:80").listens("[::1]:80").allow("dual", "80");
    assert_eq!(both.states(), ["172.20.0.1:80 steered", "[fd00::1]:80 steered"]);
    let v4 = dual().listens("127.0.0.1:80").allow("dual", "80");
    assert_eq!(
        v4.states(),
        [
            "172.20.0.1:80 steered",
            "[fd00::1]:80 relayed (IPv6 was dialled, the service listens on 127.0.0.1:80)"
        ]
    );
    let named = dual().listens("[::1]:80").allow("dual", "80=[::1]:80");
    assert_eq!(
        named.states(),
        ["172.20.0.1:80 relayed (IPv4 was dialled, the service listens on [::1]:80)", "[fd00::1]:80 steered"]
    );
}

#[test]
fn source_loopback_changes_names_in_both_ways() {
    let steered =
        Host::new().listens("127.0.0.1:80").allow_with("app", "80", Source::Loopback, DatapathChoice::Auto);
    assert_eq!(steered.states(), ["172.18.0.1:80 steered"]);
    let desired = steered.desired();
    let gateway = Endpoint::new(Address::from("172.18.0.1".parse::<IpAddr>().unwrap()), 80);
    let inside = "172.18.3.4".parse::<IpAddr>().unwrap().into();
    let ((key, bits), view) = desired.kernel.overrides.first_key_value().unwrap();
    assert!(
        desired.kernel.hooks[HookSet::Names]
            && view.gateway == gateway
            && key.matches(*bits, &gateway, &inside)
    );
    let outside = "172.19.3.4".parse::<IpAddr>().unwrap().into();
    assert!(!key.matches(*bits, &gateway, &outside));

    let mut without = steered;
    without.features.hooks[HookSet::Names] = Err("refused".to_owned());
    assert_eq!(
        without.states(),
        ["172.18.0.1:80 relayed (--source loopback without name hooks: refused)"],
        "a relay connects from loopback"
    );
}

#[test]
fn no_container_is_taken_for_local_unasked() {
    let mut host = Host::new().listens("[::1]:80").allow("app", "80");
    host.features.hooks[HookSet::Names] = Err("no hooks".to_owned());
    assert_eq!(
        host.states(),
        ["172.18.0.1:80 blocked (the service on [::1]:80 would take the container for a local client (no \
          hooks); allow it with --source loopback)"]
    );
    let asked = Host {
        rules: Host::new().allow_with("app", "80", Source::Loopback, DatapathChoice::Relay).rules,
        ..host
    };
    assert_eq!(asked.states(), ["172.18.0.1:80 relayed (as the rule asks)"]);
}

#[test]
fn networks_that_cannot_be_served() {
    let mut host = Host::new()
        .allow("lan", "80")
        .allow("nope", "80")
        .allow("bridge:eth0", "80")
        .allow("bridge:br9", "80");
    host = host.bridge("eth0", 2, &["192.168.1.5/24"]).network("lan", "x");
    host.inventory.interfaces.last_mut().unwrap().is_bridge = false;
    let lan = host.inventory.docker_networks.last_mut().unwrap();
    (lan.driver, lan.bridge) = ("macvlan".to_owned(), None);
    assert_eq!(
        host.states(),
        [
            "lan 80 blocked (driver macvlan creates no bridge on the host; allow its containers one by one: \
             container:NAME)",
            "nope 80 waiting (the engine has no network nope)",
            "bridge:br9 80 waiting (there is no interface br9)",
            "bridge:eth0 80 blocked (eth0 is not a bridge; name the bridge that the containers are on)",
        ]
    );
    assert!(host.desired().kernel.entries.is_empty());
}

#[test]
fn rules_stay_in_force_while_docker_is_away() {
    let mut host = Host::new().listens("127.0.0.1:80").allow("app", "80").allow("new", "80");
    host.inventory.docker = EngineAvailability::Away;
    assert_eq!(
        host.states(),
        [
            "172.18.0.1:80 steered",
            "new 80 waiting (the engine does not answer, and network new was not seen before)"
        ]
    );
}

#[test]
fn a_network_may_be_named_by_id_but_a_name_comes_first() {
    let host = Host::new().listens("127.0.0.1:80");
    let id = host.inventory.docker_networks[0].id.clone();
    assert_eq!(host.allow("app", "81").allow(&id[..12], "80").states()[0], "172.18.0.1:80 steered");
    let hostile = Host::new().network(&id[..12], "br-evil").bridge("br-evil", 8, &["10.9.0.1/24"]);
    assert_eq!(hostile.listens("127.0.0.1:80").allow(&id[..12], "80").states(), ["10.9.0.1:80 steered"]);
}

#[test]
fn an_ambiguous_name_opens_nothing() {
    let mut host =
        Host::new().network("app", "br-evil").bridge("br-evil", 8, &["10.9.0.1/24"]).allow("app", "80");
    host.inventory.docker_networks[1].id = "f".repeat(64);
    assert_eq!(host.states(), ["app 80 blocked (several networks are called app; name the id of one)"]);
}

#[test]
fn a_relay_that_lingers_is_closed_by_deny() {
    let key = RelayKey { address: "172.18.0.1:80".parse().unwrap(), place: br_app() };
    let lingers = Actual { lingering: [key.clone()].into(), ..Actual::default() };
    assert_eq!(plan(&Host::new().desired(), &lingers), [Step::CloseRelay { key, handed_over: false }]);
}

#[test]
fn one_gateway_is_given_once() {
    let host = Host::new().listens("127.0.0.1:80").listens("127.0.0.1:81");
    let host = host.allow("app", "80").allow("bridge:br-app", "80=81");
    assert_eq!(
        host.states(),
        [
            "172.18.0.1:80 steered",
            "172.18.0.1:80 blocked (rule app 80 has 172.18.0.1:80 already; deny one of them)"
        ]
    );
    let down = Host::new().listens("127.0.0.1:81");
    let down = down
        .allow_with("app", "80", Source::Container, DatapathChoice::Relay)
        .allow("bridge:br-app", "80=81");
    assert_eq!(
        down.states()[1],
        "172.18.0.1:80 blocked (rule app 80 has 172.18.0.1:80 already; deny one of them)"
    );
}

#[test]
fn kernels_that_do_not_tell_the_interface_get_keys_without_it() {
    let mut host = Host::new().listens("127.0.0.1:80").allow("app", "80");
    host.features.steer = Ok(Steering { interface_check: false, kernel_registers: false });
    assert!(host.desired().kernel.entries.keys().all(|key| key.ifindex == 0));
}

#[test]
fn the_order_of_steps_leaves_no_gap() {
    let host =
        Host::new().listens("127.0.0.1:80").allow_with("app", "80", Source::Loopback, DatapathChoice::Auto);
    let names = |steps: &[Step]| -> Vec<String> {
        steps.iter().map(|s| format!("{s:?}").split(['(', ' ']).next().unwrap().to_owned()).collect()
    };
    let steps = plan(&host.desired(), &Actual::default());
    assert_eq!(steps.iter().filter(|step| matches!(step, Step::AddTarget(_))).count(), 4);
    assert_eq!(
        names(&steps)[3..],
        ["AddTarget", "AttachHooks", "PutOverride", "Register", "PutEntry", "Probe"]
    );

    // The service comes back with MPTCP, and back again.
    let mptcp = Host::new().listens_as("127.0.0.1:80", ListenerKind::Mptcp).allow("app", "80");
    let steered = Host::new().listens("127.0.0.1:80").allow("app", "80");
    let in_force = |host: &Host| {
        let desired = host.desired();
        let probe_results =
            desired.openings.keys().map(|opening| (opening.clone(), ProbeResult::Open)).collect();
        let firewall_state = FirewallState { probe_results, ..FirewallState::default() };
        Actual { registered: BTreeSet::new(), ..in_force(&desired, firewall_state) }
    };
    let to_relay = plan(&mptcp.desired(), &in_force(&steered));
    assert_eq!(names(&to_relay), ["AttachHooks", "OpenRelay", "PutEntry"]);
    let to_steer = plan(&steered.desired(), &in_force(&mptcp));
    assert_eq!(names(&to_steer), ["Register", "PutEntry", "CloseRelay", "DetachHooks"]);
    assert!(to_steer.iter().any(|s| matches!(s, Step::CloseRelay { handed_over: true, .. })));
    let busy = Actual { name_hooks_in_use: true, ..in_force(&mptcp) };
    assert!(
        !plan(&steered.desired(), &busy).contains(&Step::DetachHooks(HookSet::Names)),
        "open connections keep their names"
    );

    // Denied: at once.
    let denied = plan(&Host::new().desired(), &in_force(&mptcp));
    let key = RelayKey { address: "172.18.0.1:80".parse().unwrap(), place: br_app() };
    assert!(matches!(denied[0], Step::RemoveEntry(_)));
    assert_eq!(denied[1], Step::CloseRelay { key, handed_over: false });
}

#[test]
fn localhost_inside_a_namespace_is_relayed() {
    let host = Host::new().listens("127.0.0.1:80").listens("[::1]:81");
    let host = host.namespace("container:c", 9, &["127.0.0.1", "::1"]);
    let host = host.allow("container:c", "80").allow("container:c", "81").allow("container:c", "82");
    assert_eq!(
        host.states(),
        [
            "127.0.0.1:80 relayed (a namespace's localhost is always relayed)",
            "[::1]:80 relayed (a namespace's localhost is always relayed)",
            "127.0.0.1:81 relayed (a namespace's localhost is always relayed)",
            "[::1]:81 relayed (a namespace's localhost is always relayed)",
            "127.0.0.1:82 waiting (nothing listens on 127.0.0.1:82)",
            "[::1]:82 waiting (nothing listens on [::1]:82)",
        ]
    );
    let desired = host.desired();
    assert!(desired.kernel.entries.is_empty() && desired.relays.len() == 4);
}

#[test]
fn who_is_inside_is_never_127_0_0_1_to_the_service() {
    let told = |host: &Host| match host.desired().relays.into_values().next().unwrap().clients {
        Clients::Inside(ip) => ip,
        other => panic!("{other:?}"),
    };
    let host = Host::new().listens("127.0.0.1:80").namespace("netns:/a", 0xf000_0123, &["127.0.0.1"]);
    let mut host = host.allow("netns:/a", "80");
    assert_eq!(told(&host).to_string(), "127.128.1.35");
    for namespace in host.inventory.namespaces.values_mut() {
        namespace.as_mut().unwrap().address = Some("172.18.0.9".parse().unwrap());
    }
    assert_eq!(told(&host).to_string(), "172.18.0.9", "what Docker says");
}

#[test]
fn a_namespace_is_one_whichever_way_leads_there() {
    let host = Host::new().listens("127.0.0.1:80");
    let host = host.namespace("container:a", 9, &["127.0.0.1"]).namespace("pid:7", 9, &["127.0.0.1"]);
    let host = host.allow("container:a", "80").allow("pid:7", "80");
    assert_eq!(
        host.states(),
        [
            "127.0.0.1:80 relayed (a namespace's localhost is always relayed)",
            "127.0.0.1:80 blocked (rule container:a 80 has 127.0.0.1:80 in that namespace already; deny one \
             of them)",
        ]
    );
}

#[test]
fn a_namespace_that_is_not_there_is_waited_for() {
    let host = Host::new().listens("127.0.0.1:80").namespace("pid:7", 9, &[]);
    let host = host.no_namespace("container:a", NetnsUnavailable::NotThere("no container a".to_owned()));
    let host =
        host.no_namespace("netns:/a", NetnsUnavailable::Unsuitable("/a is not a namespace".to_owned()));
    let host = host.allow("container:a", "80").allow("netns:/a", "80").allow("pid:7", "80");
    assert_eq!(
        host.states(),
        [
            "container:a 80 waiting (no container a)",
            "netns:/a 80 blocked (/a is not a namespace)",
            "pid:7 80 waiting (its loopback interface is down; run `ip link set lo up` inside)",
        ]
    );
}

#[test]
fn what_only_a_relay_can_do_is_relayed() {
    let host = Host::new().listens("127.0.0.1:80").allow("app", "80");
    let mut rule = host.rules.iter().next().unwrap().1.clone();
    rule.options.max_connections = std::num::NonZeroU32::new(5);
    let host = Host { rules: Rules::default().allow([rule], Origin::Cli).unwrap(), ..host };
    assert_eq!(host.states(), ["172.18.0.1:80 relayed (only a relay can keep the rule's limits)"]);
    assert_eq!(host.desired().relays.into_values().next().unwrap().max_connections, 5);
}

#[test]
fn a_namespace_that_is_found_by_another_way_is_left_first() {
    let host = Host::new().listens("127.0.0.1:80").namespace("pid:7", 9, &["127.0.0.1"]);
    let before = host.allow("pid:7", "80").desired();
    let host = Host::new().listens("127.0.0.1:80").namespace("netns:/a", 9, &["127.0.0.1"]);
    let after = host.allow("netns:/a", "80").desired();
    let actual = Actual { relays: before.relays, kernel: before.kernel, ..Actual::default() };
    let steps = plan(&after, &actual);
    assert!(matches!(steps[..], [Step::CloseRelay { .. }, Step::OpenRelay(..)]), "{steps:?}");
}

#[test]
fn a_unix_socket_behind_a_strangers_link_is_blocked() {
    let mut host = Host::new();
    let path = std::path::PathBuf::from("/run/x.sock");
    host.inventory.unix_listeners.insert(path.clone());
    host.inventory.untrusted_paths.insert(path, "x.sock is a symbolic link of user 7".to_owned());
    let host = host.allow_with("app", "80=unix:/run/x.sock", Source::Loopback, DatapathChoice::Auto);
    assert_eq!(host.states(), ["172.18.0.1:80 blocked (x.sock is a symbolic link of user 7)"]);
}

#[test]
fn names_that_may_have_meant_another() {
    let state = |network: &str| {
        let host = Host::new().network("app_net", "br-1").network("shop_backend", "br-2");
        let mut host = host.bridge("br-2", 2, &[]).allow(network, "80");
        host = host.container("db", &[("app_net", &[]), ("shop_backend", &[])]).container("sealed", &[]);
        host.states().remove(0)
    };
    for (name, hint) in [
        ("ap_net", "; did you mean app_net?"),
        ("App-Net", "; did you mean app_net?"),
        ("backend", "; did you mean shop_backend?"),
        ("elsewhere", ""),
        ("br-2", "; did you mean its network shop_backend, or bridge:br-2?"),
        (
            "db",
            "; db is a container: allow the port for container:db, or for its network app_net or \
             shop_backend",
        ),
        ("sealed", "; sealed is a container: allow the port for container:sealed"),
    ] {
        assert_eq!(state(name), format!("{name} 80 waiting (the engine has no network {name}{hint})"));
    }
}

/// Podman gives the name of a bridge to the next network.
#[test]
fn a_bridge_that_the_engine_did_not_mean_is_not_served() {
    let seen = |index| {
        let mut host = Host::new().listens("127.0.0.1:80").allow("app", "80");
        host.inventory.docker_networks[0].bridge_index = Some(index);
        host
    };
    assert_eq!(seen(7).states(), ["172.18.0.1:80 steered"]);
    assert!(!seen(7).inventory.outruns_engine());
    for index in [0, 6, 8] {
        let host = seen(index);
        assert_eq!(
            host.states(),
            ["app 80 waiting (br-app was recreated, and the engine has not reported it yet)"]
        );
        assert!(host.inventory.outruns_engine(), "so that it is asked");
    }
    let mut gone = seen(7);
    gone.inventory.interfaces.clear();
    assert_eq!(
        gone.states(),
        ["app 80 waiting (there is no interface br-app; it comes with the network's first container)"]
    );
    assert!(!gone.inventory.outruns_engine(), "nothing to ask about");
}

#[test]
fn a_network_goes_by_either_of_its_names() {
    let mut host = Host::new().listens("127.0.0.1:80").allow("bridge", "80");
    host.inventory.docker_networks[0].other_name = Some("bridge".to_owned());
    assert_eq!(host.states(), ["172.18.0.1:80 steered"]);
}

//! Two users on one port: who of them is the service.

use std::net::IpAddr;

use lbridge_common::wire::Entry;

use super::Host;
use crate::planning::{
    actual::Actual,
    desired::Service,
    inventory::{ListenerKind, Steering},
    owner::{Sockets, is_regular},
    plan::{Step, plan},
    rule::{DatapathChoice, Source},
};

const SYSTEM: u32 = 114;
const ALICE: u32 = 1000;
const MALLORY: u32 = 1001;
const V6: &str = "[fd00::1]:80";

/// A network with both families.
fn dual() -> Host {
    Host::new().network("dual", "br-dual").bridge("br-dual", 9, &["172.20.0.1/16", "fd00::1/64"])
}

fn service(host: Host, address: &str, uid: u32) -> Host {
    host.listens(address).owned_by(address, uid)
}

fn stranger(address: &str) -> String {
    format!("{address} belongs to another user (uid {MALLORY}) and gets nothing")
}

/// Where each relay connects to.
fn relayed_to(host: &Host) -> Vec<String> {
    let told = |service: Service| match service {
        Service::Tcp(address) => address.to_string(),
        Service::Unix(path) => path.display().to_string(),
    };
    host.desired().relays.into_values().map(|spec| told(spec.service)).collect()
}

/// Where each entry leads that steers, or refuses: gateway and target.
fn entries(host: &Host) -> Vec<String> {
    let told = |entry: &Entry| {
        format!("{} -> {}:{}", IpAddr::from(entry.key.gateway), IpAddr::from(entry.target), entry.target_port)
    };
    let entries = host.desired().kernel.entries;
    entries.values().filter(|entry| !entry.has(Entry::RELAYED)).map(told).collect()
}

/// The sockets that the kernel is given, by the address that they are bound to.
fn registered(host: &Host) -> Vec<String> {
    host.desired().listeners.keys().map(|key| IpAddr::from(key.address).to_string()).collect()
}

#[test]
fn who_is_a_person() {
    let people = [0, 999, 1000, 60000, 61183, 61184, 65519, 65520, 65533, 65534, 100_000];
    let told: Vec<_> = people.into_iter().filter(|uid| is_regular(*uid)).collect();
    assert_eq!(told, [1000, 60000, 61183, 65520, 65533, 100_000]);
}

#[test]
fn the_other_familys_listener_must_be_the_same_users() {
    let host = service(service(dual(), "127.0.0.1:80", SYSTEM), "[::1]:80", MALLORY).allow("dual", "80");
    let why = format!(
        "{V6} relayed (IPv6 was dialled, the service listens on 127.0.0.1:80; {})",
        stranger("[::1]:80")
    );
    assert_eq!(host.states(), ["172.20.0.1:80 steered".to_owned(), why]);
    assert_eq!(relayed_to(&host), ["127.0.0.1:80"]);
    assert_eq!(entries(&host), ["172.20.0.1 -> 127.0.0.1:80"]);
    assert_eq!(registered(&host), ["127.0.0.1"]);
    let own = service(service(dual(), "127.0.0.1:80", SYSTEM), "[::1]:80", SYSTEM).allow("dual", "80");
    assert_eq!(own.states(), ["172.20.0.1:80 steered", "[fd00::1]:80 steered"]);
}

#[test]
fn root_and_system_users_come_before_people_then_ipv4() {
    for (v4, v6, chosen) in [
        (SYSTEM, MALLORY, SYSTEM),
        (MALLORY, SYSTEM, SYSTEM),
        (0, MALLORY, 0),
        (MALLORY, 65534, 65534),
        (ALICE, MALLORY, ALICE),
        (MALLORY, ALICE, MALLORY),
        (SYSTEM, 0, SYSTEM),
    ] {
        let host = service(service(dual(), "127.0.0.1:80", v4), "[::1]:80", v6).allow("dual", "80");
        let rule = host.rules.iter().next().unwrap().1.clone();
        assert_eq!(Sockets::new(&host.inventory).user_of(&rule), Some(chosen), "{v4} {v6}");
        let to = if chosen == v4 { "127.0.0.1:80" } else { "[::1]:80" };
        assert_eq!(relayed_to(&host), [to], "{v4} {v6}");
    }
}

#[test]
fn however_the_service_listens() {
    // (service, its kind, stranger)
    for (own, kind, other) in [
        ("127.0.0.1:80", ListenerKind::Mptcp, "[::1]:80"),
        ("0.0.0.0:80", ListenerKind::Tcp, "[::1]:80"),
        ("[::1]:80", ListenerKind::Tcp, "127.0.0.1:80"),
        ("[::1]:80", ListenerKind::Mptcp, "127.0.0.1:80"),
    ] {
        let host = dual().listens_as(own, kind).owned_by(own, SYSTEM);
        // A group that shares the port is one user's.
        let host = host.listens_as(own, kind).owned_by(own, SYSTEM);
        let host = host.listens_as(other, ListenerKind::Mptcp).owned_by(other, MALLORY).allow("dual", "80");
        let to = if own.starts_with('[') { "[::1]:80" } else { "127.0.0.1:80" };
        assert!(relayed_to(&host).iter().all(|there| there == to), "{own} {other}: {host:?}");
        assert!(host.states().iter().any(|line| line.contains(&stranger(other))), "{:?}", host.states());
        assert!(!host.states().concat().contains("blocked"), "{:?}", host.states());
    }
}

/// The kernel's entry leads to a relay, which needs no port of its own.
#[test]
fn a_wildcard_of_a_stranger_gets_nothing() {
    for own in ["127.0.0.1:80", "0.0.0.0:80"] {
        let host = service(service(dual(), own, SYSTEM), "[::]:80", MALLORY).v6_only().allow("dual", "80");
        assert!(host.states()[1].starts_with(&format!("{V6} relayed")), "{:?}", host.states());
        assert!(host.states()[1].contains(&stranger("[::]:80")), "{:?}", host.states());
        assert_eq!(relayed_to(&host), ["127.0.0.1:80"]);
    }
}

/// Before Linux 5.17 a relay cannot listen beside a socket that has the dialled port on every address; what
/// is dialled is refused.
#[test]
fn a_wildcard_of_a_stranger_gets_nothing_without_an_entry_for_the_relay() {
    let dual = || {
        let mut host = dual();
        host.features.steer = Ok(Steering { interface_check: false, kernel_registers: true });
        host
    };
    for own in ["127.0.0.1:80", "0.0.0.0:80"] {
        let host = service(service(dual(), own, SYSTEM), "[::]:80", MALLORY).v6_only().allow("dual", "80");
        let why = format!("a relay cannot listen on {V6}: {}; stop that listener", stranger("[::]:80"));
        assert_eq!(host.states(), ["172.20.0.1:80 steered".to_owned(), format!("{V6} blocked ({why})")]);
        assert_eq!(entries(&host), ["172.20.0.1 -> 127.0.0.1:80", "fd00::1 -> :::0"]);
        assert!(relayed_to(&host).is_empty());
        let elsewhere = service(service(dual(), own, SYSTEM), "[::]:80", MALLORY).v6_only();
        let elsewhere = elsewhere.allow("dual", "81=80");
        assert_eq!(relayed_to(&elsewhere), ["127.0.0.1:80"], "the dialled port is free");
    }
    // Nor one that has the gateway itself. Others than people are left alone, as before.
    for (uid, refused) in [(MALLORY, true), (SYSTEM, false), (0, false)] {
        let host = dual().listens_as("127.0.0.1:80", ListenerKind::Mptcp).owned_by("127.0.0.1:80", ALICE);
        let host = service(host, "172.20.0.1:80", uid).allow("dual", "80");
        assert_eq!(entries(&host).contains(&"172.20.0.1 -> :::0".to_owned()), refused, "{uid}");
    }
}

#[test]
fn udp_is_blocked_where_it_would_have_to_be_relayed() {
    let host = dual().takes_datagrams("127.0.0.1:80").owned_by("127.0.0.1:80", SYSTEM);
    let host = host.takes_datagrams("[::1]:80").owned_by("[::1]:80", MALLORY).allow("dual", "80/udp");
    let why = format!("IPv6 was dialled, the service listens on 127.0.0.1:80; {}", stranger("[::1]:80"));
    assert_eq!(host.states(), ["172.20.0.1:80 steered".to_owned(), format!("{V6} blocked ({why})")]);
    assert_eq!(registered(&host), ["127.0.0.1"]);
    // With SO_REUSEADDR users share an address.
    let host = Host::new().takes_datagrams("0.0.0.0:80").owned_by("0.0.0.0:80", SYSTEM);
    let host = host.takes_datagrams("127.0.0.1:80").owned_by("127.0.0.1:80", MALLORY).allow("app", "80/udp");
    assert_eq!(host.states(), [format!("172.18.0.1:80 steered ({})", stranger("127.0.0.1:80"))]);
    assert_eq!(registered(&host), ["0.0.0.0"]);
}

#[test]
fn a_namespace_is_led_to_the_same_service() {
    let host = Host::new().namespace("container:c", 9, &["127.0.0.1", "::1"]);
    let host = service(service(host, "127.0.0.1:80", SYSTEM), "[::1]:80", MALLORY).allow("container:c", "80");
    assert_eq!(relayed_to(&host), ["127.0.0.1:80", "127.0.0.1:80"]);
    assert_eq!(
        host.states()[1],
        format!("[::1]:80 relayed (a namespace's localhost is always relayed; {})", stranger("[::1]:80"))
    );
}

#[test]
fn a_rule_that_names_an_address_means_whoever_listens_there() {
    let host = service(service(dual(), "127.0.0.1:80", SYSTEM), "[::1]:80", MALLORY);
    let host = host.allow("dual", "81=[::1]:80");
    assert_eq!(
        host.states(),
        ["172.20.0.1:81 relayed (IPv4 was dialled, the service listens on [::1]:80)", "[fd00::1]:81 steered"]
    );
    assert_eq!(registered(&host), ["::1"]);
    let rule = host.rules.iter().next().unwrap().1.clone();
    assert_eq!(Sockets::new(&host.inventory).user_of(&rule), Some(MALLORY));
}

#[test]
fn while_the_service_restarts_the_stranger_waits_in_vain() {
    let both = service(service(dual(), "127.0.0.1:80", SYSTEM), "[::1]:80", MALLORY).allow("dual", "80");
    let both = both.looked_at();
    let down = service(both.clone().silent(), "[::1]:80", MALLORY).looked_at();
    let waits = |at: &str, on: &str| {
        format!(
            "{at} waiting (nothing listens on {on}; {}; if that is the service now, deny the rule and allow \
             it again)",
            stranger("[::1]:80")
        )
    };
    assert_eq!(down.states(), [waits("172.20.0.1:80", "127.0.0.1:80"), waits(V6, "[::1]:80")]);
    let ready = ["172.20.0.1 -> 127.0.0.1:80", "fd00::1 -> :::0"];
    assert_eq!(entries(&down), ready, "for the service, not for the stranger");
    assert!(registered(&down).is_empty() && relayed_to(&down).is_empty());

    // The relay that goes frees its port at once: the service may come back on all addresses.
    let before = both.desired();
    let actual = Actual { relays: before.relays, kernel: before.kernel, ..Actual::default() };
    let closed = plan(&down.desired(), &actual).into_iter();
    let closed: Vec<_> = closed.filter(|step| matches!(step, Step::CloseRelay { .. })).collect();
    assert!(matches!(closed[..], [Step::CloseRelay { handed_over: false, .. }]), "{closed:?}");

    // Nor would a stranger get anything who comes before the next look.
    let gone = down.silent().looked_at();
    assert_eq!(entries(&gone), ready);

    let back = service(service(gone, "[::1]:80", MALLORY), "127.0.0.1:80", SYSTEM).looked_at();
    assert_eq!(back.states()[0], "172.20.0.1:80 steered");
    assert_eq!(relayed_to(&back), ["127.0.0.1:80"]);
}

#[test]
fn whose_the_service_is_may_change() {
    let down = |v4: u32| service(dual(), "127.0.0.1:80", v4).allow("dual", "80").looked_at().silent();
    // On the address that the service had: a client on the host would take it for that, too.
    let same = service(down(SYSTEM), "127.0.0.1:80", ALICE);
    assert_eq!(same.states()[0], "172.20.0.1:80 steered");
    // On another one: of a system user.
    assert_eq!(relayed_to(&service(down(ALICE), "[::1]:80", SYSTEM)), ["[::1]:80"]);
    assert_eq!(relayed_to(&service(down(ALICE), "[::1]:80", ALICE)), ["[::1]:80"]);
    assert!(relayed_to(&service(down(ALICE), "[::1]:80", MALLORY)).is_empty());
    // A rule that is made anew knows nothing of it.
    let mut denied = down(SYSTEM);
    let rules = std::mem::take(&mut denied.rules);
    let denied = service(denied.looked_at(), "[::1]:80", ALICE);
    let again = Host { rules, ..denied };
    assert_eq!(relayed_to(&again.looked_at()), ["[::1]:80"]);
}

/// A development server on `[::1]` keeps its rule when somebody else takes 127.0.0.1.
#[test]
fn whoever_had_it_first_keeps_it_among_equals() {
    let alone = service(dual(), "[::1]:80", ALICE).allow("dual", "80").looked_at();
    assert_eq!(alone.states()[1], "[fd00::1]:80 steered");
    let both = service(alone, "127.0.0.1:80", MALLORY).looked_at();
    assert_eq!(relayed_to(&both), ["[::1]:80"]);
    assert_eq!(entries(&both), ["fd00::1 -> ::1:80"]);
    let system = service(both, "0.0.0.0:80", SYSTEM);
    assert_eq!(relayed_to(&system), ["127.0.0.1:80"]);
}

#[test]
fn the_choice_is_the_same_for_a_rule_that_asks_for_a_way() {
    let host = service(service(dual(), "127.0.0.1:80", SYSTEM), "[::1]:80", MALLORY);
    let relayed = host.allow_with("dual", "80", Source::Container, DatapathChoice::Relay);
    assert_eq!(relayed_to(&relayed), ["127.0.0.1:80", "127.0.0.1:80"]);
    let host = service(service(dual(), "127.0.0.1:80", SYSTEM), "[::1]:80", MALLORY);
    let steered = host.allow_with("dual", "80", Source::Container, DatapathChoice::Steer);
    assert!(steered.states()[1].contains("blocked"), "{:?}", steered.states());
    assert_eq!(entries(&steered), ["172.20.0.1 -> 127.0.0.1:80"]);
}

use super::{Expected, plan::*};
use crate::{
    api::protocol::{
        DockerStatus, FirewallStatus, GatewayStatus, KernelDatapath, KernelStatus, LabelStatus,
        NamespaceStatus, NetworkStatus, RuleStatus, Status,
    },
    planning::{
        desired::State,
        inventory::Interface,
        rule::{PortSpec, Rule},
    },
};

fn gateway(address: &str, interface: &str, state: State) -> GatewayStatus {
    GatewayStatus {
        address: address.parse().unwrap(),
        interface: interface.to_owned(),
        namespace: None,
        sources: None,
        listener_user: None,
        alias: None,
        state,
        why: Some("so it is".to_owned()),
        reasons: vec![],
        connections: 0,
    }
}

fn rule(network: &str, port: u16, target: &str, gateways: Vec<GatewayStatus>) -> RuleStatus {
    let rule = RuleStatus::example(network, port, target, gateways);
    RuleStatus { why: Some("so it is".to_owned()), ..rule }
}

fn status(rules: Vec<RuleStatus>) -> Status {
    let network = |name: &str, bridge: &str| NetworkStatus {
        id: name.to_owned(),
        name: name.to_owned(),
        driver: "bridge".to_owned(),
        bridge: Some(bridge.to_owned()),
        ..NetworkStatus::default()
    };
    Status {
        version: String::new(),
        kernel: KernelStatus {
            path: KernelDatapath::Steer,
            why: None,
            interface_check: true,
            registers_listeners: true,
            counters: None,
        },
        docker: DockerStatus::Off,
        firewall: FirewallStatus::default(),
        docker_networks: vec![network("app", "br-app"), network("db", "br-db")],
        rules,
        refused_reload: None,
        labels: LabelStatus::default(),
    }
}

fn host() -> Vec<Interface> {
    let interface = |index, name: &str, is_bridge, addresses: &[(&str, u8)]| Interface {
        index,
        name: name.to_owned(),
        is_bridge,
        is_port: false,
        addresses: addresses.iter().map(|(ip, prefix)| (ip.parse().unwrap(), *prefix)).collect(),
    };
    vec![
        interface(2, "eth0", false, &[("203.0.113.5", 24)]),
        interface(3, "br-app", true, &[("10.7.0.1", 24), ("fd07::1", 64)]),
        interface(4, "br-db", true, &[("10.8.0.1", 24)]),
        interface(5, "br-lan", true, &[("10.9.0.1", 24)]),
    ]
}

fn connects(plan: &Plan, place: &Vantage, expected: Expected) -> Vec<String> {
    let to = plan.trials.iter().filter_map(|trial| match &trial.attempt {
        Attempt::Connect { from, to, .. } if from == place && trial.expected == expected => {
            Some(to.to_string())
        }
        _ => None,
    });
    to.collect()
}

fn bridge(name: &str) -> Vantage {
    Vantage::Bridge(name.to_owned())
}

#[test]
fn a_rule_is_open_to_its_network_and_closed_to_all_others() {
    let app = rule("app", 80, "127.0.0.1:3000", vec![gateway("10.7.0.1", "br-app", State::Steered)]);
    let plan = plan(&status(vec![app]), &host(), None);
    assert_eq!(connects(&plan, &bridge("br-app"), Expected::Open), ["10.7.0.1:80"]);
    // The service's own port, the network's other address and the addresses that other networks dial are
    // closed to it.
    let from_app = connects(&plan, &bridge("br-app"), Expected::Closed);
    for to in ["10.7.0.1:3000", "[fd07::1]:80", "10.8.0.1:80", "203.0.113.5:80", "203.0.113.5:3000"] {
        assert!(from_app.contains(&to.to_owned()), "{to} in {from_app:?}");
    }
    assert!(!from_app.contains(&"10.7.0.1:80".to_owned()));
    assert_eq!(
        connects(&plan, &bridge("br-db"), Expected::Closed),
        ["10.7.0.1:80", "10.8.0.1:80", "10.7.0.1:3000", "10.8.0.1:3000"]
    );
    let lan = connects(&plan, &Vantage::Lan, Expected::Closed);
    for to in ["203.0.113.5:3000", "10.7.0.1:80", "[fd07::1]:80", "127.0.0.1:3000", "[::1]:80"] {
        assert!(lan.contains(&to.to_owned()), "{to} in {lan:?}");
    }
    // Not tested: neither Docker nor a rule knows this bridge.
    assert!(!plan.bridges.contains_key("br-lan"));
}

#[test]
fn what_another_rule_opens_is_not_held_against_this_one() {
    let steered = |address, bridge| vec![gateway(address, bridge, State::Steered)];
    let rules = vec![
        rule("app", 80, "127.0.0.1:3000", steered("10.7.0.1", "br-app")),
        rule("app", 3000, "127.0.0.1:3000", steered("10.7.0.1", "br-app")),
        rule("db", 80, "127.0.0.1:3000", steered("10.8.0.1", "br-db")),
    ];
    let plan = plan(&status(rules), &host(), None);
    let from_app = connects(&plan, &bridge("br-app"), Expected::Closed);
    assert!(!from_app.contains(&"10.7.0.1:3000".to_owned()));
    assert!(from_app.contains(&"10.8.0.1:80".to_owned()), "open to the others alone");
    let from_db = connects(&plan, &bridge("br-db"), Expected::Closed);
    assert!(!from_db.contains(&"10.8.0.1:80".to_owned()) && from_db.contains(&"10.7.0.1:80".to_owned()));
}

#[test]
fn a_rule_that_waits_is_refused_and_one_that_is_blocked_is_not_tried() {
    let states =
        [gateway("10.7.0.1", "br-app", State::Waiting), gateway("fd07::1", "br-app", State::Blocked)];
    let plan = plan(&status(vec![rule("app", 80, "127.0.0.1:80", states.into())]), &host(), None);
    assert_eq!(connects(&plan, &bridge("br-app"), Expected::Refused), ["10.7.0.1:80"]);
    assert!(connects(&plan, &bridge("br-app"), Expected::Open).is_empty());
    let untried: Vec<_> =
        plan.trials.iter().filter(|t| matches!(t.attempt, Attempt::Nothing { .. })).collect();
    assert_eq!(untried.len(), 1);
}

#[test]
fn a_rule_without_a_network_is_not_tried() {
    let plan = plan(&status(vec![rule("none", 80, "127.0.0.1:80", vec![])]), &host(), None);
    assert!(matches!(plan.trials[0].attempt, Attempt::Nothing { .. }));
}

#[test]
fn one_rule_alone() {
    let rules = vec![
        rule("app", 80, "127.0.0.1:80", vec![gateway("10.7.0.1", "br-app", State::Steered)]),
        rule("db", 80, "127.0.0.1:80", vec![gateway("10.8.0.1", "br-db", State::Steered)]),
    ];
    let wanted = Rule::new("db".parse().unwrap(), PortSpec::same(80)).id();
    let plan = plan(&status(rules), &host(), Some(&wanted));
    assert!(plan.trials.iter().all(|trial| trial.rule == wanted));
    assert!(!connects(&plan, &bridge("br-db"), Expected::Closed).contains(&"10.8.0.1:80".to_owned()));
}

#[test]
fn the_service_is_of_the_family_that_is_dialled() {
    let gateways = ["10.7.0.1", "fd07::1"].map(|address| gateway(address, "br-app", State::Steered));
    let plan = plan(&status(vec![rule("app", 80, "127.0.0.1:3000", gateways.into())]), &host(), None);
    let by = plan.trials.iter().filter_map(|trial| match &trial.attempt {
        Attempt::Connect { by: Some(By::Service(at)), .. } => Some(at.to_string()),
        _ => None,
    });
    assert_eq!(by.collect::<Vec<_>>(), ["127.0.0.1:3000", "[::1]:3000"]);
}

#[test]
fn false_addresses_are_tried_where_the_kernel_tells_the_interface() {
    let steered =
        || vec![rule("app", 80, "127.0.0.1:80", vec![gateway("10.7.0.1", "br-app", State::Steered)])];
    let borrowed = |status: &Status| {
        let plan = plan(status, &host(), None);
        let at = |t: &Trial| match &t.attempt {
            Attempt::Borrow { at, .. } | Attempt::Foreign { at, .. } => Some(at.clone()),
            _ => None,
        };
        plan.trials.iter().filter_map(at).collect::<Vec<_>>()
    };
    let mut status = status(steered());
    let [uplink, of_others] =
        [("eth0", 2), ("br-lan", 5)].map(|(name, index)| Vantage::Interface { name: name.to_owned(), index });
    let elsewhere = [bridge("br-db"), Vantage::Lan, uplink, of_others];
    assert_eq!(borrowed(&status), [&[bridge("br-app")], &elsewhere[..]].concat());
    status.kernel.interface_check = false;
    assert_eq!(borrowed(&status), [bridge("br-app")], "the subnet is checked everywhere");
    status.rules[0].gateways[0].state = State::Relayed;
    assert_eq!(borrowed(&status), elsewhere, "a relay is bound to its bridge");
}

#[test]
fn a_namespace_is_dialled_from_inside() {
    let mut inside = gateway("127.0.0.1", "lo", State::Relayed);
    inside.namespace = Some(NamespaceStatus { path: "/proc/7/ns/net".into(), inode: 1 });
    let plan = plan(&status(vec![rule("pid:7", 80, "127.0.0.1:3000", vec![inside])]), &host(), None);
    let id = Rule::new("pid:7".parse().unwrap(), PortSpec::same(80)).id();
    assert_eq!(connects(&plan, &Vantage::Inside(id.clone()), Expected::Open), ["127.0.0.1:80"]);
    assert!(plan.trials.iter().any(|trial| matches!(trial.attempt, Attempt::Wire { .. })));
    // The port is dialled inside the namespace; the service is the host's.
    let lan = connects(&plan, &Vantage::Lan, Expected::Closed);
    assert!(lan.contains(&"203.0.113.5:3000".to_owned()) && !lan.contains(&"203.0.113.5:80".to_owned()));
    assert_eq!(plan.namespaces.keys().collect::<Vec<_>>(), [&id]);
}

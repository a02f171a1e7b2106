//! Tests: the JSON of the control API, compared with the files in `snapshots/`. Scripts read it, so a
//! difference is a change of the contract: additions are compatible, everything else breaks somebody's
//! script.
//!
//! After an intended change run the tests with `INSTA_UPDATE=always`, and review the difference of the files.

use std::{collections::BTreeSet, fmt::Debug, time::Duration};

use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use strum::VariantNames as _;

use super::protocol::*;
use crate::planning::{
    desired::{Alias, State},
    explain::{Answer, Explanation, Fate, Question, Stage, Step, Trace},
    firewall::FirewallMode,
    inventory::EngineKind,
    labels::Problem,
    reason::Reason,
    rule::{
        DatapathChoice, Network, Options, Origin, PortSpec, ProcessStart, Protocol, ProxyProtocol, Rule,
        Source, Target,
    },
};

/// Compares the value's JSON with the snapshot of that name, byte for byte, and reads the value back from it.
#[track_caller]
fn pinned<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let json = serde_json::to_string_pretty(value).unwrap();
    assert_eq!(serde_json::from_str::<T>(&json).unwrap(), *value, "{json}");
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(name, json);
    });
}

/// Like [`pinned`], for a value with every field set: fails if its JSON contains an empty field.
#[track_caller]
fn pinned_full<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    fn empty(value: &Value) -> bool {
        match value {
            Value::Null => true,
            Value::Array(values) => values.is_empty() || values.iter().any(empty),
            Value::Object(fields) => fields.values().any(empty),
            Value::String(text) => text.is_empty(),
            Value::Bool(_) | Value::Number(_) => false,
        }
    }
    let json = serde_json::to_value(value).unwrap();
    assert!(!empty(&json), "a field is not set: {json:#}");
    pinned(name, value);
}

/// Checks that a client may leave everything out of the body of a request but what `least` has.
#[track_caller]
fn least<T: DeserializeOwned + PartialEq + Debug>(least: &str, value: &T) {
    assert_eq!(serde_json::from_str::<T>(least).unwrap(), *value);
}

fn time() -> Timestamp {
    "2026-01-02T03:04:05.678Z".parse().unwrap()
}

fn network() -> Network {
    Network::Docker("app_net".to_owned())
}

fn reasons() -> Vec<ReasonStatus> {
    let reasons = [Reason::NothingListens(Target::Port(5432)), Reason::AsAsked];
    reasons.iter().map(Into::into).collect()
}

fn full_options(version: ProxyProtocol) -> Options {
    Options {
        from: ["db".to_owned(), "web".to_owned()].into(),
        localhost: true,
        source: Source::Loopback,
        path: DatapathChoice::Relay,
        max_connections: 100.try_into().ok(),
        idle_timeout: Some(Duration::from_millis(600_500)),
        proxy_protocol: Some(version),
        comment: Some("the \"old\" database".to_owned()),
    }
}

fn full_rule() -> Rule {
    Rule {
        network: network(),
        spec: "5432=unix:/run/postgresql/.s.PGSQL.5432".parse().unwrap(),
        options: full_options(ProxyProtocol::V2),
        process: None,
    }
}

fn bare_rule() -> Rule {
    Rule::new(network(), PortSpec::same(80))
}

fn full_rule_status() -> RuleStatus {
    let gateway = GatewayStatus {
        address: "172.18.0.1".parse().unwrap(),
        interface: "br-0123456789ab".to_owned(),
        namespace: Some(NamespaceStatus { path: "/proc/4711/ns/net".into(), inode: 4_026_532_000 }),
        alias: Some(Alias::HostGateway),
        sources: Some(["172.18.0.2".parse().unwrap(), "fd00::2".parse().unwrap()].into()),
        listener_user: Some(ListenerUser { uid: 105, name: Some("postgres".to_owned()) }),
        state: State::Relayed,
        why: Some("as the rule asks".to_owned()),
        reasons: reasons(),
        connections: 7,
    };
    let dial = DialStatus {
        address: "127.0.0.1".parse().unwrap(),
        interface: "br-0123456789ab".to_owned(),
        gateway: Some("172.18.0.1".parse().unwrap()),
        containers: 2,
        state: State::Waiting,
        why: Some("nothing listens on 127.0.0.1:5432".to_owned()),
        reasons: reasons(),
    };
    RuleStatus {
        network: network(),
        port: 5432,
        protocol: Protocol::Tcp,
        target: "127.0.0.1:15432".to_owned(),
        options: full_options(ProxyProtocol::V1),
        origin: Origin::Config,
        state: State::Blocked,
        why: Some("nothing listens on 127.0.0.1:5432; as the rule asks".to_owned()),
        reasons: reasons(),
        refused: 1,
        open: 2,
        to_service: 3,
        to_client: 4,
        gateways: vec![gateway],
        dials: vec![dial],
    }
}

fn bare_rule_status() -> RuleStatus {
    let gateway = GatewayStatus {
        address: "fd00::1".parse().unwrap(),
        interface: "br0".to_owned(),
        namespace: None,
        alias: None,
        sources: None,
        listener_user: None,
        state: State::Steered,
        why: None,
        reasons: vec![],
        connections: 0,
    };
    let dial = DialStatus {
        address: "::1".parse().unwrap(),
        interface: "br0".to_owned(),
        gateway: None,
        containers: 0,
        state: State::Steered,
        why: None,
        reasons: vec![],
    };
    RuleStatus { dials: vec![dial], ..RuleStatus::example("app_net", 80, "127.0.0.1:80", vec![gateway]) }
}

fn full_status() -> Status {
    Status {
        version: "0.1.0".to_owned(),
        kernel: KernelStatus {
            path: KernelDatapath::Steer,
            why: Some("a reason".to_owned()),
            interface_check: true,
            registers_listeners: true,
            counters: Some(Counters {
                steered: 1,
                foreign_source: 2,
                no_listener: 3,
                assign_failed: 4,
                registered: 5,
                register_refused: 6,
                not_listed: 7,
                denied: 8,
                looks_local: 9,
                relayed: 10,
            }),
        },
        docker: DockerStatus::Away {
            engine: EngineKind::Podman,
            since: Some(time()),
            error: "connection refused".to_owned(),
        },
        firewall: FirewallStatus {
            mode: FirewallMode::Manage,
            firewalls: vec!["nftables, table inet filter".to_owned()],
            accept_rules: 2,
            unreadable: Some("nft is not installed".to_owned()),
            untried: Some("172.18.0.1:80: no route".to_owned()),
        },
        docker_networks: vec![NetworkStatus {
            id: "0123456789abcdef".repeat(4),
            name: "app_net".to_owned(),
            driver: "bridge".to_owned(),
            bridge: Some("br-0123456789ab".to_owned()),
            other_name: Some("podman_app_net".to_owned()),
        }],
        labels: LabelStatus { enabled: true, problems: vec![problem()], more_problems: 3 },
        rules: vec![full_rule_status()],
        refused_reload: Some(RefusedReload { since: time(), error: "lbridge.toml:3:1: ...".to_owned() }),
    }
}

fn problem() -> Problem {
    Problem {
        object: "container web".to_owned(),
        label: "lbridge.allow=x".to_owned(),
        wrong: "\"x\" is not a port".to_owned(),
        remedy: "fix the label".to_owned(),
    }
}

#[test]
fn status() {
    pinned_full("status_full", &full_status());
    let bare = Status {
        version: "0.1.0".to_owned(),
        kernel: KernelStatus {
            path: KernelDatapath::None,
            why: None,
            interface_check: false,
            registers_listeners: false,
            counters: None,
        },
        docker: DockerStatus::Off,
        firewall: FirewallStatus::default(),
        docker_networks: vec![NetworkStatus::default()],
        labels: LabelStatus::default(),
        rules: vec![],
        refused_reload: None,
    };
    pinned("status_bare", &bare);
    let docker = [
        DockerStatus::Off,
        DockerStatus::Reachable { engine: EngineKind::Docker, version: "29.0.1".to_owned() },
        DockerStatus::Away { engine: EngineKind::Docker, since: None, error: "not asked yet".to_owned() },
    ];
    pinned("status_docker", &docker.to_vec());
}

#[test]
fn allow() {
    let process = Rule {
        network: Network::Process(4711),
        process: Some(ProcessStart { ticks: 12, boot: "a-b".to_owned() }),
        ..bare_rule()
    };
    pinned_full("allow_request_full", &Allow { rules: vec![full_rule(), process] });
    let bare = Allow { rules: vec![bare_rule()] };
    pinned("allow_request_bare", &bare);
    least(r#"{"rules": [{"network": "app_net", "port": "80"}]}"#, &bare);
    pinned_full("allow_answer_full", &vec![full_rule_status()]);
    pinned("allow_answer_bare", &vec![bare_rule_status()]);
}

/// A slip in the name of an option must not open more than was meant.
#[test]
fn a_request_with_an_unknown_option_is_refused() {
    let text = r#"{"rules": [{"network": "app_net", "port": "80", "form": ["web"]}]}"#;
    let error = serde_json::from_str::<Allow>(text).unwrap_err();
    assert!(
        error.to_string().starts_with("unknown field `form`, expected one of `network`, `port`, "),
        "{error}"
    );
    assert!(error.column() < text.len() - 4, "{error} is not at the key");
}

#[test]
fn deny() {
    let full = Deny { network: network(), ports: vec![80, 81], udp_ports: vec![53] };
    pinned_full("deny_request_full", &full);
    let bare = Deny { network: network(), ports: vec![], udp_ports: vec![] };
    pinned("deny_request_bare", &bare);
    least(r#"{"network": "app_net"}"#, &bare);
}

#[test]
fn explain() {
    let source = Some("172.18.0.2".parse().unwrap());
    let full = Question { network: network(), port: 53, protocol: Protocol::Udp, source };
    pinned_full("explain_request_full", &full);
    let bare = Question { network: network(), port: 53, protocol: Protocol::Tcp, source: None };
    pinned("explain_request_bare", &bare);
    least(r#"{"network": "app_net", "port": 53}"#, &bare);
    let step = |stage, verdict, details| Step { stage, verdict, text: "words".to_owned(), details };
    let way = |fate| Trace {
        dialled: "172.18.0.1:80".parse().unwrap(),
        interface: "br-0123456789ab".to_owned(),
        source: "172.18.0.2".parse().unwrap(),
        steps: vec![step(Stage::Peer, Answer::Note, vec!["a fact".to_owned()])],
        fate,
    };
    let explanation = |steps, ways| Explanation {
        network: network(),
        port: 80,
        steps,
        ways,
        outcome: "connections are steered".to_owned(),
        remedy: "nothing to do".to_owned(),
    };
    let steps = vec![step(Stage::Network, Answer::Yes, vec!["a fact".to_owned()])];
    pinned_full("explain_answer_full", &explanation(steps, vec![way(Fate::Steered)]));
    let steps = vec![step(Stage::Rule, Answer::No, vec![])];
    pinned("explain_answer_bare", &explanation(steps, vec![]));
}

#[test]
fn reload() {
    let full = Reloaded {
        added: vec![full_rule_status()],
        changed: vec![full_rule_status()],
        removed: vec![full_rule_status()],
        settings: vec![SettingChange {
            name: "drain_timeout".to_owned(),
            before: "5s".to_owned(),
            now: "30s".to_owned(),
        }],
    };
    pinned_full("reload_answer_full", &full);
    let bare = Reloaded { added: vec![], changed: vec![], removed: vec![], settings: vec![] };
    pinned("reload_answer_bare", &bare);
}

#[test]
fn events() {
    let event = |what| Event { at: time(), what };
    let network = network();
    let (port, protocol) = (5432, Protocol::Udp);
    let full = [
        EventKind::Following { version: "0.1.0".to_owned() },
        EventKind::Allowed { network: network.clone(), port, protocol, uid: Some(1000) },
        EventKind::Denied { network: network.clone(), port, protocol, uid: Some(1000) },
        EventKind::Labelled { network: network.clone(), port, protocol, asked: true },
        EventKind::BadLabel(problem()),
        EventKind::State {
            network: network.clone(),
            port,
            protocol,
            state: State::Waiting,
            why: Some("nothing listens on 127.0.0.1:5432".to_owned()),
            reasons: reasons(),
        },
        EventKind::Listening { port },
        EventKind::Unregistered { port, error: "Operation not supported".to_owned() },
        EventKind::Closed { port },
        EventKind::Docker {
            engine: EngineKind::Podman,
            version: Some("5.0.0".to_owned()),
            error: Some("connection refused".to_owned()),
        },
        EventKind::Refused { network: network.clone(), port, protocol, connections: 3 },
        EventKind::Missed { events: 12 },
        EventKind::Unknown,
    ];
    let full: Vec<_> = full.into_iter().map(event).collect();
    let names: Vec<_> =
        full.iter().map(|event| serde_json::to_value(event).unwrap()["event"].clone()).collect();
    assert_eq!(names, EventKind::VARIANTS, "an example of each kind of event");
    pinned_full("events_full", &full);
    let bare = [
        EventKind::Allowed { network: network.clone(), port, protocol: Protocol::Tcp, uid: None },
        EventKind::Denied { network: network.clone(), port, protocol: Protocol::Tcp, uid: None },
        EventKind::State {
            network,
            port,
            protocol: Protocol::Tcp,
            state: State::Steered,
            why: None,
            reasons: vec![],
        },
        EventKind::Docker { engine: EngineKind::Docker, version: None, error: None },
    ];
    pinned("events_bare", &bare.map(event).to_vec());
}

#[test]
fn errors() {
    let codes = [ErrorCode::Failed, ErrorCode::Usage, ErrorCode::Conflict, ErrorCode::NoSuchRule];
    let errors = codes.map(|code| ApiError { code, message: "what is wrong; what to do".to_owned() });
    let names: Vec<_> =
        errors.iter().map(|error| serde_json::to_value(error).unwrap()["code"].clone()).collect();
    assert_eq!(names, ErrorCode::VARIANTS, "an example of each code");
    pinned_full("errors", &errors.to_vec());
}

/// The words of each enumeration that answers contain.
#[test]
fn words() {
    fn of<T: Serialize + DeserializeOwned + PartialEq + Debug + Clone>(values: &[T]) -> Vec<Value> {
        let words: Vec<_> = values.iter().map(|value| serde_json::to_value(value).unwrap()).collect();
        let read: Vec<T> = words.iter().map(|word| serde_json::from_value(word.clone()).unwrap()).collect();
        assert_eq!(read, values);
        assert!(words.iter().all(Value::is_string));
        assert_eq!(words.iter().map(Value::to_string).collect::<BTreeSet<_>>().len(), words.len());
        words
    }
    let words = [
        ("state", of(&[State::Steered, State::Relayed, State::Waiting, State::Blocked])),
        ("origin", of(&[Origin::Cli, Origin::Config, Origin::Label])),
        ("source", of(&[Source::Container, Source::Loopback])),
        ("path", of(&[DatapathChoice::Auto, DatapathChoice::Steer, DatapathChoice::Relay])),
        ("proxy_protocol", of(&[ProxyProtocol::V1, ProxyProtocol::V2])),
        ("protocol", of(&[Protocol::Tcp, Protocol::Udp])),
        ("alias", of(&[Alias::HostGateway, Alias::Setting])),
        ("kernel.path", of(&[KernelDatapath::Steer, KernelDatapath::None])),
        ("firewall.mode", of(&[FirewallMode::Manage, FirewallMode::Off])),
        ("engine", of(&[EngineKind::Docker, EngineKind::Podman])),
        (
            "stage",
            of(&[
                Stage::Network,
                Stage::Rule,
                Stage::Localhost,
                Stage::Arrival,
                Stage::Firewall,
                Stage::Lookup,
                Stage::Source,
                Stage::Listener,
                Stage::Relay,
                Stage::Host,
                Stage::Peer,
            ]),
        ),
        ("verdict", of(&[Answer::Yes, Answer::No, Answer::Note])),
        ("fate", of(&[Fate::Steered, Fate::Relayed, Fate::Refused, Fate::Dropped, Fate::Passed])),
    ];
    let words: Vec<_> = words.into_iter().map(|(name, words)| (name.to_owned(), words)).collect();
    pinned_full("words", &words);
}

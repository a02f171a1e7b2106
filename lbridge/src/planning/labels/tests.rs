use super::{derive::MAX_PROBLEMS, *};
use crate::planning::{
    inventory::{DockerNetwork, find_networks},
    rule::{Network, Origin, Rule, Rules},
};

fn hex(name: &str) -> String {
    let digits: Vec<_> = name.bytes().map(|b| format!("{b:x}")).collect();
    digits.concat()
}

fn network(name: &str, bridge: Option<&str>) -> DockerNetwork {
    let driver = if bridge.is_some() { "bridge" } else { "macvlan" };
    DockerNetwork {
        id: format!("{:0<64}", hex(name)),
        name: name.to_owned(),
        driver: driver.to_owned(),
        bridge: bridge.map(str::to_owned),
        ..DockerNetwork::default()
    }
}

fn networks() -> Vec<DockerNetwork> {
    vec![network("app", Some("br-app")), network("db", Some("br-db")), network("vlan", None)]
}

fn id_of(name: &str) -> String {
    network(name, None).id
}

fn labels(text: &str) -> HashMap<String, String> {
    let pairs = text.split_whitespace().filter_map(|label| label.split_once('='));
    pairs.map(|(label, value)| (format!("lbridge.{label}"), value.to_owned())).collect()
}

fn container(name: &str, networks: &[&str], text: &str) -> Labelled {
    let networks = networks.iter().map(|name| id_of(name)).collect();
    let id = format!("{:0>64}", format!("c0{}", name.len()));
    Labelled::new(Kind::Container, (id, name.to_owned()), 0, networks, &labels(text)).unwrap()
}

fn of_network(name: &str, text: &str) -> Labelled {
    let id = id_of(name);
    Labelled::new(Kind::Network, (id.clone(), name.to_owned()), 0, vec![id], &labels(text)).unwrap()
}

fn settings(ports: &[&str]) -> Settings {
    let range = |text: &&str| PortRange::of(&PortSpec::parse_many(text).unwrap()).unwrap();
    Settings { enabled: true, ports: ports.iter().map(range).collect(), ..Settings::default() }
}

fn allowed(rules: &[(&str, &str)], change: impl Fn(&mut Rule), origin: Origin) -> Rules {
    let rule = |(network, spec): &(&str, &str)| {
        let mut rule = Rule::new(network.parse().unwrap(), spec.parse().unwrap());
        change(&mut rule);
        rule
    };
    Rules::default().allow(rules.iter().map(rule), origin).unwrap()
}

/// Returns the rules of labels, one per line, and the problems.
fn derived(labelled: &[Labelled], settings: &Settings, own: &Rules) -> (Vec<String>, Vec<String>) {
    let derived = derive(labelled, settings, &networks(), own);
    assert_eq!(derived.more, 0);
    let of_labels = derived.rules.iter().filter(|(.., origin)| *origin == Origin::Label);
    let told = |(id, rule, _): (_, &Rule, _)| {
        let from: Vec<_> = rule.options.from.iter().map(String::as_str).collect();
        let localhost = if rule.options.localhost { " localhost" } else { "" };
        let loopback = if rule.options.source == Source::Loopback { " loopback" } else { "" };
        format!("{id} -> {} for [{}]{localhost}{loopback}", rule.spec.target, from.join(" "))
    };
    (of_labels.map(told).collect(), derived.problems.iter().map(ToString::to_string).collect())
}

fn asked(labelled: &[Labelled]) -> (Vec<String>, Vec<String>) {
    derived(labelled, &settings(&["1-60000", "53/udp"]), &Rules::default())
}

#[test]
fn a_container_asks_for_itself_on_each_of_its_bridges() {
    let (rules, problems) = asked(&[container("web", &["app", "db", "vlan"], "allow=80,81=8081,53/udp")]);
    assert_eq!(
        rules,
        [
            "app 53/udp -> 127.0.0.1:53 for [web]",
            "app 80 -> 127.0.0.1:80 for [web]",
            "app 81 -> 127.0.0.1:8081 for [web]",
            "db 53/udp -> 127.0.0.1:53 for [web]",
            "db 80 -> 127.0.0.1:80 for [web]",
            "db 81 -> 127.0.0.1:8081 for [web]",
        ]
    );
    assert!(problems.is_empty(), "{problems:?}");
    let (rules, problems) = asked(&[container("far", &["vlan"], "allow=80")]);
    assert!(rules.is_empty() && problems[0].contains("no network with a bridge"), "{problems:?}");
}

#[test]
fn containers_that_ask_for_the_same_share_a_rule() {
    let both = ["web_1", "web_2"].map(|name| container(name, &["app"], "allow=80 localhost=true"));
    let (rules, problems) = asked(&both);
    assert_eq!(
        (rules, problems),
        (vec!["app 80 -> 127.0.0.1:80 for [web_1 web_2] localhost".to_owned()], vec![])
    );
}

#[test]
fn a_networks_label_is_for_all_of_it_and_covers_its_containers() {
    let labelled = [container("web", &["app"], "allow=80,81"), of_network("app", "allow=80")];
    let (rules, problems) = asked(&labelled);
    assert_eq!(rules, ["app 80 -> 127.0.0.1:80 for []", "app 81 -> 127.0.0.1:81 for [web]"]);
    assert!(problems.is_empty(), "{problems:?}");
    let (rules, problems) =
        asked(&[container("web", &["app"], "allow=80=81"), of_network("app", "allow=80")]);
    assert_eq!(rules, ["app 80 -> 127.0.0.1:80 for []"]);
    assert!(
        problems[0].starts_with("container web, ") && problems[0].contains("by network app"),
        "{problems:?}"
    );
}

#[test]
fn who_was_there_first_has_the_port() {
    let mut old = container("z", &["app"], "allow=80");
    let new = Labelled { created: 2, ..container("a", &["app"], "allow=80=81") };
    old.created = 1;
    let (rules, problems) = asked(&[new, old]);
    assert_eq!(rules, ["app 80 -> 127.0.0.1:80 for [z]"]);
    assert!(
        problems[0].starts_with("container a, ") && problems[0].contains("by container z"),
        "{problems:?}"
    );
}

#[test]
fn rules_of_others_go_first() {
    let web = [container("web", &["app"], "allow=80")];
    let with = |own: &Rules| derived(&web, &settings(&["80"]), own);
    let same = allowed(
        &[("app", "80")],
        |rule| rule.options.path = super::super::rule::DatapathChoice::Relay,
        Origin::Cli,
    );
    assert_eq!(with(&same), (vec![], vec![]), "it covers the label");
    for by_other_name in ["bridge:br-app", &id_of("app")] {
        assert_eq!(with(&allowed(&[(by_other_name, "80")], |_| (), Origin::Config)), (vec![], vec![]));
    }
    let own = |name: &str| {
        allowed(&[("app", "80")], |rule| rule.options.from = [name.to_owned()].into(), Origin::Cli)
    };
    assert_eq!(with(&own("web")), (vec![], vec![]));
    for (own, by) in [
        (own("other"), "lbridge allow"),
        (allowed(&[("app", "80=81")], |_| (), Origin::Cli), "lbridge deny app 80"),
        (
            allowed(&[("app", "80")], |rule| rule.options.source = Source::Loopback, Origin::Config),
            "lbridge.toml",
        ),
        (allowed(&[("bridge:br-app", "80=81")], |_| (), Origin::Cli), "lbridge deny bridge:br-app 80"),
    ] {
        let (rules, problems) = with(&own);
        assert!(rules.is_empty() && problems.len() == 1, "{rules:?} {problems:?}");
        assert!(problems[0].starts_with("container web, ") && problems[0].contains(by), "{problems:?}");
    }
    let elsewhere = allowed(&[("db", "80=81"), ("app", "81")], |_| (), Origin::Cli);
    assert_eq!(with(&elsewhere).0.len(), 1);
}

#[test]
fn the_administrators_bounds_hold() {
    let nothing = derived(&[container("web", &["app"], "allow=80")], &settings(&[]), &Rules::default());
    assert!(nothing.0.is_empty() && nothing.1[0].contains("80 not in label_ports"), "{nothing:?}");
    // The host's port counts, the dialled one, and the protocol.
    let web = [container("web", &["app"], "allow=22=80,80=22,53,53/udp,80/udp,80=53,8080=53")];
    let (rules, problems) = derived(&web, &settings(&["80", "53", "53/udp"]), &Rules::default());
    assert_eq!(
        rules,
        [
            "app 53 -> 127.0.0.1:53 for [web]",
            "app 53/udp -> 127.0.0.1:53 for [web]",
            "app 80 -> 127.0.0.1:53 for [web]"
        ]
    );
    assert!(problems[0].contains("22, 80/udp not in label_ports"), "{problems:?}");
    let undialled = "would dial 22, 8080, which is neither in label_ports nor in label_dialled_ports";
    assert!(problems[1].contains(undialled), "{problems:?}");
    assert_eq!(problems.len(), 2);

    // If the administrator says so, other ports may be dialled, but not led to.
    let mut bounds = settings(&["80"]);
    bounds.dialled_ports = settings(&["8000-8010", "53/udp"]).ports;
    let web = [container("web", &["app"], "allow=8000=80,8011=80,8001,53=80")];
    let (rules, problems) = derived(&web, &bounds, &Rules::default());
    assert_eq!(rules, ["app 8000 -> 127.0.0.1:80 for [web]"]);
    assert!(problems[0].contains("8001 not in label_ports"), "{problems:?}");
    assert!(problems[1].contains("would dial 8011, 53,"), "{problems:?}");

    let web = [container("web", &["app"], "allow=80 source=loopback")];
    let (rules, problems) = derived(&web, &settings(&["80"]), &Rules::default());
    assert!(rules.is_empty() && problems[0].contains("not in label_sources"), "{problems:?}");
    let mut bounds = settings(&["80"]);
    bounds.sources.insert(Source::Loopback);
    assert_eq!(derived(&web, &bounds, &Rules::default()).0, ["app 80 -> 127.0.0.1:80 for [web] loopback"]);
}

#[test]
fn what_is_wrong_is_said_with_whose_it_is_and_stops_nothing_else() {
    let good = container("good", &["db"], "allow=80");
    for (text, wrong) in [
        ("allow=unix", "not a port"),
        ("allow=80=unix:/run/x", "only lead to ports of 127.0.0.1"),
        ("allow=80=[::1]:80", "only lead to ports of 127.0.0.1"),
        ("allow=80=192.0.2.1:80", "not on loopback"),
        ("allow=0", "1 to 65535"),
        ("allow=all", "name the ports"),
        ("allow=,", "names no port"),
        ("allow=1-60000", "more than 256 ports"),
        ("allow=80 localhost=yes", "neither true nor false"),
        ("allow=80 source=host", "it is not a source"),
        ("allow=80,53/udp,x source=loopback", "lbridge.source=loopback out"),
    ] {
        let mut bounds = settings(&["1-60000", "53/udp"]);
        bounds.sources.insert(Source::Loopback);
        let (rules, problems) =
            derived(&[container("bad", &["app"], text), good.clone()], &bounds, &Rules::default());
        assert!(rules.iter().any(|rule| rule.starts_with("db 80 ")), "{text}: {rules:?}");
        let told = problems.iter().any(|p| p.starts_with("container bad, lbridge.") && p.contains(wrong));
        assert!(told, "{text}: {problems:?}");
    }
    // Its good ports are its own.
    let (rules, problems) = asked(&[container("half", &["app"], "allow=80,x alow=81")]);
    assert_eq!((rules.len(), problems.len()), (1, 2), "{rules:?} {problems:?}");
    assert!(problems[0].contains("no such label"), "{problems:?}");
}

#[test]
fn hostile_labels_are_bounded() {
    let mut nasty = container("bad\u{1b}[2J\u{202e}", &["app"], "allow=80");
    nasty.allow = format!("{}\n\u{1b}]0;x\u{7}", "9".repeat(3000));
    let huge = Labelled { allow: "80,".repeat(5000), ..container("huge", &["app"], "allow=80") };
    let (rules, problems) = asked(&[nasty, huge]);
    assert!(rules.is_empty() && problems.len() == 2, "{problems:?}");
    for problem in problems {
        assert!(problem.chars().count() < 700 && !problem.chars().any(char::is_control), "{problem:?}");
        assert!(!problem.contains('\u{202e}'));
    }
    let many = |count: usize| -> Vec<_> {
        (0..count).map(|n| container(&format!("c{n}"), &["app"], "allow=x,y,z,1,2,3,4,5,6,7")).collect()
    };
    let derived = derive(&many(200), &settings(&[]), &networks(), &Rules::default());
    assert_eq!((derived.problems.len(), derived.more), (MAX_PROBLEMS, 200 * 4 - MAX_PROBLEMS));

    let labels = HashMap::from([(ALLOW.to_owned(), "1".repeat(1 << 20))]);
    let cut = Labelled::new(Kind::Container, (String::new(), String::new()), 0, vec![], &labels).unwrap();
    assert_eq!(cut.allow.len(), MAX_TEXT + 1);
}

#[test]
fn a_name_cannot_pass_for_another_network_or_container() {
    let app = network("app", Some("br-app"));
    // Named as the beginning of the other's id.
    let impostor = network(&app.id[..12], Some("br-evil"));
    let twin = DockerNetwork { id: "f".repeat(64), ..network("app", Some("br-twin")) };
    for other in [impostor, twin] {
        let networks = [app.clone(), other.clone()];
        let mut web = container("web", &[], "allow=80");
        web.networks = vec![other.id.clone()];
        let derived = derive(&[web], &settings(&["80"]), &networks, &Rules::default());
        let (id, ..) = derived.rules.iter().next().unwrap();
        let Network::Docker(name) = &id.network else { panic!("{id}") };
        assert_eq!(find_networks(&networks, name), [&other]);
    }
    let by_id = container("0123456789ab", &["app"], "allow=80");
    let (rules, _) = asked(std::slice::from_ref(&by_id));
    assert_eq!(rules, [format!("app 80 -> 127.0.0.1:80 for [{}]", by_id.id)]);
}

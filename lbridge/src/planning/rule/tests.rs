//! Tests: what can be written, and what contradicts itself.

use std::{num::NonZeroU32, time::Duration};

use super::*;

fn spec(text: &str) -> PortSpec {
    text.parse().unwrap()
}

fn rule(network: &str, port: &str) -> Rule {
    Rule::new(network.parse().unwrap(), spec(port))
}

fn with(mut rule: Rule, change: impl FnOnce(&mut Options)) -> Rule {
    change(&mut rule.options);
    rule
}

#[test]
fn ports_as_the_contract_writes_them() {
    for text in [
        "5432",
        "5432=15432",
        "80=127.0.0.1:3000",
        "80=[::1]:3000",
        "80=127.8.9.1:3000",
        "5432=unix:/run/pg/.s.PGSQL.5432",
    ] {
        assert_eq!(spec(text).to_string(), text);
    }
    assert_eq!(spec("80=80"), spec("80"));
    assert_eq!(PortSpec::parse_many("8000-8010").unwrap().len(), 11);
    assert_eq!(PortSpec::parse_many("65535-65535").unwrap(), [spec("65535")]);
}

#[test]
fn wrong_ports_are_refused_with_a_remedy() {
    for text in [
        "0",
        "65536",
        "-1",
        "+80",
        "",
        " 80",
        "http",
        "all",
        "80=0",
        "80=65536",
        "80=",
        "80=10.0.0.1:80",
        "80=0.0.0.0:80",
        "80=[::]:80",
        "80=[::2]:80",
        "80=[::ffff:127.0.0.1]:80",
        "80=127.0.0.1:0",
        "80=127.0.0.1",
        "80=unix:",
        "80=unix:rel",
        "90-80",
        "1-65536",
        "80=unix:/a\nb",
    ] {
        let error = PortSpec::parse_many(text).unwrap_err().to_string();
        assert!(!error.contains('\n') && error.len() > 10, "{text:?}: {error}");
    }
}

#[test]
fn networks() {
    for text in [
        "app_net",
        "bridge:docker0",
        "0123456789ab",
        "a.b-c",
        "container:web-1",
        "netns:/run/netns/a b",
        "pid:4711",
    ] {
        assert_eq!(text.parse::<Network>().unwrap().to_string(), text);
    }
    for text in [
        "",
        "bridge:",
        "bridge:a/b",
        "bridge:sixteen-letters!",
        "bridge:..",
        "a b",
        "a\nb",
        "../x",
        "container:",
        "container:a/b",
        "container:a:b",
        "netns:",
        "netns:x",
        "netns:/a\nb",
        "pid:",
        "pid:0",
        "pid:-1",
        "pid:+1",
        "pid:2147483648",
        "pid:self",
    ] {
        assert!(text.parse::<Network>().is_err(), "{text:?}");
    }
}

#[test]
fn allow_is_idempotent_and_refuses_contradictions_whole() {
    let rules = Rules::default().allow([rule("a", "80")], Origin::Cli).unwrap();
    assert_eq!(rules.allow([rule("a", "80")], Origin::Cli).unwrap(), rules);
    let conflict = rules.allow([rule("a", "81"), rule("a", "80=3000")], Origin::Cli).unwrap_err();
    assert_eq!(
        conflict.for_cli().to_string(),
        "a 80=3000 contradicts a 80, which is allowed already; run `lbridge deny a 80` first"
    );
    let range = PortSpec::parse_many("8000-8010").unwrap().into_iter();
    let range = range.map(|spec| Rule::new("a".parse().unwrap(), spec));
    let loopback = with(rule("a", "8005"), |options| options.source = Source::Loopback);
    let conflict = rules.allow(range.chain([loopback]), Origin::Cli).unwrap_err();
    assert_eq!(
        conflict.for_cli().to_string(),
        "a 8005 --source loopback contradicts a 8005, both asked for at once; leave one of them out"
    );
    assert_eq!(rules.len(), 1);
}

#[test]
fn deny_refuses_the_unknown_and_the_configs() {
    let rules = Rules::default().allow([rule("a", "80")], Origin::Cli).unwrap();
    let rules = rules.allow([rule("a", "81")], Origin::Config).unwrap();
    let unknown = rule("b", "80").id();
    assert!(matches!(rules.deny([rule("a", "80").id(), unknown]), Err(RuleError::NoSuchRule { .. })));
    assert!(matches!(rules.deny([rule("a", "81").id()]), Err(RuleError::ReadOnly { .. })));
    assert_eq!(rules.deny([rule("a", "80").id()]).unwrap().len(), 1);
}

#[test]
fn what_could_never_serve_is_refused() {
    let unix = rule("a", "80=unix:/run/x");
    assert!(matches!(
        Rules::default().allow([unix.clone()], Origin::Cli),
        Err(RuleError::NeedsLoopback { .. })
    ));
    let asked = with(unix, |options| options.source = Source::Loopback);
    assert_eq!(Rules::default().allow([asked], Origin::Cli).unwrap().len(), 1);
}

#[test]
fn what_only_a_relay_can_do_is_no_steering() {
    let limited = with(rule("a", "80"), |options| options.max_connections = NonZeroU32::new(5));
    let idle = with(rule("a", "80"), |options| options.idle_timeout = Some(Duration::from_secs(60)));
    let told = with(rule("a", "80"), |options| options.proxy_protocol = Some(ProxyProtocol::V2));
    for only_relayed in [limited, idle, told] {
        let steered = with(only_relayed, |options| options.path = DatapathChoice::Steer);
        let refused = Rules::default().allow([steered.clone()], Origin::Cli);
        assert!(matches!(refused, Err(RuleError::NeedsRelay { .. })), "{steered:?}");
        let auto = with(steered, |options| options.path = DatapathChoice::Auto);
        assert!(Rules::default().allow([auto], Origin::Cli).is_ok());
    }
    let inside = with(rule("container:a", "80"), |options| options.path = DatapathChoice::Steer);
    assert!(matches!(Rules::default().allow([inside], Origin::Cli), Err(RuleError::NeedsRelay { .. })));
}

#[test]
fn a_process_is_more_than_its_number() {
    let born = |ticks| Some(ProcessStart { ticks, boot: "b".to_owned() });
    assert!(matches!(
        Rules::default().allow([rule("pid:7", "80")], Origin::Config),
        Err(RuleError::ProcessUnknown { .. })
    ));
    let first = Rule { process: born(1), ..rule("pid:7", "80") };
    let rules = Rules::default().allow([first.clone()], Origin::Cli).unwrap();
    assert_eq!(rules.allow([first], Origin::Cli).unwrap(), rules);
    let second =
        Rule { process: born(2), ..with(rule("pid:7", "80"), |options| options.source = Source::Loopback) };
    let rules = rules.allow([second.clone()], Origin::Cli).unwrap();
    assert_eq!(rules.iter().map(|(_, rule, _)| rule).collect::<Vec<_>>(), [&second]);
    assert_eq!("12@a-b".parse::<ProcessStart>().unwrap().to_string(), "12@a-b");
}

#[test]
fn a_remark_is_no_conflict() {
    let rules = Rules::default().allow([rule("a", "80")], Origin::Cli).unwrap();
    let remarked = with(rule("a", "80"), |options| options.comment = Some("why".to_owned()));
    let rules = rules.allow([remarked], Origin::Cli).unwrap();
    let rules = rules.allow([rule("a", "80")], Origin::Cli).unwrap();
    assert_eq!(rules.iter().next().unwrap().1.options.comment.as_deref(), Some("why"));
}

#[test]
fn protocols_are_written_as_docker_does() {
    let told = |text: &str| {
        let spec = spec(text);
        (spec.protocol, spec.to_string())
    };
    assert_eq!(told("53/udp"), (Protocol::Udp, "53/udp".to_owned()));
    assert_eq!(told("53=5353/udp"), (Protocol::Udp, "53=5353/udp".to_owned()));
    assert_eq!(told("53=[::1]:5353/udp"), (Protocol::Udp, "53=[::1]:5353/udp".to_owned()));
    assert_eq!(told("53/tcp"), (Protocol::Tcp, "53".to_owned()));
    assert_eq!(told("5=unix:/run/udp"), (Protocol::Tcp, "5=unix:/run/udp".to_owned()));
    assert_eq!(PortSpec::parse_many("5000-5002/udp").unwrap().len(), 3);
    assert!("53/sctp".parse::<PortSpec>().is_err());
    let both = Rules::default().allow([rule("a", "53"), rule("a", "53/udp")], Origin::Cli).unwrap();
    assert_eq!(both.iter().map(|(id, ..)| id.to_string()).collect::<Vec<_>>(), ["a 53", "a 53/udp"]);
    assert_eq!(both.deny([rule("a", "53").id()]).unwrap().len(), 1);
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let refused = |rule: Rule, words: &str| {
        let refused = Rules::default().allow([rule], Origin::Cli).unwrap_err();
        assert!(matches!(refused, RuleError::Contradiction { .. }), "{refused:?}");
        let refused = refused.for_cli().to_string();
        assert!(refused.contains(words), "{refused}");
    };
    refused(with(rule("container:c", "80"), |options| options.localhost = true), "leave --localhost out");
    refused(
        with(rule("container:c", "80"), |options| options.from = ["a".to_owned()].into()),
        "leave --from out",
    );
    refused(rule("container:c", "53/udp"), "on a network");
    refused(
        with(rule("a", "53/udp"), |options| options.source = Source::Loopback),
        "leave --source loopback out",
    );
    refused(with(rule("a", "53/udp"), |options| options.localhost = true), "leave --localhost out");
    refused(with(rule("a", "53/udp"), |options| options.path = DatapathChoice::Relay), "never relayed");
    refused(
        with(rule("a", "53/udp"), |options| options.proxy_protocol = Some(ProxyProtocol::V2)),
        "never relayed",
    );
}

/// A client of the control API can do no more than a user of the commands.
#[test]
fn control_characters_are_refused_wherever_a_rule_comes_from() {
    for c in ["\n", "\r", "\0", "\u{1b}[31m", "\u{7f}", "\u{85}", "\u{9b}"] {
        for text in ["a{}b", "bridge:a{}b", "container:a{}b", "netns:/run/a{}b"] {
            assert!(text.replace("{}", c).parse::<Network>().is_err(), "{text} {c:?}");
        }
        assert!(format!("80=unix:/run/a{c}b").parse::<PortSpec>().is_err(), "{c:?}");
        let from = with(rule("a", "80"), |options| options.from = [format!("a{c}b")].into());
        let comment = with(rule("a", "80"), |options| options.comment = Some(format!("a{c}b")));
        for rule in [from, comment] {
            for origin in [Origin::Cli, Origin::Config, Origin::Label] {
                let refused = Rules::default().allow([rule.clone()], origin).unwrap_err();
                assert!(matches!(refused, RuleError::Invalid { .. }), "{refused:?}");
                assert!(!refused.for_cli().to_string().contains(c), "{refused:?}");
            }
        }
    }
    for name in ["", "a b", "a/b", "a,b", "a:b", &"a".repeat(256)] {
        let from = with(rule("a", "80"), |options| options.from = [name.to_owned()].into());
        assert!(
            matches!(Rules::default().allow([from], Origin::Cli), Err(RuleError::Invalid { .. })),
            "{name:?}"
        );
    }
    let plain = with(rule("a", "80"), |options| {
        options.from = ["web-1".to_owned(), "0123456789ab".to_owned()].into();
        options.comment = Some("\"für\" Müller & Söhne \u{200f}".to_owned());
    });
    assert_eq!(Rules::default().allow([plain], Origin::Cli).unwrap().len(), 1);
}

/// Whoever reads an error should find the option where the rule is, and know how to write it there.
#[test]
fn an_error_is_spelled_for_its_place() {
    let refused = |rule: Rule| {
        let error = Rules::default().allow([rule], Origin::Cli).unwrap_err();
        [error.for_cli().to_string(), error.for_file().to_string(), error.for_label().to_string()]
    };
    let ends = |told: [String; 3], ends: [&str; 3]| {
        for (told, end) in told.iter().zip(ends) {
            assert!(told.ends_with(end), "{told:?} does not end with {end:?}");
        }
    };
    ends(
        refused(rule("a", "80=unix:/run/x")),
        ["; allow it with --source loopback", "; add source = \"loopback\"", "; add lbridge.source=loopback"],
    );
    ends(
        refused(with(rule("a", "53/udp"), |options| options.source = Source::Loopback)),
        [
            "leave --source loopback out",
            "leave source = \"loopback\" out",
            "leave lbridge.source=loopback out",
        ],
    );
    ends(
        refused(with(rule("a", "53/udp"), |options| options.localhost = true)),
        ["leave --localhost out", "leave localhost out", "leave lbridge.localhost out"],
    );
    let steered = with(rule("a", "80"), |options| {
        options.path = DatapathChoice::Steer;
        options.max_connections = NonZeroU32::new(5);
    });
    let [cli, file, _] = refused(steered);
    assert!(cli.starts_with("a 80: --path steer is not possible: "), "{cli}");
    assert!(file.starts_with("a 80: path = \"steer\" is not possible: "), "{file}");

    let all = with(rule("a", "80=3000"), |options| {
        options.from = ["db".to_owned(), "web".to_owned()].into();
        options.localhost = true;
        options.source = Source::Loopback;
        options.max_connections = NonZeroU32::new(5);
        options.idle_timeout = Some(Duration::from_secs(600));
        options.comment = Some("why".to_owned());
    });
    assert_eq!(
        Spelling::Command.rule(&all),
        "80=3000 --from db,web --localhost --source loopback --max-connections 5 --idle-timeout 10m"
    );
    assert_eq!(
        Spelling::File.rule(&all),
        "80=3000, from = [\"db\", \"web\"], localhost = true, source = \"loopback\", max_connections = 5, \
         idle_timeout = \"10m\""
    );
    assert_eq!(Spelling::Label.rule(&all), "80=3000, lbridge.localhost=true, lbridge.source=loopback");
}

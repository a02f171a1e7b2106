//! Tests: what the file may contain, and how errors in it are reported.

use super::*;

fn read(text: &str) -> Result<Config, String> {
    Config::parse(text, "f".to_owned()).map_err(|error| format!("{error:#}"))
}

fn rules(text: &str) -> Vec<String> {
    read(text).unwrap().rules.iter().map(|entry| entry.rule.spec.to_string()).collect()
}

#[test]
fn a_pipe_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(format!("{:#}", Config::load(&path).unwrap_err()).contains("it is a pipe"));
    assert!(Config::load(&folder.path().join("none")).is_ok());
    assert!(Config::load(Path::new("/dev/null")).is_ok());
}

#[test]
fn the_example_has_every_setting() {
    let example = include_str!("../../../../packaging/lbridge.toml");
    assert_eq!(read(example).unwrap(), read("").unwrap());
    let uncommented =
        |line: &str| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).map(str::to_owned);
    let lines: Vec<_> = example.lines().map(|line| uncommented(line).unwrap_or(line.to_owned())).collect();
    let config = read(&lines.join("\n")).unwrap();
    assert_eq!(config.len(), 1 + 2 + 11);
    config.rules_with(vec![], Path::new("allowed")).unwrap();
    for name in SETTINGS.iter().chain(&rule_keys()) {
        let set = |line: &&String| line.starts_with(&format!("{name} = ")) || **line == format!("[[{name}]]");
        assert!(lines.iter().any(|line| set(&line)), "{name}");
    }
}

#[test]
fn labels_are_off_and_bounded_unless_the_file_says_otherwise() {
    let off = read("").unwrap();
    assert_eq!(off.labels, labels::Settings::default());
    assert!(!off.labels.enabled && off.labels.ports.is_empty());
    let text = "labels = true\nlabel_ports = [5432, \"8000-8010\", \"53/udp\"]\n\
                label_dialled_ports = [80, \"9000-9010\"]\nlabel_sources = [\"loopback\"]\n";
    let on = read(text).unwrap();
    assert!(on.labels.enabled);
    let settings: Vec<_> =
        on.settings().into_iter().skip(3).map(|(name, now)| format!("{name} = {now}\n")).collect();
    assert_eq!(settings.concat(), text, "as one would write them");
}

#[test]
fn ports_are_written_as_one_likes() {
    let rule = |ports: &str| rules(&format!("[[rule]]\nnetwork = \"a\"\n{ports}\n"));
    assert_eq!(rule("port = 5432"), ["5432"]);
    assert_eq!(rule("port = \"5432\""), ["5432"]);
    assert_eq!(rule("port = \"80=[::1]:3000\""), ["80=[::1]:3000"]);
    assert_eq!(rule("port = \"80-82\""), ["80", "81", "82"]);
    assert_eq!(rule("ports = [1, \"2=3\", \"4-5\"]"), ["1", "2=3", "4", "5"]);
    assert_eq!(rules(""), [""; 0]);
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_remedy() {
    let rule = "[[rule]]\nnetwork = \"a\"\n";
    for (text, place, words) in [
        ("drain_timeot = \"5s\"\n".to_owned(), "f:1:1: ", "write drain_timeout"),
        (
            "\n  zzz = 1\n".to_owned(),
            "f:2:3: ",
            "there are drain_timeout, firewall, aliases, labels, label_ports,",
        ),
        ("label = true\n".to_owned(), "f:1:1: ", "write labels"),
        ("labels = \"true\"\n".to_owned(), "f:1:10: ", "expected a boolean"),
        ("label_ports = [1, \"2=3\"]\n".to_owned(), "f:1:15: ", "\"2=3\" says where"),
        ("label_ports = [1, \"x\"]\n".to_owned(), "f:1:19: ", "not a port"),
        ("label_ports = 1\n".to_owned(), "f:1:15: ", "a list, as [5432, "),
        ("label_sources = \"loopback\"\n".to_owned(), "f:1:17: ", "a list, as [\"container\"]"),
        ("aliases = \"10.0.0.5\"\n".to_owned(), "f:1:11: ", "a list, as [\"10.0.0.5\"]"),
        ("label_sources = [\"x\"]\n".to_owned(), "f:1:18: ", "container"),
        ("drain_timeout = \"5 parsecs\"\n".to_owned(), "f:1:17: ", "not a time; write"),
        ("[rule]\nnetwork = \"a\"\nport = 1\n".to_owned(), "f:1:2: ", "[[rule]]"),
        ("[[rules]]\nnetwork = \"a\"\nport = 1\n".to_owned(), "f:1:3: ", "write rule"),
        ("network = \"a\"\n".to_owned(), "f:1:1: ", "below [[rule]]"),
        (format!("{rule}port = 1\ndrain_timeout = \"5s\"\n"), "f:4:1: ", "before the first [[rule]]"),
        (format!("{rule}prot = 1\n"), "f:3:1: ", "write port"),
        (format!("{rule}idle-timeout = \"1s\"\nport = 1\n"), "f:3:1: ", "write idle_timeout"),
        (format!("{rule}port = 0\n"), "f:3:8: ", "1 to 65535"),
        (format!("{rule}port = 70000\n"), "f:3:8: ", "1 to 65535"),
        (format!("{rule}port = -1\n"), "f:3:8: ", "not a port"),
        (format!("{rule}port = [1]\n"), "f:3:8: ", "ports = ["),
        (format!("{rule}port = true\n"), "f:3:8: ", "a port, as 5432"),
        (format!("{rule}ports = [1,\n  \"x\"]\n"), "f:4:3: ", "not a port"),
        (rule.to_owned(), "f:1:1: ", "add port"),
        (format!("{rule}port = 1\nports = [2]\n"), "f:1:1: ", "remove one"),
        (format!("{rule}port = 1\n\n[[rule]]\nport = 2\n"), "f:5:1: ", "network"),
        (format!("{rule}port = 1\nsource = \"x\"\n"), "f:4:10: ", "container"),
        (format!("{rule}port = 1\nmax_connections = 0\n"), "f:4:19: ", "at least 1"),
        (
            format!("{rule}port = 1\nmax_connections = \"5\"\n"),
            "f:4:19: ",
            "a number of connections, at least 1",
        ),
        (format!("{rule}port = 1\nmax_connections = -1\n"), "f:4:19: ", "at least 1"),
        (format!("{rule}port = 1\nidle_timeout = 30\n"), "f:4:16: ", "a time, as \"30s\""),
        (format!("{rule}port = 1\nfrom = \"web\"\n"), "f:4:8: ", "a list of containers, as [\"web\""),
        (format!("{rule}port = 1\nfrom = [\"web\", \"a b\"]\n"), "f:4:16: ", "is not a container"),
        (format!("{rule}port = 1\nproxy_protocol = \"v3\"\n"), "f:4:18: ", "`v1` or `v2`"),
        (format!("{rule}ports = 80\n"), "f:3:9: ", "a list, as [5432"),
        ("[[rule]]\nport = 1\n".to_owned(), "f:1:1: ", "add network = "),
        ("[[rule]]\nnetwork = a\n".to_owned(), "f:2:11: ", "must be quoted"),
        ("drain_timeout = 30\n".to_owned(), "f:1:17: ", "a time, as \"30s\""),
        ("firewall = \"on\"\n".to_owned(), "f:1:12: ", "`manage` or `off`"),
        ("aliases = [\"127.0.0.2\"]\n".to_owned(), "f:1:11: ", "one of the host's"),
        ("a = \n".to_owned(), "f:1:", ""),
        (format!("{rule}port = 1\nport = 2\n"), "f:4:1: ", "duplicate"),
    ] {
        let error = read(&text).unwrap_err();
        assert!(error.starts_with(place) && error.contains(words) && !error.contains('\n'), "{text}{error}");
    }
}

#[test]
fn rules_that_contradict_each_other_are_told_with_their_places() {
    let text = "[[rule]]\nnetwork = \"a\"\nport = 1\n[[rule]]\nnetwork = \"a\"\nports = [2, \"1=3\"]\n";
    let error = read(text).unwrap().rules_with(vec![], Path::new("allowed")).unwrap_err();
    assert_eq!(error.to_string(), "f:4:1: a 1 has a rule already, 1, at f:1:1; remove one");

    let config = read(&text[..text.rfind("[[").unwrap()]).unwrap();
    let mut allowed = config.rules[0].rule.clone();
    assert!(
        config.rules_with(vec![allowed.clone()], Path::new("allowed")).is_ok(),
        "the same is no contradiction"
    );
    allowed.options.source = Source::Loopback;
    let error = config.rules_with(vec![allowed], Path::new("allowed")).unwrap_err();
    let told = error.to_string();
    assert!(matches!(error, Unfit::Contradiction { .. }) && told.starts_with("f:1:1: a 1 "), "{told}");
    assert!(told.contains("allowed differently in allowed"), "{told}");

    let unix = read("[[rule]]\nnetwork = \"a\"\nport = \"1=unix:/x\"\n").unwrap();
    let error = unix.rules_with(vec![], Path::new("allowed")).unwrap_err().to_string();
    assert!(error.starts_with("f:1:1: a 1 ") && error.ends_with("add source = \"loopback\""), "{error}");

    let steered = "[[rule]]\nnetwork = \"a\"\nport = 1\npath = \"steer\"\nmax_connections = 5\n";
    let error = read(steered).unwrap().rules_with(vec![], Path::new("allowed")).unwrap_err().to_string();
    assert!(error.starts_with("f:1:1: a 1: path = \"steer\" is not possible: "), "{error}");
}

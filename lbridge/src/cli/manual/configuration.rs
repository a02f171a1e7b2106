//! configuration: lbridge.toml(5), key by key. A test compares it with the keys that the parser knows.

use super::Entry;

/// A key of lbridge.toml.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// The key's name.
    pub name: &'static str,
    /// The type of its value, as a phrase.
    pub value: &'static str,
    /// The default, as a phrase; `None` if the key is required.
    pub default: Option<&'static str>,
    /// The meaning of the key, in sentences.
    pub text: &'static str,
    /// The effect of a reload on the key, beyond what [`RELOAD`] says; may be empty.
    pub on_reload: &'static str,
    /// A whole file with the key.
    pub example: &'static str,
}

/// The page's description.
pub const DESCRIPTION: [&str; 2] = [
    "lbridge.toml has the rules and the settings of the administrator, in TOML. The daemon, lbridge run, \
     reads it when it starts and when it is told to reload it. All of it is optional, and the file may be \
     absent.",
    "Settings of the whole daemon go before the first [[rule]]. Unknown keys are errors, and lbridge \
     check-config names the place of an error. Rules that lbridge allow makes are kept elsewhere, in \
     /var/lib/lbridge, and must not contradict those of the file.",
];

/// The settings of the whole daemon.
pub const SETTINGS: &[Key] = &[
    Key {
        name: "drain_timeout",
        value: "a time, as \"30s\" or \"2m\"",
        default: Some("\"5s\""),
        text: "How long relayed connections may take to end when the daemon is stopped. Those that are left \
               are reset. Steered connections outlive the daemon.",
        on_reload: "The new time holds for the next stop.",
        example: "drain_timeout = \"30s\"",
    },
    Key {
        name: "firewall",
        value: "\"manage\" or \"off\"",
        default: Some("\"manage\""),
        text: "What lbridge may do to the host's firewall. With \"manage\" it adds an accept rule where the \
               firewall drops what a rule opens, and removes it with the rule. With \"off\" it changes \
               nothing, and lbridge status says what to type.",
        on_reload: "Accept rules are added, or removed, at once.",
        example: "firewall = \"off\"",
    },
    Key {
        name: "aliases",
        value: "a list of IP addresses",
        default: Some("none"),
        text: "Addresses of this host, of other interfaces, that containers dial instead of their network's \
               gateway. Every rule serves them as it does its gateway, for its own network alone. Docker's \
               host-gateway is one without being named. Loopback addresses are errors.",
        on_reload: "Rules are opened at new addresses, and closed at those that are gone.",
        example: "aliases = [\"10.0.0.5\", \"fd00::5\"]",
    },
    Key {
        name: "labels",
        value: "true or false",
        default: Some("false"),
        text: "Whether labels of containers and networks make rules; see LABELS. Whoever may start \
               containers then decides who reaches the ports in label_ports.",
        on_reload: "Turned off, the rules of labels end; turned on, the labels of running containers are \
                    read.",
        example: "labels = true\nlabel_ports = [5432]",
    },
    Key {
        name: "label_ports",
        value: "a list of ports and ranges",
        default: Some("none, so that labels can open nothing"),
        text: "The ports of this host that labels may lead to, and that they may have containers dial for \
               them.",
        on_reload: "Rules of labels that are out of bounds now end.",
        example: "labels = true\nlabel_ports = [5432, \"8000-8010\", \"53/udp\"]",
    },
    Key {
        name: "label_dialled_ports",
        value: "a list of ports and ranges",
        default: Some("none"),
        text: "Further ports that labels may have containers dial: with 80, the label lbridge.allow=80=8000 \
               may lead 80 to 8000. Leave out ports where a service of this host listens on every address: a \
               label would take what containers send there.",
        on_reload: "As for label_ports.",
        example: "labels = true\nlabel_ports = [8000]\nlabel_dialled_ports = [80]",
    },
    Key {
        name: "label_sources",
        value: "a list of \"container\" and \"loopback\"",
        default: Some("[\"container\"]"),
        text: "What labels may have services see. \"loopback\" lets them ask for lbridge.source=loopback, \
               too.",
        on_reload: "As for label_ports.",
        example: "labels = true\nlabel_ports = [5432]\nlabel_sources = [\"container\", \"loopback\"]",
    },
    Key {
        name: "rule",
        value: "an array of tables, written [[rule]] once for each rule",
        default: Some("none"),
        text: "A rule, or several for the same network that differ in the port alone; see RULES for its \
               keys.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = 5432\n\n[[rule]]\nnetwork = \"bridge:virbr0\"\n\
                  port = \"53/udp\"",
    },
];

/// The keys of a rule.
pub const RULE: &[Key] = &[
    Key {
        name: "network",
        value: "text",
        default: None,
        text: "Where connections come from: a Docker network's name or id; \"bridge:IFNAME\" for any Linux \
               bridge; \"container:NAME\" or \"netns:PATH\" for localhost inside of one. It need not exist \
               yet. \"pid:N\" is for lbridge allow alone, since a process does not outlive a boot.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"container:agent\"\nport = 11434",
    },
    Key {
        name: "port",
        value: "a number or text",
        default: Some("none; a rule has port or ports"),
        text: "What is dialled, and where it leads: 5432; \"5432=15432\"; \"80=127.0.0.1:3000\"; \
               \"80=[::1]:3000\"; \"8000-8010\"; \"53/udp\"; \"5432=unix:PATH\", which needs source = \
               \"loopback\". A target without an address is served on either loopback address.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = \"80=127.0.0.1:3000\"",
    },
    Key {
        name: "ports",
        value: "a list of numbers and texts, each as for port",
        default: Some("none; a rule has port or ports"),
        text: "Several ports, each of which is a rule of its own.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nports = [5432, \"8080=3000\", \"9000-9010\"]",
    },
    Key {
        name: "from",
        value: "a list of container names or ids",
        default: Some("every container of the network"),
        text: "The containers of the network that the rule is for. While none of them is there, nobody gets \
               in. Not for container: and netns: networks, which are one namespace each.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = 5432\nfrom = [\"web\", \"worker\"]",
    },
    Key {
        name: "localhost",
        value: "true or false",
        default: Some("false"),
        text: "Whether the port of the containers' own localhost leads there, too, unless the container \
               listens there itself. Needs Linux 5.14 or later.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = 5432\nlocalhost = true",
    },
    Key {
        name: "source",
        value: "\"container\" or \"loopback\"",
        default: Some("\"container\""),
        text: "What the service sees: the container's address; or a loopback one, as of a local client, \
               which it may trust.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = \"5432=unix:/run/postgresql/.s.PGSQL.5432\"\n\
                  source = \"loopback\"",
    },
    Key {
        name: "path",
        value: "\"auto\", \"steer\" or \"relay\"",
        default: Some("\"auto\""),
        text: "Steer where the kernel can and relay otherwise; steer or be blocked; always relay.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = 5432\npath = \"steer\"",
    },
    Key {
        name: "max_connections",
        value: "a number, at least 1",
        default: Some("16384 if the rule is relayed"),
        text: "How many connections to a port there may be at a time; more are refused. Only relays can \
               count, so the rule is relayed.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = 5432\nmax_connections = 100",
    },
    Key {
        name: "idle_timeout",
        value: "a time, as \"10m\"",
        default: Some("none"),
        text: "The time without a byte after which a connection is reset. The rule is relayed.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = 5432\nidle_timeout = \"10m\"",
    },
    Key {
        name: "proxy_protocol",
        value: "\"v1\" or \"v2\"",
        default: Some("none"),
        text: "Tell the service who connects, in the PROXY protocol's header of this version. The rule is \
               relayed.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = \"443=8443\"\nproxy_protocol = \"v2\"",
    },
    Key {
        name: "comment",
        value: "text in one line",
        default: Some("none"),
        text: "A remark, which lbridge list shows.",
        on_reload: "",
        example: "[[rule]]\nnetwork = \"app_net\"\nport = 5432\ncomment = \"orders\"",
    },
];

/// The effect of a reload on the whole file.
pub const RELOAD: [&str; 3] = [
    "systemctl reload lbridge, lbridge reload, or SIGHUP to the daemon has the file read again. What is new \
     is opened, what is gone is closed, and a rule with any other difference is replaced; open connections \
     go on. Unchanged rules are not touched, nor are those of lbridge allow.",
    "An invalid file is rejected as a whole, and the previous configuration stays active; lbridge status \
     says so until a reload succeeds.",
    "A daemon does not start with an invalid file: run lbridge check-config before a restart.",
];

/// The labels that containers and networks may have.
pub const LABELS: [Entry; 3] = [
    (
        "lbridge.allow",
        "The ports, separated by commas, each as for port: \"5432,8080=8000\". On a container it is a rule \
         for that container on each of its networks, while it runs; on a network, for all of the network.",
    ),
    ("lbridge.localhost", "\"true\": as localhost = true."),
    ("lbridge.source", "\"loopback\": as source = \"loopback\", if label_sources permits it."),
];

/// The section about labels.
pub const LABELS_TEXT: &str = "With labels = true containers request rules by their labels, within the \
                               bounds of label_ports, label_dialled_ports and label_sources. Rules of \
                               lbridge allow and of the file take precedence. lbridge status reports labels \
                               that ask for too much or cannot be read; they stop nothing else.";

/// A whole file.
pub const EXAMPLE: &str = "\
# Relayed uploads may take a minute to end when the daemon stops.
drain_timeout = \"1m\"

# Compose files may ask for these, by the label lbridge.allow.
labels = true
label_ports = [\"8000-8010\"]

[[rule]]
network = \"app_net\"
ports = [5432, 6379]
from = [\"web\", \"worker\"]
comment = \"orders\"

[[rule]]
network = \"bridge:virbr0\"
port = \"53/udp\"";

/// Files that matter to the page.
pub const FILES: [Entry; 2] = [super::CONFIG_FILE, super::RULES_FILE];

/// Other pages to read.
pub const SEE_ALSO: [&str; 5] =
    ["lbridge(1)", "lbridge-allow(1)", "lbridge-check-config(1)", "lbridge-reload(1)", "lbridge-run(1)"];

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, fs, path::Path};

    use super::*;
    use crate::{
        planning::labels,
        store::config::{self, Config},
    };

    fn names(keys: &[Key]) -> Vec<&'static str> {
        keys.iter().map(|key| key.name).collect()
    }

    #[test]
    fn the_page_has_the_parsers_keys_and_no_others() {
        let mut known = (config::SETTINGS.to_vec(), config::rule_keys());
        let mut told = (names(SETTINGS), names(RULE));
        for keys in [&mut known.0, &mut known.1, &mut told.0, &mut told.1] {
            keys.sort_unstable();
        }
        assert_eq!(told, known);
    }

    #[test]
    fn the_page_has_the_labels_that_are_read() {
        assert_eq!(LABELS.map(|(name, _)| name), [labels::ALLOW, labels::LOCALHOST, labels::SOURCE]);
    }

    /// Reads a file as `lbridge check-config` does.
    fn check(text: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lbridge.toml");
        fs::write(&file, text).unwrap();
        let config = Config::load(&file).map_err(|error| format!("{error:#}"))?;
        config.rules_with(vec![], Path::new("rules.toml")).map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn every_example_is_a_file_that_is_taken() {
        for key in SETTINGS.iter().chain(RULE) {
            check(key.example).unwrap_or_else(|error| panic!("{}: {error}", key.name));
            let is_set = |line: &str| {
                line.starts_with(&format!("{} = ", key.name)) || line == format!("[[{}]]", key.name)
            };
            assert!(key.example.lines().any(is_set), "{} is not in its example", key.name);
        }
        assert_eq!(check(EXAMPLE).unwrap().len(), 3);
        for line in SETTINGS.iter().chain(RULE).map(|key| key.example).chain([EXAMPLE]).flat_map(str::lines) {
            // A man page indents it by 11.
            assert!(line.chars().count() <= 69, "{line}");
        }
    }

    #[test]
    fn the_defaults_are_the_parsers() {
        let defaults: HashMap<_, _> = check("").unwrap().settings().into_iter().collect();
        for key in SETTINGS.iter().filter(|key| key.name != "rule") {
            let told = key.default.unwrap();
            let actual = defaults[key.name].trim_matches('"');
            let is_same = match actual {
                "[]" => told.starts_with("none"),
                _ => told.trim_matches('"') == actual,
            };
            assert!(is_same, "{}: {told}, and it is {actual}", key.name);
        }
    }

    #[test]
    fn a_key_without_a_default_is_needed() {
        for key in RULE.iter().filter(|key| key.default.is_none()) {
            let line = |line: &&str| !line.starts_with(key.name);
            let rest: Vec<_> = key.example.lines().filter(line).collect();
            assert!(check(&rest.join("\n")).is_err(), "{}", key.name);
        }
    }
}

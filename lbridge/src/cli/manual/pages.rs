//! pages: what the manual says about each command.

use super::{
    CONFIG_FILE, DOCKER_HOST, DOCUMENTATION, Entry, Example, LOG, PINS, Page, QUIET_LOG, RULES_FILE, SOCKET,
    UNIT,
};
use crate::cli::Exit;

/// Of commands that change or look up rules.
const RULE_COMMANDS: &[Exit] = &[Exit::Done, Exit::Failed, Exit::Usage, Exit::NoDaemon, Exit::Rule];
/// Of commands that only ask the daemon.
const DAEMON: &[Exit] = &[Exit::Done, Exit::Failed, Exit::Usage, Exit::NoDaemon];
/// Of commands that need no daemon.
const ALONE: &[Exit] = &[Exit::Done, Exit::Failed, Exit::Usage];

/// Every command, in the order of `lbridge --help`.
pub const PAGES: &[Page] = &[
    Page {
        command: "",
        description: &[
            "Containers on a Docker network, or on any Linux bridge, reach services that listen only on \
             this host's loopback: each port of each network that a rule names, and nothing else. The \
             kernel gives a container's connection to the service's own socket. What the kernel cannot, \
             the daemon relays.",
            "The daemon, lbridge run, is usually a service of systemd. The other commands ask it through \
             its control socket: as root, or as a member of the group lbridge.",
        ],
        examples: &[
            Example {
                purpose: "Let the containers of the Docker network app_net reach 127.0.0.1:5432",
                lines: &[
                    "# lbridge allow app_net 5432",
                    "app_net 5432: 172.18.0.1:5432 -> 127.0.0.1:5432 steered",
                    "# docker exec web psql -h 172.18.0.1 -U app",
                ],
            },
            Example { purpose: "See the rules, and why one does not serve", lines: &["# lbridge status"] },
            Example { purpose: "Find out what is wrong, and what to type", lines: &["# lbridge doctor"] },
            Example {
                purpose: "Take it back",
                lines: &["# lbridge deny app_net 5432", "app_net 5432: denied; open connections go on"],
            },
        ],
        exits: RULE_COMMANDS,
        exit_note: "",
        has_states: true,
        files: &[CONFIG_FILE, RULES_FILE, SOCKET, PINS, DOCUMENTATION],
        environment: &[LOG, DOCKER_HOST],
        see_also: &["lbridge.toml(5)", "systemctl(1)"],
    },
    Page {
        command: "run",
        description: &[
            "Keeps rules in force: follows the engine, the host's interfaces and its services, and \
             relays what the kernel cannot steer. It stays in the foreground, and logs to standard \
             error. SIGHUP reloads the configuration; SIGTERM and SIGINT end it.",
            "Steered connections and their rules stay in force without the daemon, until it runs again \
             or lbridge service cleanup removes them. Relayed connections end with it, after the time \
             drain_timeout in lbridge.toml(5).",
        ],
        examples: &[
            Example { purpose: "Run the daemon by hand, as without systemd", lines: &["# lbridge run"] },
            Example {
                purpose: "Serve bridges and namespaces on a host without Docker",
                lines: &["# lbridge run --no-docker"],
            },
            Example {
                purpose: "Follow Podman, and log more",
                lines: &[
                    "# export DOCKER_HOST=unix:///run/podman/podman.sock",
                    "# LBRIDGE_LOG=debug lbridge run",
                ],
            },
        ],
        exits: ALONE,
        exit_note: "",
        has_states: false,
        files: &[CONFIG_FILE, RULES_FILE, SOCKET, PINS],
        environment: &[LOG, DOCKER_HOST],
        see_also: &["lbridge.toml(5)", "lbridge-service(1)", "journalctl(1)"],
    },
    Page {
        command: "allow",
        description: &[
            "Makes a rule for each PORT, and returns once it is in force. Containers dial what it \
             prints: the network's gateway, or host.docker.internal. A rule goes by the network's name: \
             it waits for what does not exist yet, and follows what is removed and created again. Either \
             all rules of a command are made, or none.",
            "To allow what is allowed already changes nothing; another --comment replaces the old one.",
        ],
        examples: &[
            Example {
                purpose: "Let the containers of the Docker network app_net reach 127.0.0.1:5432",
                lines: &[
                    "# lbridge allow app_net 5432",
                    "app_net 5432: 172.18.0.1:5432 -> 127.0.0.1:5432 steered",
                ],
            },
            Example {
                purpose: "Have containers dial port 80, and reach port 3000",
                lines: &[
                    "# lbridge allow app_net 80=127.0.0.1:3000",
                    "app_net 80: 172.18.0.1:80 -> 127.0.0.1:3000 steered",
                ],
            },
            Example {
                purpose: "Admit two containers of the network, also at their own localhost",
                lines: &["# lbridge allow app_net 6379 --from web,worker --localhost"],
            },
            Example {
                purpose: "Several ports at once, by whatever is on a Linux bridge",
                lines: &["# lbridge allow bridge:virbr0 8000-8010 53/udp"],
            },
            Example {
                purpose: "A container without a network; it dials its own localhost",
                lines: &[
                    "# lbridge allow container:agent 11434",
                    "container:agent 11434: 127.0.0.1:11434 -> 127.0.0.1:11434 relayed",
                    "(a namespace's localhost is always relayed)",
                ],
            },
            Example {
                purpose: "A Unix socket, whose service then sees a local peer",
                lines: &[
                    "# lbridge allow app_net 5432=unix:/run/postgresql/.s.PGSQL.5432 \\",
                    "    --source loopback",
                ],
            },
        ],
        exits: RULE_COMMANDS,
        exit_note: "A rule that exists already with other options is a conflict: deny it first. Only its \
                    comment can be changed.",
        has_states: true,
        files: &[RULES_FILE, SOCKET],
        environment: &[],
        see_also: &["lbridge-deny(1)", "lbridge-status(1)", "lbridge-explain(1)", "lbridge.toml(5)"],
    },
    Page {
        command: "deny",
        description: &[
            "Removes the rules, and returns once they are out of force: new connections are refused, \
             open ones continue. PORT is what containers dial, without what it leads to. A rule of \
             lbridge.toml(5) is removed there, and one of a label with its container.",
        ],
        examples: &[
            Example {
                purpose: "Take a port back; new connections are refused from then on",
                lines: &["# lbridge deny app_net 5432", "app_net 5432: denied; open connections go on"],
            },
            Example {
                purpose: "Take several back: all of them, or none if one has no rule",
                lines: &["# lbridge deny app_net 8000-8010 53/udp"],
            },
        ],
        exits: RULE_COMMANDS,
        exit_note: "A rule of lbridge.toml is removed there, and denying it is a conflict.",
        has_states: false,
        files: &[RULES_FILE, SOCKET],
        environment: &[],
        see_also: &["lbridge-allow(1)", "lbridge-list(1)"],
    },
    Page {
        command: "list",
        description: &[
            "Shows the rules as they were given, with their options, and FROM: whether lbridge allow, \
             lbridge.toml(5) or a label made them. lbridge-status(1) shows what becomes of them.",
        ],
        examples: &[
            Example {
                purpose: "See the rules as they were given, and who made them",
                lines: &[
                    "# lbridge list",
                    "NETWORK  PORT  TARGET    SOURCE     PATH  ORIGIN  OPTIONS  COMMENT",
                    "app_net  80    [::1]:80  container  auto  allow            orders",
                ],
            },
            Example {
                purpose: "Print the ports of one network, for a script",
                lines: &[
                    "# lbridge list --json \\",
                    "    | jq '.[] | select(.network == \"app_net\") | .port'",
                ],
            },
        ],
        exits: DAEMON,
        exit_note: "",
        has_states: false,
        files: &[SOCKET],
        environment: &[],
        see_also: &["lbridge-status(1)", "lbridge-allow(1)"],
    },
    Page {
        command: "status",
        description: &[
            "Shows the daemon, the kernel, the engine and the firewall, then each address that \
             containers dial, with its state. All of it is what was observed, not what was asked for.",
            "SERVED counts connections, or datagrams, since the rule's entry was installed, those of \
             verify and doctor included.",
        ],
        examples: &[
            Example {
                purpose: "See what containers dial, what they reach, and what is missing",
                lines: &[
                    "# lbridge status",
                    "lbridge 0.1.0",
                    "kernel   steers",
                    "Docker   20.10.24 answers",
                    "",
                    "NETWORK  CONTAINERS DIAL  SERVICE         SERVED  STATE",
                    "app_net  172.18.0.1:5432  127.0.0.1:5432  3       steered",
                    "db_net   172.19.0.1:6379  127.0.0.1:6379  0       waiting (nothing",
                    "listens on 127.0.0.1:6379)",
                ],
            },
            Example {
                purpose: "Print the rules that do not serve, for a monitor",
                lines: &[
                    "# lbridge status --json \\",
                    "    | jq '.rules[] | select(.state == \"blocked\") | .why'",
                ],
            },
        ],
        exits: DAEMON,
        exit_note: "",
        has_states: true,
        files: &[SOCKET],
        environment: &[],
        see_also: &["lbridge-list(1)", "lbridge-explain(1)", "lbridge-doctor(1)"],
    },
    Page {
        command: "reload",
        description: &[
            "Has the daemon read lbridge.toml(5) again, and prints what has changed. Unchanged rules, \
             their connections and the rules of lbridge allow stay as they are.",
        ],
        examples: &[
            Example {
                purpose: "Put an edited lbridge.toml in force; all else stays as it is",
                lines: &[
                    "# lbridge reload",
                    "added    app_net 6379: 172.18.0.1:6379 -> 127.0.0.1:6379 steered",
                    "changed  firewall: off, was manage",
                ],
            },
            Example {
                purpose: "The same through systemd, if the file is valid",
                lines: &["# lbridge check-config && systemctl reload lbridge"],
            },
        ],
        exits: RULE_COMMANDS,
        exit_note: "An invalid file is rejected, and the previous configuration stays active: status 1, or 4 \
                    if the file contradicts a rule that lbridge allow made.",
        has_states: false,
        files: &[CONFIG_FILE, SOCKET],
        environment: &[],
        see_also: &["lbridge.toml(5)", "lbridge-check-config(1)"],
    },
    Page {
        command: "check-config",
        description: &[
            "Reads lbridge.toml(5) as the daemon would, and compares it with the rules that lbridge \
             allow made. Changes nothing.",
        ],
        examples: &[
            Example {
                purpose: "Check the file before the daemon reads it",
                lines: &[
                    "# lbridge check-config",
                    "/etc/lbridge/lbridge.toml: 2 rules, drain_timeout 5s, firewall manage",
                ],
            },
            Example {
                purpose: "Check a file that is not installed yet",
                lines: &["$ lbridge check-config --config ./lbridge.toml"],
            },
        ],
        exits: ALONE,
        exit_note: "An invalid file is status 1; the line names the place in the file.",
        has_states: false,
        files: &[CONFIG_FILE, RULES_FILE],
        environment: &[],
        see_also: &["lbridge.toml(5)", "lbridge-reload(1)"],
    },
    Page {
        command: "verify",
        description: &[],
        examples: &[
            Example {
                purpose: "Test one rule's port from its network, and from where it is closed",
                lines: &[
                    "# lbridge verify app_net 5432",
                    "...",
                    "Verified: 16 checks, all as they should be.",
                ],
            },
            Example {
                purpose: "Verify every rule, and report it to a script",
                lines: &["# lbridge verify --json > report.json"],
            },
        ],
        exits: RULE_COMMANDS,
        exit_note: "Status 1 also means that a check failed or could not be made.",
        has_states: false,
        files: &[SOCKET],
        environment: &[],
        see_also: &["lbridge-status(1)", "lbridge-explain(1)", "lbridge-doctor(1)"],
    },
    Page {
        command: "doctor",
        description: &[
            "Tries what lbridge needs of the kernel, without a trace on the host, and looks at the \
             engine, the daemon and its rules, the services behind them, and what was used before. Each \
             finding has the commands that mend it. It needs no daemon, and says what it could not check \
             without root.",
        ],
        examples: &[
            Example {
                purpose: "Find out what is wrong with this host or a rule, and what to type",
                lines: &[
                    "# lbridge doctor",
                    "note     api (api.service) listens on 127.0.0.1:11434 with MPTCP",
                    "...",
                    "ok       Linux 6.18.5 steers; tried with a connection",
                ],
            },
            Example {
                purpose: "Before the first start, on a host where no daemon runs yet",
                lines: &["# lbridge doctor --json"],
            },
        ],
        exits: ALONE,
        exit_note: "Status 1 also means that the report names a problem; warnings and notes are none. A \
                    daemon that does not run is reported, and is no error.",
        has_states: false,
        files: &[CONFIG_FILE, RULES_FILE, SOCKET, PINS],
        environment: &[DOCKER_HOST],
        see_also: &["lbridge-status(1)", "lbridge-verify(1)"],
    },
    Page {
        command: "import",
        description: &[
            "Reads the units in /etc/systemd/system and /run/systemd/system. A socat that listens with \
             bind= on a network's gateway becomes a rule for that network; what cannot be converted is \
             listed, with the reason. Without --yes nothing is changed. Units and firewall rules are \
             yours to remove; lbridge prints the commands.",
        ],
        examples: &[
            Example {
                purpose: "See which rules the host's socat units would become",
                lines: &[
                    "# lbridge import",
                    "app_net 5432: 172.18.0.1:5432 -> 127.0.0.1:5432, from",
                    "socat-pg.service",
                    "...",
                ],
            },
            Example {
                purpose: "Make the rules; then stop socat, as it prints",
                lines: &[
                    "# lbridge import --yes",
                    "app_net 5432: 172.18.0.1:5432 -> 127.0.0.1:5432 steered",
                    "...",
                    "  systemctl disable --now socat-pg.service",
                ],
            },
        ],
        exits: RULE_COMMANDS,
        exit_note: "",
        has_states: false,
        files: &[
            (
                "/etc/systemd/system, /run/systemd/system",
                "Where units are looked for; drop-ins are read, too.",
            ),
            SOCKET,
        ],
        environment: &[],
        see_also: &["lbridge-allow(1)", "socat(1)", "systemctl(1)"],
    },
    Page {
        command: "events",
        description: &[
            "Prints a line for each event from now on: states of rules, listeners, the engine, who \
             allows and denies.",
        ],
        examples: &[
            Example {
                purpose: "Watch rules change their states, until interrupted",
                lines: &[
                    "# lbridge events",
                    "2026-01-31 12:00:00 following lbridge 0.1.0",
                    "2026-01-31 12:00:07 port 5432: a service listens",
                    "2026-01-31 12:00:07 app_net 5432: steered",
                ],
            },
            Example {
                purpose: "Have a program read them, one JSON object a line",
                lines: &["# lbridge events --json \\", "    | jq --unbuffered 'select(.event == \"state\")'"],
            },
        ],
        exits: DAEMON,
        exit_note: "It ends with status 3 when the daemon does.",
        has_states: true,
        files: &[SOCKET],
        environment: &[],
        see_also: &["lbridge-status(1)", "lbridge-top(1)", "journalctl(1)"],
    },
    Page {
        command: "top",
        description: &[
            "Shows the rules, the busiest first, with their connections per second over the last \
             interval and in total; of relayed rules also how many are open, and the bytes in either \
             direction. On a terminal the table is drawn in place, until interrupted.",
        ],
        examples: &[
            Example {
                purpose: "Watch which rules are busy, looking every five seconds",
                lines: &["# lbridge top --interval 5s"],
            },
            Example {
                purpose: "Print the connections per second over a minute, and end",
                lines: &[
                    "# lbridge top --once --interval 1m",
                    "2026-01-31 12:00:00",
                    "NETWORK  PORT  STATE    CONN/S  TOTAL  OPEN  TO SERVICE  BACK",
                    "app_net  5432  steered  12.4    90211  -     -           -",
                ],
            },
        ],
        exits: DAEMON,
        exit_note: "",
        has_states: false,
        files: &[SOCKET],
        environment: &[],
        see_also: &["lbridge-status(1)", "lbridge-events(1)"],
    },
    Page {
        command: "explain",
        description: &[
            "Traces a connection that has not been made, step by step, with the kernel program's own \
             code and the maps in force. It tries the firewall, and changes nothing. A step that ends \
             the connection begins with -.",
        ],
        examples: &[
            Example {
                purpose: "Find out at which step a connection would be refused",
                lines: &[
                    "# lbridge explain app_net 5432",
                    "...",
                    "connections from app_net to 172.18.0.1:5432 are refused: nothing",
                    "listens on 127.0.0.1:5432; start a service on 127.0.0.1:5432",
                ],
            },
            Example {
                purpose: "The same for one container, by its address",
                lines: &["# lbridge explain app_net 5432 --source 172.18.0.3"],
            },
        ],
        exits: DAEMON,
        exit_note: "The status is 0 whatever would become of the connection.",
        has_states: false,
        files: &[SOCKET],
        environment: &[],
        see_also: &["lbridge-status(1)", "lbridge-verify(1)"],
    },
    Page {
        command: "relay",
        description: &[
            "Bridges a sandbox of your own to ports of this host's loopback: a network namespace that \
             COMMAND makes, or that a process or a path names. Inside, programs dial their own \
             localhost. It needs neither root nor the daemon.",
            "The ports are open before the program in the sandbox runs its first instruction. Signals \
             are passed on to COMMAND, and nothing is printed while all is well.",
        ],
        examples: &[
            Example {
                purpose: "Start a program in a sandbox that reaches 127.0.0.1:11434 outside",
                lines: &[
                    "$ lbridge relay 11434 -- bwrap --unshare-net --ro-bind / / \\",
                    "    --dev /dev --proc /proc agent",
                ],
            },
            Example {
                purpose: "Join a sandbox that runs already, until it ends",
                lines: &["$ lbridge relay --pid 4711 11434 8080=3000"],
            },
        ],
        exits: ALONE,
        exit_note: "With a COMMAND, its own exit status; 126 if it cannot be executed, 127 if it is not \
                    found, and 128 plus the number of the signal that ended it.",
        has_states: false,
        files: &[],
        environment: &[QUIET_LOG],
        see_also: &["lbridge-allow(1)", "bwrap(1)", "unshare(1)"],
    },
    Page {
        command: "service",
        description: &[
            "For hosts without a package of lbridge. The unit runs this very program, from where it is.",
        ],
        examples: &[Example {
            purpose: "Have systemd run lbridge, and see how it does",
            lines: &["# lbridge service install", "# systemctl status lbridge"],
        }],
        exits: ALONE,
        exit_note: "",
        has_states: false,
        files: &[UNIT, CONFIG_FILE],
        environment: &[],
        see_also: &["lbridge-run(1)", "systemctl(1)"],
    },
    Page {
        command: "service install",
        description: &[
            "Writes and enables the unit, and an example of lbridge.toml(5) if there is none, and starts \
             the daemon; one that runs is restarted. Again, it changes what is not as it should be.",
        ],
        examples: &[
            Example {
                purpose: "Install the unit for this very program, and start it",
                lines: &["# lbridge service install"],
            },
            Example {
                purpose: "Upgrade: install the new program, then run it again",
                lines: &["# install lbridge /usr/local/bin/", "# lbridge service install"],
            },
        ],
        exits: ALONE,
        exit_note: "",
        has_states: false,
        files: &[UNIT, CONFIG_FILE],
        environment: &[],
        see_also: &["lbridge-run(1)", "systemctl(1)", "systemd.unit(5)"],
    },
    Page {
        command: "service uninstall",
        description: &[
            "Stops and removes the service, detaches the kernel programs, and removes the firewall's \
             accept rules. Rules and configuration stay, unless --purge is given.",
        ],
        examples: &[
            Example {
                purpose: "Stop the service and remove what it left in the kernel; keep the rules",
                lines: &["# lbridge service uninstall"],
            },
            Example {
                purpose: "Remove the rules and the configuration, too",
                lines: &["# lbridge service uninstall --purge"],
            },
        ],
        exits: ALONE,
        exit_note: "",
        has_states: false,
        files: &[UNIT, CONFIG_FILE, RULES_FILE, PINS],
        environment: &[],
        see_also: &["systemctl(1)"],
    },
    Page {
        command: "service cleanup",
        description: &[
            "Detaches the kernel programs, and removes the firewall's accept rules and the control \
             socket, of a daemon that does not run any more. Rules stay on disk.",
        ],
        examples: &[Example {
            purpose: "After a daemon that was run by hand has ended",
            lines: &["# lbridge service cleanup"],
        }],
        exits: ALONE,
        exit_note: "",
        has_states: false,
        files: &[SOCKET, RULES_FILE, PINS],
        environment: &[],
        see_also: &["lbridge-run(1)"],
    },
    Page {
        command: "completions",
        description: &[
            "Prints a script that completes commands, options and their values. Networks, ports and \
             containers are asked for when TAB is pressed: networks that the daemon knows after allow, \
             those with rules and their ports after deny, explain and verify. Users who may not use the \
             control socket are offered commands and options alone.",
            "Packages install the scripts.",
        ],
        examples: &[
            Example {
                purpose: "Complete in this bash, also networks and ports that have rules",
                lines: &["$ source <(lbridge completions bash)"],
            },
            Example {
                purpose: "Install the script for one user's bash",
                lines: &[
                    "$ lbridge completions bash \\",
                    "    > ~/.local/share/bash-completion/completions/lbridge",
                ],
            },
            Example {
                purpose: "For zsh, in a folder of $fpath, and for fish",
                lines: &[
                    "$ lbridge completions zsh > ~/.zfunc/_lbridge",
                    "$ lbridge completions fish > ~/.config/fish/completions/lbridge.fish",
                ],
            },
        ],
        exits: ALONE,
        exit_note: "",
        has_states: false,
        files: COMPLETIONS,
        environment: &[],
        see_also: &["bash(1)", "zshcompsys(1)", "fish(1)"],
    },
];

/// The packages install the scripts there.
const COMPLETIONS: &[Entry] = &[
    ("/usr/share/bash-completion/completions/lbridge", "bash's script, which bash-completion loads."),
    ("/usr/share/zsh/vendor-completions/_lbridge", "zsh's, with Debian's package."),
    ("/usr/share/fish/vendor_completions.d/lbridge.fish", "fish's."),
];

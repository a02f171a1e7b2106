//! Error: why a change of the rules was refused. An error holds data; it is spelled for the place where the
//! rule was written, since an option is written differently in each.

use std::fmt;

use super::{Invalid, Rule, RuleId, Value};

/// A place where rules are written, with its notation of options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spelling {
    /// The command line: `--source loopback`.
    Command,
    /// The configuration file: `source = "loopback"`.
    File,
    /// A label of a container or a network: `lbridge.source=loopback`.
    Label,
}

impl Spelling {
    /// Returns an option as it is written there.
    pub fn option(self, name: &str, value: &Value<'_>) -> String {
        match (self, value) {
            (Self::Command, Value::Flag(_)) => flag(name),
            (Self::Command, value) => format!("{} {value}", flag(name)),
            (Self::File, Value::Text(text)) => format!("{name} = {text:?}"),
            (Self::File, Value::List(words)) => {
                let words: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
                format!("{name} = [{}]", words.join(", "))
            }
            (Self::File, value) => format!("{name} = {value}"),
            (Self::Label, value) => format!("lbridge.{name}={value}"),
        }
    }

    /// Returns the name of an option as it is written there, without a value.
    fn name(self, name: &str) -> String {
        match self {
            Self::Command => flag(name),
            Self::File => name.to_owned(),
            Self::Label => format!("lbridge.{name}"),
        }
    }

    /// Returns an option with a word for its value.
    fn word(self, name: &str, word: &str) -> String {
        self.option(name, &Value::Text(word.into()))
    }

    /// Returns a rule's port and options as they are written there, without the comment.
    pub fn rule(self, rule: &Rule) -> String {
        // The other options have no label; the container itself is what the rule is for.
        let shown = |name: &str| match self {
            Self::Command | Self::File => name != "comment",
            Self::Label => ["localhost", "source"].contains(&name),
        };
        let options = rule.options.given().filter(|(name, _)| shown(name));
        let options = options.map(|(name, value)| self.option(name, &value));
        let parts: Vec<_> = [rule.spec.to_string()].into_iter().chain(options).collect();
        parts.join(if self == Self::Command { " " } else { ", " })
    }
}

fn flag(name: &str) -> String {
    format!("--{}", name.replace('_', "-"))
}

/// The reason why a change was refused. Nothing of the change was applied.
///
/// Has no `Display`: whoever shows it knows where the rule was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleError {
    /// A rule with the same id (network, dialled port, protocol) and other options exists.
    Conflict {
        /// The rule that was to be added.
        wanted: Box<Rule>,
        /// The rule that exists.
        existing: Box<Rule>,
    },
    /// Like [`RuleError::Conflict`], between two rules that were to be added at once.
    ConflictWithin {
        /// The later rule.
        wanted: Box<Rule>,
        /// The earlier rule.
        existing: Box<Rule>,
    },
    /// There is no rule with this id.
    NoSuchRule {
        /// The id that was asked for.
        id: RuleId,
    },
    /// The rule comes from the configuration file.
    ReadOnly {
        /// Id of the rule.
        id: RuleId,
    },
    /// The rule comes from a label.
    FromLabel {
        /// Id of the rule.
        id: RuleId,
    },
    /// The rule leads to a Unix socket without `source` loopback, and could never serve.
    NeedsLoopback {
        /// Id of the rule.
        id: RuleId,
    },
    /// The rule contradicts itself: it has `path` steer, and the kernel can never serve it.
    NeedsRelay {
        /// Id of the rule.
        id: RuleId,
        /// The reason why the kernel cannot serve it.
        obstacle: &'static str,
    },
    /// The rule has options that do not go together.
    Contradiction {
        /// Id of the rule.
        id: RuleId,
        /// The options that do not go together.
        contradiction: Contradiction,
    },
    /// The rule has a container name or a comment that is not valid.
    Invalid {
        /// Id of the rule.
        id: RuleId,
        /// The error in the text, and what to write instead.
        invalid: Invalid,
    },
    /// The rule names a process by a number, without the process's start: the number alone says nothing.
    ProcessUnknown {
        /// Id of the rule.
        id: RuleId,
    },
    /// The rules are more than the kernel's map holds.
    TooMany {
        /// Number of rules that were wanted.
        count: usize,
        /// Largest number of rules that can be in force.
        max: usize,
    },
}

/// Options that do not go together with each other or with the rule's network, protocol or target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contradiction {
    /// `localhost`, for a namespace.
    LocalhostInside,
    /// `from`, for a namespace.
    FromInside,
    /// UDP, for a namespace.
    UdpInside,
    /// UDP to a Unix socket.
    UdpToUnix,
    /// UDP to another port than is dialled.
    UdpToOtherPort,
    /// `localhost`, for UDP.
    UdpOfLocalhost,
    /// `source` loopback, for UDP.
    UdpFromLoopback,
    /// UDP with an option that only a relay can serve.
    UdpRelayed,
}

impl Contradiction {
    /// Returns the contradiction and which option to leave out, as a sentence.
    fn spelled(self, spelling: Spelling) -> String {
        let name = |name| spelling.name(name);
        match self {
            Self::LocalhostInside => {
                format!(
                    "it is served on localhost inside the namespace anyway; leave {} out",
                    name("localhost")
                )
            }
            Self::FromInside => {
                format!("it is one namespace, whoever is in it; leave {} out", name("from"))
            }
            Self::UdpInside => "inside a namespace only TCP can be served; allow UDP on a network".to_owned(),
            Self::UdpToUnix => "UDP does not lead to a Unix socket".to_owned(),
            Self::UdpToOtherPort => "a UDP rule leads to the same port number, which the answers come from; \
                                     have the service use it, or dial the service's own"
                .to_owned(),
            Self::UdpOfLocalhost => {
                format!("only TCP to localhost can be led to the host; leave {} out", name("localhost"))
            }
            Self::UdpFromLoopback => format!(
                "a UDP service answers the address that it sees; leave {} out",
                spelling.word("source", "loopback")
            ),
            Self::UdpRelayed => "UDP is steered, never relayed; leave out what needs a relay".to_owned(),
        }
    }
}

impl RuleError {
    /// Shows the error to whoever has typed a command, or sent a request to the control API.
    pub fn for_cli(&self) -> impl fmt::Display {
        Spelled { error: self, spelling: Spelling::Command }
    }

    /// Shows the error to whoever writes the configuration file.
    pub fn for_file(&self) -> impl fmt::Display {
        Spelled { error: self, spelling: Spelling::File }
    }

    /// Shows the error to whoever has labelled a container or a network.
    pub fn for_label(&self) -> impl fmt::Display {
        Spelled { error: self, spelling: Spelling::Label }
    }
}

struct Spelled<'a> {
    error: &'a RuleError,
    spelling: Spelling,
}

impl fmt::Display for Spelled<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spelling = self.spelling;
        let contradicts = |f: &mut fmt::Formatter<'_>, wanted: &Rule, existing: &Rule| {
            let network = &wanted.network;
            let (wanted, existing) = (spelling.rule(wanted), spelling.rule(existing));
            write!(f, "{network} {wanted} contradicts {network} {existing}, ")
        };
        match self.error {
            RuleError::Conflict { wanted, existing } => {
                contradicts(f, wanted, existing)?;
                write!(f, "which is allowed already; run `lbridge deny {}` first", existing.id())
            }
            RuleError::ConflictWithin { wanted, existing } => {
                contradicts(f, wanted, existing)?;
                f.write_str("both asked for at once; leave one of them out")
            }
            RuleError::NoSuchRule { id } => {
                write!(f, "no rule for {id}; `lbridge list` shows those there are")
            }
            RuleError::ReadOnly { id } => {
                write!(f, "{id} comes from the configuration file; change it there")
            }
            RuleError::FromLabel { id } => write!(
                f,
                "{id} comes from a label of a container or a network; recreate that without it, or take the \
                 port out of label_ports in lbridge.toml"
            ),
            RuleError::NeedsLoopback { id } => {
                let add = match spelling {
                    Spelling::Command => "allow it with",
                    Spelling::File | Spelling::Label => "add",
                };
                let source = spelling.word("source", "loopback");
                write!(
                    f,
                    "{id} leads to a Unix socket, whose service would see root as its peer; {add} {source}"
                )
            }
            RuleError::NeedsRelay { id, obstacle } => {
                write!(
                    f,
                    "{id}: {} is not possible: {obstacle}; leave it out",
                    spelling.word("path", "steer")
                )
            }
            RuleError::Contradiction { id, contradiction } => {
                write!(f, "{id}: {}", contradiction.spelled(spelling))
            }
            RuleError::Invalid { id, invalid } => write!(f, "{id}: {invalid}"),
            RuleError::ProcessUnknown { id } => write!(
                f,
                "{id}: a process's number means nothing after its end; use `lbridge allow`, container:NAME \
                 or netns:PATH"
            ),
            RuleError::TooMany { count, max } => {
                write!(f, "{count} rules are more than the {max} that can be in force")
            }
        }
    }
}

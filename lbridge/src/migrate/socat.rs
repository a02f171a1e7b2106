//! socat: reads socat's command line: which port leads where. socat(1), "ADDRESS SPECIFICATIONS".
//!
//! An option without a counterpart is a reason not to take over the command line: a rule must not admit more
//! than socat did.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use crate::planning::rule::Target;

/// Options of listening and connecting addresses that do not affect who reaches what. Full and short names.
const HARMLESS: [&str; 38] = [
    "fork",
    "reuseaddr",
    "so-reuseaddr",
    "reuseport",
    "so-reuseport",
    "nodelay",
    "tcp-nodelay",
    "keepalive",
    "so-keepalive",
    "keepidle",
    "tcp-keepidle",
    "keepintvl",
    "tcp-keepintvl",
    "keepcnt",
    "tcp-keepcnt",
    "backlog",
    "retry",
    "interval",
    "forever",
    "connect-timeout",
    "pf",
    "protocol-family",
    "ipv6only",
    "ipv6-v6only",
    "v6only",
    "nonblock",
    "o-nonblock",
    "cloexec",
    "linger",
    "so-linger",
    "rcvbuf",
    "so-rcvbuf",
    "sndbuf",
    "so-sndbuf",
    "su",
    "substuser",
    "su-d",
    "substuser-delayed",
];
/// Options of the command that control how it logs and copies; those of the second list take an argument.
const SWITCHES: [&str; 14] =
    ["-d", "-dd", "-ddd", "-dddd", "-d0", "-d1", "-d2", "-d3", "-d4", "-v", "-x", "-ly", "-lh", "-lu"];
const WITH_ARGUMENT: [&str; 4] = ["-b", "-t", "-L", "-W"];

/// A forwarding from a port to a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// The address that it listens on (`bind=`); `None` for any.
    pub address: Option<IpAddr>,
    /// The interface that it listens on (`so-bindtodevice=`); `None` for any.
    pub interface: Option<String>,
    /// The port that it listens on.
    pub port: u16,
    /// The target of the connections.
    pub target: Target,
}

/// Returns true if these words are a command that runs socat itself.
pub fn is_socat(words: &[String]) -> bool {
    let program = words.first().and_then(|program| Path::new(program).file_name()?.to_str());
    matches!(program, Some("socat" | "socat1"))
}

/// Returns true if a socat listens on TCP and leads to this host's loopback or to a Unix socket, whatever its
/// options.
pub fn leads_to_loopback(words: &[String]) -> bool {
    let addresses: Vec<_> =
        addresses(words).into_iter().flatten().filter_map(|text| Address::parse(text).ok()).collect();
    let [listens, connects] = &addresses[..] else { return false };
    listens.is_listening() && connects.target().is_ok()
}

/// Returns what a socat forwards, or the reason why lbridge has no such rule.
pub fn forward(words: &[String]) -> Result<Forward, String> {
    let addresses = addresses(words)?;
    let [listens, connects] = addresses[..] else {
        return Err(format!("socat takes two addresses, here are {}", addresses.len()));
    };
    let (listens, connects) = (Address::parse(listens)?, Address::parse(connects)?);
    if !listens.is_listening() {
        return Err(format!("its first address is {}, not TCP-LISTEN", listens.keyword));
    }
    let target = connects.target()?;
    connects.only(&[])?;
    listens.only(&["bind", "so-bindtodevice", "bindtodevice", "if"])?;
    let [port] = &listens.parameters[..] else {
        return Err("TCP-LISTEN takes a port and nothing else".to_owned());
    };
    let port = port_number(port)?;
    let interface =
        ["so-bindtodevice", "bindtodevice", "if"].into_iter().find_map(|name| listens.option(name));
    let address = match listens.option("bind") {
        None | Some("") => None,
        Some(text) => {
            Some(ip(text).ok_or_else(|| format!("bind={text} is not an address; names are not looked up"))?)
        }
    };
    let address = address.filter(|address| !address.is_unspecified());
    Ok(Forward { address, interface: interface.map(str::to_owned), port, target })
}

/// Returns the words that are addresses: those that follow the options.
fn addresses(words: &[String]) -> Result<Vec<&str>, String> {
    let mut rest = words.iter().skip(1).map(String::as_str).peekable();
    while let Some(option) = rest.next_if(|word| word.starts_with('-') && word.len() > 1) {
        let takes = |options: &[&str]| options.contains(&option);
        if takes(&WITH_ARGUMENT) {
            rest.next();
        } else if let Some(time) = option.strip_prefix("-T") {
            let time = if time.is_empty() { rest.next().unwrap_or_default() } else { time };
            return Err(format!("it ends idle connections (-T); give that to allow: --idle-timeout {time}s"));
        } else if !takes(&SWITCHES) && !option.starts_with("-lp") && !option.starts_with("-lf") {
            return Err(format!("its option {option} has no counterpart"));
        } else if option == "-lp" || option == "-lf" {
            rest.next();
        }
    }
    Ok(rest.collect())
}

/// A parsed `KEYWORD:PARAMETER:...,OPTION,OPTION=VALUE...`
#[derive(Debug)]
struct Address {
    /// The keyword, in capitals.
    keyword: String,
    parameters: Vec<String>,
    options: Vec<(String, String)>,
}

impl Address {
    fn parse(text: &str) -> Result<Self, String> {
        if text.contains("!!") {
            return Err("an address with !! has no counterpart".to_owned());
        }
        let mut parts = split(text, ',')?.into_iter();
        let mut parameters = split(&parts.next().unwrap_or_default(), ':')?.into_iter();
        let keyword = parameters.next().unwrap_or_default().to_uppercase();
        let options = parts.filter(|part| !part.is_empty()).map(|part| {
            let (name, value) = part.split_once('=').unwrap_or((&part, ""));
            Ok((name.to_lowercase(), unquoted(value)?))
        });
        let options = options.collect::<Result<_, String>>()?;
        let parameters = parameters.map(|text| unquoted(&text)).collect::<Result<_, _>>()?;
        Ok(Self { keyword, parameters, options })
    }

    fn is_listening(&self) -> bool {
        matches!(
            self.keyword.as_str(),
            "TCP-LISTEN" | "TCP-L" | "TCP4-LISTEN" | "TCP4-L" | "TCP6-LISTEN" | "TCP6-L"
        )
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().rev().find(|(its, _)| its == name).map(|(_, value)| value.as_str())
    }

    /// Returns an error if the address has an option other than `known` and the harmless ones.
    fn only(&self, known: &[&str]) -> Result<(), String> {
        let other = self
            .options
            .iter()
            .find(|(name, _)| !known.contains(&name.as_str()) && !HARMLESS.contains(&name.as_str()));
        match other {
            None => Ok(()),
            Some((name, _)) if matches!(name.as_str(), "range" | "tcpwrap" | "tcpwrappers") => Err(format!(
                "its option {name}= admits some addresses only; a rule admits all of one network's containers"
            )),
            Some((name, _)) => Err(format!("its option {name} has no counterpart")),
        }
    }

    /// Returns the target, if it is on this host's loopback or a Unix socket.
    fn target(&self) -> Result<Target, String> {
        match (self.keyword.as_str(), &self.parameters[..]) {
            ("TCP" | "TCP-CONNECT" | "TCP4" | "TCP4-CONNECT" | "TCP6" | "TCP6-CONNECT", [host, port]) => {
                let port = port_number(port)?;
                let address = match host.as_str() {
                    "localhost" | "ip6-localhost" if self.keyword.starts_with("TCP6") => {
                        Some([0, 0, 0, 0, 0, 0, 0, 1].into())
                    }
                    "localhost" => Some([127, 0, 0, 1].into()),
                    host => ip(host),
                };
                match address {
                    Some(address) if address.is_loopback() => Ok(match address {
                        IpAddr::V4(v4) if v4.octets() == [127, 0, 0, 1] => Target::Port(port),
                        address => Target::Address(SocketAddr::new(address, port)),
                    }),
                    _ => Err(format!("it leads to {host}, which is not this host's loopback")),
                }
            }
            ("UNIX-CONNECT" | "UNIX-CLIENT" | "UNIX" | "LOCAL", [path]) => {
                // The daemon has another working directory.
                if !Path::new(path).is_absolute() {
                    return Err(format!("the path of its Unix socket, {path}, is not absolute"));
                }
                Ok(Target::Unix(PathBuf::from(path)))
            }
            (keyword, _) => Err(format!("it leads to {keyword}, which is neither TCP nor a Unix socket")),
        }
    }
}

fn ip(text: &str) -> Option<IpAddr> {
    text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text).parse().ok()
}

fn port_number(text: &str) -> Result<u16, String> {
    let port = text.parse().ok().filter(|port| *port != 0 && text.bytes().all(|b| b.is_ascii_digit()));
    port.ok_or_else(|| format!("{text:?} is not a port number; services' names are not looked up"))
}

/// Splits at a separator that is neither quoted, escaped nor in brackets. Keeps quotes and escapes.
fn split(text: &str, separator: char) -> Result<Vec<String>, String> {
    let mut parts = vec![String::new()];
    let (mut quote, mut closers) = (None, vec![]);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c == separator && quote.is_none() && closers.is_empty() {
            parts.push(String::new());
            continue;
        }
        let Some(part) = parts.last_mut() else { continue };
        part.push(c);
        match c {
            '\\' => part.extend(chars.next()),
            '"' | '\'' if quote == Some(c) => quote = None,
            '"' | '\'' if quote.is_none() => quote = Some(c),
            _ if quote.is_some() => {}
            '[' => closers.push(']'),
            '(' => closers.push(')'),
            '{' => closers.push('}'),
            _ if closers.last() == Some(&c) => drop(closers.pop()),
            _ => {}
        }
    }
    if quote.is_some() || !closers.is_empty() {
        return Err(format!("{text:?} has a quotation mark or a bracket that is not closed"));
    }
    Ok(parts)
}

/// Removes quotes and backslashes.
fn unquoted(text: &str) -> Result<String, String> {
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' | '\'' => {}
            '\\' => match chars.next() {
                // These stand for control characters.
                Some(c) if c.is_ascii_alphanumeric() => {
                    return Err(format!("\\{c} in {text:?} is not read here"));
                }
                Some(c) => plain.push(c),
                None => {}
            },
            c => plain.push(c),
        }
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Forward, String> {
        forward(&text.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    fn is(text: &str, address: Option<&str>, port: u16, target: &str) {
        let forward = read(text).unwrap_or_else(|why| panic!("{text}: {why}"));
        assert_eq!(forward.address, address.map(|address| address.parse().unwrap()), "{text}");
        assert_eq!((forward.port, forward.target.to_string().as_str()), (port, target), "{text}");
    }

    #[test]
    fn recipes_are_read() {
        let gateway = Some("172.18.0.1");
        for text in [
            "/usr/bin/socat TCP-LISTEN:80,bind=172.18.0.1,fork,reuseaddr TCP:127.0.0.1:3000",
            "socat tcp4-l:80,fork,bind=172.18.0.1 tcp-connect:localhost:3000,nodelay",
            "socat -d -d -ly -lp name -t 5 TCP4-LISTEN:80,reuseaddr,bind=172.18.0.1,su=nobody \
             TCP4:127.0.0.1:3000",
            "socat TCP-LISTEN:80,,bind=\"172.18.0.1\" TCP:127.0.0.1:3000",
        ] {
            is(text, gateway, 80, "127.0.0.1:3000");
        }
        is("socat TCP-LISTEN:80,fork TCP:127.0.0.1:80", None, 80, "127.0.0.1:80");
        is("socat TCP-LISTEN:80,bind=0.0.0.0 TCP:127.0.0.1:80", None, 80, "127.0.0.1:80");
        is("socat TCP6-LISTEN:80,bind=[fd07::1] TCP6:[::1]:81", Some("fd07::1"), 80, "[::1]:81");
        is("socat TCP-L:80,bind=10.7.0.1 UNIX-CONNECT:/run/a.sock", Some("10.7.0.1"), 80, "unix:/run/a.sock");
        is("socat TCP-L:80,bind=10.7.0.1 UNIX:/run/a\\,b", Some("10.7.0.1"), 80, "unix:/run/a,b");
        let device = read("socat TCP-LISTEN:80,so-bindtodevice=br-app TCP:127.0.0.1:80").unwrap();
        assert_eq!(device.interface.as_deref(), Some("br-app"));
    }

    #[test]
    fn what_a_rule_would_not_do_is_refused() {
        let listen = "TCP-LISTEN:80,bind=10.7.0.1";
        for (text, says) in [
            (format!("socat {listen},range=10.7.0.0/24 TCP:127.0.0.1:80"), "range="),
            (format!("socat {listen},tcpwrap=x TCP:127.0.0.1:80"), "tcpwrap="),
            (format!("socat {listen},max-children=3 TCP:127.0.0.1:80"), "max-children"),
            (format!("socat {listen} TCP:127.0.0.1:80,bind=127.0.0.2"), "bind"),
            (format!("socat {listen} TCP:192.0.2.1:80"), "192.0.2.1"),
            (format!("socat {listen} TCP:example.org:80"), "example.org"),
            (format!("socat {listen} OPENSSL:127.0.0.1:80"), "OPENSSL"),
            (format!("socat {listen} UNIX:relative"), "absolute"),
            (format!("socat -T 600 {listen} TCP:127.0.0.1:80"), "--idle-timeout 600s"),
            (format!("socat -u {listen} TCP:127.0.0.1:80"), "-u"),
            (format!("socat {listen}"), "two addresses"),
            (format!("socat {listen} TCP:127.0.0.1:80!!TCP:127.0.0.1:81"), "!!"),
            ("socat TCP-LISTEN:http TCP:127.0.0.1:80".to_owned(), "http"),
            ("socat TCP-LISTEN:0 TCP:127.0.0.1:80".to_owned(), "\"0\""),
            ("socat TCP-LISTEN:80,bind=host TCP:127.0.0.1:80".to_owned(), "bind=host"),
            ("socat UDP-LISTEN:80 TCP:127.0.0.1:80".to_owned(), "UDP-LISTEN"),
            ("socat TCP-LISTEN:80,bind=[::1 TCP:127.0.0.1:80".to_owned(), "not closed"),
        ] {
            let why = read(&text).expect_err(&text);
            assert!(why.contains(says), "{text}: {why}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(text in r#"(socat )?(TCP-L:80,bind=)?[-A-Za-z0-9:,.=\[\](){}"'\\!\u{e4} ]*"#) {
            let _ = read(&text);
        }
    }

    #[test]
    fn the_older_recipe_is_told_from_other_uses() {
        let leads = |text: &str| leads_to_loopback(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert!(leads("socat TCP-LISTEN:80,fork,range=10.0.0.0/8 TCP:127.0.0.1:80"));
        assert!(!leads("socat TCP-LISTEN:80,fork TCP:192.0.2.1:80"));
        assert!(!leads("socat UNIX-LISTEN:/run/x,fork TCP:127.0.0.1:80"));
        assert!(!leads("socat - TCP:127.0.0.1:80"));
    }
}

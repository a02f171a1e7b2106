//! ufw: reads UFW's rules as it stores them: a comment `### tuple ###` for each rule in `user.rules`, from
//! which UFW generates the lines that follow.

use std::{fmt::Write as _, net::IpAddr, path::Path};

use lbridge_common::wire::Address;

/// The folder of UFW's settings.
pub const FOLDER: &str = "/etc/ufw";

/// A rule that lets packets in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// The protocol: `tcp` or `any`.
    protocol: String,
    /// The destination port: a port, a list, a range or `any`.
    port: String,
    /// The destination: an address, a subnet, or one that means any.
    to: String,
    from: String,
    interface: Option<String>,
    /// True if the rule is for a source port or an application; its command has another form.
    special: bool,
}

/// Lists the rules that let TCP in. Without UFW there are none. Returns an error if they cannot be read.
pub fn allowed(folder: &Path) -> Result<Vec<Allowed>, std::io::Error> {
    let mut rules = vec![];
    for file in ["user.rules", "user6.rules"] {
        match std::fs::read_to_string(folder.join(file)) {
            Ok(text) => rules.extend(text.lines().filter_map(parse)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(rules)
}

/// Parses `### tuple ### allow tcp 5432 172.18.0.1 any 0.0.0.0/0 in_br-app`: action, protocol, port,
/// destination, source port, source, optionally two applications, direction and interface, optionally a
/// comment.
fn parse(line: &str) -> Option<Allowed> {
    let fields: Vec<_> = line
        .strip_prefix("### tuple ###")?
        .split_whitespace()
        .filter(|field| !field.starts_with("comment="))
        .collect();
    let [action, protocol, port, to, source_port, from, applications @ .., direction] = &fields[..] else {
        return None;
    };
    let is_in = *direction == "in" || direction.starts_with("in_");
    if !matches!(*action, "allow" | "allow_log" | "limit") || !matches!(*protocol, "tcp" | "any") || !is_in {
        return None;
    }
    Some(Allowed {
        protocol: (*protocol).to_owned(),
        port: (*port).to_owned(),
        to: (*to).to_owned(),
        from: (*from).to_owned(),
        interface: direction.strip_prefix("in_").map(str::to_owned),
        special: *source_port != "any" || !applications.is_empty() || *action != "allow",
    })
}

impl Allowed {
    /// Returns true if the rule lets the containers of that bridge reach this address and port.
    pub fn admits(&self, interface: &str, address: IpAddr, port: u16) -> bool {
        self.interface.as_deref().is_none_or(|its| its == interface)
            && self.is_for_port(port)
            && includes(&self.to, address)
            // The containers are in the gateway's subnet; a rule that lets in less was somebody's intention.
            && (includes(&self.from, address) || !is_any(&self.from))
    }

    /// Returns the address and the port, if the rule is for one of each.
    pub fn endpoint(&self) -> Option<(IpAddr, u16)> {
        Some((self.to.parse().ok()?, self.port.parse().ok()?))
    }

    fn is_for_port(&self, port: u16) -> bool {
        self.port.split(',').any(|part| match part.split_once(':') {
            Some((first, last)) => {
                first.parse().is_ok_and(|first: u16| first <= port)
                    && last.parse().is_ok_and(|last: u16| port <= last)
            }
            None => part == "any" || part.parse() == Ok(port),
        })
    }

    /// Returns the rule in the form that `ufw` takes; `None` if its command has another form.
    pub fn words(&self) -> Option<String> {
        if self.special {
            return None;
        }
        let mut words = "allow in".to_owned();
        if let Some(interface) = &self.interface {
            let _ = write!(words, " on {interface}");
        }
        let any = |text: &String| if is_any(text) { "any".to_owned() } else { text.clone() };
        if !is_any(&self.from) {
            let _ = write!(words, " from {}", self.from);
        }
        let _ = write!(words, " to {}", any(&self.to));
        if self.port != "any" {
            let _ = write!(words, " port {}", self.port);
        }
        if self.protocol != "any" {
            let _ = write!(words, " proto {}", self.protocol);
        }
        Some(words)
    }
}

fn is_any(text: &str) -> bool {
    matches!(text, "any" | "0.0.0.0/0" | "::/0")
}

/// Returns true if an address is in `ADDRESS` or `ADDRESS/BITS`.
fn includes(subnet: &str, address: IpAddr) -> bool {
    let (base, bits) = match subnet.split_once('/') {
        Some((base, bits)) => (base.parse::<IpAddr>(), bits.parse::<u8>().ok()),
        None => (subnet.parse(), None),
    };
    let Ok(base) = base else { return subnet == "any" };
    if base.is_ipv4() != address.is_ipv4() {
        return false;
    }
    let (base, address) = (Address::from(base), Address::from(address));
    let mask = base.mask(bits.unwrap_or(128));
    base.masked(&mask) == address.masked(&mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(tuple: &str) -> Allowed {
        parse(&format!("### tuple ### {tuple}")).unwrap_or_else(|| panic!("{tuple}"))
    }

    #[test]
    fn rules_are_read_and_written() {
        for (tuple, words) in [
            (
                "allow tcp 5432 172.18.0.1 any 0.0.0.0/0 in_br-app",
                "allow in on br-app to 172.18.0.1 port 5432 proto tcp",
            ),
            (
                "allow tcp 5432 172.18.0.1 any 172.18.0.0/16 in comment=6c62",
                "allow in from 172.18.0.0/16 to 172.18.0.1 port 5432 proto tcp",
            ),
            ("allow any 22 0.0.0.0/0 any 0.0.0.0/0 in", "allow in to any port 22"),
            ("allow any any 0.0.0.0/0 any 0.0.0.0/0 in_docker0", "allow in on docker0 to any"),
        ] {
            assert_eq!(rule(tuple).words().as_deref(), Some(words), "{tuple}");
        }
        assert_eq!(rule("allow tcp 80 0.0.0.0/0 any 0.0.0.0/0 Nginx - in").words(), None);
        for other in [
            "deny tcp 22 0.0.0.0/0 any 0.0.0.0/0 in",
            "allow udp 53 0.0.0.0/0 any 0.0.0.0/0 in",
            "allow tcp 53 0.0.0.0/0 any 0.0.0.0/0 out",
            "route:allow tcp 80 0.0.0.0/0 any 0.0.0.0/0 in_eth0 out_br0",
            "",
        ] {
            assert_eq!(parse(&format!("### tuple ### {other}")), None, "{other}");
        }
        assert_eq!(parse("-A ufw-user-input -p tcp --dport 22 -j ACCEPT"), None);
    }

    #[test]
    fn who_is_admitted() {
        let gateway = "172.18.0.1".parse().unwrap();
        for (tuple, admitted) in [
            ("allow tcp 5432 172.18.0.1 any 0.0.0.0/0 in_br-app", true),
            ("allow tcp 5432 172.18.0.1 any 0.0.0.0/0 in_br-db", false),
            ("allow tcp 5433 172.18.0.1 any 0.0.0.0/0 in", false),
            ("allow tcp 80,5000:6000 172.16.0.0/12 any 0.0.0.0/0 in", true),
            ("allow tcp 80,5000:5400 172.16.0.0/12 any 0.0.0.0/0 in", false),
            ("allow any any 0.0.0.0/0 any 0.0.0.0/0 in_br-app", true),
            ("allow any 5432 ::/0 any ::/0 in", false),
            ("allow tcp 5432 172.19.0.1 any 0.0.0.0/0 in", false),
        ] {
            assert_eq!(rule(tuple).admits("br-app", gateway, 5432), admitted, "{tuple}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(tuple in "(allow tcp )?[a-z0-9:/,. _\u{e4}]*( in)?") {
            if let Some(rule) = parse(&format!("### tuple ### {tuple}")) {
                rule.admits("br-app", IpAddr::from([10, 7, 0, 1]), 80);
                rule.words();
            }
        }
    }
}

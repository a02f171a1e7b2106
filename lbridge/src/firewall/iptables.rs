//! iptables: the tables of `iptables-nft` and `iptables-legacy`, through those programs, which alone may
//! write what they keep. They print no JSON, but rules in the words that they accept; only lbridge's own
//! rules are parsed as such.

use std::{collections::BTreeMap, fs, net::IpAddr};

use super::{
    everybody,
    tool::{Problem, run, run_with},
};
use crate::planning::{
    firewall::{Accepted, Backend, COMMENT, Chain, Denial, Family, FirewallKind, InputChain, Opening},
    rule::Protocol,
};

/// The chain that lbridge's rules are put into.
const INPUT: &str = "INPUT";
/// Limit on waiting for the lock of `iptables-legacy`, in seconds.
const LOCK_WAIT: &str = "5";

/// One of the four programs: `iptables-nft` or `iptables-legacy`, for IPv4 or IPv6.
#[derive(Debug, Clone, Copy)]
pub(super) struct Variant {
    backend: Backend,
    v6: bool,
}

/// The filter table, as one of the programs lists it.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// Accept rules that are lbridge's own.
    pub(super) accepts: BTreeMap<(Chain, Opening), Accepted>,
    /// The input chain, if its policy is to drop, or a rule of the table drops or rejects; otherwise `None`.
    pub(super) chain: Option<InputChain>,
    /// All other lines of the listing.
    pub(super) others: Vec<String>,
}

impl Variant {
    /// Returns the program for IPv4, then that for IPv6.
    pub(super) fn both(backend: Backend) -> [Self; 2] {
        [false, true].map(|v6| Self { backend, v6 })
    }

    fn of(chain: &Chain) -> Self {
        Self { backend: chain.backend, v6: chain.family == Family::Ip6 }
    }

    pub(super) fn family(self) -> Family {
        if self.v6 { Family::Ip6 } else { Family::Ip }
    }

    fn program(self) -> &'static str {
        match (self.backend, self.v6) {
            (Backend::IptablesLegacy, false) => "iptables-legacy",
            (Backend::IptablesLegacy, true) => "ip6tables-legacy",
            (_, false) => "iptables-nft",
            (_, true) => "ip6tables-nft",
        }
    }

    /// Returns true if the legacy tables are there. Listing them would make them.
    pub(super) fn is_in_use(self) -> bool {
        let path = if self.v6 { "/proc/net/ip6_tables_names" } else { "/proc/net/ip_tables_names" };
        fs::read_to_string(path).is_ok_and(|names| names.lines().any(|name| name == "filter"))
    }

    /// Lists the filter table of this program.
    pub(super) async fn list(self) -> Result<Listed, Problem> {
        let text = self.run(&["-S"]).await?;
        Ok(self.read(&text))
    }

    fn read(self, text: &str) -> Listed {
        let chain = Chain {
            backend: self.backend,
            family: self.family(),
            table: "filter".to_owned(),
            name: INPUT.to_owned(),
        };
        let mut listed = Listed::default();
        let mut ours_only = true;
        for line in text.lines() {
            let own = line.strip_prefix("-A INPUT ").map(own);
            if let Some(Some(opening)) = own {
                let accepted = listed.accepts.entry((chain.clone(), opening));
                accepted.or_insert(Accepted { copies: 0, first: ours_only }).copies += 1;
            } else {
                ours_only &= own.is_none();
                listed.others.push(line.to_owned());
            }
        }
        let denies = |rule: &&String| rule.ends_with("-j DROP") || rule.contains("-j REJECT");
        let denial = if listed.others.iter().any(|line| line == "-P INPUT DROP") {
            Some(Denial::Policy)
        } else {
            listed.others.iter().find(denies).map(|_| Denial::Rule)
        };
        let ufw = |line: &String| line.starts_with("-N ufw");
        let firewall = if listed.others.iter().any(ufw) { FirewallKind::Ufw } else { FirewallKind::Iptables };
        listed.chain = denial.map(|denial| InputChain { chain, denial, firewall });
        listed
    }

    async fn run(self, arguments: &[&str]) -> Result<String, Problem> {
        run(self.program(), &[&["-w", LOCK_WAIT], arguments].concat()).await
    }

    /// Runs several commands at once, or none of them.
    async fn restore(self, commands: &str) -> Result<String, Problem> {
        let program = match (self.backend, self.v6) {
            (Backend::IptablesLegacy, false) => "iptables-legacy-restore",
            (Backend::IptablesLegacy, true) => "ip6tables-legacy-restore",
            (_, false) => "iptables-nft-restore",
            (_, true) => "ip6tables-nft-restore",
        };
        run_with(program, &["-w", LOCK_WAIT, "--noflush"], commands).await
    }
}

/// Returns true if somebody uses the legacy tables.
pub(super) fn is_legacy_in_use() -> bool {
    Variant::both(Backend::IptablesLegacy).into_iter().any(Variant::is_in_use)
}

/// Puts a rule first, and removes its older copies, all at once. Copies are removed by their text, since
/// their numbers change as soon as somebody else puts a rule.
pub(super) async fn accept(chain: &Chain, opening: &Opening) -> anyhow::Result<()> {
    let variant = Variant::of(chain);
    let rule = rule(opening).join(" ");
    let removals = format!("-D {INPUT} {rule}\n").repeat(copies(variant, opening).await?);
    variant.restore(&format!("*filter\n{removals}-I {INPUT} 1 {rule}\nCOMMIT\n")).await?;
    Ok(())
}

/// Removes a rule and its copies.
pub(super) async fn remove(chain: &Chain, opening: &Opening) -> anyhow::Result<()> {
    let variant = Variant::of(chain);
    let rule = rule(opening);
    let rule: Vec<_> = rule.iter().map(String::as_str).collect();
    for _ in 0..copies(variant, opening).await? {
        variant.run(&[&["-D", INPUT], &rule[..]].concat()).await?;
    }
    Ok(())
}

/// Counts the copies of a rule that are there.
async fn copies(variant: Variant, opening: &Opening) -> anyhow::Result<usize> {
    let text = variant.run(&["-S", INPUT]).await?;
    let rules = text.lines().filter_map(|line| line.strip_prefix("-A INPUT "));
    Ok(rules.filter(|rule| own(rule).as_ref() == Some(opening)).count())
}

/// Returns a rule in iptables' words, in the order in which it prints them.
fn rule(opening: &Opening) -> Vec<String> {
    let Opening { interface, gateway, sources, protocol, port } = opening;
    let protocol = protocol.name();
    let bits = if gateway.is_ipv4() { 32 } else { 128 };
    let (sources, own_name) = match sources.prefix_len() {
        0 => (String::new(), ""),
        _ if opening.can_be_forged() => (format!("-s {sources} "), " -m addrtype ! --src-type LOCAL"),
        _ => (format!("-s {sources} "), ""),
    };
    format!(
        "{sources}-d {gateway}/{bits} -i {interface} -p {protocol} -m {protocol} --dport {port}{own_name} -m \
         comment --comment {COMMENT} -j ACCEPT"
    )
    .split(' ')
    .map(str::to_owned)
    .collect()
}

/// Returns what a rule lets through, if it is one of lbridge's to the letter.
fn own(text: &str) -> Option<Opening> {
    let words: Vec<_> = text.split_whitespace().collect();
    let after = |option: &str| words.iter().skip_while(|word| **word != option).nth(1).copied();
    let gateway = after("-d")?.split('/').next()?.parse::<IpAddr>().ok()?;
    let opening = Opening {
        interface: after("-i")?.to_owned(),
        gateway,
        sources: match after("-s") {
            Some(sources) => sources.parse().ok()?,
            None => everybody(gateway),
        },
        protocol: if after("-p")? == "udp" { Protocol::Udp } else { Protocol::Tcp },
        port: after("--dport")?.parse().ok()?,
    };
    (rule(&opening) == words).then_some(opening)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: Variant = Variant { backend: Backend::IptablesLegacy, v6: false };

    #[test]
    fn own_rules_are_told_from_others() {
        let own_of =
            |net: &str| net.parse::<ipnet::IpNet>().map(|net| (net.addr(), net.prefix_len())).unwrap();
        let v4 = own_of("10.7.0.1/24");
        let opening = Opening::new("br-1", v4, v4.0, Protocol::Tcp, 5432);
        let text = rule(&opening).join(" ");
        assert_eq!(own(&text), Some(opening.clone()));
        assert!(text.starts_with("-s 10.7.0.0/24 -d 10.7.0.1/32 -i br-1 "), "{text}");
        // As older versions put it.
        let for_all = text.replace("-s 10.7.0.0/24 ", "");
        assert_eq!(own(&for_all), Some(Opening { sources: everybody(v4.0), ..opening }));
        for other in [
            text.replace("lbridge", "lbridges"),
            text.replace("-j ACCEPT", "-j DROP"),
            text.replace("-i br-1", "! -i br-1"),
            text.replace("-s", "! -s"),
            format!("-s 10.7.0.2/32 {text}"),
        ] {
            assert_eq!(own(&other), None, "{other}");
        }
        let v6 = own_of("fd00::1/64");
        let v6 = Opening::new("br-1", v6, v6.0, Protocol::Udp, 1);
        assert_eq!(own(&rule(&v6).join(" ")), Some(v6));
    }

    #[test]
    fn what_may_deny_is_seen() {
        let gateway = "10.7.0.1".parse().unwrap();
        let opening = Opening::new("br0", (gateway, 24), gateway, Protocol::Tcp, 80);
        let ours = format!("-A INPUT {}", rule(&opening).join(" "));
        let denial = |text: &str| V4.read(text).chain.map(|chain| (chain.denial, chain.firewall));
        assert_eq!(denial(&format!("-P INPUT ACCEPT\n{ours}\n")), None);
        assert_eq!(denial("-P INPUT DROP\n"), Some((Denial::Policy, FirewallKind::Iptables)));
        let ufw = "-P INPUT ACCEPT\n-N ufw-user-input\n-A ufw-user-input -s 1.2.3.4/32 -j DROP\n";
        assert_eq!(denial(ufw), Some((Denial::Rule, FirewallKind::Ufw)));
        let rejects = "-P INPUT ACCEPT\n-A INPUT -j REJECT --reject-with icmp-port-unreachable\n";
        assert_eq!(denial(rejects), Some((Denial::Rule, FirewallKind::Iptables)));

        let listed = V4.read(&format!("-P INPUT DROP\n{ours}\n-A INPUT -i lo -j ACCEPT\n{ours}\n"));
        let accepted: Vec<_> = listed.accepts.values().copied().collect();
        assert_eq!(accepted, [Accepted { copies: 2, first: true }]);
        let listed = V4.read(&format!("-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n{ours}\n"));
        assert!(listed.accepts.values().all(|accepted| !accepted.first));
        assert_eq!(listed.others.len(), 2);
    }
}

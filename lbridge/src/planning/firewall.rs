//! The host's firewall, as far as rules need it. Netfilter's INPUT comes before `sk_lookup` and before a relay's socket: what
//! it drops never arrives, and the container sees a time-out. Pure, as all of planning.
//!
//! Whether a packet arrives is never concluded from a ruleset: it is tried ([`Passage`]). The ruleset is read to say who is
//! in the way, and where an accept rule would count.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use lbridge_common::wire::{AcceptedKey, Address, RuleKey};
use serde::{Deserialize, Serialize};

use super::{inventory::Interface, plan::Step, rule::Protocol};

/// Marks lbridge's own rules in every ruleset.
pub const COMMENT: &str = "lbridge";

/// What lbridge may do to the host's firewall.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FirewallMode {
    /// Keep an accept rule for what is dropped otherwise.
    #[default]
    Manage,
    /// Nothing.
    Off,
}

impl fmt::Display for FirewallMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Manage => "manage",
            Self::Off => "off",
        })
    }
}

/// Interface, address, protocol and port.
type Place<'a> = (&'a str, IpAddr, Protocol, u16);

/// What must be let through: from one network on one bridge to an address of the host's at one port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Opening {
    /// The bridge's name.
    pub interface: String,
    /// What is dialled.
    pub gateway: IpAddr,
    /// The network's subnet, without host bits.
    pub sources: IpNet,
    /// What is spoken there.
    pub protocol: Protocol,
    /// Port that is dialled.
    pub port: u16,
}

impl fmt::Display for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { interface, gateway, protocol, port, .. } = self;
        write!(f, "{gateway} port {port}{} from {interface}", protocol.suffix())
    }
}

impl Opening {
    /// What must be let through from the network in which the bridge has the address `own`, with the length of its prefix.
    pub fn new(
        interface: &str,
        (own, prefix): (IpAddr, u8),
        gateway: IpAddr,
        protocol: Protocol,
        port: u16,
    ) -> Self {
        let sources = IpNet::new(own, prefix).unwrap_or_else(|_| own.into()).trunc();
        Self { interface: interface.to_owned(), gateway, sources, protocol, port }
    }

    /// Returns true if a container could send a datagram there in the host's own name, which is not in the subnet for this purpose.
    /// The kernel drops IPv4 packets that come in with one of the host's own sources (`fib_validate_source()`), IPv6 packets it does not.
    /// A forged SYN does no harm: its answer stays on the host.
    pub fn can_be_forged(&self) -> bool {
        self.protocol == Protocol::Udp && self.gateway.is_ipv6()
    }

    /// Where packets are let through to, from whichever network.
    fn place(&self) -> Place<'_> {
        (&self.interface, self.gateway, self.protocol, self.port)
    }

    /// Key of the kernel's entry for what comes in on that interface.
    pub fn entry(&self, ifindex: u32) -> RuleKey {
        let protocol = self.protocol.number().into();
        RuleKey { gateway: self.gateway.into(), ifindex, port: self.port, protocol }
    }

    /// Key of what an accept rule for it lets in, with the bits of it that count.
    pub fn accepted(&self) -> (AcceptedKey, u32) {
        let source = Address::from(self.sources.addr());
        let mask = source.mask(self.sources.prefix_len());
        let (gateway, protocol) = (self.gateway.into(), self.protocol.number().into());
        let key = AcceptedKey { gateway, port: self.port, protocol, source: source.masked(&mask) };
        (key, AcceptedKey::prefix_len(&mask))
    }

    /// Whether the interface can be named in a rule and mean only itself: firewalls read `*`, `+`, `@` and `!` otherwise.
    pub fn has_plain_name(&self) -> bool {
        is_plain(&self.interface)
    }
}

fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.chars().all(plain) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Where an opening is tried from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The bridge's index.
    pub ifindex: u32,
    /// The bridge's own address, if what is dialled is elsewhere on the host.
    pub via: Option<IpAddr>,
}

/// What must be let through for a port to be dialled on a bridge, at each of its addresses.
pub fn openings(bridge: &Interface, protocol: Protocol, port: u16) -> impl Iterator<Item = (Opening, Link)> {
    bridge.addresses.iter().map(move |own| {
        let opening = Opening::new(&bridge.name, *own, own.0, protocol, port);
        (opening, Link { ifindex: bridge.index, via: None })
    })
}

/// What became of a packet from the bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Passage {
    /// A SYN was answered, by a service or by a reset; a datagram was counted.
    Open,
    /// Nothing came back, nothing was counted.
    Dropped,
    /// It could not be tried.
    Unknown(String),
}

/// How a chain is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Through {
    /// `nft`.
    Nft,
    /// `iptables-nft`, `ip6tables-nft`: their tables are theirs, `nft` may leave what they cannot read.
    IptablesNft,
    /// `iptables-legacy`, `ip6tables-legacy`.
    IptablesLegacy,
    /// `firewall-cmd`: firewalld's table has an owner, and takes rules from nobody else.
    Firewalld,
}

/// Address family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// Both.
    Inet,
}

impl Family {
    /// Whether packets to `address` meet such a table.
    pub fn meets(self, address: IpAddr) -> bool {
        match self {
            Self::Ip => address.is_ipv4(),
            Self::Ip6 => address.is_ipv6(),
            Self::Inet => true,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
        })
    }
}

/// A base chain on the input hook.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chain {
    /// How it is changed.
    pub through: Through,
    /// Its table's.
    pub family: Family,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { through, family, table, name } = self;
        match (through, family) {
            (Through::Firewalld, _) => f.write_str("firewalld's zone"),
            (Through::Nft, _) => write!(f, "nftables' {family} {table} {name}"),
            (Through::IptablesNft, Family::Ip6) => write!(f, "ip6tables' {name}"),
            (Through::IptablesNft, _) => write!(f, "iptables' {name}"),
            (Through::IptablesLegacy, Family::Ip6) => write!(f, "ip6tables-legacy's {name}"),
            (Through::IptablesLegacy, _) => write!(f, "iptables-legacy's {name}"),
        }
    }
}

/// What a chain does with a packet that it says nothing of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Denial {
    /// Drops it.
    Policy,
    /// Lets it pass, but some rule drops or rejects.
    Rule,
}

/// Whose a chain is, as far as it can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeper {
    /// UFW.
    Ufw,
    /// firewalld.
    Firewalld,
    /// Somebody who uses iptables.
    Iptables,
    /// Somebody who uses nftables.
    Nftables,
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ufw => "UFW",
            Self::Firewalld => "firewalld",
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        })
    }
}

/// An input chain that may deny.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputChain {
    /// Which.
    pub chain: Chain,
    /// How it denies.
    pub denial: Denial,
    /// Whose it is.
    pub firewall: Keeper,
}

/// An accept rule of lbridge's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// How often it is there.
    pub copies: usize,
    /// Whether nothing but lbridge's rules comes before it.
    pub first: bool,
}

/// The firewall, as it was seen and tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filtering {
    /// Input chains that may deny, the likeliest first.
    pub chains: Vec<InputChain>,
    /// lbridge's own rules.
    pub accepts: BTreeMap<(Chain, Opening), Accepted>,
    /// What was tried since the ruleset changed.
    pub passages: BTreeMap<Opening, Passage>,
    /// What was dropped when it was tried without an accept rule.
    pub needed: BTreeSet<Opening>,
    /// Why the ruleset could not be read.
    pub unreadable: Option<String>,
    /// A tool that is there failed, so that there may be any accept rule.
    pub failed: bool,
}

impl Filtering {
    /// Keys of what lbridge's accept rules let in, with the bits of each that count.
    pub fn accepted(&self) -> BTreeSet<(AcceptedKey, u32)> {
        self.accepts.keys().map(|(_, opening)| opening.accepted()).collect()
    }

    /// Who keeps chains that may deny, each once.
    pub fn keepers(&self) -> BTreeSet<Keeper> {
        self.chains.iter().map(|chain| chain.firewall).collect()
    }

    /// The chains that packets for an opening meet, the likeliest to deny first.
    pub fn in_the_way_of(&self, opening: &Opening) -> impl Iterator<Item = &InputChain> {
        self.chains.iter().filter(|chain| chain.chain.family.meets(opening.gateway))
    }

    /// Who is likely to drop it, and the command that lets it through; `None` where no chain on the input hook is in the way.
    /// The command is `None` where it would need a name that means more than itself.
    pub fn remedy(&self, opening: &Opening) -> Option<(Keeper, Option<String>)> {
        self.in_the_way_of(opening).next().map(|chain| (chain.firewall, chain.remedy(opening)))
    }

    /// Why nothing comes through, and what to type; in one line.
    pub fn why_dropped(&self, opening: &Opening) -> String {
        let accepted = |chain: &InputChain| {
            self.accepts.get(&(chain.chain.clone(), opening.clone())).is_some_and(|accepted| accepted.first)
        };
        match self.in_the_way_of(opening).next() {
            Some(chain) if self.in_the_way_of(opening).all(accepted) => {
                let neighbours = "; for IPv6 a firewall must let neighbour discovery in (icmpv6 nd-neighbor-solicit, \
                                  nd-neighbor-advert)";
                let neighbours = if opening.gateway.is_ipv6() { neighbours } else { "" };
                format!(
                    "nothing comes through, though {} accepts it first: look for chains on prerouting, of bridge or netdev \
                     tables, and for XDP programs{neighbours}",
                    chain.chain
                )
            }
            Some(chain) => {
                let remedy = chain.remedy(opening).unwrap_or_else(|| {
                    "it has to be let through by hand, since a name here could mean something else to a firewall or a shell"
                        .to_owned()
                });
                format!("firewall {} drops it; type: {remedy}", chain.firewall)
            }
            None => match &self.unreadable {
                Some(why) => format!("a firewall drops it, which cannot be told: {why}"),
                None => "a firewall drops it, but no chain on the input hook: look for chains on prerouting, of bridge or \
                         netdev tables, and for XDP programs"
                    .to_owned(),
            },
        }
    }
}

impl InputChain {
    /// The command that lets an opening through, and nothing else, whoever chose the names in it.
    fn remedy(&self, opening: &Opening) -> Option<String> {
        if !(opening.has_plain_name() && is_plain(&self.chain.table) && is_plain(&self.chain.name)) {
            return None;
        }
        let Opening { interface, gateway, sources, protocol, port } = opening;
        let protocol = protocol.name();
        let (ip, family, suffix) = if gateway.is_ipv4() { ("ip", "ipv4", "") } else { ("ip6", "ipv6", "6") };
        Some(match self.firewall {
            Keeper::Ufw => format!(
                "ufw allow in on {interface} from {sources} to {gateway} port {port} proto {protocol}"
            ),
            Keeper::Firewalld => format!(
                "firewall-cmd --zone=\"$(firewall-cmd --get-zone-of-interface={interface} || firewall-cmd --get-default-zone)\" \
                 --add-rich-rule='rule family=\"{family}\" source address=\"{sources}\" destination address=\"{gateway}\" port port=\"{port}\" \
                 protocol=\"{protocol}\" accept'"
            ),
            Keeper::Iptables => {
                let legacy = if self.chain.through == Through::IptablesLegacy { "-legacy" } else { "" };
                format!(
                    "ip{suffix}tables{legacy} -I INPUT -i {interface} -s {sources} -d {gateway} -p {protocol} --dport {port} -j ACCEPT"
                )
            }
            Keeper::Nftables => {
                let Chain { family, table, name, .. } = &self.chain;
                format!(
                    "nft insert rule {family} {table} {name} iifname {interface} {ip} saddr {sources} {ip} daddr {gateway} {protocol} dport {port} accept"
                )
            }
        })
    }
}

/// The steps that let through what is needed and take back what is not. `openings` are all that rules want. What was
/// accepted is not known to pass any more, and so is tried in the next round. An accept rule that is not wanted any more goes after the one
/// that takes its place.
pub(super) fn plan(openings: &BTreeMap<Opening, Link>, mode: FirewallMode, seen: &Filtering) -> Vec<Step> {
    let wanted = |opening: &Opening| mode == FirewallMode::Manage && openings.contains_key(opening);
    let mut steps = vec![];
    let places: BTreeSet<_> = seen.accepts.keys().map(|(_, accepted)| accepted.place()).collect();
    let mut unknown = BTreeMap::new();
    for (opening, link) in openings {
        let passage = seen.passages.get(opening);
        match next_accept(opening, passage, seen, &places).filter(|_| wanted(opening)) {
            Some(chain) => steps.push(Step::Accept { chain, opening: opening.clone() }),
            None if passage.is_none() => drop(unknown.insert(opening.clone(), *link)),
            None => {}
        }
    }
    let unwanted = seen.accepts.keys().filter(|(_, opening)| !wanted(opening));
    steps.extend(
        unwanted.map(|(chain, opening)| Step::Unaccept { chain: chain.clone(), opening: opening.clone() }),
    );
    if !unknown.is_empty() {
        steps.push(Step::Probe(unknown));
    }
    steps
}

/// The chain that is to get an accept rule next: none is there though it is needed, or those that are there were not enough.
fn next_accept(
    opening: &Opening,
    passage: Option<&Passage>,
    seen: &Filtering,
    accepted: &BTreeSet<Place<'_>>,
) -> Option<Chain> {
    let of = |chain: &Chain| seen.accepts.get(&(chain.clone(), opening.clone()));
    let chains = || seen.in_the_way_of(opening).map(|chain| &chain.chain);
    // An accept rule for another subnet of the same bridge, as older versions put it, says that one is needed.
    let is_needed = || seen.needed.contains(opening) || accepted.contains(&opening.place());
    // Somebody restored a ruleset that was saved with ours in it.
    let doubled = chains().find(|chain| of(chain).is_some_and(|accepted| accepted.copies > 1));
    let none = || !chains().any(|chain| of(chain).is_some());
    let lacking = || chains().find(|chain| !of(chain).is_some_and(|accepted| accepted.first));
    let next = match passage {
        _ if doubled.is_some() => doubled,
        Some(Passage::Dropped) => lacking(),
        _ if is_needed() && none() => lacking(),
        _ => None,
    };
    next.cloned()
}

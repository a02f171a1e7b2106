//! Firewall: the host's firewall, as far as rules need it. Netfilter's INPUT hook comes before `sk_lookup`
//! and before a relay's socket: what it drops never arrives, and the container sees a time-out. Pure, as all
//! of planning.
//!
//! lbridge never concludes from a ruleset whether a packet arrives: it tries ([`ProbeResult`]). It reads the
//! ruleset to say who is in the way, and where an accept rule would count.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use lbridge_common::wire::{AcceptedKey, Address, EntryKey};
use serde::{Deserialize, Serialize};

use super::{inventory::Interface, rule::Protocol};

/// The comment that marks lbridge's own rules in every ruleset.
pub const COMMENT: &str = "lbridge";

/// The changes that lbridge may make to the host's firewall.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FirewallMode {
    /// Keep an accept rule for traffic that is dropped otherwise.
    #[default]
    Manage,
    /// Change nothing in the firewall.
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

/// Interface, address, protocol and port that packets are let through to.
pub(super) type Place<'a> = (&'a str, IpAddr, Protocol, u16);

/// Traffic that must be let through: from one network on one bridge to one address and port of the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Opening {
    /// Name of the bridge.
    pub interface: String,
    /// Address that is dialled.
    pub gateway: IpAddr,
    /// The network's subnet, without host bits.
    pub sources: IpNet,
    /// Protocol of the port.
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
    /// Creates the opening for the network in which the bridge has the address `own`, with the length of its
    /// prefix in bits.
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

    /// Returns true if a container could send a datagram there with one of the host's own addresses as its
    /// source; for this purpose such an address is not in the subnet. The kernel drops IPv4 packets that
    /// arrive with one of the host's own sources (`fib_validate_source()`), but not such IPv6 packets. A
    /// forged SYN does no harm: its answer stays on the host.
    pub fn can_be_forged(&self) -> bool {
        self.protocol == Protocol::Udp && self.gateway.is_ipv6()
    }

    /// Returns the place that packets are let through to, from whichever network.
    pub(super) fn place(&self) -> Place<'_> {
        (&self.interface, self.gateway, self.protocol, self.port)
    }

    /// Returns the key of the kernel's entry for packets that arrive on that interface.
    pub fn entry(&self, ifindex: u32) -> EntryKey {
        let protocol = self.protocol.number().into();
        EntryKey { gateway: self.gateway.into(), ifindex, port: self.port, protocol }
    }

    /// Returns the key of the traffic that an accept rule for the opening lets in, with the length of its
    /// prefix in bits.
    pub fn accepted(&self) -> (AcceptedKey, u32) {
        let source = Address::from(self.sources.addr());
        let mask = source.mask(self.sources.prefix_len());
        let (gateway, protocol) = (self.gateway.into(), self.protocol.number().into());
        let key = AcceptedKey { gateway, port: self.port, protocol, source: source.masked(&mask) };
        (key, AcceptedKey::prefix_len(&mask))
    }

    /// Returns true if the interface's name means only that interface in a rule: firewalls read `*`, `+`, `@`
    /// and `!` otherwise.
    pub fn has_plain_name(&self) -> bool {
        is_plain(&self.interface)
    }
}

fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.chars().all(plain) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// The link that an opening is tried from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeRoute {
    /// Interface index of the bridge.
    pub ifindex: u32,
    /// The bridge's own address, if the dialled address is elsewhere on the host.
    pub via: Option<IpAddr>,
}

/// Returns the openings that a port dialled on a bridge needs, one for each of the bridge's addresses.
pub fn openings(
    bridge: &Interface,
    protocol: Protocol,
    port: u16,
) -> impl Iterator<Item = (Opening, ProbeRoute)> {
    bridge.addresses.iter().map(move |own| {
        let opening = Opening::new(&bridge.name, *own, own.0, protocol, port);
        (opening, ProbeRoute { ifindex: bridge.index, via: None })
    })
}

/// The result of trying a packet from the bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeResult {
    /// A SYN was answered, by a service or by a reset; a datagram was counted.
    Open,
    /// Nothing came back, and nothing was counted.
    Dropped,
    /// The packet could not be tried, for this reason.
    Unknown(String),
}

/// The tool that changes a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// `nft`, for nftables.
    Nft,
    /// `iptables-nft` and `ip6tables-nft`. Their tables belong to them: `nft` may leave behind what they
    /// cannot read.
    IptablesNft,
    /// `iptables-legacy` and `ip6tables-legacy`.
    IptablesLegacy,
    /// `firewall-cmd`. firewalld's table has an owner, and takes rules from nobody else.
    Firewalld,
}

/// Address family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4 packets only.
    Ip,
    /// IPv6 packets only.
    Ip6,
    /// IPv4 and IPv6 packets.
    Inet,
}

impl Family {
    /// Returns true if packets to `address` pass a table of this family.
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
    /// The tool that changes the chain.
    pub backend: Backend,
    /// Address family of the chain's table.
    pub family: Family,
    /// Name of the chain's table.
    pub table: String,
    /// Name of the chain.
    pub name: String,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backend, family, table, name } = self;
        match (backend, family) {
            (Backend::Firewalld, _) => f.write_str("firewalld's zone"),
            (Backend::Nft, _) => write!(f, "nftables' {family} {table} {name}"),
            (Backend::IptablesNft, Family::Ip6) => write!(f, "ip6tables' {name}"),
            (Backend::IptablesNft, _) => write!(f, "iptables' {name}"),
            (Backend::IptablesLegacy, Family::Ip6) => write!(f, "ip6tables-legacy's {name}"),
            (Backend::IptablesLegacy, _) => write!(f, "iptables-legacy's {name}"),
        }
    }
}

/// The way in which a chain denies packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Denial {
    /// The chain's policy drops a packet that no rule matches.
    Policy,
    /// The chain's policy accepts such a packet, but some rule drops or rejects.
    Rule,
}

/// The firewall that keeps a chain, as far as lbridge can determine it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FirewallKind {
    /// UFW, recognized by the names of its chains.
    Ufw,
    /// firewalld, recognized by the name of its table.
    Firewalld,
    /// Somebody who uses iptables.
    Iptables,
    /// Somebody who uses nftables.
    Nftables,
}

impl fmt::Display for FirewallKind {
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
    /// The chain that may deny.
    pub chain: Chain,
    /// The way in which the chain denies.
    pub denial: Denial,
    /// The firewall that keeps the chain.
    pub firewall: FirewallKind,
}

/// The state of one of lbridge's accept rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// Number of copies in the chain.
    pub copies: usize,
    /// True if nothing but lbridge's own rules comes before it.
    pub first: bool,
}

/// The firewall, as lbridge read and tried it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FirewallState {
    /// Input chains that may deny, the likeliest first.
    pub chains: Vec<InputChain>,
    /// Accept rules that are lbridge's own.
    pub accepts: BTreeMap<(Chain, Opening), Accepted>,
    /// Results of the packets that were tried since the ruleset changed.
    pub probe_results: BTreeMap<Opening, ProbeResult>,
    /// Openings that need an accept rule: they were dropped when tried without one, or have one already.
    pub needed: BTreeSet<Opening>,
    /// The reason why the ruleset could not be read; `None` if it could.
    pub unreadable: Option<String>,
    /// True if a tool that is installed failed, so that any accept rule may be there.
    pub failed: bool,
}

impl FirewallState {
    /// Returns the keys of the traffic that lbridge's accept rules let in, with the length of each prefix in
    /// bits.
    pub fn accepted(&self) -> BTreeSet<(AcceptedKey, u32)> {
        self.accepts.keys().map(|(_, opening)| opening.accepted()).collect()
    }

    /// Returns the firewalls that keep chains that may deny, each once.
    pub fn firewall_kinds(&self) -> BTreeSet<FirewallKind> {
        self.chains.iter().map(|chain| chain.firewall).collect()
    }

    /// Returns the chains that packets of an opening pass, the likeliest to deny first.
    pub fn in_the_way_of(&self, opening: &Opening) -> impl Iterator<Item = &InputChain> {
        self.chains.iter().filter(|chain| chain.chain.family.meets(opening.gateway))
    }

    /// Returns the firewall that is likely to drop the opening's packets, and the command that lets them
    /// through; `None` if no chain on the input hook is in the way. The command is `None` if it would need a
    /// name that means more than itself.
    pub fn remedy(&self, opening: &Opening) -> Option<(FirewallKind, Option<String>)> {
        self.in_the_way_of(opening).next().map(|chain| (chain.firewall, chain.remedy(opening)))
    }

    /// Explains in one line why nothing comes through, and what to type.
    pub fn why_dropped(&self, opening: &Opening) -> String {
        let accepted = |chain: &InputChain| {
            self.accepts.get(&(chain.chain.clone(), opening.clone())).is_some_and(|accepted| accepted.first)
        };
        match self.in_the_way_of(opening).next() {
            Some(chain) if self.in_the_way_of(opening).all(accepted) => {
                let neighbours = "; for IPv6 a firewall must let neighbour discovery in (icmpv6 \
                                  nd-neighbor-solicit, nd-neighbor-advert)";
                let neighbours = if opening.gateway.is_ipv6() { neighbours } else { "" };
                format!(
                    "packets are dropped, though {} accepts them first; look for chains on prerouting, of \
                     bridge or netdev tables, and for XDP programs{neighbours}",
                    chain.chain
                )
            }
            Some(chain) => {
                let remedy = chain.remedy(opening).unwrap_or_else(|| {
                    "add the accept rule by hand, since a name in it has characters that a firewall or a \
                     shell reads otherwise"
                        .to_owned()
                });
                format!("firewall {} drops it; type: {remedy}", chain.firewall)
            }
            None => match &self.unreadable {
                Some(why) => format!("a firewall drops it; could not determine which one: {why}"),
                None => {
                    "packets are dropped, but by no chain on the input hook; look for chains on prerouting, \
                     of bridge or netdev tables, and for XDP programs"
                        .to_owned()
                }
            },
        }
    }
}

impl InputChain {
    /// Returns the command that lets an opening through, and nothing else, whoever chose the names in it;
    /// `None` if a name is not plain.
    fn remedy(&self, opening: &Opening) -> Option<String> {
        if !(opening.has_plain_name() && is_plain(&self.chain.table) && is_plain(&self.chain.name)) {
            return None;
        }
        let Opening { interface, gateway, sources, protocol, port } = opening;
        let protocol = protocol.name();
        let (ip, family, suffix) = if gateway.is_ipv4() { ("ip", "ipv4", "") } else { ("ip6", "ipv6", "6") };
        Some(match self.firewall {
            FirewallKind::Ufw => format!(
                "ufw allow in on {interface} from {sources} to {gateway} port {port} proto {protocol}"
            ),
            FirewallKind::Firewalld => format!(
                "firewall-cmd --zone=\"$(firewall-cmd --get-zone-of-interface={interface} || firewall-cmd \
                 --get-default-zone)\" --add-rich-rule='rule family=\"{family}\" source \
                 address=\"{sources}\" destination address=\"{gateway}\" port port=\"{port}\" \
                 protocol=\"{protocol}\" accept'"
            ),
            FirewallKind::Iptables => {
                let legacy = if self.chain.backend == Backend::IptablesLegacy { "-legacy" } else { "" };
                format!(
                    "ip{suffix}tables{legacy} -I INPUT -i {interface} -s {sources} -d {gateway} -p \
                     {protocol} --dport {port} -j ACCEPT"
                )
            }
            FirewallKind::Nftables => {
                let Chain { family, table, name, .. } = &self.chain;
                format!(
                    "nft insert rule {family} {table} {name} iifname {interface} {ip} saddr {sources} {ip} \
                     daddr {gateway} {protocol} dport {port} accept"
                )
            }
        })
    }
}

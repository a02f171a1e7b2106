//! Step: one change to the kernel, the relays or the firewall.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use lbridge_common::wire::{
    AcceptedKey, Address, Endpoint, Entry, EntryKey, ListenerKey, NameOverride, OverrideKey, Redirect,
    RedirectKey, ReplySource, ReplySourceKey, SourceKey, TargetKey, UDP,
};

use crate::planning::{
    desired::{RelayKey, RelaySpec},
    firewall::{Chain, Opening, ProbeRoute},
    hooks::HookSet,
};

/// One change, to be carried out literally: everything about it was decided before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Attach the programs that must always be attached: one of their links is detached, or runs another
    /// program.
    Attach,
    /// Watch an address and port: have listeners there registered.
    AddTarget(TargetKey),
    /// Attach a set of hooks.
    AttachHooks(HookSet),
    /// Put a name override, which makes a gateway's connections look local, or change it.
    PutOverride((OverrideKey, u32), NameOverride),
    /// Give a UDP service's replies their source, or another one.
    PutReplySource((ReplySourceKey, u32), ReplySource),
    /// Register the socket of this inode.
    Register {
        /// The key to register the socket under.
        key: ListenerKey,
        /// Inode number of the socket.
        inode: u64,
    },
    /// Open a relay, or change the specification of one that is open.
    OpenRelay(RelayKey, RelaySpec),
    /// Let a source use an entry that is not for its whole network.
    AddSource(SourceKey),
    /// Refuse the traffic that an accept rule lets in, unless an entry admits it.
    AddAccepted((AcceptedKey, u32)),
    /// Stop refusing the traffic that an accept rule let in.
    RemoveAccepted((AcceptedKey, u32)),
    /// Have conntrack forget the flows that accept rules let in, except open connections.
    ForgetFlows(BTreeSet<(AcceptedKey, u32)>),
    /// Put an entry, or change where it leads.
    PutEntry(EntryKey, Entry),
    /// Remove an entry.
    RemoveEntry(EntryKey),
    /// Stop letting a source use an entry.
    RemoveSource(SourceKey),
    /// Put a connect redirect, or change its gateway.
    PutRedirect(RedirectKey, Redirect),
    /// Remove a connect redirect.
    RemoveRedirect(RedirectKey),
    /// Stop listening as a relay.
    CloseRelay {
        /// Key of the relay.
        key: RelayKey,
        /// True if the kernel has taken over: handshakes under way are then still completed.
        handed_over: bool,
    },
    /// Remove a name override.
    RemoveOverride((OverrideKey, u32)),
    /// Detach a set of hooks.
    DetachHooks(HookSet),
    /// Stop giving a UDP service's replies another source.
    RemoveReplySource((ReplySourceKey, u32)),
    /// Remove a listener from the kernel's map.
    Unregister(ListenerKey),
    /// Stop watching an address and port.
    RemoveTarget(TargetKey),
    /// Put an accept rule first in one of the firewall's chains.
    Accept {
        /// The chain that gets the rule.
        chain: Chain,
        /// The traffic that the rule accepts.
        opening: Opening,
    },
    /// Remove an accept rule from the firewall.
    RemoveAccept {
        /// The chain that has the rule.
        chain: Chain,
        /// The traffic that the rule accepts.
        opening: Opening,
    },
    /// Try whether the firewall lets packets through these openings.
    Probe(BTreeMap<Opening, ProbeRoute>),
}

/// Writes what the step does to what, as in "failed to put the entry 172.18.0.1:80/tcp on interface 7".
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach => f.write_str("attach the programs"),
            Self::AddTarget(key) => {
                write!(f, "watch listeners on {}", port(key.address, key.port, key.protocol))
            }
            Self::RemoveTarget(key) => {
                write!(f, "stop watching listeners on {}", port(key.address, key.port, key.protocol))
            }
            Self::AttachHooks(set) => write!(f, "attach the {} hooks", hooks(*set)),
            Self::DetachHooks(set) => write!(f, "detach the {} hooks", hooks(*set)),
            Self::PutOverride((key, _), _) => {
                write!(f, "put the name override for {}", endpoint(&key.gateway))
            }
            Self::RemoveOverride((key, _)) => {
                write!(f, "remove the name override for {}", endpoint(&key.gateway))
            }
            Self::PutReplySource((key, _), reply) => {
                let gateway = IpAddr::from(reply.gateway);
                write!(f, "set the reply source of {}/udp to {gateway}", endpoint(&key.service))
            }
            Self::RemoveReplySource((key, _)) => {
                write!(f, "remove the reply source of {}/udp", endpoint(&key.service))
            }
            Self::Register { key, inode } => {
                let listener = port(key.address, key.port, key.protocol.into());
                write!(f, "register the listener {listener} (inode {inode})")
            }
            Self::Unregister(key) => {
                write!(f, "unregister the listener {}", port(key.address, key.port, key.protocol.into()))
            }
            Self::OpenRelay(key, _) => {
                write!(f, "open the relay {} on {}", key.address, key.place.interface())
            }
            Self::CloseRelay { key, .. } => {
                write!(f, "close the relay {} on {}", key.address, key.place.interface())
            }
            Self::AddSource(key) => {
                write!(f, "let {} use the entry {}", IpAddr::from(key.source), entry(&key.entry))
            }
            Self::RemoveSource(key) => {
                write!(f, "revoke the use of the entry {} by {}", entry(&key.entry), IpAddr::from(key.source))
            }
            Self::AddAccepted(key) => write!(f, "refuse other traffic to {}", accepted(key)),
            Self::RemoveAccepted(key) => write!(f, "stop refusing other traffic to {}", accepted(key)),
            Self::ForgetFlows(keys) => {
                let keys: Vec<_> = keys.iter().map(accepted).collect();
                write!(f, "have conntrack forget the flows to {}", keys.join(", "))
            }
            Self::PutEntry(key, _) => write!(f, "put the entry {}", entry(key)),
            Self::RemoveEntry(key) => write!(f, "remove the entry {}", entry(key)),
            Self::PutRedirect(key, redirect) => {
                write!(f, "redirect {} to {}", redirected(key), endpoint(&redirect.gateway))
            }
            Self::RemoveRedirect(key) => write!(f, "remove the redirect of {}", redirected(key)),
            Self::Accept { chain, opening } => {
                write!(f, "put the accept rule for {opening} into {chain}")
            }
            Self::RemoveAccept { chain, opening } => {
                write!(f, "remove the accept rule for {opening} from {chain}")
            }
            Self::Probe(openings) => {
                let openings: Vec<_> = openings.keys().map(ToString::to_string).collect();
                write!(f, "probe the firewall for {}", openings.join(", "))
            }
        }
    }
}

fn port(address: Address, port: u16, protocol: u16) -> String {
    let protocol = if protocol == u16::from(UDP) { "udp" } else { "tcp" };
    format!("{}/{protocol}", SocketAddr::new(address.into(), port))
}

fn endpoint(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.address.into(), endpoint.port)
}

fn entry(key: &EntryKey) -> String {
    let EntryKey { gateway, ifindex, port: dialled, protocol } = *key;
    format!("{} on interface {ifindex}", port(gateway, dialled, protocol))
}

fn redirected(key: &RedirectKey) -> String {
    let RedirectKey { address, ifindex, port: dialled, protocol, netns } = *key;
    let dialled = port(address, dialled, protocol);
    match netns {
        0 => format!("{dialled} on interface {ifindex}"),
        netns => format!("{dialled} on interface {ifindex} in the namespace with cookie {netns}"),
    }
}

fn accepted((key, bits): &(AcceptedKey, u32)) -> String {
    let (dialled, source) = (port(key.gateway, key.port, key.protocol), IpAddr::from(key.source));
    let prefix = bits.saturating_sub(AcceptedKey::BITS - if source.is_ipv4() { 32 } else { 128 });
    format!("{dialled} from {source}/{prefix}")
}

fn hooks(set: HookSet) -> &'static str {
    match set {
        HookSet::Names => "getpeername and getsockname",
        HookSet::Connect => "connect",
        HookSet::Replies => "sendmsg",
    }
}

impl Step {
    /// Returns true if the step concerns the kernel programs and their maps.
    pub fn is_of_kernel(&self) -> bool {
        !matches!(
            self,
            Self::OpenRelay(..)
                | Self::CloseRelay { .. }
                | Self::Accept { .. }
                | Self::RemoveAccept { .. }
                | Self::ForgetFlows(_)
                | Self::Probe(_)
        )
    }

    /// Returns the conditions without which the step must not be carried out. Other steps of the same plan
    /// establish them, and may fail.
    pub fn prerequisites(&self) -> Vec<Prerequisite> {
        use Prerequisite::{Hooks, IsRefused, NoFlows};
        match self {
            // It leads to nobody.
            Self::PutEntry(_, entry) if entry.target_port == 0 && !entry.has(Entry::RELAYED) => vec![],
            Self::PutEntry(key, _) if key.protocol == u16::from(UDP) => {
                vec![Hooks(HookSet::Names), Hooks(HookSet::Replies)]
            }
            Self::PutEntry(..) | Self::OpenRelay(..) => vec![Hooks(HookSet::Names)],
            Self::PutRedirect(..) => vec![Hooks(HookSet::Connect)],
            Self::Accept { opening, .. } => vec![IsRefused(opening.accepted())],
            Self::RemoveAccepted(key) => vec![NoFlows(*key)],
            _ => vec![],
        }
    }
}

/// A condition of a step, see [`Step::prerequisites`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prerequisite {
    /// These hooks are attached: the step lets connections come that need them.
    Hooks(HookSet),
    /// The kernel refuses the traffic of this key that no entry admits: an accept rule lets in packets that
    /// would otherwise reach any service that listens on every address.
    IsRefused((AcceptedKey, u32)),
    /// Conntrack knows no flow of this key: it would pass without an accept rule.
    NoFlows((AcceptedKey, u32)),
}

#[cfg(test)]
mod tests {
    use lbridge_common::wire::TCP;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn a_step_says_what_it_does_to_what() {
        let entry = |gateway, port, protocol: u8| EntryKey {
            gateway: address(gateway),
            ifindex: 7,
            port,
            protocol: protocol.into(),
        };
        let accepted = |gateway, source, bits| {
            let (gateway, source) = (address(gateway), address(source));
            (AcceptedKey { gateway, port: 80, protocol: TCP.into(), source }, bits)
        };
        let redirect = |netns| RedirectKey {
            address: address("127.0.0.1"),
            ifindex: 7,
            port: 80,
            protocol: TCP.into(),
            netns,
        };
        for (step, words) in [
            (
                Step::RemoveEntry(entry("172.18.0.1", 80, TCP)),
                "remove the entry 172.18.0.1:80/tcp on interface 7",
            ),
            (
                Step::RemoveEntry(entry("fd00::1", 53, UDP)),
                "remove the entry [fd00::1]:53/udp on interface 7",
            ),
            (
                Step::AddSource(SourceKey { entry: entry("10.0.0.1", 80, TCP), source: address("10.0.0.2") }),
                "let 10.0.0.2 use the entry 10.0.0.1:80/tcp on interface 7",
            ),
            (
                Step::AddAccepted(accepted("10.0.0.1", "10.0.0.0", 160 + 96 + 24)),
                "refuse other traffic to 10.0.0.1:80/tcp from 10.0.0.0/24",
            ),
            (
                Step::RemoveAccepted(accepted("fd00::1", "fd00::", 160 + 64)),
                "stop refusing other traffic to [fd00::1]:80/tcp from fd00::/64",
            ),
            (Step::RemoveRedirect(redirect(0)), "remove the redirect of 127.0.0.1:80/tcp on interface 7"),
            (
                Step::RemoveRedirect(redirect(9)),
                "remove the redirect of 127.0.0.1:80/tcp on interface 7 in the namespace with cookie 9",
            ),
            (Step::DetachHooks(HookSet::Replies), "detach the sendmsg hooks"),
        ] {
            assert_eq!(step.to_string(), words);
        }
    }
}

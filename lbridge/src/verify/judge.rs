//! Judge: compares what was found with what is expected, and says why they differ.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use lbridge_common::verdict::listening_addresses;

use super::{
    Check, Expected, Found, Verdict,
    ground::{Dialled, Grounds},
    plan::{Attempt, By, Trial, Vantage},
};
use crate::{
    api::protocol::Status,
    host::holders,
    planning::inventory::{Listener, ListenerKind},
};

const FIREWALL: &str =
    "a firewall drops it; `nft list ruleset` or `iptables -vnL INPUT` shows the rule whose count grows";
const REJECTS: &str =
    "a firewall rejects it; `nft list ruleset` or `iptables -vnL INPUT` shows the rule whose count grows";

/// Everything that was seen, to judge the trials by.
pub(super) struct Judge<'a> {
    /// The daemon's answer.
    pub(super) status: &'a Status,
    /// Process id of the daemon; `None` if it is not known.
    pub(super) daemon: Option<u32>,
    /// The places that are dialled from.
    pub(super) grounds: &'a Grounds,
    /// The results of the connections, by where they were made from and to.
    pub(super) dialled: BTreeMap<(Vantage, SocketAddr), Dialled>,
    /// The host's TCP listeners.
    pub(super) listeners: Vec<Listener>,
    /// The host's UDP sockets.
    pub(super) sockets: Vec<Listener>,
}

impl Judge<'_> {
    /// Compares the result of a trial with what is expected of it.
    pub(super) fn check(&self, trial: &Trial) -> Check {
        let (from, to) = match &trial.attempt {
            Attempt::Connect { from, to, .. } | Attempt::Ask { from, to, .. } => {
                (self.name(from), to.to_string())
            }
            Attempt::Borrow { of, at, to } => {
                let source =
                    match self.grounds.borrowed(trial.rule.protocol, &Vantage::Bridge(of.clone()), at, *to) {
                        Ok((source, _)) => source.to_string(),
                        Err(_) => self.name(&Vantage::Bridge(of.clone())),
                    };
                (format!("{}, as {source}", self.name(at)), to.to_string())
            }
            Attempt::Listed { source, at, to, .. } => {
                (format!("{}, as {source}", self.name(at)), to.to_string())
            }
            Attempt::Foreign { at, to } => {
                let source = match self.grounds.foreign(trial.rule.protocol, at, *to) {
                    Ok((source, _)) => source.to_string(),
                    Err(_) => "a stranger".to_owned(),
                };
                (format!("{}, as {source}", self.name(at)), to.to_string())
            }
            Attempt::Wire { within, to } => (format!("{}, not lo", self.name(within)), to.to_string()),
            Attempt::Nothing { what, .. } => (trial.rule.network.to_string(), what.clone()),
        };
        let (found, verdict, why) = self.judge(trial);
        Check {
            network: trial.rule.network.clone(),
            port: trial.rule.port,
            protocol: trial.rule.protocol,
            from,
            to,
            expected: trial.expected,
            found,
            verdict,
            why,
        }
    }

    fn name(&self, place: &Vantage) -> String {
        match place {
            Vantage::Lan => "the LAN".to_owned(),
            Vantage::Interface { name, .. } => name.clone(),
            Vantage::Inside(rule) => rule.network.to_string(),
            Vantage::Bridge(bridge) => {
                let is_its = |bridge_of: &Option<String>| bridge_of.as_ref() == Some(bridge);
                let network = self.status.docker_networks.iter().find(|network| is_its(&network.bridge));
                network.map_or_else(|| format!("bridge:{bridge}"), |network| network.name.clone())
            }
        }
    }

    fn judge(&self, trial: &Trial) -> (Found, Verdict, Option<String>) {
        let failed = |found, why: String| (found, Verdict::Failed, Some(why));
        match &trial.attempt {
            Attempt::Nothing { why, .. } => unverified(why),
            Attempt::Connect { from, to, by } => match self.dialled.get(&(from.clone(), *to)) {
                None => unverified("it was not tried"),
                Some(Dialled::NotTried(why)) => unverified(why),
                Some(dialled) => match (trial.expected, dialled) {
                    (Expected::Open, Dialled::Open(taker)) => {
                        match self.is_right(by.as_ref(), taker.as_ref(), *to) {
                            Ok(()) => (Found::Open, Verdict::Ok, None),
                            Err(why) => failed(Found::Open, why),
                        }
                    }
                    (Expected::Closed | Expected::Refused, Dialled::Open(taker)) => {
                        failed(Found::Open, who_answers(taker.as_ref(), *to))
                    }
                    (Expected::Closed, _) => match self.behind_a_firewall(from, *to) {
                        Some(why) => (found(dialled), Verdict::Unverified, Some(why)),
                        None => (found(dialled), Verdict::Ok, None),
                    },
                    (Expected::Refused, Dialled::Refused) => (Found::Refused, Verdict::Ok, None),
                    (Expected::Open, Dialled::Refused) => {
                        let why = match (by, self.grounds.taker(from, *to)) {
                            (Some(By::Relay), Some(_)) => {
                                "its relay resets it, or a firewall rejects it; the daemon's log may say why"
                            }
                            (_, Some(_)) => REJECTS,
                            (_, None) => "nobody takes it; the daemon's log may say why",
                        };
                        failed(Found::Refused, why.to_owned())
                    }
                    (_, Dialled::TimedOut) => failed(Found::TimedOut, FIREWALL.to_owned()),
                    (_, _) => failed(
                        found(dialled),
                        "a firewall rejects it, or a route leads elsewhere; see `nft list ruleset` and `ip \
                         route`"
                            .to_owned(),
                    ),
                },
            },
            Attempt::Ask { from, to, by } => {
                match (trial.expected, self.grounds.asked(trial.rule.protocol, from, *to)) {
                    (_, Err(why)) => unverified(&why),
                    (Expected::Open, Ok(taker)) => match self.is_right(by.as_ref(), taker.as_ref(), *to) {
                        Ok(()) => (Found::Open, Verdict::Ok, None),
                        Err(_) if taker.is_none() => {
                            failed(Found::Nobody, "nobody takes it; the daemon's log may say why".to_owned())
                        }
                        Err(why) => failed(Found::Open, why),
                    },
                    (_, Ok(None)) => (Found::Nobody, Verdict::Ok, None),
                    (_, Ok(taker)) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
                }
            }
            Attempt::Borrow { of, at, to } => {
                match self.grounds.borrowed(trial.rule.protocol, &Vantage::Bridge(of.clone()), at, *to) {
                    Err(why) => unverified(&why),
                    Ok((_, None)) => (Found::Nobody, Verdict::Ok, None),
                    Ok((_, taker)) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
                }
            }
            Attempt::Listed { source, at, to, by } => {
                match (self.grounds.taker_of(trial.rule.protocol, *source, at, *to), by) {
                    (Err(why), _) => unverified(&why),
                    (Ok(taker), Some(by)) => match self.is_right(Some(by), taker.as_ref(), *to) {
                        Ok(()) => (Found::Open, Verdict::Ok, None),
                        Err(_) if taker.is_none() => failed(
                            Found::Nobody,
                            "nobody would get it; the daemon's log may say why".to_owned(),
                        ),
                        Err(why) => failed(Found::Open, why),
                    },
                    (Ok(None), None) => (Found::Nobody, Verdict::Ok, None),
                    (Ok(taker), None) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
                }
            }
            Attempt::Foreign { at, to } => match self.grounds.foreign(trial.rule.protocol, at, *to) {
                Err(why) => unverified(&why),
                Ok((_, None)) => (Found::Nobody, Verdict::Ok, None),
                Ok((_, taker)) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
            },
            Attempt::Wire { within, to } => match self.grounds.wire(within, *to) {
                Err(why) => unverified(&why),
                Ok(None) => (Found::Nobody, Verdict::Ok, None),
                Ok(taker) => failed(Found::Open, who_answers(taker.as_ref(), *to)),
            },
        }
    }

    /// Explains a connection from the LAN that nobody answers although a listener exists. A firewall may
    /// treat a newly created interface differently from the LAN's. Localhost over the wire is excluded: the
    /// kernel stops it, not a firewall.
    fn behind_a_firewall(&self, from: &Vantage, to: SocketAddr) -> Option<String> {
        if *from != Vantage::Lan || to.ip().is_loopback() {
            return None;
        }
        let taker = self.grounds.taker(from, to)?;
        Some(format!(
            "only a firewall keeps it closed, and may not do so on every interface: {}; have it listen on \
             127.0.0.1",
            shown(&taker)
        ))
    }

    /// Returns an error with the reason unless the right socket takes the connections to `to`.
    fn is_right(&self, by: Option<&By>, taker: Option<&Listener>, to: SocketAddr) -> Result<(), String> {
        let Some(taker) = taker else { return Err(who_answers(None, to)) };
        match by {
            Some(By::Service(target)) if self.serves(taker, *target) => Ok(()),
            Some(By::Service(target)) => {
                Err(format!("given to {}, not to the service on {target}", shown(taker)))
            }
            Some(By::Relay) => match self.daemon {
                None => Err("could not determine the daemon's process, and so not its relays".to_owned()),
                Some(daemon) if holders::is_held_by(taker.inode, daemon) => Ok(()),
                Some(_) => Err(format!("given to {}, which is not a relay of the daemon", shown(taker))),
            },
            None => Err("could not determine where the rule leads".to_owned()),
        }
    }

    /// Returns true if `taker` is the socket that a client on the host would reach at `target`: a listener on
    /// that address, or else on a wildcard address.
    fn serves(&self, taker: &Listener, target: SocketAddr) -> bool {
        let at = |ip: IpAddr| -> Vec<_> {
            let there = SocketAddr::new(ip, target.port());
            let fits = |listener: &&Listener| {
                listener.address == there
                    && listener.bound_interface == 0
                    && (listener.address.is_ipv4() == target.is_ipv4() || !listener.single_family)
            };
            let udp = taker.kind == ListenerKind::Udp;
            let sockets = if udp { &self.sockets } else { &self.listeners };
            sockets.iter().filter(fits).collect()
        };
        let address = target.ip().into();
        let mut found = listening_addresses(&address).map(|ip| at(ip.into()));
        let first = found.find(|there| !there.is_empty());
        first.unwrap_or_default().iter().any(|listener| listener.inode == taker.inode)
    }
}

fn unverified(why: &str) -> (Found, Verdict, Option<String>) {
    (Found::NotTried, Verdict::Unverified, Some(why.to_owned()))
}

fn found(dialled: &Dialled) -> Found {
    match dialled {
        Dialled::Open(_) => Found::Open,
        Dialled::Refused => Found::Refused,
        Dialled::Unreachable => Found::Unreachable,
        Dialled::TimedOut => Found::TimedOut,
        Dialled::NotTried(_) => Found::NotTried,
    }
}

/// Describes the socket that answers although it should not.
fn who_answers(taker: Option<&Listener>, to: SocketAddr) -> String {
    let port = to.port();
    match taker {
        None => "something answers that does not listen on the host: a NAT rule sends it there; \
                 `nft list ruleset` or `iptables -t nat -vnL` shows which"
            .to_owned(),
        Some(taker) if taker.address.ip().is_loopback() => {
            format!("given to {}, though no rule says so; restart the daemon", shown(taker))
        }
        Some(taker) if taker.address.ip().is_unspecified() => format!(
            "the service itself, or something else, listens on all addresses: {}; have it listen on \
             127.0.0.1 (ss -lntup sport = :{port})",
            shown(taker)
        ),
        Some(taker) => format!("somebody listens there: {} (ss -lntup sport = :{port})", shown(taker)),
    }
}

fn shown(listener: &Listener) -> String {
    match holders::holder(listener.inode) {
        Some(holder) => format!("{holder} on {}", listener.address),
        None => listener.address.to_string(),
    }
}

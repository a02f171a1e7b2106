//! firewalld: accept rules for firewalld from 2.2 on. Its table has an owner: nobody else can put a rule
//! there, so firewalld itself is asked to. It gets a rich rule in the zone of the bridge, until its next
//! reload. A rich rule cannot name an interface, only the bridge's subnet. It has no comment, only a
//! priority, which is lbridge's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::tool::{Problem, run};
use crate::planning::{
    firewall::{Accepted, Chain, Opening, ProbeRoute},
    rule::Protocol,
};

const PROGRAM: &str = "firewall-cmd";
/// Priority that marks lbridge's rules; below zero, they come before what a zone denies.
const PRIORITY: &str = "-21093";

/// One of lbridge's rules, as firewalld lists it.
#[derive(Debug, PartialEq, Eq)]
struct Rule {
    zone: String,
    text: String,
    gateway: IpAddr,
    sources: IpNet,
    protocol: Protocol,
    port: u16,
}

/// Lists lbridge's rules. Openings that are wanted give the bridge of their rule; for other rules it is not
/// known.
pub(super) async fn list(
    chain: &Chain,
    openings: &BTreeMap<Opening, ProbeRoute>,
) -> Result<BTreeMap<(Chain, Opening), Accepted>, Problem> {
    let mut accepts = BTreeMap::new();
    let mut zones = BTreeMap::new();
    for rule in rules().await? {
        let wanted = openings.keys().find(|opening| rule.is_for(opening)).cloned();
        let is_known = wanted.is_some();
        let opening = wanted.unwrap_or_else(|| Opening {
            interface: String::new(),
            gateway: rule.gateway,
            sources: rule.sources,
            protocol: rule.protocol,
            port: rule.port,
        });
        if is_known && !zones.contains_key(&opening.interface) {
            zones.insert(opening.interface.clone(), zone_of(&opening.interface).await?);
        }
        let counts = zones.get(&opening.interface) == Some(&rule.zone);
        let accepted = accepts.entry((chain.clone(), opening)).or_insert(Accepted { copies: 0, first: true });
        accepted.copies += 1;
        accepted.first &= counts;
    }
    Ok(accepts)
}

/// Puts a rule into the bridge's zone, and removes it from other zones.
pub(super) async fn accept(opening: &Opening) -> anyhow::Result<()> {
    let zone = zone_of(&opening.interface).await?;
    let text = text(opening);
    run(PROGRAM, &[&format!("--zone={zone}"), &format!("--add-rich-rule={text}")]).await?;
    for rule in rules().await?.into_iter().filter(|rule| rule.is_for(opening) && rule.zone != zone) {
        rule.remove().await?;
    }
    Ok(())
}

/// Removes a rule from all zones.
pub(super) async fn remove(opening: &Opening) -> anyhow::Result<()> {
    for rule in rules().await?.into_iter().filter(|rule| rule.is_for(opening)) {
        rule.remove().await?;
    }
    Ok(())
}

/// Returns the zone that an interface's packets meet: its own, or else the default one.
async fn zone_of(interface: &str) -> Result<String, Problem> {
    let zone = match run(PROGRAM, &[&format!("--get-zone-of-interface={interface}")]).await {
        Ok(zone) => zone,
        Err(Problem::Failed(_)) => run(PROGRAM, &["--get-default-zone"]).await?,
        Err(missing) => return Err(missing),
    };
    Ok(zone.trim().to_owned())
}

async fn rules() -> Result<Vec<Rule>, Problem> {
    let listed = run(PROGRAM, &["--list-all-zones"]).await?;
    Ok(read(&listed))
}

fn read(listed: &str) -> Vec<Rule> {
    let mut zone = "";
    let mut seen = BTreeSet::new();
    let mut rules = vec![];
    for line in listed.lines() {
        if !line.starts_with(char::is_whitespace) {
            zone = line.split_whitespace().next().unwrap_or_default();
        }
        let text = line.trim();
        let own = text.starts_with(&format!("rule priority=\"{PRIORITY}\" ")) && text.ends_with(" accept");
        let value = |name: &str| text.split_once(&format!(" {name}=\""))?.1.split('"').next();
        let ends = || {
            let sources = value("source address")?.parse().ok()?;
            Some((value("destination address")?.parse().ok()?, sources, value("port port")?.parse().ok()?))
        };
        let protocol = if value("protocol") == Some("udp") { Protocol::Udp } else { Protocol::Tcp };
        if let Some((gateway, sources, port)) = ends().filter(|_| own)
            && seen.insert((zone, text))
        {
            rules.push(Rule {
                zone: zone.to_owned(),
                text: text.to_owned(),
                gateway,
                sources,
                protocol,
                port,
            });
        }
    }
    rules
}

/// Returns a rich rule, in the order in which firewalld prints it.
fn text(opening: &Opening) -> String {
    let Opening { gateway, sources, protocol, port, .. } = opening;
    let protocol = protocol.name();
    let family = if gateway.is_ipv4() { "ipv4" } else { "ipv6" };
    format!(
        "rule priority=\"{PRIORITY}\" family=\"{family}\" source address=\"{sources}\" destination \
         address=\"{gateway}\" port port=\"{port}\" protocol=\"{protocol}\" accept"
    )
}

impl Rule {
    fn is_for(&self, opening: &Opening) -> bool {
        let of_rule = (self.gateway, self.sources, self.protocol, self.port);
        of_rule == (opening.gateway, opening.sources, opening.protocol, opening.port)
    }

    async fn remove(&self) -> Result<(), Problem> {
        let Self { zone, text, .. } = self;
        run(PROGRAM, &[&format!("--zone={zone}"), &format!("--remove-rich-rule={text}")]).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_rules_are_told_from_others_by_their_priority() {
        let gateway = "10.7.0.1".parse().unwrap();
        let own = text(&Opening::new("br0", (gateway, 24), gateway, Protocol::Tcp, 5432));
        assert_eq!(
            own,
            "rule priority=\"-21093\" family=\"ipv4\" source address=\"10.7.0.0/24\" destination \
             address=\"10.7.0.1\" port port=\"5432\" protocol=\"tcp\" accept"
        );
        let others = own.replace("-21093", "-2109");
        let listed = format!(
            "docker\n  target: ACCEPT\n  rich rules: \n\npublic (default, active)\n  target: default\n  rich \
             rules: \n\
             \t{others}\n\t{own}\n\ntrusted\n  rich rules: \n\t{own}\n"
        );
        let zones: Vec<_> = read(&listed).into_iter().map(|rule| (rule.zone, rule.port)).collect();
        assert_eq!(zones, [("public".to_owned(), 5432), ("trusted".to_owned(), 5432)]);
    }
}

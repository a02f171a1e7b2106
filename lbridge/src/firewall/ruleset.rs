//! Ruleset: nftables' rules as `nft -j` prints them, and iptables' own if its tables are in use. Covers
//! everything on the input hook that may deny, and lbridge's own accept rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
};

use anyhow::anyhow;
use ipnet::IpNet;
use nftables::{
    batch::Batch,
    expr::{Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix},
    schema::{NfCmd, NfListObject, Rule},
    stmt::{Match, Operator, Statement},
    types::{NfChainPolicy, NfChainType, NfFamily, NfHook},
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    everybody, firewalld,
    iptables::{Listed, Variant},
    tool::{Problem, run, run_with},
};
use crate::planning::{
    firewall::{
        Accepted, Backend, COMMENT, Chain, Denial, Family, FirewallKind, InputChain, Opening, ProbeRoute,
    },
    rule::Protocol,
};

/// Arguments that list the ruleset without counters (`-s`) and without the elements of sets (`-t`): they
/// change all the time, and may be a million.
const LIST: [&str; 5] = ["-j", "-s", "-t", "list", "ruleset"];
/// Name of nftables' program.
const NFT: &str = "nft";
/// Name of firewalld's own table.
const FIREWALLD: &str = "firewalld";
/// The filter table of iptables, and its input chain.
const FILTER: (&str, &str) = ("filter", "INPUT");

/// Chains that could not be read, and why.
#[derive(Debug)]
pub(super) struct Unread {
    /// Tools that these chains are changed through.
    pub(super) backend: &'static [Backend],
    /// Reason why they could not be read.
    pub(super) problem: Problem,
}

/// The rules that were read.
#[derive(Debug, Default)]
pub(super) struct Ruleset {
    /// Input chains that may deny, the likeliest first.
    pub(super) chains: Vec<InputChain>,
    /// Accept rules that are lbridge's own.
    pub(super) accepts: BTreeMap<(Chain, Opening), Accepted>,
    /// Hash of everybody else's rules that a packet on the input hook may meet. While it stays the same, so
    /// does what passes.
    pub(super) others: u64,
}

impl Ruleset {
    /// Reads all of it. Also returns the chains that could not be read, and why.
    pub(super) async fn read(openings: &BTreeMap<Opening, ProbeRoute>) -> (Self, Vec<Unread>) {
        let mut ruleset = Self::default();
        let mut problems = vec![];
        let unread = |backend, problem| Unread { backend, problem };
        match list().await {
            Ok(tables) => {
                for variant in Variant::both(Backend::IptablesNft) {
                    let family = variant.family();
                    let own = if tables.chains.contains_key(&key(family, FILTER.0, FILTER.1)) {
                        variant.list().await.unwrap_or_else(|problem| {
                            problems.push(unread(&[Backend::IptablesNft], problem));
                            Listed::default()
                        })
                    } else {
                        Listed::default()
                    };
                    ruleset.accepts.extend(own.accepts);
                }
                ruleset.take_nftables(&tables);
                if let Some(chain) =
                    ruleset.chains.iter().find(|chain| chain.chain.backend == Backend::Firewalld)
                {
                    match firewalld::list(&chain.chain, openings).await {
                        Ok(accepts) => ruleset.accepts.extend(accepts),
                        Err(problem) => problems.push(unread(&[Backend::Firewalld], problem)),
                    }
                }
            }
            // Without `nft` there may still be the program that most firewalls use.
            Err(missing @ Problem::Missing(_)) => {
                problems.push(unread(&[Backend::Nft, Backend::Firewalld], missing));
                for variant in Variant::both(Backend::IptablesNft) {
                    let problem = ruleset.take_iptables(variant).await.err();
                    problems.extend(problem.map(|problem| unread(&[Backend::IptablesNft], problem)));
                }
            }
            Err(failed) => {
                let hidden = &[Backend::Nft, Backend::Firewalld, Backend::IptablesNft];
                problems.push(unread(hidden, failed));
            }
        }
        for variant in Variant::both(Backend::IptablesLegacy) {
            if variant.is_in_use() {
                let problem = ruleset.take_iptables(variant).await.err();
                problems.extend(problem.map(|problem| unread(&[Backend::IptablesLegacy], problem)));
            }
        }
        ruleset.chains.sort_by_key(|chain| chain.denial);
        (ruleset, problems)
    }

    async fn take_iptables(&mut self, variant: Variant) -> Result<(), Problem> {
        let Listed { accepts, chain, others } = variant.list().await?;
        self.accepts.extend(accepts);
        self.chains.extend(chain);
        for line in others {
            self.note(&line);
        }
        Ok(())
    }

    fn note(&mut self, text: &str) {
        let mut hasher = DefaultHasher::new();
        (self.others, text).hash(&mut hasher);
        self.others = hasher.finish();
    }

    fn take_nftables(&mut self, tables: &Tables) {
        for ((family, table, name), chain) in &tables.chains {
            let Some(policy) = chain.on_input else { continue };
            let backend = match (table.as_str(), name.as_str()) {
                FILTER if *family != Family::Inet => Backend::IptablesNft,
                (FIREWALLD, _) if tables.owned.contains(&(*family, table.clone())) => Backend::Firewalld,
                _ => Backend::Nft,
            };
            let this = Chain { backend, family: *family, table: table.clone(), name: name.clone() };
            let mut ours_only = true;
            let mut own = BTreeSet::new();
            for rule in &chain.rules {
                match &rule.opening {
                    Some(opening) if backend == Backend::Nft => {
                        let accepted = self
                            .accepts
                            .entry((this.clone(), opening.clone()))
                            .or_insert(Accepted { copies: 0, first: ours_only });
                        accepted.copies += 1;
                        own.insert(rule.handle);
                    }
                    // nft does not print its comment, but iptables does.
                    Some(opening) if self.accepts.contains_key(&(this.clone(), opening.clone())) => {
                        own.insert(rule.handle);
                    }
                    _ => ours_only = false,
                }
            }
            let reached = tables.reached_from(*family, table, name);
            let others = reached.iter().flat_map(|chain| chain.rules.iter().map(move |rule| (chain, rule)));
            let others: Vec<_> = others.filter(|(_, rule)| !own.contains(&rule.handle)).collect();
            let denial = if policy == NfChainPolicy::Drop {
                Some(Denial::Policy)
            } else {
                others.iter().any(|(_, rule)| rule.denies).then_some(Denial::Rule)
            };
            self.note(&format!("{family} {table} {name} {policy:?}"));
            for (_, rule) in others {
                self.note(&rule.text);
            }
            let ufw = |chain: &&str| chain.starts_with("ufw-") || chain.starts_with("ufw6-");
            let firewall = match backend {
                _ if table == FIREWALLD => FirewallKind::Firewalld,
                Backend::Nft => FirewallKind::Nftables,
                _ if tables.names_in(*family, table).any(|name| ufw(&name)) => FirewallKind::Ufw,
                _ => FirewallKind::Iptables,
            };
            self.chains.extend(denial.map(|denial| InputChain { chain: this, denial, firewall }));
        }
    }
}

/// Key of a chain: family, name of the table, name of the chain.
type ChainKey = (Family, String, String);

fn key(family: Family, table: &str, chain: &str) -> ChainKey {
    (family, table.to_owned(), chain.to_owned())
}

/// nftables' tables of the families that carry IP.
#[derive(Debug, Default)]
struct Tables {
    chains: BTreeMap<ChainKey, ChainView>,
    /// Tables with an owner (`flags owner`): nobody else can change them.
    owned: BTreeSet<(Family, String)>,
}

#[derive(Debug, Default)]
struct ChainView {
    /// Policy of a filtering base chain on the input hook; `None` for any other chain.
    on_input: Option<NfChainPolicy>,
    rules: Vec<RuleView>,
}

#[derive(Debug)]
struct RuleView {
    handle: u32,
    /// The opening that the rule accepts, if it has the shape of one of lbridge's.
    opening: Option<Opening>,
    /// True if the rule may drop or reject.
    denies: bool,
    /// Names of the chains that the rule may go to.
    targets: Vec<String>,
    /// Text of the rule as printed, without its handle, which differs from kernel to kernel.
    text: String,
}

impl Tables {
    fn names_in<'a>(&'a self, family: Family, table: &'a str) -> impl Iterator<Item = &'a str> {
        self.chains.keys().filter(move |key| key.0 == family && key.1 == table).map(|key| key.2.as_str())
    }

    /// Lists a chain and those that it may jump to.
    fn reached_from(&self, family: Family, table: &str, chain: &str) -> Vec<&ChainView> {
        let (mut reached, mut names) = (vec![], vec![chain.to_owned()]);
        let mut known = BTreeSet::from([chain.to_owned()]);
        while let Some(name) = names.pop() {
            let Some(view) = self.chains.get(&key(family, table, &name)) else { continue };
            reached.push(view);
            let targets = view.rules.iter().flat_map(|rule| &rule.targets);
            names.extend(targets.filter(|target| known.insert((*target).clone())).cloned());
        }
        reached
    }
}

/// The output of `nft -j`. Each object is parsed on its own, so that one which the crate does not know costs
/// no other.
#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Value>,
}

async fn list() -> Result<Tables, Problem> {
    let text = run(NFT, &LIST).await?;
    let listing = serde_json::from_str::<Listing>(&text);
    let listing = listing.map_err(|error| Problem::Failed(anyhow!(error).context("what nft -j prints")))?;
    let mut tables = Tables::default();
    for object in listing.nftables {
        tables.take(object);
    }
    Ok(tables)
}

impl Tables {
    fn take(&mut self, object: Value) {
        if let Some(table) = object.get("table") {
            let is_owned = match table.get("flags") {
                Some(Value::Array(flags)) => flags.iter().any(|flag| flag == "owner"),
                Some(flag) => flag == "owner",
                None => false,
            };
            let Ok(NfListObject::Table(table)) = serde_json::from_value(object) else { return };
            if let Some(family) = family_of(table.family).filter(|_| is_owned) {
                self.owned.insert((family, table.name.into_owned()));
            }
        } else if object.get("chain").is_some() {
            let Ok(NfListObject::Chain(chain)) = serde_json::from_value(object) else { return };
            let Some(family) = family_of(chain.family) else { return };
            let filters = chain.hook == Some(NfHook::Input) && chain._type == Some(NfChainType::Filter);
            let view = self.chains.entry(key(family, &chain.table, &chain.name)).or_default();
            view.on_input = filters.then(|| chain.policy.unwrap_or(NfChainPolicy::Accept));
        } else if let Some(rule) = object.get("rule") {
            let text = |field: &str| rule.get(field).and_then(Value::as_str).unwrap_or_default();
            let family = serde_json::from_value(rule.get("family").cloned().unwrap_or_default());
            let Some(family) = family.ok().and_then(family_of) else { return };
            let expressions = rule.get("expr").unwrap_or(&Value::Null);
            let handle =
                rule.get("handle").and_then(Value::as_u64).and_then(|handle| u32::try_from(handle).ok());
            let mut view = RuleView {
                handle: handle.unwrap_or_default(),
                opening: None,
                denies: false,
                targets: vec![],
                text: format!("{} {} {expressions}", text("table"), text("chain")),
            };
            view.look_through(expressions);
            let in_chain = key(family, text("table"), text("chain"));
            let iptables = (text("table"), text("chain")) == FILTER && family != Family::Inet;
            let marked = text("comment") == COMMENT || iptables;
            view.opening =
                serde_json::from_value(object).ok().filter(|_| marked).and_then(|rule| opening(&rule));
            self.chains.entry(in_chain).or_default().rules.push(view);
        }
    }
}

impl RuleView {
    /// Finds verdicts wherever they are, in verdict maps and in statements that the crate does not know.
    fn look_through(&mut self, value: &Value) {
        match value {
            Value::Array(values) => values.iter().for_each(|value| self.look_through(value)),
            Value::Object(fields) => {
                for (name, value) in fields {
                    match name.as_str() {
                        "drop" | "reject" => self.denies = true,
                        // A map by name, whose elements are not listed.
                        "vmap" if value.get("data").is_some_and(Value::is_string) => self.denies = true,
                        "jump" | "goto" => {
                            let target = value.get("target").and_then(Value::as_str);
                            self.targets.extend(target.map(str::to_owned));
                        }
                        _ => {}
                    }
                    self.look_through(value);
                }
            }
            _ => {}
        }
    }
}

fn family_of(family: NfFamily) -> Option<Family> {
    match family {
        NfFamily::IP => Some(Family::Ip),
        NfFamily::IP6 => Some(Family::Ip6),
        NfFamily::INet => Some(Family::Inet),
        NfFamily::ARP | NfFamily::Bridge | NfFamily::NetDev => None,
    }
}

/// Puts a rule first, and removes its older copies, at once.
pub(super) async fn accept(chain: &Chain, opening: &Opening) -> anyhow::Result<()> {
    let mut batch = Batch::new();
    let rule = Rule {
        expr: statements(opening, OwnName::of(opening)).into(),
        comment: Some(COMMENT.into()),
        ..rule_in(chain)
    };
    batch.add_cmd(NfCmd::Insert(NfListObject::Rule(rule)));
    apply(chain, opening, batch).await
}

/// Removes a rule and all its copies.
pub(super) async fn remove(chain: &Chain, opening: &Opening) -> anyhow::Result<()> {
    apply(chain, opening, Batch::new()).await
}

/// Adds the removal of every copy that is there now to the batch, and applies it.
async fn apply(chain: &Chain, opening: &Opening, mut batch: Batch<'static>) -> anyhow::Result<()> {
    let tables = list().await?;
    let rules = tables.chains.get(&key(chain.family, &chain.table, &chain.name)).map(|chain| &chain.rules);
    let copies = rules.into_iter().flatten().filter(|rule| rule.opening.as_ref() == Some(opening));
    for copy in copies {
        batch.delete(NfListObject::Rule(Rule { handle: Some(copy.handle), ..rule_in(chain) }));
    }
    let commands = batch.to_nftables();
    run_with(NFT, &["-j", "-f", "-"], &serde_json::to_string(&commands)?).await?;
    Ok(())
}

fn rule_in(chain: &Chain) -> Rule<'static> {
    let family = match chain.family {
        Family::Ip => NfFamily::IP,
        Family::Ip6 => NfFamily::IP6,
        Family::Inet => NfFamily::INet,
    };
    Rule { family, table: chain.table.clone().into(), chain: chain.name.clone().into(), ..Rule::default() }
}

/// A rule's treatment of datagrams with the gateway itself as their source, where these [can be
/// forged](Opening::can_be_forged).
#[derive(Clone, Copy, PartialEq, Eq)]
enum OwnName {
    /// The rule does not let them in.
    Refused,
    /// The rule does not mention them, or does so in iptables' own way, which nft does not print.
    Unsaid,
}

impl OwnName {
    fn of(opening: &Opening) -> Self {
        if opening.can_be_forged() { Self::Refused } else { Self::Unsaid }
    }
}

/// Returns `iifname … ip saddr … ip daddr … tcp dport … accept`, or the same with `udp`.
fn statements(opening: &Opening, own_name: OwnName) -> Vec<Statement<'static>> {
    let equals = |left: NamedExpression<'static>, right: Expression<'static>| {
        Statement::Match(Match { left: Expression::Named(left), right, op: Operator::EQ })
    };
    let field = |protocol: &'static str, field: &'static str| {
        NamedExpression::Payload(Payload::PayloadField(PayloadField {
            protocol: protocol.into(),
            field: field.into(),
        }))
    };
    let ip = if opening.gateway.is_ipv4() { "ip" } else { "ip6" };
    let mut statements = vec![equals(
        NamedExpression::Meta(Meta { key: MetaKey::Iifname }),
        Expression::String(opening.interface.clone().into()),
    )];
    if opening.sources.prefix_len() > 0 {
        statements.push(equals(field(ip, "saddr"), sources(opening.sources)));
        if own_name == OwnName::Refused {
            statements.push(Statement::Match(Match {
                left: Expression::Named(field(ip, "saddr")),
                right: Expression::String(opening.gateway.to_string().into()),
                op: Operator::NEQ,
            }));
        }
    }
    statements.extend([
        equals(field(ip, "daddr"), Expression::String(opening.gateway.to_string().into())),
        equals(field(opening.protocol.name(), "dport"), Expression::Number(opening.port.into())),
        Statement::Accept(None),
    ]);
    statements
}

/// Returns a rule's sources as nft prints them: a single address without its length.
fn sources(net: IpNet) -> Expression<'static> {
    let addr = Expression::String(net.addr().to_string().into());
    if net.prefix_len() == net.max_prefix_len() {
        return addr;
    }
    Expression::Named(NamedExpression::Prefix(Prefix { addr: Box::new(addr), len: net.prefix_len().into() }))
}

/// Returns what a rule lets through, if it has the shape of one of lbridge's. iptables adds a counter and its
/// comment.
fn opening(object: &NfListObject<'_>) -> Option<Opening> {
    let NfListObject::Rule(rule) = object else { return None };
    let matters = |statement: &&Statement<'_>| !matches!(statement, Statement::XT(_) | Statement::Counter(_));
    let shape: Vec<_> = rule.expr.iter().filter(matters).cloned().collect();
    let rights: Vec<_> = shape
        .iter()
        .filter_map(
            |statement| if let Statement::Match(found) = statement { Some(&found.right) } else { None },
        )
        .collect();
    let (interface, from, gateway, port) = match rights[..] {
        [Expression::String(interface), Expression::String(gateway), Expression::Number(port)] => {
            (interface, None, gateway, port)
        }
        [Expression::String(interface), from, Expression::String(gateway), Expression::Number(port)]
        | [Expression::String(interface), from, _, Expression::String(gateway), Expression::Number(port)] => {
            (interface, Some(from), gateway, port)
        }
        _ => return None,
    };
    let (gateway, port) = (gateway.parse().ok()?, u16::try_from(*port).ok()?);
    let sources = match from {
        None => everybody(gateway),
        Some(Expression::String(ip)) => ip.parse::<IpAddr>().ok()?.into(),
        Some(Expression::Named(NamedExpression::Prefix(Prefix { addr, len }))) => {
            let Expression::String(ip) = &**addr else { return None };
            IpNet::new(ip.parse().ok()?, u8::try_from(*len).ok()?).ok()?
        }
        Some(_) => return None,
    };
    let is_shape = |opening: &Opening| {
        [OwnName::of(opening), OwnName::Unsaid].iter().any(|own_name| statements(opening, *own_name) == shape)
    };
    let of =
        |protocol| Opening { interface: interface.clone().into_owned(), gateway, sources, protocol, port };
    [Protocol::Tcp, Protocol::Udp].into_iter().map(of).find(is_shape)
}

//! Explain: gathers the facts that [`crate::planning::explain`] needs in addition to one observation of the
//! host.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    api::protocol::ListenerUser,
    host::{
        holders, listeners,
        netns::{self, process_start},
        users::Users,
    },
    planning::{
        explain::{Known, Question, listeners_of_interest},
        inventory::{Inventory, Listener, NamespaceId},
        owner::is_regular,
        rule::{Network, Origin, PortSpec, Rule, Rules},
    },
};

/// Limit on the listeners whose process is looked up, since each lookup walks through /proc.
const MAX_HOLDERS: usize = 8;

/// Returns the rules, plus one for `network` if there is none, so that an observation covers it, too.
pub(super) fn with_network(rules: &Rules, network: &Network) -> Rules {
    if rules.iter().any(|(id, ..)| id.network == *network) {
        return rules.clone();
    }
    let process = match network {
        Network::Process(pid) => process_start(*pid).ok(),
        _ => None,
    };
    let rule = Rule { process, ..Rule::new(network.clone(), PortSpec::same(1)) };
    // There is nothing to observe of a process that does not exist.
    rules.allow([rule], Origin::Cli).unwrap_or_else(|_| rules.clone())
}

/// Lists the listeners inside the network's namespace; empty if it is no namespace or cannot be entered.
pub(super) fn inside(inventory: &Inventory, network: &Network, host: NamespaceId) -> Vec<Listener> {
    let Some(Ok(namespace)) = inventory.namespaces.get(network) else { return vec![] };
    let entered = netns::Namespace::open(&namespace.key.entrance, host).ok();
    let listening = entered.and_then(|namespace| namespace.within(listeners::tcp).ok()?.ok());
    listening.unwrap_or_default()
}

/// Names the processes of the listeners that an explanation may mention, by socket inode. Adds the user where
/// the listener's owner is a person.
pub(super) async fn holders(
    question: &Question,
    known: &Known<'_>,
    users: &mut Users,
) -> BTreeMap<u64, String> {
    let inodes: BTreeSet<_> = listeners_of_interest(question, known).into_iter().take(MAX_HOLDERS).collect();
    let sockets = known.inventory.sockets(question.protocol).iter().chain(known.inside);
    let people: BTreeMap<_, _> = sockets
        .filter(|socket| inodes.contains(&socket.inode) && is_regular(socket.uid))
        .map(|socket| (socket.inode, socket.uid))
        .collect();
    users.look_too(&people.values().copied().collect()).await;
    let named = |inode| {
        let holder = holders::holder(inode);
        let Some(uid) = people.get(&inode).copied() else { return holder };
        let user = ListenerUser { uid, name: users.name(uid).map(str::to_owned) };
        Some(format!("{} of {user}", holder.unwrap_or_else(|| "a service".to_owned())))
    };
    inodes.into_iter().filter_map(|inode| Some((inode, named(inode)?))).collect()
}

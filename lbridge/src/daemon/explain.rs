//! What [`crate::planning::explain`] needs beside one look at the host.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    api::protocol::ListenerUser,
    host::{
        listeners,
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

/// Finding a listener's process is a walk through /proc; more are not looked for.
const MAX_HOLDERS: usize = 8;

/// The rules, and one for `network` if there is none, so that a look at the host looks for it, too.
pub(super) fn with_network(rules: &Rules, network: &Network) -> Rules {
    if rules.iter().any(|(id, ..)| id.network == *network) {
        return rules.clone();
    }
    let process = match network {
        Network::Process(pid) => process_start(*pid).ok(),
        _ => None,
    };
    let rule = Rule { process, ..Rule::new(network.clone(), PortSpec::same(1)) };
    // Of a process that there is not, nothing can be looked at.
    rules.allow([rule], Origin::Cli).unwrap_or_else(|_| rules.clone())
}

/// What listens inside the network's namespace, if it is one and can be entered.
pub(super) fn inside(inventory: &Inventory, network: &Network, host: NamespaceId) -> Vec<Listener> {
    let Some(Ok(namespace)) = inventory.namespaces.get(network) else { return vec![] };
    let entered = netns::Namespace::open(&namespace.key.entrance, host).ok();
    let listening = entered.and_then(|namespace| namespace.within(listeners::tcp).ok()?.ok());
    listening.unwrap_or_default()
}

/// The processes of the listeners that an explanation may name, with the users of those that are people's.
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
        let holder = listeners::holder(inode);
        let Some(uid) = people.get(&inode).copied() else { return holder };
        let user = ListenerUser { uid, name: users.name(uid).map(str::to_owned) };
        Some(format!("{} of {user}", holder.unwrap_or_else(|| "a service".to_owned())))
    };
    inodes.into_iter().filter_map(|inode| Some((inode, named(inode)?))).collect()
}

//! What a name that means nothing may have meant.

use super::inventory::{DockerNetwork, Inventory};

/// Names less alike than this were not meant.
const ALIKE: f64 = 0.7;
/// More are no help.
const MAX_HINTS: usize = 2;

/// To be appended to what is said of a Docker network that there is not; empty where nothing comes to mind.
pub(super) fn unknown_network(name: &str, inventory: &Inventory) -> String {
    if let Some(networks) = inventory.containers.get(name) {
        let on = match &networks[..] {
            [] => String::new(),
            networks => format!(", or for its network {}", networks.join(" or ")),
        };
        return format!("; {name} is a container: allow the port for container:{name}{on}");
    }
    if inventory.interface(name).is_some_and(|interface| interface.is_bridge) {
        let on = inventory.docker_networks.iter().find(|network| network.bridge.as_deref() == Some(name));
        let of_docker = on.map_or_else(String::new, |network| format!("its network {}, or ", network.name));
        return format!("; did you mean {of_docker}bridge:{name}?");
    }
    let similar = similar(name, &inventory.docker_networks);
    if similar.is_empty() { String::new() } else { format!("; did you mean {}?", similar.join(" or ")) }
}

/// The most similar first. What Compose puts before a network's name, `PROJECT_`, is easily left out.
fn similar<'a>(name: &str, networks: &'a [DockerNetwork]) -> Vec<&'a str> {
    let wanted = name.to_lowercase();
    let likeness = |network: &DockerNetwork| {
        let there = network.name.to_lowercase();
        let of_project = there.strip_suffix(&wanted).is_some_and(|project| project.ends_with('_'));
        if of_project { 1.0 } else { strsim::normalized_damerau_levenshtein(&wanted, &there) }
    };
    let mut alike: Vec<_> = networks.iter().map(|network| (likeness(network), &*network.name)).collect();
    alike.retain(|(likeness, name)| *likeness >= ALIKE && !["host", "none"].contains(name));
    alike.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    alike.into_iter().map(|(_, name)| name).take(MAX_HINTS).collect()
}

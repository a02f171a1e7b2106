//! Hints: what a name that matches nothing may have meant.

use super::inventory::Inventory;

/// Least likeness (0 to 1) of a name that may have been meant.
const ALIKE: f64 = 0.7;
/// Most names in a hint. More are no help.
const MAX_HINTS: usize = 2;

/// Returns a hint to append to the error about a Docker network that does not exist; empty if no name is
/// similar.
pub(super) fn unknown_network(name: &str, inventory: &Inventory) -> String {
    if let Some(Ok(container)) = inventory.containers.get(name) {
        let networks: Vec<_> = container.attachments.iter().map(|there| there.network.as_str()).collect();
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
    // Compose puts `PROJECT_` before a network's name, which is easily left out.
    let of_project =
        |there: &str, wanted: &str| there.strip_suffix(wanted).is_some_and(|project| project.ends_with('_'));
    let networks = inventory.docker_networks.iter().map(|network| network.name.as_str());
    did_you_mean(name, networks.filter(|name| !["host", "none"].contains(name)), of_project)
}

/// Returns a hint to append to the error about a container that does not exist; empty if no name is similar.
pub(super) fn unknown_container(name: &str, inventory: &Inventory) -> String {
    // Compose writes PROJECT-SERVICE-NUMBER, and once wrote PROJECT_SERVICE_NUMBER.
    let of_project = |there: &str, wanted: &str| {
        let parts: Vec<_> = there.split(['-', '_']).collect();
        let is_number = |part: &&str| part.bytes().all(|b| b.is_ascii_digit());
        let service = match parts.split_last() {
            Some((last, service)) if is_number(last) => service,
            _ => &parts[..],
        };
        let wanted: Vec<_> = wanted.split(['-', '_']).collect();
        service.len() > wanted.len() && service.ends_with(&wanted)
    };
    did_you_mean(name, inventory.container_names.iter().map(String::as_str), of_project)
}

fn did_you_mean<'a>(
    name: &str,
    names: impl Iterator<Item = &'a str>,
    of_project: impl Fn(&str, &str) -> bool,
) -> String {
    let similar = similar(name, names, of_project);
    if similar.is_empty() { String::new() } else { format!("; did you mean {}?", similar.join(" or ")) }
}

/// Returns at most [`MAX_HINTS`] similar names, the most similar first.
fn similar<'a>(
    name: &str,
    names: impl Iterator<Item = &'a str>,
    of_project: impl Fn(&str, &str) -> bool,
) -> Vec<&'a str> {
    let wanted = name.to_lowercase();
    let likeness = |there: &str| {
        let there = there.to_lowercase();
        if of_project(&there, &wanted) {
            1.0
        } else {
            strsim::normalized_damerau_levenshtein(&wanted, &there)
        }
    };
    let mut alike: Vec<_> = names.map(|name| (likeness(name), name)).collect();
    alike.retain(|(likeness, _)| *likeness >= ALIKE);
    alike.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    alike.into_iter().map(|(_, name)| name).take(MAX_HINTS).collect()
}

//! docker: checks the Docker Engine, and containers that know the host by an address that their rules do not
//! serve.

use std::collections::BTreeMap;

use super::{Finding, Host, Level, listed, quoted};
use crate::{
    api::protocol::{DockerStatus, Status},
    docker::{
        self,
        client::{self, EngineInfo},
    },
    planning::{
        desired::State,
        inventory::{DEFAULT_NETWORK, EngineKind, find_networks},
        labels::{ALLOW, Labelled},
        rule::Network,
    },
};

/// Checks whether the engine answers.
pub(super) async fn engine(host: &Host, status: Option<&Status>) -> (Option<EngineInfo>, Vec<Finding>) {
    const CHECK: &str = "docker";
    let followed = status.map(|status| &status.docker);
    if followed == Some(&DockerStatus::Off) {
        return (None, vec![Finding::ok(CHECK, "Docker is not followed (--no-docker)")]);
    }
    let needed =
        host.rules.iter().any(|rule| matches!(rule.network, Network::Docker(_) | Network::Container(_)));
    let engine = match client::engine().await {
        Ok(engine) => engine,
        Err(error) => {
            let finding = match (&followed, nix::unistd::geteuid().is_root()) {
                (Some(DockerStatus::Reachable { engine, version }), true) => {
                    let what = format!(
                        "no answer from {}, though {engine} {version} answers the daemon",
                        docker::address()
                    );
                    Finding::new(CHECK, Level::Note, what)
                        .because("DOCKER_HOST may differ here from the daemon's.")
                }
                (Some(DockerStatus::Reachable { engine, version }), false) => {
                    Finding::ok(CHECK, format!("{engine} {version} answers the daemon"))
                }
                // A user who may not ask the engine may not ask the daemon either, and knows of no rule.
                (None, false) => Finding::needs_root(CHECK, "Docker"),
                _ => {
                    let level = if needed { Level::Problem } else { Level::Note };
                    let address = docker::address();
                    let what = format!("no engine at {address}: {error:#}");
                    let why = if needed {
                        "Rules in force stay in force, but do not follow changes of networks and containers."
                    } else {
                        "No rule needs one."
                    };
                    let finding = Finding::new(CHECK, level, what).because(why);
                    let unit = if address.contains("podman") { "podman.socket" } else { "docker.service" };
                    if needed { finding.type_this([format!("systemctl start {unit}")]) } else { finding }
                }
            };
            return (None, vec![finding]);
        }
    };
    let mut bridges = engine.networks.iter().filter_map(|network| network.bridge.as_ref()).peekable();
    // Podman creates a bridge only with its first container.
    let none = engine.product == EngineKind::Docker
        && bridges.peek().is_some()
        && !bridges.any(|bridge| host.interfaces.iter().any(|interface| interface.name == *bridge));
    let what = format!("{} {} answers at {}", engine.product, engine.version, docker::address());
    let finding = if engine.rootless || none {
        let kind = if engine.rootless { "it is rootless" } else { "none of its bridges is on this host" };
        Finding::new(CHECK, Level::Warning, format!("{what}, but {kind}"))
            .because("A rule for one of its networks has no bridge; allow its containers by name instead.")
            .type_this(["lbridge allow container:NAME PORT"])
    } else {
        Finding::ok(CHECK, what)
    };
    (Some(engine), vec![finding])
}

/// Reports labels that the daemon does not read.
pub(super) async fn unread_labels(status: Option<&Status>) -> Option<Finding> {
    let unread = status.is_some_and(|status| !status.labels.enabled);
    let labelled = if unread { client::labelled().await.ok()? } else { vec![] };
    if labelled.is_empty() {
        return None;
    }
    let told: Vec<_> = labelled.iter().map(Labelled::told).collect();
    let what = format!("labels are not read, and {ALLOW} is a label of {}", listed(&told));
    let why =
        "To read them, set labels = true in lbridge.toml, and label_ports = [...] to what they may open.";
    Some(Finding::new("labels", Level::Note, what).because(why).type_this(["lbridge reload"]))
}

/// Returns true if a rule also serves docker0's address.
fn serves_docker0(status: Option<&Status>, network: &Network, port: u16) -> bool {
    // Without a daemon nothing is served anyway.
    let Some(status) = status else { return true };
    let mut rules = status.rules.iter().filter(|rule| rule.network == *network && rule.port == port);
    rules.any(|rule| rule.gateways.iter().any(|g| g.alias.is_some() && g.state != State::Blocked))
}

/// Reports containers that were started with `--add-host host.docker.internal:host-gateway`, and therefore
/// dial docker0's address. That address is served like the gateway, but an internal network has no route to
/// it.
pub(super) async fn guests(host: &Host, status: Option<&Status>) -> Vec<Finding> {
    let Ok(guests) = client::guests().await else { return vec![] };
    let docker0 = host.bridge(&Network::Docker(DEFAULT_NETWORK.to_owned()));
    let docker0 = docker0.and_then(|bridge| bridge.addresses.first()).map(|(address, _)| address.to_string());
    let docker0 = docker0.unwrap_or_else(|| "docker0's address".to_owned());
    // By network: its ports and the containers.
    let mut misled: BTreeMap<&str, (Vec<String>, Vec<String>, &str)> = BTreeMap::new();
    for rule in &host.rules {
        let Network::Docker(name) = &rule.network else { continue };
        let [network] = find_networks(&host.networks, name)[..] else { continue };
        if network.name == DEFAULT_NETWORK {
            continue;
        }
        let served = serves_docker0(status, &rule.network, rule.spec.port);
        let misled_there = |guest: &&client::HostNameUser| {
            guest.networks.contains(&network.name) && !(guest.has_way_out && served)
        };
        for guest in guests.iter().filter(misled_there) {
            let Some(host_name) = guest.host_names.first() else { continue };
            let (ports, names, _) =
                misled.entry(network.name.as_str()).or_insert_with(|| (vec![], vec![], host_name.as_str()));
            for (list, item) in [(ports, rule.spec.port.to_string()), (names, guest.name.clone())] {
                if !list.contains(&item) {
                    list.push(item);
                }
            }
        }
    }
    let finding = |(network, (ports, names, host_name)): (&str, (Vec<String>, Vec<String>, &str))| {
        let bridge = host.bridge(&Network::Docker(network.to_owned()));
        let gateway = bridge.and_then(|bridge| bridge.addresses.first())?.0;
        let what = format!("containers on {network} resolve {host_name} to {docker0}: {}", listed(&names));
        let why = format!(
            "Rules for {network} (port {}) serve its own gateway, {gateway}; have them dial that.",
            listed(&ports)
        );
        let finding = Finding::new("host-gateway", Level::Warning, what).because(why);
        let (network, host) = (quoted(network), quoted(&format!("{host_name}:{gateway}")));
        Some(finding.type_this([format!("docker run --network {network} --add-host {host} ...")]))
    };
    misled.into_iter().filter_map(finding).collect()
}

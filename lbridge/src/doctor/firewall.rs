//! What keeps packets from lbridge: netfilter's INPUT comes before. [`findings`] is the place for all of it.

use std::path::Path;

use super::{Finding, Host, Level};
use crate::recipes::ufw;

/// UFW's defaults.
const UFW_DEFAULTS: &str = "/etc/default/ufw";

/// Rules whose packets the firewall drops.
pub(super) fn findings(host: &Host) -> Vec<Finding> {
    const CHECK: &str = "firewall";
    let folder = Path::new(ufw::FOLDER);
    if !ufw::drops(folder, Path::new(UFW_DEFAULTS)) {
        return vec![];
    }
    let Ok(allowed) = ufw::allowed(folder) else {
        return vec![Finding::needs_root(CHECK, "whether UFW lets the rules' packets in")];
    };
    let mut findings = vec![];
    for rule in &host.rules {
        let Some(bridge) = host.bridge(&rule.network) else { continue };
        let port = rule.spec.port;
        for (gateway, _) in &bridge.addresses {
            if allowed.iter().any(|allowed| allowed.admits(&bridge.name, *gateway, port)) {
                continue;
            }
            let what = format!("UFW drops what containers of {} send to {gateway} port {port}", rule.network);
            let finding = Finding::new(CHECK, Level::Problem, what);
            findings.push(
                finding
                    .because(
                        "Packets pass the firewall before lbridge sees them: containers meet a time-out.",
                    )
                    .type_this([format!(
                        "ufw allow in on {} to {gateway} port {port} proto tcp",
                        bridge.name
                    )]),
            );
        }
    }
    findings
}

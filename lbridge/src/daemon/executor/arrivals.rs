//! Arrivals: the daemon's own probes of the firewall, as the kernel program sees them.

use std::net::IpAddr;

use lbridge_common::wire::ProberKey;

use crate::{
    firewall,
    kernel::maps::Probes,
    planning::firewall::{Opening, ProbeRoute},
};

/// The daemon's own probes, as the kernel program sees them.
pub(super) struct Arrivals {
    pub(super) probes: Probes,
    /// True if entries name the ingress interface.
    pub(super) checked: bool,
}

impl Arrivals {
    fn prober(&self, source: IpAddr, ifindex: u32) -> ProberKey {
        ProberKey { source: source.into(), ifindex: if self.checked { ifindex } else { 0 } }
    }
}

impl firewall::Arrivals for Arrivals {
    fn begin(&self, source: IpAddr, ifindex: u32) -> anyhow::Result<()> {
        self.probes.add_source(&self.prober(source, ifindex))
    }

    fn end(&self, source: IpAddr, ifindex: u32) {
        if let Err(error) = self.probes.remove_source(&self.prober(source, ifindex)) {
            tracing::warn!(%source, ifindex, error = format!("{error:#}"), "could not stop taking packets as \
                                                                            probes");
        }
    }

    fn count(&self, opening: &Opening, link: ProbeRoute) -> anyhow::Result<()> {
        self.probes.count(&opening.entry(link.ifindex))
    }

    fn any(&self, opening: &Opening, link: ProbeRoute) -> bool {
        self.probes.counted(&opening.entry(link.ifindex)).is_ok_and(|count| count > 0)
    }

    fn forget(&self, opening: &Opening, link: ProbeRoute) {
        if let Err(error) = self.probes.forget(&opening.entry(link.ifindex)) {
            tracing::warn!(
                interface = opening.interface,
                gateway = %opening.gateway,
                port = opening.port,
                protocol = opening.protocol.name(),
                error = format!("{error:#}"),
                "could not stop counting probes"
            );
        }
    }
}

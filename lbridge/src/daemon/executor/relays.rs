//! Relays: opens relays, on a bridge or inside a namespace.

use std::{future::Pending, io, net::SocketAddr, num::NonZeroU32};

use anyhow::{Context as _, anyhow, bail};

use super::Executor;
use crate::{
    host::{
        holders, listeners,
        netns::{LOOPBACK, Namespace},
    },
    planning::{
        desired::{BindScope, RelayKey, RelaySpec},
        inventory::NetnsUnavailable,
    },
    relay::{self, socket::Listening},
};

/// Limit on remembered holders of sockets; above it all are forgotten.
const MAX_HOLDERS: usize = 1024;

impl Executor {
    /// Opens a relay, or changes the specification of one that is open.
    pub(super) fn open_relay(&mut self, key: &RelayKey, spec: &RelaySpec) -> anyhow::Result<()> {
        if !self.relays.change(key, spec) {
            self.begin_relay(key, spec)?;
        }
        let entry = key.entry().filter(|_| spec.by_entry);
        let Some((entry, kernel)) = entry.zip(self.kernel.as_mut()) else { return Ok(()) };
        let socket = self.relays.socket(key).context("the relay has no listening socket")?;
        kernel.maps.put_relay(entry, &socket)
    }

    fn begin_relay(&mut self, key: &RelayKey, spec: &RelaySpec) -> anyhow::Result<()> {
        let inherited = self.inherited.find(key, spec.by_entry, self.host);
        match &key.place {
            BindScope::Bridge { ifindex, .. } => {
                let index = NonZeroU32::new(*ifindex).context("the bridge has no interface index")?;
                let socket = match inherited {
                    Some(socket) => socket,
                    None if spec.by_entry => relay::socket::listen_by_entry(key.address, index)?,
                    None => self.listen(key.address, index)?,
                };
                self.relays.open(key, spec.clone(), socket, None::<Pending<()>>)
            }
            BindScope::Namespace(wanted) => {
                let namespace = match Namespace::open(&wanted.entrance, self.host) {
                    Ok(namespace) if namespace.key == *wanted => namespace,
                    Ok(_) => bail!("the network namespace was replaced in the meantime"),
                    Err(NetnsUnavailable::NotThere(why) | NetnsUnavailable::Unsuitable(why)) => bail!(why),
                };
                let socket = match inherited {
                    Some(socket) => socket,
                    None => namespace.within(|| self.listen(key.address, LOOPBACK))??,
                };
                self.relays.open(key, spec.clone(), socket, Some(namespace.gone()))
            }
        }
    }

    /// Listens in this thread's network namespace. If the port is in use, the error names the process that
    /// holds it.
    fn listen(&mut self, address: SocketAddr, interface: NonZeroU32) -> anyhow::Result<Listening> {
        relay::socket::listen(address, interface).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => match self.who_listens(address) {
                Some(who) => anyhow!("in use by {who}"),
                None => anyhow!("in use: another socket has {address}"),
            },
            _ => anyhow::Error::new(error).context(format!("cannot listen on {address}")),
        })
    }

    /// Finds the process that listens on an address. A port that is taken is tried again at every pass; the
    /// holder of a socket is looked up once.
    fn who_listens(&mut self, address: SocketAddr) -> Option<String> {
        let inode = listeners::in_the_way(address)?;
        if self.holders.len() > MAX_HOLDERS {
            self.holders.clear();
        }
        self.holders.entry(inode).or_insert_with(|| holders::holder(inode)).clone()
    }
}

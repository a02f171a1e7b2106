//! Handover: passes listening sockets from one daemon to the next. A service manager that keeps descriptors
//! (`FileDescriptorStoreMax=`, systemd.service(5)) holds them in between. Connections that arrive meanwhile
//! wait in their backlog; none is refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    num::NonZeroU32,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use rustix::net::sockopt;
use sd_notify::NotifyState;

use crate::{
    host::netns,
    planning::{
        desired::{BindScope, RelayKey},
        inventory::NamespaceId,
    },
    relay::socket::Listening,
};

/// Name of a socket that is bound to the dialled address itself. The names of sockets behind entries begin
/// with it.
const NAME: &str = "relay";
/// Descriptors in one message; the kernel takes 253 (SCM_MAX_FD, include/net/scm.h).
const BATCH: usize = 128;
/// Limit on waiting for the manager to confirm that it has the sockets.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// Listening sockets of the previous daemon that no relay has taken yet, each with its name.
#[derive(Debug, Default)]
pub(super) struct Inherited(Vec<(OwnedFd, String)>);

impl Inherited {
    /// Takes the sockets that the manager has passed on, and has it forget them: a copy that it kept would
    /// keep listening after a `deny`.
    pub(super) fn take() -> Self {
        let passed = sd_notify::listen_fds_with_names().map(Iterator::collect::<Vec<_>>);
        let passed = passed.unwrap_or_else(|error| {
            tracing::warn!(%error, "could not take over the service manager's sockets; opening new ones");
            vec![]
        });
        if passed.is_empty() {
            return Self::default();
        }
        let own: Vec<_> = passed.into_iter().filter(|(_, name)| name.starts_with(NAME)).collect();
        for name in own.iter().map(|(_, name)| name).collect::<BTreeSet<_>>() {
            let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
        }
        // SAFETY: the manager opened these for this process, and nothing else here knows of them: this is
        // called once.
        Self(own.into_iter().map(|(fd, name)| (unsafe { OwnedFd::from_raw_fd(fd) }, name)).collect())
    }

    /// Takes the socket that listens for this relay, if there is one.
    pub(super) fn find(&mut self, key: &RelayKey, by_entry: bool, host: NamespaceId) -> Option<Listening> {
        let wanted = name(key, by_entry);
        let is_it = |(socket, name): &(OwnedFd, String)| {
            *name == wanted && is_at(socket, key, by_entry, host).unwrap_or(false)
        };
        let position = self.0.iter().position(is_it)?;
        Listening::inherited(self.0.swap_remove(position).0.into()).ok()
    }

    /// Closes the sockets that no relay has taken.
    pub(super) fn close(&mut self) {
        self.0.clear();
    }
}

/// Returns the name of a relay's socket. If the kernel's entry leads to the socket, the name contains the
/// dialled address, which the socket's own address does not show.
fn name(key: &RelayKey, by_entry: bool) -> String {
    match key.place {
        BindScope::Bridge { ifindex, .. } if by_entry => {
            // A name has no colons (sd_pid_notify_with_fds(3)).
            let address = lbridge_common::wire::Address::from(key.address.ip());
            let words = address.0.map(|word| format!("{:08x}", u32::from_be(word)));
            format!("{NAME}-{ifindex}-{}-{}", words.concat(), key.address.port())
        }
        _ => NAME.to_owned(),
    }
}

/// Returns true if a socket listens where a relay is to listen. The kernel is asked. For a socket that an
/// entry leads to, it reports everything but the dialled address, which is in the name.
fn is_at(socket: &OwnedFd, key: &RelayKey, by_entry: bool, host: NamespaceId) -> io::Result<bool> {
    let address = std::net::SocketAddr::try_from(rustix::net::getsockname(socket)?)?;
    let hidden = by_entry && matches!(key.place, BindScope::Bridge { .. });
    let fits = if hidden { address.is_ipv4() == key.address.is_ipv4() } else { address == key.address };
    if !sockopt::socket_acceptconn(socket)? || !fits {
        return Ok(false);
    }
    let socket_ref = socket2::SockRef::from(socket);
    let bound = socket_ref.device_index_v4()?;
    let namespace = netns::id_of(&netns_of(socket)?)?;
    Ok(match &key.place {
        BindScope::Bridge { ifindex, .. } => namespace == host && bound == NonZeroU32::new(*ifindex),
        BindScope::Namespace(wanted) => namespace == wanted.id && bound == Some(netns::LOOPBACK),
    })
}

/// Opens the network namespace of a socket.
fn netns_of(socket: &impl AsFd) -> io::Result<OwnedFd> {
    // SIOCGSKNS (include/uapi/linux/sockios.h), which takes no argument and gives a descriptor.
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // SAFETY: the request takes no argument.
    let fd = nix::errno::Errno::result(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS) })?;
    // SAFETY: the kernel has just opened it for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives listening sockets to the service manager, for the daemon that it starts next. If there is no
/// manager, or it keeps nothing, they close with this process.
pub(super) fn keep<'a>(sockets: impl Iterator<Item = (&'a RelayKey, bool, BorrowedFd<'a>)>) {
    let mut named: BTreeMap<String, Vec<BorrowedFd<'_>>> = BTreeMap::new();
    for (key, by_entry, socket) in sockets {
        named.entry(name(key, by_entry)).or_default().push(socket);
    }
    if named.is_empty() || std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    for (name, sockets) in &named {
        for batch in sockets.chunks(BATCH) {
            if let Err(error) =
                sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], batch)
            {
                tracing::warn!(
                    %error,
                    "service manager refused the listening sockets; relays refuse connections until the next \
                     start"
                );
                return;
            }
        }
    }
    if let Err(error) = wait_until_taken() {
        tracing::warn!(%error, "service manager did not confirm the listening sockets");
    }
}

/// Waits until the manager closes its end of a pipe, which it does once it has read everything before it
/// (sd_notify_barrier(3)). Fails after [`CONFIRM_TIMEOUT`].
fn wait_until_taken() -> io::Result<()> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    let limit = PollTimeout::try_from(CONFIRM_TIMEOUT).unwrap_or(PollTimeout::MAX);
    let closed = poll(&mut [PollFd::new(ours.as_fd(), PollFlags::empty())], limit)?;
    if closed == 0 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
}

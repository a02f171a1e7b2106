//! Network namespaces: identifies this process's own ("the host"), and opens and briefly enters others.
//!
//! - `identity`: tells namespaces apart, by their inodes and by their cookies;
//! - `enter`: runs work in another namespace, and makes namespaces;
//! - `find`: opens the namespace of a process or at a path.

mod enter;
mod find;
mod identity;

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use socket2::{Domain, Socket, Type};
use tokio::io::unix::AsyncFd;

use crate::planning::inventory::{NamespaceId, NamespaceKey, NetnsRef, NetnsUnavailable};

pub use enter::{LOOPBACK, throw_away, within};
pub(super) use enter::{cookie_of, on_a_thread, restore_netns};
pub use find::process_start;
pub(super) use find::{Follow, at_path};
pub use identity::id_of;

use find::of_process;
use identity::own_cookie;

/// The interval at which a namespace's path is checked: the kernel does not report the end of a bind mount.
const LOOK: Duration = Duration::from_millis(500);

/// The network namespace of this process.
#[derive(Debug)]
pub struct HostNetns {
    /// The open namespace.
    pub file: File,
    /// The namespace's cookie, never reused (`SO_NETNS_COOKIE`, Linux 5.14 and later); `None` on older
    /// kernels.
    pub cookie: Option<u64>,
    /// The namespace's identity, unique among the namespaces that exist.
    pub id: NamespaceId,
}

impl HostNetns {
    /// Opens this process's network namespace, and reads its cookie and identity.
    pub fn open() -> anyhow::Result<Self> {
        let file = File::open("/proc/self/ns/net").context("cannot open this process's network namespace")?;
        let cookie = own_cookie()?;
        let id = id_of(&file)?;
        Ok(Self { file, cookie, id })
    }
}

/// Another network namespace. It is held open and exists at least as long as this value, so do not keep the
/// value.
#[derive(Debug)]
pub struct Namespace {
    file: OwnedFd,
    /// A pidfd of the process that is its entrance; `None` if the entrance is a path.
    process: Option<OwnedFd>,
    /// The rule by which its path was followed, if it has one.
    follow: Follow,
    /// The namespace's identity and entrance.
    pub key: NamespaceKey,
}

impl Namespace {
    /// Opens the namespace at an entrance. `host` is this process's own namespace, which is refused: there is
    /// nothing to relay into. Follows no path that anybody but root and this process's user can change
    /// ([`trusted::open_fixed`](super::trusted::open_fixed)).
    pub fn open(entrance: &NetnsRef, host: NamespaceId) -> Result<Self, NetnsUnavailable> {
        Self::open_by(entrance, host, Follow::Trusted)
    }

    /// Opens the namespace at a path, whoever can change that path. For commands whose user has just named
    /// it; the daemon, which follows a path for as long as its rule exists, uses [`Namespace::open`].
    pub fn at(path: &Path, host: NamespaceId) -> Result<Self, NetnsUnavailable> {
        Self::open_by(&NetnsRef::Path(path.to_owned()), host, Follow::Any)
    }

    fn open_by(entrance: &NetnsRef, host: NamespaceId, follow: Follow) -> Result<Self, NetnsUnavailable> {
        let (file, process) = match entrance {
            NetnsRef::Process { pid, start, container } => {
                let (file, process) = of_process(*pid, start.as_ref(), container.as_deref())?;
                (file, Some(process))
            }
            NetnsRef::Path(path) => (at_path(path, follow)?, None),
        };
        let id = id_of(&file)
            .map_err(|error| NetnsUnavailable::Unsuitable(format!("cannot look at it: {error}")))?;
        if id == host {
            let why = "it is in the host's network namespace, so its localhost is the host's already";
            return Err(NetnsUnavailable::Unsuitable(why.to_owned()));
        }
        Ok(Self { file, process, follow, key: NamespaceKey { id, entrance: entrance.clone() } })
    }

    /// Wraps a namespace that was found by other means, with a pidfd of its process.
    pub fn of_process(file: OwnedFd, process: OwnedFd, pid: u32) -> io::Result<Self> {
        let entrance = NetnsRef::Process { pid, start: None, container: None };
        let key = NamespaceKey { id: id_of(&file)?, entrance };
        Ok(Self { file, process: Some(process), follow: Follow::Trusted, key })
    }

    /// Returns the namespace's cookie, which is never reused; `None` before Linux 5.14.
    pub fn cookie(&self) -> anyhow::Result<Option<u64>> {
        self.within(own_cookie)?
    }

    /// Returns the open namespace.
    pub fn file(&self) -> impl AsFd {
        &self.file
    }

    /// Runs `work` inside, on a thread of its own. Sockets that it makes stay in the namespace; any thread
    /// can use them.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        within(&self.file, work)
    }

    /// Lists the loopback addresses that can be dialled inside: those of 127.0.0.1 and ::1 that the loopback
    /// interface has, if it is up. Tries them instead of listing addresses: a process inside may have added a
    /// million others.
    pub fn loopback(&self) -> anyhow::Result<Vec<IpAddr>> {
        let localhost = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        self.within(|| localhost.into_iter().filter(|ip| can_be_dialled(*ip).is_ok()).collect())
    }

    /// Waits until its entrance has closed: the process has ended, or the path leads elsewhere. Sockets
    /// inside keep the namespace itself alive, so it never ends by itself.
    pub async fn gone(self) {
        let Self { file, process, follow, key } = self;
        drop(file);
        match (process, key.entrance) {
            (Some(process), _) => {
                // A pidfd becomes readable when the process has ended (pidfd_open(2)).
                // SAFETY: the descriptor is owned, so nothing closes it before the registration ends.
                let watched = unsafe { AsyncFd::register(process) };
                let ended = async { watched.map_err(io::Error::from)?.readable().await.map(drop) };
                if let Err(error) = ended.await {
                    tracing::error!(netns = key.id.inode, %error, "could not watch a process; its relay \
                                                                   closes");
                }
            }
            (None, NetnsRef::Path(path)) => {
                while at_path(&path, follow).is_ok_and(|file| id_of(&file).is_ok_and(|id| id == key.id)) {
                    tokio::time::sleep(LOOK).await;
                }
            }
            (None, NetnsRef::Process { .. }) => {}
        }
    }
}

/// Tests whether a loopback address can be dialled, by a route lookup that sends nothing: over the loopback
/// interface there is a route if it is up.
fn can_be_dialled(ip: IpAddr) -> io::Result<()> {
    const DISCARD: u16 = 9;
    let socket = Socket::new(Domain::for_address((ip, 0).into()), Type::DGRAM.cloexec(), None)?;
    socket.bind_device_by_index_v4(Some(LOOPBACK))?;
    socket.bind(&SocketAddr::new(ip, 0).into())?;
    socket.connect(&SocketAddr::new(ip, DISCARD).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planning::rule::ProcessStart;

    const NONE: NamespaceId = NamespaceId { device: 0, inode: 0 };

    fn open(entrance: &NetnsRef) -> Result<Namespace, NetnsUnavailable> {
        Namespace::open(entrance, NONE)
    }

    fn at(path: &Path) -> Result<Namespace, NetnsUnavailable> {
        Namespace::at(path, NONE)
    }

    #[test]
    fn the_hosts_own_namespace_is_none_to_relay_into() {
        let host = HostNetns::open().unwrap();
        let own = NetnsRef::Process { pid: std::process::id(), start: None, container: None };
        assert!(matches!(Namespace::open(&own, host.id), Err(NetnsUnavailable::Unsuitable(_))));
        assert_eq!(open(&own).unwrap().key.id, host.id);
        let path = Path::new("/proc/self/ns/net");
        assert_eq!(at(path).unwrap().key.id, host.id);
        assert!(matches!(Namespace::at(path, host.id), Err(NetnsUnavailable::Unsuitable(_))));
        // The path is not checked again, and the number may be another process's by then.
        let by_number = open(&NetnsRef::Path(path.to_owned()));
        assert!(matches!(by_number, Err(NetnsUnavailable::Unsuitable(why)) if why.contains("pid:N")));
    }

    #[test]
    fn what_is_no_network_namespace_is_said_so() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (path, there) in [
            (directory.path().join("none"), false),
            (fifo, false),
            ("/proc/self/ns/mnt".into(), true),
            ("/dev/null".into(), false),
            ("/etc/passwd".into(), true),
        ] {
            match at(&path) {
                Err(NetnsUnavailable::NotThere(_)) => assert!(!there, "{}", path.display()),
                Err(NetnsUnavailable::Unsuitable(_)) => assert!(there, "{}", path.display()),
                Ok(namespace) => panic!("{namespace:?}"),
            }
        }
    }

    #[test]
    fn a_process_of_another_cgroup_is_not_the_containers() {
        let own = NetnsRef::Process {
            pid: std::process::id(),
            start: None,
            container: Some("0123456789abcdef".repeat(4)),
        };
        assert!(matches!(open(&own), Err(NetnsUnavailable::Unsuitable(why)) if why.contains("DOCKER_HOST")));
        let none = NetnsRef::Process { pid: 0x7fff_fff0, start: None, container: None };
        assert!(matches!(open(&none), Err(NetnsUnavailable::NotThere(_))));
    }

    #[test]
    fn another_start_is_another_process() {
        let pid = std::process::id();
        let start = process_start(pid).unwrap();
        let other = ProcessStart { ticks: start.ticks + 1, ..start.clone() };
        assert!(open(&NetnsRef::Process { pid, start: Some(start), container: None }).is_ok());
        let other = open(&NetnsRef::Process { pid, start: Some(other), container: None });
        assert!(matches!(other, Err(NetnsUnavailable::NotThere(_))));
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let namespace = open(&NetnsRef::Process { pid: child.id(), start: None, container: None }).unwrap();
        let gone = tokio::spawn(namespace.gone());
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!gone.is_finished());
        child.kill().unwrap();
        tokio::time::timeout(Duration::from_secs(5), gone).await.unwrap().unwrap();
        child.wait().unwrap();
    }
}

//! Network namespaces: identifies this process's own ("the host"), and opens and briefly enters others.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::net::UnixDatagram,
    },
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::socket::getsockopt,
};
use rustix::{
    fs::{FsWord, Mode, OFlags, fstat, fstatfs, open},
    process::{Pid, PidfdFlags, pidfd_open},
};
use socket2::{Domain, Socket, Type};
use tokio::io::unix::AsyncFd;

use super::{interfaces, trusted};
use crate::planning::{
    inventory::{Absence, Entrance, NamespaceId, NamespaceKey},
    rule::ProcessStart,
};

/// The magic number of nsfs: `NSFS_MAGIC` (include/uapi/linux/magic.h).
const NSFS: FsWord = 0x6e73_6673;
/// Interface index of the loopback, the first interface of every namespace, whatever its name:
/// `LOOPBACK_IFINDEX` (include/net/flow.h).
pub const LOOPBACK: NonZeroU32 = NonZeroU32::MIN;
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
    /// ([`trusted::open_fixed`]).
    pub fn open(entrance: &Entrance, host: NamespaceId) -> Result<Self, Absence> {
        Self::open_by(entrance, host, Follow::Trusted)
    }

    /// Opens the namespace at a path, whoever can change that path. For commands whose user has just named
    /// it; the daemon, which follows a path for as long as its rule exists, uses [`Namespace::open`].
    pub fn at(path: &Path, host: NamespaceId) -> Result<Self, Absence> {
        Self::open_by(&Entrance::Path(path.to_owned()), host, Follow::Any)
    }

    fn open_by(entrance: &Entrance, host: NamespaceId, follow: Follow) -> Result<Self, Absence> {
        let (file, process) = match entrance {
            Entrance::Process { pid, start, container } => {
                let (file, process) = of_process(*pid, start.as_ref(), container.as_deref())?;
                (file, Some(process))
            }
            Entrance::Path(path) => (at_path(path, follow)?, None),
        };
        let id = id_of(&file).map_err(|error| Absence::Unsuitable(format!("cannot look at it: {error}")))?;
        if id == host {
            let why = "it is in the host's own network namespace, where localhost is the host's already";
            return Err(Absence::Unsuitable(why.to_owned()));
        }
        Ok(Self { file, process, follow, key: NamespaceKey { id, entrance: entrance.clone() } })
    }

    /// Wraps a namespace that was found by other means, with a pidfd of its process.
    pub fn of_process(file: OwnedFd, process: OwnedFd, pid: u32) -> io::Result<Self> {
        let entrance = Entrance::Process { pid, start: None, container: None };
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
                    tracing::error!("a process cannot be watched, its relay ends: {error}");
                }
            }
            (None, Entrance::Path(path)) => {
                while at_path(&path, follow).is_ok_and(|file| id_of(&file).is_ok_and(|id| id == key.id)) {
                    tokio::time::sleep(LOOK).await;
                }
            }
            (None, Entrance::Process { .. }) => {}
        }
    }
}

/// Returns the cookie of this thread's network namespace; `None` before Linux 5.14.
fn own_cookie() -> anyhow::Result<Option<u64>> {
    // Any socket will do.
    let socket = UnixDatagram::unbound()?;
    match getsockopt(&socket, option::NetnsCookie) {
        Ok(cookie) => Ok(Some(cookie)),
        Err(Errno::ENOPROTOOPT) => Ok(None),
        Err(error) => Err(error).context("cannot read the network namespace's cookie"),
    }
}

/// Returns the cookie of a network namespace. Enters it with the calling thread for a moment, so that thread
/// must have nothing else to do. A thread of its own for this would start too late on a busy machine.
pub(super) fn cookie_of(netns: impl AsFd, home: impl AsFd) -> anyhow::Result<u64> {
    setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
    let cookie = own_cookie();
    go_home(home)?;
    cookie?.context("this kernel tells no cookies of network namespaces (5.14 and later do)")
}

/// Moves this thread into the host's network namespace.
pub(super) fn go_home(home: impl AsFd) -> anyhow::Result<()> {
    setns(home, CloneFlags::CLONE_NEWNET).context("cannot go back into the host's network namespace")
}

/// Runs `work` in a network namespace, on a thread of its own.
pub fn within<T: Send>(netns: impl AsFd + Send, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    on_a_thread(|| {
        // Fails with EINVAL on a namespace of another kind.
        setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
        Ok(work())
    })?
}

/// Runs `work` on a new thread that ends with it, so that `work` may change the thread's namespace.
pub(super) fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    thread::scope(|scope| {
        // The limit of threads may be reached.
        let inside = thread::Builder::new().name("inside".to_owned()).spawn_scoped(scope, work);
        let inside = inside.context("cannot start a thread to enter a network namespace")?;
        inside.join().map_err(|_| anyhow!("a thread in another network namespace panicked"))
    })
}

/// Makes a network namespace that has only the loopback interface, which is up. It ends when the file is
/// closed, or when this process ends.
pub fn throw_away() -> anyhow::Result<File> {
    let netns = on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        File::open("/proc/thread-self/ns/net").context("cannot open the new network namespace")
    })??;
    within(&netns, interfaces::loopback_up)??;
    Ok(netns)
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

/// Reads the identity of an open namespace.
pub fn id_of(file: &impl AsFd) -> io::Result<NamespaceId> {
    let stat = fstat(file)?;
    Ok(NamespaceId { device: stat.st_dev, inode: stat.st_ino })
}

/// Opens the network namespace of a process, and a pidfd of the process. Checks the process's start and
/// container if these are given.
fn of_process(
    pid: u32,
    start: Option<&ProcessStart>,
    container: Option<&str>,
) -> Result<(OwnedFd, OwnedFd), Absence> {
    let ended = || Absence::NotThere(format!("process {pid} has ended"));
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(ended)?;
    // First take a pidfd, then look at what the number leads to, then check that the process has not ended:
    // so the number meant this process all along.
    let process = pidfd_open(number, PidfdFlags::empty()).map_err(|_| ended())?;
    if start.is_some_and(|start| process_start(pid).ok().as_ref() != Some(start)) {
        return Err(ended());
    }
    if let Some(container) = container {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|_| ended())?;
        if !is_in_container(&cgroups, container) {
            return Err(Absence::Unsuitable(format!(
                "process {pid} is none of this container's; does DOCKER_HOST name an engine of this host?"
            )));
        }
    }
    let path = format!("/proc/{pid}/ns/net");
    let file = File::open(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ended(),
        _ => Absence::Unsuitable(format!("cannot open {path}: {error}")),
    })?;
    if has_ended(&process) {
        return Err(ended());
    }
    Ok((file.into(), process))
}

/// Returns true if a process in these cgroups (/proc/PID/cgroup) is the container's: on each path, the first
/// part that contains an id contains this one. A process that is in a container, or has a cgroup of its own,
/// can make cgroups below that with any name.
fn is_in_container(cgroups: &str, container: &str) -> bool {
    let ids = cgroups.lines().filter_map(|line| {
        let path = without_pod(line.splitn(3, ':').nth(2)?);
        // `ID`, `docker-ID.scope`, `libpod-ID.scope`, `crio-ID`.
        path.split('/').find_map(|part| part.split(['-', '.']).find(|word| is_id(word)))
    });
    let ids: Vec<_> = ids.collect();
    is_id(container) && !ids.is_empty() && ids.iter().all(|id| *id == container)
}

/// Strips a pod from a cgroup's path. Where Podman makes cgroups itself, a pod's cgroup encloses those of its
/// containers, and its name is the pod's id alone. It is below a folder at the top, where only root can make
/// any.
fn without_pod(path: &str) -> &str {
    let inside = path.strip_prefix("/libpod_parent/").and_then(|path| path.split_once('/'));
    inside.filter(|(pod, _)| is_id(pod)).map_or(path, |(_, container)| container)
}

fn is_id(text: &str) -> bool {
    const ID: usize = 64;
    text.len() == ID && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn has_ended(process: &OwnedFd) -> bool {
    let mut ready = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// The links and folders that a path may go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follow {
    /// All links and folders.
    Any,
    /// Only those that nobody but root and this process's user can change.
    Trusted,
}

/// Opens the network namespace at a path. Does not open any other file: a FIFO would block, a device might
/// act.
pub(super) fn at_path(path: &Path, follow: Follow) -> Result<OwnedFd, Absence> {
    let shown = path.display();
    let seen = match follow {
        Follow::Any => open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from),
        Follow::Trusted => trusted::open_fixed(path),
    };
    let seen = seen.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Absence::NotThere(format!("there is no {shown}")),
        io::ErrorKind::PermissionDenied if follow == Follow::Trusted => Absence::Unsuitable(format!(
            "{shown} is not followed: {error}; name the namespace by a path that only root can change, as \
             `ip netns attach NAME PID` makes it (netns:/run/netns/NAME), or allow pid:N"
        )),
        _ => Absence::Unsuitable(format!("cannot open {shown}: {error}")),
    })?;
    if !fstatfs(&seen).is_ok_and(|fs| fs.f_type == NSFS) {
        return Err(match fstat(&seen) {
            // `ip netns add` creates the file first, and mounts the namespace on it.
            Ok(stat) if stat.st_size == 0 => Absence::NotThere(format!("{shown} is no namespace")),
            _ => Absence::Unsuitable(format!("{shown} is no namespace")),
        });
    }
    let file = File::open(format!("/proc/self/fd/{}", seen.as_raw_fd()));
    let file = file.map_err(|error| Absence::Unsuitable(format!("cannot open {shown}: {error}")))?;
    if kind_of(&file).is_ok_and(|kind| kind != CloneFlags::CLONE_NEWNET.bits()) {
        return Err(Absence::Unsuitable(format!("{shown} is a namespace, but not a network namespace")));
    }
    Ok(file.into())
}

/// Returns the type of a namespace, one of the `CLONE_NEW...` flags (ioctl_ns(2)).
fn kind_of(file: &File) -> io::Result<i32> {
    // SAFETY: the request takes no argument.
    Ok(Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) })?)
}

/// Returns the start of the process that has this number now, which tells it from other processes with the
/// number.
pub fn process_start(pid: u32) -> io::Result<ProcessStart> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses, and may hold anything.
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks = rest.split(' ').nth(19).and_then(|field| field.parse().ok());
    let ticks = ticks.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    Ok(ProcessStart { ticks, boot })
}

/// Keeps the option's type, which the macro makes `pub`, from being part of any interface.
mod option {
    use nix::{getsockopt_impl, libc, sockopt_impl};

    sockopt_impl!(
        /// The cookie of the socket's network namespace.
        NetnsCookie,
        GetOnly,
        libc::SOL_SOCKET,
        libc::SO_NETNS_COOKIE,
        u64
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: NamespaceId = NamespaceId { device: 0, inode: 0 };

    fn open(entrance: &Entrance) -> Result<Namespace, Absence> {
        Namespace::open(entrance, NONE)
    }

    fn at(path: &Path) -> Result<Namespace, Absence> {
        Namespace::at(path, NONE)
    }

    #[test]
    fn the_hosts_own_namespace_is_none_to_relay_into() {
        let host = HostNetns::open().unwrap();
        let own = Entrance::Process { pid: std::process::id(), start: None, container: None };
        assert!(matches!(Namespace::open(&own, host.id), Err(Absence::Unsuitable(_))));
        assert_eq!(open(&own).unwrap().key.id, host.id);
        let path = Path::new("/proc/self/ns/net");
        assert_eq!(at(path).unwrap().key.id, host.id);
        assert!(matches!(Namespace::at(path, host.id), Err(Absence::Unsuitable(_))));
        // The path is not checked again, and the number may be another process's by then.
        let by_number = open(&Entrance::Path(path.to_owned()));
        assert!(matches!(by_number, Err(Absence::Unsuitable(why)) if why.contains("pid:N")));
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
                Err(Absence::NotThere(_)) => assert!(!there, "{}", path.display()),
                Err(Absence::Unsuitable(_)) => assert!(there, "{}", path.display()),
                Ok(namespace) => panic!("{namespace:?}"),
            }
        }
    }

    #[test]
    fn a_process_of_another_cgroup_is_not_the_containers() {
        let own = Entrance::Process {
            pid: std::process::id(),
            start: None,
            container: Some("0123456789abcdef".repeat(4)),
        };
        assert!(matches!(open(&own), Err(Absence::Unsuitable(why)) if why.contains("DOCKER_HOST")));
        let none = Entrance::Process { pid: 0x7fff_fff0, start: None, container: None };
        assert!(matches!(open(&none), Err(Absence::NotThere(_))));
    }

    #[test]
    fn a_containers_cgroup_is_the_first_that_is_one() {
        let (own, other) = ("ab".repeat(32), "cd".repeat(32));
        for (cgroups, is_own) in [
            (format!("0::/docker/{own}\n"), true),
            (format!("0::/system.slice/docker-{own}.scope\n"), true),
            (format!("0::/machine.slice/libpod-{own}.scope/container\n"), true),
            (format!("0::/system.slice/a.service/libpod-payload-{own}\n"), true),
            (format!("0::/libpod_parent/libpod-{own}\n"), true),
            // In a pod, and what a process in a container may make of that.
            (format!("0::/libpod_parent/{other}/libpod-{own}\n"), true),
            (format!("0::/machine.slice/machine-libpod_pod_{other}.slice/libpod-{own}.scope\n"), true),
            (format!("0::/libpod_parent/libpod-{other}/libpod-{own}\n"), false),
            (format!("0::/docker/{other}/libpod_parent/{other}/libpod-{own}\n"), false),
            (format!("1:cpu:/docker/{own}\n0::/\n"), true),
            (format!("0::/docker/{other}/{own}\n"), false),
            (format!("0::/docker/{own}/{other}\n"), true),
            (format!("1:cpu:/docker/{other}\n0::/docker/{own}\n"), false),
            (format!("0::/user/{own}x\n"), false),
            ("0::/\n".to_owned(), false),
        ] {
            assert_eq!(is_in_container(&cgroups, &own), is_own, "{cgroups}");
        }
        assert!(!is_in_container("0::/docker/\n", ""));
        assert!(!is_in_container("0::/docker/abc\n", "abc"));
    }

    #[test]
    fn another_start_is_another_process() {
        let pid = std::process::id();
        let start = process_start(pid).unwrap();
        let other = ProcessStart { ticks: start.ticks + 1, ..start.clone() };
        assert!(open(&Entrance::Process { pid, start: Some(start), container: None }).is_ok());
        let other = open(&Entrance::Process { pid, start: Some(other), container: None });
        assert!(matches!(other, Err(Absence::NotThere(_))));
    }

    #[test]
    fn a_process_has_one_start() {
        let pid = std::process::id();
        assert_eq!(process_start(pid).unwrap(), process_start(pid).unwrap());
        assert_ne!(process_start(pid).unwrap(), process_start(1).unwrap());
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let namespace = open(&Entrance::Process { pid: child.id(), start: None, container: None }).unwrap();
        let gone = tokio::spawn(namespace.gone());
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!gone.is_finished());
        child.kill().unwrap();
        tokio::time::timeout(Duration::from_secs(5), gone).await.unwrap().unwrap();
        child.wait().unwrap();
    }
}

//! Network namespaces: the one that this process is in ("the host"), and others, entered for a moment.

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

/// `NSFS_MAGIC` (include/uapi/linux/magic.h).
const NSFS: FsWord = 0x6e73_6673;
/// `LOOPBACK_IFINDEX` (include/net/flow.h): the first interface of every namespace, whatever it is called.
pub const LOOPBACK: NonZeroU32 = NonZeroU32::MIN;
/// How often a namespace that has a path is looked for there: nothing tells of the end of a bind mount.
const LOOK: Duration = Duration::from_millis(500);

/// The namespace of this process.
#[derive(Debug)]
pub struct HostNetns {
    /// Its handle.
    pub file: File,
    /// Its cookie, never used again (`SO_NETNS_COOKIE`, Linux 5.14 and later); `None` on older kernels.
    pub cookie: Option<u64>,
    /// Its identity among those that exist.
    pub id: NamespaceId,
}

impl HostNetns {
    /// Opens it.
    pub fn open() -> anyhow::Result<Self> {
        let file = File::open("/proc/self/ns/net").context("cannot open this process's network namespace")?;
        let cookie = own_cookie()?;
        let id = id_of(&file)?;
        Ok(Self { file, cookie, id })
    }
}

/// Another namespace, held open: it exists for as long as this does, so this is not kept.
#[derive(Debug)]
pub struct Namespace {
    file: OwnedFd,
    /// The process that is its entrance.
    process: Option<OwnedFd>,
    /// How its path was followed, if it has one.
    follow: Follow,
    /// Which it is, and how it was found.
    pub key: NamespaceKey,
}

impl Namespace {
    /// Goes to the entrance, and sees what is there. `host` is this process's own namespace, which is none to relay into.
    /// A path that somebody other than root can change is not followed ([`trusted::open_fixed`]).
    pub fn open(entrance: &Entrance, host: NamespaceId) -> Result<Self, Absence> {
        Self::open_by(entrance, host, Follow::Trusted)
    }

    /// Opens the namespace at a path, whoever can change that: for a command whose user has just named it. The daemon, which
    /// follows a path for as long as its rule is there, uses [`Namespace::open`].
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

    /// One that was found by other means, with its process.
    pub fn of_process(file: OwnedFd, process: OwnedFd, pid: u32) -> io::Result<Self> {
        let entrance = Entrance::Process { pid, start: None, container: None };
        let key = NamespaceKey { id: id_of(&file)?, entrance };
        Ok(Self { file, process: Some(process), follow: Follow::Trusted, key })
    }

    /// Its cookie, never used again; `None` before Linux 5.14.
    pub fn cookie(&self) -> anyhow::Result<Option<u64>> {
        self.within(own_cookie)?
    }

    /// Its handle.
    pub fn file(&self) -> impl AsFd {
        &self.file
    }

    /// Runs `work` inside, on a thread of its own. Sockets that it makes stay inside; they can be used anywhere.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        within(&self.file, work)
    }

    /// The loopback addresses that can be dialled inside: 127.0.0.1 and ::1, as far as the loopback interface has them and is
    /// up. Tried, not read: whoever is inside may have made a million others.
    pub fn loopback(&self) -> anyhow::Result<Vec<IpAddr>> {
        let localhost = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        self.within(|| localhost.into_iter().filter(|ip| can_be_dialled(*ip).is_ok()).collect())
    }

    /// Waits until its entrance has closed: the process has ended, or the path leads elsewhere. The namespace itself is
    /// held by sockets inside, so that it never ends by itself.
    pub async fn gone(self) {
        let Self { file, process, follow, key } = self;
        drop(file);
        match (process, key.entrance) {
            (Some(process), _) => {
                // A pidfd gets readable when the process has ended (pidfd_open(2)).
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

/// The cookie of this thread's network namespace; `None` before Linux 5.14.
fn own_cookie() -> anyhow::Result<Option<u64>> {
    // Any socket will do.
    let socket = UnixDatagram::unbound()?;
    match getsockopt(&socket, option::NetnsCookie) {
        Ok(cookie) => Ok(Some(cookie)),
        Err(Errno::ENOPROTOOPT) => Ok(None),
        Err(error) => Err(error).context("cannot read the network namespace's cookie"),
    }
}

/// The cookie of a network namespace. This thread goes inside for a moment, so it is to be one that has nothing else to do:
/// on a busy machine a thread for it would wait to run for longer than there is time.
pub(super) fn cookie_of(netns: impl AsFd, home: impl AsFd) -> anyhow::Result<u64> {
    setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
    let cookie = own_cookie();
    go_home(home)?;
    cookie?.context("this kernel tells no cookies of network namespaces (5.14 and later do)")
}

/// Has this thread be in the host's namespace.
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

/// Runs `work` on a thread that ends with it, so that it may leave the namespace.
pub(super) fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    thread::scope(|scope| {
        // Somebody may have used up all threads.
        let inside = thread::Builder::new().name("inside".to_owned()).spawn_scoped(scope, work);
        let inside = inside.context("cannot start a thread to enter a network namespace")?;
        inside.join().map_err(|_| anyhow!("a thread in another network namespace panicked"))
    })
}

/// A new network namespace with nothing in it but the loopback, which is up. It goes when this is closed, or this process
/// ends.
pub fn throw_away() -> anyhow::Result<File> {
    let netns = on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        File::open("/proc/thread-self/ns/net").context("cannot open the new network namespace")
    })??;
    within(&netns, interfaces::loopback_up)??;
    Ok(netns)
}

/// Looks up a route, without sending anything: over the loopback interface there is one if it is up.
fn can_be_dialled(ip: IpAddr) -> io::Result<()> {
    const DISCARD: u16 = 9;
    let socket = Socket::new(Domain::for_address((ip, 0).into()), Type::DGRAM.cloexec(), None)?;
    socket.bind_device_by_index_v4(Some(LOOPBACK))?;
    socket.bind(&SocketAddr::new(ip, 0).into())?;
    socket.connect(&SocketAddr::new(ip, DISCARD).into())
}

/// A namespace's identity.
pub fn id_of(file: &impl AsFd) -> io::Result<NamespaceId> {
    let stat = fstat(file)?;
    Ok(NamespaceId { device: stat.st_dev, inode: stat.st_ino })
}

/// The network namespace of a process, and the process.
fn of_process(
    pid: u32,
    start: Option<&ProcessStart>,
    container: Option<&str>,
) -> Result<(OwnedFd, OwnedFd), Absence> {
    let ended = || Absence::NotThere(format!("process {pid} has ended"));
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(ended)?;
    // First hold the process, then look at what its number leads to, then see that it was still the one that is held.
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

/// Whether a process in these cgroups (/proc/PID/cgroup) is the container's: the first part of a path that holds an id
/// holds this one. Who is in a container, or has a cgroup of its own, can make others below with any name.
fn is_in_container(cgroups: &str, container: &str) -> bool {
    let ids = cgroups.lines().filter_map(|line| {
        let path = without_pod(line.splitn(3, ':').nth(2)?);
        // `ID`, `docker-ID.scope`, `libpod-ID.scope`, `crio-ID`.
        path.split('/').find_map(|part| part.split(['-', '.']).find(|word| is_id(word)))
    });
    let ids: Vec<_> = ids.collect();
    is_id(container) && !ids.is_empty() && ids.iter().all(|id| *id == container)
}

/// Where Podman makes cgroups itself, a pod has one around those of its containers, named by its id alone; below a folder at the
/// top, where nobody but root makes any.
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

/// Which links and folders a path may go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follow {
    /// All.
    Any,
    /// Those that only root and this process's user can change.
    Trusted,
}

/// The namespace at a path. Whatever else is there is not opened: a FIFO would wait, a device might act.
pub(super) fn at_path(path: &Path, follow: Follow) -> Result<OwnedFd, Absence> {
    let shown = path.display();
    let seen = match follow {
        Follow::Any => open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from),
        Follow::Trusted => trusted::open_fixed(path),
    };
    let seen = seen.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Absence::NotThere(format!("there is no {shown}")),
        io::ErrorKind::PermissionDenied if follow == Follow::Trusted => Absence::Unsuitable(format!(
            "{shown} is not followed: {error}; name the namespace by a path that only root can change, as `ip netns attach NAME PID` \
             makes it (netns:/run/netns/NAME), or allow pid:N"
        )),
        _ => Absence::Unsuitable(format!("cannot open {shown}: {error}")),
    })?;
    if !fstatfs(&seen).is_ok_and(|fs| fs.f_type == NSFS) {
        return Err(match fstat(&seen) {
            // `ip netns add` makes the file first, and mounts the namespace there.
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

/// `CLONE_NEW...` (ioctl_ns(2)).
fn kind_of(file: &File) -> io::Result<i32> {
    // SAFETY: the request takes no argument.
    Ok(Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) })?)
}

/// Which process that number means now.
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
        /// Cookie of the socket's network namespace.
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
        // Where nobody looks at it again, a number may be another's by then.
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
            // In a pod, and what somebody in a container may make of that.
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

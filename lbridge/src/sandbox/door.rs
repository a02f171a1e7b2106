//! Door: the way into a sandbox, a child process that has joined its namespaces and makes listening sockets
//! there. A socket stays in the namespace in which it was made, so this process can use the sockets that the
//! child hands out.
//!
//! This needs a child, because only a process with a single thread may join a user namespace by setns(2), and
//! it can never leave it.
//!
//! The child must not become a way out. A process with all capabilities in the sandbox's user namespace may
//! trace processes of that namespace, and read their files through `/proc/PID/root`, which for the child are
//! the host's. The protection is that the child is not dumpable: then `__ptrace_may_access` (kernel/ptrace.c)
//! requires the capability in the user namespace of the *program*, which is ours.

use std::{
    convert::Infallible,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use nix::{
    errno::Errno,
    libc,
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, fork, getpid, getppid},
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, bind, ipproto, recv, recvmsg, send, sendmsg,
    socket_with, socketpair,
    sockopt::{Timeout, set_ipv6_v6only, set_socket_reuseaddr, set_socket_timeout},
};

use super::{id_at, id_of};

/// The longest wait for the child to answer.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// The size of a request in bytes: an IPv6 address (IPv4 is mapped), then a port in native byte order.
const REQUEST: usize = 16 + 2;

/// A child process that has joined a sandbox's user and network namespace, and makes listening sockets there.
#[derive(Debug)]
pub struct Door {
    socket: Mutex<OwnedFd>,
    child: Pid,
}

/// The steps of the child; its reply names the one that failed, or `Inside`.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Step {
    Privacy = 1,
    User,
    Net,
    Loopback,
    Inside,
}

impl Door {
    /// Starts a child that joins the user namespace that owns `netns`, then `netns`, and brings up the
    /// loopback if it is down. The fork is safe with other threads, since the child makes only system calls.
    /// But the child dies with the thread that called this.
    pub fn open(netns: &impl AsFd) -> anyhow::Result<Self> {
        let netns = netns.as_fd();
        let owner = owner(netns)?;
        // Joining our own user namespace fails (EINVAL), and is not needed.
        let own =
            id_at("/proc/thread-self/ns/user").context("cannot determine this process's user namespace")?;
        let owner = if id_of(&owner)? == own { None } else { Some(owner) };
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("cannot create a socket pair")?;
        let parent = getpid();
        // SAFETY: the child calls nothing but wrappers of system calls until it ends; see `inside`.
        match unsafe { fork() }.context("cannot start the process that listens inside")? {
            ForkResult::Child => {
                let step = inside(theirs.as_fd(), netns, owner.as_ref().map(AsFd::as_fd), parent);
                let Err((step, error)) = step;
                let mut reply = [0; 5];
                reply[0] = step as u8;
                reply[1..].copy_from_slice(&(error as i32).to_ne_bytes());
                let _ = send(&theirs, &reply, SendFlags::NOSIGNAL);
                // SAFETY: ends this process at once; nothing of the parent's is flushed or run twice.
                unsafe { libc::_exit(1) }
            }
            ForkResult::Parent { child } => {
                let door = Self { socket: Mutex::new(socket), child };
                drop(theirs);
                // Processes inside may stop it, so the wait is limited.
                let socket = door.socket.lock().unwrap_or_else(PoisonError::into_inner);
                set_socket_timeout(&*socket, Timeout::Recv, Some(STOP_TIMEOUT))?;
                drop(socket);
                door.joined(owner.is_some())?;
                Ok(door)
            }
        }
    }

    /// Waits until the child is inside, or reports the step that failed. `of_another` is true if the
    /// namespace belongs to a user namespace other than this process's.
    fn joined(&self, of_another: bool) -> anyhow::Result<()> {
        let mut reply = [0; 5];
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, length) =
            recv(&*socket, &mut reply, RecvFlags::empty()).context("cannot join the sandbox")?;
        let [step, errno @ ..] = reply;
        let errno = Errno::from_raw(i32::from_ne_bytes(errno));
        match step {
            _ if length != reply.len() => Err(anyhow!("the process that listens inside was killed")),
            step if step == Step::Inside as u8 => Ok(()),
            step if step == Step::Privacy as u8 => {
                Err(errno).context("cannot protect the process that listens inside from the sandbox")
            }
            step if step == Step::Loopback as u8 => {
                Err(errno).context("cannot bring up the sandbox's loopback")
            }
            _ if errno == Errno::EPERM && of_another => Err(not_yours()),
            _ if errno == Errno::EPERM => {
                Err(anyhow!("the network namespace was made by root, without a user namespace; run as root"))
            }
            step if step == Step::User as u8 => {
                Err(errno).context("cannot join the sandbox's user namespace")
            }
            _ => Err(errno).context("cannot join the sandbox's network namespace"),
        }
    }

    /// Returns the child's process number (PID).
    pub fn pid(&self) -> u32 {
        self.child.as_raw().unsigned_abs()
    }

    /// Makes a TCP socket inside that is bound to `address` and to the loopback interface, so that it takes
    /// only connections over the loopback. It does not listen yet, and is nonblocking. Errors carry the errno
    /// from inside: EADDRINUSE, EADDRNOTAVAIL, or EAFNOSUPPORT if there is no IPv6; EPIPE if the child is
    /// gone.
    pub fn bind(&self, address: SocketAddr) -> io::Result<OwnedFd> {
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let mut request = [0; REQUEST];
        request[..16].copy_from_slice(&ip.octets());
        request[16..].copy_from_slice(&address.port().to_ne_bytes());

        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        send(&*socket, &request, SendFlags::NOSIGNAL)?;
        let mut errno = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(&*socket, &mut [IoSliceMut::new(&mut errno)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        // The child was killed: a reset if it had not read the request, otherwise an empty read.
        if !received.is_ok_and(|received| received.bytes == errno.len()) {
            return Err(Errno::EPIPE.into());
        }
        let bound = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        match (i32::from_ne_bytes(errno), bound) {
            (0, Some(bound)) => Ok(bound),
            // No descriptor arrives if this process has too many.
            (0, None) => Err(Errno::EMFILE.into()),
            (errno, _) => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // The child ends when it sees the socket closed, unless processes inside, which may signal it, have
        // stopped it.
        let _ = kill(self.child, Signal::SIGKILL);
        let socket = self.socket.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
        while waitpid(self.child, None) == Err(Errno::EINTR) {}
    }
}

fn not_yours() -> anyhow::Error {
    anyhow!("the sandbox belongs to another user; run as the user who started it, or as root")
}

/// Opens the user namespace that owns a network namespace: its capabilities count there. bubblewrap nests
/// user namespaces, and the processes inside are not always in the owning one.
fn owner(netns: BorrowedFd<'_>) -> anyhow::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    match Errno::result(unsafe { libc::ioctl(netns.as_raw_fd(), libc::NS_GET_USERNS) }) {
        // SAFETY: the kernel has just made the descriptor for us; it is close-on-exec (ioctl_nsfs(2)).
        Ok(owner) => Ok(unsafe { OwnedFd::from_raw_fd(owner) }),
        // "The requested namespace is outside of the caller's namespace scope."
        Err(Errno::EPERM) => Err(not_yours()),
        Err(error) => {
            Err(error).context("cannot determine the user namespace that owns the network namespace")
        }
    }
}

/// Runs the child. It must not allocate or panic, since other threads may have held locks when it was forked.
fn inside(
    socket: BorrowedFd<'_>,
    netns: BorrowedFd<'_>,
    owner: Option<BorrowedFd<'_>>,
    parent: Pid,
) -> Result<Infallible, (Step, Errno)> {
    let at = |step| move |error| (step, error);
    // Ctrl-C reaches the whole process group; the parent decides when this ends.
    SigSet::all().thread_set_mask().map_err(at(Step::Privacy))?;
    let owner_or_socket = owner.map_or(socket.as_raw_fd(), |owner| owner.as_raw_fd());
    close_all_but([socket.as_raw_fd(), netns.as_raw_fd(), owner_or_socket]).map_err(at(Step::Privacy))?;
    // Before processes inside can see it.
    prctl::set_dumpable(false).map_err(at(Step::Privacy))?;
    if let Some(owner) = owner {
        setns(owner, CloneFlags::CLONE_NEWUSER).map_err(at(Step::User))?;
    }
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(at(Step::Net))?;
    // A change of credentials resets both settings (commit_creds in kernel/cred.c), and joining a namespace
    // of another user is such a change.
    prctl::set_dumpable(false).map_err(at(Step::Privacy))?;
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(at(Step::Privacy))?;
    if prctl::get_dumpable() != Ok(false) || getppid() != parent {
        return Err((Step::Privacy, Errno::EPERM));
    }
    close_all_but([socket.as_raw_fd(); 3]).map_err(at(Step::Privacy))?;
    bring_up_loopback().map_err(at(Step::Loopback))?;
    let mut joined = [0; 5];
    joined[0] = Step::Inside as u8;
    let _ = send(socket, &joined, SendFlags::NOSIGNAL);
    serve(socket)
}

/// Answers requests for sockets until the parent closes its end.
fn serve(socket: BorrowedFd<'_>) -> ! {
    let mut request = [0; REQUEST];
    while let Ok((_, REQUEST)) = recv(socket, &mut request, RecvFlags::empty()) {
        let bound = bound(request);
        let errno = bound.as_ref().err().map_or(0, |&error| error as i32).to_ne_bytes();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptor = bound.as_ref().ok().map(|bound| [bound.as_fd()]);
        if let Some(descriptor) = &descriptor {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptor));
        }
        let _ = sendmsg(socket, &[IoSlice::new(&errno)], &mut ancillary, SendFlags::NOSIGNAL);
    }
    // SAFETY: ends this process at once; nothing of the parent's is flushed or run twice.
    unsafe { libc::_exit(0) }
}

fn bound(request: [u8; REQUEST]) -> nix::Result<OwnedFd> {
    let [ip @ .., high, low] = request;
    let address = SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), u16::from_ne_bytes([high, low]));
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let make = || {
        let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        // Connections of an earlier listener may be in TIME_WAIT on the port.
        set_socket_reuseaddr(&socket, true)?;
        if address.is_ipv6() {
            set_ipv6_v6only(&socket, true)?;
        }
        Ok(socket)
    };
    let done = |error: rustix::io::Errno| Errno::from_raw(error.raw_os_error());
    let socket: OwnedFd = make().map_err(done)?;
    // By its index, which is 1 in every namespace: a process inside may give its name to another interface.
    let lo = socket2::SockRef::from(&socket).bind_device_by_index_v4(Some(NonZeroU32::MIN));
    lo.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EINVAL)))?;
    bind(&socket, &address).map_err(done)?;
    Ok(socket)
}

fn bring_up_loopback() -> nix::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    // SAFETY: an all-zero ifreq is a valid value of the C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The first interface of every namespace, whatever it is called.
    request.ifr_ifru.ifru_ifindex = 1;
    // SAFETY: the request reads an index from the structure and writes a name to it (netdevice(7)).
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFNAME as libc::Ioctl, &raw mut request)
    })?;
    // SAFETY: the request reads a name from the structure and writes flags to it (netdevice(7)).
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as libc::Ioctl, &raw mut request)
    })?;
    // SAFETY: the kernel has just written the member.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    if flags & up != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | up;
    // SAFETY: the request reads name and flags from the structure.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw const request)
    })
    .map(drop)
}

/// Closes all descriptors but these three, some of which may be equal.
fn close_all_but(mut kept: [RawFd; 3]) -> nix::Result<()> {
    kept.sort_unstable();
    let mut first = 0;
    for kept in kept {
        let kept = kept.unsigned_abs();
        if kept > first {
            close_range(first, kept - 1)?;
        }
        first = kept + 1;
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> nix::Result<()> {
    // SAFETY: the owners of the descriptors were left behind in the parent; nothing here uses or closes them
    // again.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

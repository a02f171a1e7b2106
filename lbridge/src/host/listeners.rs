//! Listening sockets: lists them with sock_diag, and asks the kernel which of them would get a connection.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::{ffi::OsStrExt as _, fs::FileTypeExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, TCP_LISTEN},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

use super::netlink;
use crate::planning::{
    inventory::{Listener, ListenerKind},
    rule::Protocol,
};

/// Lists the listening TCP sockets of this thread's network namespace, sorted by inode.
pub fn tcp() -> anyhow::Result<Vec<Listener>> {
    let mut listeners = vec![];
    for family in [AF_INET, AF_INET6] {
        dump(family, ListenerKind::Tcp, &mut listeners).context("cannot list listening sockets")?;
    }
    listeners.sort_by_key(|l| l.inode);
    Ok(listeners)
}

/// Lists the UDP sockets of this thread's network namespace that are bound and not connected, sorted by
/// inode.
pub fn udp() -> anyhow::Result<Vec<Listener>> {
    let mut sockets = vec![];
    for family in [AF_INET, AF_INET6] {
        dump(family, ListenerKind::Udp, &mut sockets).context("cannot list UDP sockets")?;
    }
    sockets.sort_by_key(|l| l.inode);
    Ok(sockets)
}

/// Asks the kernel which listening socket of this thread's network namespace would get a connection, or which
/// UDP socket a datagram, from `source` to `destination` that arrives on `interface` (an interface index).
/// Returns `None` if there is no such socket.
///
/// The kernel finds a socket by its two addresses in the same way as it does for a SYN, steering programs
/// included (`inet_lookup`, which `inet_diag_find_one_icsk` calls). No packet is sent, so neither firewalls
/// nor routes affect the answer.
pub fn lookup(
    protocol: Protocol,
    source: SocketAddr,
    destination: SocketAddr,
    interface: u32,
) -> anyhow::Result<Option<Listener>> {
    let family = if destination.is_ipv4() { AF_INET } else { AF_INET6 };
    // Seen from the socket that is looked for: its own address is the source. For a UDP socket it is the
    // destination (udp_dump_one() in net/ipv4/udp_diag.c: "src and dst are swapped for historical reasons").
    let (kind, own, other) = match protocol {
        Protocol::Tcp => (ListenerKind::Tcp, destination, source),
        Protocol::Udp => (ListenerKind::Udp, source, destination),
    };
    let socket_id = SocketId {
        source_port: own.port(),
        destination_port: other.port(),
        source_address: own.ip(),
        destination_address: other.ip(),
        interface_id: interface,
        // INET_DIAG_NOCOOKIE: matches any socket.
        cookie: [0xff; 8],
    };
    let socket = ask(family, protocol.number(), socket_id, StateFlags::all(), 0)?;
    let (buffer, _) = socket.recv_from_full()?;
    match NetlinkMessage::<SockDiagMessage>::deserialize(&buffer)?.payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
            let takes = kind == ListenerKind::Udp || response.header.state == TCP_LISTEN;
            Ok(takes.then(|| listener(&response, kind)))
        }
        NetlinkPayload::Error(error) if error.raw_code() == -libc::ENOENT => Ok(None),
        NetlinkPayload::Error(error) => Err(error.to_io()).context("failed to look up a connection's socket"),
        _ => bail!("unexpected answer from sock_diag"),
    }
}

fn dump(family: u8, kind: ListenerKind, listeners: &mut Vec<Listener>) -> io::Result<()> {
    // sock_diag reports a UDP socket that is not connected as "closed".
    let (protocol, states) = match kind {
        ListenerKind::Udp => (IPPROTO_UDP, StateFlags::CLOSE),
        _ => (IPPROTO_TCP, StateFlags::LISTEN),
    };
    for_each_socket(family, protocol, states, |response| listeners.push(listener(response, kind)))
}

/// Lists the TCP connections of this thread's network namespace whose local address is in `own`, as pairs of
/// local and remote address. Leaves out sockets in TIME_WAIT, whose pair of addresses a new SYN may reuse.
///
/// # Errors
///
/// Fails if the sockets cannot be listed.
pub fn connections(own: &BTreeSet<SocketAddr>) -> io::Result<BTreeSet<(SocketAddr, SocketAddr)>> {
    let mut found = BTreeSet::new();
    let states = || StateFlags::all() - StateFlags::LISTEN - StateFlags::CLOSE - StateFlags::TIME_WAIT;
    // An IPv6 socket may carry an IPv4 connection (IPv4-mapped addresses).
    for family in [AF_INET, AF_INET6] {
        for_each_socket(family, IPPROTO_TCP, states(), |response| {
            let id = &response.header.socket_id;
            let end = |ip: IpAddr, port| SocketAddr::new(ip.to_canonical(), port);
            let ours = end(id.source_address, id.source_port);
            if own.contains(&ours) {
                found.insert((ours, end(id.destination_address, id.destination_port)));
            }
        })?;
    }
    Ok(found)
}

/// Calls `each` for every socket of a family and protocol in one of these states.
fn for_each_socket(
    family: u8,
    protocol: u8,
    states: StateFlags,
    mut each: impl FnMut(&InetResponse),
) -> io::Result<()> {
    let socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let diag = ask(family, protocol, socket_id, states, NLM_F_DUMP)?;
    netlink::receive(&diag, |message| {
        if let SockDiagMessage::InetResponse(response) = message {
            each(&response);
        }
    })
}

/// Sends a sock_diag request on a new socket, and returns the socket for the answer to be read from.
fn ask(family: u8, protocol: u8, socket_id: SocketId, states: StateFlags, flags: u16) -> io::Result<Socket> {
    let socket = netlink::connect(NETLINK_SOCK_DIAG)?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let request = InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states, socket_id };
    netlink::send(&socket, NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into()))?;
    Ok(socket)
}

fn listener(response: &InetResponse, kind: ListenerKind) -> Listener {
    let id = &response.header.socket_id;
    let v6_only = response.nlas.iter().any(|nla| matches!(nla, Nla::SkV6Only(true)));
    Listener {
        address: SocketAddr::new(id.source_address, id.source_port),
        inode: u64::from(response.header.inode),
        uid: response.header.uid,
        single_family: v6_only || response.header.family == AF_INET,
        bound_interface: id.interface_id,
        // sock_diag reports MPTCP only together with tcp_info, whose length differs between kernels. The
        // socket itself reports it too, once a descriptor of it is taken.
        kind,
    }
}

/// Returns those paths of `wanted` on which a Unix stream socket listens. The kernel shows the path that the
/// service gave to bind(), so this compares the files: /var/run may be a link to /run. The kernel lists
/// sockets by network namespace, although any process that can reach the file may connect; a service with
/// `PrivateNetwork=` has a namespace of its own, so the other namespaces are searched too.
pub fn unix(wanted: BTreeSet<PathBuf>) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut wanted: BTreeMap<PathBuf, PathBuf> = wanted
        .into_iter()
        .filter_map(|path| {
            let file = fs::canonicalize(&path).ok()?;
            fs::metadata(&file).is_ok_and(|metadata| metadata.file_type().is_socket()).then_some((path, file))
        })
        .collect();
    let mut found = BTreeSet::new();
    let mut look = |list: &[u8], wanted: &mut BTreeMap<PathBuf, PathBuf>| {
        let listening: BTreeSet<_> = list
            .split(|b| *b == b'\n')
            .skip(1)
            .filter_map(listening_path)
            .filter_map(|path| fs::canonicalize(path).ok())
            .collect();
        wanted.retain(|path, file| {
            let listens = listening.contains(file);
            if listens {
                found.insert(path.clone());
            }
            !listens
        });
    };
    // Names are bytes: any process may bind one that is not UTF-8.
    let list = fs::read("/proc/thread-self/net/unix").context("cannot list Unix sockets")?;
    look(&list, &mut wanted);
    if !wanted.is_empty() {
        for process in one_of_each_netns()? {
            // A process may end while it is looked at.
            if let Ok(list) = fs::read(process.join("net/unix")) {
                look(&list, &mut wanted);
            }
        }
    }
    Ok(found)
}

/// Picks one process for each network namespace that has any, as a folder of /proc.
fn one_of_each_netns() -> anyhow::Result<impl Iterator<Item = PathBuf>> {
    let mut namespaces = BTreeMap::new();
    for process in fs::read_dir("/proc").context("cannot list processes")?.flatten() {
        if let Ok(namespace) = fs::read_link(process.path().join("ns/net")) {
            namespaces.entry(namespace).or_insert_with(|| process.path());
        }
    }
    Ok(namespaces.into_values())
}

/// Parses a line of /proc/net/unix, `Num RefCount Protocol Flags Type St Inode Path` (net/unix/af_unix.c).
/// Returns the path of a listening stream socket, `None` for any other socket.
fn listening_path(line: &[u8]) -> Option<&Path> {
    // __SO_ACCEPTCON, set in the flags of a listening socket (include/linux/net.h).
    const ACCEPTS: u32 = 0x0001_0000;
    const STREAM: &[u8] = b"0001";
    // The path may hold blanks, the fields before it are padded with them.
    let mut rest = line;
    let mut fields = [b"".as_slice(); 7];
    for field in &mut fields {
        let start = rest.iter().position(|b| *b != b' ')?;
        let end = start + rest[start..].iter().position(|b| *b == b' ')?;
        (*field, rest) = (&rest[start..end], &rest[end + 1..]);
    }
    let flags = u32::from_str_radix(str::from_utf8(fields[3]).ok()?, 16).ok()?;
    (fields[4] == STREAM && flags & ACCEPTS != 0 && rest.starts_with(b"/"))
        .then(|| Path::new(OsStr::from_bytes(rest)))
}

/// Returns the inode of the socket that keeps others in this thread's network namespace from listening on
/// `address`; `None` if none does, or if the sockets cannot be listed.
pub fn in_the_way(address: SocketAddr) -> Option<u64> {
    let in_the_way = |listener: &&Listener| {
        let there = listener.address;
        let same_family = there.is_ipv4() == address.is_ipv4();
        let wildcard = there.ip().is_unspecified() && (same_family || !listener.single_family);
        there.port() == address.port() && (there.ip() == address.ip() || wildcard)
    };
    Some(tcp().ok()?.iter().find(in_the_way)?.inode)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        net::{TcpListener, UdpSocket},
        os::{fd::AsFd as _, linux::net::SocketAddrExt as _},
        thread,
        time::Duration,
    };

    use super::*;
    use crate::host::{holders::is_held_by, socket_fd::SocketFdTaker};

    #[test]
    fn listeners_are_found_and_taken() {
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let v6 = TcpListener::bind("[::1]:0").unwrap();
        let found = tcp().unwrap();
        for listener in [&v4, &v6] {
            let inode = nix::sys::stat::fstat(listener.as_fd()).unwrap().st_ino;
            let seen = found.iter().find(|l| l.inode == inode).unwrap();
            assert_eq!(seen.address, listener.local_addr().unwrap());
            assert_eq!((seen.kind, seen.bound_interface), (ListenerKind::Tcp, 0));
            let taken = SocketFdTaker::default().take(inode, &HashSet::from([inode])).unwrap();
            assert_eq!(TcpListener::from(taken).local_addr().unwrap(), seen.address);
        }
    }

    #[test]
    fn the_kernel_is_asked_who_would_get_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = nix::sys::stat::fstat(listener.as_fd()).unwrap().st_ino;
        let (from, to) = ("127.0.0.7:1".parse().unwrap(), listener.local_addr().unwrap());
        assert_eq!(lookup(Protocol::Tcp, from, to, 1).unwrap().map(|found| found.inode), Some(inode));
        assert!(is_held_by(inode, std::process::id()) && !is_held_by(inode, 1));
        drop(listener);
        assert_eq!(lookup(Protocol::Tcp, from, to, 1).unwrap(), None);
    }

    #[test]
    fn an_ipv6_wildcard_is_in_the_way_of_ipv4_unless_it_is_ipv6_only() {
        for ipv6_only in [true, false] {
            let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
            socket.set_only_v6(ipv6_only).unwrap();
            socket.bind(&"[::]:0".parse::<SocketAddr>().unwrap().into()).unwrap();
            socket.listen(1).unwrap();
            let listener = TcpListener::from(socket);
            let inode = nix::sys::stat::fstat(listener.as_fd()).unwrap().st_ino;
            let port = listener.local_addr().unwrap().port();
            let is_in_the_way_of =
                |ip: &str| in_the_way(SocketAddr::new(ip.parse().unwrap(), port)) == Some(inode);
            assert!(is_in_the_way_of("::1"));
            assert_eq!(is_in_the_way_of("127.0.0.1"), !ipv6_only);
        }
    }

    #[test]
    fn udp_sockets_are_found_taken_and_asked_for() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(socket.local_addr().unwrap()).unwrap();
        let inode_of = |socket: &UdpSocket| nix::sys::stat::fstat(socket.as_fd()).unwrap().st_ino;
        let (inode, found) = (inode_of(&socket), udp().unwrap());
        let seen = found.iter().find(|l| l.inode == inode).unwrap();
        assert_eq!((seen.address, seen.kind), (socket.local_addr().unwrap(), ListenerKind::Udp));
        assert!(!found.iter().any(|l| l.inode == inode_of(&connected)), "it takes from one peer alone");
        let taken = SocketFdTaker::default().take(inode, &HashSet::from([inode])).unwrap();
        assert_eq!(UdpSocket::from(taken).local_addr().unwrap(), seen.address);
        let asked = lookup(Protocol::Udp, "127.0.0.7:1".parse().unwrap(), seen.address, 1).unwrap();
        assert_eq!(asked.map(|found| found.inode), Some(inode));
    }

    #[test]
    fn unix_listeners_are_found() {
        let hostile = std::os::unix::net::SocketAddr::from_abstract_name(b"\xff\xfe no text").unwrap();
        let _hostile = std::os::unix::net::UnixDatagram::bind_addr(&hostile).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a b.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let by_link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &by_link).unwrap();
        let wanted = BTreeSet::from([path.clone(), by_link, directory.path().join("none")]);
        assert_eq!(unix(wanted.clone()).unwrap().len(), 2);
        drop(listener);
        // A child that another test's thread has just forked keeps the listener open until its exec.
        let gone = || unix(wanted.clone()).unwrap().is_empty();
        assert!((0..1000).any(|_| gone() || {
            thread::sleep(Duration::from_millis(5));
            false
        }));
    }
}

//! Listening sockets: bound to the bridge and to an address where the kernel's entry leads; or to the gateway
//! itself, before Linux 5.17; or inherited from an earlier daemon.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    ops::RangeInclusive,
    os::fd::OwnedFd,
    sync::atomic::{AtomicU32, Ordering},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

use super::splice;

/// The backlog of a busy service; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Ports that neither services nor connections use: IANA registers none of them (RFC 6335), and
/// `net.ipv4.ip_local_port_range` ends at 60999 unless the administrator has changed it.
const UNUSED_PORTS: RangeInclusive<u16> = 61_000..=65_535;
/// The first IPv4 address for listeners; below 127.128.0.0/9, from which relays connect.
const LOOPBACK_V4: Ipv4Addr = Ipv4Addr::new(127, 64, 0, 0);
const LOOPBACK_V4_HOSTS: u32 = 0x003f_ffff;
const DISCARD_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0);

/// A listening socket with the options that a relay's connections inherit.
#[derive(Debug)]
pub struct Listening(std::net::TcpListener);

impl Listening {
    /// Sets the options of a bound socket, and starts to listen on it.
    pub fn begin(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = Socket::from(socket.into());
        // Before the first connection: without the options it could not be cut off with a reset.
        splice::prepare(&socket)?;
        socket.listen(BACKLOG)?;
        Ok(Self(socket.into()))
    }

    /// Wraps a socket that already listens, and sets its options.
    pub fn inherited(socket: std::net::TcpListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        splice::prepare(&socket)?;
        Ok(Self(socket))
    }

    /// Registers the socket with the current event loop.
    pub(super) fn register(self) -> io::Result<TcpListener> {
        TcpListener::from_std(self.0)
    }
}

/// Listens in this thread's network namespace, bound to both the address and the interface. The address alone
/// would let in the LAN, which may route packets for it to the host (the weak host model).
pub fn listen(address: SocketAddr, interface: NonZeroU32) -> io::Result<Listening> {
    Listening::begin(bound(address, interface)?)
}

/// Listens in this thread's network namespace on an address that no packet can name, bound to the bridge, so
/// that only the kernel's entry for `dialled` leads there. Takes a port of the host that services do not use,
/// so that a service which listens on every address can have the dialled port.
///
/// # Errors
///
/// Any error of socket(2), bind(2) and listen(2); `AddrInUse` if none of the ports is free.
pub fn listen_by_entry(dialled: SocketAddr, interface: NonZeroU32) -> io::Result<Listening> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let mut last = io::ErrorKind::AddrInUse.into();
    // A local user may occupy all of them; the kernel picks another port then.
    for port in UNUSED_PORTS.chain([0]) {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let address: IpAddr = match dialled {
            // Packets from a bridge to 127/8 are martians.
            SocketAddr::V4(_) => {
                Ipv4Addr::from_bits(LOOPBACK_V4.to_bits() | (number & LOOPBACK_V4_HOSTS)).into()
            }
            // Discard-only (RFC 6666): no host has such an address.
            SocketAddr::V6(_) => Ipv6Addr::from_bits(DISCARD_V6.to_bits() | u128::from(number)).into(),
        };
        match bound(SocketAddr::new(address, port), interface) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            done => return done.and_then(Listening::begin),
        }
    }
    Err(last)
}

fn bound(address: SocketAddr, interface: NonZeroU32) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    // By its index: the name may pass to another interface.
    socket.bind_device_by_index_v4(Some(interface))?;
    // An IPv6 address is tentative until the bridge has its first port, that is until its first container.
    if address.is_ipv6() && !address.ip().is_loopback() {
        socket.set_freebind_v6(true)?;
    }
    // Connections of an earlier relay may be in TIME_WAIT on the port.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

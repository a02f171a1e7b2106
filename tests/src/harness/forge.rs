//! forge: packets with a source of the attacker's choice, which only root in a container's namespace can
//! send.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage};

use super::netns::NetNs;

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const HOP_LIMIT: u8 = 64;

/// Sends a datagram whose IP header says that it comes from `source`.
pub fn datagram(netns: &NetNs, source: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<()> {
    ensure!(source.is_ipv4() == to.is_ipv4(), "{source} and {to} are of one family");
    let length = u16::try_from(UDP_HEADER + payload.len())?;
    let mut datagram = [source.port(), to.port(), length, 0].map(u16::to_be_bytes).concat();
    datagram.extend(payload);
    let sum = checksum(source.ip(), to.ip(), &datagram);
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    let packet = match (source.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(to)) => {
            // The kernel fills in the length and the checksum (raw(7)).
            let start = [0x45, 0, 0, 0, 0, 0, 0, 0, HOP_LIMIT, UDP, 0, 0];
            [&start[..], &source.octets(), &to.octets(), &datagram].concat()
        }
        (IpAddr::V6(source), IpAddr::V6(to)) => {
            let [high, low] = length.to_be_bytes();
            let start = [0x60, 0, 0, 0, high, low, UDP, HOP_LIMIT];
            [&start[..], &source.octets(), &to.octets(), &datagram].concat()
        }
        _ => unreachable!("of one family"),
    };
    netns.run(|| {
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let fd = socket::socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
        let to = SockaddrStorage::from(SocketAddr::new(to.ip(), 0));
        let sent = socket::sendto(fd.as_raw_fd(), &packet, &to, MsgFlags::empty());
        sent.context("send a forged datagram").map(drop)
    })
}

/// Computes the Internet checksum over pseudo-header and datagram (RFC 768; RFC 8200, section 8.1).
fn checksum(source: IpAddr, to: IpAddr, datagram: &[u8]) -> u16 {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut bytes = [octets(source), octets(to), datagram.to_vec()].concat();
    bytes.resize(bytes.len().next_multiple_of(2), 0);
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum = words.sum::<u32>() + u32::from(UDP) + u32::try_from(datagram.len()).unwrap_or_default();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Zero would mean that there is no checksum.
    match !u16::try_from(sum).unwrap_or_default() {
        0 => 0xffff,
        sum => sum,
    }
}

//! Probe: tests whether a SYN from a bridge arrives. Sends one from a scratch namespace there, and waits for
//! the answer. It does not complete the handshake, so that no service notices. An answer to a datagram could
//! come from a firewall, too; so the kernel program counts the datagram, and keeps it from the service.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher as _, RandomState},
    io,
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lbridge_common::wire::PROBE_PORT;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    host::scratch::{Scratch, free_address},
    planning::firewall::{Opening, ProbeResult, ProbeRoute},
};

use super::Arrivals;

/// Times after the first SYN at which it is sent again: one may get lost.
const AGAIN: [Duration; 3] =
    [Duration::from_millis(200), Duration::from_millis(500), Duration::from_millis(1100)];
/// Limits on the time that datagrams take to arrive, one for each try. A host counts them in microseconds,
/// but may have to ask for its neighbour's address first.
const DATAGRAMS: [Duration; 4] = [
    Duration::from_millis(10),
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_secs(1),
];
/// Limit on waiting for an answer. The host answers in microseconds; but if a question for a neighbour's
/// address gets lost, the next follows a second later.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);
/// SYNs that are sent at a time, far fewer than a service's queue of half-open connections holds.
const BURST: usize = 64;
/// Length of a TCP header in bytes; then the offsets and flags that this module reads or writes (RFC 9293,
/// section 3.1).
const HEADER: usize = 20;
const ACKNOWLEDGED: usize = 8;
const FLAGS: usize = 13;
const CHECKSUM: usize = 16;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Addresses and ports that are dialled, or have answered.
type Dialled = BTreeSet<(IpAddr, u16)>;

/// Probes the TCP openings of one bridge.
pub(super) async fn bridge(
    ifindex: u32,
    openings: Vec<(&Opening, &ProbeRoute)>,
    arrivals: Option<&dyn Arrivals>,
) -> Vec<(Opening, ProbeResult)> {
    let mut gateways: BTreeMap<(IpAddr, u8), Vec<&Opening>> = BTreeMap::new();
    for (opening, link) in openings {
        let own = link.via.unwrap_or(opening.gateway);
        gateways.entry((own, opening.sources.prefix_len())).or_default().push(opening);
    }
    let mut probe_results = vec![];
    for ((gateway, prefix), openings) in gateways {
        let dialled: Dialled = openings.iter().map(|opening| (opening.gateway, opening.port)).collect();
        let answered = from_bridge(ifindex, gateway, prefix, dialled, arrivals).await;
        let answered = answered.inspect_err(|error| log_failed(gateway, error));
        probe_results.extend(openings.into_iter().map(|opening| {
            let passage = match &answered {
                Ok(answered) if answered.contains(&(opening.gateway, opening.port)) => ProbeResult::Open,
                Ok(_) => ProbeResult::Dropped,
                Err(error) => ProbeResult::Unknown(format!("{error:#}")),
            };
            (opening.clone(), passage)
        }));
    }
    probe_results
}

fn log_failed(gateway: IpAddr, error: &anyhow::Error) {
    tracing::debug!(%gateway, error = format!("{error:#}"), "could not probe the firewall");
}

/// Probes openings of UDP; without `arrivals` the result is [`ProbeResult::Unknown`].
pub(super) async fn datagrams(
    openings: &[(&Opening, &ProbeRoute)],
    arrivals: Option<&dyn Arrivals>,
) -> Vec<(Opening, ProbeResult)> {
    let Some(arrivals) = arrivals else {
        let unknown = || ProbeResult::Unknown("only the daemon can probe UDP".to_owned());
        return openings.iter().map(|(opening, _)| ((*opening).clone(), unknown())).collect();
    };
    let mut probe_results = vec![];
    let mut gateways: BTreeMap<(u32, IpAddr, u8), Vec<&Opening>> = BTreeMap::new();
    for (opening, link) in openings {
        match arrivals.count(opening, **link) {
            Ok(()) => {
                let network = (link.ifindex, opening.gateway, opening.sources.prefix_len());
                gateways.entry(network).or_default().push(opening);
            }
            Err(error) => {
                probe_results.push(((*opening).clone(), ProbeResult::Unknown(format!("{error:#}"))));
            }
        }
    }
    for ((ifindex, gateway, prefix), openings) in gateways {
        let link = ProbeRoute { ifindex, via: None };
        let missing = || -> Vec<u16> {
            openings.iter().filter(|o| !arrivals.any(o, link)).map(|opening| opening.port).collect()
        };
        let sent = async {
            let prober = Prober::new(ifindex, gateway, prefix, Some(arrivals)).await?;
            for pause in DATAGRAMS {
                let ports = missing();
                if ports.is_empty() {
                    break;
                }
                prober.scratch.within(|| send(prober.source, gateway, &ports))??;
                tokio::time::sleep(pause).await;
            }
            anyhow::Ok(())
        };
        let sent = sent.await.inspect_err(|error| log_failed(gateway, error));
        for opening in openings {
            let passage = match &sent {
                _ if arrivals.any(opening, link) => ProbeResult::Open,
                Ok(()) => ProbeResult::Dropped,
                Err(error) => ProbeResult::Unknown(format!("{error:#}")),
            };
            arrivals.forget(opening, link);
            probe_results.push((opening.clone(), passage));
        }
    }
    probe_results
}

/// Sends an empty datagram to each port.
fn send(source: IpAddr, gateway: IpAddr, ports: &[u16]) -> anyhow::Result<()> {
    for port in ports {
        // One socket each: an answer of ICMP's would be an error of the next datagram.
        let socket = UdpSocket::bind(SocketAddr::new(source, PROBE_PORT)).context("cannot bind")?;
        socket.send_to(&[], SocketAddr::new(gateway, *port)).context("cannot send")?;
    }
    Ok(())
}

/// A namespace on a bridge with a free address of the gateway's subnet, whose packets are known to be probes.
struct Prober<'a> {
    scratch: Arc<Scratch>,
    source: IpAddr,
    ifindex: u32,
    arrivals: Option<&'a dyn Arrivals>,
}

impl<'a> Prober<'a> {
    async fn new(
        ifindex: u32,
        gateway: IpAddr,
        prefix: u8,
        arrivals: Option<&'a dyn Arrivals>,
    ) -> anyhow::Result<Self> {
        let source = free_address(ifindex, gateway, prefix, &[]).await?;
        let source = source.with_context(|| format!("no free address in {gateway}/{prefix}"))?;
        let scratch = Arc::new(Scratch::on_bridge(ifindex, &[(source, prefix)]).await?);
        if let Some(arrivals) = arrivals {
            arrivals.begin(source, ifindex)?;
        }
        Ok(Self { scratch, source, ifindex, arrivals })
    }
}

impl Drop for Prober<'_> {
    fn drop(&mut self) {
        if let Some(arrivals) = self.arrivals {
            arrivals.end(self.source, self.ifindex);
        }
    }
}

/// Returns the addresses and ports that answer a client on the bridge with this gateway: the gateway's own,
/// or those of what is behind it.
async fn from_bridge(
    ifindex: u32,
    gateway: IpAddr,
    prefix: u8,
    dialled: Dialled,
    arrivals: Option<&dyn Arrivals>,
) -> anyhow::Result<Dialled> {
    let prober = Prober::new(ifindex, gateway, prefix, arrivals).await?;
    if dialled.iter().any(|(ip, _)| *ip != gateway) {
        prober.scratch.route_via(gateway).await?;
    }
    let mut ports: BTreeMap<IpAddr, BTreeSet<u16>> = BTreeMap::new();
    for (ip, port) in dialled {
        ports.entry(ip).or_default().insert(port);
    }
    let (source, scratch) = (prober.source, prober.scratch.clone());
    let all = move || {
        let mut answered = Dialled::new();
        for (ip, ports) in &ports {
            let answering = answering(source, *ip, ports).with_context(|| format!("cannot send to {ip}"))?;
            answered.extend(answering.into_iter().map(|port| (*ip, port)));
        }
        Ok(answered)
    };
    // A thread of its own waits, not the loop's.
    tokio::task::spawn_blocking(move || scratch.within(all)?).await.context("the probe panicked")?
}

/// Sends SYNs from this thread's network namespace, and collects the ports that answer.
fn answering(source: IpAddr, gateway: IpAddr, ports: &BTreeSet<u16>) -> anyhow::Result<BTreeSet<u16>> {
    let socket =
        Socket::new(Domain::for_address(SocketAddr::new(gateway, 0)), Type::RAW, Some(Protocol::TCP))?;
    let mut answered = BTreeSet::new();
    // Only a host that the SYN has reached knows this number: others on the bridge could answer in the
    // gateway's name, for something that a firewall drops.
    let sequence = (RandomState::new().hash_one(gateway) >> 32) as u32;
    let ports: Vec<_> = ports.iter().copied().collect();
    for burst in ports.chunks(BURST) {
        let begun = Instant::now();
        for wait_until in AGAIN.into_iter().chain([PROBE_TIMEOUT]) {
            let silent: Vec<_> = burst.iter().filter(|port| !answered.contains(*port)).collect();
            for port in &silent {
                let segment = syn(source, gateway, **port, sequence);
                socket.send_to(&segment, &SocketAddr::new(gateway, 0).into())?;
            }
            while burst.iter().any(|port| !answered.contains(port)) {
                let left = wait_until.saturating_sub(begun.elapsed());
                if left.is_zero() {
                    break;
                }
                answered.extend(receive(&socket, gateway, sequence, left)?);
            }
        }
    }
    Ok(answered)
}

/// Receives a packet, and returns its port if it is an answer; `None` if it is not, or none arrives in time.
fn receive(socket: &Socket, gateway: IpAddr, sequence: u32, patience: Duration) -> io::Result<Option<u16>> {
    socket.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
    let mut packet = [MaybeUninit::uninit(); 128];
    let (length, from) = match socket.recv_from(&mut packet) {
        Ok(received) => received,
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // SAFETY: the kernel has written the first `length` bytes.
    let packet: &[u8] = unsafe { std::slice::from_raw_parts(packet.as_ptr().cast(), length) };
    // An IPv4 socket gets the IP header, too (raw(7)); its length is in words of four bytes.
    let header = match (gateway, packet.first()) {
        (IpAddr::V4(_), Some(first)) => usize::from(first & 0x0f) * 4,
        _ => 0,
    };
    let from_gateway = from.as_socket().is_some_and(|from| from.ip() == gateway);
    Ok(packet.get(header..).filter(|_| from_gateway).and_then(|segment| answered_port(segment, sequence)))
}

/// Returns the port that a segment answers from, if it answers the SYN with that number.
fn answered_port(segment: &[u8], sequence: u32) -> Option<u16> {
    let port = u16::from_be_bytes([*segment.first()?, *segment.get(1)?]);
    let acknowledged = segment.get(ACKNOWLEDGED..)?.first_chunk().copied().map(u32::from_be_bytes)?;
    let flags = segment.get(FLAGS)?;
    let answers = flags & ACK != 0 && flags & (RST | SYN) != 0;
    (answers && acknowledged == sequence.wrapping_add(1)).then_some(port)
}

/// Builds a SYN without options.
fn syn(source: IpAddr, gateway: IpAddr, port: u16, sequence: u32) -> [u8; HEADER] {
    const WINDOW: u16 = 64_240;
    let mut segment = [0; HEADER];
    segment[0..2].copy_from_slice(&PROBE_PORT.to_be_bytes());
    segment[2..4].copy_from_slice(&port.to_be_bytes());
    segment[4..8].copy_from_slice(&sequence.to_be_bytes());
    segment[12] = u8::try_from(HEADER / 4).unwrap_or_default() << 4;
    segment[FLAGS] = SYN;
    segment[14..16].copy_from_slice(&WINDOW.to_be_bytes());
    let checksum = checksum(source, gateway, &segment);
    segment[CHECKSUM..CHECKSUM + 2].copy_from_slice(&checksum.to_be_bytes());
    segment
}

/// Computes the Internet checksum over pseudo-header and segment (RFC 9293, section 3.1; RFC 8200, section
/// 8.1).
fn checksum(source: IpAddr, gateway: IpAddr, segment: &[u8; HEADER]) -> u16 {
    const TCP: u16 = 6;
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let bytes = [octets(source), octets(gateway), segment.to_vec()].concat();
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let length = u32::try_from(HEADER).unwrap_or_default();
    let mut sum = words.sum::<u32>() + u32::from(TCP) + length;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A correct segment sums up to zero together with its checksum.
    #[test]
    fn the_checksum_is_correct() {
        for (source, gateway) in [("172.18.255.254", "172.18.0.1"), ("fd00::ffff", "fd00::1")] {
            let (source, gateway) = (source.parse().unwrap(), gateway.parse().unwrap());
            for port in [1, 80, 65_535] {
                assert_eq!(checksum(source, gateway, &syn(source, gateway, port, 0x0102_0304)), 0);
            }
        }
    }

    #[test]
    fn only_answers_count() {
        let mut segment = [0; HEADER];
        segment[..2].copy_from_slice(&80_u16.to_be_bytes());
        for (flags, answers) in
            [(SYN | ACK, true), (RST | ACK, true), (RST, false), (SYN, false), (ACK, false)]
        {
            segment[FLAGS] = flags;
            segment[ACKNOWLEDGED..ACKNOWLEDGED + 4].copy_from_slice(&0_u32.to_be_bytes());
            assert_eq!(answered_port(&segment, u32::MAX), answers.then_some(80), "{flags:#x}");
            assert_eq!(answered_port(&segment, 6), None, "an answer to something else");
        }
        assert_eq!(answered_port(&segment[..10], u32::MAX), None);
    }
}

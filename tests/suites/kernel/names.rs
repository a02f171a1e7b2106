//! Whom the service takes its peer for, when things do not go the usual way. What is told is told for good: a
//! service may accept, or ask, long after the relay has done its part.

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{kernel, patience, pins, service};
use lbridge_tests::tests;
use nix::sys::socket::{self, SockaddrStorage, setsockopt, sockopt};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        relayed_name_outlives_a_reset,
        relayed_name_outlives_the_rule,
        local_names_are_for_steered_connections_alone,
        a_local_name_outlives_the_rule,
        the_host_at_its_own_gateway_is_not_named_local,
        a_simultaneous_open_is_not_named_local: [Need::WholeSystem],
        ipv6_container_is_not_shown_as_some_ipv4_address,
        relays_leave_the_ports_of_the_host_alone,
        whoever_comes_by_another_bridge_is_no_local_peer: [Need::TellsInterfaces],
        relay_that_lingers_is_closed_by_deny,
        sockets_of_other_protocols_keep_their_peers,
        names_of_connections_that_fail_do_not_stay,
        a_local_client_with_the_relays_end_is_no_container: [Need::PortRanges],
        a_name_goes_with_the_relays_socket: [Need::PortRanges],
    ]
}

/// A `[::1]` service that has not accepted anything yet, and a rule that relays to it. IPv6 has no second
/// loopback address, so only the name hooks keep such a service from taking a container for a local client.
fn busy_service() -> Result<(Scene, TcpListener)> {
    let scene = Scene::new()?;
    let listener = scene.lab.host().run(|| Ok(TcpListener::bind("[::1]:8080")?))?;
    scene.allow(&["8080"])?;
    scene.must_be(8080, "relayed")?;
    Ok((scene, listener))
}

fn is_container(scene: &Scene, peer: SocketAddr) -> Result<()> {
    ensure!(peer.ip().to_canonical() == scene.container_ip, "the service takes its peer for {peer}");
    Ok(())
}

/// Long enough for the relay to carry what it was sent and to have forgotten the connection.
const SETTLED: Duration = Duration::from_millis(500);

fn relayed_name_outlives_a_reset() -> Result<()> {
    let (scene, listener) = busy_service()?;
    let mut stream = client::dial(&scene.container, None, scene.gateway(8080), Duration::from_secs(2))?;
    stream.write_all(b"do it")?;
    thread::sleep(SETTLED);
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, sockopt::Linger, &at_once)?;
    drop(stream);
    thread::sleep(SETTLED);
    let (_stream, peer) = listener.accept().context("a connection that was reset is still accepted")?;
    is_container(&scene, peer)
}

fn relayed_name_outlives_the_rule() -> Result<()> {
    let (scene, listener) = busy_service()?;
    let dial = || client::dial(&scene.container, None, scene.gateway(8080), Duration::from_secs(2));
    let (_accepted, _queued) = (dial()?, dial()?);
    let (accepted, _) = listener.accept()?;
    scene.deny(&["8080"])?;
    scene.refused(8080)?;
    thread::sleep(SETTLED);
    is_container(&scene, accepted.peer_addr()?).context("of a connection that was accepted before")?;
    let (queued, peer) = listener.accept()?;
    is_container(&scene, peer).context("of a connection that was queued before, from accept()")?;
    is_container(&scene, queued.peer_addr()?)
        .context("of a connection that was queued before, from getpeername()")
}

/// Connections with the ends of steered ones: made before the rule, and by the host itself.
fn local_names_are_for_steered_connections_alone() -> Result<()> {
    let scene = Scene::new()?;
    let (gateway, wait) = (scene.gateway(6379), Duration::from_secs(2));
    let before = scene.lab.host().run(|| Ok(TcpListener::bind(gateway)?))?;
    let _client = client::dial(&scene.container, None, gateway, wait)?;
    let (accepted, _) = before.accept()?;
    drop(before);
    let inside = SocketAddr::new(scene.container_ip, 7000);
    let container = scene.container.run(|| Ok(TcpListener::bind(inside)?))?;
    let _service = scene.service("redis", "127.0.0.1:6379")?;
    scene.allow(&["6379", "--source", "loopback"])?;
    let greeting = scene.served(6379, "redis")?;
    ensure!(greeting.peer.ip().is_loopback(), "the hooks are there: {greeting:?}");
    let outgoing = scene.lab.host().run(|| {
        let socket = socket::socket(
            socket::AddressFamily::Inet,
            socket::SockType::Stream,
            socket::SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(gateway))?;
        socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(inside))?;
        Ok(TcpStream::from(socket))
    })?;
    container.accept()?;
    for (socket, what, peer) in [
        (&accepted, "a connection from before", accepted.peer_addr()?),
        (&outgoing, "the host's own", inside),
    ] {
        is_container(&scene, socket.peer_addr()?).context(what)?;
        ensure!(socket.peer_addr()? == peer && socket.local_addr()? == gateway, "{what}: {socket:?}");
    }
    Ok(())
}

/// Another service of the host's at the dialled port, which the host itself reaches.
fn the_host_at_its_own_gateway_is_not_named_local() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let _own = scene.service("own", "0.0.0.0:8081")?;
    scene.allow(&["8081=8080", "--source", "loopback"])?;
    scene.served(8081, "service")?;
    let greeting = client::served_by(scene.lab.host(), scene.gateway(8081), "own")?;
    ensure!(
        greeting.peer.ip() == scene.bridge.gateway() && greeting.local == scene.gateway(8081),
        "{greeting:?}"
    );
    Ok(())
}

/// A socket that connects from the gateway's address and the dialled port, and meets a SYN.
fn a_simultaneous_open_is_not_named_local() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("redis", "127.0.0.1:6379")?;
    scene.allow(&["6379", "--source", "loopback"])?;
    scene.served(6379, "redis")?;
    let (gateway, inside) = (scene.gateway(6379), SocketAddr::new(scene.container_ip, 7000));
    // The container does not hear the host's SYN.
    scene.container.shell(
        "nft 'table ip t \
         { chain i { type filter hook input priority 0; tcp flags & (syn|ack) == syn drop; }; }'",
    )?;
    let connect = |from: &NetNs, own: SocketAddr, to: SocketAddr| {
        from.run(|| {
            let socket = kernel::stream_socket(false, false)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(own))?;
            let stream = TcpStream::from(socket);
            stream.set_nonblocking(true)?;
            let _ = socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(to));
            Ok(stream)
        })
    };
    let host = connect(scene.lab.host(), gateway, inside)?;
    let container = connect(&scene.container, inside, gateway)?;
    patience::until("they are connected", || Ok(container.peer_addr().ok().and(host.peer_addr().ok())))?;
    ensure!(host.peer_addr()? == inside && host.local_addr()? == gateway, "{host:?}");
    Ok(())
}

fn a_local_name_outlives_the_rule() -> Result<()> {
    let scene = Scene::new()?;
    let listener = scene.lab.host().run(|| Ok(TcpListener::bind("127.0.0.1:6379")?))?;
    scene.allow(&["6379", "--source", "loopback"])?;
    let _client = client::dial(&scene.container, None, scene.gateway(6379), Duration::from_secs(2))?;
    let (accepted, peer) = listener.accept()?;
    scene.deny(&["6379"])?;
    scene.refused(6379)?;
    ensure!(peer.ip().is_loopback() && accepted.peer_addr()? == peer, "{peer}, then {accepted:?}");
    ensure!(accepted.local_addr()?.to_string() == "127.0.0.1:6379", "{accepted:?}");
    Ok(())
}

/// The last four bytes of this container's IPv6 address read 127.0.0.1.
fn ipv6_container_is_not_shown_as_some_ipv4_address() -> Result<()> {
    let scene = Scene::with(("fd07::1/64", "fd07::7f00:1/64"), Options::default())?;
    let _service = scene.service("four", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.must_be(8080, "relayed")?;
    let greeting = scene.served(8080, "four")?;
    for seen in [greeting.accept, greeting.peer] {
        let stands_in = matches!(seen.ip(), IpAddr::V4(ip) if ip.octets()[0] == 127 && ip.octets()[1] >= 128);
        ensure!(stands_in, "the service takes its peer for {seen}");
    }
    Ok(())
}

/// A port that bind() has chosen is lost to every connect() of the namespace: a container could use them all
/// up.
fn relays_leave_the_ports_of_the_host_alone() -> Result<()> {
    let scene = Scene::new()?;
    scene.lab.host().sysctl("net/ipv4/ip_local_port_range", "40000 40019")?;
    let _relayed = scene.service("relayed", "127.0.0.1:8080")?;
    let _other = scene.service("other", "127.0.0.1:9999")?;
    scene.allow(&["8080", "--path", "relay"])?;
    let connect = || client::connect(&scene.container, scene.gateway(8080));
    let _open = (0..20).map(|_| connect()).collect::<Result<Vec<_>>>()?;
    client::served_by(scene.lab.host(), "127.0.0.1:9999".parse()?, "other")?;
    Ok(())
}

/// Under `--source loopback` the steered connections are TCP.
fn sockets_of_other_protocols_keep_their_peers() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let socket = scene.lab.host().run(|| {
        let socket = std::net::UdpSocket::bind(scene.gateway(8081))?;
        socket.connect(SocketAddr::new(scene.container_ip, 5555))?;
        Ok(socket)
    })?;
    scene.allow(&["8081=8080", "--source", "loopback"])?;
    ensure!(scene.served(8081, "service")?.peer.ip().to_string() == "127.0.0.1");
    ensure!(socket.peer_addr()?.ip() == scene.container_ip, "{:?}", socket.peer_addr());
    ensure!(socket.local_addr()? == scene.gateway(8081), "{:?}", socket.local_addr());
    Ok(())
}

fn relay_that_lingers_is_closed_by_deny() -> Result<()> {
    let scene = Scene::new()?;
    let _six = scene.service("six", "[::1]:8080")?;
    scene.allow(&["8080"])?;
    scene.must_be(8080, "relayed")?;
    scene.served(8080, "six")?;
    let _four = scene.service("four", "127.0.0.1:8080")?;
    scene.wait_for(8080, "steered")?;
    scene.served(8080, "four")?;
    scene.deny(&["8080"])?;
    for _ in 0..20 {
        scene.refused(8080)?;
    }
    let host = scene.lab.host();
    ensure!(!host.listens("10.7.0.1:8080".parse()?)? && !host.has_hidden_relays()?, "the relay is closed");
    Ok(())
}

/// A service whose backlog is full lets connects fail after the kernel has entered their names.
fn names_of_connections_that_fail_do_not_stay() -> Result<()> {
    let scene = Scene::new()?;
    let listener = scene.lab.host().run(|| {
        let listener = TcpListener::bind("127.0.0.1:8080")?;
        // As many as have room: one more than the backlog says.
        socket::listen(&listener, socket::Backlog::new(0)?)?;
        Ok(listener)
    })?;
    scene.allow(&["8080", "--path", "relay"])?;
    let dial = || client::dial(&scene.container, None, scene.gateway(8080), patience::seconds(5));
    let _served = dial()?;
    let names = || -> Result<usize> {
        let maps = pins::entries(scene.daemon.bpffs())?;
        let peers = maps.iter().find(|(name, _)| name.ends_with("RELAY_PEERS"));
        peers.map(|(_, entries)| *entries).context("no map of names")
    };
    patience::until("the first has its name", || Ok((names()? == 1).then_some(())))?;
    let waiting = (0..20).map(|_| dial()).collect::<std::io::Result<Vec<_>>>()?;
    patience::until("their names are entered", || Ok((names()? > 10).then_some(())))?;
    // The relay gives up after 5 s; some leave before.
    for client in &waiting[..10] {
        client.shutdown(std::net::Shutdown::Both)?;
    }
    patience::until("the others' names are gone", || Ok((names()? == 1).then_some(())))?;
    drop((waiting, listener));
    Ok(())
}

/// A container that is on two bridges dials the gateway of one by the other, with its address on the first:
/// there is no rule for that, and the name hooks know no interface.
fn whoever_comes_by_another_bridge_is_no_local_peer() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    let wild = scene.service("for everybody", "0.0.0.0:8081")?;
    scene.allow(&["8081=8080", "--source", "loopback"])?;
    ensure!(scene.served(8081, "service")?.peer.ip().to_string() == "127.0.0.1");
    let lab1 = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let both = scene.lab.container(&lab1, "10.8.0.2/24 10.7.0.9/32")?;
    both.ip("route add 10.7.0.1 via 10.8.0.1 src 10.7.0.9")?;
    // So that what is answered finds the way back.
    scene.lab.host().ip("route add 10.7.0.9 via 10.8.0.2")?;
    let to = scene.gateway(8081);
    client::not_served(&both, None, to)?;
    ensure!(wild.accepted() == 0, "whoever it takes its peer for");
    // Others are none of this.
    both.ip("route del 10.7.0.1")?;
    client::served_by(&both, to, "for everybody")?;
    scene.deny(&["8081"])?;
    scene.served(8081, "for everybody").map(drop)
}

/// The relay's ends of established connections to a port of the host's, oldest first.
fn relay_ends(scene: &Scene, port: u16) -> Result<Vec<SocketAddr>> {
    let listed = scene.lab.host().shell(&format!("ss -Htn state established dport = :{port}"))?;
    let ends = listed.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse().ok());
    Ok(ends.filter(|end: &SocketAddr| end.ip().is_loopback()).collect())
}

/// A local user's connection to `to` that has the very address and port that `end` says, although another
/// socket has them.
fn connect_as(scene: &Scene, end: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    /// include/uapi/linux/in.h, since Linux 6.3: the highest port in the upper half, the lowest in the lower
    /// one.
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
    scene.lab.host().run(|| {
        let fd = kernel::stream_socket(to.is_ipv6(), false)?;
        setsockopt(&fd, sockopt::IpBindAddressNoPort, &true)?;
        let range = u32::from(end.port()) << 16 | u32::from(end.port());
        // SAFETY: the option takes 4 bytes, which outlive the call.
        let done = unsafe {
            let (value, length) = (std::ptr::from_ref(&range).cast(), 4);
            libc::setsockopt(fd.as_raw_fd(), libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, value, length)
        };
        nix::errno::Errno::result(done).context("IP_LOCAL_PORT_RANGE")?;
        socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(end.ip(), 0)))?;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(to)).context("connect")?;
        let stream = TcpStream::from(fd);
        ensure!(stream.local_addr()? == end, "{:?} is not {end}", stream.local_addr());
        Ok(stream)
    })
}

/// Whoever binds the address and port that a relay connects from, and dials another service.
fn a_local_client_with_the_relays_end_is_no_container() -> Result<()> {
    for (relayed, mptcp, other) in [
        ("127.0.0.1:8080", false, "127.0.0.1:9090"),
        ("127.0.0.1:8080", true, "127.0.0.1:9090"),
        ("[::1]:8080", false, "[::1]:9090"),
    ] {
        let scene = Scene::new()?;
        let options = service::Options { mptcp, ..service::Options::new("relayed", relayed)? };
        let _relayed = scene.service_with(&options)?;
        let other: SocketAddr = other.parse()?;
        let listener = scene.lab.host().run(|| Ok(TcpListener::bind(other)?))?;
        scene.allow(&["8080", "--path", "relay"])?;
        let connection = client::connect(&scene.container, scene.gateway(8080))?;
        ensure!(
            connection.greeting.peer.ip().to_canonical() == scene.container_ip,
            "{:?}",
            connection.greeting
        );
        let [end] = relay_ends(&scene, 8080)?[..] else { bail!("one relayed connection") };
        let stream = connect_as(&scene, end, other)?;
        let (accepted, peer) = listener.accept()?;
        for seen in [peer, accepted.peer_addr()?] {
            ensure!(seen == end, "the other service takes {end} for {seen}");
        }
        drop((stream, connection));
    }
    Ok(())
}

/// The relay has no time to clean up: the kernel takes the name when the relay's socket closes, and its ends
/// are free for others.
fn a_name_goes_with_the_relays_socket() -> Result<()> {
    let scene = Scene::new()?;
    let service: SocketAddr = "127.0.0.1:8080".parse()?;
    let listener = scene.lab.host().run(|| Ok(TcpListener::bind(service)?))?;
    scene.allow(&["8080", "--path", "relay"])?;
    let _client = client::dial(&scene.container, None, scene.gateway(8080), Duration::from_secs(2))?;
    let (accepted, peer) = listener.accept()?;
    is_container(&scene, peer)?;
    let [end] = relay_ends(&scene, 8080)?[..] else { bail!("one relayed connection") };
    scene.daemon.paused(|| {
        setsockopt(&accepted, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        drop(accepted);
        let stream = connect_as(&scene, end, service)?;
        let (accepted, peer) = listener.accept()?;
        for seen in [peer, accepted.peer_addr()?] {
            ensure!(seen == end, "the service takes a local client for {seen}");
        }
        drop(stream);
        Ok(())
    })
}

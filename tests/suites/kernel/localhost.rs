//! `--localhost`: in the network's containers localhost leads to the host's service; in nobody else's, and
//! not where the container has a service of its own.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Child;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Connection};
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::{self, Service};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{kernel, patience, pins};
use lbridge_tests::tests;
use nix::mount::{MsFlags, mount, umount};
use nix::sys::socket::{self, SockaddrStorage, sockopt};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_kernel_that_names_no_namespaces_serves_the_gateway_alone,
        both_addresses_lead_to_the_service: [Need::NamesNamespaces],
        the_client_sees_what_it_dialled: [Need::NamesNamespaces],
        a_socket_that_is_connected_anew_is_not_misnamed: [Need::NamesNamespaces],
        an_mptcp_client_is_served: [Need::NamesNamespaces, Need::Mptcp],
        an_ipv6_network_is_led_to_its_own_gateway: [Need::NamesNamespaces],
        a_relayed_rule_serves_localhost_too: [Need::NamesNamespaces],
        what_the_container_listens_on_is_its_own: [Need::NamesNamespaces],
        a_container_that_was_a_client_is_no_listener: [Need::NamesNamespaces],
        a_socket_that_is_bound_to_localhost_is_left_alone: [Need::NamesNamespaces],
        other_ports_and_addresses_are_left_alone: [Need::NamesNamespaces],
        datagrams_are_left_alone: [Need::NamesNamespaces],
        nobody_elses_localhost_is_touched: [Need::NamesNamespaces],
        a_container_on_two_networks_is_served_by_both: [Need::NamesNamespaces],
        deny_takes_effect_at_once: [Need::NamesNamespaces],
        without_localhost_nothing_is_attached: [Need::NamesNamespaces],
        a_dead_daemon_goes_on_serving: [Need::NamesNamespaces],
        a_daemon_forgets_who_left_while_it_was_away: [Need::NamesNamespaces],
        a_namespace_is_followed_from_bridge_to_bridge: [Need::NamesNamespaces],
        a_namespace_that_is_found_late_is_served: [Need::NamesNamespaces],
        a_link_that_leaves_the_host_is_no_other_port: [Need::NamesNamespaces],
        the_rule_of_the_gateway_decides: [Need::NamesNamespaces],
        a_bridge_of_a_nested_namespace_is_none_of_the_hosts: [Need::NamesNamespaces],
    ]
}

/// A process inside, which is how a namespace without a name is found.
struct Occupant(Child);

impl Occupant {
    fn of(netns: &NetNs) -> Result<Occupant> {
        Ok(Occupant(netns.command("sleep").arg("1000000").spawn()?))
    }
}

impl Drop for Occupant {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn v4(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn v6(port: u16) -> SocketAddr {
    SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port))
}

/// As Java and others dial on a socket for IPv6.
fn mapped(port: u16) -> SocketAddr {
    SocketAddr::from((std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped(), port))
}

/// A scene with a rule for 8080, and somebody in the container.
fn scene() -> Result<(Scene, Occupant, Service)> {
    let scene = Scene::new()?;
    let occupant = Occupant::of(&scene.container)?;
    let service = scene.service("host's", "127.0.0.1:8080")?;
    scene.allow(&["8080", "--localhost"])?;
    Ok((scene, occupant, service))
}

fn soon(netns: &NetNs, to: SocketAddr, service: &str) -> Result<()> {
    patience::until(&format!("{to} is {service}"), || {
        Ok(client::served_by(netns, to, service).ok().map(drop))
    })
}

/// Has become so, or does soon: netlink tells, the daemon does.
fn soon_refused(netns: &NetNs, to: SocketAddr) -> Result<()> {
    patience::until(&format!("{to} refuses"), || Ok(client::refused(netns, to).ok()))
}

fn entries(scene: &Scene, map: &str) -> Result<usize> {
    let maps = pins::entries(scene.daemon.bpffs())?;
    maps.iter().find(|(name, _)| name.ends_with(map)).map(|(_, count)| *count).context("no such map")
}

/// A veth end of the host moves elsewhere, whose other end has, where that is, the number of a port on the
/// bridge.
fn a_link_that_leaves_the_host_is_no_other_port() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    soon(&scene.container, v4(8080), "host's")?;
    let host = scene.lab.host();
    let ports = host.ip_output("-o link show master lab0")?;
    let port = ports.split(':').next().context("a port")?.to_owned();
    let (there, elsewhere) = (NetNs::new()?, NetNs::new()?);
    let (here, other) = (Occupant::of(host)?, Occupant::of(&elsewhere)?);
    there.ip(&format!("link add stays index {port} type veth peer name leaves netns {}", here.0.id()))?;
    host.ip(&format!("link set leaves netns {}", other.0.id()))?;
    // The last that is told of the links.
    thread::sleep(Duration::from_secs(1));
    client::served_by(&scene.container, v4(8080), "host's")?;
    client::refused(&elsewhere, v4(8080))?;
    ensure!(entries(&scene, "REDIRECT_NETNS")? == 1, "the container alone");
    Ok(())
}

fn a_kernel_that_names_no_namespaces_serves_the_gateway_alone() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    if kernel::version() >= (5, 14) {
        return scene.must_be(8080, "steered").map(drop);
    }
    let state = scene.must_be(8080, "blocked")?;
    state.must_be_because("no_connect_hooks")?;
    scene.served(8080, "host's")?;
    client::refused(&scene.container, v4(8080))
}

fn both_addresses_lead_to_the_service() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    for to in [v4(8080), v6(8080), mapped(8080)] {
        let greeting = client::served_by(&scene.container, to, "host's")?;
        ensure!(greeting.peer.ip().to_canonical() == scene.container_ip, "{to}: {greeting:?}");
    }
    scene.must_be(8080, "steered")?;
    let rule = scene.daemon.rule("bridge:lab0", 8080)?.context("a rule")?;
    let dials = rule["dials"].as_array().context("dials")?;
    ensure!(dials.len() == 2, "{rule}");
    for (dial, address) in dials.iter().zip(["127.0.0.1", "::1"]) {
        ensure!(dial["address"] == address && dial["state"] == "steered", "{rule}");
        ensure!(dial["containers"] == 1 && dial["gateway"] == "10.7.0.1", "{rule}");
    }
    let status = scene.daemon.cli(&["status"])?;
    ensure!(status.stdout.contains("127.0.0.1:8080 in 1 container "), "{status:?}");
    let explained = scene.daemon.cli(&["explain", "bridge:lab0", "8080"])?;
    ensure!(explained.stdout.contains("127.0.0.1:8080 in 1 container leads to 10.7.0.1"), "{explained:?}");
    Ok(())
}

fn the_client_sees_what_it_dialled() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    for to in [v4(8080), v6(8080), mapped(8080), scene.gateway(8080)] {
        let stream = client::dial(&scene.container, None, to, patience::seconds(5))?;
        ensure!(stream.peer_addr()? == to, "{to} is shown as {}", stream.peer_addr()?);
    }
    Ok(())
}

fn a_socket_that_is_connected_anew_is_not_misnamed() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    let _other = scene.service("other", "10.7.0.1:9090")?;
    scene.container.run(|| {
        let fd = kernel::stream_socket(false, false)?;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(v4(8080)))?;
        // SAFETY: an address of that family is no longer than this.
        let unconnected: libc::sockaddr = unsafe { std::mem::zeroed() };
        let length = libc::socklen_t::try_from(size_of::<libc::sockaddr>())?;
        // SAFETY: the address is as long as we say.
        let result = unsafe { libc::connect(fd.as_raw_fd(), &raw const unconnected, length) };
        nix::errno::Errno::result(result).context("AF_UNSPEC")?;
        let to: SocketAddr = "10.7.0.1:9090".parse()?;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        let stream = TcpStream::from(fd);
        ensure!(stream.peer_addr()? == to, "shown as {}", stream.peer_addr()?);
        Ok(())
    })
}

fn an_mptcp_client_is_served() -> Result<()> {
    if !kernel::has_mptcp() {
        return Ok(());
    }
    let (scene, _occupant, _service) = scene()?;
    for to in [v4(8080), v6(8080)] {
        let stream = client::dial_mptcp(&scene.container, to)?;
        let seen = stream.peer_addr()?;
        // The hook saw the subflow's socket, the application has another: a limit.
        ensure!(seen == to || seen.ip().to_canonical() == scene.bridge.gateway(), "{seen}");
        ensure!(Connection::greeted(stream)?.greeting.service == "host's");
    }
    Ok(())
}

fn an_ipv6_network_is_led_to_its_own_gateway() -> Result<()> {
    let scene = Scene::with(("10.7.0.1/24 fd07::1/64", "10.7.0.2/24 fd07::2/64"), Options::default())?;
    let _occupant = Occupant::of(&scene.container)?;
    let _four = scene.service("four", "127.0.0.1:8080")?;
    let _six = scene.service("six", "[::1]:8080")?;
    scene.allow(&["8080", "--localhost"])?;
    client::served_by(&scene.container, v4(8080), "four")?;
    client::served_by(&scene.container, v6(8080), "six")?;
    // One for IPv6 alone gets there, too.
    scene.container.run(|| {
        let fd = kernel::stream_socket(true, false)?;
        socket::setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(v6(8080)))?;
        ensure!(TcpStream::from(fd).peer_addr()? == v6(8080));
        Ok(())
    })
}

fn a_relayed_rule_serves_localhost_too() -> Result<()> {
    let scene = Scene::new()?;
    let _occupant = Occupant::of(&scene.container)?;
    let _six = scene.service("six", "[::1]:8080")?;
    scene.allow(&["80=8080", "--localhost"])?;
    scene.must_be(80, "relayed")?;
    for to in [v4(80), v6(80)] {
        let greeting = client::served_by(&scene.container, to, "six")?;
        ensure!(greeting.peer.ip().to_canonical() == scene.container_ip, "{greeting:?}");
    }
    Ok(())
}

fn what_the_container_listens_on_is_its_own() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    for (address, own_v6) in
        [("127.0.0.1:8080", false), ("0.0.0.0:8080", false), ("[::]:8080", true), ("[::1]:8080", true)]
    {
        let own = Service::start(&scene.container, "its own", address)?;
        let is_v4 = address != "[::1]:8080";
        for to in [v4(8080), mapped(8080)] {
            client::served_by(&scene.container, to, if is_v4 { "its own" } else { "host's" })
                .with_context(|| format!("{to} beside {address}"))?;
        }
        client::served_by(&scene.container, v6(8080), if own_v6 { "its own" } else { "host's" })
            .with_context(|| format!("beside {address}"))?;
        own.stop();
        client::served_by(&scene.container, v4(8080), "host's")?;
    }
    if kernel::has_mptcp() {
        let options = service::Options { mptcp: true, ..service::Options::new("its own", "0.0.0.0:8080")? };
        let _own = Service::start_with(&scene.container, &options)?;
        client::served_by(&scene.container, v4(8080), "its own")?;
    }
    Ok(())
}

/// A port that is some connection's own end, in use or in `TIME_WAIT`, is not listened on.
fn a_container_that_was_a_client_is_no_listener() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    let own = Service::start(&scene.container, "its own", "127.0.0.1:8080")?;
    let mut open = client::connect(&scene.container, v4(8080))?;
    ensure!(open.greeting.service == "its own");
    own.stop();
    client::served_by(&scene.container, v4(8080), "host's").context("beside an open connection")?;
    open.echo(b"goes on")?;
    open.finish()?;
    client::served_by(&scene.container, v4(8080), "host's").context("beside one in TIME_WAIT")?;
    Ok(())
}

fn a_socket_that_is_bound_to_localhost_is_left_alone() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    for (source, to) in [("127.0.0.1", v4(8080)), ("::1", v6(8080)), ("127.0.0.5", v4(8080))] {
        match client::attempt_from(&scene.container, Some(source.parse()?), to) {
            client::Attempt::Refused(_) => {}
            other => anyhow::bail!("from {source} to {to}: {other:?}"),
        }
    }
    // Bound to nothing, or to its own address, it gets there.
    for source in [IpAddr::from([0, 0, 0, 0]), scene.container_ip] {
        let stream = client::dial(&scene.container, Some(source), v4(8080), patience::seconds(5))?;
        ensure!(Connection::greeted(stream)?.greeting.service == "host's");
    }
    Ok(())
}

fn other_ports_and_addresses_are_left_alone() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    let _other = scene.service("other", "127.0.0.1:8081")?;
    for to in [v4(8081), v6(8081), "127.0.0.2:8080".parse()?, "0.0.0.0:8080".parse()?] {
        client::refused(&scene.container, to)?;
    }
    client::served_by(scene.lab.host(), v4(8080), "host's")?;
    client::served_by(scene.lab.host(), v4(8081), "other")?;
    Ok(())
}

fn datagrams_are_left_alone() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    scene.container.run(|| {
        let server = UdpSocket::bind(v4(8080))?;
        let client = UdpSocket::bind(v4(0))?;
        client.connect(v4(8080))?;
        client.send(b"datagram")?;
        server.set_read_timeout(Some(patience::seconds(5)))?;
        ensure!(server.recv(&mut [0; 16])? == 8);
        let unbound = UdpSocket::bind("0.0.0.0:0")?;
        unbound.connect(v4(8080))?;
        ensure!(unbound.peer_addr()? == v4(8080) && unbound.local_addr()?.ip() == v4(0).ip());
        Ok(())
    })
}

fn nobody_elses_localhost_is_touched() -> Result<()> {
    let (scene, _occupant, service) = scene()?;
    let lab1 = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let other = scene.lab.container(&lab1, "10.8.0.2/24")?;
    let _other = Occupant::of(&other)?;
    let alone = NetNs::new()?;
    let _alone = Occupant::of(&alone)?;
    for netns in [&other, &alone] {
        client::refused(netns, v4(8080))?;
        client::refused(netns, v6(8080))?;
    }
    // A rule without it, on the same service.
    scene.daemon.allow(&["bridge:lab1", "8080"])?;
    client::served_by(&other, "10.8.0.1:8080".parse()?, "host's")?;
    client::refused(&other, v4(8080))?;
    let accepted = service.accepted();
    client::served_by(scene.lab.host(), v4(8080), "host's")?;
    ensure!(service.accepted() == accepted + 1);
    Ok(())
}

fn a_container_on_two_networks_is_served_by_both() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    let _other = scene.service("other", "127.0.0.1:9090")?;
    scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    plug(&scene.lab, "second", "lab1", &scene.container, "10.8.0.2/24")?;
    scene.daemon.allow(&["bridge:lab1", "9090", "8080=9090", "--localhost"])?;
    soon(&scene.container, v4(9090), "other")?;
    // Of two that have it the older bridge's.
    client::served_by(&scene.container, v4(8080), "host's")?;
    scene.deny(&["8080"])?;
    client::served_by(&scene.container, v4(8080), "other")?;
    Ok(())
}

/// A further link from a bridge into a namespace.
fn plug(lab: &Lab, name: &str, bridge: &str, netns: &NetNs, address: &str) -> Result<()> {
    let fd = std::os::fd::AsFd::as_fd(netns).as_raw_fd();
    let pid = std::process::id();
    lab.host().ip(&format!("link add {name} type veth peer name {name} netns /proc/{pid}/fd/{fd}"))?;
    lab.host().ip(&format!("link set {name} master {bridge}"))?;
    lab.host().ip(&format!("link set {name} up"))?;
    netns.ip(&format!("addr add {address} dev {name}"))?;
    netns.ip(&format!("link set {name} up"))
}

fn deny_takes_effect_at_once() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    let mut open = client::connect(&scene.container, v4(8080))?;
    for _ in 0..5 {
        scene.deny(&["8080"])?;
        client::refused(&scene.container, v4(8080))?;
        client::refused(&scene.container, v6(8080))?;
        ensure!(
            entries(&scene, "REDIRECT_NETNS")? == 0 && entries(&scene, "REDIRECTS")? == 0,
            "nothing is left"
        );
        scene.allow(&["8080", "--localhost"])?;
        client::served_by(&scene.container, v4(8080), "host's")?;
    }
    // The same rule without it.
    scene.deny(&["8080"])?;
    scene.allow(&["8080"])?;
    client::refused(&scene.container, v4(8080))?;
    scene.served(8080, "host's")?;
    open.echo(b"goes on")
}

fn without_localhost_nothing_is_attached() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let hooks = || -> Result<usize> {
        let pins = pins::files(scene.daemon.bpffs())?;
        Ok(pins.iter().filter(|pin| pin.to_string_lossy().contains("link_redirect")).count())
    };
    scene.allow(&["8080"])?;
    ensure!(hooks()? == 0);
    scene.allow(&["8081=8080", "--localhost"])?;
    ensure!(hooks()? == 2);
    scene.deny(&["8081"])?;
    ensure!(hooks()? == 0);
    Ok(())
}

fn a_dead_daemon_goes_on_serving() -> Result<()> {
    let (mut scene, _occupant, _service) = scene()?;
    let open = client::dial(&scene.container, None, v4(8080), patience::seconds(5))?;
    scene.daemon.kill9()?;
    client::served_by(&scene.container, v4(8080), "host's")?;
    scene.daemon.restart()?;
    ensure!(open.peer_addr()? == v4(8080), "of a connection of before: {}", open.peer_addr()?);
    client::served_by(&scene.container, v4(8080), "host's")?;
    // Never a gap.
    for _ in 0..3 {
        let stop = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let dialling = scope.spawn(|| -> Result<u32> {
                let mut served = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    client::served_by(&scene.container, v4(8080), "host's")?;
                    served += 1;
                }
                Ok(served)
            });
            let restarted = scene.daemon.restart();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            let served = dialling.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            restarted?;
            ensure!(served.context("while the daemon restarts")? > 0);
            Ok(())
        })?;
    }
    Ok(())
}

fn a_daemon_forgets_who_left_while_it_was_away() -> Result<()> {
    let (mut scene, _occupant, _service) = scene()?;
    let _other = scene.service("other", "127.0.0.1:9090")?;
    scene.daemon.kill9()?;
    ensure!(entries(&scene, "REDIRECT_NETNS")? == 1);
    scene.container.ip("link del eth0")?;
    let newcomer = scene.lab.container(&scene.bridge, "10.7.0.3/24")?;
    let _newcomer = Occupant::of(&newcomer)?;
    client::refused(&newcomer, v4(8080))?;
    scene.daemon.restart()?;
    soon(&newcomer, v4(8080), "host's")?;
    soon_refused(&scene.container, v4(8080))?;
    ensure!(entries(&scene, "REDIRECT_NETNS")? == 1);
    Ok(())
}

fn a_namespace_is_followed_from_bridge_to_bridge() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let guest = NetNs::new()?;
    let _guest = Occupant::of(&guest)?;
    plug(&scene.lab, "moves", "lab1", &guest, "10.7.0.9/24")?;
    guest.ip("route replace default via 10.7.0.1 dev moves onlink")?;
    client::refused(&guest, v4(8080))?;
    for _ in 0..3 {
        scene.lab.host().ip("link set moves master lab0")?;
        soon(&guest, v4(8080), "host's")?;
        scene.lab.host().ip("link set moves nomaster")?;
        soon_refused(&guest, v4(8080))?;
        scene.lab.host().ip("link set moves master lab1")?;
        client::refused(&guest, v4(8080))?;
    }
    scene.lab.host().ip("link set moves master lab0")?;
    soon(&guest, v4(8080), "host's")?;
    // Whoever is inside may do what he likes with his end.
    guest.ip("link set moves down")?;
    guest.ip("link set moves name other")?;
    guest.ip("link set other up")?;
    guest.ip("route replace default via 10.7.0.1 dev other onlink")?;
    soon(&guest, v4(8080), "host's")?;
    guest.ip("link del other")?;
    soon_refused(&guest, v4(8080))
}

/// Nobody is inside, and it has no name; then somebody comes.
fn a_namespace_that_is_found_late_is_served() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    let late = scene.lab.container(&scene.bridge, "10.7.0.3/24")?;
    let named = scene.lab.container(&scene.bridge, "10.7.0.4/24")?;
    let _late = Occupant::of(&late)?;
    soon(&late, v4(8080), "host's")?;
    let visitor = Occupant::of(&named)?;
    // As `ip netns attach` does it.
    let name = Path::new("/run/netns/lbridge-named");
    fs::create_dir_all("/run/netns")?;
    fs::write(name, "")?;
    let namespace = format!("/proc/{}/ns/net", visitor.0.id());
    mount(Some(namespace.as_str()), name, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    drop(visitor);
    let done = soon(&named, v4(8080), "host's");
    umount(name)?;
    fs::remove_file(name)?;
    done
}

/// Whoever is entered where he does not belong is led to a gateway that does not serve him.
fn the_rule_of_the_gateway_decides() -> Result<()> {
    let (scene, _occupant, service) = scene()?;
    let lab1 = scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let other = scene.lab.container(&lab1, "10.8.0.2/24")?;
    let cookie = other.run(cookie)?;
    let index: u32 = scene
        .lab
        .host()
        .shell("cat /sys/class/net/lab0/ifindex")
        .or_else(|_| scene.lab.host().shell("ip -o link show lab0 | cut -d: -f1"))?
        .trim()
        .parse()?;
    let mut guest = cookie.to_ne_bytes().to_vec();
    guest.extend([index, 0, 0, 0].iter().flat_map(|index| index.to_ne_bytes()));
    pins::put(scene.daemon.bpffs(), "REDIRECT_NETNS", &cookie.to_ne_bytes(), &guest)?;
    let accepted = service.accepted();
    client::not_served(&other, None, v4(8080))?;
    ensure!(service.accepted() == accepted, "nobody got through");
    Ok(())
}

/// `SO_NETNS_COOKIE` of this thread's namespace.
fn cookie() -> Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>())?;
    // SAFETY: the kernel writes as many bytes as the number has.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(cookie)
}

/// The bridge's index may be that of one of the host's.
fn a_bridge_of_a_nested_namespace_is_none_of_the_hosts() -> Result<()> {
    let (scene, _occupant, _service) = scene()?;
    for number in 0..8 {
        scene.container.ip(&format!("link add inner{number} type bridge"))?;
    }
    let nested = Lab::with_host(scene.container.clone());
    let bridge = nested.add_bridge("lab0", "10.9.0.1/24")?;
    let inner = nested.container(&bridge, "10.9.0.2/24")?;
    let _inner = Occupant::of(&inner)?;
    client::refused(&inner, v4(8080))?;
    client::served_by(&scene.container, v4(8080), "host's")?;
    Ok(())
}

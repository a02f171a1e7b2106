//! Where the kernel cannot, the daemon carries the bytes: all of them, both ways, whoever ends first.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Connection};
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::{Answer, Options, pattern};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::usage::Process;
use lbridge_tests::harness::{kernel, netns::NetNs, patience};
use lbridge_tests::tests;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{self, SockaddrStorage};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        path_relay_is_relayed,
        a_local_user_cannot_take_the_relays_ports: [Need::TellsInterfaces],
        path_steer_is_never_relayed,
        source_loopback_shows_a_local_peer_by_relay,
        half_close_passes_the_relay,
        half_close_is_the_same_when_steered,
        bulk_goes_both_ways_at_once,
        client_that_resets_ends_the_service_side,
        gateway_port_is_bound_only_while_the_target_listens,
        slow_reader_holds_up_nobody_else,
        idle_relays_cost_no_time,
        rules_come_and_go_while_relayed_connections_run,
        unix_socket_is_relayed,
        unix_socket_of_a_service_with_a_network_of_its_own,
        unix_socket_behind_a_strangers_link_is_not_reached,
    ]
}

const EIGHT_MIB: usize = 8 << 20;

fn relayed() -> Result<(Scene, lbridge_tests::harness::service::Service)> {
    let scene = Scene::new()?;
    let service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.allow(&["8080", "--path", "relay"])?;
    scene.must_be(8080, "relayed")?;
    Ok((scene, service))
}

fn path_relay_is_relayed() -> Result<()> {
    let (scene, _service) = relayed()?;
    let greeting = scene.served(8080, "relayed")?;
    ensure!(greeting.accept.ip() == scene.container_ip, "accept() sees the container: {greeting:?}");
    ensure!(greeting.peer.ip() == scene.container_ip, "getpeername() sees the container: {greeting:?}");
    ensure!(
        binds_the_gateway(&scene)? != kernel::has_ingress_ifindex(),
        "the gateway's port is taken where it must be"
    );
    scene.deny(&["8080"])?;
    let host = scene.lab.host();
    ensure!(!binds_the_gateway(&scene)? && !host.has_hidden_relays()?, "and goes with the rule");
    scene.refused(8080)
}

/// All of those that relays prefer.
fn a_local_user_cannot_take_the_relays_ports() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    // More than a guest's system lets a process have.
    setrlimit(Resource::RLIMIT_NOFILE, 8192, 8192)?;
    let _ports = scene.lab.host().run(|| {
        let bound = (61_000..=u16::MAX).map(|port| -> Result<_> {
            let socket = kernel::stream_socket(false, false)?;
            let any = SocketAddr::from(([0, 0, 0, 0], port));
            socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(any))?;
            Ok(socket)
        });
        bound.collect::<Result<Vec<_>>>()
    })?;
    scene.allow(&["8080", "--path", "relay"])?;
    scene.must_be(8080, "relayed")?;
    scene.served(8080, "relayed").map(drop)
}

/// From Linux 5.17 on the kernel's entry leads to a relay, which takes no port from the host's own services.
fn binds_the_gateway(scene: &Scene) -> Result<bool> {
    scene.lab.host().listens("10.7.0.1:8080".parse()?)
}

fn path_steer_is_never_relayed() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("six", "[::1]:8080")?;
    scene.allow(&["80=[::1]:8080", "--path", "steer"])?;
    let state = scene.must_be(80, "blocked")?;
    state.must_be_because("family_mismatch")?;
    scene.refused(80)
}

fn source_loopback_shows_a_local_peer_by_relay() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.allow(&["8080", "--path", "relay", "--source", "loopback"])?;
    let greeting = scene.served(8080, "relayed")?;
    ensure!(greeting.accept.ip().to_string() == "127.0.0.1", "accept(): {greeting:?}");
    ensure!(greeting.peer.ip().to_string() == "127.0.0.1", "getpeername(): {greeting:?}");
    ensure!(greeting.local.to_string() == "127.0.0.1:8080", "getsockname(): {greeting:?}");
    Ok(())
}

/// A client that says everything first, then reads: `git`, `nc -N`, an HTTP/1.0 POST.
fn half_close(path: &str) -> Result<()> {
    let scene = Scene::new()?;
    let options =
        Options { answer: Answer::AfterFin(EIGHT_MIB), ..Options::new("after fin", "127.0.0.1:8080")? };
    let _service = scene.service_with(&options)?;
    scene.allow(&["8080", "--path", path])?;
    for asked in [0, 1, 100_000] {
        let connection = client::connect(&scene.container, scene.gateway(8080))?;
        connection.stream().write_all(&pattern(0, asked)).context("ask")?;
        let answer = connection.finish().with_context(|| format!("after {asked} bytes"))?;
        ensure!(answer.len() == EIGHT_MIB, "{} bytes after {asked}", answer.len());
        ensure!(answer == pattern(0, EIGHT_MIB), "the bytes differ");
    }
    Ok(())
}

fn half_close_passes_the_relay() -> Result<()> {
    half_close("relay")
}

fn half_close_is_the_same_when_steered() -> Result<()> {
    half_close("steer")
}

fn bulk_goes_both_ways_at_once() -> Result<()> {
    let (scene, _service) = relayed()?;
    let connection = client::connect(&scene.container, scene.gateway(8080))?;
    let mut writer = connection.stream().try_clone()?;
    let sender = thread::spawn(move || -> Result<()> {
        let mut sent = 0;
        // Sizes around those of buffers, pipes and segments.
        for length in [1, 1448, 4095, 4096, 4097, 65535, 65536, 65537, 1 << 20].into_iter().cycle() {
            let length = length.min(EIGHT_MIB - sent);
            writer.write_all(&pattern(sent, length)).with_context(|| format!("send at {sent}"))?;
            sent += length;
            if sent == EIGHT_MIB {
                return Ok(writer.shutdown(Shutdown::Write)?);
            }
        }
        Ok(())
    });
    let mut back = Vec::new();
    connection.stream().read_to_end(&mut back).with_context(|| format!("after {} bytes", back.len()))?;
    sender.join().map_err(|_| anyhow::anyhow!("the sender"))??;
    ensure!(back.len() == EIGHT_MIB && back == pattern(0, EIGHT_MIB), "{} bytes came back", back.len());
    Ok(())
}

fn client_that_resets_ends_the_service_side() -> Result<()> {
    let (scene, service) = relayed()?;
    let connections = || -> Result<usize> {
        let table = scene.lab.host().run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/tcp")?))?;
        let of_service = |line: &&str| {
            let fields: Vec<_> = line.split_whitespace().collect();
            // 127.0.0.1:8080, established.
            fields.get(1) == Some(&"0100007F:1F90") && fields.get(3) == Some(&"01")
        };
        Ok(table.lines().filter(of_service).count())
    };
    let connection = client::connect(&scene.container, scene.gateway(8080))?;
    ensure!(connections()? == 1, "a relayed connection");
    // Unread bytes and a zero linger time: a reset, not a FIN.
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    socket::setsockopt(connection.stream(), socket::sockopt::Linger, &linger)?;
    drop(connection);
    patience::until("the service's end is closed", || Ok((connections()? == 0).then_some(())))?;
    ensure!(service.accepted() == 1);
    scene.served(8080, "relayed")?;
    Ok(())
}

fn gateway_port_is_bound_only_while_the_target_listens() -> Result<()> {
    let (scene, service) = relayed()?;
    let host: &NetNs = scene.lab.host();
    let gateway = "10.7.0.1:8080".parse()?;
    ensure!(host.listens(gateway)? != kernel::has_ingress_ifindex());
    let mut connection = client::connect(&scene.container, scene.gateway(8080))?;
    service.stop();
    scene.wait_for(8080, "waiting")?;
    ensure!(!host.listens(gateway)? && !host.has_hidden_relays()?, "waiting, and still bound");
    scene.refused(8080)?;
    connection.echo(b"what was relayed goes on")?;
    let _service = scene.service("again", "127.0.0.1:8080")?;
    scene.wait_for(8080, "relayed")?;
    ensure!(host.listens(gateway)? != kernel::has_ingress_ifindex());
    scene.served(8080, "again")?;
    Ok(())
}

fn slow_reader_holds_up_nobody_else() -> Result<()> {
    let (scene, _service) = relayed()?;
    let stuck = client::connect(&scene.container, scene.gateway(8080))?;
    stuck.stream().set_write_timeout(Some(Duration::from_millis(200)))?;
    let mut sent = 0;
    // The echo is not read, so that every buffer on the way fills up.
    while let Ok(length) = stuck.stream().write(&pattern(sent, 65536)) {
        sent += length;
        ensure!(sent < 256 << 20, "no back-pressure after {sent} bytes");
    }
    for _ in 0..8 {
        scene.served(8080, "relayed")?;
    }
    // And it is all there once somebody reads.
    stuck.stream().shutdown(Shutdown::Write)?;
    let mut back = vec![0; sent];
    let mut reader = stuck.stream();
    reader.read_exact(&mut back).context("read what was held up")?;
    ensure!(back == pattern(0, sent), "the bytes differ");
    Ok(())
}

/// Relays that carry nothing, and half-closed ones, leave the processor alone.
fn idle_relays_cost_no_time() -> Result<()> {
    let (scene, _service) = relayed()?;
    let quiet = Options { answer: Answer::SilentEcho, ..Options::new("quiet", "127.0.0.1:8081")? };
    let _quiet = scene.service_with(&quiet)?;
    scene.allow(&["8081", "--path", "relay"])?;
    let open: Result<Vec<Connection>> =
        (0..16).map(|_| client::connect(&scene.container, scene.gateway(8080))).collect();
    let open = open?;
    // Half-closed by the client, unread by the client.
    let half = client::connect(&scene.container, scene.gateway(8080))?;
    half.stream().write_all(&pattern(0, 100_000))?;
    half.stream().shutdown(Shutdown::Write)?;
    let daemon = Process(scene.daemon.pid().context("the daemon's id")?);
    thread::sleep(Duration::from_millis(300));
    let before = daemon.ticks()?;
    thread::sleep(Duration::from_secs(2));
    let spent = daemon.ticks()? - before;
    // A hundredth of a second each; a busy loop takes 200. The looks at the sockets take some, most where the
    // CPU is emulated.
    ensure!(spent < 100, "{spent} ticks in two seconds");
    drop(open);
    Ok(())
}

fn rules_come_and_go_while_relayed_connections_run() -> Result<()> {
    let (scene, _service) = relayed()?;
    let mut early = client::connect(&scene.container, scene.gateway(8080))?;
    scene.allow(&["8081", "--path", "relay"])?;
    early.echo(b"another rule was added")?;
    scene.deny(&["8080"])?;
    scene.refused(8080)?;
    early.echo(b"the rule was removed")?;
    scene.allow(&["8080", "--path", "relay"])?;
    scene.served(8080, "relayed")?;
    early.echo(b"and added again")?;
    ensure!(early.finish()?.is_empty());
    Ok(())
}

/// PostgreSQL with `listen_addresses = ''`, or a database that trusts file modes.
fn unix_socket_is_relayed() -> Result<()> {
    use std::os::unix::net::UnixListener;

    let scene = Scene::new()?;
    let path = std::path::Path::new("/run/service.sock");
    // Its peer is the daemon, thus root, whom `peer` authentication lets in: only if asked for.
    let refused = scene.daemon.cli(&["allow", "bridge:lab0", "5433=unix:/run/service.sock"])?;
    ensure!(refused.status == 2 && refused.stderr.contains("--source loopback"), "{refused:?}");
    scene.allow(&["5432=unix:/run/service.sock", "--source", "loopback"])?;
    scene.must_be(5432, "waiting")?;
    scene.refused(5432)?;
    let listener = scene.lab.host().run(|| Ok(UnixListener::bind(path)?))?;
    let service = thread::spawn(move || -> Result<()> {
        for stream in listener.incoming().take(1) {
            let mut stream = stream?;
            let mut asked = Vec::new();
            stream.read_to_end(&mut asked)?;
            stream.write_all(&asked)?;
        }
        Ok(())
    });
    scene.wait_for(5432, "relayed")?;
    let mut stream = client::dial(&scene.container, None, scene.gateway(5432), patience::seconds(5))?;
    stream.set_read_timeout(Some(patience::seconds(5)))?;
    stream.write_all(&pattern(0, 100_000))?;
    stream.shutdown(Shutdown::Write)?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    ensure!(back == pattern(0, 100_000), "{} bytes came back", back.len());
    service.join().map_err(|_| anyhow::anyhow!("the service"))??;
    // It has closed its listener.
    scene.wait_for(5432, "waiting")?;
    scene.refused(5432)
}

/// As with `PrivateNetwork=` in its unit.
fn unix_socket_of_a_service_with_a_network_of_its_own() -> Result<()> {
    let scene = Scene::new()?;
    let netns = NetNs::new()?;
    let path = std::path::Path::new("/run/private.sock");
    let listener = netns.run(|| Ok(std::os::unix::net::UnixListener::bind(path)?))?;
    scene.allow(&["5432=unix:/run/private.sock", "--source", "loopback"])?;
    // Namespaces are found by their processes.
    scene.must_be(5432, "waiting")?;
    let mut process = netns.command("sleep").arg("1000").spawn()?;
    let served = scene.wait_for(5432, "relayed").and_then(|_| {
        let mut stream = client::dial(&scene.container, None, scene.gateway(5432), patience::seconds(5))?;
        listener.accept()?.0.write_all(b"hello")?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        ensure!(said == "hello", "{said:?}");
        Ok(())
    });
    process.kill()?;
    process.wait()?;
    served
}

/// The owner of a service's folder must not lead root to another's socket, the engine's for one.
fn unix_socket_behind_a_strangers_link_is_not_reached() -> Result<()> {
    use std::os::unix::fs::{chown, lchown, symlink};

    let scene = Scene::new()?;
    let folder = tempfile::tempdir_in("/run")?;
    let of_root = folder.path().join("of-root.sock");
    let listener = scene.lab.host().run(|| Ok(std::os::unix::net::UnixListener::bind(&of_root)?))?;
    listener.set_nonblocking(true)?;
    let services = folder.path().join("service");
    std::fs::create_dir(&services)?;
    chown(&services, Some(54_321), None)?;
    let path = services.join("s.sock");
    symlink(&of_root, &path)?;
    let port = format!("5432=unix:{}", path.display());
    // A link of root's is as good as the socket.
    scene.allow(&[&port, "--source", "loopback"])?;
    scene.must_be(5432, "relayed")?;
    lchown(&path, Some(54_321), None)?;
    let state = scene.wait_for(5432, "blocked")?;
    state.must_be_because("untrusted_path")?;
    scene.refused(5432)?;
    let came = listener.accept().map_err(|error| error.kind());
    ensure!(came.is_err(), "nobody came: {came:?}");
    Ok(())
}

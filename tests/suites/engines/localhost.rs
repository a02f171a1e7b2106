//! `--localhost` for containers of a real Engine, whose first connection comes in their first millisecond;
//! and for clients that ask for localhost in every way that there is.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::{hint, thread};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{client, patience};
use lbridge_tests::tests;

use super::{IMAGE, Scene, Tested};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        first_connections_are_served,
        first_connections_on_a_busy_machine_are_served,
        containers_are_counted_and_forgotten,
        a_container_that_shares_a_namespace_is_served,
        a_container_that_joins_and_leaves_is_followed,
        an_internal_network_is_served,
        other_networks_are_left_alone,
        localhost_of_a_named_container_is_its_alone,
        curl_is_served: [Need::Program("curl")],
        python_is_served: [Need::Program("python3")],
        node_is_served: [Need::Program("node")],
    ]
}

/// Number of containers that are started, if the environment does not say otherwise.
const STARTS: usize = 24;
const STARTS_FROM: &str = "LBRIDGE_TEST_STARTS";
const LOCALHOST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// A network with a rule in force, and a service behind it.
fn scene() -> Result<(Scene, Service)> {
    let scene = Scene::new()?;
    create_network(&scene, &[])?;
    let service = scene.service("host's", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "8080", "--localhost"])?;
    Ok((scene, service))
}

/// Creates `app`, and starts a container on it if its bridge would not exist without: then the first
/// container to dial is not the first of all, which Podman starts while the daemon notices the bridge.
fn create_network(scene: &Scene, more: &[&str]) -> Result<()> {
    scene.engine.create_network("app", more)?;
    if !Tested::BRIDGE_WITHOUT_CONTAINERS {
        scene.engine.run("app", &[])?;
    }
    Ok(())
}

/// Starts containers whose only program dials at once, so many at a time. All must have been served.
fn start(scene: &Scene, at_a_time: usize) -> Result<()> {
    let starts = std::env::var(STARTS_FROM).ok().and_then(|text| text.parse().ok()).unwrap_or(STARTS);
    let next = AtomicUsize::new(0);
    let one = || -> Result<()> {
        while next.fetch_add(1, Ordering::Relaxed) < starts {
            let said =
                scene.engine.cli(&["run", "--rm", "--network", "app", IMAGE, "nc", "127.0.0.1", "8080"])?;
            ensure!(said.contains("host's"), "{said:?}");
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..at_a_time).map(|_| scope.spawn(one)).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?.context("a first connection")
        })
    })
}

fn first_connections_are_served() -> Result<()> {
    let (scene, _service) = scene()?;
    start(&scene, 1)
}

fn first_connections_on_a_busy_machine_are_served() -> Result<()> {
    let (scene, _service) = scene()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    hint::spin_loop();
                }
            });
        }
        let started = start(&scene, 4);
        stop.store(true, Ordering::Relaxed);
        started
    })
}

fn count(scene: &Scene) -> Result<u64> {
    let rule = scene.daemon.rule("app", 8080)?.context("a rule")?;
    rule["dials"][0]["containers"].as_u64().context("a count")
}

fn containers_are_counted_and_forgotten() -> Result<()> {
    let (scene, _service) = scene()?;
    let before = count(&scene)?;
    let first = scene.engine.run("app", &[])?;
    let second = scene.engine.run("app", &[])?;
    scene.engine.run("none", &[])?;
    scene.engine.run(Tested::DEFAULT_NETWORK, &[])?;
    patience::until("both are counted", || Ok((count(&scene)? == before + 2).then_some(())))?;
    client::served_by(&scene.engine.netns(&first)?, LOCALHOST, "host's")?;
    scene.engine.remove(&first)?;
    scene.engine.cli(&["restart", "--time", "0", &second.id])?;
    patience::until("one of them is left", || Ok((count(&scene)? == before + 1).then_some(())))?;
    client::served_by(&scene.engine.netns(&second)?, LOCALHOST, "host's")?;
    scene.engine.remove(&second)?;
    patience::until("none of them is left", || Ok((count(&scene)? == before).then_some(())))
}

fn a_container_that_shares_a_namespace_is_served() -> Result<()> {
    let (scene, _service) = scene()?;
    scene.engine.run("app", &["--name", "first"])?;
    let said = scene.engine.cli(&[
        "run",
        "--rm",
        "--network",
        "container:first",
        IMAGE,
        "nc",
        "127.0.0.1",
        "8080",
    ])?;
    ensure!(said.contains("host's"), "{said:?}");
    let said = scene.engine.cli(&["exec", "first", "nc", "::1", "8080"])?;
    ensure!(said.contains("host's"), "{said:?}");
    Ok(())
}

fn a_container_that_joins_and_leaves_is_followed() -> Result<()> {
    let (scene, _service) = scene()?;
    let container = scene.engine.run(Tested::DEFAULT_NETWORK, &["--name", "comes"])?;
    let netns = scene.engine.netns(&container)?;
    client::refused(&netns, LOCALHOST)?;
    for _ in 0..2 {
        scene.engine.cli(&["network", "connect", "app", "comes"])?;
        patience::until("it is served", || Ok(client::served_by(&netns, LOCALHOST, "host's").ok()))?;
        scene.engine.cli(&["network", "disconnect", "app", "comes"])?;
        patience::until("it is not", || Ok(client::refused(&netns, LOCALHOST).ok()))?;
    }
    Ok(())
}

fn an_internal_network_is_served() -> Result<()> {
    let scene = Scene::new()?;
    create_network(&scene, &["--internal"])?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    scene.daemon.allow(&["app", "80=8080", "--localhost"])?;
    let said = scene.engine.cli(&["run", "--rm", "--network", "app", IMAGE, "nc", "127.0.0.1", "80"])?;
    ensure!(said.contains("host's"), "{said:?}");
    Ok(())
}

fn other_networks_are_left_alone() -> Result<()> {
    let (scene, service) = scene()?;
    let network = scene.engine.create_network("other", &[])?;
    let container = scene.engine.run("other", &[])?;
    let own = scene.engine.run("app", &[])?;
    scene.refused(&container, LOCALHOST)?;
    scene.refused(&container, network.at(8080))?;
    scene.refused(&own, SocketAddr::from(([127, 0, 0, 1], 8081)))?;
    // What the container itself listens on is its own.
    let inside = Service::start(&scene.engine.netns(&own)?, "its own", "0.0.0.0:8080")?;
    client::served_by(&scene.engine.netns(&own)?, LOCALHOST, "its own")?;
    drop(inside);
    ensure!(service.accepted() == 0, "nobody got through");
    scene.served(&own, LOCALHOST, "host's")?;
    scene.daemon.deny(&["app", "8080"])?;
    scene.refused(&own, LOCALHOST)
}

/// A service on every address would answer the neighbours, too, were their localhost led to the gateway.
fn localhost_of_a_named_container_is_its_alone() -> Result<()> {
    let scene = Scene::new()?;
    create_network(&scene, &[])?;
    let _service = scene.service("host's", "0.0.0.0:8080")?;
    let dials = |container: &str, outcome: &str| {
        patience::until(&format!("{container} is {outcome}"), || {
            let dial = ["exec", container, "sh", "-c", "echo | timeout 5 nc 127.0.0.1 8080 2>&1 || true"];
            Ok(scene.engine.cli(&dial)?.contains(outcome).then_some(()))
        })
    };
    scene.engine.run("app", &["--name", "web"])?;
    scene.engine.run("app", &["--name", "neighbour"])?;
    scene.daemon.allow(&["app", "8080", "--localhost", "--from", "web"])?;
    ensure!(count(&scene)? == 1, "{:#}", scene.daemon.status()?);
    dials("web", "host's")?;
    dials("neighbour", "refused")?;
    // Another process, another namespace.
    scene.engine.cli(&["restart", "--time", "0", "web"])?;
    dials("web", "host's")?;
    dials("neighbour", "refused")?;
    scene.engine.cli(&["rename", "web", "gone"])?;
    dials("gone", "refused")?;
    scene.engine.cli(&["rename", "neighbour", "web"])?;
    dials("web", "host's")
}

/// Runs one of the machine's programs in a container of the network, with the machine's libraries.
fn runs(scene: &Scene, command: &[&str]) -> Result<String> {
    let mounts = ["/usr:/usr:ro", "/usr/lib:/lib:ro", "/usr/lib64:/lib64:ro"];
    let mounts: Vec<_> = mounts.iter().flat_map(|mount| ["--volume", mount]).collect();
    scene.engine.cli(&[&["run", "--rm", "--network", "app"][..], &mounts, &[IMAGE], command].concat())
}

fn curl_is_served() -> Result<()> {
    const HOSTS: [&str; 3] = ["127.0.0.1", "[::1]", "localhost"];
    let scene = Scene::new()?;
    create_network(&scene, &[])?;
    let listener = TcpListener::bind(LOCALHOST)?;
    let server = thread::spawn(move || -> std::io::Result<()> {
        for _ in HOSTS {
            let (stream, _) = listener.accept()?;
            let mut request = BufReader::new(&stream).lines();
            while request.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
            (&stream).write_all(b"HTTP/1.0 200 OK\r\n\r\nhost's ")?;
        }
        Ok(())
    });
    scene.daemon.allow(&["app", "8080", "--localhost"])?;
    for host in HOSTS {
        let url = format!("http://{host}:8080/");
        let said = runs(&scene, &["/usr/bin/curl", "-s", "-m", "5", "-w", "%{remote_ip}", &url])?;
        ensure!(matches!(said.as_str(), "host's 127.0.0.1" | "host's ::1"), "{host}: {said:?}");
    }
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    Ok(())
}

fn python_is_served() -> Result<()> {
    const ASYNCIO: &str = "
import asyncio
async def ask(host):
    reader, writer = await asyncio.open_connection(host, 8080)
    print((await reader.readline()).decode(), writer.get_extra_info('peername')[:2])
    writer.close()
for host in ('127.0.0.1', '::1', 'localhost', '::ffff:127.0.0.1'):
    asyncio.run(ask(host))
";
    let (scene, _service) = scene()?;
    let said = runs(&scene, &["/usr/bin/python3", "-c", ASYNCIO])?;
    ensure!(said.matches("host's").count() == 4, "{said:?}");
    for seen in ["('127.0.0.1', 8080)", "('::1', 8080)", "('::ffff:127.0.0.1', 8080)"] {
        ensure!(said.contains(seen), "{said:?}");
    }
    Ok(())
}

fn node_is_served() -> Result<()> {
    const SCRIPT: &str = "
const net = require('net');
for (const host of ['127.0.0.1', '::1', 'localhost']) {
  const socket = net.connect(8080, host);
  socket.once('data', data => { console.log(String(data), socket.remoteAddress); socket.end(); });
  socket.on('error', error => console.log(String(error)));
}
";
    let (scene, _service) = scene()?;
    let said = runs(&scene, &["/usr/bin/node", "-e", SCRIPT])?;
    ensure!(said.matches("host's").count() == 3, "{said:?}");
    Ok(())
}

//! A daemon that is short of descriptors: it refuses, but it neither hangs, spins nor dies.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::client::dial;
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bytes::part;
use crate::relayed::{Descriptors, Relayed};

pub(crate) fn tests() -> Vec<Test> {
    tests![flood_is_refused_at_once_and_leaves_nothing, connections_that_are_stuck_leave_room_for_commands]
}

const OPEN_FILES: u64 = 400;
const FLOOD: usize = 600;

fn poor() -> Result<Relayed> {
    Relayed::with(Options { open_files: Some(OPEN_FILES), ..Options::default() })
}

/// Greets whoever comes, until they leave.
fn greet(relayed: &Relayed) -> Result<()> {
    let listener = relayed.listener.try_clone()?;
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || stream.write_all(b"!").and_then(|()| stream.read_to_end(&mut Vec::new())));
        }
    });
    Ok(())
}

fn flood_is_refused_at_once_and_leaves_nothing() -> Result<()> {
    let relayed = poor()?;
    let daemon = relayed.daemon()?;
    let before = relayed.descriptors()?;
    greet(&relayed)?;

    let start = Instant::now();
    let mut flood = Vec::new();
    relayed.scene.container.run(|| {
        for number in 0..FLOOD {
            match TcpStream::connect_timeout(&relayed.scene.gateway(8080), patience::seconds(2)) {
                // A word for the service, which may not be there to hear it. A reset that came before the
                // word is told here, and once: to read would then look like an orderly end.
                Ok(mut stream) => match stream.write_all(b"-") {
                    Ok(()) => flood.push(stream),
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                    Err(error) => bail!("connection {number}, its first word: {error}"),
                },
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                Err(error) => bail!("connection {number}: {error}"),
            }
        }
        Ok(())
    })?;
    let mut served = Vec::new();
    for (number, mut stream) in flood.into_iter().enumerate() {
        stream.set_read_timeout(Some(patience::seconds(2)))?;
        match stream.read(&mut [0]) {
            Ok(1) => served.push(stream),
            Ok(_) => bail!("connection {number}: an orderly end, as if the service had ended it"),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => bail!("connection {number} is neither served nor refused: {error}"),
        }
    }
    let took = start.elapsed();
    println!("{} of {FLOOD} connections served, the others refused, in {took:?}", served.len());
    ensure!(!served.is_empty() && served.len() < FLOOD, "{} served", served.len());
    ensure!(took < patience::seconds(5), "decided only after {took:?}");

    let ticks = daemon.ticks()?;
    thread::sleep(Duration::from_secs(1));
    let spent = daemon.ticks()? - ticks;
    ensure!(spent < 30, "{spent} ticks in a second after the flood");
    relayed.scene.must_be(8080, "relayed")?;
    ensure!(daemon.descriptors()? < usize::try_from(OPEN_FILES)?, "some are left");

    drop(served);
    relayed.nothing_leaks(before)?;
    let mut stream = dial(&relayed.scene.container, None, relayed.scene.gateway(8080), patience::seconds(2))?;
    stream.set_read_timeout(Some(patience::seconds(2)))?;
    stream.read_exact(&mut [0]).context("served again after the flood")
}

/// Writes until nothing more fits.
fn stuff(mut stream: &TcpStream) -> Result<()> {
    stream.set_nonblocking(true)?;
    let start = Instant::now();
    let mut last = start;
    // Buffers on the way make room for some time yet.
    while last.elapsed() < Duration::from_millis(50) && start.elapsed() < Duration::from_secs(1) {
        match stream.write(part(0, 1 << 18)) {
            Ok(_) => last = Instant::now(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(2)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(stream.set_nonblocking(false)?)
}

/// Every place taken by a connection that nobody reads from, in either direction, so that each holds all that
/// a connection may hold.
fn connections_that_are_stuck_leave_room_for_commands() -> Result<()> {
    let relayed = poor()?;
    let daemon = relayed.daemon()?;
    let before = relayed.descriptors()?;
    // Small buffers on the host's side, or it would take a gigabyte to fill them.
    relayed.scene.lab.host().sysctl("net/ipv4/tcp_wmem", "4096 65536 262144")?;
    relayed.scene.lab.host().sysctl("net/ipv4/tcp_rmem", "4096 65536 262144")?;
    relayed.scene.container.sysctl("net/ipv4/tcp_wmem", "4096 65536 262144")?;
    relayed.scene.container.sysctl("net/ipv4/tcp_rmem", "4096 65536 262144")?;

    let mut stuck = Vec::new();
    while let Some(pair) = attempt(&relayed)? {
        stuck.push(pair);
        ensure!(stuck.len() < FLOOD, "no limit at all");
    }
    ensure!(!stuck.is_empty(), "no connection at all");
    let all: Result<()> = thread::scope(|scope| {
        let threads: Vec<_> = stuck
            .iter()
            .flat_map(|(client, service)| [client, service])
            .map(|end| scope.spawn(move || stuff(end)))
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("stuff"))?)
    });
    all?;
    let descriptors = Descriptors::of(daemon)?;
    println!("{} connections are stuck: {} descriptors, {descriptors:?}", stuck.len(), descriptors.all());

    let ticks = daemon.ticks()?;
    for _ in 0..5 {
        let asked = Instant::now();
        relayed.scene.must_be(8080, "relayed")?;
        ensure!(asked.elapsed() < patience::seconds(1), "status took {:?}", asked.elapsed());
        thread::sleep(Duration::from_millis(200));
    }
    let spent = daemon.ticks()? - ticks;
    ensure!(spent < 50, "{spent} ticks in a second, while all is stuck");
    // Another rule can be made, and its relay listens.
    relayed.scene.allow(&["8081=8080", "--path", "relay"])?;
    relayed.scene.must_be(8081, "relayed")?;
    relayed.scene.deny(&["8081"])?;

    drop(stuck);
    relayed.nothing_leaks(before)?;
    let (client, service) = relayed.connection().context("served again")?;
    (&client).write_all(b"?")?;
    (&service).read_exact(&mut [0])?;
    Ok(())
}

/// Opens a connection; `None` if it is refused. It must be one or the other, and soon.
fn attempt(relayed: &Relayed) -> Result<Option<(TcpStream, TcpStream)>> {
    let limit = patience::seconds(2);
    let client = match dial(&relayed.scene.container, None, relayed.scene.gateway(8080), limit) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
        client => client?,
    };
    let mut events = [
        PollFd::new(relayed.listener.as_fd(), PollFlags::POLLIN),
        PollFd::new(client.as_fd(), PollFlags::POLLIN),
    ];
    poll(&mut events, PollTimeout::try_from(limit)?)?;
    let [comes_in, is_refused] = events.map(|event| event.any() == Some(true));
    ensure!(comes_in || is_refused, "neither served nor refused");
    if is_refused {
        let error = (&client).read(&mut [0]).err().context("nobody has written")?;
        ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
        return Ok(None);
    }
    let (service, _) = relayed.listener.accept()?;
    Ok(Some((client, service)))
}

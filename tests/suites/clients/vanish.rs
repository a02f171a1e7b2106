//! Containers that vanish in the middle of a transfer.
//!
//! What the service can see of that: a container whose processes are killed still has a kernel, which ends
//! each socket with a FIN, or with a RST where bytes were unread. A link that is removed says nothing. The
//! host's kernel finds out by bytes that are not acknowledged (`tcp_retries2`: a quarter of an hour by
//! default, here made a few seconds) or, on a connection that is idle, by keepalive, whose timer must run on
//! both legs. Then the service's end is reset.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{client, patience};
use lbridge_tests::tests;

use crate::bytes::part;
use crate::crowd::{Dialler, accept};
use crate::relayed::Relayed;
use lbridge_tests::harness::server;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        processes_and_namespace_go_in_the_middle,
        link_goes_in_the_middle_and_the_kernel_gives_up,
        keepalive_runs_on_both_legs_of_an_idle_connection: [Need::Program("ss")],
    ]
}

/// Sends until the connection breaks; the error.
fn send_without_end(mut service: TcpStream) -> JoinHandle<Result<ErrorKind>> {
    thread::spawn(move || {
        service.set_write_timeout(Some(patience::seconds(30)))?;
        loop {
            if let Err(error) = service.write(part(0, 65536)) {
                return Ok(error.kind());
            }
        }
    })
}

fn is_told(sender: JoinHandle<Result<ErrorKind>>) -> Result<()> {
    let error = sender.join().map_err(|_| anyhow::anyhow!("the sender"))??;
    let over = matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
    ensure!(over, "the service is told: {error}");
    Ok(())
}

/// No socket of the host is a connection to or from the service or the relay.
fn no_connection_is_left(relayed: &Relayed, listener: &TcpListener) -> Result<()> {
    let port = format!(":{:04X}", listener.local_addr()?.port());
    patience::until("no connection is left", || {
        let table =
            relayed.scene.lab.host().run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/tcp")?))?;
        let open = table.lines().filter(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let [_, local, remote, state, ..] = fields[..] else { return false };
            // ESTABLISHED and CLOSE_WAIT are states of sockets that a process holds.
            (local.ends_with(&port) || remote.ends_with(&port)) && matches!(state, "01" | "08")
        });
        Ok((open.count() == 0).then_some(()))
    })
}

fn processes_and_namespace_go_in_the_middle() -> Result<()> {
    const CONNECTIONS: usize = 40;
    let relayed = Relayed::new()?;
    let before = relayed.descriptors()?;
    let container = relayed.scene.lab.container(&relayed.scene.bridge, "10.7.0.9/24")?;
    let mut dialler = Dialler::start(&container, relayed.scene.gateway(8080))?;
    dialler.order(&format!("open {CONNECTIONS}"))?;
    let mut services = accept(&relayed.listener, CONNECTIONS)?;
    dialler.done()?;
    // Half of them are in the middle of a transfer that the container does not read, the others idle.
    let idle = services.split_off(CONNECTIONS / 2);
    let senders: Vec<_> = services.into_iter().map(send_without_end).collect();
    thread::sleep(Duration::from_millis(300));

    // The process holds the namespace together with this handle: both go at once.
    drop(container);
    drop(dialler);
    senders.into_iter().try_for_each(is_told)?;
    for (number, mut service) in idle.into_iter().enumerate() {
        let end = service.read(&mut [0]);
        let over = match &end {
            Ok(length) => *length == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        };
        ensure!(over, "idle connection {number}: {end:?}");
    }
    relayed.nothing_leaks(before)?;
    no_connection_is_left(&relayed, &relayed.listener)
}

fn link_goes_in_the_middle_and_the_kernel_gives_up() -> Result<()> {
    let relayed = Relayed::new()?;
    let host = relayed.scene.lab.host();
    // A few seconds instead of a quarter of an hour.
    host.sysctl("net/ipv4/tcp_retries2", "3")?;
    let before = relayed.descriptors()?;
    let (client, service) = relayed.connection()?;
    // One that goes the other way: the host's kernel has nothing to send there, so only keepalive would find
    // out. It is ended by the service.
    let (up, up_service) = relayed.connection()?;
    let sender = send_without_end(service);
    let reads = thread::spawn(move || {
        // Reads as fast as it can, so that bytes are under way whenever the link goes.
        let mut buffer = vec![0; 65536];
        client.set_read_timeout(Some(Duration::from_millis(500))).ok();
        while (&client).read(&mut buffer).is_ok_and(|length| length > 0) {}
        client
    });
    let uploads = send_without_end(up.try_clone()?);
    let hears = thread::spawn(move || -> Result<TcpStream> {
        let mut buffer = vec![0; 65536];
        up_service.set_read_timeout(Some(Duration::from_millis(500)))?;
        while (&up_service).read(&mut buffer).is_ok_and(|length| length > 0) {}
        Ok(up_service)
    });
    thread::sleep(Duration::from_millis(200));
    let links = host.ip_output("-o link show master lab0")?;
    let link = links.split(": ").nth(1).and_then(|name| name.split('@').next()).context("no link")?;
    host.ip(&format!("link del {link}"))?;

    is_told(sender).context("the service that was sending")?;
    let silent = hears.join().map_err(|_| anyhow::anyhow!("the service that hears"))??;
    // It has heard nothing for a while, and is not told: nothing is known yet. What it sends makes the kernel
    // find out.
    let told = send_without_end(silent);
    is_told(told).context("the service that was hearing")?;
    relayed.nothing_leaks(before)?;
    no_connection_is_left(&relayed, &relayed.listener)?;
    // The container's own kernel knows nothing yet; its end is closed by the test.
    drop(reads.join());
    drop(up);
    // Its link is gone for good, and its sender would wait.
    drop(uploads);
    Ok(())
}

fn keepalive_runs_on_both_legs_of_an_idle_connection() -> Result<()> {
    let relayed = Relayed::new()?;
    let (mut client, mut service) = relayed.connection()?;
    client.write_all(b"?")?;
    service.read_exact(&mut [0])?;
    let from_client = client.local_addr()?.to_string();
    let sockets = || {
        let mut ss = relayed.scene.lab.host().command("ss");
        server::line(ss.args([
            "-tnoH",
            "state",
            "established",
            "sport",
            "=",
            ":8080",
            "or",
            "dport",
            "=",
            ":8080",
        ]))
    };
    // The timer of what was just sent comes first.
    patience::until("keepalive runs", || {
        let sockets = sockets()?;
        let timer = |legs: &dyn Fn(&str, &str) -> bool| {
            sockets.lines().any(|line| {
                let fields: Vec<_> = line.split_whitespace().collect();
                let [_, _, local, remote, ..] = fields[..] else { return false };
                let seconds =
                    line.split("timer:(keepalive,").nth(1).and_then(|rest| rest.split("sec").next());
                // A minute, rounded in some way or another.
                let runs = seconds.is_some_and(|left| (50..=60).contains(&left.parse().unwrap_or(0)));
                legs(local, remote) && (runs || line.contains("timer:(keepalive,1min"))
            })
        };
        let to_client = timer(&|local, remote| local.starts_with("10.7.0.1") && remote == from_client);
        let to_service = timer(&|local, remote| local.starts_with("127.") && remote == "127.0.0.1:8080");
        Ok((to_client && to_service).then_some(()))
    })
    .with_context(|| sockets().unwrap_or_default())?;
    // And what is not known to have ended goes on.
    client::dial(&relayed.scene.container, None, relayed.scene.gateway(8080), patience::seconds(5))?;
    service.write_all(b"!")?;
    client.read_exact(&mut [0])?;
    Ok(())
}

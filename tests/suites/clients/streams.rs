//! Streams whose ends close one at a time, and streams in small pieces.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use crate::bytes::{self, Random, expect, expect_end, part, send};
use crate::relayed::{Relayed, reset};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        client_that_has_said_all_reads_a_hundred_mebibytes,
        service_that_has_said_all_hears_the_client_out,
        answer_of_a_service_that_hangs_up_arrives,
        upload_that_is_cut_off_never_looks_finished,
        ten_thousand_single_bytes_arrive,
        messages_in_pieces_are_not_held_back,
    ]
}

const HUNDRED_MIB: usize = 100 << 20;

fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("the other end panicked"))?
}

fn client_that_has_said_all_reads_a_hundred_mebibytes() -> Result<()> {
    let relayed = Relayed::new()?;
    let before = relayed.descriptors()?;
    for asked in [0, 1, 70_000] {
        let (client, service) = relayed.connection()?;
        let answers = thread::spawn(move || -> Result<()> {
            expect(&service, 0, asked).context("the request")?;
            expect_end(&service).context("the request's end")?;
            send(&service, 0, HUNDRED_MIB).context("answer")
        });
        send(&client, 0, asked)?;
        client.shutdown(Shutdown::Write)?;
        expect(&client, 0, HUNDRED_MIB).with_context(|| format!("after {asked} bytes"))?;
        expect_end(&client)?;
        join(answers)?;
    }
    relayed.nothing_leaks(before)
}

fn service_that_has_said_all_hears_the_client_out() -> Result<()> {
    let relayed = Relayed::new()?;
    let before = relayed.descriptors()?;
    let (client, service) = relayed.connection()?;
    let mut sender = client.try_clone()?;
    let sends = thread::spawn(move || -> Result<()> {
        send(&sender, 0, HUNDRED_MIB / 2).context("send before the service's end")?;
        expect(&sender, 0, 1000).context("the greeting")?;
        expect_end(&sender).context("the service's end")?;
        send(&sender, HUNDRED_MIB / 2, HUNDRED_MIB).context("send after the service's end")?;
        Ok(sender.flush()?)
    });
    send(&service, 0, 1000)?;
    service.shutdown(Shutdown::Write)?;
    expect(&service, 0, HUNDRED_MIB)?;
    join(sends)?;
    client.shutdown(Shutdown::Write)?;
    expect_end(&service)?;
    drop((client, service));
    relayed.nothing_leaks(before)
}

/// An HTTP server that answers 413 and closes while the body is still coming. What it said must arrive even
/// so, and the client must not go on sending for ever.
fn answer_of_a_service_that_hangs_up_arrives() -> Result<()> {
    const ANSWER: usize = 5000;
    let relayed = Relayed::new()?;
    let before = relayed.descriptors()?;
    for round in 0..20 {
        let (client, service) = relayed.connection()?;
        send(&client, 0, 10)?;
        expect(&service, 0, 10)?;
        send(&service, 0, ANSWER)?;
        expect(&client, 0, ANSWER).with_context(|| format!("round {round}"))?;
        // With bytes that nobody reads, or will have come in by then.
        send(&client, 10, 200_000)?;
        drop(service);
        let start = Instant::now();
        let error = loop {
            if let Err(error) = (&client).write(part(0, 65536)) {
                break error;
            }
            ensure!(start.elapsed() < patience::seconds(5), "round {round}: sends into nothing");
        };
        let kind = error.kind();
        ensure!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "round {round}: {error}");
        drop(client);
    }
    relayed.nothing_leaks(before)
}

/// The client is reset in the middle of its upload, while the relay is busy sending to it: the relay may
/// learn of the reset by a write that fails, or that is cut short. Whatever it learns, the service must not
/// see an end of file.
fn upload_that_is_cut_off_never_looks_finished() -> Result<()> {
    const ROUNDS: u64 = 400;
    let relayed = Relayed::new()?;
    // So that a write seldom takes all.
    relayed.scene.lab.host().sysctl("net/ipv4/tcp_wmem", "4096 16384 32768")?;
    let before = relayed.descriptors()?;
    let mut random = Random(99);
    let mut cut_by_a_read = 0;
    for round in 0..ROUNDS {
        let (client, service) = relayed.connection()?;
        client.set_nonblocking(true)?;
        service.set_nonblocking(true)?;
        let when = Duration::from_micros(300 + random.below(1500));
        let resets = thread::spawn(move || -> Result<()> {
            let start = Instant::now();
            let mut buffer = vec![0; 16 * 1024];
            while start.elapsed() < when {
                // Reads some, so that the relay's writes go on in pieces; and sends some.
                for done in [(&client).read(&mut buffer), (&client).write(part(0, 2000))] {
                    ensure!(done.is_ok() || done.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
                }
            }
            reset(client)
        });
        let (start, mut buffer) = (Instant::now(), vec![0; 65536]);
        loop {
            match (&service).read(&mut buffer) {
                Ok(0) => bail!("round {round}: an end of file, of a stream that was cut"),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => {
                    ensure!(error.kind() == ErrorKind::ConnectionReset, "round {round}: {error}");
                    cut_by_a_read += 1;
                    break;
                }
            }
            match (&service).write(part(0, 65536)) {
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) if error.kind() != ErrorKind::WouldBlock => bail!("round {round}: {error}"),
                _ => {}
            }
            ensure!(start.elapsed() < patience::seconds(5), "round {round}: is not told");
        }
        join(resets)?;
    }
    println!("{cut_by_a_read} of {ROUNDS} resets seen by a read, the others by a write");
    relayed.nothing_leaks(before)
}

fn echo(mut service: TcpStream) -> JoinHandle<Result<()>> {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            match service.read(&mut buffer)? {
                0 => return Ok(()),
                length => service.write_all(&buffer[..length])?,
            }
        }
    })
}

fn ten_thousand_single_bytes_arrive() -> Result<()> {
    const COUNT: usize = 10_000;
    let relayed = Relayed::new()?;
    let (client, service) = relayed.connection()?;
    let echoes = echo(service);
    let start = Instant::now();
    let reader = client.try_clone()?;
    let reads = thread::spawn(move || expect(&reader, 0, COUNT));
    for byte in bytes::bytes(COUNT) {
        (&client).write_all(&[byte])?;
    }
    join(reads)?;
    let took = start.elapsed();
    println!("{COUNT} bytes there and back, one by one: {took:?}");
    ensure!(took < patience::seconds(5), "{took:?}");
    client.shutdown(Shutdown::Write)?;
    expect_end(&client)?;
    join(echoes)
}

/// A header and a body in two writes, the pattern that Nagle's algorithm and delayed acknowledgements turn
/// into 40 ms each way.
fn messages_in_pieces_are_not_held_back() -> Result<()> {
    const ROUNDS: u32 = 500;
    let relayed = Relayed::new()?;
    let (client, service) = relayed.connection()?;
    let answers = thread::spawn(move || -> Result<()> {
        let mut message = [0; 2];
        for _ in 0..ROUNDS {
            (&service).read_exact(&mut message)?;
            (&service).write_all(&message[..1])?;
            (&service).write_all(&message[1..])?;
        }
        Ok(())
    });
    let mut slowest = Duration::ZERO;
    let mut total = Duration::ZERO;
    for round in 0..ROUNDS {
        let start = Instant::now();
        (&client).write_all(b"h")?;
        (&client).write_all(b"b")?;
        let mut back = [0; 2];
        (&client).read_exact(&mut back).with_context(|| format!("round {round}"))?;
        if &back != b"hb" {
            bail!("round {round}: {back:?}");
        }
        slowest = slowest.max(start.elapsed());
        total += start.elapsed();
    }
    join(answers)?;
    let mean = total / ROUNDS;
    println!("messages in two pieces: {mean:?} there and back, {slowest:?} at worst");
    ensure!(mean < patience::seconds(1) / 100, "{mean:?} a message");
    Ok(())
}

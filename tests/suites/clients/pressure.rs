//! A reader that does not read holds up the writer, and takes nothing of the daemon meanwhile.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

use crate::bytes::{expect, expect_end, part};
use crate::relayed::{Descriptors, Relayed};

pub(crate) fn tests() -> Vec<Test> {
    tests![slow_readers_hold_up_their_services_and_cost_nothing]
}

/// A service that sends until it is told to stop.
struct Endless {
    sent: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Endless {
    /// In `pieces` so small that the relay takes them one by one, or in bulk.
    fn start(mut socket: TcpStream, pieces: bool) -> Endless {
        let (sent, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, stopped) = (Arc::clone(&sent), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut at = 0;
            while !stopped.load(Ordering::SeqCst) {
                // Counted as it goes, since a whole part may be what does not fit.
                let length = if pieces { 3001 } else { 16384 };
                let written = std::io::Write::write(&mut socket, part(at, length))?;
                at += written;
                counter.store(at, Ordering::SeqCst);
                if pieces {
                    thread::sleep(Duration::from_micros(100));
                }
            }
            Ok(())
        });
        Endless { sent, stop, thread }
    }

    fn sent(&self) -> usize {
        self.sent.load(Ordering::SeqCst)
    }
}

fn slow_readers_hold_up_their_services_and_cost_nothing() -> Result<()> {
    const READERS: usize = 16;
    let relayed = Relayed::new()?;
    let daemon = relayed.daemon()?;
    let before = relayed.descriptors()?;
    let resident_before = daemon.resident()?;

    let mut all = Vec::new();
    for number in 0..READERS {
        let (client, service) = relayed.connection()?;
        service.set_write_timeout(None)?;
        all.push((client, Endless::start(service, number % 2 == 0)));
    }
    let sent =
        |all: &[(TcpStream, Endless)]| all.iter().map(|(_, service)| service.sent()).collect::<Vec<_>>();
    let mut last = sent(&all);
    patience::until("every service is held up", || {
        thread::sleep(Duration::from_millis(300));
        let now = sent(&all);
        Ok((std::mem::replace(&mut last, now.clone()) == now).then_some(()))
    })?;

    let look = || -> Result<_> { Ok((Descriptors::of(daemon)?, daemon.resident()?, daemon.ticks()?)) };
    let (descriptors, resident, ticks) = look()?;
    thread::sleep(Duration::from_secs(3));
    let (descriptors_then, resident_then, ticks_then) = look()?;
    let most = last.iter().max().context("nobody")? >> 10;
    println!(
        "held up after {most} KiB at most; resident {resident_before} KiB before, {resident} and \
         {resident_then} while held up; {descriptors:?}; {} ticks in 3 s",
        ticks_then - ticks
    );
    ensure!(sent(&all) == last, "held up, but goes on");
    ensure!(descriptors == descriptors_then, "{descriptors:?}, then {descriptors_then:?}");
    // Two sockets each, and a pipe for the direction that is held up; spare pipes besides.
    ensure!(descriptors.others <= before.others + 2 * READERS, "{before:?} before, now {descriptors:?}");
    ensure!(descriptors.pipes <= before.pipes + 2 * READERS + 40, "{before:?} before, now {descriptors:?}");
    ensure!(resident_then <= resident + 1024, "grows while held up: {resident} KiB, then {resident_then}");
    ensure!(resident <= resident_before + 8192, "{resident_before} KiB before, {resident} now");
    ensure!(ticks_then - ticks < 30, "{} ticks in 3 s", ticks_then - ticks);

    for (_, service) in &all {
        service.stop.store(true, Ordering::SeqCst);
    }
    for (number, (client, service)) in all.into_iter().enumerate() {
        // Reading lets the service go on for a last part, so its count is final once it has ended.
        expect(&client, 0, last[number]).with_context(|| format!("reader {number}"))?;
        service.thread.join().map_err(|_| anyhow::anyhow!("the service"))??;
        let sent = service.sent.load(Ordering::SeqCst);
        expect(&client, last[number], sent).with_context(|| format!("the rest of reader {number}"))?;
        expect_end(&client).with_context(|| format!("the end of reader {number}"))?;
    }
    relayed.nothing_leaks(before)
}

//! Ten thousand connections at a time, from processes of their own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, io, process};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::relayed::Relayed;

pub(crate) fn tests() -> Vec<Test> {
    tests![ten_thousand_idle_connections]
}

/// Number of connections that a relay carries at the same time.
const CONNECTIONS: usize = 10_000;
/// Descriptors that connections leave to the rest of the daemon.
const RESERVED: usize = 1280;
/// The most memory of the daemon's that they may take, in KiB.
const MEMORY: u64 = 100 << 10;
/// Number of processes that dial, each in a container of its own.
const PROCESSES: usize = 2;

/// Set for a process that dials: where to.
const DIAL: &str = "LBRIDGE_TEST_CROWD";

/// In a process that dials: does that, and never returns.
pub(crate) fn hook() {
    let Ok(address) = env::var(DIAL) else { return };
    let status = match dial_as_told(&address) {
        Ok(()) => 0,
        Err(error) => {
            println!("{error:#}");
            1
        }
    };
    process::exit(status);
}

/// Takes commands from standard input; the answer to each is a line.
fn dial_as_told(address: &str) -> Result<()> {
    let address: SocketAddr = address.parse()?;
    raise_open_files()?;
    let mut streams = Vec::new();
    for command in io::stdin().lines() {
        let command = command?;
        match command.split_once(' ').unwrap_or((&command, "")) {
            ("open", count) => {
                for number in 0..count.parse()? {
                    let stream = TcpStream::connect_timeout(&address, patience::seconds(5))
                        .with_context(|| format!("connection {number}"))?;
                    stream.set_read_timeout(Some(patience::seconds(20)))?;
                    streams.push(stream);
                }
            }
            ("exchange", _) => exchange(&mut streams)?,
            ("close", _) => streams.clear(),
            _ => anyhow::bail!("what is {command:?}?"),
        }
        println!("done");
    }
    Ok(())
}

/// A byte there and back, on every connection.
fn exchange(streams: &mut [TcpStream]) -> Result<()> {
    let byte = |number: usize| number.to_le_bytes()[0] ^ number.to_le_bytes()[1];
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&[byte(number)]).with_context(|| format!("send on connection {number}"))?;
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut back = [0];
        stream.read_exact(&mut back).with_context(|| format!("read on connection {number}"))?;
        ensure!(back == [byte(number)], "connection {number} got another's byte");
    }
    Ok(())
}

fn raise_open_files() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain system calls on a structure that outlives them.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// A process that dials, seen from the test.
pub(crate) struct Dialler {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Dialler {
    pub(crate) fn start(container: &NetNs, to: SocketAddr) -> Result<Dialler> {
        let mut command = container.command(env::current_exe()?);
        command.env(DIAL, to.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().context("start a process that dials")?;
        let orders = process.stdin.take().context("no pipe")?;
        let answers = BufReader::new(process.stdout.take().context("no pipe")?);
        Ok(Dialler { process, orders, answers })
    }

    pub(crate) fn order(&mut self, command: &str) -> Result<()> {
        writeln!(self.orders, "{command}").with_context(|| format!("order {command}"))
    }

    pub(crate) fn done(&mut self) -> Result<()> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line == "done\n", "{}", line.trim_end());
        Ok(())
    }
}

impl Drop for Dialler {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Accepts so many, or says how many came.
pub(crate) fn accept(listener: &TcpListener, count: usize) -> Result<Vec<TcpStream>> {
    let mut streams = Vec::with_capacity(count);
    while streams.len() < count {
        let mut events = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let came = poll(&mut events, PollTimeout::try_from(patience::seconds(5))?)?;
        ensure!(came == 1, "{} connections of {count} came through", streams.len());
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(patience::seconds(20)))?;
        streams.push(stream);
    }
    Ok(streams)
}

fn ten_thousand_idle_connections() -> Result<()> {
    raise_open_files()?;
    let relayed = Relayed::new()?;
    let daemon = relayed.daemon()?;
    // Two descriptors each, and an eighth of the places is for other rules.
    let all = daemon.open_files_limit()?.saturating_sub(RESERVED) / 2;
    let possible = all - all / 8;
    let count = CONNECTIONS.min(possible) / PROCESSES * PROCESSES;
    let mut diallers = Vec::new();
    for number in 0..PROCESSES {
        let container =
            relayed.scene.lab.container(&relayed.scene.bridge, &format!("10.7.0.{}/24", 10 + number))?;
        diallers.push(Dialler::start(&container, relayed.scene.gateway(8080))?);
    }
    let before = relayed.descriptors()?;
    let (resident_before, start) = (daemon.resident()?, Instant::now());

    let mut services = thread::scope(|scope| -> Result<_> {
        let accepting = scope.spawn(|| accept(&relayed.listener, count));
        for dialler in &mut diallers {
            dialler.order(&format!("open {}", count / PROCESSES))?;
        }
        let dialled: Result<()> = diallers.iter_mut().try_for_each(Dialler::done);
        let accepted = accepting.join().map_err(|_| anyhow::anyhow!("accept"))?;
        dialled.and(accepted)
    })?;
    let opened = start.elapsed();

    for dialler in &mut diallers {
        dialler.order("exchange")?;
    }
    let mut byte = [0];
    for (number, stream) in services.iter_mut().enumerate() {
        stream.read_exact(&mut byte).with_context(|| format!("the service's connection {number}"))?;
        stream.write_all(&byte)?;
    }
    diallers.iter_mut().try_for_each(Dialler::done)?;

    thread::sleep(Duration::from_millis(500));
    let (resident, ticks) = (daemon.resident()?, daemon.ticks()?);
    thread::sleep(Duration::from_secs(2));
    let spent = daemon.ticks()? - ticks;
    let grown = resident.saturating_sub(resident_before);
    println!(
        "{count} connections, opened in {opened:?}: {} descriptors; {grown} KiB more resident, {} bytes \
         each; {spent} ticks in 2 s of idling",
        daemon.descriptors()?,
        grown * 1024 / u64::try_from(count)?
    );
    ensure!(grown <= MEMORY, "{grown} KiB for {count} connections");
    ensure!(spent < 20, "{spent} ticks in 2 s, with nothing to do");
    let asked = Instant::now();
    relayed.scene.must_be(8080, "relayed")?;
    ensure!(asked.elapsed() < patience::seconds(2), "status took {:?}", asked.elapsed());

    for dialler in &mut diallers {
        dialler.order("close")?;
    }
    diallers.iter_mut().try_for_each(Dialler::done)?;
    for (number, stream) in services.iter_mut().enumerate() {
        let end = stream.read(&mut byte).with_context(|| format!("the end of connection {number}"))?;
        ensure!(end == 0, "connection {number} got a byte more");
    }
    drop(services);
    relayed.nothing_leaks(before)
}

//! Random endings: a script of writes, pauses, half-closes, closes and resets by client and service, run once
//! over a plain connection and once over the relay. What each side received, and how its stream ended, must
//! be the same.
//!
//! Two kinds of script:
//!
//! - *Awaited*: the next step comes when the other side has seen the last one. Then a plain connection has
//!   one outcome only, and the relay must have that one: the bytes, the end of each stream, and whether a
//!   side is told that its connection is dead.
//! - *Racing*: steps follow each other at once. Without a close or reset there is still one outcome. With
//!   one, a plain connection has many: a RST discards what its sender had not sent yet, so how much arrives
//!   depends on the moment; a close with unread bytes, or one that bytes arrive after, is a RST as well. A
//!   close alone, towards a side that never writes, is not. What holds for all of them is checked on both: a
//!   side receives a prefix of what the other wrote; an end of file means that nothing is missing and that
//!   the other side did end its stream; a reset means that somebody did more than that.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bytes::{Random, part};
use crate::relayed::{self, Relayed};

pub(crate) fn tests() -> Vec<Test> {
    tests![endings_are_those_of_a_plain_connection]
}

/// Repeats a run: `LBRIDGE_TEST_SEED=…`.
const SEED: &str = "LBRIDGE_TEST_SEED";
const SCRIPTS: usize = 600;
/// For the run, whatever is left of the scripts.
const TIME: Duration = Duration::from_secs(12);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Write(usize),
    Pause(u64),
    HalfClose,
    Close,
    Reset,
}

/// The side that acts: 0 is the client, 1 the service.
type Side = usize;

#[derive(Clone, Debug)]
struct Script {
    awaited: bool,
    steps: Vec<(Side, Act)>,
}

impl Script {
    fn random(random: &mut Random) -> Script {
        let awaited = random.below(5) < 2;
        let (mut writes, mut open) = ([true; 2], [true; 2]);
        let mut steps = Vec::new();
        for _ in 0..=random.below(12) {
            let side = usize::from(random.below(2) == 1);
            let length = match random.below(4) {
                0 => 1,
                1 => random.below(1000),
                2 => random.below(70_000),
                _ => random.below(400_000),
            };
            let act = match random.below(24) {
                0..14 => Act::Write(usize::try_from(length + 1).unwrap_or(1)),
                14..18 => Act::Pause(random.below(3)),
                18..21 => Act::HalfClose,
                21 => Act::Close,
                _ => Act::Reset,
            };
            match act {
                _ if !open[side] => continue,
                Act::Write(_) | Act::HalfClose if !writes[side] => continue,
                Act::HalfClose => writes[side] = false,
                Act::Close | Act::Reset => (writes[side], open[side]) = (false, false),
                Act::Write(_) | Act::Pause(_) => {}
            }
            steps.push((side, act));
        }
        Script { awaited, steps }
    }

    fn does(&self, side: Side, what: impl Fn(Act) -> bool) -> bool {
        self.steps.iter().any(|&(by, act)| by == side && what(act))
    }

    /// A plain connection has one outcome only.
    fn is_determined(&self) -> bool {
        let leaves = |side| self.does(side, |act| matches!(act, Act::Close | Act::Reset));
        let just_closes = |side: Side| {
            self.does(side, |act| act == Act::Close)
                && !leaves(1 - side)
                && !self.does(1 - side, |act| matches!(act, Act::Write(_)))
        };
        self.awaited || !(leaves(0) || leaves(1)) || just_closes(0) || just_closes(1)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    EndOfFile,
    Reset,
}

/// The bytes and the end that a side saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    bytes: usize,
    end: Option<End>,
    /// Nothing can be sent or received any more, by a reset or by both ends of file.
    over: bool,
}

/// One side of a running connection.
struct Player {
    socket: Option<TcpStream>,
    /// Where in the stream of bytes its own begin.
    origin: usize,
    written: usize,
    /// A write has taken the reset, which a read would have had; that finds nothing but an end then.
    reset: bool,
    ended: bool,
    seen: Seen,
}

/// Where each side's bytes begin in the stream: they must not look alike.
const ORIGINS: [usize; 2] = [0, 30_011];

impl Player {
    fn new(socket: TcpStream, origin: usize) -> Result<Player> {
        socket.set_nonblocking(true)?;
        Ok(Player {
            socket: Some(socket),
            origin,
            written: 0,
            reset: false,
            ended: false,
            seen: Seen::default(),
        })
    }

    /// Takes what has come; `from` is where the other side's bytes begin.
    fn take(&mut self, from: usize, buffer: &mut [u8]) -> Result<()> {
        let Some(socket) = &mut self.socket else { return Ok(()) };
        while self.seen.end.is_none() {
            match socket.read(buffer) {
                Ok(0) if self.reset => self.seen.end = Some(End::Reset),
                Ok(0) => self.seen.end = Some(End::EndOfFile),
                Ok(length) => {
                    let mut at = from + self.seen.bytes;
                    for piece in buffer[..length].chunks(32 * 1024) {
                        ensure!(*piece == *part(at, piece.len()), "other bytes after {}", at - from);
                        at += piece.len();
                    }
                    self.seen.bytes += length;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if is_reset(error.kind()) => self.seen.end = Some(End::Reset),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes some, up to `goal` bytes in all; true if there is no more to do.
    fn write(&mut self, goal: usize) -> Result<bool> {
        let Some(socket) = &mut self.socket else { return Ok(true) };
        while self.written < goal {
            match socket.write(part(self.origin + self.written, goal - self.written)) {
                Ok(length) => self.written += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                // The other side has left. EPIPE says that it had ended its stream before.
                Err(error) if is_reset(error.kind()) => {
                    self.reset |= error.kind() == ErrorKind::ConnectionReset;
                    return Ok(true);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

fn is_reset(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// A script on its way.
struct Play {
    players: [Player; 2],
    buffer: Vec<u8>,
}

impl Play {
    /// Lets things happen until `done`, for ten seconds at most.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Play) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            self.look()?;
            if done(self)? {
                return Ok(());
            }
            ensure!(start.elapsed() < patience::seconds(10), "waited in vain: {what}");
            self.wait()?;
        }
    }

    /// Takes what has come on both sides.
    fn look(&mut self) -> Result<()> {
        for side in 0..2 {
            self.players[side].take(ORIGINS[1 - side], &mut self.buffer)?;
            let Some(socket) = &self.players[side].socket else { continue };
            let mut events = [PollFd::new(socket.as_fd(), PollFlags::empty())];
            poll(&mut events, PollTimeout::ZERO)?;
            let ends = PollFlags::POLLHUP | PollFlags::POLLERR;
            self.players[side].seen.over |= events[0].revents().is_some_and(|now| now.intersects(ends));
        }
        Ok(())
    }

    /// Waits for something to come, a millisecond at most: room to write, and ends, come without an event.
    fn wait(&self) -> Result<()> {
        let reading = self.players.iter().filter(|player| player.seen.end.is_none());
        let mut events: Vec<_> = reading
            .filter_map(|player| player.socket.as_ref())
            .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
            .collect();
        poll(&mut events, 1_u8)?;
        Ok(())
    }

    fn act(&mut self, side: Side, act: Act) -> Result<()> {
        match act {
            Act::Write(length) => {
                let goal = self.players[side].written + length;
                self.until("room to write", |play| play.players[side].write(goal))?;
            }
            Act::Pause(milliseconds) => {
                let start = Instant::now();
                let long = Duration::from_millis(milliseconds);
                self.until("the pause's end", |_| Ok(start.elapsed() >= long))?;
            }
            Act::HalfClose => {
                let player = &mut self.players[side];
                player.ended = true;
                // Fails where the other side has reset.
                player.socket.as_ref().map(|socket| socket.shutdown(Shutdown::Write));
            }
            Act::Close => {
                self.players[side].ended = true;
                self.players[side].socket = None;
            }
            Act::Reset => {
                if let Some(socket) = self.players[side].socket.take() {
                    relayed::reset(socket)?;
                }
            }
        }
        Ok(())
    }

    /// Waits until the other side has seen what this one did.
    fn settle(&mut self, side: Side, act: Act) -> Result<()> {
        let other = 1 - side;
        self.until(&format!("{act:?} is seen"), |play| {
            let written = play.players[side].written;
            let (this, that) = (&play.players[side], &play.players[other]);
            Ok(match act {
                Act::Pause(_) => true,
                // To one that has left: this side is told.
                Act::Write(_) if that.socket.is_none() => this.seen.over,
                _ if that.socket.is_none() => true,
                Act::Write(_) => that.seen.bytes == written || that.seen.over,
                Act::HalfClose | Act::Close => that.seen.end.is_some(),
                Act::Reset => that.seen.end.is_some() && that.seen.over,
            })
        })
    }
}

/// Runs a script; what each side saw, and how much it wrote.
fn play(script: &Script, (client, service): (TcpStream, TcpStream)) -> Result<[(Seen, usize); 2]> {
    let players = [Player::new(client, ORIGINS[0])?, Player::new(service, ORIGINS[1])?];
    let mut play = Play { players, buffer: vec![0; 65536] };
    for &(side, act) in &script.steps {
        let last = act;
        play.act(side, last)?;
        if script.awaited {
            play.settle(side, last)?;
        }
        play.look()?;
    }
    for side in 0..2 {
        if !play.players[side].ended {
            play.act(side, Act::HalfClose)?;
        }
    }
    play.until("both streams end", |play| {
        Ok(play.players.iter().all(|player| player.socket.is_none() || player.seen.end.is_some()))
    })?;
    Ok(play.players.map(|player| (player.seen, player.written)))
}

/// Checks what holds for every outcome.
fn is_possible(script: &Script, outcome: &[(Seen, usize); 2]) -> Result<()> {
    for side in 0..2 {
        let (seen, (_, written)) = (&outcome[side].0, &outcome[1 - side]);
        ensure!(seen.bytes <= *written, "side {side} received {} bytes of {written}", seen.bytes);
        let other = 1 - side;
        let resets = script.does(other, |act| act == Act::Reset);
        let ends = !resets || script.does(other, |act| act == Act::HalfClose);
        let leaves = resets || script.does(other, |act| act == Act::Close);
        match seen.end {
            Some(End::EndOfFile) => {
                ensure!(ends, "side {side} sees an end of file, where there was a reset only");
                ensure!(
                    seen.bytes == *written,
                    "side {side} sees an end of file after {} bytes of {written}",
                    seen.bytes
                );
            }
            Some(End::Reset) => ensure!(leaves, "side {side} sees a reset that nobody made"),
            None => ensure!(script.does(side, |act| matches!(act, Act::Close | Act::Reset)), "no end"),
        }
    }
    Ok(())
}

fn compare(script: &Script, plain: (TcpStream, TcpStream), relayed: (TcpStream, TcpStream)) -> Result<()> {
    let plain = play(script, plain).context("on the plain connection")?;
    is_possible(script, &plain).with_context(|| format!("on the plain connection: {plain:?}"))?;
    let relayed = play(script, relayed).context("on the relayed connection")?;
    is_possible(script, &relayed).with_context(|| format!("on the relayed connection: {relayed:?}"))?;
    if script.is_determined() {
        for (side, (mut plain, relayed)) in
            plain.map(|one| one.0).into_iter().zip(relayed.map(|one| one.0)).enumerate()
        {
            if !script.awaited {
                // When a connection that has ended on both sides is over differs by a moment...
                plain.over = relayed.over;
                // ...as does what a side has seen before it closes.
                if script.does(side, |act| act == Act::Close) {
                    continue;
                }
            }
            ensure!(plain == relayed, "side {side} sees {plain:?} if plain, {relayed:?} if relayed");
        }
    }
    Ok(())
}

fn endings_are_those_of_a_plain_connection() -> Result<()> {
    let seed = match std::env::var(SEED) {
        Ok(seed) => seed.parse().context("the seed")?,
        Err(_) => u64::try_from(std::time::UNIX_EPOCH.elapsed()?.as_micros())?,
    };
    println!("{SEED}={seed}");
    let through = Relayed::new()?;
    let before = through.descriptors()?;
    // In the host's namespace, on the gateway: without a rule, nothing of lbridge is in between.
    let direct: TcpListener = relayed::listen(through.scene.lab.host(), "10.7.0.1:9090".parse()?)?;
    let mut random = Random(seed | 1);
    let (start, mut determined, mut played) = (Instant::now(), 0, 0);
    while played < SCRIPTS && start.elapsed() < TIME {
        let script = Script::random(&mut random);
        let plain = relayed::connection(&through.scene.container, through.scene.gateway(9090), &direct)?;
        let over = through.connection()?;
        compare(&script, plain, over).with_context(|| {
            let mut text = format!("{SEED}={seed}, script {played}, awaited: {}", script.awaited);
            for (side, act) in &script.steps {
                // Writing to a string cannot fail.
                let _ = write!(text, "\n  {} {act:?}", ["client ", "service"][*side]);
            }
            text
        })?;
        played += 1;
        determined += usize::from(script.is_determined());
    }
    println!("{played} scripts, {determined} of them with one outcome, in {:?}", start.elapsed());
    ensure!(played > SCRIPTS / 8, "{played} scripts took all the time");
    through.nothing_leaks(before)
}

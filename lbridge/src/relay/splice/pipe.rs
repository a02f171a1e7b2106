//! The pipe between two splices: it holds references to a socket's pages, so bulk bytes are never copied.
//!
//! Owns the spare pipes of each thread. May import nothing of the crate.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{OFlag, SpliceFFlags, splice};
use nix::unistd::pipe2;

/// The most one splice takes from a socket. A slot of the pipe refers to up to 32 KiB of a socket's memory, so a
/// pipe of the default 16 slots would take 512 KiB: more than a reader that has stopped should pin.
const CHUNK: usize = 128 * 1024;

/// How many empty pipes a thread keeps. A direction needs one only while bytes are in it, and most of the time it
/// is empty again before the next direction is served, so few serve many connections.
const SPARES: usize = 8;

thread_local! {
    static EMPTY: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe, and how many bytes are in it.
pub(super) struct Pipe {
    pub(super) read: OwnedFd,
    pub(super) write: OwnedFd,
    level: usize,
}

impl Pipe {
    /// Takes an empty pipe, a spare one if there is any.
    pub(super) fn take() -> io::Result<Self> {
        if let Some(spare) = EMPTY.with_borrow_mut(Vec::pop) {
            return Ok(spare);
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { read, write, level: 0 })
    }

    /// Gives the pipe back. One with bytes in it is closed: they must never reach another connection.
    pub(super) fn give_back(self) {
        if self.level == 0 {
            EMPTY.with_borrow_mut(|empty| {
                if empty.len() < SPARES {
                    empty.push(self);
                }
            });
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.level == 0
    }

    /// Splices from a socket. Only an empty pipe is filled: then, and only then, `WouldBlock` cannot mean that the
    /// pipe is full.
    pub(super) fn fill(&mut self, from: &impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.level, 0, "EAGAIN would be ambiguous");
        let moved = splice(from, None, &self.write, None, CHUNK, flags())?;
        self.level = moved;
        Ok(moved)
    }

    /// Splices what is in the pipe to a socket. The pipe is not empty, so `WouldBlock` means that the socket is full.
    pub(super) fn drain(&mut self, to: &impl AsFd) -> io::Result<usize> {
        let moved = splice(&self.read, None, to, None, self.level, flags())?;
        self.level -= moved;
        Ok(moved)
    }
}

/// Never `SPLICE_F_MORE`: it makes TCP hold back the last segment for up to a second when no more comes.
fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}

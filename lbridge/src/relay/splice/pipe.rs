//! Pipe: the pipe between two splices. It holds references to a socket's pages, so bulk bytes are never
//! copied.
//!
//! Owns the spare pipes of each thread. May import nothing of the crate.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// The most bytes that one splice takes from a socket, and so the most that a reader which has stopped pins.
/// Larger chunks cost less: a GiB took 490 ms of CPU with 256 KiB, and 340 ms with 1 MiB.
const CHUNK: usize = 512 * 1024;

/// The requested size of a pipe in bytes: room for 256 pieces. A piece may be 32 KiB of a socket's memory or
/// a single segment, and the default, 16 pieces, is often full long before `CHUNK` bytes are in it. An empty
/// pipe holds no pages.
const SLOTS_IN_BYTES: i32 = 1024 * 1024;

/// The most empty pipes that a thread keeps. A direction needs one only while bytes are in it, and most of
/// the time it is empty again before the next direction is served, so that a few serve many connections.
const SPARES: usize = 8;

/// The number of pipes in this process, and its limit.
static PIPES: AtomicUsize = AtomicUsize::new(0);
static MAX_PIPES: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Limits the number of pipes in this process from now on. Each takes two descriptors, and is held for as
/// long as its reader does not read. Directions that get none copy through a buffer.
pub(crate) fn limit_pipes(max: usize) {
    MAX_PIPES.store(max, Ordering::Relaxed);
}

thread_local! {
    static EMPTY: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe, and the number of bytes in it.
pub(super) struct Pipe {
    pub(super) read: OwnedFd,
    pub(super) write: OwnedFd,
    level: usize,
    _count: Count,
}

/// A place under the limit of pipes, freed when dropped.
struct Count;

impl Count {
    fn take() -> io::Result<Self> {
        let max = MAX_PIPES.load(Ordering::Relaxed);
        let taken = PIPES
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |pipes| (pipes < max).then_some(pipes + 1));
        taken.map(|_| Self).map_err(|_| io::Error::other("the limit on pipes is reached"))
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pipe {
    /// Takes an empty pipe: one of the thread's spares, or else a new one.
    pub(super) fn take() -> io::Result<Self> {
        if let Some(spare) = EMPTY.with_borrow_mut(Vec::pop) {
            return Ok(spare);
        }
        let count = Count::take()?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // A smaller pipe does as well, only slower.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(SLOTS_IN_BYTES));
        Ok(Self { read, write, level: 0, _count: count })
    }

    /// Returns the pipe to the thread's spares. One with bytes in it is closed instead: they must never reach
    /// another connection.
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

    /// Splices from a socket into the pipe, which must be empty: only then can `WouldBlock` not mean that the
    /// pipe is full.
    pub(super) fn fill(&mut self, from: &impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.level, 0, "EAGAIN would be ambiguous");
        let moved = splice(from, None, &self.write, None, CHUNK, flags())?;
        self.level = moved;
        Ok(moved)
    }

    /// Splices the pipe's bytes to a socket. The pipe must not be empty, so `WouldBlock` means that the
    /// socket is full.
    pub(super) fn drain(&mut self, to: &impl AsFd) -> io::Result<usize> {
        let moved = splice(&self.read, None, to, None, self.level, flags())?;
        self.level -= moved;
        Ok(moved)
    }
}

/// Returns the flags of every splice. Never `SPLICE_F_MORE`: it makes TCP hold back the last segment for up
/// to a second when no more bytes come.
fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}

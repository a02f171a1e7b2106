//! Pump: moves one direction of a relayed connection.
//!
//! Owns the choice between the two ways to move bytes: through a buffer (one copy, two system calls for a
//! small message) and through a pipe with splice(2) (no copy). May import `leg` and `pipe` beside it.
//!
//! While a direction waits for something to read it owns neither a buffer nor a pipe: the buffer is the
//! thread's, the pipe one of the thread's spares. A direction holds bytes only while its destination does not
//! accept them, and reads nothing more until it has.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use tokio::io::Interest;

use super::Side;
use super::leg::Leg;
use super::pipe::Pipe;

/// The size of the thread's buffer in bytes: what one buffered read takes at most, and what a direction holds
/// at most when its destination is full.
const BUFFER: usize = 16 * 1024;

/// The number of reads in a row that fill the buffer after which a direction splices.
const FULL_READS: u8 = 4;

/// A splice that moves fewer bytes than this would have been cheaper through the buffer.
const SMALL_SPLICE: usize = BUFFER / 2;

/// The number of such splices in a row after which the direction returns to the buffer.
const SMALL_SPLICES: u8 = 8;

/// The number of moves that a direction makes before the other direction, and the other connections, get
/// their turn. Well below tokio's budget for one poll (128): a direction that used it up would keep the other
/// from ever being ready.
const TURN: u32 = 32;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// The bytes that a client sent before its connection was relayed; `None` if it had sent none.
#[derive(Debug, Default)]
pub(crate) struct Prefetched(Option<Box<[u8]>>);

impl Prefetched {
    /// Reads what has arrived already; most clients speak first, and at once. Fails if the connection is
    /// broken.
    pub(crate) fn read(from: &impl Leg) -> io::Result<Self> {
        SCRATCH.with_borrow_mut(|buffer| match from.read_now(buffer) {
            // The relay's first read will see the end of the stream again.
            Ok(0) => Ok(Self(None)),
            Ok(read) => Ok(Self(Some(buffer[..read].into()))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Self(None)),
            Err(error) => Err(error),
        })
    }

    /// Returns true if nothing had arrived.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

/// The failure of a connection: the side that broke, and the error.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) side: Side,
    pub(super) error: io::Error,
}

/// The state of one direction. It outlives the future that moves it, so that bytes taken from a source are
/// still there when the other direction finds the connection broken.
pub(super) struct Flow<'a> {
    from: Side,
    moved: &'a AtomicU64,
    held: Held,
    mode: Mode,
}

/// Bytes taken from the source that the destination has not accepted yet.
enum Held {
    Nothing,
    Bytes { bytes: Box<[u8]>, written: usize },
    Piped(Pipe),
}

enum Mode {
    Buffered {
        full_reads: u8,
    },
    Spliced {
        small_splices: u8,
    },
    /// The kernel does not splice from this source.
    BufferedOnly,
}

/// The result of one attempt to move bytes.
enum Step {
    /// Bytes were moved; there may be more.
    Moved,
    /// There is nothing to read.
    Empty,
    /// The destination is full; bytes are held.
    Blocked,
    /// The source is at its end of file; no bytes are held.
    End,
}

/// The condition that also ends a wait for the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    Source,
    /// None: the source is known to be broken, and the bytes that it left are being delivered.
    Nothing,
}

impl<'a> Flow<'a> {
    pub(super) fn new(from: Side, moved: &'a AtomicU64) -> Self {
        Self { from, moved, held: Held::Nothing, mode: Mode::Buffered { full_reads: 0 } }
    }

    /// Makes the flow begin with bytes that were read before.
    pub(super) fn with(self, early: Prefetched) -> Self {
        let held = match early.0 {
            Some(bytes) => Held::Bytes { bytes, written: 0 },
            None => Held::Nothing,
        };
        Self { held, ..self }
    }

    /// Returns the side that this direction reads from.
    pub(super) fn from(&self) -> Side {
        self.from
    }

    fn source(&self, error: io::Error) -> Broken {
        Broken { side: self.from, error }
    }

    fn destination(&self, error: io::Error) -> Broken {
        // A write to a socket that was reset may return EPIPE: an earlier write consumed the error itself,
        // but reported only the part that it had written. Only a read tells whether the peer's FIN came
        // before the reset.
        let reset = error.raw_os_error() == Some(Errno::EPIPE as i32);
        let error = if reset { Errno::ECONNRESET.into() } else { error };
        Broken { side: self.from.other(), error }
    }

    fn count(&self, moved: usize) {
        self.moved.fetch_add(moved as u64, Ordering::Relaxed);
    }

    /// Moves bytes once, if that does not block.
    ///
    /// Only a plain read yields `Step::Empty`. A splice returns `WouldBlock` for more reasons than an empty
    /// socket (an urgent byte ahead, for one), and waiting on that could mean waiting for ever.
    fn step(&mut self, src: &impl Leg, dst: &impl Leg) -> Result<Step, Broken> {
        if !self.flush(dst)? {
            return Ok(Step::Blocked);
        }
        if let Mode::Spliced { .. } = self.mode
            && self.fill(src)?
        {
            return Ok(if self.flush(dst)? { Step::Moved } else { Step::Blocked });
        }
        SCRATCH.with_borrow_mut(|buffer| {
            let read = match src.try_read(buffer) {
                Ok(0) => return Ok(Step::End),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Empty),
                Err(error) => return Err(self.source(error)),
            };
            self.adapt_to_read(read == buffer.len());
            let written = self.write(dst, &buffer[..read])?;
            if written == read {
                return Ok(Step::Moved);
            }
            self.held = Held::Bytes { bytes: buffer[written..read].into(), written: 0 };
            Ok(Step::Blocked)
        })
    }

    /// Splices from the source into a pipe. Returns false if that moved nothing.
    fn fill(&mut self, src: &impl Leg) -> Result<bool, Broken> {
        let Ok(mut pipe) = Pipe::take() else {
            // No descriptors left, or no pipes under the limit: slow is better than not at all.
            self.mode = Mode::Buffered { full_reads: 0 };
            return Ok(false);
        };
        match pipe.fill(&src.as_fd()) {
            Ok(0) => {}
            Ok(moved) => {
                self.adapt_to_splice(moved);
                self.held = Held::Piped(pipe);
                return Ok(true);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if is_unsupported(&error) => self.mode = Mode::BufferedOnly,
            Err(error) => return Err(self.source(error)),
        }
        pipe.give_back();
        Ok(false)
    }

    /// Writes the held bytes. Returns true if none are left.
    fn flush(&mut self, dst: &impl Leg) -> Result<bool, Broken> {
        match std::mem::replace(&mut self.held, Held::Nothing) {
            Held::Nothing => Ok(true),
            Held::Bytes { bytes, written } => {
                let written = written + self.write(dst, &bytes[written..])?;
                if written == bytes.len() {
                    return Ok(true);
                }
                self.held = Held::Bytes { bytes, written };
                Ok(false)
            }
            Held::Piped(mut pipe) => {
                while !pipe.is_empty() {
                    match dst.try_io(Interest::WRITABLE, || pipe.drain(&dst.as_fd())) {
                        // A socket does not do that, but retrying for ever would be worse.
                        Ok(0) => return Err(self.destination(Errno::EPIPE.into())),
                        Ok(moved) => self.count(moved),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.held = Held::Piped(pipe);
                            return Ok(false);
                        }
                        Err(error) => return Err(self.destination(error)),
                    }
                }
                pipe.give_back();
                Ok(true)
            }
        }
    }

    /// Writes as much of `bytes` as the destination accepts, and returns how much that was.
    fn write(&self, dst: &impl Leg, bytes: &[u8]) -> Result<usize, Broken> {
        let mut written = 0;
        while written < bytes.len() {
            match dst.try_write(&bytes[written..]) {
                Ok(0) => return Err(self.destination(Errno::EPIPE.into())),
                Ok(moved) => {
                    self.count(moved);
                    written += moved;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(self.destination(error)),
            }
        }
        Ok(written)
    }

    fn adapt_to_read(&mut self, full: bool) {
        match &mut self.mode {
            Mode::Buffered { full_reads } if full => {
                *full_reads += 1;
                if *full_reads == FULL_READS {
                    self.mode = Mode::Spliced { small_splices: 0 };
                }
            }
            Mode::Buffered { full_reads } => *full_reads = 0,
            // A read in this mode follows a splice that found nothing.
            Mode::Spliced { .. } if full => {}
            Mode::Spliced { .. } => self.adapt_to_splice(0),
            Mode::BufferedOnly => {}
        }
    }

    fn adapt_to_splice(&mut self, moved: usize) {
        if let Mode::Spliced { small_splices } = &mut self.mode {
            *small_splices = if moved < SMALL_SPLICE { *small_splices + 1 } else { 0 };
            if *small_splices == SMALL_SPLICES {
                self.mode = Mode::Buffered { full_reads: 0 };
            }
        }
    }
}

/// Moves bytes until the source's end of file.
pub(super) async fn transfer(
    flow: &mut Flow<'_>,
    src: &impl Leg,
    dst: &impl Leg,
    watch: Watch,
) -> Result<(), Broken> {
    loop {
        let mut moves = 0;
        let step = loop {
            match flow.step(src, dst)? {
                Step::Moved if moves < TURN => moves += 1,
                step => break step,
            }
        };
        match step {
            Step::Moved => tokio::task::yield_now().await,
            Step::End => return Ok(()),
            Step::Empty => {
                poll_fn(|cx| src.poll_readable(cx)).await.map_err(|error| flow.source(error))?;
            }
            Step::Blocked => {
                let writable = poll_fn(|cx| dst.poll_writable(cx));
                if watch == Watch::Nothing {
                    writable.await.map_err(|error| flow.destination(error))?;
                    continue;
                }
                // Nothing reads from the source now, so its reset would go unnoticed for as long as the
                // destination does not read.
                tokio::select! {
                    biased;
                    writable = writable => writable.map_err(|error| flow.destination(error))?,
                    error = broken(src) => return Err(flow.source(error)),
                }
            }
        }
    }
}

/// Waits until the leg breaks, without reading from it, and returns the error.
pub(super) async fn broken(leg: &impl Leg) -> io::Error {
    match leg.error_raised().await.and_then(|()| leg.take_error()) {
        Ok(error) => error.unwrap_or_else(|| Errno::ECONNRESET.into()),
        Err(error) => error,
    }
}

/// Returns true if a splice failed because it is not supported, by this kind of socket or by a sandbox that
/// emulates the kernel.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EINVAL | Errno::ENOSYS | Errno::EPERM))
}

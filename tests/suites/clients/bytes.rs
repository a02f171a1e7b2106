//! Long streams in which a lost, doubled or moved part shows, cheap enough to make and to check in a debug
//! build.

use std::io::{self, Read, Write};
use std::sync::LazyLock;

use anyhow::{Context, Result, ensure};

/// The stream repeats after a prime number of bytes, so that a shift by any buffer's size is one that shows.
const PERIOD: usize = 65_521;
/// The most that is sent or checked in one go.
const PART: usize = 256 * 1024;

static STREAM: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random(7);
    let period: Vec<u8> = (0..PERIOD).map(|_| random.draw().to_be_bytes()[0]).collect();
    period.into_iter().cycle().take(PERIOD + PART).collect()
});

/// Up to [`PART`] bytes of the stream.
pub(crate) fn part(from: usize, length: usize) -> &'static [u8] {
    &STREAM[from % PERIOD..][..length.min(PART)]
}

/// So many bytes of the stream.
pub(crate) fn bytes(length: usize) -> Vec<u8> {
    STREAM[..PERIOD].iter().copied().cycle().take(length).collect()
}

/// Sends bytes `from..to` of the stream.
pub(crate) fn send(mut socket: impl Write, mut from: usize, to: usize) -> io::Result<()> {
    while from < to {
        let part = part(from, to - from);
        socket.write_all(part)?;
        from += part.len();
    }
    Ok(())
}

/// Reads bytes `from..to` of the stream, and no others.
pub(crate) fn expect(mut socket: impl Read, mut from: usize, to: usize) -> Result<()> {
    let mut buffer = vec![0; PART];
    while from < to {
        let wanted = buffer.len().min(to - from);
        let length = socket.read(&mut buffer[..wanted]).with_context(|| format!("read at {from}"))?;
        ensure!(length > 0, "ended at {from} of {to}");
        ensure!(buffer[..length] == *part(from, length), "other bytes after {from}");
        from += length;
    }
    Ok(())
}

/// Nothing more comes: the stream ends.
pub(crate) fn expect_end(mut socket: impl Read) -> Result<()> {
    let length = socket.read(&mut [0; 64]).context("read the end")?;
    ensure!(length == 0, "{length} bytes too many");
    Ok(())
}

/// xorshift64*: the same numbers for the same seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `limit`, which is small.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.draw() >> 16) % limit
    }
}

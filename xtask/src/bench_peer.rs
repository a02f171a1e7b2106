//! bench_peer: both ends of a measured connection. The server is a process of its own, the client a thread of
//! the benchmark.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Length of a message in bytes.
const MESSAGE: usize = 64;
/// First byte of a message that the server sends back.
const ECHO: u8 = b'E';
/// First byte of a message that announces a stream.
const STREAM: u8 = b'S';
/// Number of threads that accept and serve, per listener. One per connection would cost more than the
/// measured path; a single one would wait for a proxy to close the previous connection.
const ACCEPTORS: usize = 4;
/// First byte of the message after which the connection is kept open and idle.
const HOLD: u8 = b'H';
/// First byte of a stream's last chunk.
const LAST: u8 = b'L';
/// Size of a chunk in bytes. A stream consists of chunks.
const CHUNK: usize = 256 * 1024;

/// The quantities that can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// Round trips of a message on one connection, per second.
    RoundTrips,
    /// Connections with one round trip each, per second.
    Connections,
    /// Throughput in one direction on one connection, in units of 10⁹ bits per second.
    Stream,
}

/// Options of the hidden command.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where to listen
    #[arg(required = true)]
    addresses: Vec<SocketAddr>,
}

/// Serves until killed. Prints a line to standard output when all listeners are ready.
pub(crate) fn handle(arguments: &Arguments) -> Result<()> {
    let mut threads = Vec::new();
    for address in &arguments.addresses {
        let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
        for _ in 0..ACCEPTORS {
            let listener = listener.try_clone()?;
            threads.push(thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    // The client measures, and knows what went wrong.
                    if let Ok(Some(held)) = serve(stream) {
                        // Kept open for as long as this process lives.
                        std::mem::forget(held);
                    }
                }
            }));
        }
    }
    println!("ready");
    for thread in threads {
        // These threads serve forever.
        drop(thread.join());
    }
    Ok(())
}

/// Serves until the client ends the connection; returns the connection if it must be kept open instead.
fn serve(mut stream: TcpStream) -> io::Result<Option<TcpStream>> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE];
    loop {
        match stream.read_exact(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        if message[0] == STREAM {
            let mut chunk = vec![0; CHUNK];
            let (mut received, mut end) = (0_usize, None);
            while end != Some(received) {
                let length = stream.read(&mut chunk)?;
                if length == 0 {
                    break;
                }
                // At most one byte of a read is the first of a chunk.
                let first = received.next_multiple_of(CHUNK);
                if first < received + length && chunk[first - received] == LAST {
                    end = Some(first + CHUNK);
                }
                received += length;
            }
            stream.write_all(&(received as u64).to_le_bytes())?;
        } else {
            stream.write_all(&message)?;
            if message[0] == HOLD {
                return Ok(Some(stream));
            }
        }
    }
}

/// Opens `count` connections, each with one round trip, and keeps them open. If there are fewer, also returns
/// the error.
pub(crate) fn hold(address: SocketAddr, count: usize) -> (Vec<TcpStream>, Option<io::Error>) {
    let mut connections = Vec::with_capacity(count);
    let open = || {
        let mut stream = connect(address)?;
        let mut message = [HOLD; MESSAGE];
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        Ok(stream)
    };
    while connections.len() < count {
        match open() {
            Ok(stream) => connections.push(stream),
            Err(error) => return (connections, Some(error)),
        }
    }
    (connections, None)
}

/// Measures for `time`, from the calling thread's network namespace.
pub(crate) fn measure(measure: Measure, address: SocketAddr, time: Duration) -> Result<f64> {
    match measure {
        Measure::RoundTrips => round_trips(address, time),
        Measure::Connections => connections(address, time),
        Measure::Stream => send(address, time),
    }
    .with_context(|| format!("{measure:?} with {address}"))
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    // Nothing here takes that long, unless it hangs.
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

fn round_trips(address: SocketAddr, time: Duration) -> Result<f64> {
    let mut stream = connect(address)?;
    let mut message = [ECHO; MESSAGE];
    per_second(time, || {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        Ok(())
    })
}

fn connections(address: SocketAddr, time: Duration) -> Result<f64> {
    let mut message = [ECHO; MESSAGE];
    per_second(time, || {
        let mut stream = connect(address)?;
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        Ok(())
    })
}

#[expect(clippy::cast_precision_loss, reason = "a rate; nobody looks at its 16th digit")]
fn per_second(time: Duration, mut work: impl FnMut() -> io::Result<()>) -> Result<f64> {
    let start = Instant::now();
    let mut count = 0u64;
    while start.elapsed() < time {
        work()?;
        count += 1;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

#[expect(clippy::cast_precision_loss, reason = "a rate; nobody looks at its 16th digit")]
fn send(address: SocketAddr, time: Duration) -> Result<f64> {
    let mut stream = connect(address)?;
    stream.write_all(&[STREAM; MESSAGE])?;
    let mut chunk = vec![0; CHUNK];
    let start = Instant::now();
    let mut sent = 0u64;
    while start.elapsed() < time {
        stream.write_all(&chunk)?;
        sent += chunk.len() as u64;
    }
    // Not every proxy passes on the end of only one direction.
    chunk[0] = LAST;
    stream.write_all(&chunk)?;
    sent += chunk.len() as u64;
    let mut received = [0; 8];
    stream.read_exact(&mut received)?;
    anyhow::ensure!(u64::from_le_bytes(received) == sent, "sent {sent} bytes, but not all arrived");
    Ok(sent as f64 * 8.0 / 1e9 / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_measure_measures() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || listener.incoming().flatten().for_each(|stream| drop(serve(stream))));
        for kind in [Measure::RoundTrips, Measure::Connections, Measure::Stream] {
            let rate = measure(kind, address, Duration::from_millis(20)).unwrap();
            assert!(rate > 0.0, "{kind:?}: {rate}");
        }
        let (connections, error) = hold(address, 3);
        assert!(connections.len() == 3 && error.is_none(), "{error:?}");
    }
}

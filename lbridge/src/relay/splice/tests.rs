//! Tests: run the data plane over real sockets of the loopback interface.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{MsgFlags, getsockopt, send, setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::pipe::Pipe;
use super::*;

/// The longest wait in a test: longer than anything here takes, and short enough for a stuck test.
const PATIENCE: Duration = Duration::from_secs(8);

/// Makes both ends of a connection over loopback.
async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

/// Makes a pair like [`tcp_pair`], of which the accepted socket is for a relay.
async fn client_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    prepare(&listener).unwrap();
    let address = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

/// Makes a pair like [`tcp_pair`], of which the dialled socket is for a relay.
async fn service_pair() -> (TcpStream, TcpStream) {
    let (dialled, accepted) = tcp_pair().await;
    prepare(&dialled).unwrap();
    (dialled, accepted)
}

/// The relay relies on inheritance: it sets no options on accepted sockets.
#[tokio::test]
async fn accepted_sockets_inherit_their_options() {
    let (_client, accepted) = client_pair().await;
    let linger = getsockopt(&accepted, sockopt::Linger).unwrap();
    assert_eq!((linger.l_onoff, linger.l_linger), (1, 0));
    assert!(getsockopt(&accepted, sockopt::TcpNoDelay).unwrap());
    assert!(getsockopt(&accepted, sockopt::OobInline).unwrap());
    assert!(getsockopt(&accepted, sockopt::KeepAlive).unwrap());
    let times = [
        getsockopt(&accepted, sockopt::TcpKeepIdle),
        getsockopt(&accepted, sockopt::TcpKeepInterval),
        getsockopt(&accepted, sockopt::TcpKeepCount),
    ];
    assert_eq!(times, [Ok(60), Ok(10), Ok(6)]);
}

fn small_buffers(socket: &TcpStream) {
    setsockopt(socket, sockopt::SndBuf, &(32 * 1024)).unwrap();
    setsockopt(socket, sockopt::RcvBuf, &(32 * 1024)).unwrap();
}

/// A running relay between two sockets; the test holds their other ends.
struct Bridge<S> {
    client: TcpStream,
    service: S,
    traffic: Arc<Traffic>,
    task: JoinHandle<Outcome>,
}

impl<S> Bridge<S> {
    fn start<L: Leg + 'static>(client: TcpStream, client_leg: TcpStream, service: S, service_leg: L) -> Self {
        let traffic = Arc::new(Traffic::default());
        let counters = Arc::clone(&traffic);
        let task =
            tokio::spawn(
                async move { relay(client_leg, Prefetched::default(), service_leg, &counters).await },
            );
        Self { client, service, traffic, task }
    }
}

async fn bridge() -> Bridge<TcpStream> {
    let (client, client_leg) = client_pair().await;
    let (service_leg, service) = service_pair().await;
    client.set_nodelay(true).unwrap();
    service.set_nodelay(true).unwrap();
    Bridge::start(client, client_leg, service, service_leg)
}

async fn bridge_with_small_buffers() -> Bridge<TcpStream> {
    let (client, client_leg) = client_pair().await;
    let (service_leg, service) = service_pair().await;
    for socket in [&client, &client_leg, &service_leg, &service] {
        small_buffers(socket);
    }
    Bridge::start(client, client_leg, service, service_leg)
}

async fn unix_bridge() -> Bridge<UnixStream> {
    let (client, client_leg) = client_pair().await;
    let (service_leg, service) = UnixStream::pair().unwrap();
    Bridge::start(client, client_leg, service, service_leg)
}

async fn outcome(task: JoinHandle<Outcome>) -> Outcome {
    timeout(PATIENCE, task).await.expect("the relay ends").unwrap()
}

/// The longest part of the pattern that is compared at once, in bytes.
const PART: usize = 512 * 1024;

/// The length of the pattern in bytes; a prime, so that a shift by any power of two is visible.
const PERIOD: usize = 65_521;

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random(42);
    let period: Vec<u8> = (0..PERIOD).map(|_| random.below(256).to_le_bytes()[0]).collect();
    period.iter().copied().cycle().take(PERIOD + PART).collect()
});

/// Returns a part of a byte stream in which a shifted, lost or repeated piece is visible.
fn pattern(position: usize, length: usize) -> &'static [u8] {
    &PATTERN[position % PERIOD..][..length]
}

fn assert_pattern(position: usize, bytes: &[u8]) {
    for (i, part) in bytes.chunks(PART).enumerate() {
        let position = position + i * PART;
        assert!(
            part == pattern(position, part.len()),
            "wrong bytes at {position}..{}",
            position + part.len()
        );
    }
}

async fn write_pattern(to: &mut (impl AsyncWrite + Unpin), from: usize, length: usize) -> io::Result<()> {
    let mut position = from;
    while position < from + length {
        let part = pattern(position, PART.min(from + length - position));
        to.write_all(part).await?;
        position += part.len();
    }
    Ok(())
}

/// Reads to the end and checks each byte. Returns the number of bytes, and the error if the stream ended with
/// one.
async fn read_pattern(from: &mut (impl AsyncRead + Unpin)) -> (usize, Option<ErrorKind>) {
    let mut buffer = vec![0; PART];
    let mut position = 0;
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return (position, None),
            Ok(read) => {
                assert_pattern(position, &buffer[..read]);
                position += read;
            }
            Err(error) => return (position, Some(error.kind())),
        }
    }
}

/// Writes until nothing more is accepted for 100 ms, and returns the number of bytes written.
async fn write_until_blocked(to: &TcpStream, limit: usize) -> usize {
    let mut position = 0;
    while position < limit {
        match to.try_write(pattern(position, 64 * 1024)) {
            Ok(written) => position += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if timeout(Duration::from_millis(100), to.writable()).await.is_err() {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    position
}

fn thread_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split_whitespace().next().unwrap().parse().unwrap())
}

/// Lets the relay become idle, then checks that it uses no CPU time.
async fn assert_no_cpu(what: &str) {
    sleep(Duration::from_millis(50)).await;
    let before = thread_cpu();
    sleep(Duration::from_millis(300)).await;
    let used = thread_cpu().saturating_sub(before);
    assert!(used < Duration::from_millis(60), "{what}: {used:?} of CPU time in 300 ms of doing nothing");
}

const MIB: usize = 1024 * 1024;

async fn half_close<S: AsyncRead + AsyncWrite + Unpin>(mut bridge: Bridge<S>) {
    const REPLY: usize = 64 * MIB;
    bridge.client.write_all(b"everything, please").await.unwrap();
    bridge.client.shutdown().await.unwrap();
    let service = async {
        let mut request = String::new();
        bridge.service.read_to_string(&mut request).await.unwrap();
        assert_eq!(request, "everything, please");
        write_pattern(&mut bridge.service, 0, REPLY).await.unwrap();
        drop(bridge.service);
    };
    let ((), reply) = timeout(PATIENCE, async { tokio::join!(service, read_pattern(&mut bridge.client)) })
        .await
        .expect("the reply ends");
    assert_eq!(reply, (REPLY, None));
    assert!(matches!(outcome(bridge.task).await, Outcome::Finished));
    assert_eq!((bridge.traffic.to_service(), bridge.traffic.to_client()), (18, REPLY as u64));
}

#[tokio::test]
async fn client_ends_its_stream_and_reads_64_mib() {
    half_close(bridge().await).await;
}

#[tokio::test]
async fn client_ends_its_stream_and_reads_64_mib_from_a_unix_socket() {
    half_close(unix_bridge().await).await;
}

/// Bytes read before the service is connected arrive first, and once. A reset that is found then is reported.
#[tokio::test]
async fn early_bytes_are_relayed() {
    let (mut client, client_leg) = client_pair().await;
    assert!(Prefetched::read(&client_leg).unwrap().is_empty());
    client.write_all(pattern(0, 100)).await.unwrap();
    let early = Prefetched::read(&client_leg).unwrap();
    assert!(!early.is_empty());
    client.write_all(pattern(100, 5000)).await.unwrap();
    client.shutdown().await.unwrap();
    let (service_leg, mut service) = service_pair().await;
    let traffic = Traffic::default();
    let talk = async {
        assert_eq!(read_pattern(&mut service).await, (5100, None));
        drop(service);
    };
    let (outcome, ()) = tokio::join!(relay(client_leg, early, service_leg, &traffic), talk);
    assert!(matches!(outcome, Outcome::Finished));
    assert_eq!(traffic.to_service(), 5100);

    let (client, client_leg) = client_pair().await;
    client.set_zero_linger().unwrap();
    drop(client);
    client_leg.ready(Interest::ERROR).await.unwrap();
    assert_eq!(Prefetched::read(&client_leg).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn service_ends_first_and_still_reads_everything() {
    let mut bridge = bridge().await;
    bridge.service.write_all(b"banner").await.unwrap();
    bridge.service.shutdown().await.unwrap();
    let mut banner = String::new();
    timeout(PATIENCE, bridge.client.read_to_string(&mut banner)).await.expect("an end of file").unwrap();
    assert_eq!(banner, "banner");
    let client = async {
        write_pattern(&mut bridge.client, 0, 3 * MIB + 1).await.unwrap();
        bridge.client.shutdown().await.unwrap();
    };
    let ((), received) = tokio::join!(client, read_pattern(&mut bridge.service));
    assert_eq!(received, (3 * MIB + 1, None));
    assert!(matches!(outcome(bridge.task).await, Outcome::Finished));
}

/// Bulk bytes are spliced to a Unix socket too, even if the reader is slow.
#[tokio::test]
async fn upload_to_a_unix_socket() {
    let mut bridge = unix_bridge().await;
    let client = async {
        write_pattern(&mut bridge.client, 0, 8 * MIB + 5).await.unwrap();
        bridge.client.shutdown().await.unwrap();
    };
    let service = async {
        sleep(Duration::from_millis(100)).await;
        read_pattern(&mut bridge.service).await
    };
    let ((), received) = timeout(PATIENCE, async { tokio::join!(client, service) }).await.unwrap();
    assert_eq!(received, (8 * MIB + 5, None));
}

#[tokio::test]
async fn reset_by_the_client_is_a_reset_for_the_service() {
    for length in [0, 100, 50_000] {
        let mut bridge = bridge().await;
        write_pattern(&mut bridge.client, 0, length).await.unwrap();
        sleep(Duration::from_millis(10)).await;
        bridge.client.set_zero_linger().unwrap();
        drop(bridge.client);
        let received = timeout(PATIENCE, read_pattern(&mut bridge.service)).await.expect("a reset");
        assert_eq!(received, (length, Some(ErrorKind::ConnectionReset)));
        assert!(matches!(outcome(bridge.task).await, Outcome::Reset(Side::Client)));
    }
}

#[tokio::test]
async fn reset_by_the_service_is_a_reset_for_the_client() {
    for length in [0, 100, 50_000] {
        let mut bridge = bridge().await;
        write_pattern(&mut bridge.service, 0, length).await.unwrap();
        sleep(Duration::from_millis(10)).await;
        bridge.service.set_zero_linger().unwrap();
        drop(bridge.service);
        let received = timeout(PATIENCE, read_pattern(&mut bridge.client)).await.expect("a reset");
        assert_eq!(received, (length, Some(ErrorKind::ConnectionReset)));
        assert!(matches!(outcome(bridge.task).await, Outcome::Reset(Side::Service)));
    }
}

/// The service answers and closes without having read everything: the kernel sends a reset after the answer.
/// The client must get the whole answer, and the writes that failed must not hide what is still to be read.
#[tokio::test]
async fn answer_before_a_reset_arrives_whole() {
    for _ in 0..5 {
        let mut bridge = bridge_with_small_buffers().await;
        let pushed = write_until_blocked(&bridge.client, 4 * MIB).await;
        assert!(pushed < 4 * MIB);
        write_pattern(&mut bridge.service, 0, 20_000).await.unwrap();
        drop(bridge.service);
        let received = timeout(PATIENCE, read_pattern(&mut bridge.client)).await.expect("a reset");
        assert_eq!(received, (20_000, Some(ErrorKind::ConnectionReset)));
        assert!(matches!(outcome(bridge.task).await, Outcome::Reset(Side::Service)));
    }
}

#[tokio::test]
async fn unix_service_that_closes_with_unread_bytes_resets_the_client() {
    let mut bridge = unix_bridge().await;
    bridge.client.write_all(b"question").await.unwrap();
    bridge.service.write_all(pattern(0, 2)).await.unwrap();
    while bridge.traffic.to_service() < 8 || bridge.traffic.to_client() < 2 {
        sleep(Duration::from_millis(1)).await;
    }
    drop(bridge.service);
    let received = timeout(PATIENCE, read_pattern(&mut bridge.client)).await.expect("a reset");
    assert_eq!(received, (2, Some(ErrorKind::ConnectionReset)));
    assert!(matches!(outcome(bridge.task).await, Outcome::Reset(Side::Service)));
}

/// An orderly close of the whole socket is first an end of file, then a reset for bytes that are sent after
/// it.
#[tokio::test]
async fn service_that_is_gone_resets_what_comes_later() {
    let mut bridge = bridge().await;
    bridge.service.write_all(pattern(0, 1)).await.unwrap();
    drop(bridge.service);
    let received = timeout(PATIENCE, read_pattern(&mut bridge.client)).await.expect("an end of file");
    assert_eq!(received, (1, None));
    bridge.client.write_all(b"anyone there?").await.unwrap();
    timeout(PATIENCE, bridge.client.ready(Interest::ERROR)).await.expect("a reset").unwrap();
    assert!(matches!(outcome(bridge.task).await, Outcome::Reset(Side::Service)));
}

/// Nothing reads from the client's leg after its end of file, yet its reset must be noticed.
#[tokio::test]
async fn reset_after_the_end_of_file_is_noticed() {
    let mut bridge = bridge().await;
    bridge.client.shutdown().await.unwrap();
    assert_eq!(read_pattern(&mut bridge.service).await, (0, None));
    bridge.client.set_zero_linger().unwrap();
    drop(bridge.client);
    timeout(PATIENCE, bridge.service.ready(Interest::ERROR)).await.expect("a reset").unwrap();
    assert!(matches!(outcome(bridge.task).await, Outcome::Reset(Side::Client)));
}

/// Nothing reads from the client's leg while the service is full, yet its reset must be noticed.
#[tokio::test]
async fn reset_behind_a_full_destination_is_noticed() {
    let mut bridge = bridge_with_small_buffers().await;
    let pushed = write_until_blocked(&bridge.client, 4 * MIB).await;
    bridge.client.set_zero_linger().unwrap();
    drop(bridge.client);
    let started = Instant::now();
    assert!(matches!(outcome(bridge.task).await, Outcome::Reset(Side::Client)));
    assert!(started.elapsed() < LAST_BYTES + Duration::from_millis(500));
    let (received, end) = timeout(PATIENCE, read_pattern(&mut bridge.service)).await.expect("a reset");
    assert!(received > 0 && received < pushed, "{received} of {pushed}");
    assert_eq!(end, Some(ErrorKind::ConnectionReset));
}

/// If the service reads after all, it gets the bytes that the client's kernel had handed over before the
/// reset.
#[tokio::test]
async fn bytes_received_before_a_reset_are_delivered_to_a_slow_reader() {
    let mut bridge = bridge_with_small_buffers().await;
    write_until_blocked(&bridge.client, 4 * MIB).await;
    let before = usize::try_from(bridge.traffic.to_service()).unwrap();
    bridge.client.set_zero_linger().unwrap();
    drop(bridge.client);
    sleep(Duration::from_millis(100)).await;
    let (received, end) = timeout(PATIENCE, read_pattern(&mut bridge.service)).await.expect("a reset");
    // The bytes held in the relay and in its receive queue come on top of those it had written.
    assert!(received > before, "{received} received, {before} written before");
    assert_eq!(received as u64, bridge.traffic.to_service());
    assert_eq!(end, Some(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn slow_reader_holds_the_writer_back() {
    let mut bridge = bridge_with_small_buffers().await;
    let accepted = write_until_blocked(&bridge.client, 16 * MIB).await;
    // Four socket buffers of 64 KiB (the kernel doubles what is asked for) and a pipe.
    assert!(accepted < MIB, "{accepted} bytes accepted, none read");
    assert_no_cpu("blocked on a full destination").await;
    bridge.client.shutdown().await.unwrap();
    assert_eq!(read_pattern(&mut bridge.service).await, (accepted, None));
}

#[tokio::test]
async fn single_bytes_go_back_and_forth() {
    let mut bridge = bridge().await;
    let started = Instant::now();
    for round in 0..3000_usize {
        let sent = pattern(round, 1);
        bridge.client.write_all(sent).await.unwrap();
        let mut received = [0];
        bridge.service.read_exact(&mut received).await.unwrap();
        assert_eq!(received, sent);
        bridge.service.write_all(&received).await.unwrap();
        bridge.client.read_exact(&mut received).await.unwrap();
        assert_eq!(received, sent);
    }
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}: something waits", started.elapsed());
    assert_eq!((bridge.traffic.to_service(), bridge.traffic.to_client()), (3000, 3000));
}

/// The last segment of a spliced message must not be held back for bytes that never come. The messages after
/// the first are small enough that nothing else is in flight: an acknowledgement would release a held
/// segment.
#[tokio::test]
async fn end_of_a_spliced_message_is_not_held_back() {
    let mut bridge = bridge().await;
    for length in [2 * MIB + 17].into_iter().chain([20_001; 30]) {
        let started = Instant::now();
        let mut received = vec![0; length];
        let (sent, read) = tokio::join!(
            write_pattern(&mut bridge.client, 0, length),
            bridge.service.read_exact(&mut received)
        );
        sent.unwrap();
        read.unwrap();
        assert_pattern(0, &received);
        assert!(
            started.elapsed() < Duration::from_millis(150),
            "{length} bytes took {:?}",
            started.elapsed()
        );
    }
}

/// With both directions at full speed on one thread, neither keeps the other waiting for long.
#[tokio::test]
async fn directions_share_the_thread() {
    let bridge = bridge().await;
    let (mut client_in, mut client_out) = bridge.client.into_split();
    let (mut service_in, mut service_out) = bridge.service.into_split();
    let up = tokio::spawn(async move { write_pattern(&mut client_out, 0, 24 * MIB).await.unwrap() });
    let down = tokio::spawn(async move { write_pattern(&mut service_out, 0, 24 * MIB).await.unwrap() });
    let ends = timeout(PATIENCE, async {
        tokio::join!(read_pattern(&mut client_in), read_pattern(&mut service_in))
    });
    assert_eq!(ends.await.unwrap(), ((24 * MIB, None), (24 * MIB, None)));
    up.await.unwrap();
    down.await.unwrap();
    assert!(matches!(outcome(bridge.task).await, Outcome::Finished));
}

#[tokio::test]
async fn half_closed_connections_use_no_cpu() {
    let mut client_ended = bridge().await;
    client_ended.client.shutdown().await.unwrap();
    let mut service_ended = bridge().await;
    service_ended.service.shutdown().await.unwrap();
    let mut unix_ended = unix_bridge().await;
    unix_ended.service.shutdown().await.unwrap();
    let unix_gone = unix_bridge().await;
    drop(unix_gone.service);
    let idle = bridge().await;
    assert_no_cpu("half-closed").await;
    for task in [client_ended.task, service_ended.task, unix_ended.task, unix_gone.task, idle.task] {
        assert!(!task.is_finished());
    }
}

#[tokio::test]
async fn abort_resets_both() {
    let mut bridge = bridge().await;
    bridge.client.write_all(pattern(0, 1)).await.unwrap();
    assert_eq!(bridge.service.peek(&mut [0]).await.unwrap(), 1);
    bridge.task.abort();
    let client = timeout(PATIENCE, read_pattern(&mut bridge.client)).await.expect("closed at once");
    let service = timeout(PATIENCE, read_pattern(&mut bridge.service)).await.expect("closed at once");
    assert_eq!(client, (0, Some(ErrorKind::ConnectionReset)));
    assert_eq!(service, (1, Some(ErrorKind::ConnectionReset)));
}

/// An urgent byte stops reads and splices at its place; neither it nor what follows may be lost or wait.
#[tokio::test]
async fn urgent_bytes_stay_in_the_stream() {
    for before in [10, 2 * MIB] {
        let mut bridge = bridge().await;
        let client = async {
            write_pattern(&mut bridge.client, 0, before).await.unwrap();
            let urgent = send(bridge.client.as_raw_fd(), pattern(before, 1), MsgFlags::MSG_OOB);
            assert_eq!(urgent, Ok(1));
            write_pattern(&mut bridge.client, before + 1, 299_999).await.unwrap();
        };
        let service = async {
            let mut received = vec![0; before + 300_000];
            bridge.service.read_exact(&mut received).await.unwrap();
            received
        };
        let ((), received) =
            timeout(PATIENCE, async { tokio::join!(client, service) }).await.expect("no byte waits");
        assert_pattern(0, &received);
    }
}

fn pipe_ends() -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count()
}

fn descriptor_limit() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap_or(usize::MAX)
}

/// Every connection has spliced before it goes idle, so each would hold a pipe if it kept any.
#[tokio::test]
async fn idle_connections_hold_no_pipe() {
    // Four descriptors a connection, and room for the tests beside this one.
    let connections = 1000.min((descriptor_limit() - 300) / 4);
    let mut bridges = Vec::new();
    let message = pattern(0, 192 * 1024);
    let mut received = vec![0; message.len()];
    for _ in 0..connections {
        let mut bridge = bridge().await;
        let (sent, read) =
            tokio::join!(bridge.client.write_all(message), bridge.service.read_exact(&mut received));
        sent.unwrap();
        read.unwrap();
        bridges.push(bridge);
    }
    assert!(bridges.iter().all(|bridge| !bridge.task.is_finished()));
    // This thread's spares, and what the tests beside this one use.
    let pipes = pipe_ends();
    assert!(pipes < 150, "{pipes} pipe ends open with {connections} idle connections");
    assert_no_cpu("idle").await;
}

/// The task is most of what an idle connection costs beside its sockets.
#[tokio::test]
async fn an_idle_connection_is_small() {
    let (client, service) = tcp_pair().await;
    let traffic = Traffic::default();
    let size = size_of_val(&relay(client, Prefetched::default(), service, &traffic));
    assert!(size < 2048, "{size} bytes");
}

#[test]
fn pipes_close_on_exec_and_go_back_empty() {
    let mut pipe = Pipe::take().unwrap();
    for end in [&pipe.read, &pipe.write] {
        let flags = FdFlag::from_bits_retain(fcntl(end, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }
    let number = pipe.read.as_raw_fd();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    io::Write::write_all(&mut ours, b"secret").unwrap();
    assert_eq!(pipe.fill(&theirs).unwrap(), 6);
    pipe.give_back();
    assert!(
        !std::fs::exists(format!("/proc/self/fd/{number}")).unwrap() || {
            // Another test may have got the number in the meantime; but it must not be a spare pipe.
            let spare = Pipe::take().unwrap();
            spare.is_empty() && spare.read.as_raw_fd() != number
        }
    );
}

/// xorshift64*: good enough to vary a test, small enough to have no dependency.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit as u64).unwrap()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Fin,
    FinThenReset,
    Reset,
}

/// The actions of one peer: its writes and pauses, and the end of its stream.
struct Script {
    writes: Vec<(usize, Option<Duration>)>,
    end: End,
    read_pause: Option<Duration>,
}

impl Script {
    fn random(random: &mut Random) -> Self {
        let writes = (0..random.below(12))
            .map(|_| {
                let size = match random.below(4) {
                    0 => 1 + random.below(4),
                    1 => 1 + random.below(2000),
                    2 => 1 + random.below(40_000),
                    _ => 1 + random.below(400_000),
                };
                let pause = (random.below(3) == 0).then(|| Duration::from_micros(random.below(3000) as u64));
                (size, pause)
            })
            .collect();
        let end = match random.below(6) {
            0 => End::Reset,
            1 => End::FinThenReset,
            _ => End::Fin,
        };
        let read_pause = (random.below(3) == 0).then(|| Duration::from_micros(random.below(2000) as u64));
        Self { writes, end, read_pause }
    }
}

/// The observations of one peer.
#[derive(Debug)]
struct Seen {
    /// Bytes written, as accepted by its own kernel.
    sent: usize,
    received: usize,
    end: Result<(), ErrorKind>,
    /// True if it was reset before it had written everything.
    cut: bool,
    /// True if it has reset the connection itself.
    has_reset: bool,
}

async fn play(mut socket: TcpStream, script: &Script) -> Seen {
    let (mut input, mut output) = socket.split();
    let write = async {
        let mut sent = 0;
        for (size, pause) in &script.writes {
            let mut rest = pattern(sent, *size);
            while !rest.is_empty() {
                match output.write(rest).await {
                    Ok(written) => {
                        sent += written;
                        rest = &rest[written..];
                    }
                    Err(_) => return (sent, true),
                }
            }
            if let Some(pause) = pause {
                sleep(*pause).await;
            }
        }
        // A FIN that meets a reset changes nothing.
        if script.end != End::Reset {
            let _ = output.shutdown().await;
        }
        (sent, false)
    };
    let read = async {
        let mut received = 0;
        let mut buffer = vec![0; 30_000];
        let end = loop {
            match input.read(&mut buffer).await {
                Ok(0) => break Ok(()),
                Ok(read) => {
                    assert_pattern(received, &buffer[..read]);
                    received += read;
                }
                Err(error) => break Err(error.kind()),
            }
            if let Some(pause) = script.read_pause {
                sleep(pause).await;
            }
        };
        (received, end)
    };
    if script.end == End::Fin {
        let ((sent, cut), (received, end)) = tokio::join!(write, read);
        return Seen { sent, received, end, cut, has_reset: false };
    }
    // It reads until it resets: two peers that only write would wait for each other for ever.
    let (sent, cut) = {
        let mut write = pin!(write);
        tokio::select! {
            written = &mut write => written,
            _ = read => write.await,
        }
    };
    socket.set_zero_linger().unwrap();
    Seen { sent, received: 0, end: Ok(()), cut, has_reset: true }
}

/// Checks the observations of one peer against those of the other, whose stream ended with `other_end`.
fn check(seen: &Seen, other: &Seen, other_end: End) {
    assert!(seen.received <= other.sent, "bytes from nowhere");
    if seen.has_reset {
        return;
    }
    match (seen.end, other_end) {
        // Its write has taken the error, so its read no longer sees it.
        (Ok(()), _) if seen.cut => assert_ne!(other_end, End::Fin, "a reset from nowhere"),
        // An end of file, so every byte must have arrived.
        (Ok(()), End::Fin | End::FinThenReset) => {
            assert_eq!(seen.received, other.sent, "cut short");
            assert!(!other.cut, "an end of file for a stream that was cut");
        }
        (Ok(()), End::Reset) => panic!("a reset became an end of file"),
        (Err(_), End::Fin) => panic!("a reset from nowhere"),
        (Err(_), End::FinThenReset | End::Reset) => {}
    }
}

#[tokio::test]
async fn random_conversations_follow_the_model() {
    let seed = std::env::var("RELAY_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        u64::from(now.subsec_nanos()) << 20 | u64::from(std::process::id())
    });
    println!("RELAY_SEED={seed}");
    let mut random = Random(seed | 1);
    for conversation in 0..150 {
        let (client, service) = (Script::random(&mut random), Script::random(&mut random));
        let bridge = if random.below(2) == 0 { bridge().await } else { bridge_with_small_buffers().await };
        let both = async { tokio::join!(play(bridge.client, &client), play(bridge.service, &service)) };
        let (client_saw, service_saw) = timeout(PATIENCE, both).await.unwrap_or_else(|_| {
            panic!("conversation {conversation} ({:?}, {:?}) hangs", client.end, service.end)
        });
        let outcome = outcome(bridge.task).await;
        println!(
            "{conversation}: {:?} {client_saw:?} {:?} {service_saw:?} {outcome:?}",
            client.end, service.end
        );
        check(&client_saw, &service_saw, service.end);
        check(&service_saw, &client_saw, client.end);
        assert!(bridge.traffic.to_client() >= client_saw.received as u64);
        assert!(bridge.traffic.to_service() >= service_saw.received as u64);
        match (client.end, service.end) {
            (End::Fin, End::Fin) => assert!(matches!(outcome, Outcome::Finished)),
            (_, End::Fin) => assert!(!matches!(outcome, Outcome::Reset(Side::Service) | Outcome::Failed(..))),
            (End::Fin, _) => assert!(!matches!(outcome, Outcome::Reset(Side::Client) | Outcome::Failed(..))),
            _ => {}
        }
    }
}

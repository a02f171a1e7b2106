//! log: the log of `lbridge run` and `lbridge relay`, on standard error. A thread of its own writes it, since
//! a write may block forever (a full pipe whose reader sleeps) or fail (a closed pipe, a full disk), and the
//! daemon must keep running in either case. Lines that are lost are counted, and a line reports their number
//! as soon as one can be written again.
//!
//! A line is a message, which is the same each time, then its variable parts as `key=value`:
//!
//! ```text
//! rule state changed network=app_net port=5432 protocol=tcp state=waiting reason=nothing_listens why="..."
//! ```
//!
//! So `grep 'network=app_net port=5432'` finds everything about a rule. Values are quoted and escaped by
//! [`field_value`]. Text is recorded as `&str` or with `%`, not with `?`, which would escape it a first time.
//!
//! tracing-appender does not fit: its `ErrorCounter` counts the lines that its queue had no room for, but not
//! those whose write failed, and its guard prints on standard output, which panics if that is closed.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    collections::VecDeque,
    fmt,
    io::{self, IsTerminal as _},
    os::fd::{AsFd, BorrowedFd},
    panic::PanicHookInfo,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::SigSet,
    unistd,
};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    field::RecordFields,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{self, Writer},
        time::{FormatTime as _, SystemTime},
    },
    registry::LookupSpan,
};

use crate::{
    host::privileges,
    planning::text::{field_value, shown},
};

/// Most bytes that may wait to be written. A longer line is taken if nothing else waits.
const QUEUE: usize = 1 << 20;
/// The time that the process waits at its end for the last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(2);
/// Time that a panic waits for its message to be written. The process is aborted only afterwards, so this is
/// short.
const PANIC_LINES: Duration = Duration::from_millis(500);

/// The log, once [`start`] has been called.
static LOG: OnceLock<Log> = OnceLock::new();

/// The text at the start of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// For the journal, which records the time itself and takes the severity from a line's prefix
    /// (sd-daemon(3)).
    Journal,
    /// With time and severity.
    Timed,
    /// With severity and the part of the program.
    Plain,
}

#[derive(Debug, Clone)]
struct Log {
    queue: Arc<Queue>,
    style: Style,
}

/// Starts the log: events that pass `filter`, or `LBRIDGE_LOG` if that is set, and panics.
///
/// # Errors
///
/// If no thread can be started.
pub(super) fn start(style: Style, filter: &str) -> anyhow::Result<()> {
    let queue = Arc::new(Queue::new(QUEUE));
    start_writer(queue.clone(), style).context("cannot start the thread that writes the log")?;
    LOG.get_or_init(|| Log { queue: queue.clone(), style });
    std::panic::set_hook(Box::new(tell_panic));
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_env("LBRIDGE_LOG").unwrap_or_else(|_| EnvFilter::new(filter)))
        .with_writer(move || Tail(queue.clone()))
        .with_ansi(io::stderr().is_terminal())
        // They would be printed on standard error with eprintln!, which panics if that is closed.
        .log_internal_errors(false)
        .fmt_fields(Fields);
    match style {
        Style::Journal => {
            let format = format::format().without_time().with_level(false).with_target(false);
            log.event_format(Journal(format)).init();
        }
        Style::Timed => log.with_target(false).init(),
        Style::Plain => log.without_time().init(),
    }
    Ok(())
}

/// Starts the writer's thread, which runs until the process ends.
fn start_writer(queue: Arc<Queue>, style: Style) -> anyhow::Result<()> {
    // A signal goes to any thread that does not block it; `lbridge relay` blocks and passes on those that are
    // for its command.
    let before = SigSet::all().thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK)?;
    let started = thread::Builder::new().name("log".to_owned()).spawn(move || {
        // Capabilities are per thread, and the daemon's main thread needs more at its start.
        if let Err(error) = privileges::drop_capabilities() {
            tracing::warn!(thread = "log", %error, "could not drop a thread's privileges");
        }
        queue.write_to(io::stderr().as_fd(), style)
    });
    before.thread_set_mask()?;
    started.map(drop).map_err(anyhow::Error::from)
}

/// Prints a line on standard error, after everything logged before. A line that cannot be written is dropped:
/// there is no other place to report it.
pub(super) fn say(line: &str) {
    match LOG.get() {
        Some(log) => log.queue.push(&stamped(log.style, line)),
        None => drop(io::Write::write_all(&mut io::stderr(), format!("{line}\n").as_bytes())),
    }
}

/// Waits until everything is written, for [`LAST_LINES`] at most.
pub(super) fn finish() {
    if let Some(log) = LOG.get() {
        log.queue.wait_until_written(LAST_LINES);
    }
}

/// The panic hook. Std's own hook writes to standard error itself, and would block on a full pipe instead of
/// letting the process abort.
fn tell_panic(panic: &PanicHookInfo<'_>) {
    let Some(log) = LOG.get() else { return };
    let thread = thread::current();
    let line = format!("lbridge: thread {} {panic}", thread.name().unwrap_or("without a name"));
    log.queue.push(&stamped(log.style, &shown(&line)));
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        backtrace.to_string().lines().for_each(|line| log.queue.push(&stamped(log.style, &shown(line))));
    }
    log.queue.wait_until_written(PANIC_LINES);
}

/// A line that is not an event, with its end.
fn stamped(style: Style, line: &str) -> String {
    match style {
        Style::Journal => format!("<{}>{line}\n", severity(Level::ERROR)),
        Style::Timed | Style::Plain => format!("{line}\n"),
    }
}

/// Returns the severity's number, as in syslog(3).
fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

/// Returns the line that stands for `lost` other lines. `why` is the error of the last write; `None` if the
/// queue was full.
fn gap(style: Style, lost: u64, why: Option<Errno>) -> String {
    let lines = if lost == 1 { "line was" } else { "lines were" };
    let why = match why {
        Some(errno) => format!("standard error could not be written to ({})", errno.desc()),
        None => "nobody read standard error".to_owned(),
    };
    let text = format!("{lost} log {lines} lost here: {why}");
    match style {
        Style::Journal => format!("<{}>{text}\n", severity(Level::WARN)),
        Style::Timed => {
            let mut line = String::new();
            // Writes to memory do not fail.
            let _ = SystemTime.format_time(&mut Writer::new(&mut line));
            format!("{line}  WARN {text}\n")
        }
        Style::Plain => format!(" WARN {}: {text}\n", module_path!()),
    }
}

/// The queue of lines that wait to be written.
#[derive(Debug)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Maximum number of bytes that may wait.
    limit: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Line>,
    /// Total length of these lines in bytes.
    bytes: usize,
    /// Number of lines lost since the last line that was added.
    lost: u64,
    /// True while a line is being written.
    writing: bool,
}

#[derive(Debug, Default)]
struct Line {
    /// The line, with its line end.
    text: String,
    /// Number of lines lost between the previous line and this one.
    lost: u64,
}

impl Queue {
    fn new(limit: usize) -> Self {
        Self { waiting: Mutex::default(), changed: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that runs under the lock can panic half-way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line, which includes its line end, or counts it as lost. Never blocks on the output.
    fn push(&self, text: &str) {
        let mut waiting = self.lock();
        if waiting.bytes + text.len() > self.limit && !waiting.lines.is_empty() {
            waiting.lost += 1;
            return;
        }
        waiting.bytes += text.len();
        let line = Line { text: text.to_owned(), lost: std::mem::take(&mut waiting.lost) };
        waiting.lines.push_back(line);
        self.changed.notify_all();
    }

    /// Waits for the next line, which counts as being written until the next call. A line with an empty text
    /// stands for lines that were lost at the end of the queue.
    fn next(&self) -> Line {
        let mut waiting = self.lock();
        waiting.writing = false;
        self.changed.notify_all();
        let is_idle = |waiting: &mut Waiting| waiting.lines.is_empty() && waiting.lost == 0;
        let mut waiting = self.changed.wait_while(waiting, is_idle).unwrap_or_else(PoisonError::into_inner);
        waiting.writing = true;
        let line = waiting.lines.pop_front();
        let line =
            line.unwrap_or_else(|| Line { text: String::new(), lost: std::mem::take(&mut waiting.lost) });
        waiting.bytes -= line.text.len();
        line
    }

    fn wait_until_written(&self, limit: Duration) {
        let is_busy =
            |waiting: &mut Waiting| !waiting.lines.is_empty() || waiting.lost > 0 || waiting.writing;
        drop(self.changed.wait_timeout_while(self.lock(), limit, is_busy));
    }

    /// Writes lines as they come. Never returns.
    fn write_to(&self, out: BorrowedFd<'_>, style: Style) -> ! {
        let mut out = Output { out, torn: false };
        let (mut lost, mut why) = (0, None);
        loop {
            let line = self.next();
            lost += line.lost;
            if lost > 0 {
                match out.write(&gap(style, lost, why)) {
                    Ok(()) => (lost, why) = (0, None),
                    Err(errno) => why = Some(errno),
                }
            }
            if line.text.is_empty() {
                continue;
            }
            // A line is not written before the gap in front of it has been.
            let written = if lost == 0 { out.write(&line.text) } else { Err(why.unwrap_or(Errno::EIO)) };
            if let Err(errno) = written {
                lost += 1;
                why = Some(errno);
            }
        }
    }
}

/// The destination of the lines.
struct Output<'a> {
    out: BorrowedFd<'a>,
    /// True if only a part of the last line was written.
    torn: bool,
}

impl Output<'_> {
    /// Writes a line, and blocks for as long as that takes.
    fn write(&mut self, line: &str) -> nix::Result<()> {
        // Not through std's `Stderr`: its lock would be held meanwhile.
        let line = if self.torn { format!("\n{line}") } else { line.to_owned() };
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match unistd::write(self.out, rest) {
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => {
                    rest = &rest[count..];
                    self.torn = !rest.is_empty();
                }
                Err(Errno::EINTR) => {}
                // Another process that shares the open file has made it non-blocking.
                Err(Errno::EAGAIN) => {
                    let _ = poll(&mut [PollFd::new(self.out, PollFlags::POLLOUT)], PollTimeout::NONE);
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

/// The writer that events are formatted into, one write for each: adds to the queue, and never fails.
struct Tail(Arc<Queue>);

impl io::Write for Tail {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(&String::from_utf8_lossy(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Formats an event as its message and the fields after it. Escapes what could start a new line, act on a
/// terminal, or pass for another field.
struct Fields;

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut line = FieldLine::default();
        fields.record(&mut line);
        let FieldLine { message, fields } = line;
        writer.write_str(if message.is_empty() { fields.trim_start() } else { &message })?;
        writer.write_str(if message.is_empty() { "" } else { &fields })
    }
}

/// The parts of a line that an event is recorded into.
#[derive(Debug, Default)]
struct FieldLine {
    message: String,
    /// The fields, each with a space in front of it.
    fields: String,
}

impl FieldLine {
    fn add(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = shown(value),
            // The target and place of a record of the `log` crate.
            name if name.starts_with("log.") => {}
            name => {
                self.fields.push(' ');
                self.fields.push_str(name);
                self.fields.push('=');
                self.fields.push_str(&field_value(value));
            }
        }
    }
}

impl Visit for FieldLine {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, &format!("{value:?}"));
    }
}

/// The event format of [`Style::Journal`].
struct Journal<F>(F);

impl<S, N, F> FormatEvent<S, N> for Journal<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", severity(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{File, OpenOptions},
        io::{BufRead as _, BufReader, PipeReader},
        os::fd::{AsRawFd as _, OwnedFd},
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Starts a thread that writes to `out` for as long as the test runs.
    fn writing_to(out: impl Into<OwnedFd>, limit: usize) -> Arc<Queue> {
        let (queue, out) = (Arc::new(Queue::new(limit)), out.into());
        let queued = queue.clone();
        thread::spawn(move || queued.write_to(out.as_fd(), Style::Journal));
        queue
    }

    /// Creates a pipe with room for one page.
    fn pipe() -> (PipeReader, OwnedFd) {
        let (reader, writer) = io::pipe().unwrap();
        // SAFETY: the descriptor is open; the argument is a number.
        assert!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } > 0);
        (reader, writer.into())
    }

    fn line(number: usize) -> String {
        format!("<6>{number:0>95}\n")
    }

    fn is_done(queue: &Queue) -> bool {
        queue.wait_until_written(Duration::ZERO);
        let waiting = queue.lock();
        waiting.lines.is_empty() && waiting.lost == 0 && !waiting.writing
    }

    #[test]
    fn a_full_pipe_delays_nobody_and_what_is_lost_is_told_where_it_is_missing() {
        let (reader, writer) = pipe();
        let queue = writing_to(writer, 1000);
        let mut pushed = 0;
        let mut push = |count| {
            (pushed..pushed + count).for_each(|number| queue.push(&line(number)));
            pushed += count;
        };
        loop {
            push(1);
            queue.wait_until_written(Duration::from_millis(50));
            if !is_done(&queue) {
                break;
            }
        }
        // Ten more lines fit.
        push(300);
        let pushed = pushed;
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let mut seen = 0;
        let lost: usize = loop {
            let said = lines.next().unwrap();
            if let Some(lost) = said.strip_prefix("<4>") {
                assert!(said.ends_with(" log lines were lost here: nobody read standard error"), "{said}");
                break lost.split(' ').next().unwrap().parse().unwrap();
            }
            assert_eq!(said + "\n", line(seen), "in their order");
            seen += 1;
        };
        assert_eq!(seen + lost, pushed, "all are accounted for");
        assert!(lost >= 285 && seen >= 40, "{seen} {lost}");
        // From then on no line is lost.
        queue.push(&line(pushed));
        assert_eq!(lines.next().unwrap() + "\n", line(pushed));
        queue.wait_until_written(PATIENCE);
        assert!(is_done(&queue));
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        let queue = writing_to(OpenOptions::new().write(true).open("/dev/full").unwrap(), 1000);
        (0..5).for_each(|number| queue.push(&line(number)));
        queue.wait_until_written(PATIENCE);
        assert!(is_done(&queue), "it does not wait for what will not come");

        // A disk that is full, and has room again.
        let full = tempfile::tempfile().unwrap();
        let mut out = Output { out: full.as_fd(), torn: false };
        out.write("whole\n").unwrap();
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut closed = Output { out: writer.as_fd(), torn: false };
        assert_eq!(closed.write("line\n"), Err(Errno::EPIPE));
        assert!(!closed.torn, "nothing of it was written");
        closed.torn = true;
        closed.out = full.as_fd();
        closed.write("after\n").unwrap();
        let text = std::fs::read_to_string(format!("/proc/self/fd/{}", full.as_raw_fd())).unwrap();
        assert_eq!(text, "whole\n\nafter\n", "a torn line is ended first");
        assert_eq!(
            gap(Style::Journal, 1, Some(Errno::ENOSPC)),
            "<4>1 log line was lost here: standard error could not be written to (No space left on device)\n"
        );
        assert!(
            gap(Style::Timed, 2, None)
                .ends_with("Z  WARN 2 log lines were lost here: nobody read standard error\n")
        );
    }

    #[test]
    fn a_pipe_that_somebody_made_nonblocking_is_waited_for() {
        let (reader, writer) = pipe();
        // SAFETY: the descriptor is open; the argument is a number.
        assert_eq!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }, 0);
        let queue = writing_to(writer, 1 << 20);
        (0..300).for_each(|number| queue.push(&line(number)));
        queue.wait_until_written(Duration::from_millis(20));
        let lines = BufReader::new(reader).lines().map(Result::unwrap).take(300);
        assert!(lines.enumerate().all(|(number, said)| said + "\n" == line(number)));
    }

    /// A panic must abort the process: while it waits to report the reason, it keeps running in an undefined
    /// state.
    #[test]
    fn a_panic_waits_for_nobody() {
        const HERE: &str = "cli::log::tests::a_panic_waits_for_nobody";
        const CHILD: &str = "LBRIDGE_TEST_PANIC";
        if std::env::var_os(CHILD).is_some() {
            start(Style::Journal, "info").unwrap();
            tracing::info!("before");
            panic!("two\nlines");
        }
        let panic = |stderr: OwnedFd| {
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            command.args([HERE, "--exact", "--nocapture"]).env(CHILD, "1").env_remove("LBRIDGE_LOG");
            command.env("RUST_BACKTRACE", "0").stdout(std::process::Stdio::null()).stderr(stderr);
            command.spawn().unwrap()
        };
        let (reader, writer) = pipe();
        let mut child = panic(writer);
        let said: Vec<_> = BufReader::new(reader).lines().map(Result::unwrap).collect();
        assert_eq!(said[0], "<6>before");
        let told = format!("<3>lbridge: thread {HERE} panicked at ");
        assert!(said[1].starts_with(&told) && said[1].ends_with(":\\ntwo\\nlines"), "{said:?}");
        assert!(!child.wait().unwrap().success());

        let (reader, writer) = pipe();
        unistd::write(&writer, &[b'x'; 4096]).unwrap();
        let mut child = panic(writer);
        let limit = std::time::Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if std::time::Instant::now() > limit {
                child.kill().unwrap();
                panic!("it waits for whoever reads");
            }
            thread::sleep(Duration::from_millis(10));
        }
        drop(reader);
    }

    #[test]
    fn a_line_that_is_longer_than_the_queue_is_written() {
        let (reader, writer) = pipe();
        let queue = writing_to(writer, 10);
        let long = "x".repeat(10_000) + "\n";
        queue.push(&long);
        let mut said = String::new();
        BufReader::new(reader).read_line(&mut said).unwrap();
        assert_eq!(said, long);
    }

    #[test]
    fn fields_are_in_one_line_and_act_on_nothing() {
        let file: File = tempfile::tempfile().unwrap();
        let queue = writing_to(file.try_clone().unwrap(), QUEUE);
        let tail = queue.clone();
        let log = tracing_subscriber::fmt().with_writer(move || Tail(tail.clone())).fmt_fields(Fields);
        let format = format::format().without_time().with_level(false).with_target(false);
        let log = log.with_ansi(false).event_format(Journal(format)).finish();
        tracing::subscriber::with_default(log, || {
            let name = "web\n<0>forged \u{1b}[2J\u{202e}\u{2028}";
            tracing::warn!(name, other = %name, port = 80, list = ?[1, 2], forged = "a\" b=\"", "label of \
            {name}");
        });
        queue.wait_until_written(PATIENCE);
        let text = std::fs::read_to_string(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let (line, rest) = text.split_once('\n').unwrap();
        assert!(rest.is_empty() && line.starts_with("<4>label of web\\n<0>forged "), "{text:?}");
        assert_eq!(line, shown(line));
        let name = r#""web\n<0>forged \u{1b}[2J\u{202e}\u{2028}""#;
        let fields = format!(r#" name={name} other={name} port=80 list="[1, 2]" forged="a\" b=\"""#);
        assert!(line.ends_with(&fields), "{line}");
    }
}

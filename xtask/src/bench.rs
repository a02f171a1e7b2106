//! bench: `cargo xtask bench` measures the cost of each path, compared with a service that is bound on the
//! gateway itself, and the cost of the daemon. Rounds are interleaved, and each is compared with `direct` of
//! the same round: a noisy machine is noisy for all.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::lab::{Bridge, Lab};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::suite::find_program;
use lbridge_tests::harness::{logs, patience, sandbox};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::bench_peer::{Measure, hold, measure};
use crate::run::enter_lab;
use crate::workspace::build_release;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 1);
/// A relay that only listens as a systemd unit, or as this program imitates one.
const SOCKET_PROXYD: &str = "/lib/systemd/systemd-socket-proxyd";
const ACTIVATE: &str = "systemd-socket-activate";
/// Number of times that `allow` is timed.
const REPEATS: usize = 20;
/// Number of connections held open at the same time, if the limits of open files permit.
const CONNECTIONS: usize = 10_000;
/// Time for which the idle daemon is observed.
const IDLE: Duration = Duration::from_secs(5);

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Number of measurements of each path; the medians are printed
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Time that each measurement takes, in seconds
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Run everything on one CPU: what is compared is then the work, not how the scheduler wakes another CPU
    #[arg(long)]
    one_cpu: bool,
}

pub(crate) fn handle(arguments: &Arguments) -> Result<()> {
    if !sandbox::is_inside() {
        ensure!(arguments.rounds > 0, "no rounds, no medians");
        ensure!(arguments.seconds > 0.0 && arguments.seconds <= 60.0, "--seconds: more than 0, at most 60");
        build_release()?;
        ensure!(nix::unistd::geteuid().is_root(), "needs root, to load programs into the kernel");
        return enter_lab();
    }
    if arguments.one_cpu {
        // Inherited by every process started from here.
        let mut cpus = CpuSet::new();
        cpus.set(0)?;
        sched_setaffinity(Pid::from_raw(0), &cpus)?;
    }
    let time = Duration::from_secs_f64(arguments.seconds);
    let outcome = paths(arguments.rounds, time)
        .and_then(|()| daemon(arguments.rounds, time))
        .and_then(|()| idle_connections());
    outcome.inspect_err(|_| logs::dump())
}

/// A path from the container to the service; each has its own port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Steer,
    /// The container dials its own localhost.
    Localhost,
    Relay,
    /// A relay like the other proxies: it does not tell the service who connects.
    RelayLoopback,
    Socat,
    Haproxy,
    SocketProxyd,
}

impl Way {
    const ALL: [Way; 8] = [
        Way::Direct,
        Way::Steer,
        Way::Localhost,
        Way::Relay,
        Way::RelayLoopback,
        Way::Socat,
        Way::Haproxy,
        Way::SocketProxyd,
    ];

    fn is_possible(self) -> bool {
        match self {
            Way::Direct | Way::Steer | Way::Localhost | Way::Relay | Way::RelayLoopback => true,
            Way::Socat => find_program("socat").is_some(),
            Way::Haproxy => haproxy().is_some(),
            Way::SocketProxyd => find_program(ACTIVATE).is_some() && Path::new(SOCKET_PROXYD).is_file(),
        }
    }

    fn title(self) -> &'static str {
        match self {
            Way::Direct => "direct: service bound on the gateway",
            Way::Steer => "lbridge, steered",
            Way::Localhost => "lbridge, steered, localhost dialled",
            Way::Relay => "lbridge, relayed",
            Way::RelayLoopback => "lbridge, relayed, --source loopback",
            Way::Socat => "socat, fork",
            Way::Haproxy => "haproxy, tcp mode, splice-auto",
            Way::SocketProxyd => "systemd-socket-proxyd",
        }
    }

    fn port(self) -> u16 {
        9000 + self as u16
    }

    /// Returns the address that the container dials.
    fn address(self) -> SocketAddr {
        let dialled = if self == Way::Localhost { Ipv4Addr::LOCALHOST } else { GATEWAY };
        SocketAddr::from((dialled, self.port()))
    }

    /// Returns the address that the service listens on.
    fn service(self) -> SocketAddr {
        let address = if self == Way::Direct { GATEWAY } else { Ipv4Addr::LOCALHOST };
        SocketAddr::from((address, self.port()))
    }
}

/// Finds HAProxy, which Debian installs outside a user's `PATH`.
fn haproxy() -> Option<PathBuf> {
    if find_program("haproxy").is_some() {
        return Some("haproxy".into());
    }
    Some(PathBuf::from("/usr/sbin/haproxy")).filter(|path| path.is_file())
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Result<Process> {
        command.spawn().map(Process).with_context(|| format!("start {}", command.get_program().display()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A host with a container on a bridge.
struct Place {
    lab: Lab,
    bridge: Bridge,
    container: NetNs,
}

impl Place {
    fn new() -> Result<Place> {
        let lab = Lab::new()?;
        let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
        let container = lab.container(&bridge, "10.7.0.2/24")?;
        for netns in [lab.host(), &container] {
            // Thousands of closed connections per second would use up the ports, or the time to find one.
            netns.sysctl("net/ipv4/tcp_max_tw_buckets", "1000")?;
            netns.sysctl("net/ipv4/ip_local_port_range", "10000 65000")?;
        }
        Ok(Place { lab, bridge, container })
    }

    fn measure(&self, what: Measure, address: SocketAddr, time: Duration) -> Result<f64> {
        self.container.run(|| measure(what, address, time))
    }

    /// Starts the service and waits until it listens.
    fn serve(&self, addresses: impl IntoIterator<Item = SocketAddr>) -> Result<Process> {
        let mut command = self.lab.host().command(std::env::current_exe()?);
        command.arg("bench-peer").args(addresses.into_iter().map(|address| address.to_string()));
        let mut process = Process::start(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().context("no pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the service does not start");
        Ok(process)
    }

    /// Starts a daemon with pins of its own.
    fn daemon(&self, name: &str) -> Result<Daemon> {
        Daemon::start_with(self.lab.host(), options(name))
    }
}

fn options(name: &str) -> Options {
    Options { bpffs: Path::new(sandbox::BPFFS).join(name), ..Options::default() }
}

/// Prints the first table: the paths.
fn paths(rounds: usize, time: Duration) -> Result<()> {
    const MEASURES: [Measure; 3] = [Measure::RoundTrips, Measure::Connections, Measure::Stream];
    let ways: Vec<Way> = Way::ALL.into_iter().filter(|way| way.is_possible()).collect();
    let place = Place::new()?;
    let _service = place.serve(ways.iter().map(|way| way.service()))?;
    let daemon = place.daemon("lbridge")?;
    let network = place.bridge.network();
    // lbridge finds a namespace without a name by a process inside it; the localhost path depends on that.
    let _occupant = Process::start(place.container.command("sleep").arg("infinity"))?;
    daemon.allow(&[&network, &Way::Steer.port().to_string(), "--path", "steer"])?;
    daemon.allow(&[&network, &Way::Localhost.port().to_string(), "--path", "steer", "--localhost"])?;
    daemon.allow(&[&network, &Way::Relay.port().to_string(), "--path", "relay"])?;
    let unnamed = Way::RelayLoopback.port().to_string();
    daemon.allow(&[&network, &unnamed, "--path", "relay", "--source", "loopback"])?;
    let _others =
        ways.iter().filter_map(|way| start_other(*way, &place).transpose()).collect::<Result<Vec<_>>>()?;
    for way in &ways {
        let measure = || place.measure(Measure::Connections, way.address(), Duration::from_millis(20));
        patience::until(way.title(), || Ok(measure().ok()))?;
    }

    // Indexed by measure, path and round.
    let mut results = vec![vec![Vec::new(); ways.len()]; MEASURES.len()];
    for round in 0..rounds {
        eprintln!("paths, round {} of {rounds}", round + 1);
        for (results, measure) in results.iter_mut().zip(MEASURES) {
            for turn in 0..ways.len() {
                // The order rotates, so that no path is always first.
                let index = (turn + round) % ways.len();
                results[index].push(place.measure(measure, ways[index].address(), time)?);
            }
        }
    }

    println!(
        "| path | 64-byte round trips/s | ratio | connect+rtt+close/s | ratio | one stream, Gbit/s | ratio |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (index, way) in ways.iter().enumerate() {
        print!("| {} |", way.title());
        for (results, measure) in results.iter().zip(MEASURES) {
            let value = median(results[index].iter().copied());
            let ratio = median(results[index].iter().zip(&results[0]).map(|(value, direct)| value / direct));
            let value = if measure == Measure::Stream { format!("{value:.1}") } else { thousands(value) };
            print!(" {value} | {ratio:.2} |");
        }
        println!();
    }
    println!(
        "\n{rounds} interleaved rounds of {:.1} s; medians, and medians of the ratios within a round.\n",
        time.as_secs_f64()
    );
    Ok(())
}

/// Starts the program that a path is compared with, if it is a process of its own.
fn start_other(way: Way, place: &Place) -> Result<Option<Process>> {
    let (address, service) = (way.address(), way.service());
    let mut command = match way {
        Way::Direct | Way::Steer | Way::Localhost | Way::Relay | Way::RelayLoopback => return Ok(None),
        Way::Socat => {
            let mut command = place.lab.host().command("socat");
            command.arg(format!("TCP-LISTEN:{},bind={},fork,reuseaddr", address.port(), address.ip()));
            command.arg(format!("TCP:{service}"));
            command
        }
        Way::Haproxy => {
            let config = sandbox::shared_folder()?.join("haproxy.cfg");
            fs::write(
                &config,
                format!(
                    "defaults\n  mode tcp\n  option splice-auto\n  timeout connect 5s\n  timeout client \
                     1m\n  timeout server 1m\nlisten service\n  bind {address}\n  server one {service}\n"
                ),
            )?;
            let mut command = place.lab.host().command(haproxy().context("no haproxy")?);
            command.args(["-db", "-q", "-f"]).arg(config);
            command
        }
        Way::SocketProxyd => {
            let mut command = place.lab.host().command(ACTIVATE);
            // It becomes the other program on the first connection.
            command.args(["-l", &address.to_string(), SOCKET_PROXYD, &service.to_string()]);
            command
        }
    };
    Process::start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())).map(Some)
}

/// Prints the second table: the daemon.
fn daemon(rounds: usize, time: Duration) -> Result<()> {
    println!("| the daemon | |\n|---|---|");
    let place = Place::new()?;
    let _service = place.serve([Way::Steer.service()])?;

    let mut starts = Vec::new();
    let mut adoptions = Vec::new();
    for number in 0..5 {
        let mut daemon = Daemon::prepare(place.lab.host(), options(&format!("start-{number}")))?;
        starts.push(timed(|| daemon.restart())?);
        daemon.kill9()?;
        adoptions.push(timed(|| daemon.restart())?);
        daemon.terminate()?;
    }
    row("start to ready", &format!("{} ms", milliseconds(starts)));
    row("start to ready, after kill -9", &format!("{} ms", milliseconds(adoptions)));

    let daemon = place.daemon("one")?;
    let network = place.bridge.network();
    let port = Way::Steer.port().to_string();
    let mut allows = Vec::new();
    for _ in 0..REPEATS {
        allows.push(timed(|| daemon.allow(&[&network, &port]).map(drop))?);
        daemon.deny(&[&network, &port])?;
    }
    daemon.allow(&[&network, &port])?;
    row("`lbridge allow` until in force, the command included", &format!("{} ms", milliseconds(allows)));

    let pid = daemon.pid().context("no daemon")?;
    let before = cpu_time(pid)?;
    thread::sleep(IDLE);
    let used = cpu_time(pid)?.saturating_sub(before);
    row("CPU, idle", &format!("{:.1} ms in {} s", used.as_secs_f64() * 1e3, IDLE.as_secs()));
    row("resident, 1 rule", &format!("{:.1} MiB", resident(pid)?));

    match many_rules(&place, rounds, time) {
        Ok(()) => {}
        Err(error) => row("65,536 rules", &format!("not measured: {error:#}")),
    }
    println!();
    Ok(())
}

/// Prints the third table: idle relayed connections.
fn idle_connections() -> Result<()> {
    println!("| idle relayed connections | |\n|---|---|");
    let place = Place::new()?;
    let _service = place.serve([Way::Relay.service()])?;
    let daemon = place.daemon("idle")?;
    daemon.allow(&[&place.bridge.network(), &Way::Relay.port().to_string(), "--path", "relay"])?;
    let pid = daemon.pid().context("no daemon")?;
    let before = resident(pid)?;
    let address = Way::Relay.address();
    let (connections, refusal) = place.container.run(|| Ok(hold(address, CONNECTIONS)))?;
    let held = connections.len();
    ensure!(held > 0, "no connection: {refusal:?}");
    let with_them = resident(pid)?;
    let start = cpu_time(pid)?;
    thread::sleep(IDLE);
    let used = cpu_time(pid)?.saturating_sub(start);
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let each = (with_them - before) * 1024.0 / held as f64;
    let refusal = refusal.map_or_else(String::new, |error| format!("; the next was refused: {error}"));
    row("held open", &format!("{}{refusal}", thousands_of(held)));
    row("resident, none, with them", &format!("{before:.1} MiB, {with_them:.1} MiB"));
    row("for each", &format!("{each:.1} KiB"));
    row("CPU, idle", &format!("{:.1} ms in {} s", used.as_secs_f64() * 1e3, IDLE.as_secs()));
    println!();
    Ok(())
}

/// Compares two hosts side by side: one with a single rule, and one with as many rules as an address has
/// ports, plus one.
fn many_rules(one: &Place, rounds: usize, time: Duration) -> Result<()> {
    let many = Place::new()?;
    let other = many.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let _service = many.serve([Way::Steer.service()])?;
    let daemon = many.daemon("many")?;
    let took = timed(|| {
        for first in (0..=u16::MAX).step_by(4096) {
            daemon.allow(&[&other.network(), &format!("{}-{}", first.max(1), first + 4095)])?;
        }
        daemon.allow(&[&many.bridge.network(), &Way::Steer.port().to_string()]).map(drop)
    })?;
    row("65,536 rules, by 17 commands, until in force", &format!("{} ms", milliseconds([took])));
    row("resident, 65,536 rules", &format!("{:.1} MiB", resident(daemon.pid().context("no daemon")?)?));

    let address = Way::Steer.address();
    let mut results = Vec::new();
    for round in 0..rounds {
        eprintln!("rules, round {} of {rounds}", round + 1);
        let rate = |place: &Place| place.measure(Measure::Connections, address, time);
        // The order alternates, so that neither host is always first.
        let (few, many) = if round % 2 == 0 {
            let few = rate(one)?;
            (few, rate(&many)?)
        } else {
            let many = rate(&many)?;
            (rate(one)?, many)
        };
        results.push((few, many));
    }
    row(
        "connect+rtt+close/s with 1 rule, with 65,536, ratio",
        &format!(
            "{}, {}, {:.2}",
            thousands(median(results.iter().map(|(few, _)| *few))),
            thousands(median(results.iter().map(|(_, many)| *many))),
            median(results.iter().map(|(few, many)| many / few)),
        ),
    );
    Ok(())
}

fn row(what: &str, value: &str) {
    println!("| {what} | {value} |");
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// Formats the median in milliseconds.
fn milliseconds(times: impl IntoIterator<Item = Duration>) -> String {
    format!("{:.1}", median(times.into_iter().map(|time| time.as_secs_f64() * 1e3)))
}

/// Returns the resident memory of a process, in MiB.
fn resident(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kibibytes: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse().ok())
        .context("no VmRSS")?;
    Ok(kibibytes / 1024.0)
}

/// Returns the CPU time that a process's threads have used; threads that have ended do not count.
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that ends during the loop does not count either.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let Some(nanoseconds) = text.split(' ').next().and_then(|word| word.parse::<u64>().ok()) else {
            bail!("schedstat: {text}");
        };
        total += nanoseconds;
    }
    Ok(Duration::from_nanos(total))
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match (values.len() / 2, values.len() % 2) {
        (0, 0) => f64::NAN,
        (middle, 0) => f64::midpoint(values[middle - 1], values[middle]),
        (middle, _) => values[middle],
    }
}

/// Formats a rate, rounded, with commas.
fn thousands(value: f64) -> String {
    with_commas(&format!("{value:.0}"))
}

/// Formats a number with commas.
fn thousands_of(value: usize) -> String {
    with_commas(&value.to_string())
}

fn with_commas(digits: &str) -> String {
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "small whole numbers are exact")]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([7.0]), 7.0);
        assert!(median([]).is_nan());
    }

    #[test]
    fn large_numbers_have_commas() {
        assert_eq!(thousands(999.4), "999");
        assert_eq!(thousands(1000.0), "1,000");
        assert_eq!(thousands(1_234_567.0), "1,234,567");
    }

    #[test]
    fn a_process_is_measured() {
        assert!(resident(std::process::id()).unwrap() > 0.1);
        assert!(cpu_time(std::process::id()).unwrap() > Duration::ZERO);
        assert!(resident(0).is_err());
    }
}

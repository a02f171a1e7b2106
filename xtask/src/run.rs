//! run: `cargo xtask run` demonstrates the main job on this machine. With a Docker Engine, the daemon follows
//! it. Without one, this creates a private host, container and service, and the container fetches the
//! service's page.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::daemon::{self, Daemon};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::sandbox;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use serde_json::Value;

use crate::workspace::{build_release, root, target};

const DOCKER_SOCKET: &str = "/var/run/docker.sock";
const PORT: u16 = 8080;

/// Options of `cargo xtask run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Make a private lab even if a Docker Engine answers
    #[arg(long)]
    lab: bool,
    /// Fail if no Docker Engine answers, instead of making a private lab
    #[arg(long, conflicts_with = "lab")]
    docker: bool,
    /// In the lab: end after the page was fetched
    #[arg(long, conflicts_with = "docker")]
    once: bool,
    /// With a Docker Engine: options for `lbridge run`
    #[arg(last = true, value_name = "ARGS")]
    options: Vec<String>,
}

pub(crate) fn handle(arguments: &Arguments) -> Result<()> {
    if sandbox::is_inside() {
        return lab(arguments.once);
    }
    let engine = if arguments.lab || arguments.once { None } else { Engine::find() };
    ensure!(engine.is_some() || !arguments.docker, "no Docker Engine answers at {}", Engine::address());
    let program = build_release()?;
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root, to load programs into the kernel: sudo -E env \"PATH=$PATH\" cargo xtask run");
    }
    match engine {
        Some(engine) => with_docker(&engine, &program, &arguments.options),
        None => enter_lab(),
    }
}

/// Replaces this process with the daemon; returns only if that fails.
fn with_docker(engine: &Engine, program: &Path, options: &[String]) -> Result<()> {
    let shown = program.strip_prefix(root()).unwrap_or(program).display();
    println!(
        "A Docker Engine answers at {}. Its networks: {}.",
        Engine::address(),
        engine.networks.join(", ")
    );
    let network = engine.networks.first().map_or("NETWORK", String::as_str);
    println!("The daemon runs here until Ctrl-C. In another terminal, for a service on 127.0.0.1:{PORT}:\n");
    println!(
        "  sudo {shown} allow {network} {PORT}     # its containers reach it at their gateway's address"
    );
    println!("  sudo {shown} status\n");
    let error = Command::new(program).arg("run").args(options).exec();
    Err(error).with_context(|| format!("start {}", program.display()))
}

/// A Docker Engine that answers.
#[derive(Debug)]
struct Engine {
    /// The names of the bridge networks, those created by a user first.
    networks: Vec<String>,
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Engine {
    fn address() -> String {
        env::var("DOCKER_HOST").unwrap_or_else(|_| format!("unix://{DOCKER_SOCKET}"))
    }

    fn find() -> Option<Engine> {
        let address = Engine::address();
        let networks: Value = serde_json::from_str(&get(&address, "/networks").ok()?).ok()?;
        let mut networks: Vec<String> = networks
            .as_array()?
            .iter()
            .filter(|network| network["Driver"] == "bridge")
            .filter_map(|network| Some(network["Name"].as_str()?.to_owned()))
            .collect();
        networks.sort_by_key(|name| (name == "bridge", name.clone()));
        Some(Engine { networks })
    }
}

/// Returns an engine's answer to a GET request.
fn get(address: &str, path: &str) -> Result<String> {
    let limit = Some(Duration::from_secs(2));
    let mut stream: Box<dyn Stream> = if let Some(path) = address.strip_prefix("unix://") {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(limit)?;
        Box::new(stream)
    } else if let Some(address) = address.strip_prefix("tcp://") {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(limit)?;
        Box::new(stream)
    } else {
        bail!("neither unix:// nor tcp://: {address}");
    };
    // HTTP 1.0: the answer is not chunked.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.split(' ').nth(1) == Some("200"), "{}", head.lines().next().unwrap_or_default());
    Ok(body.to_owned())
}

/// Starts this program again in private namespaces; returns only if that fails.
pub(crate) fn enter_lab() -> Result<()> {
    // SAFETY: nothing has started another thread yet.
    unsafe { env::set_var("LBRIDGE_BIN", target().join("release/lbridge")) };
    sandbox::enter()
}

/// Set by a signal that asks for the end.
static STOPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_signal: libc::c_int) {
    STOPPED.store(true, Ordering::Relaxed);
}

/// Installs a signal handler: unlike a mask, programs started from here do not inherit it.
fn handle_signals() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(stop), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores into an atomic.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Runs the lab inside: host, container, service and daemon.
fn lab(once: bool) -> Result<()> {
    handle_signals()?;
    let lab = Lab::new()?;
    let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
    let container = lab.container(&bridge, "10.7.0.2/24")?;
    serve_page(lab.host())?;
    println!(
        "A host with a service that listens on 127.0.0.1:{PORT} only, and with the bridge {}.",
        bridge.name()
    );
    println!("A container on that bridge, 10.7.0.2; it knows the host as {}.\n", bridge.gateway());

    let gateway = SocketAddr::new(bridge.gateway(), PORT);
    let outcome = (|| {
        match fetch(&container, gateway) {
            Ok(_) => bail!("{gateway} answers without lbridge"),
            Err(error) => println!("  container$ curl http://{gateway}\n  {error:#}\n"),
        }
        let folder = sandbox::shared_folder()?;
        let daemon =
            Daemon::start_with(lab.host(), daemon::Options { folder: Some(folder), ..Default::default() })?;
        allow_and_fetch(&daemon, &bridge.network(), &container, gateway)?;
        Ok(daemon)
    })();
    let mut daemon = outcome.inspect_err(|_: &anyhow::Error| lbridge_tests::harness::logs::dump())?;
    if !once {
        print_what_next(&daemon, &bridge.network());
        fetch_on_enter(container, gateway);
        while !STOPPED.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
            ensure!(
                is_running(&daemon) || STOPPED.load(Ordering::Relaxed),
                "the daemon has ended\n{}",
                daemon.log()
            );
        }
        println!();
    }
    daemon.terminate()?;
    Ok(())
}

fn allow_and_fetch(daemon: &Daemon, network: &str, container: &NetNs, gateway: SocketAddr) -> Result<()> {
    let start = Instant::now();
    let said = daemon.allow(&[network, &PORT.to_string()])?;
    let took = start.elapsed();
    println!("  host$ lbridge allow {network} {PORT}          # {:.1} ms", milliseconds(took));
    said.stdout.lines().for_each(|line| println!("  {line}"));

    let (page, took) = fetch(container, gateway)?;
    println!("\n  container$ curl http://{gateway}            # {:.2} ms", milliseconds(took));
    println!("  {}\n", page.lines().next().unwrap_or_default());

    let rule = daemon.rule(network, PORT)?.context("the rule is gone")?;
    let path = match (rule["state"].as_str(), rule["why"].as_str()) {
        (Some("steered"), _) => "steered: the kernel gave the connection to the service itself".to_owned(),
        (Some(state), Some(why)) => format!("{state}: {why}"),
        (state, _) => state.unwrap_or("unknown").to_owned(),
    };
    println!("Path: {path}.");
    Ok(())
}

/// Returns true if the daemon runs. A process that has ended and that its parent, this process, has not
/// waited for does not count.
fn is_running(daemon: &Daemon) -> bool {
    let status = |pid| std::fs::read_to_string(format!("/proc/{pid}/status"));
    daemon.pid().is_some_and(|pid| status(pid).is_ok_and(|status| !status.contains("\nState:\tZ")))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn print_what_next(daemon: &Daemon, network: &str) {
    let socket = daemon.socket();
    let program = daemon::binary().unwrap_or_else(|_| PathBuf::from("lbridge"));
    let program = program.strip_prefix(root()).unwrap_or(&program).display();
    println!("\nThe lab stays until Ctrl-C. In another terminal:\n");
    println!("  sudo LBRIDGE_SOCKET={} {program} status", socket.display());
    println!("  sudo LBRIDGE_SOCKET={} {program} deny {network} {PORT}", socket.display());
}

/// Fetches the page again on Enter, so that a person at the terminal sees what a command has changed.
fn fetch_on_enter(container: NetNs, gateway: SocketAddr) {
    println!("\nEnter, here, fetches the page again.");
    thread::spawn(move || {
        for _ in std::io::stdin().lines().map_while(Result::ok) {
            match fetch(&container, gateway) {
                Ok((page, _)) => println!("  {}", page.lines().next().unwrap_or_default()),
                Err(error) => println!("  {error:#}"),
            }
        }
    });
}

/// Serves a single page on the host's loopback.
fn serve_page(host: &NetNs) -> Result<()> {
    let listener = host.run(|| TcpListener::bind(("127.0.0.1", PORT)).context("listen"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that leaves early does not matter.
            thread::spawn(move || drop(answer(stream)));
        }
    });
    Ok(())
}

fn answer(stream: TcpStream) -> Result<()> {
    let peer = stream.peer_addr()?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line)? > 0 && !line.trim_end().is_empty() {
        line.clear();
    }
    let page = format!("Hello {peer}, from the service on 127.0.0.1:{PORT}\n");
    let head =
        format!("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n", page.len());
    stream.get_mut().write_all((head + &page).as_bytes())?;
    Ok(())
}

/// Fetches the page from within `netns`; returns it and the time taken.
fn fetch(netns: &NetNs, address: SocketAddr) -> Result<(String, Duration)> {
    netns.run(|| {
        let start = Instant::now();
        let limit = Duration::from_secs(5);
        let mut stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(format!("GET / HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, page) = answer.split_once("\r\n\r\n").with_context(|| format!("no page: {answer:?}"))?;
        Ok((page.to_owned(), start.elapsed()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engines_answer_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let mut requests = Vec::new();
            for answer in ["HTTP/1.0 200 OK\r\nA: b\r\n\r\n[]", "HTTP/1.0 500 Oh\r\n\r\nno", "nonsense"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 100];
                let length = stream.read(&mut request).unwrap();
                requests.push(String::from_utf8_lossy(&request[..length]).into_owned());
                stream.write_all(answer.as_bytes()).unwrap();
            }
            requests
        });
        let address = format!("unix://{}", path.display());
        assert_eq!(get(&address, "/networks").unwrap(), "[]");
        assert!(get(&address, "/networks").is_err(), "an error of the server");
        assert!(get(&address, "/networks").is_err(), "no HTTP");
        assert!(server.join().unwrap()[0].starts_with("GET /networks HTTP/1.0\r\n"));
        assert!(get("ssh://somewhere", "/").is_err());
    }
}

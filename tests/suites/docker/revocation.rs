//! The address of a container that has left is revoked at once, whatever the daemon is doing: whoever gets it
//! next is not served.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::engine::Engine;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::pins::Map;
use lbridge_tests::harness::suite::{Need, Test, find_program};
use lbridge_tests::tests;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::engines::IMAGE;
use super::engines::from::Crowd;
use super::{Scene, Tested};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        while_a_new_network_has_the_firewall_read: [Need::Program("nft")],
        while_another_rule_is_allowed: [Need::Program("nft")],
        while_its_own_rule_is_allowed: [Need::Program("nft")],
        while_a_connection_is_explained: [Need::Program("nft")],
        while_the_disk_is_slow,
        while_the_engine_describes_another_container,
        while_the_engine_is_away: [Need::Program("nft")],
    ]
}

/// Number of attempts of whoever gets the address next.
const ROUNDS: usize = 10;

/// From Docker's word that a container has left to the kernel's list without its address.
fn limit() -> Duration {
    patience::seconds(1) / 20
}

/// An `nft` that does not answer for five seconds, or until it is let go, while it is held.
struct SlowTool {
    folder: PathBuf,
}

impl SlowTool {
    fn new() -> Result<SlowTool> {
        let folder = PathBuf::from("/run/slow");
        fs::create_dir(&folder)?;
        let nft = find_program("nft").context("no nft")?;
        let script = format!(
            "#!/bin/sh\nfor _ in $(seq 50); do\n[ -e {0}/held ] || break\n: > {0}/waits\nsleep 0.1\ndone\n\
             exec {1} \"$@\"\n",
            folder.display(),
            nft.display()
        );
        fs::write(folder.join("nft"), script)?;
        fs::set_permissions(folder.join("nft"), fs::Permissions::from_mode(0o755))?;
        Ok(SlowTool { folder })
    }

    fn hold(&self) -> Result<()> {
        Ok(fs::write(self.folder.join("held"), "")?)
    }

    fn let_go(&self) -> Result<()> {
        Ok(fs::remove_file(self.folder.join("held"))?)
    }

    /// Waits until somebody waits for it.
    fn is_waited_for(&self) -> Result<()> {
        let waits = self.folder.join("waits");
        drop(fs::remove_file(&waits));
        patience::until("somebody waits for nft", || Ok(waits.exists().then_some(())))
    }

    /// `app` and its containers behind a firewall that has to be asked, and a rule for `web`.
    fn crowd(&self, engine: Tested) -> Result<Crowd> {
        let host = NetNs::current()?;
        let done = host.command("iptables").args(["-w", "-P", "INPUT", "DROP"]).status()?;
        ensure!(done.success(), "iptables: {done}");
        let path = format!("{}:{}", self.folder.display(), std::env::var("PATH")?);
        let options = Options { env: vec![("PATH".to_owned(), path)], ..Options::default() };
        let crowd = Crowd::with(Scene::with_options(engine, options)?)?;
        crowd.allow(&[])?;
        crowd.wait_for("steered", "for web")?;
        Ok(crowd)
    }
}

/// A disk that takes a long time to make a file in a folder: whoever opens one waits until it is let go.
struct SlowDisk {
    let_go: Arc<AtomicBool>,
    waits: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl SlowDisk {
    fn new(folder: &Path) -> Result<SlowDisk> {
        let flags = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
        let group = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC)?;
        let mask = MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_EVENT_ON_CHILD;
        group.mark(MarkFlags::FAN_MARK_ADD, mask, nix::fcntl::AT_FDCWD, Some(folder))?;
        let (let_go, waits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let disk = (let_go.clone(), waits.clone());
        let serve = move || -> Result<()> {
            let (let_go, waits) = disk;
            // Whoever still waits goes on when the group is closed.
            while !let_go.load(Ordering::SeqCst) {
                let mut ready = [PollFd::new(group.as_fd(), PollFlags::POLLIN)];
                if poll(&mut ready, PollTimeout::from(10_u8))? == 0 {
                    continue;
                }
                for event in group.read_events()? {
                    waits.store(true, Ordering::SeqCst);
                    while !let_go.load(Ordering::SeqCst) {
                        thread::sleep(Duration::from_millis(10));
                    }
                    let file = event.fd().context("an event without a file")?;
                    group.write_response(FanotifyResponse::new(file, Response::FAN_ALLOW))?;
                }
            }
            Ok(())
        };
        Ok(SlowDisk { let_go, waits, thread: Some(thread::spawn(serve)) })
    }

    fn is_waited_for(&self) -> Result<()> {
        patience::until("somebody waits for the disk", || Ok(self.waits.load(Ordering::SeqCst).then_some(())))
    }

    fn let_go(mut self) -> Result<()> {
        self.let_go.store(true, Ordering::SeqCst);
        self.thread.take().map_or(Ok(()), |thread| thread.join().map_err(|_| anyhow!("it panicked"))?)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.let_go.store(true, Ordering::SeqCst);
    }
}

/// An engine that takes a long time to describe one container, as it does while it starts it. Everything else
/// passes.
struct SlowEngine {
    held: Arc<AtomicBool>,
    waits: Arc<AtomicBool>,
}

impl SlowEngine {
    const SOCKET: &'static str = "/run/slow-engine.sock";

    fn new(engine: &Tested, container: &str) -> Result<SlowEngine> {
        let listener = UnixListener::bind(SlowEngine::SOCKET)?;
        let (held, waits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (slow, upstream) = (SlowEngine { held: held.clone(), waits: waits.clone() }, engine.socket());
        let request = format!("/containers/{container}/json");
        // Its threads end with the sandbox.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (held, waits, request, upstream) =
                    (held.clone(), waits.clone(), request.clone(), upstream.clone());
                thread::spawn(move || {
                    let upstream = UnixStream::connect(&upstream).ok()?;
                    let (back, to_client) = (upstream.try_clone().ok()?, client.try_clone().ok()?);
                    thread::spawn(move || pass_on(back, to_client, &|_| {}));
                    pass_on(client, upstream, &|bytes| {
                        let is_asked = String::from_utf8_lossy(bytes).contains(&request);
                        while is_asked && held.load(Ordering::SeqCst) {
                            waits.store(true, Ordering::SeqCst);
                            thread::sleep(Duration::from_millis(10));
                        }
                    });
                    Some(())
                });
            }
        });
        Ok(slow)
    }

    fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    fn is_waited_for(&self) -> Result<()> {
        patience::until("somebody waits for the engine", || {
            Ok(self.waits.load(Ordering::SeqCst).then_some(()))
        })
    }
}

fn pass_on(mut from: UnixStream, mut to: UnixStream, before: &dyn Fn(&[u8])) {
    let mut buffer = vec![0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        before(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    drop(to.shutdown(Shutdown::Write));
}

/// The kernel's list of sources, as it is now.
fn sources(crowd: &Crowd) -> Result<Map> {
    Map::named(crowd.scene.daemon.bpffs(), "SOURCES")
}

/// Waits, on another thread, until the kernel's list has no more entries than that; says when.
fn shrinks_to(map: Map, length: usize) -> JoinHandle<Result<SystemTime>> {
    thread::spawn(move || {
        let limit = Instant::now() + patience::seconds(20);
        while map.len()? > length {
            ensure!(Instant::now() < limit, "the address stays in the kernel's list");
            thread::sleep(Duration::from_micros(500));
        }
        Ok(SystemTime::now())
    })
}

/// When the engine says that this happened, last.
fn happened(engine: &Tested, since: SystemTime, event: &str) -> Result<SystemTime> {
    let seconds = |time: SystemTime| -> Result<String> {
        Ok(format!("{:.9}", time.duration_since(UNIX_EPOCH)?.as_secs_f64()))
    };
    let (since, until) = (seconds(since)?, seconds(SystemTime::now())?);
    let filter = format!("event={event}");
    let text = engine.cli(&[
        "events",
        "--since",
        &since,
        "--until",
        &until,
        "--filter",
        &filter,
        "--format",
        "{{.TimeNano}}",
    ])?;
    let last = text.lines().last().with_context(|| format!("no {event}"))?;
    Ok(UNIX_EPOCH + Duration::from_nanos(last.trim().parse()?))
}

/// Has the container leave by `leave`, and expects the list to have no more than `left` entries as soon as
/// the engine has told of `event`.
fn leaves_in_time(crowd: &Crowd, leave: &[&str], event: &str, left: usize) -> Result<()> {
    let map = sources(crowd)?;
    ensure!(map.len()? > left, "its address is not in the list");
    let (began, gone) = (SystemTime::now(), shrinks_to(map, left));
    crowd.scene.engine.cli(leave)?;
    let gone = gone.join().map_err(|_| anyhow!("a thread panicked"))??;
    // The end of a process may be seen before the engine tells of it.
    let told = happened(&crowd.scene.engine, began, event)?;
    let took = gone.duration_since(told).unwrap_or_default();
    println!("gone {took:?} after {event}");
    ensure!(took < limit(), "gone {took:?} after {event}");
    Ok(())
}

/// A container that will have the address of `web`, and dials from its first moment on.
fn create_heir(crowd: &Crowd, port: u16) -> Result<()> {
    let its = crowd.scene.address(&crowd.web, &crowd.app)?;
    let dial = format!("while :; do echo x | timeout 1 nc 10.50.0.1 {port}; done");
    let heir = ["create", "--name", "heir", "--network", "app", "--ip", &its, IMAGE, "sh", "-c", &dial];
    crowd.scene.engine.cli(&heir).map(drop)
}

/// Starts that container as soon as the address is free; it must not be served.
fn the_heir_is_refused(crowd: &Crowd) -> Result<()> {
    let before = crowd.service.accepted();
    let start = || Ok(crowd.scene.engine.cli(&["start", "heir"]).is_ok().then_some(()));
    patience::until("the other has the address", start)?;
    thread::sleep(Duration::from_millis(300));
    ensure!(crowd.service.accepted() == before, "the address let another in");
    Ok(())
}

/// `web` ends while nft does not answer, and its address goes to another; so many times.
fn ends_and_is_inherited(
    tool: &SlowTool,
    crowd: &Crowd,
    rounds: usize,
    mut occupy: impl FnMut(usize) -> Result<Option<Child>>,
) -> Result<()> {
    let engine = &crowd.scene.engine;
    create_heir(crowd, 8080)?;
    for round in 0..rounds {
        crowd.served(&crowd.web)?;
        tool.hold()?;
        let busy = occupy(round)?;
        tool.is_waited_for()?;
        leaves_in_time(crowd, &["kill", "web"], "die", 0)?;
        tool.is_waited_for().context("it is still busy")?;
        the_heir_is_refused(crowd)?;
        tool.let_go()?;
        if let Some(mut busy) = busy {
            busy.wait()?;
        }
        engine.cli(&["kill", "heir"])?;
        engine.cli(&["start", "web"])?;
        crowd.wait_for("steered", "for web")?;
    }
    Ok(())
}

fn while_a_new_network_has_the_firewall_read() -> Result<()> {
    let tool = SlowTool::new()?;
    let crowd = tool.crowd(Tested::start()?)?;
    ends_and_is_inherited(&tool, &crowd, ROUNDS, |round| {
        crowd.scene.engine.create_network(&format!("new{round}"), &[]).map(|_| None)
    })
}

fn started(command: Result<Command>, arguments: &[&str]) -> Result<Option<Child>> {
    Ok(Some(command?.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
}

fn while_another_rule_is_allowed() -> Result<()> {
    let tool = SlowTool::new()?;
    let crowd = tool.crowd(Tested::start()?)?;
    ends_and_is_inherited(&tool, &crowd, 2, |round| {
        started(crowd.scene.daemon.command(), &["allow", "elsewhere", &format!("909{round}")])
    })
}

/// The daemon has decided to enter the address, but not done it yet, when the container ends.
fn while_its_own_rule_is_allowed() -> Result<()> {
    let tool = SlowTool::new()?;
    let crowd = tool.crowd(Tested::start()?)?;
    let (engine, daemon) = (&crowd.scene.engine, &crowd.scene.daemon);
    create_heir(&crowd, 8081)?;
    // The loop may go by the change before it takes the command; then there is nothing to enter.
    for round in 0..4 {
        let before = crowd.service.accepted();
        tool.hold()?;
        // A change of the ruleset that the command is the first to look at.
        let allowing = daemon.paused(|| {
            let chain = format!("another{round}");
            let done = crowd.scene.host.command("iptables").args(["-w", "-N", &chain]).status()?;
            ensure!(done.success(), "iptables: {done}");
            let allow = daemon.command()?.args(["allow", "app", "8081=8080", "--from", "web"]).spawn()?;
            thread::sleep(Duration::from_millis(300));
            Ok(allow)
        })?;
        tool.is_waited_for()?;
        leaves_in_time(&crowd, &["kill", "web"], "die", 0)?;
        stays_empty(&sources(&crowd)?, || {
            the_heir_is_refused(&crowd)?;
            tool.let_go()?;
            let allowed = allowing.wait_with_output()?;
            ensure!(allowed.status.success(), "lbridge allow: {allowed:?}");
            Ok(())
        })?;
        ensure!(crowd.service.accepted() == before, "the address let another in");
        engine.cli(&["kill", "heir"])?;
        engine.cli(&["start", "web"])?;
        daemon.deny(&["app", "8081"])?;
        crowd.wait_for("steered", "for web")?;
    }
    Ok(())
}

/// Nothing is entered in the map during `work`.
fn stays_empty(map: &Map, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::SeqCst) {
                ensure!(map.is_empty()?, "the address was entered again");
                thread::sleep(Duration::from_micros(100));
            }
            Ok(())
        });
        let worked = work();
        done.store(true, Ordering::SeqCst);
        worked.and(watch.join().map_err(|_| anyhow!("a thread panicked"))?)
    })
}

fn while_a_connection_is_explained() -> Result<()> {
    let tool = SlowTool::new()?;
    let crowd = tool.crowd(Tested::start()?)?;
    ends_and_is_inherited(&tool, &crowd, 2, |_| {
        started(crowd.scene.daemon.command(), &["explain", "elsewhere", "9999"])
    })
}

fn while_the_disk_is_slow() -> Result<()> {
    let crowd = Crowd::with(Scene::new()?)?;
    crowd.allow(&[])?;
    crowd.wait_for("steered", "for web")?;
    create_heir(&crowd, 8080)?;
    let disk = SlowDisk::new(&crowd.scene.daemon.state_dir())?;
    // It is to be kept for a start without the engine.
    crowd.scene.engine.create_network("new", &[])?;
    disk.is_waited_for()?;
    leaves_in_time(&crowd, &["kill", "web"], "die", 0)?;
    the_heir_is_refused(&crowd)?;
    disk.let_go()?;
    crowd.scene.engine.cli(&["kill", "heir"])?;
    crowd.scene.engine.cli(&["start", "web"])?;
    crowd.wait_for("steered", "for web")?;
    crowd.served(&crowd.web)
}

/// Events are heard while the lists are read, which wait for the engine.
fn while_the_engine_describes_another_container() -> Result<()> {
    let engine = Tested::start()?;
    let slow = SlowEngine::new(&engine, "other")?;
    let env = vec![("DOCKER_HOST".to_owned(), format!("unix://{}", SlowEngine::SOCKET))];
    let crowd = Crowd::with(Scene::with_options(engine, Options { env, ..Options::default() })?)?;
    crowd.allow(&["--from", "other"])?;
    crowd.wait_for("steered", "for other, web")?;
    // Each may dial the gateway, and docker0's address.
    let leaving: [(&[&str], &str, usize); 2] =
        [(&["network", "disconnect", "app", "web"], "disconnect", 2), (&["kill", "other"], "die", 0)];
    for (leave, event, left) in leaving {
        slow.hold();
        crowd.scene.engine.create_network(event, &[])?;
        slow.is_waited_for()?;
        leaves_in_time(&crowd, leave, event, left)?;
        slow.held.store(false, Ordering::SeqCst);
    }
    crowd.scene.engine.cli(&["network", "connect", "app", "web"])?;
    crowd.wait_for("steered", "for web; container other is not running")?;
    crowd.served(&crowd.web)
}

/// Nobody tells of the end of a container but the kernel.
fn while_the_engine_is_away() -> Result<()> {
    let tool = SlowTool::new()?;
    let mut crowd = tool.crowd(Tested::start_lasting()?)?;
    let pid = crowd.scene.engine.pid(&crowd.web)?.cast_signed();
    crowd.scene.engine.down()?;
    crowd.scene.wait_for_engine("away")?;
    tool.hold()?;
    // What the kernel tells of wakes the loop.
    let done = crowd.scene.host.command("iptables").args(["-w", "-N", "another"]).status()?;
    ensure!(done.success(), "iptables: {done}");
    tool.is_waited_for()?;
    let gone = shrinks_to(sources(&crowd)?, 0);
    let ended = SystemTime::now();
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    let gone = gone.join().map_err(|_| anyhow!("a thread panicked"))??;
    let passed = gone.duration_since(ended).unwrap_or_default();
    println!("gone {passed:?} after its process was killed");
    ensure!(passed < limit(), "gone {passed:?} after its process was killed");
    tool.is_waited_for().context("it is still busy")?;
    tool.let_go()?;
    crowd.wait_for("waiting", "container web is not running")?;
    crowd.scene.engine.up()?;
    crowd.scene.wait_for_engine("reachable")?;
    crowd.scene.engine.cli(&["start", "web"])?;
    crowd.wait_for("steered", "for web")?;
    crowd.served(&crowd.web)
}

//! Both ends of a relayed connection in the test's own hands.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::scene::{self, Scene};
use lbridge_tests::harness::usage::Process;
use lbridge_tests::harness::{client, patience};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A scene with a relay, and the listener behind it.
pub(crate) struct Relayed {
    pub(crate) scene: Scene,
    pub(crate) listener: TcpListener,
}

impl Relayed {
    /// `127.0.0.1:8080` behind the gateway's 8080.
    pub(crate) fn new() -> Result<Relayed> {
        Relayed::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Result<Relayed> {
        let scene = Scene::with(scene::V4, options)?;
        let listener = listen(scene.lab.host(), "127.0.0.1:8080".parse()?)?;
        scene.allow(&["8080", "--path", "relay"])?;
        scene.must_be(8080, "relayed")?;
        Ok(Relayed { scene, listener })
    }

    /// A connection: the container's end and the service's.
    pub(crate) fn connection(&self) -> Result<(TcpStream, TcpStream)> {
        connection(&self.scene.container, self.scene.gateway(8080), &self.listener)
    }

    pub(crate) fn daemon(&self) -> Result<Process> {
        self.scene.daemon.pid().map(Process).context("no daemon")
    }

    /// The daemon's descriptors, when it has no connection.
    pub(crate) fn descriptors(&self) -> Result<Descriptors> {
        // The connection of the last command may be on its way out.
        std::thread::sleep(std::time::Duration::from_millis(100));
        Descriptors::of(self.daemon()?)
    }

    /// Waits until the daemon has no descriptor more than before, but for pipes that it keeps for the next
    /// ones.
    pub(crate) fn nothing_leaks(&self, before: Descriptors) -> Result<()> {
        // Eight to a thread, each with two ends.
        let spare = 16 * std::thread::available_parallelism()?.get();
        let daemon = self.daemon()?;
        let mut now = before;
        patience::until("the daemon's descriptors are closed", || {
            now = Descriptors::of(daemon)?;
            Ok((now.others <= before.others && now.pipes <= before.pipes + spare).then_some(()))
        })
        .with_context(|| format!("before {before:?}, now {now:?}"))
    }
}

/// The numbers of descriptors that a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptors {
    /// Ends of pipes.
    pub(crate) pipes: usize,
    pub(crate) others: usize,
}

impl Descriptors {
    pub(crate) fn of(process: Process) -> Result<Descriptors> {
        let pipes = process.pipe_ends()?;
        Ok(Descriptors { pipes, others: process.descriptors()?.saturating_sub(pipes) })
    }

    pub(crate) fn all(self) -> usize {
        self.pipes + self.others
    }
}

/// Listens in a namespace.
pub(crate) fn listen(netns: &NetNs, on: SocketAddr) -> Result<TcpListener> {
    let listener = netns.run(|| TcpListener::bind(on).with_context(|| format!("listen on {on}")))?;
    // As servers have it: the standard library's backlog is too short for a crowd.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
    Ok(listener)
}

/// Connects from `from`, and accepts. Neither end waits for long, later on.
pub(crate) fn connection(from: &NetNs, to: SocketAddr, at: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let limit = patience::seconds(5);
    let client = client::dial(from, None, to, limit).context("dial")?;
    let mut events = [PollFd::new(at.as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut events, PollTimeout::try_from(limit)?)? == 1, "no connection comes in");
    let (service, _) = at.accept()?;
    for end in [&client, &service] {
        end.set_nodelay(true)?;
        end.set_read_timeout(Some(patience::seconds(20)))?;
        end.set_write_timeout(Some(patience::seconds(20)))?;
    }
    Ok((client, service))
}

/// Makes the close of a socket a reset.
pub(crate) fn reset(socket: TcpStream) -> Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger)?;
    drop(socket);
    Ok(())
}

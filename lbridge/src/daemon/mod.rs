//! Daemon: wires the other modules together and runs until it is stopped. It may import every shell but
//! `sandbox` and `migrate`.
//!
//! ```text
//! API commands, Docker, netlink and listener events (wake-ups only)
//!   -> reconciler: observer -> resolve -> plan -> executor -> observer ...
//! ```
//!
//! - [`reconciler`]: the loop and the state that it owns; its `commands` answer the control API;
//! - [`configuration`]: the `lbridge.toml` in force;
//! - [`executor`]: carries out steps, decides nothing;
//! - [`explain`]: the facts that `explain` needs in addition to one observation;
//! - [`guests`]: the owner of `REDIRECT_NETNS`, the network namespaces whose localhost leads to the host;
//! - [`handover`]: passes listening sockets from one daemon to the next;
//! - [`journal`]: what the log and the subscribers to events are told;
//! - [`labels`]: the rules derived from labels;
//! - [`manager`]: status and watchdog messages to the service manager;
//! - [`memory`]: what was last seen of the engine, for a start while it is away;
//! - [`observer`]: observations of the host;
//! - [`report`]: the result of a pass, as `status` shows it;
//! - [`sources`]: the owner of `SOURCES`, the addresses of containers that rules are for;
//! - [`priority_thread`]: threads with a raised priority.

mod configuration;
mod executor;
mod explain;
mod guests;
mod handover;
mod journal;
mod labels;
mod manager;
mod memory;
mod observer;
mod priority_thread;
mod reconciler;
mod report;
mod sources;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
};

use crate::{
    api::{
        events::EventBus,
        server::{Command, ControlSocket},
    },
    docker::watch::Watcher,
    host::{cgroup, interfaces::Interfaces, netns::HostNetns, privileges, processes, trusted},
    kernel::{
        loader::{Kernel, Loaded},
        strays,
    },
    planning::hooks::HookSet,
    relay,
    store::Store,
};
use configuration::Configuration;
use executor::Executor;
use guests::Guests;
use memory::Memory;
use observer::Observer;
use reconciler::{Reconciler, containers};
use sources::SourceGate;

/// Limit on how long a start waits for Docker's first answer: enough for a running engine, yet too short to
/// disturb.
const DOCKER_FIRST_ANSWER: Duration = Duration::from_secs(2);
/// Capacity of the wake-up channel: a wake-up is a flag, not a queue.
const WAKE_QUEUE: usize = 1;
/// Time that a stop takes at most in addition to the drain timeout.
const DRAIN_EXTRA: Duration = Duration::from_secs(10);
/// Capacity of the command channel: requests that may wait for the loop.
const COMMAND_QUEUE: usize = 64;

/// Options of `lbridge run`.
#[derive(Debug, Clone)]
pub struct Options {
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Path of the state directory.
    pub state_dir: PathBuf,
    /// Path of the configuration file.
    pub config: PathBuf,
    /// Path of the pin directory, on a bpffs.
    pub bpffs: PathBuf,
    /// The cgroup2 whose sockets are watched; `None` means the mount point in /proc/mounts.
    pub cgroup: Option<PathBuf>,
    /// True if the daemon follows Docker.
    pub docker: bool,
}

/// Turns a failed trust check of `path` into an error that names `what`. The daemon refuses what another user
/// could change, since that user could have root act by it.
fn check(checked: io::Result<()>, what: &str, path: &Path) -> anyhow::Result<()> {
    checked.map_err(|error| trusted::refused(what, path, &error))
}

/// Runs the daemon until SIGTERM or SIGINT, or a SIGHUP after its terminal has gone. What the kernel serves
/// stays in force afterwards.
pub async fn run(options: Options) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "lbridge run needs root: it loads eBPF programs and duplicates other processes' sockets; use \
             sudo"
        );
    }
    // Everything that can be wrong is read before anything is touched.
    let socket = std::path::absolute(&options.socket)?;
    let (state, socket) = (options.state_dir.as_path(), socket.parent().unwrap_or(Path::new("/")));
    check(trusted::check_way(state), "the state directory", state)?;
    // A user who can replace the socket by a link could make the daemon set group and mode of another file.
    check(trusted::check_way(socket), "the control socket's folder", socket)?;
    let store = Store::open(state)?;
    check(trusted::open_folder(state).map(drop), "the state directory", state)?;
    check(trusted::check_file(&store.rules_file()), "the rules file", &store.rules_file())?;
    let (configuration, rules) = Configuration::load(options.config, &store)?;
    let _lock = store.lock()?;
    let socket = ControlSocket::bind(&options.socket)?;

    relay::raise_descriptor_limit();
    let netns = HostNetns::open()?;
    let cgroup = match options.cgroup {
        Some(path) => path,
        None => cgroup::mount()?,
    };
    // Two daemons would detach each other's programs.
    let others = strays::find(&options.bpffs, &netns.file, netns.cookie)?;
    let others: Vec<u32> = others.iter().map(|stray| stray.program).collect();
    if let Some(pid) = processes::with_program(&others) {
        bail!("another lbridge daemon (process {pid}) serves this network namespace; stop it first");
    }
    let mut loaded = Kernel::load(&options.bpffs, &cgroup, netns.file.try_clone()?, netns.cookie)?;
    if let Err(why) = &loaded.features.steer {
        tracing::warn!(error = why, "steering is unavailable; connections are relayed");
    }
    let guests = loaded.guests.take().filter(|_| loaded.features.hooks[HookSet::Connect].is_ok());
    let guests = guests.map(|map| Guests::start(map, &netns)).transpose()?;
    let mut sources = loaded.sources.take().map(SourceGate::start).transpose()?;
    // Every other thread has given up its privileges already, or is started later by this one.
    privileges::drop_capabilities().context("cannot drop privileges")?;

    let (wake, wakes) = mpsc::channel(WAKE_QUEUE);
    let memory = Memory::open(store);
    let interfaces = Interfaces::connect(wake.clone())?;
    let docker = if options.docker {
        let labelled = configuration.config().labels.enabled.then(|| memory.labelled().to_vec());
        let (networks, seen) = (memory.networks().to_vec(), memory.containers().to_vec());
        let mut watcher = Watcher::start(networks, containers(&rules), seen, labelled)?;
        watcher.first_answer(DOCKER_FIRST_ANSWER).await;
        Some(watcher)
    } else {
        None
    };

    if let Some(sources) = &mut sources {
        sources.follow(docker.as_ref().map(Watcher::follow), netns.id, wake.clone());
    }

    let (commands, requests) = mpsc::channel(COMMAND_QUEUE);
    let Loaded { kernel, events, features, .. } = loaded;
    let executor = Executor::new(kernel, features, guests, sources, netns.id, wake.clone())?;
    let observer = Observer::new(interfaces, netns.id, memory.containers());
    let news = EventBus::new(wake);
    let mut reconciler =
        Reconciler::new(rules, configuration, memory, executor, observer, docker, news.clone());
    reconciler.start().await?;
    let mut serving = tokio::spawn(socket.serve(commands.clone(), news));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let hangup = signal(SignalKind::hangup())?;
    let terminal = has_terminal();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    reconciler.log_ready();
    let outcome = tokio::select! {
        never = reconciler.run(requests, wakes, events) => never,
        ended = &mut serving => ended.context("the control API panicked")?,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = reload_on(hangup, commands, terminal) => Ok(()),
    };
    let drain = reconciler.drain_timeout();
    let _ = sd_notify::notify(&[
        sd_notify::NotifyState::Stopping,
        sd_notify::NotifyState::ExtendTimeoutUsec(microseconds(drain + DRAIN_EXTRA)),
    ]);
    serving.abort();
    let _ = serving.await;
    let cut_off = tokio::select! {
        cut_off = reconciler.drain(drain) => Some(cut_off),
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
    };
    // Without a number if a second signal ended the wait for them.
    tracing::info!(relayed_cut_off = cut_off, "daemon stopped; steered rules stay in force");
    outcome
}

fn microseconds(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// Reloads the configuration at each SIGHUP. Returns if a SIGHUP was sent because the terminal that the
/// daemon was started from has gone.
async fn reload_on(mut hangup: Signal, commands: mpsc::Sender<Command>, terminal: bool) {
    while hangup.recv().await.is_some() {
        if terminal && !has_terminal() {
            return;
        }
        // The result is logged.
        let (answer, _) = oneshot::channel();
        if commands.send(Command::Reload(answer)).await.is_err() {
            return;
        }
    }
}

/// Returns true if this process has a controlling terminal (tty(4)).
fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

//! The daemon: beside the foreground the only room that sees more than one shell.
//!
//! ```text
//! API commands, Docker, netlink and listener events (wake-ups only)
//!   -> reconciler: observe -> resolve -> plan -> executor -> observe ...
//! ```
//!
//! - [`reconciler`]: the loop, and the state that it owns;
//! - [`observe`]: one look at the host;
//! - [`executor`]: carries out steps, decides nothing;
//! - [`handover`]: listening sockets, from one daemon to the next;
//! - [`report`]: what `status` says.

mod executor;
mod handover;
mod observe;
mod reconciler;
mod report;

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    api::server::ControlSocket,
    docker,
    host::{interfaces::Interfaces, netns::HostNetns},
    kernel::loader::Kernel,
    planning::rule::{Origin, Refused, Rules},
    relay,
    store::{Config, Store},
};
use reconciler::{Reconciler, containers};

/// How long a start waits for Docker's first answer: long enough for a living engine, too short to matter.
const DOCKER_FIRST_ANSWER: Duration = Duration::from_secs(2);
/// A wake-up is a flag, not a queue.
const WAKE_QUEUE: usize = 1;
/// How long relayed connections may take to end when the daemon is stopped, unless the configuration says otherwise.
const DRAIN: Duration = Duration::from_secs(5);
/// What else a stop takes, at most.
const DRAIN_EXTRA: Duration = Duration::from_secs(10);
/// Requests that may wait for the loop.
const COMMAND_QUEUE: usize = 64;

/// What `lbridge run` was told.
#[derive(Debug, Clone)]
pub struct Options {
    /// The control socket.
    pub socket: PathBuf,
    /// The state directory.
    pub state_dir: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    /// The pin directory, on a bpffs.
    pub bpffs: PathBuf,
    /// The cgroup2 whose sockets are watched; `None`: the mount point in /proc/mounts.
    pub cgroup: Option<PathBuf>,
    /// Whether Docker is followed.
    pub docker: bool,
}

/// Runs until SIGTERM or SIGINT. What the kernel serves stays in force afterwards.
pub async fn run(options: Options) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "lbridge run needs root: it loads eBPF programs and takes hold of other processes' sockets; use sudo"
        );
    }
    // Everything that can be wrong is read before anything is touched.
    let config = Config::load(&options.config)?;
    let drain = config.drain_timeout.unwrap_or(DRAIN);
    let store = Store::open(&options.state_dir)?;
    let stored = store.rules()?;
    let rules = Rules::default()
        .allow(config.rules, Origin::Config)
        .map_err(|refused| twice(&refused, &options.config))?
        .allow(stored, Origin::Cli)
        .map_err(|refused| contradiction(&refused, &options))?;
    let _lock = lock(&options)?;
    let socket = ControlSocket::bind(&options.socket)?;

    relay::raise_descriptor_limit();
    let netns = HostNetns::open()?;
    let cgroup = match options.cgroup {
        Some(path) => path,
        None => cgroup2_mount()?,
    };
    let loaded = Kernel::load(&options.bpffs, &cgroup, netns.file, netns.cookie)?;
    if let Err(why) = &loaded.abilities.steer {
        tracing::warn!("nothing can be steered: {why}");
    }

    let (wake, wakes) = mpsc::channel(WAKE_QUEUE);
    let interfaces = Interfaces::connect(wake.clone())?;
    let docker = if options.docker {
        let mut watcher = docker::watch::Watcher::start(store.networks(), containers(&rules));
        watcher.first_answer(DOCKER_FIRST_ANSWER).await;
        Some(watcher)
    } else {
        None
    };

    let (commands, requests) = mpsc::channel(COMMAND_QUEUE);
    let mut reconciler = Reconciler::new(rules, store, loaded, interfaces, docker, wake, netns.id)?;
    reconciler.set_firewall(config.firewall);
    reconciler.start().await?;
    let mut serving = tokio::spawn(socket.serve(commands));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!("ready: {}", reconciler.summary());
    let outcome = tokio::select! {
        never = reconciler.run(requests, wakes) => never,
        ended = &mut serving => ended.context("the control API panicked")?,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        // The terminal is gone; there is nothing to read anew.
        _ = hangup.recv() => Ok(()),
    };
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
    let relayed = match cut_off {
        Some(0) => String::new(),
        Some(1) => "; 1 relayed connection is cut off".to_owned(),
        Some(cut_off) => format!("; {cut_off} relayed connections are cut off"),
        None => "; relayed connections are cut off".to_owned(),
    };
    tracing::info!("stopped; what the kernel steers stays in force{relayed}");
    outcome
}

fn microseconds(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// The daemon does not run, so that `deny` is no remedy.
fn twice(refused: &Refused, config: &Path) -> anyhow::Error {
    let config = config.display();
    match refused {
        Refused::Conflict { id, existing } => anyhow::anyhow!(
            "{config} has two rules for {id}, the first is {existing}; remove one, then start again"
        ),
        other => anyhow::anyhow!("{config}: {other}"),
    }
}

/// As [`twice`], of the configuration and what `allow` made.
fn contradiction(refused: &Refused, options: &Options) -> anyhow::Error {
    let (config, rules) = (options.config.display(), options.state_dir.join("rules.toml"));
    let rules = rules.display();
    match refused {
        Refused::ReadOnly { id } => anyhow::anyhow!(
            "{config} allows {id}, {rules} does otherwise; remove the rule from one of them, then start again"
        ),
        other => anyhow::anyhow!("{config} and {rules}: {other}"),
    }
}

/// One daemon to a state directory.
fn lock(options: &Options) -> anyhow::Result<Flock<std::fs::File>> {
    // A file of our own: a directory can be locked by whoever may read it.
    let path = options.state_dir.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        Errno::EWOULDBLOCK => {
            anyhow::anyhow!("another lbridge daemon uses {}; stop it first", options.state_dir.display())
        }
        error => anyhow::anyhow!("cannot lock {}: {error}", options.state_dir.display()),
    })
}

fn cgroup2_mount() -> anyhow::Result<PathBuf> {
    // Mount points are bytes; the kernel writes blanks in them as octal escapes (proc(5)).
    let mounts = std::fs::read("/proc/mounts").context("cannot look for cgroup2")?;
    let mount = mounts.split(|b| *b == b'\n').find_map(|line| {
        let mut fields = line.split(|b| *b == b' ');
        let (point, kind) = (fields.nth(1)?, fields.next()?);
        (kind == b"cgroup2").then(|| PathBuf::from(String::from_utf8_lossy(point).replace("\\040", " ")))
    });
    mount.context(
        "no cgroup2 is mounted; run `mount -t cgroup2 none /sys/fs/cgroup`, or give one with --cgroup",
    )
}

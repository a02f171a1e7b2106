//! Sandbox relay: `lbridge relay`, the daemon's loop on a small scale, for one sandbox, without privileges
//! and without kernel programs. Observes, decides with the same planning, opens and closes relays. Imports
//! planning, host, relay and sandbox.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    future::Pending,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    os::{fd::OwnedFd, unix::process::ExitStatusExt as _},
    path::PathBuf,
    process::ExitStatus,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use tokio::{
    io::unix::AsyncFd,
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    host::{
        listeners,
        netns::{self, HostNetns},
        trusted,
    },
    planning::{
        actual::Actual,
        desired::{RelayKey, RelaySpec, State},
        firewall::FirewallMode,
        hooks::PerHookSet,
        inventory::{
            Incumbents, Inventory, KernelFeatures, Namespace, NamespaceKey, NetnsRef, NetnsUnavailable,
        },
        owner,
        plan::{Step, plan},
        resolve::resolve,
        rule::{self, Network, Origin, PortSpec, Protocol, ProxyProtocol, Rule, Rules, Source, Target},
    },
    relay::{self, set::RelaySet, socket::Listening},
    sandbox::{
        door::Door,
        find,
        launch::{self, Started},
    },
};

/// Polling interval: without the daemon's events, polling is the only way to notice services that come and
/// go.
const FAST_RESYNC: Duration = Duration::from_millis(500);
/// Debounce: minimum time between two passes that a relay asks for.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Time that relayed connections have to end after SIGTERM.
const DRAIN: Duration = Duration::from_secs(5);

/// The sandbox to serve.
#[derive(Debug, Clone)]
pub enum Sandbox {
    /// The sandbox of this process, or of the first of its descendants that is in one.
    Process(u32),
    /// The network namespace at this path.
    Path(PathBuf),
    /// The sandbox that this command creates.
    Command(Vec<OsString>),
}

/// The options of `lbridge relay`.
#[derive(Debug, Clone)]
pub struct Options {
    /// The sandbox to serve.
    pub sandbox: Sandbox,
    /// The ports to open inside the sandbox, with their targets.
    pub ports: Vec<PortSpec>,
    /// The source address that services see.
    pub source: Source,
    /// Maximum number of connections to a port at the same time; `None` for no limit.
    pub max_connections: Option<NonZeroU32>,
    /// Idle time after which a connection without traffic is reset; `None` for never.
    pub idle_timeout: Option<Duration>,
    /// Version of the PROXY protocol header that carries the client's address; `None` if none is sent.
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// Relays until the sandbox has ended or a signal arrives. Returns the command's exit status, if there is a
/// command: 128 plus the signal's number if a signal ended it.
pub fn run(options: &Options) -> anyhow::Result<u8> {
    match &options.sandbox {
        Sandbox::Command(command) => run_command(options, command),
        Sandbox::Process(pid) => {
            let found = find::namespace_of(*pid)?;
            let namespace = netns::Namespace::of_process(found.netns, found.process, found.pid)?;
            attach(options, namespace, Network::Process(found.pid))
        }
        Sandbox::Path(path) => {
            let host = HostNetns::open()?;
            let namespace = netns::Namespace::at(path, host.id);
            let namespace = namespace.map_err(|absence| match absence {
                NetnsUnavailable::NotThere(why) | NetnsUnavailable::Unsuitable(why) => anyhow!(why),
            })?;
            attach(options, namespace, Network::Netns(path.clone()))
        }
    }
}

fn run_command(options: &Options, command: &[OsString]) -> anyhow::Result<u8> {
    let held = match launch::launch(command)? {
        Started::Held(held) => held,
        Started::Ended(status) => {
            tracing::warn!(
                "command ended without a network namespace and ran in the host's; is --unshare-net missing?"
            );
            return Ok(exit_status(status));
        }
    };
    // Not earlier: the command keeps its own limit.
    relay::raise_descriptor_limit();
    // Everything is open before the command continues.
    let door = Door::open(&held.netns())?;
    let entrance = NetnsRef::Process { pid: held.pid(), start: None, container: None };
    let key = NamespaceKey { id: netns::id_of(&held.netns())?, entrance };
    let runtime = runtime()?;
    let mut session = runtime.block_on(async {
        let mut session = Session::new(door, key, Network::Process(held.pid()), options)?;
        session.pass().await?;
        anyhow::Ok(session)
    })?;
    let child = held.release()?;
    runtime.block_on(session.run(ended(child.pidfd().try_clone_to_owned()?)))??;
    Ok(exit_status(child.wait()?))
}

/// Serves an existing sandbox.
fn attach(options: &Options, namespace: netns::Namespace, network: Network) -> anyhow::Result<u8> {
    relay::raise_descriptor_limit();
    let door = Door::open(&namespace.file())?;
    runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut session = Session::new(door, namespace.key.clone(), network, options)?;
        session.pass().await?;
        let drain = session
            .run(async {
                tokio::select! {
                    () = namespace.gone() => false,
                    _ = interrupt.recv() => false,
                    _ = terminate.recv() => true,
                }
            })
            .await?;
        if drain {
            tokio::select! {
                _ = session.relays.drain(DRAIN) => {}
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        Ok(0)
    })
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Waits until a process has ended.
async fn ended(process: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is owned, so nothing closes it before the registration ends.
    let watched = unsafe { AsyncFd::register(process) };
    watched.map_err(io::Error::from)?.readable().await.map(drop)
}

/// Returns the exit status as a shell reports it.
fn exit_status(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

impl Options {
    /// Checks the options, whatever the sandbox. Call it before anything is started.
    pub fn check(&self) -> Result<(), String> {
        let mut ports = BTreeSet::new();
        for spec in &self.ports {
            if !ports.insert(spec.port) {
                return Err(format!("port {} is given twice", spec.port));
            }
            if spec.protocol == Protocol::Udp {
                return Err(format!(
                    "{spec}: UDP is not relayed, and a sandbox has no bridge to be steered from"
                ));
            }
            if matches!(spec.target, Target::Unix(_)) && self.source == Source::Container {
                return Err(format!(
                    "{spec} leads to a Unix socket, whose service would see you as its peer; add --source \
                     loopback"
                ));
            }
        }
        Ok(())
    }

    fn rules(&self, network: &Network) -> anyhow::Result<Rules> {
        let process = match network {
            Network::Process(pid) => Some(netns::process_start(*pid)?),
            _ => None,
        };
        let rules = self.ports.iter().map(|spec| Rule {
            options: rule::Options {
                source: self.source,
                max_connections: self.max_connections,
                idle_timeout: self.idle_timeout,
                proxy_protocol: self.proxy_protocol,
                ..rule::Options::default()
            },
            process: process.clone(),
            ..Rule::new(network.clone(), spec.clone())
        });
        Rules::default().allow(rules, Origin::Cli).map_err(|error| anyhow!("{}", error.for_cli()))
    }
}

/// The open ports of one sandbox.
#[derive(Debug)]
struct Session {
    door: Door,
    rules: Rules,
    network: Network,
    namespace: Namespace,
    relays: RelaySet,
    wakes: mpsc::Receiver<()>,
    incumbents: Incumbents,
    /// The last message for each address.
    told: BTreeMap<SocketAddr, String>,
}

impl Session {
    /// Creates a session that serves through the door of that network namespace. Must be called in a runtime.
    fn new(door: Door, key: NamespaceKey, network: Network, options: &Options) -> anyhow::Result<Self> {
        let rules = options.rules(&network)?;
        let localhost = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let mut loopback = vec![];
        for ip in localhost {
            match door.bind(SocketAddr::new(ip, 0)) {
                Ok(_) => loopback.push(ip),
                Err(error) if ip.is_ipv6() => tracing::debug!(%error, "sandbox has no IPv6"),
                Err(error) => return Err(error).context("cannot listen inside the sandbox"),
            }
        }
        let namespace = Namespace { key, loopback, address: None };
        let (wake, wakes) = mpsc::channel(1);
        let relays = RelaySet::new(None, wake)?;
        let (incumbents, told) = (Incumbents::new(), BTreeMap::new());
        Ok(Self { door, rules, network, namespace, relays, wakes, incumbents, told })
    }

    /// Observes, and makes the actual state match the desired one.
    async fn pass(&mut self) -> anyhow::Result<()> {
        let unix: BTreeSet<_> = self
            .rules
            .iter()
            .filter_map(|(_, rule, _)| match &rule.spec.target {
                Target::Unix(path) => Some(path.clone()),
                Target::Port(_) | Target::Address(_) => None,
            })
            .collect();
        let mut inventory = Inventory {
            listeners: listeners::tcp()?,
            untrusted_paths: trusted::untrusted(&unix),
            unix_listeners: if unix.is_empty() { unix } else { listeners::unix(unix)? },
            namespaces: [(self.network.clone(), Ok(self.namespace.clone()))].into(),
            ..Inventory::default()
        };
        self.incumbents = owner::incumbents(&self.rules, &inventory, &self.incumbents);
        inventory.incumbents.clone_from(&self.incumbents);
        let without = || "lbridge relay loads no programs into the kernel".to_owned();
        let features =
            KernelFeatures { steer: Err(without()), hooks: PerHookSet::from_fn(|_| Err(without())) };
        let desired = resolve(&self.rules, &inventory, &features, FirewallMode::Off);
        let actual =
            Actual { relays: self.relays.specs(), lingering: self.relays.lingering(), ..Actual::default() };
        let mut failures = BTreeMap::new();
        for step in plan(&desired, &actual) {
            match step {
                Step::OpenRelay(key, spec) => {
                    if !self.relays.change(&key, &spec)
                        && let Err(error) = self.open(&key, spec)
                    {
                        failures.insert(key, format!("{error:#}"));
                    }
                }
                Step::CloseRelay { key, .. } => self.relays.close(&key, false).await,
                // The desired state of a namespace has no steps for the kernel programs.
                step => tracing::debug!(%step, "step left out: it needs the kernel programs"),
            }
        }
        for outcome in desired.outcomes.iter().flat_map(|outcome| &outcome.gateways) {
            let failure = failures.get(&outcome.relay_key);
            let state = if failure.is_some() { State::Blocked } else { outcome.outcome.state };
            let why = failure.cloned().or_else(|| outcome.outcome.why()).unwrap_or_default();
            self.tell(outcome.relay_key.address, state, &why);
        }
        Ok(())
    }

    fn open(&mut self, key: &RelayKey, spec: RelaySpec) -> anyhow::Result<()> {
        let socket =
            self.door.bind(key.address).and_then(Listening::begin).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => anyhow!("in use by another program inside"),
                _ => anyhow::Error::new(error).context("cannot listen inside the sandbox"),
            })?;
        self.relays.open(key, spec, socket, None::<Pending<()>>)
    }

    /// Logs the state of an address when it changes; a first success only at info level.
    fn tell(&mut self, address: SocketAddr, state: State, why: &str) {
        let text = format!("{state:?} {why}");
        if self.told.get(&address) == Some(&text) {
            return;
        }
        let relayed = matches!(state, State::Steered | State::Relayed);
        if relayed && !self.told.contains_key(&address) {
            tracing::info!(%address, %state, "relay state changed");
        } else {
            tracing::warn!(%address, %state, why = (!relayed).then_some(why), "relay state changed");
        }
        self.told.insert(address, text);
    }

    /// Serves until `end` completes.
    async fn run<T>(&mut self, end: impl Future<Output = T>) -> anyhow::Result<T> {
        tokio::pin!(end);
        let mut looked = Instant::now();
        loop {
            tokio::select! {
                ended = &mut end => return Ok(ended),
                _ = self.wakes.recv() => sleep_until(looked + DEBOUNCE).await,
                () = sleep(FAST_RESYNC) => {}
            }
            // For example too few descriptors: the sandbox must keep what it has.
            if let Err(error) = self.pass().await {
                tracing::warn!(error = format!("{error:#}"), "reconciliation failed; trying again");
            }
            looked = Instant::now();
        }
    }
}

//! kernel: checks what the kernel supports. Loads every program without leaving a trace, and steers one
//! connection in a network namespace created for it. Guesses nothing from a version.

use std::{
    collections::HashSet,
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsFd as _,
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use lbridge_common::wire::{Entry, EntryKey, ListenerKey, TCP};
use socket2::{Domain, Socket, Type};

use super::{Finding, Level, Options, daemon::Daemon};
use crate::{
    host::{
        cgroup,
        netns::{self, HostNetns, LOOPBACK},
        socket_fd::SocketFdTaker,
    },
    kernel::{
        pins,
        trial::{self, Trial},
    },
    planning::{hooks::HookSet, inventory::Steering},
};

/// Lower limit of open files below which the daemon's relays can carry only few connections.
const FEW_DESCRIPTORS: u64 = 4096;
/// Maximum time that a connection over a namespace's own loopback takes.
const CONNECT: Duration = Duration::from_secs(2);

pub(super) fn findings(options: &Options, daemon: Option<&Daemon>) -> Vec<Finding> {
    let root = nix::unistd::geteuid().is_root();
    let mut findings = vec![about_cgroup(options, root), about_bpffs(&options.bpffs)];
    if root {
        match Trial::load(HostNetns::open().ok().and_then(|netns| netns.cookie)) {
            Ok(trial) => findings.extend(about_programs(trial)),
            Err(error) => {
                findings.push(refused(format!("the kernel accepts none of lbridge's programs: {error:#}")));
            }
        }
    } else {
        findings.push(Finding::needs_root("steering", "what the kernel supports"));
    }
    findings.extend(about_descriptors(daemon));
    findings
}

fn about_cgroup(options: &Options, root: bool) -> Finding {
    const CHECK: &str = "cgroup2";
    const WHY: &str =
        "Programs at its root notice services that start; lbridge run does not start without it.";
    let Ok(path) = options.cgroup.clone().map_or_else(cgroup::mount, Ok) else {
        // Hybrid: this path is a tmpfs with the controllers of cgroup v1.
        let hybrid = ["memory", "systemd"].iter().any(|name| Path::new("/sys/fs/cgroup").join(name).exists());
        let remedy = if hybrid {
            "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
        } else {
            "mount -t cgroup2 none /sys/fs/cgroup"
        };
        let finding = Finding::new(CHECK, Level::Problem, "no cgroup2 is mounted");
        return finding.because(WHY).type_this([remedy]);
    };
    if root && let Err(error) = trial::check_cgroup(&path) {
        return Finding::new(CHECK, Level::Problem, format!("{error:#}")).because(WHY);
    }
    Finding::ok(CHECK, format!("cgroup2 is at {}", path.display()))
}

fn about_bpffs(path: &Path) -> Finding {
    const CHECK: &str = "bpffs";
    if pins::on_bpffs(path) {
        if let Some((what, remedy)) = pins::refusal(path) {
            let why = "Whoever can change the pins decides what is served; lbridge run refuses to start.";
            return Finding::new(CHECK, Level::Problem, what).because(why).type_this(remedy);
        }
        return Finding::ok(CHECK, format!("{} is on a bpffs", path.display()));
    }
    Finding::new(CHECK, Level::Problem, format!("{} is not on a bpffs", path.display()))
        .because("The kernel programs and maps are pinned there; lbridge run does not start without it.")
        .type_this([pins::mount_one(path)])
}

fn about_programs(mut trial: Trial) -> Vec<Finding> {
    const CHECK: &str = "steering";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut findings = vec![];
    let netns = netns::throw_away();
    match trial.features.steer.clone() {
        Err(why) => findings.push(refused(format!("Linux {release} does not steer: {why}"))),
        Ok(steering) => {
            let release = format!("Linux {release}");
            findings.push(match netns.as_ref().map(|netns| steer_one(&mut trial, netns, steering)) {
                Ok(Ok(())) => Finding::ok(CHECK, format!("{release} steers (tested with a connection)")),
                Ok(Err(error)) => {
                    let what = format!("{release} loads the steering program, but does not steer: {error:#}");
                    let finding = Finding::new(CHECK, Level::Problem, what);
                    finding.because("Rules that say steered would not serve; --path relay does.")
                }
                Err(error) => {
                    let what =
                        format!("{release} loads the steering program; it could not be tested: {error:#}");
                    Finding::new(CHECK, Level::Note, what)
                }
            });
            if !steering.interface_check {
                let what = format!(
                    "Linux {release} does not report the interface that a packet came in on (5.17 and later \
                     do)"
                );
                let why = "Only the source's subnet is checked: a LAN host with a forged source address gets \
                           a SYN through, but no connection.";
                findings.push(Finding::new("ingress", Level::Note, what).because(why));
            }
            if !steering.kernel_registers {
                let what =
                    format!("Linux {release} does not register services by itself (5.15 and later do)");
                let why = "A service that restarts while the daemon is down is not found until it is up.";
                findings.push(Finding::new("registering", Level::Note, what).because(why));
            }
        }
    }
    if let Err(why) = &trial.features.hooks[HookSet::Names] {
        let finding = Finding::new(
            "names",
            Level::Warning,
            format!("the kernel cannot show services their containers' addresses: {why}"),
        );
        findings.push(finding.because(
            "Relayed connections show an address in 127.128.0.0/9 instead, and --source loopback is relayed.",
        ));
    }
    if let Err(why) = &trial.features.hooks[HookSet::Connect] {
        let what = format!("--localhost is not available: {why}");
        let why = "Rules with --localhost serve only the gateway.";
        findings.push(Finding::new("localhost", Level::Note, what).because(why));
    }
    if let Err(why) = &trial.features.hooks[HookSet::Replies] {
        let what = format!("UDP is not available, as replies cannot be given their source: {why}");
        findings.push(Finding::new("udp", Level::Note, what).because("Rules for UDP are blocked."));
    }
    if let Ok(netns) = &netns
        && let Err(error) = take_one(netns)
    {
        let what = format!("listening sockets of services cannot be duplicated: {error:#}");
        let finding = Finding::new("taking", Level::Warning, what);
        findings.push(
            finding.because("A service that ran before its rule was made is relayed until it restarts."),
        );
    }
    findings
}

fn refused(what: String) -> Finding {
    let mut why =
        "Every rule is relayed: connections end with the daemon, and cost two sockets each.".to_owned();
    if let Some(reason) = restriction() {
        why = format!("{why} {reason}");
    }
    Finding::new("steering", Level::Warning, what).because(why)
}

/// Returns a likely cause of a refusal, if one is found.
fn restriction() -> Option<String> {
    // CAP_NET_ADMIN, CAP_SYS_ADMIN (include/uapi/linux/capability.h). CAP_BPF is part of the latter.
    const NEEDED: u64 = 1 << 12 | 1 << 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    if capabilities.is_some_and(|bits| bits & NEEDED != NEEDED) {
        return Some("This root lacks CAP_SYS_ADMIN or CAP_NET_ADMIN, as in a container.".to_owned());
    }
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    let mode = lockdown.split(['[', ']']).nth(1).filter(|mode| *mode != "none")?;
    Some(format!("The kernel is locked down ({mode}), which restricts BPF."))
}

/// Tests that a connection from 127.0.0.2 to a port of 127.0.0.1 where nothing listens reaches the listener
/// on 127.0.0.3.
fn steer_one(trial: &mut Trial, netns: &File, steering: Steering) -> anyhow::Result<()> {
    let [gateway, source, target] = [1, 2, 3].map(|last| IpAddr::from(Ipv4Addr::new(127, 0, 0, last)));
    let listener = netns::within(netns, || TcpListener::bind((target, 0)))?.context("cannot listen there")?;
    let port = listener.local_addr()?.port();
    trial.maps.register(ListenerKey { address: target.into(), port, slot: 0, protocol: TCP }, &listener)?;
    let ifindex = if steering.interface_check { LOOPBACK.get() } else { 0 };
    let key = EntryKey { gateway: gateway.into(), ifindex, port, protocol: TCP.into() };
    let mask = key.gateway.mask(8);
    let subnet = key.gateway.masked(&mask);
    let target = target.into();
    let value = Entry { key, subnet, mask, target, target_port: port, flags: 0, reserved: [0; 2] };
    trial.maps.put_entry(&key, value)?;
    trial.attach(netns)?;
    netns::within(netns, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        socket.connect_timeout(&SocketAddr::new(gateway, port).into(), CONNECT)
    })?
    .context("the connection did not reach its listener")
}

/// Tests taking over a listener, as the daemon does with services that were started before it.
fn take_one(netns: &File) -> anyhow::Result<()> {
    let listener = netns::within(netns, || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
    let inode = nix::sys::stat::fstat(listener.as_fd())?.st_ino;
    SocketFdTaker::default().take(inode, &HashSet::from([inode])).map(drop)
}

fn about_descriptors(daemon: Option<&Daemon>) -> Vec<Finding> {
    const CHECK: &str = "descriptors";
    let mut findings = vec![];
    let numbers = fs::read_to_string("/proc/sys/fs/file-nr").unwrap_or_default();
    let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    if let [open, _, max] = numbers[..]
        && open > max / 10 * 9
    {
        let what = format!("{open} of {max} files of this host are open");
        let finding =
            Finding::new(CHECK, Level::Warning, what).because("Relays are about to refuse connections.");
        findings.push(finding.type_this([format!("sysctl -w fs.file-max={}", max.saturating_mul(2))]));
    }
    if let Some(limit) = daemon.and_then(|daemon| open_files_limit(daemon.pid))
        && limit < FEW_DESCRIPTORS
    {
        let what = format!("the daemon may open {limit} files");
        let finding = Finding::new(CHECK, Level::Warning, what).because("A relayed connection takes two.");
        findings.push(finding.type_this([
            "systemctl edit lbridge.service",
            "[Service]",
            "LimitNOFILE=524288",
        ]));
    }
    findings
}

/// Returns the hard limit of open files, to which the daemon raises its own soft limit.
fn open_files_limit(pid: u32) -> Option<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

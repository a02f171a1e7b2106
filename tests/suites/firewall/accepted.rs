//! An accept rule of lbridge's lets packets in for one rule, and for nothing else: whoever the rule does not
//! admit must not reach what else the host has at the dialled port.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::scene::{self, Scene};
use lbridge_tests::harness::service::{self, Service};
use lbridge_tests::harness::suite::Test;
use lbridge_tests::harness::udp::{self, Echo};
use lbridge_tests::harness::{forge, patience};
use lbridge_tests::tests;

use super::tools::{broken_nft, instead_of_nft, without_nft};
use super::{DROPS, Walled, dropped};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_rule_that_waits_opens_nothing_else,
        a_relay_that_waits_opens_nothing_else,
        a_relay_that_waits_opens_nothing_else_ipv6,
        a_relay_whose_daemon_was_killed_opens_nothing_else,
        a_rule_that_is_blocked_opens_nothing_else,
        sources_outside_of_the_subnet_meet_the_firewall,
        link_local_sources_meet_the_firewall,
        datagrams_with_forged_sources_reach_nobody,
        an_accept_rule_that_stays_opens_nothing,
        a_cleanup_that_fails_opens_nothing,
        a_cleanup_finds_its_tools,
        a_tool_ends_with_its_daemon,
        without_nft_a_denied_rule_leaves_nothing,
        a_subnet_that_shrinks_opens_nothing_else,
        rules_that_come_and_go_open_nothing_else,
        a_bridge_that_is_made_anew_opens_nothing_else,
        a_bridge_that_is_made_anew_while_no_daemon_runs_opens_nothing_else,
        a_bridge_that_is_made_anew_gets_no_datagrams_through,
        an_accept_rule_of_an_older_version_is_narrowed,
        a_service_on_every_address_starts_beside_a_relay,
        without_an_accept_rule_others_are_left_alone,
    ]
}

/// The port that is dialled, and on which the host has a service of its own on every address: its SSH server,
/// say.
const PORT: u16 = 2222;

struct Guarded {
    walled: Walled,
    /// The host's own services at [`PORT`].
    own: [Service; 2],
}

impl Guarded {
    fn v4() -> Result<Guarded> {
        Guarded::behind(Walled::new()?)
    }

    fn v6() -> Result<Guarded> {
        Guarded::behind(Walled::v6()?)
    }

    fn behind(walled: Walled) -> Result<Guarded> {
        walled.must(&format!("nft '{DROPS}'"))?;
        // Neighbour discovery is none of lbridge's business.
        walled.must("nft insert rule inet filter input meta l4proto ipv6-icmp accept")?;
        let own = [
            walled.scene.service("own", &format!("0.0.0.0:{PORT}"))?,
            walled.scene.service_with(&service::Options {
                v6_only: true,
                ..service::Options::new("own six", &format!("[::]:{PORT}"))?
            })?,
        ];
        let guarded = Guarded { walled, own };
        dropped(&guarded.walled.scene.container, guarded.gateway())?;
        Ok(guarded)
    }

    fn gateway(&self) -> SocketAddr {
        self.walled.scene.gateway(PORT)
    }

    fn accepts(&self) -> Result<()> {
        ensure!(self.walled.own()?.len() == 1, "the firewall has an accept rule: {}", self.walled.ruleset()?);
        Ok(())
    }

    /// Refused at once, and nothing of the host's own noticed.
    fn refused(&self) -> Result<()> {
        client::refused(&self.walled.scene.container, self.gateway())?;
        self.nobody_came()
    }

    fn nobody_came(&self) -> Result<()> {
        let came: Vec<_> = self.own.iter().map(Service::accepted).collect();
        ensure!(came == [0, 0], "somebody reached the host's own services: {came:?}");
        Ok(())
    }
}

fn a_rule_that_waits_opens_nothing_else() -> Result<()> {
    for path in ["auto", "steer"] {
        let guarded = Guarded::v4()?;
        guarded.walled.scene.allow(&["2222=8088", "--path", path])?;
        guarded.walled.scene.must_be(PORT, "waiting")?;
        guarded.accepts()?;
        guarded.refused()?;
    }
    Ok(())
}

fn waits_for_its_relay(guarded: &Guarded) -> Result<()> {
    let scene = &guarded.walled.scene;
    scene.allow(&["2222=8088", "--path", "relay"])?;
    scene.must_be(PORT, "waiting")?;
    guarded.refused()?;
    let service = scene
        .service("relayed", if scene.container_ip.is_ipv4() { "127.0.0.1:8088" } else { "[::1]:8088" })?;
    scene.wait_for(PORT, "relayed")?;
    scene.served(PORT, "relayed")?;
    service.stop();
    scene.wait_for(PORT, "waiting")?;
    guarded.refused()
}

fn a_relay_that_waits_opens_nothing_else() -> Result<()> {
    waits_for_its_relay(&Guarded::v4()?)
}

fn a_relay_that_waits_opens_nothing_else_ipv6() -> Result<()> {
    waits_for_its_relay(&Guarded::v6()?)
}

fn a_relay_whose_daemon_was_killed_opens_nothing_else() -> Result<()> {
    let mut guarded = Guarded::v4()?;
    let scene = &mut guarded.walled.scene;
    let _service = scene.service("relayed", "127.0.0.1:8088")?;
    scene.allow(&["2222=8088", "--path", "relay"])?;
    scene.served(PORT, "relayed")?;
    scene.daemon.kill9()?;
    guarded.accepts()?;
    guarded.refused()?;
    guarded.walled.scene.daemon.restart()?;
    guarded.walled.scene.served(PORT, "relayed")?;
    guarded.nobody_came()
}

/// From one moment to the next: a service that comes back with MPTCP cannot be steered to.
fn a_rule_that_is_blocked_opens_nothing_else() -> Result<()> {
    let guarded = Guarded::v4()?;
    let scene = &guarded.walled.scene;
    let service = scene.service("plain", "127.0.0.1:8088")?;
    scene.allow(&["2222=8088", "--path", "steer"])?;
    scene.served(PORT, "plain")?;
    let watch = Hammer::start(&scene.container, guarded.gateway());
    service.stop();
    let mptcp = service::Options { mptcp: true, ..service::Options::new("mptcp", "127.0.0.1:8088")? };
    let _mptcp = scene.service_with(&mptcp)?;
    scene.wait_for(PORT, "blocked")?;
    dropped(&scene.container, guarded.gateway())?;
    watch.stop()?;
    guarded.nobody_came()
}

/// A container whose packets carry an address of another network, to which the host has a way back.
fn sources_outside_of_the_subnet_meet_the_firewall() -> Result<()> {
    let guarded = Guarded::v4()?;
    let scene = &guarded.walled.scene;
    let _service = scene.service("steered", "127.0.0.1:8088")?;
    scene.allow(&["2222=8088"])?;
    scene.served(PORT, "steered")?;
    let foreign: IpAddr = "198.51.100.7".parse()?;
    scene.container.ip("addr add 198.51.100.7/32 dev lo")?;
    scene.lab.host().ip("route add 198.51.100.7 via 10.7.0.2 dev lab0")?;
    never_served(&scene.container, Some(foreign), guarded.gateway())?;
    guarded.nobody_came()
}

fn link_local_sources_meet_the_firewall() -> Result<()> {
    let guarded = Guarded::v6()?;
    let scene = &guarded.walled.scene;
    let _service = scene.service("steered", "[::1]:8088")?;
    scene.allow(&["2222=8088"])?;
    scene.served(PORT, "steered")?;
    scene.container.ip("addr add fe80::77/64 dev eth0 nodad")?;
    let bound = scene.container.run(|| {
        let from = format!("[fe80::77%{}]:0", nix::net::if_::if_nametoindex("eth0")?);
        Ok(from.parse::<SocketAddr>()?)
    })?;
    let reached = scene.container.run(|| Ok(connect_from(bound, guarded.gateway())))?;
    ensure!(reached.is_err(), "a link-local source got through");
    guarded.nobody_came()
}

fn connect_from(from: SocketAddr, to: SocketAddr) -> Result<()> {
    use std::net::TcpStream;
    use std::os::fd::AsRawFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};

    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(AddressFamily::Inet6, SockType::Stream, flags, None)?;
    socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
    let _begun = socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(to));
    let stream = TcpStream::from(fd);
    let answered = poll(
        &mut [PollFd::new(std::os::fd::AsFd::as_fd(&stream), PollFlags::POLLOUT)],
        PollTimeout::from(1000_u16),
    )?;
    ensure!(answered > 0, "no answer");
    let error = socket::getsockopt(&stream, sockopt::SocketError)?;
    ensure!(error == 0, "error {error}");
    Ok(())
}

/// No answer has to come back for a datagram to do harm.
fn datagrams_with_forged_sources_reach_nobody() -> Result<()> {
    for (addresses, own, target, sources) in [
        (scene::V4, "0.0.0.0:5300", "127.0.0.1:5300", ["10.7.0.255", "10.7.0.1", "198.51.100.7", "10.8.0.2"]),
        (scene::V6, "[::]:5300", "[::1]:5300", ["fd07::1", "fe80::1", "fd08::2", "2001:db8::1"]),
    ] {
        let walled = Walled::at(addresses, Options::default())?;
        walled.must(&format!("nft '{DROPS}'"))?;
        walled.must("nft insert rule inet filter input meta l4proto ipv6-icmp accept")?;
        let scene = &walled.scene;
        let own = Echo::start(walled.host(), "own", own)?;
        scene.allow(&["5300/udp"])?;
        scene.must_be(5300, "steered")?;
        let service = Echo::start(walled.host(), "steered", target)?;
        patience::until("steered to its service", || {
            let reached =
                udp::served_by(&scene.container, scene.container_ip, scene.gateway(5300), "steered");
            Ok(reached.ok())
        })?;
        let (before, of_own) = (service.received(), own.received());
        for source in sources {
            let source = SocketAddr::new(source.parse()?, 4000);
            for _ in 0..3 {
                forge::datagram(&scene.container, source, scene.gateway(5300), b"forged")?;
            }
        }
        // By the other bridge, with an address of the network.
        let of_network = SocketAddr::new(scene.container_ip, 4000);
        if scene.container_ip.is_ipv4() {
            forge::datagram(&walled.elsewhere, of_network, scene.gateway(5300), b"forged")?;
        }
        // The control, which comes after them all.
        forge::datagram(&scene.container, of_network, scene.gateway(5300), b"honest")?;
        patience::until("the last one arrives", || Ok((service.received() > before).then_some(())))?;
        thread::sleep(Duration::from_millis(200));
        ensure!(
            service.received() == before + 1,
            "{} forged datagrams were served",
            service.received() - before - 1
        );
        ensure!(own.received() == of_own, "the host's own service got {}", own.received() - of_own);
    }
    Ok(())
}

/// The firewall's tool fails when the accept rule is to go, or does not even tell what is there.
fn an_accept_rule_that_stays_opens_nothing() -> Result<()> {
    for fails in ["*-f*", "*"] {
        stays_and_opens_nothing(fails)?;
    }
    Ok(())
}

fn stays_and_opens_nothing(fails: &str) -> Result<()> {
    let mut guarded = Guarded::v4()?;
    let scene = &guarded.walled.scene;
    let _service = scene.service("steered", "127.0.0.1:8088")?;
    scene.allow(&["2222=8088"])?;
    scene.served(PORT, "steered")?;
    let tool = broken_nft(fails)?;
    // Whatever it may have forgotten meanwhile: a look without a reason, and the next daemon's first.
    if fails == "*" {
        guarded.walled.scene.daemon.kill9()?;
        guarded.walled.scene.daemon.restart()?;
    }
    let scene = &guarded.walled.scene;
    let denied = scene.daemon.cli(&["deny", "bridge:lab0", "2222"])?;
    ensure!(denied.status == 1 || fails == "*", "deny says what stays: {denied:?}");
    guarded.refused()?;
    drop(tool);
    guarded.accepts()?;
    patience::until("the accept rule goes", || {
        scene.daemon.status()?;
        Ok(guarded.walled.own()?.is_empty().then_some(()))
    })?;
    dropped(&scene.container, guarded.gateway())?;
    guarded.nobody_came()
}

/// Where the accept rules cannot be removed the kernel programs stay.
fn a_cleanup_that_fails_opens_nothing() -> Result<()> {
    let mut guarded = Guarded::v4()?;
    let scene = &mut guarded.walled.scene;
    let service = scene.service("steered", "127.0.0.1:8088")?;
    scene.allow(&["2222=8088"])?;
    scene.served(PORT, "steered")?;
    scene.daemon.kill9()?;
    service.stop();
    let scene = &guarded.walled.scene;
    let (bpffs, state) = (scene.daemon.bpffs(), scene.daemon.state_dir());
    let (bpffs, state) = (bpffs.display().to_string(), state.display().to_string());
    let cleanup = || scene.daemon.cli(&["service", "cleanup", "--bpffs", &bpffs, "--state-dir", &state]);
    let tool = broken_nft("*-f*")?;
    let failed = cleanup()?;
    ensure!(failed.status == 1 && failed.stderr.contains("left to do"), "{failed:?}");
    guarded.accepts()?;
    guarded.refused()?;
    drop(tool);
    let done = cleanup()?;
    ensure!(done.status == 0, "{done:?}");
    dropped(&scene.container, guarded.gateway())?;
    guarded.nobody_came()
}

/// A shell after `su` has no sbin on its path.
fn a_cleanup_finds_its_tools() -> Result<()> {
    let mut guarded = Guarded::v4()?;
    let scene = &mut guarded.walled.scene;
    scene.allow(&["2222=8088"])?;
    scene.daemon.kill9()?;
    let mut command = scene.daemon.command()?;
    command.args(["service", "cleanup", "--bpffs"]).arg(scene.daemon.bpffs());
    command.arg("--state-dir").arg(scene.daemon.state_dir()).env("PATH", "/usr/local/bin:/usr/bin:/bin");
    let output = command.output()?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(guarded.walled.own()?.is_empty(), "{:?}", guarded.walled.own()?);
    dropped(&guarded.walled.scene.container, guarded.gateway())?;
    guarded.nobody_came()
}

/// A daemon that is killed while a tool puts an accept rule, of which nobody would know.
fn a_tool_ends_with_its_daemon() -> Result<()> {
    let mut guarded = Guarded::v4()?;
    let tool = instead_of_nft("case \"$*\" in *-f*) : > /run/nft-is-asked; sleep 2;; esac")?;
    let mut allow = guarded.walled.scene.daemon.command()?;
    let mut allow = allow.args(["allow", "bridge:lab0", "2222=8088"]).stderr(Stdio::null()).spawn()?;
    let asked = Path::new("/run/nft-is-asked");
    patience::until("nft is asked", || Ok(asked.exists().then_some(())))?;
    guarded.walled.scene.daemon.kill9()?;
    allow.wait()?;
    thread::sleep(Duration::from_secs(3));
    drop(tool);
    ensure!(guarded.walled.own()?.is_empty(), "{:?}", guarded.walled.own()?);
    guarded.nobody_came()
}

/// A host with iptables alone.
fn without_nft_a_denied_rule_leaves_nothing() -> Result<()> {
    let walled = Walled::new()?;
    walled.must("iptables-nft -A INPUT -i lo -j ACCEPT; iptables-nft -P INPUT DROP")?;
    let scene = &walled.scene;
    let _own = scene.service("own", &format!("0.0.0.0:{PORT}"))?;
    let _service = scene.service("steered", "127.0.0.1:8088")?;
    let _missing = without_nft()?;
    scene.allow(&["2222=8088"])?;
    scene.served(PORT, "steered")?;
    scene.deny(&["2222"])?;
    let removals = || scene.daemon.log().matches("accept rule removed ").count();
    ensure!(removals() == 1, "removed {} times", removals());
    // The administrator opens the port.
    walled.must("iptables-nft -I INPUT -i lab0 -p tcp --dport 2222 -j ACCEPT")?;
    client::served_by(&scene.container, scene.gateway(PORT), "own").map(drop)
}

/// The accept rule for the wider subnet stays, while the entry has the narrower one.
fn a_subnet_that_shrinks_opens_nothing_else() -> Result<()> {
    let guarded = Guarded::v4()?;
    let scene = &guarded.walled.scene;
    let _service = scene.service("steered", "127.0.0.1:8088")?;
    scene.allow(&["2222=8088"])?;
    scene.served(PORT, "steered")?;
    let outside = scene.lab.container(&scene.bridge, "10.7.0.100/24")?;
    client::served_by(&outside, guarded.gateway(), "steered")?;
    let _tool = broken_nft("*-f*")?;
    let watch = Hammer::start(&outside, guarded.gateway());
    for change in [
        "addr add 10.7.0.1/28 dev lab0",
        "addr del 10.7.0.1/24 dev lab0",
        "route replace 10.7.0.0/24 dev lab0",
    ] {
        guarded.walled.host().ip(change)?;
    }
    patience::until("the new subnet is in force", || {
        let explained = scene.daemon.cli(&["explain", "bridge:lab0", "2222"])?.stdout;
        Ok(explained.contains("from 10.7.0.0/28 to").then_some(()))
    })?;
    client::refused(&outside, guarded.gateway())?;
    watch.stop()?;
    scene.served(PORT, "steered")?;
    guarded.nobody_came()
}

fn rules_that_come_and_go_open_nothing_else() -> Result<()> {
    let guarded = Guarded::v4()?;
    let scene = &guarded.walled.scene;
    let _service = scene.service("steered", "127.0.0.1:8088")?;
    let watch = Hammer::start(&scene.container, guarded.gateway());
    for path in ["auto", "relay", "auto", "relay"] {
        scene.allow(&["2222=8088", "--path", path])?;
        scene.served(PORT, "steered")?;
        scene.deny(&["2222"])?;
    }
    watch.stop()?;
    guarded.nobody_came()
}

/// Addresses of a scene, and a service of their family.
const BOTH: [((&str, &str), &str); 2] = [(scene::V4, "127.0.0.1:8088"), (scene::V6, "[::1]:8088")];

/// Removes the scene's bridge with its container, and makes another one of the same name and addresses. The
/// accept rule names the bridge, the kernel's entry its index.
fn made_anew(scene: &Scene, (gateway, container): (&str, &str)) -> Result<NetNs> {
    scene.lab.host().ip("link del lab0")?;
    let bridge = scene.lab.add_bridge("lab0", gateway)?;
    scene.lab.container(&bridge, container)
}

fn a_bridge_that_is_made_anew_opens_nothing_else() -> Result<()> {
    for (addresses, target) in BOTH {
        let guarded = Guarded::behind(Walled::at(addresses, Options::default())?)?;
        let scene = &guarded.walled.scene;
        let _service = scene.service("steered", target)?;
        scene.allow(&["2222=8088"])?;
        scene.served(PORT, "steered")?;
        for _ in 0..3 {
            let anew = made_anew(scene, addresses)?;
            patience::until("the rule follows its bridge", || {
                Ok(client::served_by(&anew, guarded.gateway(), "steered").ok())
            })?;
            guarded.nobody_came()?;
        }
    }
    Ok(())
}

fn a_bridge_that_is_made_anew_while_no_daemon_runs_opens_nothing_else() -> Result<()> {
    for (addresses, target) in BOTH {
        let mut guarded = Guarded::behind(Walled::at(addresses, Options::default())?)?;
        let scene = &mut guarded.walled.scene;
        let _service = scene.service("steered", target)?;
        scene.allow(&["2222=8088"])?;
        scene.served(PORT, "steered")?;
        scene.daemon.kill9()?;
        let anew = made_anew(scene, addresses)?;
        patience::until("the new bridge carries packets", || {
            let tried = client::dial(&anew, None, guarded.gateway(), Duration::from_millis(200));
            Ok(tried.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused).then_some(()))
        })?;
        guarded.accepts()?;
        guarded.nobody_came()?;
        guarded.walled.scene.daemon.restart()?;
        client::served_by(&anew, guarded.gateway(), "steered")?;
        guarded.nobody_came()?;
    }
    Ok(())
}

fn a_bridge_that_is_made_anew_gets_no_datagrams_through() -> Result<()> {
    let mut walled = Walled::new()?;
    walled.must(&format!("nft '{DROPS}'"))?;
    let own = Echo::start(walled.host(), "own", "0.0.0.0:5300")?;
    let _service = Echo::start(walled.host(), "steered", "127.0.0.1:5300")?;
    let scene = &walled.scene;
    scene.allow(&["5300/udp"])?;
    let gateway = scene.gateway(5300);
    patience::until("steered to its service", || {
        Ok(udp::served_by(&scene.container, scene.container_ip, gateway, "steered").ok())
    })?;
    ensure!(walled.own()?.len() == 1, "the firewall has an accept rule: {}", walled.ruleset()?);
    let before = own.received();
    walled.scene.daemon.kill9()?;
    let anew = made_anew(&walled.scene, scene::V4)?;
    let source = walled.scene.container_ip;
    // By an answer, which only what has come through the firewall gets.
    patience::until("the new bridge carries packets", || Ok(udp::refused(&anew, gateway).ok()))?;
    ensure!(own.received() == before, "the host's own service got {}", own.received() - before);
    walled.scene.daemon.restart()?;
    patience::until("the rule follows its bridge", || {
        Ok(udp::served_by(&anew, source, gateway, "steered").ok())
    })?;
    ensure!(own.received() == before, "the host's own service got {}", own.received() - before);
    Ok(())
}

/// Connects again and again, as fast as it can.
struct Hammer {
    stop: std::sync::Arc<AtomicBool>,
    thread: thread::JoinHandle<usize>,
}

impl Hammer {
    fn start(from: &NetNs, to: SocketAddr) -> Hammer {
        let (from, stop) = (from.clone(), std::sync::Arc::new(AtomicBool::new(false)));
        let stopped = std::sync::Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut tries = 0;
            while !stopped.load(Ordering::SeqCst) {
                drop(client::dial(&from, None, to, Duration::from_millis(20)));
                tries += 1;
            }
            tries
        });
        Hammer { stop, thread }
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        let tries = self.thread.join().ok().context("the thread panicked")?;
        ensure!(tries > 20, "only {tries} tries");
        Ok(())
    }
}

fn an_accept_rule_of_an_older_version_is_narrowed() -> Result<()> {
    let guarded = Guarded::v4()?;
    let older = format!("iifname lab0 ip daddr 10.7.0.1 tcp dport {PORT} accept comment lbridge");
    guarded.walled.must(&format!("nft insert rule inet filter input {older}"))?;
    let scene = &guarded.walled.scene;
    let _service = scene.service("steered", "127.0.0.1:8088")?;
    scene.allow(&["2222=8088"])?;
    scene.served(PORT, "steered")?;
    guarded.accepts()?;
    ensure!(guarded.walled.own()?[0].contains("ip saddr 10.7.0.0/24"), "{}", guarded.walled.ruleset()?);
    guarded.nobody_came()
}

/// A web server, say, that is (re)started while a container's rule has its port.
fn a_service_on_every_address_starts_beside_a_relay() -> Result<()> {
    let walled = Walled::new()?;
    let scene = &walled.scene;
    let _relayed = scene.service("relayed", "127.0.0.1:8088")?;
    scene.allow(&["80=8088", "--path", "relay"])?;
    scene.served(80, "relayed")?;
    let own = scene.service("own", "0.0.0.0:80").context("the host's own service starts")?;
    client::served_by(walled.host(), "127.0.0.1:80".parse()?, "own")?;
    client::served_by(walled.host(), scene.gateway(80), "own")?;
    client::served_by(&walled.elsewhere, "10.8.0.1:80".parse()?, "own")?;
    client::served_by(&walled.elsewhere, scene.gateway(80), "own")?;
    let came = own.accepted();
    // The rule's containers get what the rule says, whoever started first.
    scene.served(80, "relayed")?;
    ensure!(own.accepted() == came);
    scene.deny(&["80"])?;
    scene.served(80, "own")?;
    Ok(())
}

/// lbridge does not refuse packets that would arrive without it.
fn without_an_accept_rule_others_are_left_alone() -> Result<()> {
    let walled = Walled::new()?;
    let scene = &walled.scene;
    let _own = scene.service("own", &format!("0.0.0.0:{PORT}"))?;
    let _service = scene.service("steered", "127.0.0.1:8088")?;
    scene.allow(&["2222=8088"])?;
    scene.served(PORT, "steered")?;
    let foreign: IpAddr = "198.51.100.7".parse()?;
    scene.container.ip("addr add 198.51.100.7/32 dev lo")?;
    scene.lab.host().ip("route add 198.51.100.7 via 10.7.0.2 dev lab0")?;
    for (from, source) in [(&scene.container, Some(foreign)), (&walled.elsewhere, None)] {
        match client::attempt_from(from, source, scene.gateway(PORT)) {
            Attempt::Served(greeting) if greeting.service == "own" => {}
            other => anyhow::bail!("the host's own service should answer {source:?}: {other:?}"),
        }
    }
    Ok(())
}

fn never_served(from: &NetNs, source: Option<IpAddr>, to: SocketAddr) -> Result<()> {
    match client::attempt_from(from, source, to) {
        Attempt::Served(greeting) => anyhow::bail!("served by {greeting:?}"),
        Attempt::Refused(_) | Attempt::Nothing(_) => Ok(()),
    }
}

//! Localhost inside a network namespace: for those that have no way to the host, and for nobody else.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::client::{self, Connection, Greeting};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::chown;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        localhost_in_a_namespace_without_links_is_served,
        only_the_ports_of_rules_are_open_inside,
        the_service_never_takes_who_is_inside_for_a_local_client,
        source_loopback_is_what_the_rule_asks_for,
        ipv6_service_is_reached_from_inside,
        unix_socket_is_offered_inside,
        nobody_from_outside_gets_at_localhost_inside,
        another_interface_by_the_name_of_lo_opens_nothing,
        a_port_that_is_taken_inside_is_blocked_until_it_is_free,
        a_namespace_whose_loopback_is_down_waits,
        the_hosts_own_namespace_is_refused,
        the_end_of_the_process_ends_everything_at_once,
        a_path_is_waited_for_and_followed,
        a_path_that_is_something_else_is_never_opened,
        a_path_that_somebody_else_can_turn_elsewhere_is_not_followed: [Need::WholeSystem],
        a_path_that_comes_into_other_hands_is_left,
        the_usual_folders_of_namespaces_are_followed: [Need::WholeSystem],
        a_number_that_was_given_again_is_another_process,
        a_process_that_is_not_there_is_refused,
        a_process_in_the_configuration_is_refused,
        rules_for_a_process_outlive_the_daemon,
        deny_closes_the_port_and_lets_connections_go_on,
        a_service_that_restarts_is_served_again,
    ]
}

/// A host with a daemon, a service on its 127.0.0.1:8080, and a process in a namespace without links.
struct Apart {
    lab: Lab,
    daemon: Daemon,
    netns: NetNs,
    process: Sleeper,
    /// As rules name it.
    network: String,
}

/// A process that does nothing but keep a namespace.
struct Sleeper(Child);

impl Sleeper {
    fn in_netns(netns: &NetNs) -> Result<Sleeper> {
        let mut command = netns.command("sleep");
        let child = command.arg("1000000").stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Sleeper(child.context("start sleep")?))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn end(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        drop(self.end());
    }
}

impl Apart {
    fn new() -> Result<Apart> {
        let lab = Lab::new()?;
        let daemon = Daemon::start(lab.host())?;
        let netns = NetNs::new()?;
        let process = Sleeper::in_netns(&netns)?;
        let network = format!("pid:{}", process.pid());
        Ok(Apart { lab, daemon, netns, process, network })
    }

    fn service(&self, name: &str, address: &str) -> Result<Service> {
        Service::start(self.lab.host(), name, address)
    }

    fn allow(&self, arguments: &[&str]) -> Result<()> {
        self.daemon.allow(&[&[self.network.as_str()], arguments].concat()).map(drop)
    }

    fn wait_for(&self, port: u16, state: &str) -> Result<String> {
        Ok(self.daemon.wait_for_state(&self.network, port, state)?.why.unwrap_or_default())
    }

    fn served(&self, address: &str, service: &str) -> Result<Greeting> {
        client::served_by(&self.netns, address.parse()?, service)
    }

    fn refused(&self, address: &str) -> Result<()> {
        client::refused(&self.netns, address.parse()?)
    }
}

fn localhost_in_a_namespace_without_links_is_served() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    apart.refused("127.0.0.1:8080")?;
    let output = apart.daemon.allow(&[&apart.network, "8080"])?;
    let line = format!(
        "{} 8080: 127.0.0.1:8080 -> 127.0.0.1:8080 relayed (a namespace's localhost is always relayed)",
        apart.network
    );
    ensure!(output.stdout.lines().any(|said| said == line), "{output:?}");
    // In force when the command has returned.
    apart.served("127.0.0.1:8080", "host's")?;
    apart.served("[::1]:8080", "host's")?;
    apart.daemon.deny(&[&apart.network, "8080"])?;
    apart.refused("127.0.0.1:8080")?;
    apart.refused("[::1]:8080")
}

fn only_the_ports_of_rules_are_open_inside() -> Result<()> {
    let apart = Apart::new()?;
    let _one = apart.service("one", "127.0.0.1:8080")?;
    let _other = apart.service("other", "127.0.0.1:8081")?;
    apart.allow(&["80=8080"])?;
    apart.served("127.0.0.1:80", "one")?;
    for closed in ["127.0.0.1:8080", "127.0.0.1:8081", "127.0.0.2:80", "[::1]:8081"] {
        apart.refused(closed)?;
    }
    let elsewhere = NetNs::new()?;
    client::refused(&elsewhere, "127.0.0.1:80".parse()?)
}

fn the_service_never_takes_who_is_inside_for_a_local_client() -> Result<()> {
    let apart = Apart::new()?;
    let _four = apart.service("four", "127.0.0.1:8080")?;
    let _six = apart.service("six", "[::1]:8081")?;
    apart.allow(&["8080", "8081"])?;
    for (address, service) in [("127.0.0.1:8080", "four"), ("[::1]:8080", "four"), ("127.0.0.1:8081", "six")]
    {
        let greeting = apart.served(address, service)?;
        for seen in [greeting.accept, greeting.peer] {
            let IpAddr::V4(ip) = seen.ip().to_canonical() else { bail!("{address}: {greeting:?}") };
            ensure!(
                ip.octets()[0] == 127 && ip.octets()[1] >= 128,
                "{address}: stands for somebody: {greeting:?}"
            );
        }
    }
    Ok(())
}

fn source_loopback_is_what_the_rule_asks_for() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("trusting", "127.0.0.1:8080")?;
    apart.allow(&["8080", "--source", "loopback"])?;
    let greeting = apart.served("127.0.0.1:8080", "trusting")?;
    ensure!(greeting.accept.ip().to_string() == "127.0.0.1", "{greeting:?}");
    Ok(())
}

fn ipv6_service_is_reached_from_inside() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("six", "[::1]:8080")?;
    apart.allow(&["8080"])?;
    apart.served("[::1]:8080", "six")?;
    apart.served("127.0.0.1:8080", "six").map(drop)
}

fn unix_socket_is_offered_inside() -> Result<()> {
    let apart = Apart::new()?;
    let folder = tempfile::tempdir_in("/run")?;
    let path = folder.path().join("service.sock");
    // The kernel lists Unix sockets by network namespace.
    let listener = apart.lab.host().run(|| Ok(UnixListener::bind(&path)?))?;
    let server = thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut question = [0; 5];
        stream.read_exact(&mut question)?;
        stream.write_all(&question)?;
        Ok(())
    });
    apart.allow(&[&format!("5432=unix:{}", path.display()), "--source", "loopback"])?;
    let mut stream = client::dial(&apart.netns, None, "127.0.0.1:5432".parse()?, patience::seconds(5))?;
    stream.write_all(b"hello")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer == "hello", "{answer:?}");
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))?
}

/// With `route_localnet` a namespace takes packets for 127.0.0.1 from its links. Whoever is inside may open
/// its own doors so, but not ours.
fn nobody_from_outside_gets_at_localhost_inside() -> Result<()> {
    let lab = Lab::new()?;
    let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
    let (victim, attacker) = (lab.container(&bridge, "10.7.0.2/24")?, lab.container(&bridge, "10.7.0.3/24")?);
    let process = Sleeper::in_netns(&victim)?;
    let daemon = Daemon::start(lab.host())?;
    let _service = Service::start(lab.host(), "host's", "127.0.0.1:8080")?;
    daemon.allow(&[&format!("pid:{}", process.pid()), "8080"])?;
    client::served_by(&victim, "127.0.0.1:8080".parse()?, "host's")?;

    for netns in [&victim, &attacker] {
        for interface in ["all", "eth0"] {
            netns.sysctl(&format!("net/ipv4/conf/{interface}/route_localnet"), "1")?;
            netns.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "0")?;
        }
    }
    attacker.ip("route del local 127.0.0.0/8 dev lo table local")?;
    attacker.ip("addr del 127.0.0.1/8 dev lo")?;
    attacker.ip("route add 127.0.0.1/32 via 10.7.0.2 dev eth0")?;
    let from = Some("10.7.0.3".parse()?);
    // The attack as such works: against a socket that is not bound to lo.
    let _careless = Service::start(&victim, "careless", "127.0.0.1:9090")?;
    match client::attempt_from(&attacker, from, "127.0.0.1:9090".parse()?) {
        client::Attempt::Served(greeting) => ensure!(greeting.service == "careless", "{greeting:?}"),
        other => bail!("the attack itself fails: {other:?}"),
    }
    client::not_served(&attacker, from, "127.0.0.1:8080".parse()?)?;
    for address in ["10.7.0.2:8080", "10.7.0.1:8080"] {
        client::not_served(&attacker, None, address.parse()?)?;
    }
    Ok(())
}

/// Names of interfaces are the choice of whoever is inside.
fn another_interface_by_the_name_of_lo_opens_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
    let (inside, outside) = (lab.container(&bridge, "10.7.0.2/24")?, lab.container(&bridge, "10.7.0.3/24")?);
    let process = Sleeper::in_netns(&inside)?;
    let daemon = Daemon::start(lab.host())?;
    let _service = Service::start(lab.host(), "host's", "127.0.0.1:8080")?;
    for command in [
        "link set lo down",
        "link set lo name true-lo",
        "link set true-lo up",
        "link set eth0 down",
        "link set eth0 name lo",
        "link set lo up",
    ] {
        inside.ip(command)?;
    }
    for (netns, is_inside) in [(&inside, true), (&outside, false)] {
        let name = if is_inside { "lo" } else { "eth0" };
        for interface in ["all", name] {
            netns.sysctl(&format!("net/ipv4/conf/{interface}/route_localnet"), "1")?;
            netns.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "0")?;
        }
    }
    outside.ip("route del local 127.0.0.0/8 dev lo table local")?;
    outside.ip("addr del 127.0.0.1/8 dev lo")?;
    outside.ip("route add 127.0.0.1/32 via 10.7.0.2 dev eth0")?;
    daemon.allow(&[&format!("pid:{}", process.pid()), "8080"])?;
    client::served_by(&inside, "127.0.0.1:8080".parse()?, "host's")?;
    let from = Some("10.7.0.3".parse()?);
    let _careless = Service::start(&inside, "careless", "127.0.0.1:9090")?;
    match client::attempt_from(&outside, from, "127.0.0.1:9090".parse()?) {
        client::Attempt::Served(greeting) => ensure!(greeting.service == "careless", "{greeting:?}"),
        other => bail!("the attack itself fails: {other:?}"),
    }
    client::not_served(&outside, from, "127.0.0.1:8080".parse()?)
}

fn a_port_that_is_taken_inside_is_blocked_until_it_is_free() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    let inside = Service::start(&apart.netns, "inside", "0.0.0.0:8080")?;
    apart.allow(&["8080"])?;
    let why = apart.wait_for(8080, "blocked")?;
    ensure!(why.starts_with("in use by ") && why.contains("(process "), "names who: {why}");
    apart.served("127.0.0.1:8080", "inside")?;
    inside.stop();
    apart.wait_for(8080, "relayed")?;
    apart.served("127.0.0.1:8080", "host's").map(drop)
}

fn a_namespace_whose_loopback_is_down_waits() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    apart.netns.ip("link set lo down")?;
    apart.allow(&["8080"])?;
    let why = apart.wait_for(8080, "waiting")?;
    ensure!(why.contains("loopback interface is down"), "{why}");
    apart.netns.ip("link set lo up")?;
    apart.wait_for(8080, "relayed")?;
    apart.served("127.0.0.1:8080", "host's").map(drop)
}

/// A container with `--network host`, for one: a relay there would only be in the way of the service.
fn the_hosts_own_namespace_is_refused() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    let beside = Sleeper::in_netns(apart.lab.host())?;
    let network = format!("pid:{}", beside.pid());
    apart.daemon.allow(&[&network, "8081=8080"])?;
    let state = apart.daemon.rule_state(&network, 8081)?;
    ensure!(state.state == "blocked", "{state:?}");
    state.must_be_because("unsuitable_namespace")?;
    client::refused(apart.lab.host(), "127.0.0.1:8081".parse()?)
}

/// The host's end of a link into the namespace goes when the namespace does, and not before.
fn the_end_of_the_process_ends_everything_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
    let netns = lab.container(&bridge, "10.7.0.2/24")?;
    let mut process = Sleeper::in_netns(&netns)?;
    let daemon = Daemon::start(lab.host())?;
    let _service = Service::start(lab.host(), "host's", "127.0.0.1:8080")?;
    let network = format!("pid:{}", process.pid());
    daemon.allow(&[&network, "8080"])?;
    let denied = client::connect(&netns, "127.0.0.1:8080".parse()?)?;
    daemon.deny(&[&network, "8080"])?;
    daemon.allow(&[&network, "8080"])?;
    let open = client::connect(&netns, "127.0.0.1:8080".parse()?)?;
    let links = || lab.host().ip_output("-o link show type veth");
    ensure!(links()?.contains("veth0"), "a link leads inside");

    process.end()?;
    open.must_be_over()?;
    denied.must_be_over()?;
    drop(netns);
    patience::until("the namespace is gone, and its link with it", || {
        Ok((!links()?.contains("veth0")).then_some(()))
    })?;
    let state = daemon.wait_for_state(&network, 8080, "blocked")?;
    state.must_be_because("unsuitable_namespace")?;
    Ok(())
}

/// A file that a namespace is mounted on, as `ip netns` makes them.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: &Path, process: &Sleeper) -> Result<Mounted> {
        File::create(path)?;
        let source = PathBuf::from(format!("/proc/{}/ns/net", process.pid()));
        mount(Some(&source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(Mounted(path.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        drop(fs::remove_file(&self.0));
    }
}

fn a_path_is_waited_for_and_followed() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    let folder = tempfile::tempdir_in("/run")?;
    let path = folder.path().join("a sandbox");
    let network = format!("netns:{}", path.display());
    let output = apart.daemon.allow(&[&network, "8080"])?;
    ensure!(output.stdout.contains("waiting (there is no "), "{output:?}");

    let mounted = Mounted::new(&path, &apart.process)?;
    apart.daemon.wait_for_state(&network, 8080, "relayed")?;
    let open = client::connect(&apart.netns, "127.0.0.1:8080".parse()?)?;

    // Another namespace under the same name.
    let other = NetNs::new()?;
    let process = Sleeper::in_netns(&other)?;
    drop(mounted);
    open.must_be_over()?;
    let mounted = Mounted::new(&path, &process)?;
    patience::until("the other namespace is served", || {
        Ok(client::served_by(&other, "127.0.0.1:8080".parse()?, "host's").ok())
    })?;
    apart.refused("127.0.0.1:8080")?;
    drop(mounted);
    apart.daemon.wait_for_state(&network, 8080, "waiting")?;
    client::refused(&other, "127.0.0.1:8080".parse()?)
}

/// A FIFO would make whoever opens it wait for ever.
fn a_path_that_is_something_else_is_never_opened() -> Result<()> {
    let apart = Apart::new()?;
    let folder = tempfile::tempdir_in("/run")?;
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    // What is in /proc follows numbers, which are given again.
    let numbered = PathBuf::from(format!("/proc/{}/ns/net", apart.process.pid()));
    for path in [fifo, numbered, PathBuf::from("/proc/self/ns/mnt"), PathBuf::from("/proc/1/cmdline")] {
        let network = format!("netns:{}", path.display());
        apart.daemon.allow(&[&network, "8080"])?;
        let state = apart.daemon.rule_state(&network, 8080)?;
        ensure!(["waiting", "blocked"].contains(&state.state.as_str()), "{network}: {state:?}");
        let why = state.why.unwrap_or_default();
        ensure!(why.contains("namespace") || why.contains("pid:N"), "{network}: says why: {why}");
    }
    apart.refused("127.0.0.1:8080")
}

/// A user who owns no service, no namespace and no privilege.
const SOMEBODY: u32 = 54_321;

/// A command of somebody's.
fn as_somebody(program: &str, arguments: &[&Path]) -> Result<()> {
    let mut command = Command::new(program);
    let status = command.args(arguments).uid(SOMEBODY).gid(SOMEBODY).status();
    let status = status.with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// The rule is blocked, and says why, and what to do about it.
fn is_left_alone(daemon: &Daemon, network: &str, words: &str) -> Result<()> {
    let state = daemon.rule_state(network, 8080)?;
    let why = state.why.clone().unwrap_or_default();
    ensure!(state.state == "blocked" && why.contains(words), "{words}: {state:?}");
    ensure!(why.contains("netns:/run/netns/NAME") && why.contains("pid:N"), "says what to do: {why}");
    Ok(())
}

/// Whoever owns a folder on the way would have root open ports in namespaces of others.
fn a_path_that_somebody_else_can_turn_elsewhere_is_not_followed() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    let folder = tempfile::tempdir_in("/run")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let at = |name: &str| folder.path().join(name);
    let _mounted = Mounted::new(&at("namespace"), &apart.process)?;
    let home = at("home");
    fs::create_dir(&home)?;
    chown(&home, Some(SOMEBODY.into()), Some(SOMEBODY.into()))?;
    let network = |path: &Path| format!("netns:{}", path.display());

    // A link of theirs, in a folder of theirs, where there was nothing when the rule was made.
    let link = home.join("link");
    apart.daemon.allow(&[&network(&link), "8080"])?;
    is_left_alone(&apart.daemon, &network(&link), &format!("{} belongs to user {SOMEBODY}", home.display()))?;
    as_somebody("ln", &[Path::new("-s"), &at("namespace"), &link])?;
    is_left_alone(&apart.daemon, &network(&link), "is not followed")?;
    apart.refused("127.0.0.1:8080")?;

    // A link of theirs in a folder that many may write to.
    let shared = at("shared");
    fs::create_dir(&shared)?;
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777))?;
    let theirs = shared.join("theirs");
    as_somebody("ln", &[Path::new("-s"), &at("namespace"), &theirs])?;
    apart.daemon.allow(&[&network(&theirs), "8080"])?;
    is_left_alone(
        &apart.daemon,
        &network(&theirs),
        &format!("theirs is a symbolic link of user {SOMEBODY}"),
    )?;

    // No link, but a folder that they can have another take the place of.
    fs::create_dir(home.join("inner"))?;
    let inner = home.join("inner/namespace");
    let _inner = Mounted::new(&inner, &apart.process)?;
    apart.daemon.allow(&[&network(&inner), "8080"])?;
    is_left_alone(&apart.daemon, &network(&inner), "belongs to user")?;
    let open = at("open");
    fs::create_dir(&open)?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777))?;
    let _open = Mounted::new(&open.join("namespace"), &apart.process)?;
    apart.daemon.allow(&[&network(&open.join("namespace")), "8080"])?;
    is_left_alone(&apart.daemon, &network(&open.join("namespace")), "users other than root may write to")?;
    apart.refused("127.0.0.1:8080")?;

    // Explained as well, and not even looked at.
    let explained = apart.daemon.cli(&["explain", &network(&link), "8080"])?;
    ensure!(explained.stdout.contains("belongs to user"), "{explained:?}");
    // Of a link of root's nobody but root decides where it leads; a sticky folder keeps it.
    let own = shared.join("own");
    std::os::unix::fs::symlink(at("namespace"), &own)?;
    apart.daemon.allow(&[&network(&own), "8080"])?;
    apart.daemon.wait_for_state(&network(&own), 8080, "relayed")?;
    apart.served("127.0.0.1:8080", "host's").map(drop)
}

/// A relay that is open ends when its path is somebody else's to change.
fn a_path_that_comes_into_other_hands_is_left() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    let folder = tempfile::tempdir_in("/run")?;
    let path = folder.path().join("namespace");
    let _mounted = Mounted::new(&path, &apart.process)?;
    let network = format!("netns:{}", path.display());
    apart.daemon.allow(&[&network, "8080"])?;
    let open = client::connect(&apart.netns, "127.0.0.1:8080".parse()?)?;
    chown(folder.path(), Some(SOMEBODY.into()), None)?;
    open.must_be_over()?;
    apart.daemon.wait_for_state(&network, 8080, "blocked")?;
    is_left_alone(&apart.daemon, &network, "belongs to user")?;
    apart.refused("127.0.0.1:8080")?;
    chown(folder.path(), Some(0.into()), None)?;
    apart.daemon.wait_for_state(&network, 8080, "relayed")?;
    apart.served("127.0.0.1:8080", "host's").map(drop)
}

/// Where `ip netns` and Docker keep them, and what distributions call that otherwise.
fn the_usual_folders_of_namespaces_are_followed() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    for folder in ["/run/netns", "/run/docker/netns"] {
        fs::create_dir_all(folder)?;
    }
    ensure!(Path::new("/var/run").is_symlink(), "/var/run is no link here");
    for (made, named) in [
        ("/run/netns/apart", "/run/netns/apart"),
        ("/run/netns/apart", "/var/run/netns/apart"),
        ("/run/docker/netns/apart", "/run/docker/netns/apart"),
        ("/run/docker/netns/apart", "/var/run/docker/netns/apart"),
    ] {
        let _mounted = Mounted::new(Path::new(made), &apart.process)?;
        let network = format!("netns:{named}");
        let output = apart.daemon.allow(&[&network, "8080"])?;
        ensure!(output.stdout.contains(" relayed "), "{output:?}");
        apart.served("127.0.0.1:8080", "host's")?;
        apart.daemon.deny(&[&network, "8080"])?;
        apart.refused("127.0.0.1:8080")?;
    }
    Ok(())
}

fn a_number_that_was_given_again_is_another_process() -> Result<()> {
    let mut apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    apart.allow(&["8080"])?;
    let pid = apart.process.pid();
    apart.process.end()?;
    let stranger_netns = NetNs::new()?;
    // The next number is the one after the last: of this pid namespace, which is the sandbox'.
    let stranger = patience::until("the number is given again", || {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string())
            .context("set the last process number")?;
        let sleeper = Sleeper::in_netns(&stranger_netns)?;
        Ok((sleeper.pid() == pid).then_some(sleeper))
    })?;
    let why = apart.wait_for(8080, "blocked")?;
    ensure!(why.contains("has ended"), "{why}");
    client::refused(&stranger_netns, "127.0.0.1:8080".parse()?)?;
    // Asked for again it is meant.
    apart.allow(&["8080", "--source", "loopback"])?;
    client::served_by(&stranger_netns, "127.0.0.1:8080".parse()?, "host's")?;
    drop(stranger);
    Ok(())
}

fn a_process_that_is_not_there_is_refused() -> Result<()> {
    let apart = Apart::new()?;
    let output = apart.daemon.cli(&["allow", "pid:2147483647", "8080"])?;
    ensure!(output.status == 1 && output.stderr.contains("no process 2147483647"), "{output:?}");
    ensure!(apart.daemon.rule("pid:2147483647", 8080)?.is_none(), "nothing is kept");
    Ok(())
}

fn a_process_in_the_configuration_is_refused() -> Result<()> {
    let lab = Lab::new()?;
    let config = "[[rule]]\nnetwork = \"pid:1\"\nport = \"8080\"\n".to_owned();
    let output = Daemon::prepare(lab.host(), Options { config, ..Options::default() })?.start_refused()?;
    ensure!(output.status == 1 && output.stderr.contains("container:NAME"), "{output:?}");
    Ok(())
}

fn rules_for_a_process_outlive_the_daemon() -> Result<()> {
    let mut apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    apart.allow(&["8080"])?;
    apart.daemon.kill9()?;
    apart.refused("127.0.0.1:8080")?;
    apart.daemon.restart()?;
    apart.served("127.0.0.1:8080", "host's").map(drop)
}

fn deny_closes_the_port_and_lets_connections_go_on() -> Result<()> {
    let apart = Apart::new()?;
    let _service = apart.service("host's", "127.0.0.1:8080")?;
    apart.allow(&["8080"])?;
    let mut open: Connection = client::connect(&apart.netns, "127.0.0.1:8080".parse()?)?;
    apart.daemon.deny(&[&apart.network, "8080"])?;
    apart.refused("127.0.0.1:8080")?;
    open.echo(b"still here")
}

fn a_service_that_restarts_is_served_again() -> Result<()> {
    let apart = Apart::new()?;
    let first = apart.service("first", "127.0.0.1:8080")?;
    apart.allow(&["8080"])?;
    apart.served("127.0.0.1:8080", "first")?;
    first.stop();
    apart.wait_for(8080, "waiting")?;
    apart.refused("127.0.0.1:8080")?;
    let _second = apart.service("second", "127.0.0.1:8080")?;
    apart.wait_for(8080, "relayed")?;
    apart.served("127.0.0.1:8080", "second").map(drop)
}

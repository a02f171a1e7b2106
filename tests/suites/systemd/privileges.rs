//! Tests of what the unit lets the daemon do, and that it needs it all: each thing is done, and with one
//! capability less, not.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{kernel, patience};
use lbridge_tests::tests;

use crate::{PACKAGED, Scene, UNIT, Unit};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        the_unit_is_rated_as_tight,
        everything_works_and_needs_every_capability:
            [Need::Program("socat"), Need::Program("iptables-legacy")],
        firewalls_are_got_through:
            [Need::Program("iptables-nft"), Need::Program("iptables-legacy"), Need::Program("nft")],
        relays_splice,
        firewall_commands_work:
            [Need::Program("iptables-nft"), Need::Program("iptables-legacy"), Need::Program("nft")],
        every_thread_has_given_up_what_it_does_not_need,
        localhost_leads_to_the_host: [Need::Program("socat")],
        the_group_may_use_the_socket: [Need::Program("setpriv")],
        sockets_in_homes_and_tmp_are_reached_but_nothing_is_written: [Need::Program("socat")],
    ]
}

/// Those of the unit, by name.
fn capabilities() -> Result<Vec<&'static str>> {
    let line = PACKAGED.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    Ok(line.context("the unit bounds capabilities")?.split(' ').collect())
}

fn the_unit_is_rated_as_tight() -> Result<()> {
    let scene = Scene::new()?;
    let output = scene.systemd.run("systemd-analyze", &["security", "--no-pager", "--threshold=30", UNIT])?;
    ensure!(output.status == 0, "{}", output.stdout);
    Ok(())
}

/// A service of another user, seen from inside, that says its name.
fn serve(scene: &Scene, name: &str, listen: &str) -> Result<()> {
    let text =
        format!("[Service]\nUser=nobody\nUMask=0077\nExecStart=socat {listen},fork SYSTEM:'echo {name}'\n");
    let unit = format!("{name}.service");
    scene.systemd.install_unit(&unit, &text)?;
    scene.systemd.must(&["start", &unit]).map(drop)
}

fn says(netns: &NetNs, to: SocketAddr, name: &str) -> Result<()> {
    let stream =
        client::dial(netns, None, to, patience::seconds(5)).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(patience::seconds(5)))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    ensure!(line.trim() == name, "{to} says {line:?}, not {name}");
    Ok(())
}

/// `lbridge allow …`, and what must come of it at once.
fn becomes(scene: &Scene, arguments: &[&str], state: &str) -> Result<()> {
    let output = scene.lbridge(&[&["allow"], arguments].concat())?;
    ensure!(output.stdout.contains(state), "{arguments:?} should be {state}: {output:?}");
    Ok(())
}

/// A unit with the settings of lbridge's that runs a command once.
fn once(scene: &Scene, name: &str, command: &str) -> Result<()> {
    let drop_in = format!(
        "[Service]\nType=oneshot\nExecStartPost=\nExecStart=\nExecStart={command}\nRestart=no\n\
         WatchdogSec=0\n\
         RuntimeDirectory=\nFileDescriptorStoreMax=0\n"
    );
    scene.drop_in(name, "once.conf", &drop_in)?;
    scene.systemd.install_unit(name, PACKAGED)
}

fn everything_works_and_needs_every_capability() -> Result<()> {
    let scene = Scene::prepare(Unit::default(), "")?;
    serve(&scene, "tcp", "TCP-LISTEN:8080,bind=127.0.0.1,reuseaddr")?;
    serve(&scene, "unix", "UNIX-LISTEN:/tmp/other.sock,unlink-early")?;
    patience::until("services listen", || {
        let listens = scene.lab.host().listens("127.0.0.1:8080".parse()?)?;
        Ok((listens && scene.systemd.path("/tmp/other.sock").exists()).then_some(()))
    })?;
    for arguments in [["netns", "add", "apart"].as_slice(), &["-netns", "apart", "link", "set", "lo", "up"]] {
        let output = scene.systemd.run("ip", arguments)?;
        ensure!(output.status == 0, "{output:?}");
    }
    once(&scene, "firewall.service", "iptables-legacy -w -S INPUT")?;

    let all = capabilities()?;
    let with = |capabilities: &[&str]| -> Result<()> {
        let bound = format!(
            "[Service]\nRestart=no\nCapabilityBoundingSet=\nCapabilityBoundingSet={}\n",
            capabilities.join(" ")
        );
        for unit in [UNIT, "firewall.service"] {
            scene.drop_in(unit, "capabilities.conf", &bound)?;
        }
        scene.systemd.must(&["daemon-reload"])?;
        everything(&scene)
    };
    with(&all).context("with all of them")?;
    for without in &all {
        let others: Vec<_> = all.iter().copied().filter(|name| name != without).collect();
        let error = with(&others).err().with_context(|| format!("{without} is not needed"))?;
        eprintln!("[test] without {without}: {error:#}");
    }
    with(&all).context("with all of them again")
}

/// From the start on, nothing of it done before.
fn everything(scene: &Scene) -> Result<()> {
    scene.systemd.must(&["stop", UNIT])?;
    scene.systemd.shell("rm -rf /sys/fs/bpf/lbridge /var/lib/lbridge/rules.toml /run/xtables.lock")?;
    scene.systemd.must(&["start", UNIT])?;
    becomes(scene, &["bridge:lab0", "8080", "--path", "steer"], "steered")?;
    says(&scene.container, scene.gateway(8080), "tcp")?;
    becomes(scene, &["bridge:lab0", "80=8080", "--path", "relay"], "relayed")?;
    says(&scene.container, scene.gateway(80), "tcp")?;
    becomes(scene, &["netns:/run/netns/apart", "80=8080"], "relayed")?;
    let apart = NetNs::at(&scene.systemd.path("/run/netns/apart"))?;
    says(&apart, "127.0.0.1:80".parse()?, "tcp")?;
    becomes(scene, &["bridge:lab0", "81=unix:/tmp/other.sock", "--source", "loopback"], "relayed")?;
    says(&scene.container, scene.gateway(81), "unix")?;
    scene.systemd.must(&["start", "firewall.service"]).map(drop)
}

/// The unit lets the daemon into the namespaces that runtimes keep as files, made after it was started, and
/// lets it hurry.
fn localhost_leads_to_the_host() -> Result<()> {
    if kernel::version() < (5, 14) {
        return Ok(());
    }
    let scene = Scene::prepare(Unit::default(), "")?;
    serve(&scene, "tcp", "TCP-LISTEN:8080,bind=127.0.0.1,reuseaddr")?;
    scene.systemd.must(&["start", UNIT])?;
    becomes(&scene, &["bridge:lab0", "8080", "--localhost"], "127.0.0.1:8080 in ")?;
    scene.systemd.shell(
        "ip netns add guest && ip link add guest0 type veth peer name eth0 netns guest \
         && ip link set guest0 up master lab0 && ip -n guest addr add 10.7.0.9/24 dev eth0 \
         && ip -n guest link set lo up && ip -n guest link set eth0 up",
    )?;
    let ask = "ip netns exec guest socat -u TCP:127.0.0.1:8080 - 2>&1 || true";
    patience::until("the guest is served", || Ok((scene.systemd.shell(ask)?.trim() == "tcp").then_some(())))?;
    let nice = "for task in /proc/$(systemctl show -P MainPID lbridge)/task/*; do \
                [ $(cat $task/comm) = guests ] && cut -d ' ' -f 19 $task/stat; done; true";
    let nice = scene.systemd.shell(nice)?;
    ensure!(nice.trim() == "-10", "the thread's nice value is {nice:?}");
    Ok(())
}

/// By the daemon itself: it reads what the tools print, and tries what arrives.
fn firewalls_are_got_through() -> Result<()> {
    for drops in [
        "nft 'add table inet f; add chain inet f in { type filter hook input priority 0; policy drop; }'",
        "iptables-nft -P INPUT DROP",
        "iptables-legacy -P INPUT DROP",
    ] {
        let scene = Scene::with("")?;
        let output = scene.systemd.run("sh", &["-c", drops])?;
        ensure!(output.status == 0, "{drops}: {output:?}");
        scene.lbridge(&["allow", "bridge:lab0", "8080"])?;
        let _service = scene.service("walled", "127.0.0.1:8080")?;
        scene.served(8080, "walled").with_context(|| drops.to_owned())?;
        let status = scene.lbridge(&["status"])?.stdout;
        ensure!(status.contains("1 accept rule of lbridge's") && !status.contains("could not"), "{status}");
    }
    Ok(())
}

/// Without pipes every byte would be copied.
fn relays_splice() -> Result<()> {
    let scene = Scene::with("")?;
    let _service = scene.service("relayed", "127.0.0.1:8080")?;
    scene.relay_8080()?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    let bulk = vec![7; 1 << 20];
    for _ in 0..4 {
        open.echo(&bulk)?;
    }
    let command = format!("ls -l /proc/{}/fd", scene.main_pid()?);
    let files = scene.systemd.run("sh", &["-c", &command])?.stdout;
    ensure!(files.contains("pipe:["), "{files}");
    Ok(())
}

fn firewall_commands_work() -> Result<()> {
    let scene = Scene::prepare(Unit::default(), "")?;
    for command in [
        "nft list ruleset",
        "nft add table inet lbridge",
        "iptables-nft -w -I INPUT -i lab0 -j ACCEPT",
        "iptables-legacy -w -I INPUT -i lab0 -j ACCEPT",
        "ip6tables-legacy -w -I INPUT -i lab0 -j ACCEPT",
        "iptables-legacy-save",
    ] {
        once(&scene, "firewall.service", command)?;
        let started = scene.systemd.must(&["start", "firewall.service"]);
        started.with_context(|| scene.systemd.journal("firewall.service").unwrap_or_default())?;
    }
    let tables = scene.systemd.run("nft", &["list", "tables"])?;
    ensure!(tables.stdout.contains("inet lbridge"), "it is the host's: {tables:?}");
    let lock = fs::metadata(scene.systemd.path("/run/xtables.lock"))?;
    ensure!(lock.permissions().mode() & 0o777 == 0o600, "whoever may read it could hold it");
    Ok(())
}

fn every_thread_has_given_up_what_it_does_not_need() -> Result<()> {
    let scene = Scene::new()?;
    let threads = fs::read_dir(scene.systemd.path(format!("/proc/{}/task", scene.main_pid()?)))?;
    let mut count = 0;
    for thread in threads {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let set = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
            Ok(u64::from_str_radix(line.context("a line of capabilities")?, 16)?)
        };
        ensure!(
            set("CapEff")? == set("CapBnd")? && set("CapPrm")? == set("CapBnd")?,
            "all that is left: {status}"
        );
        ensure!(set("CapInh")? == 0 && set("CapAmb")? == 0, "{status}");
        ensure!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
        ensure!(set("CapBnd")?.count_ones() as usize == capabilities()?.len(), "{status}");
        count += 1;
    }
    ensure!(count > 2, "the API's thread, and relays'");
    Ok(())
}

fn the_group_may_use_the_socket() -> Result<()> {
    let scene = Scene::prepare(Unit::default(), "")?;
    let groups = scene.systemd.path("/etc/group");
    let text = fs::read_to_string(&groups)?;
    fs::write(&groups, format!("{text}lbridge:x:54321:\n"))?;
    scene.systemd.must(&["start", UNIT])?;
    let status = |group: &str| {
        let user = ["--reuid=65534", "--clear-groups", group, "lbridge", "status"];
        scene.systemd.run("setpriv", &user).map(|output| output.status)
    };
    ensure!(status("--regid=54321")? == 0, "a member");
    ensure!(status("--regid=65534")? == 1, "nobody");
    Ok(())
}

fn sockets_in_homes_and_tmp_are_reached_but_nothing_is_written() -> Result<()> {
    let scene = Scene::new()?;
    for (port, folder) in [("81", "/home/somebody"), ("82", "/tmp"), ("83", "/run/user/54321")] {
        let (name, socket) = (format!("s{port}"), format!("{folder}/app.sock"));
        let outside = scene.systemd.path(folder);
        fs::create_dir_all(&outside)?;
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o777))?;
        serve(&scene, &name, &format!("UNIX-LISTEN:{socket}"))?;
        patience::until("it listens", || Ok(outside.join("app.sock").exists().then_some(())))?;
        becomes(
            &scene,
            &["bridge:lab0", &format!("{port}=unix:{socket}"), "--source", "loopback"],
            "relayed",
        )?;
        says(&scene.container, scene.gateway(port.parse()?), &name)?;
    }
    for folder in ["/home", "/root", "/run/user", "/tmp", "/etc/lbridge", "/usr", "/run", "/sys/fs/bpf"] {
        once(&scene, "write.service", &format!("mkdir {folder}/written"))?;
        ensure!(scene.systemd.systemctl(&["start", "write.service"])?.status != 0, "{folder} can be written");
        ensure!(!Path::new(&scene.systemd.path(folder)).join("written").exists(), "{folder}");
    }
    Ok(())
}

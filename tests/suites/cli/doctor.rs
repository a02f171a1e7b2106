//! `lbridge doctor`: a healthy host is told so, whatever is wrong is found, and nothing is left behind.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{Daemon, Options, Output, binary};
use lbridge_tests::harness::doctor::{self, Report};
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::{self, Service};
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::{patience, pins, programs, sandbox};
use lbridge_tests::tests;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_healthy_host_is_told_so,
        no_daemon_is_a_problem,
        rules_that_do_not_serve_are_told,
        an_mptcp_service_is_told: [Need::Mptcp],
        a_service_on_every_address_is_told,
        whose_a_service_is_is_told,
        route_localnet_is_told,
        a_running_socat_is_told: [Need::Program("socat")],
        ufw_in_the_way_is_told,
        ufw_rules_of_older_recipes_are_told,
        no_bpffs_is_a_problem,
        no_cgroup2_is_a_problem,
        pins_that_are_gone_are_told,
        a_hook_that_is_taken_is_a_problem,
        few_descriptors_are_told,
        a_daemon_of_another_version_is_told,
        without_root_it_says_what_it_could_not_check: [Need::Program("setpriv")],
        it_leaves_nothing_behind,
        names_cannot_act_on_the_terminal,
    ]
}

fn served() -> Result<(Scene, Service)> {
    let scene = Scene::new()?;
    let service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    Ok((scene, service))
}

fn a_healthy_host_is_told_so() -> Result<()> {
    let (scene, _service) = served()?;
    let report = Report::of(&scene.daemon)?;
    ensure!(report.status == 0 && report.complaints().is_empty(), "{report:?}");
    for check in ["cgroup2", "bpffs", "steering", "daemon", "rules", "firewall"] {
        report.must(check, "ok")?;
    }
    for check in ["mptcp", "exposed", "socat", "route_localnet", "ufw", "pins", "descriptors"] {
        report.must_not(check)?;
    }
    let text = people(&scene.daemon)?;
    ensure!(text.status == 0 && text.stdout.contains("Nothing is wrong."), "{text:?}");
    ensure!(text.stderr.is_empty(), "{text:?}");
    Ok(())
}

/// Runs the doctor as people do, without `--json`.
fn people(daemon: &Daemon) -> Result<Output> {
    let paths = doctor::paths(daemon);
    daemon.cli(&["doctor"].into_iter().chain(paths.iter().map(String::as_str)).collect::<Vec<_>>())
}

fn no_daemon_is_a_problem() -> Result<()> {
    let lab = Lab::new()?;
    let mut daemon = Daemon::prepare(lab.host(), Options::default())?;
    let finding = Report::of(&daemon)?.must("daemon", "problem")?;
    ensure!(finding.text.contains("No rule is in force") && !finding.remedy.is_empty(), "{finding:?}");
    ensure!(!daemon.state_dir().exists(), "made by the doctor");

    daemon.restart()?;
    daemon.allow(&["bridge:lab0", "8080"])?;
    daemon.kill9()?;
    let _service = Service::start(lab.host(), "service", "0.0.0.0:8080")?;
    let report = Report::of(&daemon)?;
    ensure!(report.must("daemon", "problem")?.text.contains("Steered rules stay in force"), "{report:?}");
    // The rules are known from their files.
    report.must("exposed", "warning")?;
    let text = people(&daemon)?;
    ensure!(text.status == 1 && text.stdout.starts_with("PROBLEM"), "problems first: {text:?}");

    fs::write(daemon.rules_file(), "version = 1\ngarbage")?;
    let finding = Report::of(&daemon)?.must("rules", "problem")?;
    ensure!(finding.text.contains("rules.toml:2"), "{finding:?}");
    Ok(())
}

fn rules_that_do_not_serve_are_told() -> Result<()> {
    let (scene, service) = served()?;
    scene.daemon.allow(&["bridge:lo", "81"])?;
    let report = Report::of(&scene.daemon)?;
    let blocked = report.must("rules", "problem")?;
    ensure!(blocked.text.contains("bridge:lo 81") && blocked.text.contains("not a bridge"), "{blocked:?}");

    scene.daemon.deny(&["bridge:lo", "81"])?;
    service.stop();
    scene.wait_for(8080, "waiting")?;
    let waiting = Report::of(&scene.daemon)?.must("rules", "warning")?;
    ensure!(waiting.text.contains("nothing listens on 127.0.0.1:8080"), "{waiting:?}");
    Ok(())
}

fn an_mptcp_service_is_told() -> Result<()> {
    let scene = Scene::new()?;
    let options =
        service::Options { mptcp: true, ..service::Options::new("like Ollama", "127.0.0.1:11434")? };
    let _service = scene.service_with(&options)?;
    let _other = scene.service("plain", "127.0.0.1:8080")?;
    scene.allow(&["11434", "8080"])?;
    let report = Report::of(&scene.daemon)?;
    let finding = report.must("mptcp", "note")?;
    ensure!(
        finding.text.contains("127.0.0.1:11434") && finding.text.contains("bridge:lab0 11434"),
        "{finding:?}"
    );
    ensure!(finding.remedy.iter().any(|line| line.contains("GODEBUG=multipathtcp=0")), "{finding:?}");

    // Who asked for a relay has one.
    scene.deny(&["11434"])?;
    scene.allow(&["11434", "--path", "relay"])?;
    Report::of(&scene.daemon)?.must_not("mptcp")
}

/// Gives the sandbox a user, in its own mount namespace.
fn add_user(name: &str, uid: u32) -> Result<tempfile::NamedTempFile> {
    let users = fs::read_to_string("/etc/passwd")?;
    let mut file = tempfile::NamedTempFile::new()?;
    writeln!(file, "{users}{name}:x:{uid}:{uid}::/:/bin/false")?;
    let bind = MsFlags::MS_BIND;
    mount(Some(file.path()), "/etc/passwd", None::<&str>, bind, None::<&str>)
        .context("mount a list of users")?;
    Ok(file)
}

fn whose_a_service_is_is_told() -> Result<()> {
    const ALICE: u32 = 1234;
    let _users = add_user("alice", ALICE)?;
    let scene = Scene::new()?;
    let of = |uid, address: &str| {
        scene.service_with(&service::Options { uid, ..service::Options::new(address, address)? })
    };
    let _services = [of(None, "127.0.0.1:8080")?, of(Some(999), "127.0.0.1:8083")?];
    scene.allow(&["8080", "8083"])?;
    Report::of(&scene.daemon)?.must_not("users")?;
    ensure!(!scene.daemon.cli(&["status"])?.stdout.contains("uid"), "of nobody else anything is said");

    let _hers = [of(Some(ALICE), "127.0.0.1:8081")?, of(Some(ALICE), "127.0.0.1:8082")?];
    let allowed = scene.daemon.allow(&["bridge:lab0", "8081-8082"])?.stdout;
    let note = "the listeners of bridge:lab0 8081-8082 belong to user alice (uid 1234)";
    ensure!(allowed.matches(note).count() == 1, "{allowed}");
    let status = scene.daemon.cli(&["status"])?.stdout;
    ensure!(
        status.contains(&format!("\nnote     {note}\n")) && status.matches("alice").count() == 1,
        "{status}"
    );
    let rule = scene.daemon.rule("bridge:lab0", 8081)?.context("the rule")?;
    let user = &rule["gateways"][0]["listener_user"];
    ensure!(user["uid"] == ALICE && user["name"] == "alice", "{rule}");
    let explained = scene.daemon.cli(&["explain", "bridge:lab0", "8081"])?.stdout;
    ensure!(explained.contains("of user alice (uid 1234)"), "{explained}");
    let finding = Report::of(&scene.daemon)?.must("users", "note")?;
    let rules = "bridge:lab0 8081, bridge:lab0 8082 belong to user alice (uid 1234)";
    ensure!(finding.text.contains(rules) && finding.text.contains("system user"), "{finding:?}");
    ensure!(finding.remedy == ["ss -lntup 'sport = :8081'"], "{finding:?}");

    // Beside somebody else's service she gets nothing.
    scene.deny(&["8081-8082"])?;
    let _beside = of(Some(ALICE), "[::1]:8080")?;
    let finding = Report::of(&scene.daemon)?.must("users", "warning")?;
    let beside = "[::1]:8080 belongs to user alice (uid 1234), unlike the service of bridge:lab0 8080";
    ensure!(finding.text.starts_with(beside), "{finding:?}");
    Ok(())
}

fn a_service_on_every_address_is_told() -> Result<()> {
    let scene = Scene::new()?;
    let _v4 = scene.service("everywhere", "0.0.0.0:8080")?;
    let _v6 = scene.service("everywhere", "[::]:8081")?;
    let _unmeant = scene.service("no rule's", "0.0.0.0:8082")?;
    scene.allow(&["8080", "80=8081"])?;
    let report = Report::of(&scene.daemon)?;
    let found = report.of_check("exposed");
    ensure!(report.status == 0 && found.len() == 2, "{report:?}");
    for (finding, address) in found.iter().zip(["0.0.0.0:8080", "[::]:8081"]) {
        ensure!(finding.level == "warning" && finding.text.contains(address), "{finding:?}");
        ensure!(finding.text.contains("127.0.0.1") && finding.remedy[0].starts_with("ss "), "{finding:?}");
    }
    Ok(())
}

fn route_localnet_is_told() -> Result<()> {
    let (scene, _service) = served()?;
    scene.lab.host().sysctl("net/ipv4/conf/lab0/route_localnet", "1")?;
    let finding = Report::of(&scene.daemon)?.must("route_localnet", "warning")?;
    ensure!(finding.remedy == ["sysctl -w net/ipv4/conf/lab0/route_localnet=0"], "{finding:?}");
    scene.lab.host().shell(&finding.remedy[0])?;
    Report::of(&scene.daemon)?.must_not("route_localnet")
}

fn a_running_socat_is_told() -> Result<()> {
    let (scene, _service) = served()?;
    let arguments = ["TCP-LISTEN:81,bind=10.7.0.1,fork", "TCP:127.0.0.1:8080"];
    let mut socat = scene.lab.host().command("socat").args(arguments).spawn()?;
    // One that has nothing to do with loopback.
    let mut other =
        scene.lab.host().command("socat").args(["TCP-LISTEN:82,fork", "TCP:192.0.2.1:80"]).spawn()?;
    let found = patience::until("a socat that is found", || {
        let report = Report::of(&scene.daemon)?;
        Ok((!report.of_check("socat").is_empty()).then_some(report))
    });
    let serves = patience::until("socat serves", || {
        Ok(lbridge_tests::harness::client::served_by(&scene.container, scene.gateway(81), "service").ok())
    });
    // With a connection open it has a child.
    let open = lbridge_tests::harness::client::connect(&scene.container, scene.gateway(81));
    let again = Report::of(&scene.daemon);
    for process in [&mut socat, &mut other] {
        process.kill()?;
        process.wait()?;
    }
    let finding = found?.must("socat", "warning")?;
    ensure!(finding.text.contains("TCP-LISTEN:81") && serves.is_ok(), "{finding:?}");
    open?;
    again?.must("socat", "warning").map(drop)
}

/// UFW's files, on an /etc that nobody else sees.
fn ufw(rules: &str) -> Result<()> {
    sandbox::shadow("/etc")?;
    fs::create_dir_all("/etc/ufw")?;
    fs::write("/etc/ufw/ufw.conf", "ENABLED=yes\n")?;
    fs::write("/etc/default/ufw", "DEFAULT_INPUT_POLICY=\"DROP\"\n")?;
    Ok(fs::write("/etc/ufw/user.rules", rules)?)
}

fn ufw_in_the_way_is_told() -> Result<()> {
    let (mut scene, _service) = served()?;
    sandbox::shadow("/etc")?;
    let host = scene.lab.host().clone();
    host.shell("ufw --force enable")?;
    // The daemon lets in what its rules open.
    patience::until("let in", || Ok(host.shell("iptables -S INPUT | grep lbridge").ok()))?;
    Report::of(&scene.daemon)?.must("firewall", "ok")?;
    // Without it nobody does.
    scene.daemon.terminate()?;
    host.shell("iptables -D INPUT 1")?;
    let finding = Report::of(&scene.daemon)?.must("firewall", "problem")?;
    let command = "ufw allow in on lab0 from 10.7.0.0/24 to 10.7.0.1 port 8080 proto tcp";
    ensure!(finding.remedy.last().is_some_and(|last| last == command), "{finding:?}");
    host.shell(command)?;
    Report::of(&scene.daemon)?.must("firewall", "ok").map(drop)
}

fn ufw_rules_of_older_recipes_are_told() -> Result<()> {
    let (scene, _service) = served()?;
    ufw("### tuple ### allow tcp 8080 10.7.0.1 any 0.0.0.0/0 in_lab0\n\
         ### tuple ### allow tcp 5432 10.7.0.1 any 0.0.0.0/0 in_lab0\n\
         ### tuple ### allow tcp 5432 192.0.2.1 any 0.0.0.0/0 in\n")?;
    let finding = Report::of(&scene.daemon)?.must("ufw", "note")?;
    ensure!(finding.remedy == ["ufw delete allow in on lab0 to 10.7.0.1 port 5432 proto tcp"], "{finding:?}");
    Ok(())
}

fn no_bpffs_is_a_problem() -> Result<()> {
    let lab = Lab::new()?;
    let mut daemon = Daemon::prepare(lab.host(), Options::default())?;
    umount2(sandbox::BPFFS, MntFlags::MNT_DETACH)?;
    let finding = Report::of(&daemon)?.must("bpffs", "problem")?;
    ensure!(finding.remedy == ["mount -t bpf -o mode=700 bpf /sys/fs/bpf"], "{finding:?}");
    // It is right: the daemon does not start, and does after what it says.
    ensure!(daemon.start_refused()?.stderr.contains("bpffs"));
    lab.host().shell(&finding.remedy[0])?;
    daemon.restart()?;
    Report::of(&daemon)?.must("bpffs", "ok").map(drop)
}

fn no_cgroup2_is_a_problem() -> Result<()> {
    let lab = Lab::new()?;
    let daemon = Daemon::prepare(lab.host(), Options::default())?;
    umount2(sandbox::CGROUP_ROOT, MntFlags::MNT_DETACH)?;
    let finding = Report::of(&daemon)?.must("cgroup2", "problem")?;
    ensure!(finding.remedy == ["mount -t cgroup2 none /sys/fs/cgroup"], "{finding:?}");
    lab.host().shell(&finding.remedy[0])?;
    Report::of(&daemon)?.must("cgroup2", "ok").map(drop)
}

fn pins_that_are_gone_are_told() -> Result<()> {
    let (scene, _service) = served()?;
    Report::of(&scene.daemon)?.must_not("pins")?;
    let elsewhere = format!("--bpffs={}/elsewhere", sandbox::BPFFS);
    let report = Report::read(&scene.daemon.cli(&["doctor", "--json", &elsewhere])?)?;
    report.must("pins", "problem").map(drop)
}

/// Somebody attached to the cgroup the old way, which suffers nobody beside.
fn a_hook_that_is_taken_is_a_problem() -> Result<()> {
    let lab = Lab::new()?;
    let mut daemon = Daemon::prepare(lab.host(), Options::default())?;
    Report::of(&daemon)?.must("cgroup2", "ok")?;
    programs::take_sock_ops(sandbox::CGROUP_ROOT.as_ref())?;
    let finding = Report::of(&daemon)?.must("cgroup2", "problem")?;
    ensure!(finding.text.contains("exclusively"), "{finding:?}");
    ensure!(daemon.start_refused()?.stderr.contains("failed to attach"), "it is right");
    Ok(())
}

fn few_descriptors_are_told() -> Result<()> {
    let lab = Lab::new()?;
    let daemon = Daemon::start_with(lab.host(), Options { open_files: Some(1024), ..Options::default() })?;
    let finding = Report::of(&daemon)?.must("descriptors", "warning")?;
    ensure!(finding.text.contains("1024"), "{finding:?}");
    ensure!(finding.remedy.contains(&"LimitNOFILE=524288".to_owned()), "{finding:?}");
    Ok(())
}

/// The daemon answers as an older one would.
fn a_daemon_of_another_version_is_told() -> Result<()> {
    let (mut scene, _service) = served()?;
    let mut status = scene.daemon.status()?;
    scene.daemon.terminate()?;
    status["version"] = "0.0.9".into();
    let body = status.to_string();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let listener = UnixListener::bind(scene.daemon.socket())?;
    // Ends with the test's process.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            // The first connection only looks who is there.
            drop(stream.read(&mut [0; 1024]).and_then(|_| stream.write_all(answer.as_bytes())));
        }
    });
    let finding = Report::of(&scene.daemon)?.must("daemon", "warning")?;
    ensure!(
        finding.text.contains("0.0.9") && finding.remedy[0].starts_with("systemctl restart"),
        "{finding:?}"
    );
    Ok(())
}

fn without_root_it_says_what_it_could_not_check() -> Result<()> {
    let (scene, _service) = served()?;
    let mut command = scene.daemon.command()?;
    let program = command.get_program().to_owned();
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    // The built program may be where a stranger does not get.
    let copy = PathBuf::from("/run/lbridge-for-all");
    fs::copy(&program, &copy)?;
    command = scene.lab.host().command("setpriv");
    command.args(user).arg(&copy).args(["doctor", "--json"]).args(doctor::paths(&scene.daemon));
    command.env("LBRIDGE_SOCKET", scene.daemon.socket()).stdin(Stdio::null());
    let output: Output = command.output()?.into();
    let report = Report::read(&output)?;
    ensure!(report.status == 0, "{report:?}");
    for check in ["steering", "daemon"] {
        let finding = report.must(check, "note")?;
        ensure!(
            finding.text.contains("needs root") && finding.remedy == ["sudo lbridge doctor"],
            "{finding:?}"
        );
    }
    report.must("bpffs", "ok")?;
    report.must("cgroup2", "ok").map(drop)
}

/// The things that a doctor could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    pins: Vec<PathBuf>,
    cgroups: BTreeSet<PathBuf>,
    namespaces: BTreeSet<PathBuf>,
    links: Vec<String>,
    files: BTreeSet<PathBuf>,
}

fn traces(scene: &Scene) -> Result<Traces> {
    let folders = |folder: &str| -> Result<BTreeSet<PathBuf>> {
        Ok(fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect())
    };
    let mut namespaces = BTreeSet::new();
    for process in fs::read_dir("/proc")?.flatten() {
        namespaces.extend(fs::read_link(process.path().join("ns/net")));
    }
    // Their states change by themselves.
    let links = scene.lab.host().ip_output("-brief link")?;
    Ok(Traces {
        pins: pins::files(sandbox::BPFFS.as_ref())?,
        cgroups: folders(sandbox::CGROUP_ROOT)?.into_iter().filter(|path| path.is_dir()).collect(),
        namespaces,
        links: links.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect(),
        files: folders("/run")?,
    })
}

fn it_leaves_nothing_behind() -> Result<()> {
    let (scene, _service) = served()?;
    let before = traces(&scene)?;
    // Its SYNs are counted, as verify's connections are.
    let rules = || -> Result<serde_json::Value> {
        let mut rules = scene.daemon.status()?["rules"].take();
        for rule in rules.as_array_mut().into_iter().flatten() {
            rule["gateways"]
                .as_array_mut()
                .into_iter()
                .flatten()
                .for_each(|gateway| gateway["connections"] = 0.into());
        }
        Ok(rules)
    };
    let before_it = rules()?;
    Report::of(&scene.daemon)?;
    let after = traces(&scene)?;
    ensure!(after == before, "{after:?}, before {before:?}");
    // Whenever it is killed.
    for delay in 0..20 {
        let mut command = scene.lab.host().command(binary()?);
        command.args(["doctor", "--json"]).args(doctor::paths(&scene.daemon)).process_group(0);
        command.env("LBRIDGE_SOCKET", scene.daemon.socket()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut doctor = command.spawn()?;
        thread::sleep(Duration::from_millis(5 * delay));
        doctor.kill()?;
        doctor.wait()?;
    }
    let after = traces(&scene)?;
    ensure!(after == before, "{after:?}, before {before:?}");
    ensure!(rules()? == before_it, "what it does is seen by the daemon");
    scene.served(8080, "service").map(drop)
}

fn names_cannot_act_on_the_terminal() -> Result<()> {
    let (scene, _service) = served()?;
    scene.daemon.allow(&["\u{202e}evil", "80"])?;
    let text = people(&scene.daemon)?;
    ensure!(text.stdout.contains("evil") && !text.stdout.contains('\u{202e}'), "{text:?}");
    let found = Report::of(&scene.daemon)?.of_check("rules");
    found.iter().find(|finding| finding.text.contains("evil")).context("the rule").map(drop)
}

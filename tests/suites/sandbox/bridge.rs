//! Tests of what a sandbox gets of the host, and what it does not.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use lbridge_tests::harness::client::{self, Connection};
use lbridge_tests::harness::daemon::Output;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::scene::{BWRAP, Background, Scene, USER, children_of, is_same};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_command_in_bubblewrap_reaches_the_port,
        a_command_in_unshare_reaches_the_port,
        a_sandbox_of_everything_is_found,
        a_sandbox_that_a_script_makes_is_found,
        the_port_is_there_at_the_programs_first_step,
        nothing_but_the_listed_ports_is_open,
        two_sandboxes_are_apart,
        the_exit_status_is_the_commands,
        standard_streams_are_the_commands,
        signals_are_passed_on,
        what_cannot_be_run_is_said_as_a_shell_does,
        wrong_arguments_are_usage_errors,
        a_command_without_a_sandbox_is_told,
        a_sandbox_that_runs_is_joined,
        a_namespaces_path_is_joined,
        the_sandbox_of_somebody_else_is_refused,
        the_host_is_no_sandbox,
        the_service_does_not_take_the_sandbox_for_a_local_client,
        a_service_may_come_and_go,
        a_port_that_is_taken_inside_is_had_when_it_is_free,
        a_unix_socket_is_offered_inside,
        sigterm_lets_connections_end,
        what_is_cut_off_never_looks_finished,
        a_failed_look_costs_nothing,
        a_sandbox_cannot_keep_lbridge_from_ending,
        nothing_is_left,
    ]
}

/// The command of the program inside that reaches a service.
const DIAL: &str = "echo over and out | timeout 5 nc 127.0.0.1 8080";

fn must_greet(output: &Output, service: &str) -> Result<()> {
    ensure!(output.status == 0, "{output:?}");
    ensure!(output.stdout.contains(service) && output.stdout.contains("over and out"), "{output:?}");
    ensure!(output.stderr.is_empty(), "says nothing while all is well: {output:?}");
    Ok(())
}

/// `PORT... -- bwrap ... sh -c SCRIPT`
fn in_bwrap<'a>(ports: &[&'a str], more: &[&'a str], script: &'a str) -> Vec<&'a str> {
    [ports, &["--", "bwrap"], &BWRAP, more, &["sh", "-c", script]].concat()
}

fn a_command_in_bubblewrap_reaches_the_port() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    must_greet(&scene.run(&in_bwrap(&["8080"], &[], DIAL))?, "host's")?;
    let elsewhere = "echo over and out | timeout 5 nc ::1 80";
    must_greet(&scene.run(&in_bwrap(&["80=8080"], &[], elsewhere))?, "host's")
}

/// Whose loopback is down.
fn a_command_in_unshare_reaches_the_port() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    must_greet(
        &scene.run(&["8080", "--", "unshare", "--map-root-user", "--net", "sh", "-c", DIAL])?,
        "host's",
    )
}

fn a_sandbox_of_everything_is_found() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    for more in
        [&["--unshare-all"][..], &["--unshare-pid", "--unshare-user"], &["--unshare-all", "--new-session"]]
    {
        must_greet(&scene.run(&in_bwrap(&["8080"], more, DIAL))?, "host's")
            .with_context(|| format!("{more:?}"))?;
    }
    Ok(())
}

fn a_sandbox_that_a_script_makes_is_found() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let script = format!("true | cat; (exec true); bwrap {} sh -c '{DIAL}'", BWRAP.join(" "));
    must_greet(&scene.run(&["8080", "--", "sh", "-c", &script])?, "host's")
}

/// The program is held until its ports are open.
fn the_port_is_there_at_the_programs_first_step() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    for _ in 0..50 {
        let arguments =
            [&["8080", "--", "bwrap"][..], &BWRAP, &["nc", "127.0.0.1", "8080", "-e", "true"]].concat();
        let output = scene.run(&arguments)?;
        ensure!(output.status == 0 && output.stderr.is_empty(), "{output:?}");
    }
    Ok(())
}

fn nothing_but_the_listed_ports_is_open() -> Result<()> {
    let scene = Scene::new()?;
    scene.host.ip("link add outside type bridge")?;
    scene.host.ip("addr add 192.0.2.1/24 dev outside")?;
    scene.host.ip("link set outside up")?;
    let _listed = scene.service("listed", "127.0.0.1:8080")?;
    let secret = scene.service("secret", "127.0.0.1:8081")?;
    let public = scene.service("public", "192.0.2.1:8080")?;
    let script = "for to in '127.0.0.1 8081' '::1 8081' '127.0.0.2 8080' '192.0.2.1 8080' '127.128.0.1 8080'
        do timeout 2 nc $to </dev/null && echo reached $to; done; echo done";
    let output = scene.run(&in_bwrap(&["8080"], &[], script))?;
    ensure!(output.stdout.trim() == "done", "{output:?}");
    ensure!(secret.accepted() == 0 && public.accepted() == 0, "nobody came");
    Ok(())
}

fn two_sandboxes_are_apart() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (one, inside) = scene.sandbox(USER)?;
    let (_other, beside) = scene.sandbox(USER)?;
    let _relay = scene.start(&["--pid", &one.0.id().to_string(), "8080"])?;
    soon_served(&inside, "host's")?;
    client::refused(&beside, localhost())
}

fn localhost() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}

fn soon_served(netns: &NetNs, service: &str) -> Result<()> {
    patience::until("the sandbox is served", || Ok(client::served_by(netns, localhost(), service).ok()))
        .map(drop)
}

fn the_exit_status_is_the_commands() -> Result<()> {
    let scene = Scene::new()?;
    for (script, status) in
        [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
    {
        let output = scene.run(&in_bwrap(&["8080"], &[], script))?;
        ensure!(output.status == status, "{script}: {output:?}");
    }
    Ok(())
}

fn standard_streams_are_the_commands() -> Result<()> {
    let scene = Scene::new()?;
    let mut command = scene.relay(&in_bwrap(&["8080"], &[], "cat; echo aside >&2"));
    command.env("LBRIDGE_LOG", "off").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("no stdin")?.write_all(b"through\n")?;
    let output = scene.finish(child)?;
    ensure!(output.stdout == "through\n" && output.stderr == "aside\n", "{output:?}");
    Ok(())
}

fn signals_are_passed_on() -> Result<()> {
    let scene = Scene::new()?;
    for (signal, name) in [(Signal::SIGTERM, "TERM"), (Signal::SIGHUP, "HUP"), (Signal::SIGUSR1, "USR1")] {
        let ready = scene.folder.path().join(name);
        let script = format!("trap 'exit 42' {name}; : > {}; while :; do sleep 0.05; done", ready.display());
        let arguments = ["8080", "--", "unshare", "--map-root-user", "--net", "sh", "-c", &script];
        let child = scene.relay(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let pid = Pid::from_raw(child.id().cast_signed());
        patience::until("the command waits for its signal", || Ok(ready.exists().then_some(())))?;
        kill(pid, signal)?;
        let output = scene.finish(child)?;
        ensure!(output.status == 42, "{name}: {output:?}");
    }
    Ok(())
}

fn what_cannot_be_run_is_said_as_a_shell_does() -> Result<()> {
    let scene = Scene::new()?;
    let output = scene.run(&["8080", "--", "no-such-program"])?;
    ensure!(
        output.status == 127 && output.stderr == "lbridge: no-such-program: command not found\n",
        "{output:?}"
    );
    let output = scene.run(&["8080", "--", "/etc/passwd"])?;
    ensure!(output.status == 126 && output.stderr.lines().count() == 1, "{output:?}");
    Ok(())
}

fn wrong_arguments_are_usage_errors() -> Result<()> {
    let scene = Scene::new()?;
    for arguments in [
        &["8080"][..],
        &["--", "true"],
        &["--pid", "1"],
        &["--pid", "0", "8080"],
        &["--pid", "x", "8080"],
        &["--pid", "1", "8080", "--", "true"],
        &["--pid", "1", "--netns", "/x", "8080"],
        &["0", "--", "true"],
        &["all", "--", "true"],
        &["8080", "8080=8081", "--", "true"],
        &["8080=unix:/run/x", "--", "true"],
        &["8080", "--source", "me", "--", "true"],
    ] {
        let output = scene.run(arguments)?;
        ensure!(output.status == 2 && output.stderr.lines().count() == 1, "{arguments:?}: {output:?}");
        ensure!(output.stderr.starts_with("lbridge: "), "{arguments:?}: {output:?}");
    }
    Ok(())
}

fn a_command_without_a_sandbox_is_told() -> Result<()> {
    let scene = Scene::new()?;
    let output = scene.run(&["8080", "--", "sh", "-c", "exit 3"])?;
    ensure!(output.status == 3 && output.stderr.contains("without a network namespace"), "{output:?}");
    // Told while it runs, since everything seems to work on the host's network.
    let output = scene.run(&["8080", "--", "sleep", "5.5"])?;
    ensure!(output.status == 0 && output.stderr.contains("has made no network namespace yet"), "{output:?}");
    Ok(())
}

fn a_sandbox_that_runs_is_joined() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    // By bwrap's outer process, which is on the host; and by the one inside.
    let inner = children_of(sandbox.0.id())?[0];
    for pid in [sandbox.0.id(), inner] {
        let relay = scene.start(&["--pid", &pid.to_string(), "8080"])?;
        soon_served(&netns, "host's")?;
        drop(relay);
        patience::until("the port is closed", || Ok(client::refused(&netns, localhost()).ok()))?;
    }
    let mut relay = scene.start(&["--pid", &sandbox.0.id().to_string(), "8080"])?;
    soon_served(&netns, "host's")?;
    let open = client::connect(&netns, localhost())?;
    drop(netns);
    drop(sandbox);
    ensure!(relay.wait()? == 0, "ends with the sandbox");
    open.must_be_over()
}

fn a_namespaces_path_is_joined() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    let inner = children_of(sandbox.0.id())?[0];
    let mut relay = scene.start(&["--netns", &format!("/proc/{inner}/ns/net"), "8080"])?;
    soon_served(&netns, "host's")?;
    drop(sandbox);
    ensure!(relay.wait()? == 0, "ends when the path leads nowhere");
    Ok(())
}

fn the_sandbox_of_somebody_else_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (sandbox, netns) = scene.sandbox(USER + 1)?;
    let inner = children_of(sandbox.0.id())?[0];
    for arguments in
        [["--pid".to_owned(), inner.to_string()], ["--netns".to_owned(), format!("/proc/{inner}/ns/net")]]
    {
        let output = scene.run(&[&arguments[0], &arguments[1], "8080"])?;
        ensure!(output.status == 1 && output.stderr.lines().count() == 1, "{output:?}");
        ensure!(
            output.stderr.contains("run as the user who started it") || output.stderr.contains("cannot open"),
            "{output:?}"
        );
    }
    client::refused(&netns, localhost())
}

fn the_host_is_no_sandbox() -> Result<()> {
    let scene = Scene::new()?;
    let beside = Background(scene.user("sleep").arg("1000").spawn()?);
    let output = scene.run(&["--pid", &beside.0.id().to_string(), "8080"])?;
    ensure!(output.status == 1 && output.stderr.contains("nothing to bridge"), "{output:?}");
    let output = scene.run(&["--netns", "/proc/self/ns/net", "8080"])?;
    ensure!(output.status == 1 && output.stderr.contains("localhost is the host's already"), "{output:?}");
    Ok(())
}

fn the_service_does_not_take_the_sandbox_for_a_local_client() -> Result<()> {
    let scene = Scene::new()?;
    let _four = scene.service("four", "127.0.0.1:8080")?;
    let _six = scene.service("six", "[::1]:8081")?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    let pid = sandbox.0.id().to_string();
    let relay = scene.start(&["--pid", &pid, "8080", "8081"])?;
    soon_served(&netns, "four")?;
    let greeting = client::connect(&netns, localhost())?.greeting;
    let std::net::IpAddr::V4(ip) = greeting.accept.ip() else { bail!("{greeting:?}") };
    ensure!(ip.octets()[0] == 127 && ip.octets()[1] >= 128, "{greeting:?}");
    // There is one IPv6 loopback address, and it is everybody's.
    client::refused(&netns, "127.0.0.1:8081".parse()?)?;
    patience::until("it says what to do", || {
        Ok(scene.log.text().contains("--source loopback").then_some(()))
    })?;
    drop(relay);
    let _relay = scene.start(&["--pid", &pid, "8080", "8081", "--source", "loopback"])?;
    soon_served(&netns, "four")?;
    ensure!(client::connect(&netns, localhost())?.greeting.accept.ip().to_string() == "127.0.0.1");
    client::served_by(&netns, "127.0.0.1:8081".parse()?, "six").map(drop)
}

fn a_service_may_come_and_go() -> Result<()> {
    let scene = Scene::new()?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    let _relay = scene.start(&["--pid", &sandbox.0.id().to_string(), "8080"])?;
    patience::until("it says that it waits", || {
        Ok(scene.log.text().contains("nothing listens").then_some(()))
    })?;
    client::refused(&netns, localhost())?;
    for name in ["first", "second"] {
        let service = scene.service(name, "127.0.0.1:8080")?;
        soon_served(&netns, name)?;
        service.stop();
        patience::until("the port is closed again", || Ok(client::refused(&netns, localhost()).ok()))?;
    }
    Ok(())
}

fn a_port_that_is_taken_inside_is_had_when_it_is_free() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    let inside = Service::start(&netns, "inside", "127.0.0.1:8080")?;
    let _relay = scene.start(&["--pid", &sandbox.0.id().to_string(), "8080"])?;
    patience::until("it says so", || Ok(scene.log.text().contains("in use").then_some(())))?;
    client::served_by(&netns, localhost(), "inside")?;
    inside.stop();
    soon_served(&netns, "host's")
}

fn a_unix_socket_is_offered_inside() -> Result<()> {
    let scene = Scene::new()?;
    let path: PathBuf = scene.folder.path().join("service.sock");
    let listener = scene.host.run(|| Ok(UnixListener::bind(&path)?))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    let server = thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"from a Unix socket\n")?;
        Ok(())
    });
    let port = format!("5432=unix:{}", path.display());
    let script = "timeout 5 nc 127.0.0.1 5432";
    let output = scene.run(&in_bwrap(&[&port, "--source", "loopback"], &[], script))?;
    ensure!(output.stdout == "from a Unix socket\n", "{output:?}");
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))?
}

fn sigterm_lets_connections_end() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    let mut relay = scene.start(&["--pid", &sandbox.0.id().to_string(), "8080"])?;
    soon_served(&netns, "host's")?;
    let mut open = client::connect(&netns, localhost())?;
    kill(relay.pid(), Signal::SIGTERM)?;
    patience::until("no new connection is taken", || Ok(client::refused(&netns, localhost()).ok()))?;
    open.echo(b"still here")?;
    open.finish()?;
    ensure!(relay.wait()? == 0);
    Ok(())
}

fn what_is_cut_off_never_looks_finished() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    let pid = sandbox.0.id().to_string();
    let relayed = |options: &[&str]| -> Result<(Background, Connection)> {
        let relay = scene.start(&[&["--pid", &pid, "8080"], options].concat())?;
        soon_served(&netns, "host's")?;
        Ok((relay, client::connect(&netns, localhost())?))
    };
    let (mut killed, open) = relayed(&[])?;
    killed.0.kill()?;
    killed.wait()?;
    open.must_be_reset().context("killed")?;

    let (idle, open) = relayed(&["--idle-timeout", "500ms"])?;
    open.must_be_reset().context("idle")?;
    drop(idle);

    let (mut stopped, open) = relayed(&[])?;
    kill(stopped.pid(), Signal::SIGTERM)?;
    patience::until("no new connection is taken", || Ok(client::refused(&netns, localhost()).ok()))?;
    kill(stopped.pid(), Signal::SIGTERM)?;
    stopped.wait()?;
    open.must_be_reset().context("stopped twice")?;

    let listener = scene.host.run(|| Ok(TcpListener::bind("127.0.0.1:8081")?))?;
    let _relay = scene.start(&["--pid", &pid, "8081"])?;
    let to = SocketAddr::from(([127, 0, 0, 1], 8081));
    let mut client =
        patience::until("a connection", || Ok(client::dial(&netns, None, to, patience::seconds(5)).ok()))?;
    let mut service = listener.accept()?.0;
    service.write_all(b"half")?;
    let mut half = [0; 4];
    client.read_exact(&mut half)?;
    nix::sys::socket::setsockopt(
        &service,
        nix::sys::socket::sockopt::Linger,
        &libc::linger { l_onoff: 1, l_linger: 0 },
    )?;
    drop(service);
    let end = client.read(&mut half).map_err(|error| error.kind());
    ensure!(end == Err(ErrorKind::ConnectionReset), "{end:?}");
    Ok(())
}

/// Too few descriptors to look with: what is open stays open, and the command's status is passed on.
fn a_failed_look_costs_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let done = scene.folder.path().join("done");
    let script = format!("while ! [ -e {} ]; do sleep 0.05; done; exit 7", done.display());
    let mut relay =
        scene.start(&["8080", "--", "unshare", "--map-root-user", "--net", "sh", "-c", &script])?;
    let netns = patience::until("the command runs", || {
        let mut inside = children_of(relay.0.id())?.into_iter().filter_map(|pid| NetNs::of_process(pid).ok());
        Ok(inside.find(|netns| is_same(netns, &scene.host).is_ok_and(|same| !same)))
    })?;
    soon_served(&netns, "host's")?;
    let pid = relay.0.id().to_string();
    let limit = |files: u32| -> Result<()> {
        let soft = format!("--nofile={files}:");
        let status = scene.user("prlimit").args(["--pid", &pid, &soft]).status()?;
        ensure!(status.success(), "prlimit: {status}");
        Ok(())
    };
    limit(4)?;
    patience::until("it says so", || Ok(scene.log.text().contains("trying again").then_some(())))?;
    limit(1000)?;
    soon_served(&netns, "host's")?;
    fs::write(&done, "")?;
    ensure!(relay.wait()? == 7, "the command's status");
    Ok(())
}

/// A program inside may signal the process that makes the sockets, if it is seen.
fn a_sandbox_cannot_keep_lbridge_from_ending() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    let mut relay = scene.start(&["--pid", &sandbox.0.id().to_string(), "8080"])?;
    soon_served(&netns, "host's")?;
    let door = children_of(relay.0.id())?[0];
    kill(Pid::from_raw(door.cast_signed()), Signal::SIGSTOP)?;
    drop((sandbox, netns));
    ensure!(relay.wait()? == 0, "it ends");
    patience::until("so does its child", || Ok((!Path::new(&format!("/proc/{door}")).exists()).then_some(())))
}

/// No process, no tracer, no namespace: also when the relay is killed.
fn nothing_is_left() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", "127.0.0.1:8080")?;
    let (sandbox, netns) = scene.sandbox(USER)?;
    let mut relay = scene.start(&["--pid", &sandbox.0.id().to_string(), "8080"])?;
    soon_served(&netns, "host's")?;
    relay.0.kill()?;
    relay.wait()?;
    patience::until("the port is closed", || Ok(client::refused(&netns, localhost()).ok()))?;
    let arguments = ["8080", "--", "unshare", "--map-root-user", "--net", "sleep", "1000000"];
    let mut command = scene.start(&arguments)?;
    patience::until("the command runs, and nobody traces it", || {
        let untraced = |pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status"));
            status.is_ok_and(|status| status.contains("Name:\tsleep\n") && status.contains("TracerPid:\t0\n"))
        };
        Ok(children_of(command.0.id())?.iter().any(untraced).then_some(()))
    })?;
    kill(command.pid(), Signal::SIGTERM)?;
    ensure!(command.wait()? == 143);
    drop((sandbox, netns));
    patience::until("no process of the user is left", || {
        let mut left = vec![];
        for entry in fs::read_dir("/proc")?.flatten() {
            let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
            if status.lines().any(|line| line.starts_with(&format!("Uid:\t{USER}\t"))) {
                left.push(status);
            }
        }
        Ok(left.is_empty().then_some(()))
    })?;
    Ok(())
}

//! Tests: run on real namespaces, made with unshare(1). Sandboxes of real users, and bubblewrap's, are in
//! `tests/suites/sandbox`.

use std::{
    collections::BTreeSet,
    env,
    ffi::OsString,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::process::ExitStatusExt as _},
    process::{self, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    libc,
    sys::signal::{SigSet, Signal, kill},
    unistd::{Pid, geteuid},
};

use super::{
    door::Door,
    find::namespace_of,
    id_of,
    launch::{Held, NotStarted, Started, launch},
    own_netns, trace,
};

const ROLE: &str = "LBRIDGE_TEST_ROLE";

/// Returns the command that runs this program again, in one of the roles below.
fn role(role: &str) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec!["env".into(), format!("{ROLE}={role}").into()];
    command.push(env::current_exe().unwrap().into());
    command.extend(["--exact", "sandbox::tests::plays_a_role", "--quiet"].map(Into::into));
    command
}

/// Plays a role inside a sandbox: "connect PORT", "pry PID", "pry-in PID".
#[test]
fn plays_a_role() {
    let Ok(role) = env::var(ROLE) else { return };
    let (role, number) = role.split_once(' ').unwrap();
    match role {
        "connect" => {
            for ip in ["127.0.0.1", "::1"] {
                TcpStream::connect(SocketAddr::new(ip.parse().unwrap(), number.parse().unwrap())).unwrap();
            }
        }
        "pry" => assert_eq!(pry(number.parse().unwrap()), [false; 5]),
        "pry-in" => assert_eq!(pry(number.parse().unwrap()), [true; 5]),
        other => panic!("{other}"),
    }
}

/// Tries to access a process: its files, its memory, its working directory, its descriptors, and tracing it.
fn pry(pid: i32) -> [bool; 5] {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    assert!(status.contains("CapEff:\t000001ffffffffff"), "all capabilities: {status}");
    [
        fs::read_dir(format!("/proc/{pid}/root/")).is_ok(),
        File::open(format!("/proc/{pid}/mem")).is_ok(),
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok(),
        // The list itself is open to the global root, whatever namespace that is in.
        fs::read_dir(format!("/proc/{pid}/fd"))
            .is_ok_and(|list| list.flatten().any(|descriptor| fs::read_link(descriptor.path()).is_ok())),
        trace::seize(Pid::from_raw(pid)).is_ok(),
    ]
}

/// A process in a sandbox of its own; killed when dropped.
struct Sandbox(process::Child);

impl Sandbox {
    fn new(options: &str) -> Self {
        let mut command = Command::new("unshare");
        command.args([options, "sh", "-c", "echo; exec sleep 600"]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "\n");
        Self(child)
    }

    fn netns(&self) -> OwnedFd {
        namespace_of(self.0.id()).unwrap().netns
    }

    /// Starts another process inside, with all capabilities there.
    fn run(&self, command: &[OsString]) -> process::Child {
        let target = self.0.id().to_string();
        let options = ["-t", &target, "-U", "-n", "--preserve-credentials"];
        Command::new("nsenter").args(options).args(command).spawn().unwrap()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn address(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Makes both listeners (IPv4 and IPv6), as the relay has them.
fn listen(door: &Door, port: u16) -> [TcpListener; 2] {
    ["127.0.0.1", "::1"].map(|ip| {
        let socket = door.bind(address(ip, port)).unwrap();
        rustix::net::listen(&socket, 16).unwrap();
        socket.into()
    })
}

fn command(words: &[&str]) -> Vec<OsString> {
    words.iter().map(Into::into).collect()
}

fn shell(script: &str) -> Vec<OsString> {
    command(&["sh", "-c", script])
}

fn in_unshare(program: Vec<OsString>) -> Vec<OsString> {
    command(&["unshare", "-rn"]).into_iter().chain(program).collect()
}

fn held(command: &[OsString]) -> Held {
    match launch(command).unwrap() {
        Started::Held(held) => held,
        Started::Ended(status) => panic!("{command:?} ended with {status}"),
    }
}

fn ended(command: &[OsString]) -> process::ExitStatus {
    match launch(command).unwrap() {
        Started::Held(held) => panic!("{command:?} is held at {}", held.pid()),
        Started::Ended(status) => status,
    }
}

fn eventually(what: impl Fn() -> bool) {
    let begin = Instant::now();
    while !what() {
        assert!(begin.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_door_listens_inside() {
    let sandbox = Sandbox::new("-rn");
    let door = Door::open(&sandbox.netns()).unwrap();
    let listeners = listen(&door, 5432);
    for (listener, ip) in listeners.iter().zip(["127.0.0.1", "::1"]) {
        assert_eq!(listener.local_addr().unwrap(), address(ip, 5432));
        let flags = FdFlag::from_bits_retain(fcntl(listener, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
        let flags = OFlag::from_bits_retain(fcntl(listener, FcntlArg::F_GETFL).unwrap());
        assert!(flags.contains(OFlag::O_NONBLOCK));
    }
    assert!(sandbox.run(&role("connect 5432")).wait().unwrap().success());
    assert!(listeners.iter().all(|listener| listener.accept().is_ok()));

    let taken = door.bind(address("127.0.0.1", 5432)).unwrap_err();
    assert_eq!(taken.raw_os_error(), Some(libc::EADDRINUSE));
    let elsewhere = door.bind(address("192.0.2.1", 5432)).unwrap_err();
    assert_eq!(elsewhere.raw_os_error(), Some(libc::EADDRNOTAVAIL));
    // Ports below 1024 need the capabilities inside.
    listen(&door, 80);
}

#[test]
fn a_namespace_of_our_own_user_namespace_needs_root() {
    if !geteuid().is_root() {
        return;
    }
    let sandbox = Sandbox::new("-n");
    let door = Door::open(&sandbox.netns()).unwrap();
    listen(&door, 5432);
}

#[test]
fn a_door_leaves_nothing() {
    let sandbox = Sandbox::new("-rn");
    let door = Door::open(&sandbox.netns()).unwrap();
    let pid = door.pid();
    // Signals that a terminal sends, and one that would stop the child.
    for signal in [Signal::SIGINT, Signal::SIGTSTP, Signal::SIGHUP, Signal::SIGTERM] {
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
    }
    let listeners = listen(&door, 5432);
    if geteuid().is_root() {
        // It may be about to close the listener that it has just handed out.
        eventually(|| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() == 1);
    }
    drop(door);
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    // The listeners continue without the door.
    assert!(sandbox.run(&role("connect 5432")).wait().unwrap().success());
    drop(listeners);
}

#[test]
fn a_door_that_was_killed_is_an_error() {
    let sandbox = Sandbox::new("-rn");
    let door = Door::open(&sandbox.netns()).unwrap();
    kill(Pid::from_raw(door.pid().cast_signed()), Signal::SIGKILL).unwrap();
    assert_eq!(door.bind(address("127.0.0.1", 80)).unwrap_err().raw_os_error(), Some(libc::EPIPE));
}

/// A process with all capabilities inside can access the processes there, but not the door's child.
#[test]
fn a_door_is_no_way_out() {
    let sandbox = Sandbox::new("-rn");
    let door = Door::open(&sandbox.netns()).unwrap();
    let mut victim = sandbox.run(&command(&["sleep", "600"]));
    let comm = || fs::read_to_string(format!("/proc/{}/comm", victim.id())).unwrap();
    eventually(|| comm() == "sleep\n");
    let could = sandbox.run(&role(&format!("pry-in {}", victim.id()))).wait().unwrap();
    victim.kill().ok();
    victim.wait().unwrap();
    assert!(could.success(), "the attempts are no good: they fail everywhere");
    let could_not = sandbox.run(&role(&format!("pry {}", door.pid()))).wait().unwrap();
    assert!(could_not.success());
}

#[test]
fn a_program_finds_its_ports() {
    let held = held(&in_unshare(role("connect 5432")));
    let door = Door::open(&held.netns()).unwrap();
    let listeners = listen(&door, 5432);
    let child = held.release().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(listeners.iter().all(|listener| listener.accept().is_ok()));
}

/// Checks that standard streams, descriptors, signal mask, process group and tracer are as without lbridge.
#[test]
fn a_program_finds_nothing_of_ours() {
    let line = |status: &str, name: &str| {
        status.lines().find(|line| line.starts_with(name)).unwrap().replace('\t', " ")
    };
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let own: BTreeSet<String> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|fd| {
            // SAFETY: only asks about the number, which may belong to nothing any more.
            let flags = unsafe { libc::fcntl(fd.parse().unwrap(), libc::F_GETFD) };
            flags >= 0 && flags & libc::FD_CLOEXEC == 0
        })
        .collect();
    let report = tempfile::NamedTempFile::new().unwrap();
    let script = "{ cat /proc/self/status; echo; ls -x -w 0 /proc/$$/fd; cat /proc/$$/stat; } > $1";
    let mut program = shell(script);
    program.extend(["sh".into(), report.path().into()]);
    let child = held(&in_unshare(program)).release().unwrap();
    assert!(child.wait().unwrap().success());

    let report = fs::read_to_string(report.path()).unwrap();
    let (theirs, rest) = report.split_once("\n\n").unwrap();
    assert_eq!(line(theirs, "TracerPid"), "TracerPid: 0");
    assert_eq!(line(theirs, "SigBlk"), line(&status, "SigBlk"));
    // Except for SIGPIPE, which Rust ignores here: number 13, bit 12.
    let ignored = |status: &str| {
        let line = line(status, "SigIgn");
        u64::from_str_radix(line.trim_start_matches("SigIgn: "), 16).unwrap()
    };
    assert_eq!(ignored(theirs), ignored(&status) & !(1 << 12));
    let mut rest = rest.lines();
    let fds: BTreeSet<String> = rest.next().unwrap().split_whitespace().map(str::to_owned).collect();
    // Shells keep their own descriptors from 10 on.
    let more = fds.difference(&own).filter(|fd| fd.parse::<u32>().unwrap() < 10);
    assert_eq!(more.count(), 0, "{fds:?}, {own:?}");
    let group = rest.next().unwrap().split(' ').nth(4).unwrap().parse().unwrap();
    assert_eq!(nix::unistd::getpgrp(), Pid::from_raw(group));
}

#[test]
fn commands_without_a_sandbox_end() {
    assert!(ended(&command(&["true"])).success());
    assert_eq!(ended(&shell("exit 3")).code(), Some(3));
    assert_eq!(ended(&shell("kill -9 $$")).signal(), Some(9));
    // The last real-time signal.
    assert_eq!(ended(&shell("kill -64 $$")).signal(), Some(64));
    assert_eq!(ended(&shell("(sh -c 'exit 4') | sh -c 'exit 5'")).code(), Some(5));
    // Background processes continue, untraced, and do not delay the return.
    let begin = Instant::now();
    assert!(ended(&shell("sleep 600 & echo $! > /dev/null; kill -0 $! && (sleep 1; kill $!) &")).success());
    assert!(begin.elapsed() < Duration::from_millis(900));
}

#[test]
fn commands_that_do_not_start_fail_as_in_a_shell() {
    let failure = |program: &str| {
        let error = launch(&command(&[program])).unwrap_err();
        let status = error.downcast_ref::<NotStarted>().unwrap().exit_status();
        (status, format!("{error:#}"))
    };
    assert_eq!(failure("lbridge-no-such"), (127, "lbridge-no-such: command not found".to_owned()));
    let (status, message) = failure("/etc/passwd");
    assert!(status == 126 && message.starts_with("cannot run /etc/passwd: Permission denied"), "{message}");
    assert!(launch(&[]).is_err());
    assert!(launch(&command(&["a\0b"])).is_err());
}

#[test]
fn a_sandbox_is_found_among_many_processes() {
    let forks = "i=0; while [ $i -lt 500 ]; do (:) & i=$((i+1)); done; wait; ";
    let held = held(&shell(&format!(
        "{forks} (sleep 600 & unshare -rn sh -c 'exit 7'; echo $? > /dev/null; kill $!)"
    )));
    let child = held.release().unwrap();
    assert!(child.wait().unwrap().success());
}

/// bubblewrap's order: a process is born into the namespace, and sets up the loopback itself.
#[test]
fn a_sandbox_is_not_held_while_it_is_being_made() {
    // unshare(1) forks after it has made the namespaces; only then comes the exec.
    let held = held(&command(&["unshare", "-rn", "--fork", "--pid", "true"]));
    let comm = fs::read_to_string(format!("/proc/{}/comm", held.pid())).unwrap();
    assert_eq!(comm, "true\n");
    assert!(held.release().unwrap().wait().unwrap().success());
}

#[test]
fn what_is_stopped_stays_so_until_it_is_continued() {
    // A process that stops while it is traced, and is detached while stopped.
    let script = "sleep 600 & kill -STOP $!; unshare -rn true; grep -q 'T (stopped)' /proc/$!/status || exit \
                  1; kill -CONT $!; sleep 0.1; grep -q 'S (sleeping)' /proc/$!/status || exit 2; kill $!";
    assert_eq!(held(&shell(script)).release().unwrap().wait().unwrap().code(), Some(0));
    // One that is continued while it is traced.
    let script = "sh -c 'kill -STOP $$; exit 6' & sleep 0.2; kill -CONT $!; wait $!; test $? = 6 && exec \
                  unshare -rn true";
    assert_eq!(held(&shell(script)).release().unwrap().wait().unwrap().code(), Some(0));
}

#[test]
fn a_command_that_is_not_released_is_killed() {
    for command in [in_unshare(command(&["sleep", "600"])), shell("sleep 600 & unshare -rn --fork sleep 600")]
    {
        let held = held(&command);
        let pid = held.pid();
        drop(held);
        // A process whose parent was killed as well is init's to reap.
        let state = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        assert!(state.is_empty() || state.contains("State:\tZ"), "{state}");
    }
}

#[test]
fn a_command_that_is_killed_while_held_has_ended() {
    let held = held(&in_unshare(command(&["sleep", "600"])));
    kill(Pid::from_raw(held.pid().cast_signed()), Signal::SIGKILL).unwrap();
    assert_eq!(held.release().unwrap().wait().unwrap().signal(), Some(9));
}

#[test]
fn the_mask_is_restored() {
    let before = SigSet::thread_get_mask().unwrap();
    ended(&command(&["true"]));
    held(&in_unshare(command(&["true"]))).release().unwrap().wait().unwrap();
    drop(held(&in_unshare(command(&["true"]))));
    assert_eq!(SigSet::thread_get_mask().unwrap(), before);
}

#[test]
fn namespaces_are_found() {
    // Found through an ancestor.
    let mut above = Command::new("sh").args(["-c", "unshare -rn sleep 600 & wait"]).spawn().unwrap();
    let mut found = None;
    let begin = Instant::now();
    while found.is_none() && begin.elapsed() < Duration::from_secs(10) {
        found = namespace_of(above.id()).ok();
    }
    let found = found.unwrap();
    assert_ne!(found.pid, above.id());
    assert_ne!(id_of(&found.netns).unwrap(), own_netns().unwrap());
    rustix::process::pidfd_send_signal(&found.process, rustix::process::Signal::KILL).unwrap();
    above.wait().unwrap();

    let mut idle = Command::new("sleep").arg("600").spawn().unwrap();
    let error = namespace_of(idle.id()).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("process {} shares this network namespace; there is nothing to bridge", idle.id())
    );
    idle.kill().unwrap();
    let pid = idle.id();
    idle.wait().unwrap();
    assert_eq!(namespace_of(pid).unwrap_err().to_string(), format!("there is no process {pid}"));
}

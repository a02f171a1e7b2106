//! daemon: the program under test: `lbridge run` in a host's namespace, with private paths, and the commands
//! that talk to it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::logs::Log;
use super::netns::NetNs;
use super::{patience, sandbox};

/// Returns the path of the program: `LBRIDGE_BIN`, or the one built next to the current program.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("LBRIDGE_BIN") {
        return Ok(path.into());
    }
    let current = env::current_exe().context("find the current program")?;
    current
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("lbridge"))
        .find(|path| path.is_file())
        .context("no lbridge beside the current program: cargo build -p lbridge, or set LBRIDGE_BIN")
}

/// Options for starting a daemon. All paths are private to the instance.
#[derive(Clone, Debug)]
pub struct Options {
    /// True to look for a Docker Engine.
    pub docker: bool,
    /// Text of the configuration file.
    pub config: String,
    /// Additional environment variables.
    pub env: Vec<(String, String)>,
    /// Folder for socket, state and configuration; `None` for a new private folder.
    pub folder: Option<PathBuf>,
    /// The cgroup2 root.
    pub cgroup: PathBuf,
    /// The folder for pins.
    pub bpffs: PathBuf,
    /// The hard limit of open files; `None` for the test's own.
    pub open_files: Option<u64>,
    /// Destination of standard error; `None` for the [`Daemon::log`].
    pub stderr: Option<Arc<File>>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            docker: false,
            config: String::new(),
            env: Vec::new(),
            folder: None,
            cgroup: sandbox::CGROUP_ROOT.into(),
            bpffs: Path::new(sandbox::BPFFS).join("lbridge"),
            open_files: None,
            stderr: None,
        }
    }
}

/// A daemon, running or not, and its paths. Dropping it kills the process.
#[derive(Debug)]
pub struct Daemon {
    host: NetNs,
    options: Options,
    folder: PathBuf,
    process: Option<Child>,
    log: Log,
    /// Keeps the private folder until the daemon is dropped.
    _temporary: Option<TempDir>,
}

/// The output of a command, and its exit status.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit status; -1 for a signal.
    pub status: i32,
    /// The standard output, as text.
    pub stdout: String,
    /// The standard error, as text.
    pub stderr: String,
}

impl From<std::process::Output> for Output {
    fn from(output: std::process::Output) -> Output {
        Output {
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// A rule's state as `status` reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleState {
    /// The state: `steered`, `relayed`, `waiting` or `blocked`.
    pub state: String,
    /// The reason as text; `None` if there is nothing to say.
    pub why: Option<String>,
    /// The codes of the reasons; the deciding one comes first.
    pub reasons: Vec<String>,
}

impl RuleState {
    /// Returns an error unless this is the deciding reason.
    pub fn must_be_because(&self, code: &str) -> Result<()> {
        ensure!(self.reasons.first().is_some_and(|first| first == code), "not because {code}: {self:?}");
        Ok(())
    }
}

impl Daemon {
    /// Starts `lbridge run --no-docker` in the host's namespace and waits until it is ready.
    pub fn start(host: &NetNs) -> Result<Daemon> {
        Daemon::start_with(host, Options::default())
    }

    /// Like [`Daemon::start`], with options.
    pub fn start_with(host: &NetNs, options: Options) -> Result<Daemon> {
        let mut daemon = Daemon::prepare(host, options)?;
        daemon.restart()?;
        Ok(daemon)
    }

    /// Prepares everything but the process.
    pub fn prepare(host: &NetNs, options: Options) -> Result<Daemon> {
        let (folder, temporary) = if let Some(folder) = &options.folder {
            (folder.clone(), None)
        } else {
            let place = if sandbox::is_inside() { PathBuf::from("/run") } else { env::temp_dir() };
            let temporary = tempfile::Builder::new().prefix("lbridge.").tempdir_in(place)?;
            (temporary.path().to_owned(), Some(temporary))
        };
        fs::write(folder.join("lbridge.toml"), &options.config)?;
        let log = Log::new("lbridge run");
        Ok(Daemon { host: host.clone(), options, folder, process: None, log, _temporary: temporary })
    }

    /// Stops the process, if there is one, with SIGTERM, starts another on the same paths and waits until it
    /// is ready.
    pub fn restart(&mut self) -> Result<()> {
        if self.process.is_some() {
            self.terminate()?;
        }
        let ready = self.spawn()?;
        self.wait_until_ready(&ready)
    }

    /// Starts the process, which must refuse to run and end by itself; returns its output.
    pub fn start_refused(&mut self) -> Result<Output> {
        ensure!(self.process.is_none(), "a daemon is running");
        let child = self.run_command()?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let collector = thread::spawn(move || child.wait_with_output());
        let limit = Instant::now() + patience::seconds(10);
        while !collector.is_finished() {
            if Instant::now() > limit {
                kill(pid, Signal::SIGKILL)?;
                let output = Output::from(collector.join().map_err(|_| anyhow::anyhow!("collector"))??);
                bail!("the daemon should have refused to start, but it runs: {output:?}");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(collector.join().map_err(|_| anyhow::anyhow!("collector"))??.into())
    }

    fn run_command(&self) -> Result<Command> {
        let mut command = self.host.command(binary()?);
        command.arg("run").arg("--bpffs").arg(&self.options.bpffs).arg("--cgroup").arg(&self.options.cgroup);
        command.arg("--socket").arg(self.socket()).arg("--state-dir").arg(self.state_dir());
        command.arg("--config").arg(self.config());
        if !self.options.docker {
            command.arg("--no-docker");
        }
        command.env_remove("DOCKER_HOST").env_remove("NOTIFY_SOCKET");
        command.envs(self.options.env.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        if let Some(limit) = self.options.open_files {
            let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
            // SAFETY: setrlimit is a plain system call; the structure lives in the closure.
            unsafe {
                command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
        }
        Ok(command)
    }

    fn spawn(&mut self) -> Result<UnixDatagram> {
        let path = self.folder.join("notify.sock");
        drop(fs::remove_file(&path));
        let ready = UnixDatagram::bind(&path).with_context(|| format!("bind {}", path.display()))?;
        let mut command = self.run_command()?;
        command.env("NOTIFY_SOCKET", &path).stdout(Stdio::piped()).stderr(match &self.options.stderr {
            Some(file) => file.try_clone()?.into(),
            None => Stdio::piped(),
        });
        let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
        self.log.note(&format!("[harness] started as {}", child.id()));
        child.stdout.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        child.stderr.take().into_iter().for_each(|pipe| self.log.follow(pipe));
        self.process = Some(child);
        Ok(ready)
    }

    fn wait_until_ready(&mut self, ready: &UnixDatagram) -> Result<()> {
        let limit = Instant::now() + patience::seconds(10);
        ready.set_read_timeout(Some(Duration::from_millis(20)))?;
        let mut message = [0; 512];
        loop {
            if let Ok(length) = ready.recv(&mut message)
                && String::from_utf8_lossy(&message[..length]).lines().any(|line| line == "READY=1")
            {
                ready.shutdown(Shutdown::Both)?;
                return Ok(());
            }
            if let Some(status) = self.process.as_mut().map(Child::try_wait).transpose()?.flatten() {
                self.process = None;
                bail!("the daemon ended before it was ready: {status}");
            }
            ensure!(Instant::now() < limit, "the daemon does not get ready");
        }
    }

    /// Returns the path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("lbridge.sock")
    }

    /// Returns the folder of the rules file.
    pub fn state_dir(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Returns the path of the rules file.
    pub fn rules_file(&self) -> PathBuf {
        self.state_dir().join("rules.toml")
    }

    /// Returns the path of the configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("lbridge.toml")
    }

    /// Returns the folder of the pins.
    pub fn bpffs(&self) -> &Path {
        &self.options.bpffs
    }

    /// Returns the process id, while the process runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// Returns what the daemon has logged so far.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Waits until the log has these words. The daemon writes its log on a thread of its own, so a line may
    /// come after the answer to the command that caused it.
    pub fn wait_for_log(&self, words: &str) -> Result<()> {
        let found = patience::until(words, || Ok(self.log().contains(words).then_some(())));
        found.with_context(|| format!("the log:\n{}", self.log()))
    }

    /// Creates an `lbridge` command that talks to this daemon.
    pub fn command(&self) -> Result<Command> {
        let mut command = self.host.command(binary()?);
        command.env("LBRIDGE_SOCKET", self.socket()).stdin(Stdio::null());
        // Commands that query the engine themselves use the daemon's engine.
        command.envs(self.options.env.iter().filter(|(name, _)| name == "DOCKER_HOST").cloned());
        Ok(command)
    }

    /// Runs an `lbridge` command.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        let output: Output = self.command()?.args(arguments).output().context("run lbridge")?.into();
        self.log.note(&format!("[harness] lbridge {} -> {output:?}", arguments.join(" ")));
        Ok(output)
    }

    /// Runs `lbridge allow`, which must succeed.
    pub fn allow(&self, arguments: &[&str]) -> Result<Output> {
        self.succeed("allow", arguments)
    }

    /// Runs `lbridge deny`, which must succeed.
    pub fn deny(&self, arguments: &[&str]) -> Result<Output> {
        self.succeed("deny", arguments)
    }

    fn succeed(&self, command: &str, arguments: &[&str]) -> Result<Output> {
        let output = self.cli(&[&[command], arguments].concat())?;
        ensure!(output.status == 0, "lbridge {command} {arguments:?}: {output:?}");
        Ok(output)
    }

    /// Returns the output of `lbridge status --json`.
    pub fn status(&self) -> Result<Value> {
        let output: Output = self.command()?.args(["status", "--json"]).output()?.into();
        ensure!(output.status == 0, "lbridge status --json: {output:?}");
        serde_json::from_str(&output.stdout).with_context(|| format!("not JSON: {}", output.stdout))
    }

    /// Returns the rule's whole entry in `status --json`; `None` if there is none.
    pub fn rule(&self, network: &str, port: u16) -> Result<Option<Value>> {
        let status = self.status()?;
        let rules = status["rules"].as_array().context("status has no list of rules")?;
        Ok(rules.iter().find(|rule| rule["network"] == network && rule["port"] == port).cloned())
    }

    /// Returns the rule's state; an error if there is no such rule.
    pub fn rule_state(&self, network: &str, port: u16) -> Result<RuleState> {
        let rule =
            self.rule(network, port)?.with_context(|| format!("status has no rule {network} {port}"))?;
        let reasons = rule["reasons"].as_array().context("a rule without a list of reasons")?;
        Ok(RuleState {
            state: rule["state"].as_str().context("a rule without a state")?.to_owned(),
            why: rule["why"].as_str().map(str::to_owned),
            reasons: reasons.iter().filter_map(|it| it["code"].as_str()).map(str::to_owned).collect(),
        })
    }

    /// Waits until the rule is in `state`.
    pub fn wait_for_state(&self, network: &str, port: u16, state: &str) -> Result<RuleState> {
        let mut last = None;
        patience::until(&format!("rule {network} {port} {state}"), || {
            let now = self.rule_state(network, port)?;
            let there = now.state == state;
            last = Some(now.clone());
            Ok(there.then_some(now))
        })
        .with_context(|| format!("last state: {last:?}"))
    }

    /// Sends SIGKILL; returns when the process is gone.
    pub fn kill9(&mut self) -> Result<()> {
        let mut process = self.process.take().context("no daemon to kill")?;
        self.log.note("[harness] kill -9");
        process.kill()?;
        process.wait()?;
        Ok(())
    }

    /// Sends SIGTERM; returns the exit status when the process is gone.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_for_end()
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid().context("no daemon to signal")?;
        self.log.note(&format!("[harness] {signal}"));
        Ok(kill(Pid::from_raw(pid.cast_signed()), signal)?)
    }

    /// Runs `work` while the process is stopped: it does nothing and answers nothing, but its listeners
    /// accept connections.
    pub fn paused<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.signal(Signal::SIGSTOP)?;
        let pid = Pid::from_raw(self.pid().context("no daemon to stop")?.cast_signed());
        // Reported once all of its threads have stopped.
        let stopped =
            waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
        ensure!(matches!(stopped, WaitStatus::Stopped(..)), "the daemon does not stand still: {stopped:?}");
        let done = work();
        self.signal(Signal::SIGCONT)?;
        done
    }

    /// Returns the daemon's raw answer to a GET, for another program to parse.
    pub fn raw_answer(&self, resource: &str) -> Result<Vec<u8>> {
        self.exchange(&format!("GET {resource} HTTP/1.1\r\nHost: lbridge\r\nConnection: close\r\n\r\n"))
    }

    /// Returns the daemon's whole answer to a POST of JSON, sent as a client without the commands does.
    pub fn post(&self, resource: &str, body: &Value) -> Result<String> {
        let body = body.to_string();
        let length = body.len();
        let head = format!("POST {resource} HTTP/1.1\r\nHost: lbridge\r\nConnection: close\r\n");
        let head = format!("{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
        let answer = String::from_utf8(self.exchange(&(head + &body))?)?;
        self.log.note(&format!("[harness] {resource} {body} -> {answer}"));
        Ok(answer)
    }

    fn exchange(&self, request: &str) -> Result<Vec<u8>> {
        let mut stream = UnixStream::connect(self.socket()).context("dial the daemon")?;
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    }

    /// Returns true if the process has not ended.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.process.as_mut().context("no daemon")?.try_wait()?.is_none())
    }

    /// Waits until the process has ended by itself or by a signal; returns its exit status.
    pub fn wait_for_end(&mut self) -> Result<ExitStatus> {
        let process = self.process.as_mut().context("no daemon to wait for")?;
        let status = patience::until("the daemon ends", || Ok(process.try_wait()?))?;
        self.process = None;
        Ok(status)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            drop(process.kill());
            drop(process.wait());
        }
    }
}

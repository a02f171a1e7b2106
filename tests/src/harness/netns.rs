//! netns: network namespaces: created, entered by threads and by processes, never named in the file system.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::{fs, panic, thread};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use super::daemon::Output;

/// A network namespace. It lives as long as this handle or a clone of it, or anything inside.
#[derive(Clone, Debug)]
pub struct NetNs {
    fd: Arc<OwnedFd>,
}

impl NetNs {
    /// Creates a namespace with its loopback up.
    pub fn new() -> Result<NetNs> {
        let netns = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare a network namespace (needs root)")?;
            NetNs::current()
        })?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Returns the namespace of the calling thread.
    pub fn current() -> Result<NetNs> {
        let fd = File::open("/proc/thread-self/ns/net").context("open /proc/thread-self/ns/net")?;
        Ok(NetNs { fd: Arc::new(fd.into()) })
    }

    /// Returns the namespace of a process.
    pub fn of_process(pid: u32) -> Result<NetNs> {
        NetNs::at(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// Opens the namespace that a file refers to.
    pub fn at(path: &Path) -> Result<NetNs> {
        let fd = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Ok(NetNs { fd: Arc::new(fd.into()) })
    }

    /// Runs `work` inside and returns its result. It runs on a thread of its own: `setns` applies to a
    /// thread, and a socket stays in the namespace in which it was created, so whatever `work` opens can be
    /// used anywhere.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            setns(self.as_fd(), CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
            work()
        })
    }

    /// Creates a command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = Arc::clone(&self.fd);
        // SAFETY: setns is a plain system call; the closure neither allocates nor locks. It owns the
        // descriptor.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            });
        }
        command
    }

    /// Runs iproute2's `ip` inside; `arguments` are separated by blanks.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        self.ip_output(arguments).map(drop)
    }

    /// Like [`NetNs::ip`]; returns the output.
    pub fn ip_output(&self, arguments: &str) -> Result<String> {
        let output = self.command("ip").args(arguments.split_whitespace()).output().context("run ip")?;
        if !output.status.success() {
            bail!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a shell command inside, which must succeed; returns its output.
    pub fn shell(&self, command: &str) -> Result<String> {
        let output = self.command("sh").args(["-c", command]).output().context("run a shell")?;
        let output = Output::from(output);
        ensure!(output.status == 0, "{command}: {output:?}");
        Ok(output.stdout)
    }

    /// Returns true if a TCP or MPTCP socket listens on exactly this address.
    pub fn listens(&self, address: SocketAddr) -> Result<bool> {
        Ok(self.listening()?.contains(&address))
    }

    /// Returns true if a relay listens where only the kernel's entries lead: 127.64.0.0/10 and 100::/64.
    pub fn has_hidden_relays(&self) -> Result<bool> {
        let is_hidden = |address: &SocketAddr| match address.ip() {
            IpAddr::V4(ip) => ip.octets()[0] == 127 && ip.octets()[1] & 0xc0 == 64,
            IpAddr::V6(ip) => ip.octets()[..8] == [1, 0, 0, 0, 0, 0, 0, 0],
        };
        Ok(self.listening()?.iter().any(is_hidden))
    }

    /// Lists the addresses on which TCP and MPTCP sockets listen.
    fn listening(&self) -> Result<Vec<SocketAddr>> {
        let mut found = Vec::new();
        for table in ["tcp", "tcp6"] {
            let path = format!("/proc/thread-self/net/{table}");
            let table = self.run(|| fs::read_to_string(&path).with_context(|| format!("read {path}")))?;
            for line in table.lines() {
                let fields: Vec<_> = line.split_whitespace().collect();
                // The state 0A is TCP_LISTEN.
                if let (Some(local), Some(&"0A")) = (fields.get(1), fields.get(3)) {
                    found.push(socket_address(local).with_context(|| format!("in {path}: {line}"))?);
                }
            }
        }
        Ok(found)
    }

    /// Sets a sysctl of the namespace, `net/ipv4/ip_forward` for instance.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{name}");
        self.run(|| fs::write(&path, value).with_context(|| format!("write {value} to {path}")))
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(value) => value,
        Err(panic) => panic::resume_unwind(panic),
    })
}

/// Parses an address of /proc/net/tcp: words in the kernel's byte order, written as numbers.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let words = (0..ip.len()).step_by(8).map(word).collect::<Option<Vec<_>>>()?.concat();
    let ip = match words.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(words).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(words).ok()?),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

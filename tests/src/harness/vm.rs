//! vm: boots other kernels in qemu, with an initramfs of busybox, the current program, lbridge and `ip`, and
//! reads the console.
//!
//! Kernels are found under `LBRIDGE_VM_DIR`, or `vm` in the target folder: `NAME/vmlinuz` and `NAME/modules`,
//! as `cargo xtask test --setup` fetches them. To look at one test there, set `LBRIDGE_VM_ARGUMENTS` to
//! arguments for the suite inside; `LBRIDGE_LOG` is passed to the daemons inside.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, ensure};
use nix::sys::prctl;
use nix::sys::signal::Signal;

use super::suite::find_program;
use super::{daemon, sandbox};

/// Environment variable that is set inside a guest.
const INSIDE: &str = "LBRIDGE_TEST_GUEST";
/// Modules that the lab and the daemon need. Built-in ones are not found, and dependencies are added.
const MODULES: [&str; 7] = ["veth", "bridge", "tcp_diag", "udp_diag", "mptcp_diag", "unix_diag", "inet_diag"];
/// Factor for every time-out in a guest: emulated machines are slow.
const PATIENCE: u32 = 6;
/// Time limit for the whole suite in an emulated machine.
const LIMIT: Duration = Duration::from_secs(1800);

/// Returns true if this process runs in a guest.
pub fn is_inside() -> bool {
    env::var_os(INSIDE).is_some()
}

/// Returns the folder of a kernel, if it was fetched.
pub fn kernel(name: &str) -> Option<PathBuf> {
    let folder = match env::var_os("LBRIDGE_VM_DIR") {
        Some(folder) => PathBuf::from(folder),
        // target/debug/deps/suite-0123
        None => env::current_exe().ok()?.ancestors().nth(3)?.join("vm"),
    };
    Some(folder.join(name)).filter(|folder| folder.join("vmlinuz").is_file())
}

/// The report of a booted machine.
#[derive(Debug)]
pub struct Guest {
    /// The kernel's release.
    pub release: String,
    /// The program's exit status; `None` if it did not end.
    pub status: Option<i32>,
    /// Numbers of tests passed, failed and ignored; `None` if the suite did not report them.
    pub counts: Option<(usize, usize, usize)>,
    /// Everything printed on the console.
    pub console: String,
    /// Time from start to end.
    pub took: Duration,
}

impl Guest {
    /// Boots a kernel, runs the current program in it, and waits until the machine is off.
    pub fn boot(name: &str) -> Result<Guest> {
        let start = Instant::now();
        let kernel = kernel(name).context("no such kernel")?;
        let folder = sandbox::temporary_folder()?;
        let initrd = folder.path().join("initrd");
        let accelerated = has_kvm();
        Initramfs::create(&initrd, folder.path())?.fill(&kernel, accelerated)?;

        let mut qemu = Command::new("qemu-system-x86_64");
        if accelerated {
            qemu.args(["-accel", "kvm", "-cpu", "host"]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
        }
        qemu.args(["-machine", "q35", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.args(["-smp", "2", "-m", "2048", "-serial", "stdio"]);
        qemu.arg("-kernel").arg(kernel.join("vmlinuz")).arg("-initrd").arg(&initrd);
        qemu.args(["-append", "console=ttyS0 quiet panic=-1 reboot=t"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: prctl is a plain system call.
        unsafe {
            qemu.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let mut machine = qemu.spawn().context("start qemu")?;
        let console = read_on_a_thread(machine.stdout.take());
        let complaints = read_on_a_thread(machine.stderr.take());
        while machine.try_wait()?.is_none() {
            if start.elapsed() > LIMIT {
                machine.kill()?;
                machine.wait()?;
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        let console = join(console).replace('\r', "") + &join(complaints);
        let value = |name: &str| console.lines().filter_map(|line| line.strip_prefix(name)).next_back();
        Ok(Guest {
            release: value("@RELEASE ").unwrap_or("no kernel that boots").to_owned(),
            status: value("@STATUS ").and_then(|text| text.parse().ok()),
            counts: value("test result: ").and_then(counts),
            took: start.elapsed(),
            console,
        })
    }
}

/// Parses `ok. 57 passed; 0 failed; 3 ignored; …`.
fn counts(result: &str) -> Option<(usize, usize, usize)> {
    let number = |word: &str| -> Option<usize> {
        result.split(word).next()?.trim_end().rsplit([' ', ';']).next()?.parse().ok()
    };
    Some((number("passed")?, number("failed;")?, number("ignored")?))
}

fn read_on_a_thread(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // If reading fails, show what was read before.
            drop(pipe.read_to_end(&mut bytes));
        }
        bytes
    })
}

fn join(thread: thread::JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
}

/// Returns true if KVM works: `/dev/kvm` may exist and be unusable.
fn has_kvm() -> bool {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = processor.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    capable && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// A cpio archive in the `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst).
struct Initramfs<'a> {
    archive: BufWriter<File>,
    folders: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    scratch: &'a Path,
}

impl<'a> Initramfs<'a> {
    fn create(path: &Path, scratch: &'a Path) -> Result<Initramfs<'a>> {
        let archive = BufWriter::new(File::create(path)?);
        Ok(Initramfs { archive, folders: BTreeSet::new(), files: BTreeSet::new(), scratch })
    }

    fn fill(mut self, kernel: &Path, accelerated: bool) -> Result<()> {
        for folder in ["proc", "sys", "dev", "tmp", "run", "root"] {
            self.folder(Path::new(folder))?;
        }
        let busybox = find_program("busybox").context("no busybox")?;
        self.program(&busybox, "bin/busybox")?;
        for applet in ["sh", "sleep", "cat", "mount", "insmod", "echo", "uname", "reboot", "grep"] {
            self.entry(&Path::new("bin").join(applet), 0o120_777, b"busybox")?;
        }
        self.program(&find_program("ip").context("no ip")?, "bin/ip")?;
        self.program(&env::current_exe()?, "suite")?;
        self.program(&daemon::binary()?, "lbridge")?;

        let mut modules = Modules::of(kernel)?;
        for module in MODULES {
            modules.add(module)?;
        }
        let mut script = String::from(
            "#!/bin/sh\n\
             mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
             exec </dev/console >/dev/console 2>&1\n\
             mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t bpf bpf /sys/fs/bpf; mount -t tmpfs tmp /tmp\n\
             echo; echo \"@RELEASE $(uname -r)\"\n",
        );
        for (name, content) in &modules.loaded {
            self.entry(&Path::new("modules").join(name), 0o100_644, content)?;
            writeln!(script, "insmod /modules/{name}")?;
        }
        let log = env::var("LBRIDGE_LOG").unwrap_or_else(|_| "info".to_owned());
        let arguments = env::var("LBRIDGE_VM_ARGUMENTS").unwrap_or_default();
        let patience = if accelerated { 1 } else { PATIENCE };
        write!(
            script,
            "export PATH=/bin HOME=/root LBRIDGE_BIN=/lbridge LBRIDGE_TEST_PATIENCE={patience} {INSIDE}=1\n\
             export LBRIDGE_LOG={log}\n\
             ip link set lo up\n\
             /suite {arguments}; echo \"@STATUS $?\"\n\
             reboot -f\n"
        )?;
        self.entry(Path::new("init"), 0o100_755, script.as_bytes())?;
        self.entry(Path::new("TRAILER!!!"), 0, b"")?;
        self.archive.flush()?;
        Ok(())
    }

    /// Adds a program, without its debug information if that can be removed, and the libraries that it is
    /// linked with.
    fn program(&mut self, path: &Path, to: &str) -> Result<()> {
        let stripped = self.scratch.join("stripped");
        let strip = Command::new("strip").arg("-o").arg(&stripped).arg(path).stderr(Stdio::null()).status();
        let source = if strip.is_ok_and(|status| status.success()) { &stripped } else { path };
        let content = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        self.entry(Path::new(to), 0o100_755, &content)?;
        let libraries = Command::new("ldd").arg(path).output()?;
        for line in String::from_utf8_lossy(&libraries.stdout).lines() {
            // "libc.so.6 => /lib/…/libc.so.6 (0x…)" or "/lib64/ld-linux-x86-64.so.2 (0x…)"
            let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) else { continue };
            let inside = PathBuf::from(library.trim_start_matches('/'));
            if !self.files.contains(&inside) {
                let content = fs::read(library).with_context(|| format!("read {library}"))?;
                self.entry(&inside, 0o100_755, &content)?;
            }
        }
        Ok(())
    }

    fn folder(&mut self, path: &Path) -> Result<()> {
        if path.as_os_str().is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.folders.insert(path.to_owned());
        self.entry(path, 0o040_755, b"")
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        self.files.insert(path.to_owned());
        let name = path.to_str().context("a path that is no text")?;
        let size = u32::try_from(content.len()).context("a file of 4 GiB")?;
        let name_size = u32::try_from(name.len() + 1)?;
        let inode = u32::try_from(self.files.len())?;
        // Magic, then ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        // namesize, check.
        write!(self.archive, "070701")?;
        for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(self.archive, "{field:08X}")?;
        }
        self.archive.write_all(name.as_bytes())?;
        self.archive.write_all(&[0])?;
        pad(&mut self.archive, 110 + name.len() + 1)?;
        self.archive.write_all(content)?;
        pad(&mut self.archive, content.len())?;
        Ok(())
    }
}

fn pad(archive: &mut impl Write, written: usize) -> io::Result<()> {
    archive.write_all(&[0; 3][..(4 - written % 4) % 4])
}

/// The modules of a kernel, each after those that it depends on.
struct Modules {
    all: Vec<PathBuf>,
    seen: BTreeSet<String>,
    loaded: Vec<(String, Vec<u8>)>,
}

impl Modules {
    fn of(kernel: &Path) -> Result<Modules> {
        let mut all = Vec::new();
        let mut folders = vec![kernel.join("modules")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
                let path = entry?.path();
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                } else if path.file_name().is_some_and(|name| name.to_string_lossy().contains(".ko")) {
                    all.push(path);
                }
            }
        }
        ensure!(!all.is_empty(), "no modules under {}", kernel.display());
        Ok(Modules { all, seen: BTreeSet::new(), loaded: Vec::new() })
    }

    fn add(&mut self, name: &str) -> Result<()> {
        let name = name.replace('-', "_");
        if !self.seen.insert(name.clone()) {
            return Ok(());
        }
        let is_it = |path: &&PathBuf| {
            let file = path.file_name().unwrap_or_default().to_string_lossy().replace('-', "_");
            file.strip_prefix(&name).is_some_and(|rest| rest.starts_with(".ko"))
        };
        // Built in, or unknown to this kernel.
        let Some(path) = self.all.iter().find(is_it).cloned() else { return Ok(()) };
        let content = match path.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => decompressed("xz", &path)?,
            Some("zst") => decompressed("zstd", &path)?,
            _ => fs::read(&path)?,
        };
        let depends =
            content.windows(9).position(|bytes| bytes == b"\0depends=").map(|at| &content[at + 9..]);
        let depends = depends.and_then(|rest| rest.split(|&byte| byte == 0).next()).unwrap_or_default();
        for dependency in String::from_utf8_lossy(depends).split(',').filter(|name| !name.is_empty()) {
            self.add(dependency)?;
        }
        self.loaded.push((format!("{name}.ko"), content));
        Ok(())
    }
}

fn decompressed(program: &str, path: &Path) -> Result<Vec<u8>> {
    let output =
        Command::new(program).args(["-d", "-c"]).arg(path).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} {}", path.display());
    Ok(output.stdout)
}

//! Processes: reads names, command lines and the systemd units they belong to from /proc.

use std::fs;

/// A systemd service unit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unit {
    /// The unit's full name, such as `ollama.service`.
    pub name: String,
    /// True if the unit belongs to a user's service manager (`user@UID.service`), not to the system's.
    pub of_user: bool,
}

/// Returns the systemd service that a process belongs to; `None` for a container's process and for a process
/// that belongs to no service.
pub fn unit(pid: u32) -> Option<Unit> {
    unit_in(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

/// Finds the service in the text of /proc/PID/cgroup. systemd's own hierarchy (`name=systemd`) decides where
/// it names an owner, otherwise cgroup2.
fn unit_in(cgroups: &str) -> Option<Unit> {
    let path = |controllers: &str| {
        let rest = cgroups.lines().filter_map(|line| line.split_once(':').map(|(_, rest)| rest));
        rest.filter_map(|rest| rest.split_once(':'))
            .find(|(its, _)| *its == controllers)
            .map(|(_, path)| path)
    };
    match ["name=systemd", ""].into_iter().filter_map(path).find_map(owner)? {
        Owner::Service(unit) => Some(unit),
        Owner::Other => None,
    }
}

/// The owner of a cgroup.
enum Owner {
    Service(Unit),
    /// A container, a session or a user's service manager.
    Other,
}

/// Derives the owner from a cgroup's path; `None` if no folder of the path names one.
fn owner(path: &str) -> Option<Owner> {
    let is_manager = |name: &str| name.starts_with("user@");
    let mut name = None;
    let mut of_user = false;
    for folder in path.split('/') {
        match folder.rsplit_once('.') {
            Some((_, "service")) => {
                of_user |= name.is_some_and(is_manager);
                name = Some(folder);
            }
            Some((_, "scope")) => return Some(Owner::Other),
            _ if folder.starts_with("docker") => return Some(Owner::Other),
            _ => {}
        }
    }
    let name = name?;
    if is_manager(name) {
        return Some(Owner::Other);
    }
    Some(Owner::Service(Unit { name: name.to_owned(), of_user }))
}

/// Returns the name of a process (/proc/PID/comm); `None` if it cannot be read.
pub fn name(pid: u32) -> Option<String> {
    // The user who runs the process chooses these bytes; they need not be UTF-8.
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).into_owned())
}

/// Returns the number of another process that has the same name as this one and holds one of these eBPF
/// programs open; `ids` are the programs' ids. Finds only processes that this one may inspect.
pub fn with_program(ids: &[u32]) -> Option<u32> {
    let own = std::process::id();
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.find(|pid| *pid != own && name(*pid) == name(own) && has_program(*pid, ids))
}

fn has_program(pid: u32, ids: &[u32]) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let programs = files.filter(|file| {
        fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == "anon_inode:bpf-prog")
    });
    let id = |file: fs::DirEntry| -> Option<u32> {
        let info = format!("/proc/{pid}/fdinfo/{}", file.file_name().to_str()?);
        let info = fs::read_to_string(info).ok()?;
        info.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok())
    };
    programs.filter_map(id).any(|id| ids.contains(&id))
}

/// A process with a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process number (PID).
    pub pid: u32,
    /// Process number of the parent.
    pub parent: u32,
    /// The words of the command line; bytes that are not UTF-8 are replaced.
    pub words: Vec<String>,
}

/// Lists the processes in this process's network namespace that have a command line. Processes that this one
/// may not inspect are left out.
pub fn all() -> Vec<Process> {
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let own = fs::read_link("/proc/self/ns/net").ok();
    let here = |pid: &u32| fs::read_link(format!("/proc/{pid}/ns/net")).ok() == own;
    numbers.filter(here).filter_map(process).collect()
}

fn process(pid: u32) -> Option<Process> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = line.strip_suffix(&[0]).filter(|line| !line.is_empty())?;
    let words = line.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())?;
    Some(Process { pid, parent, words })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_told_from_cgroups() {
        let unit = |cgroups: &str| unit_in(cgroups).map(|unit| (unit.name, unit.of_user));
        let named = |name: &str, of_user| Some((name.to_owned(), of_user));
        assert_eq!(unit("0::/system.slice/ollama.service\n"), named("ollama.service", false));
        assert_eq!(unit("0::/system.slice/a.service/worker\n"), named("a.service", false));
        assert_eq!(
            unit("0::/user.slice/user-1000.slice/user@1000.service/app.slice/b.service\n"),
            named("b.service", true)
        );
        assert_eq!(
            unit("4:pids:/x\n1:name=systemd:/\n0::/system.slice/d.service\n"),
            named("d.service", false)
        );
        // Hybrid hierarchy: the controllers' hierarchies name something else.
        assert_eq!(
            unit("5:cpu:/\n1:name=systemd:/system.slice/c.service\n0::/\n"),
            named("c.service", false)
        );
        for none in [
            "0::/\n",
            "0::/user.slice/user-0.slice/session-1.scope\n",
            "0::/user.slice/user-1000.slice/user@1000.service/init.scope\n",
            "0::/user.slice/user-1000.slice/user@1000.service\n",
            "0::/system.slice/docker-0123.scope\n",
            "0::/docker/0123/system.slice/inside.service\n",
            "1:name=systemd:/docker/0123\n0::/system.slice/containerd.service\n",
            "",
        ] {
            assert_eq!(unit(none), None, "{none}");
        }
    }

    #[test]
    fn processes_are_found() {
        let own = std::process::id();
        let found = all().into_iter().find(|process| process.pid == own).unwrap();
        assert_eq!(found.words, std::env::args().collect::<Vec<_>>());
        assert_eq!(found.parent, std::os::unix::process::parent_id());
        assert!(name(own).is_some());
    }
}

//! Loader: loads what this kernel accepts, and adopts or attaches it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::Path,
};

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, MapInfo},
    programs::Program,
};
use lbridge_common::symbols;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::{
    hooks::Hooks,
    links::Link,
    maps::{Events, Guests, Maps, Sources},
    object,
    pins::{self, LISTENERS_LINK, PINNED_MAPS, Pins, STEER_LINK},
    strays::{self, Search},
};
use crate::planning::{
    hooks::{HookSet, PerHookSet},
    inventory::{KernelFeatures, Steering},
};

/// Returns the programs of a set; a pin has the name of its program.
const fn programs_of(set: HookSet) -> &'static [&'static str] {
    match set {
        HookSet::Names => &[symbols::PEERNAME4, symbols::PEERNAME6, symbols::SOCKNAME4, symbols::SOCKNAME6],
        HookSet::Connect => &[symbols::CONNECT4, symbols::CONNECT6],
        HookSet::Replies => &[symbols::REPLY4, symbols::REPLY6],
    }
}

/// The kernel half, loaded and attached.
#[derive(Debug)]
pub struct Kernel {
    /// Typed access to the maps.
    pub maps: Maps,
    object: Ebpf,
    pins: Pins,
    hooks: Hooks,
    /// Programs that are always attached, of those that the kernel accepts, each with the name of its pin.
    /// Listeners come first: a rule must not miss one.
    programs: Vec<(&'static str, &'static str)>,
    /// Links of the attached programs, by the name of their pin.
    links: BTreeMap<&'static str, Link>,
    /// The pinned maps. A map that no program uses would be gone with its pin.
    pinned: Vec<(&'static str, MapData)>,
    /// The search for strays; `None` until this version's rules are in force.
    strays: Option<Search>,
    host: strays::Host,
    /// The reason last logged why something could not be pinned; `None` if all is pinned.
    unpinned: Option<String>,
}

/// Result of [`Kernel::load`].
#[derive(Debug)]
pub struct Loaded {
    /// The kernel half; `None` if this kernel accepts nothing of it.
    pub kernel: Option<Kernel>,
    /// Events of listeners, which wake the daemon; `None` if the kernel half reports none.
    pub events: Option<Events>,
    /// The map of network namespaces whose localhost leads to the host; `None` without a kernel half.
    pub guests: Option<Guests>,
    /// The map of the addresses that may use the entries that are not for all; `None` without a kernel half.
    pub sources: Option<Sources>,
    /// Capabilities of this kernel, with the reason for each that it lacks.
    pub features: KernelFeatures,
}

impl Kernel {
    /// Loads the object, adopts what is pinned below `bpffs`, and attaches the programs. A kernel without the
    /// hooks is no error: the features say so, and why. A host that is not set up (no bpffs, no cgroup2, no
    /// privilege, another daemon) is an error.
    ///
    /// `netns` is the host's network namespace, `cookie` its cookie if the kernel reports it.
    pub fn load(bpffs: &Path, cgroup: &Path, netns: File, cookie: Option<u64>) -> anyhow::Result<Loaded> {
        let cgroup = open_cgroup(cgroup)?;
        let host = strays::Host::new(&netns, cookie)?;
        let pins = Pins::open(bpffs)?;
        raise_memlock();
        let bytes = object::bytes()?;
        let hooks = Hooks { netns, cgroup };
        if hooks.is_of_another_netns(&pins.link(STEER_LINK))? {
            // Its listeners belong to that namespace: connections would be assigned to them, and hang.
            tracing::warn!(
                path = %bpffs.display(),
                "pinned programs serve another network namespace; setting everything up anew"
            );
            pins.clear()?;
        }
        pins.discard_incompatible(&object::shapes(&bytes)?)?;

        let host_netns = cookie.unwrap_or(0);
        let mut loader = EbpfLoader::new();
        loader.override_global(symbols::HOST_NETNS, &host_netns, true);
        let paths = PINNED_MAPS.map(|name| (name, pins.map(name)));
        for (name, path) in &paths {
            loader.map_pin_path(name, path.as_path());
        }
        let mut object = match loader.load(&bytes) {
            Ok(object) => object,
            Err(error) => return abandon(&pins, host, &error_chain(&error)),
        };
        #[cfg(feature = "bpf-log")]
        follow_log(&mut object);

        let Programs { steer, listeners, hooks: tried } = Programs::load(&mut object, cookie);
        let mut programs = vec![];
        for (program, link) in [(&listeners, LISTENERS_LINK), (&steer, STEER_LINK)] {
            match program {
                Ok(program) => programs.push((*program, link)),
                Err(_) => pins::remove(&pins.link(link))?,
            }
        }
        let steering = steering(&steer, &listeners);
        let ((maps, sources), events) = (Maps::take(&mut object)?, Events::take(&mut object)?);
        let guests = Some(Guests::take(&mut object)?);
        maps.peers.clear()?;
        let pinned = paths.iter().map(|(name, path)| Ok((*name, MapData::from_pin(path)?)));
        let pinned = pinned.collect::<anyhow::Result<_>>().context("cannot open the pinned maps")?;
        let mut kernel = Self {
            maps,
            object,
            pins,
            hooks,
            programs,
            links: BTreeMap::new(),
            pinned,
            strays: None,
            host,
            unpinned: None,
        };
        kernel.attach()?;
        for (set, tried) in tried.iter() {
            // An earlier daemon has pinned them: the programs under the links are to be this version's.
            if programs_of(set).iter().any(|hook| kernel.pins.link(hook).exists()) {
                match tried {
                    Ok(()) => kernel.attach_hooks(set)?,
                    Err(_) => kernel.detach_hooks(set)?,
                }
            }
        }
        kernel.pin()?;
        let events = listeners.is_ok().then_some(events);
        let features = KernelFeatures { steer: steering, hooks: tried };
        Ok(Loaded { kernel: Some(kernel), events, guests, sources: Some(sources), features })
    }

    /// Attaches the programs that are always attached, or puts this version's under the links.
    pub fn attach(&mut self) -> anyhow::Result<()> {
        for (program, link) in self.programs.clone() {
            self.attach_one(program, link).with_context(|| format!("failed to attach the {link} program"))?;
        }
        Ok(())
    }

    fn attach_one(&mut self, name: &'static str, link: &'static str) -> anyhow::Result<()> {
        let (program, pin) = (program(&self.object, name)?, self.pins.link(link));
        let attached = self.hooks.attach(program, name, self.links.remove(link), &pin)?;
        if let Err(error) = pins::keep_link(&attached, &pin) {
            // It serves all the same; the next `keep_pinned` logs the failure if it still cannot be pinned.
            tracing::debug!(program = name, error = format!("{error:#}"), "could not pin a link");
        }
        self.links.insert(link, attached);
        Ok(())
    }

    /// Returns true if everything that is always attached is so, as the kernel reports of its links.
    pub fn attached(&self) -> bool {
        self.programs.iter().all(|(program, link)| self.runs(program, link))
    }

    /// Returns true if that link is attached to this host, with that program under it.
    fn runs(&self, name: &str, link: &str) -> bool {
        let Some(link) = self.links.get(link) else { return false };
        let runs = program(&self.object, name).and_then(|program| self.hooks.runs(program, link));
        runs.unwrap_or_else(|error| {
            tracing::warn!(
                program = name,
                error = format!("{error:#}"),
                "could not read the state of a link"
            );
            false
        })
    }

    /// Attaches the hooks of a set, all or none.
    pub fn attach_hooks(&mut self, set: HookSet) -> anyhow::Result<()> {
        for hook in programs_of(set) {
            if let Err(error) = self.attach_one(hook, hook) {
                self.detach_hooks(set)?;
                return Err(error.context(format!("failed to attach the {hook} program")));
            }
        }
        Ok(())
    }

    /// Detaches the hooks of a set, and removes their pins.
    pub fn detach_hooks(&mut self, set: HookSet) -> anyhow::Result<()> {
        for hook in programs_of(set) {
            // The pin may lead to another link by now.
            if let Some(Err(error)) = self.links.remove(hook).map(|link| link.detach()) {
                tracing::debug!(program = hook, %error, "could not detach a link; it ends when it is closed");
            }
            pins::remove(&self.pins.link(hook))?;
        }
        Ok(())
    }

    /// Returns true if all hooks of a set are attached, as the kernel reports of their links.
    pub fn hooks_attached(&self, set: HookSet) -> bool {
        programs_of(set).iter().all(|hook| self.runs(hook, hook))
    }

    /// Pins again what somebody has unpinned, so that it outlives this process. What cannot be pinned serves
    /// until this process ends; that is logged when it begins, when its reason changes, and when it ends.
    pub fn keep_pinned(&mut self) {
        let failed = self.pin().err().map(|error| format!("{error:#}"));
        match &failed {
            Some(why) if failed != self.unpinned => {
                tracing::warn!(
                    error = why,
                    "could not pin the programs and maps; they will end with the daemon"
                );
            }
            None if self.unpinned.is_some() => tracing::info!("programs and maps are pinned again"),
            _ => {}
        }
        self.unpinned = failed;
    }

    fn pin(&mut self) -> anyhow::Result<()> {
        self.pins.keep()?;
        for (name, map) in &self.pinned {
            let (pin, id) = (self.pins.map(name), map.info()?.id());
            if !MapInfo::from_pin(&pin).is_ok_and(|there| there.id() == id) {
                pins::unlink(&pin)?;
                map.pin(&pin).with_context(|| format!("cannot pin {}", pin.display()))?;
            }
        }
        self.links.iter().try_for_each(|(link, attached)| pins::keep_link(attached, &self.pins.link(link)))
    }

    /// Removes what another version pinned, and detaches what no pin names. Call this once this version's
    /// rules are in force.
    pub fn retire_others(&mut self) -> anyhow::Result<()> {
        self.pins.remove_other_versions()?;
        self.strays = Some(Search::new(self.host));
        self.end_strays();
        Ok(())
    }

    /// Detaches what is attached to this host though no pin of this daemon names it. Does nothing before
    /// [`Kernel::retire_others`].
    pub fn end_strays(&mut self) {
        let Some(search) = &mut self.strays else { return };
        let own: Option<BTreeSet<u32>> = self.links.values().map(|link| Some(link.info().ok()?.id)).collect();
        // Without the ids of its own links it would detach those, too.
        let Some(own) = own else { return };
        search.end_strays(&own);
    }
}

/// For each hook, the program that the kernel accepts, loaded and not attached; or why it accepts none.
pub(super) struct Programs {
    pub(super) steer: Result<&'static str, String>,
    pub(super) listeners: Result<&'static str, String>,
    pub(super) hooks: PerHookSet<Result<(), String>>,
}

impl Programs {
    /// Loads the programs. Each is useful without the others, except that steering and names depend on
    /// listeners.
    pub(super) fn load(object: &mut Ebpf, cookie: Option<u64>) -> Self {
        let steer = load_first(object, &[symbols::STEER, symbols::STEER_ANY_INTERFACE]);
        // Without the namespace's cookie the kernel program could not tell the host's listeners from a
        // container's.
        let registering: &[&'static str] =
            if cookie.is_some() { &[symbols::REGISTER, symbols::ANNOUNCE] } else { &[symbols::ANNOUNCE] };
        let listeners = load_first(object, registering);
        let steer = listeners.clone().and(steer);
        let hooks = PerHookSet::from_fn(|set| match (set, cookie) {
            // The kernel reports from Linux 5.14 on which namespace is the host's.
            (HookSet::Connect, None) => {
                Err("localhost needs Linux 5.14, which reports cookies of network namespaces".to_owned())
            }
            (HookSet::Replies, None) => {
                Err("the kernel does not report the cookie of a network namespace".to_owned())
            }
            _ => programs_of(set).iter().try_for_each(|program| load(object, program)),
        });
        let mut programs = Self { steer, listeners, hooks };
        programs.hooks[HookSet::Names] =
            programs.listeners.clone().and(programs.hooks[HookSet::Names].clone());
        programs
    }
}

/// Returns how these programs steer, or why they cannot.
pub(super) fn steering(
    steer: &Result<&'static str, String>,
    listeners: &Result<&'static str, String>,
) -> Result<Steering, String> {
    steer.clone().map(|steer| Steering {
        interface_check: steer == symbols::STEER,
        kernel_registers: *listeners == Ok(symbols::REGISTER),
    })
}

/// Detaches what an earlier daemon has left: nobody could change it any more, and `deny` would have no
/// effect.
fn abandon(pins: &Pins, host: strays::Host, why: &str) -> anyhow::Result<Loaded> {
    let hooks = HookSet::ALL.into_iter().flat_map(programs_of);
    for link in [STEER_LINK, LISTENERS_LINK].iter().chain(hooks) {
        pins::remove(&pins.link(link))?;
    }
    // What another version has pinned must not serve any longer, either.
    pins.remove_other_versions()?;
    Search::new(host).end_strays(&BTreeSet::new());
    Ok(Loaded::nothing(why))
}

impl Loaded {
    /// Returns the result for a host that cannot have a kernel half.
    fn nothing(why: &str) -> Self {
        let features = KernelFeatures {
            steer: Err(why.to_owned()),
            hooks: PerHookSet::from_fn(|_| Err(why.to_owned())),
        };
        Self { kernel: None, events: None, guests: None, sources: None, features }
    }
}

pub(super) fn open_cgroup(path: &Path) -> anyhow::Result<File> {
    use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
    let is_cgroup2 = statfs(path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    anyhow::ensure!(
        is_cgroup2,
        "{} is not on a cgroup2 file system; give its mount point with --cgroup, or mount one: mount -t \
         cgroup2 none DIR",
        path.display()
    );
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn program<'a>(object: &'a Ebpf, name: &str) -> anyhow::Result<&'a Program> {
    object.program(name).with_context(|| format!("the eBPF object has no program {name}"))
}

pub(super) fn program_mut<'a>(object: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Program> {
    object.program_mut(name).with_context(|| format!("the eBPF object has no program {name}"))
}

/// Loads the first program of `candidates` that the kernel accepts. If it accepts none, says why it refused
/// the last.
fn load_first(object: &mut Ebpf, candidates: &[&'static str]) -> Result<&'static str, String> {
    let mut refused = String::new();
    for candidate in candidates {
        match load(object, candidate) {
            Ok(()) => return Ok(candidate),
            Err(why) => {
                tracing::debug!(program = candidate, error = why, "program is unusable here");
                refused = why;
            }
        }
    }
    Err(refused)
}

fn load(object: &mut Ebpf, name: &str) -> Result<(), String> {
    let program = program_mut(object, name).map_err(|error| error.to_string())?;
    let loaded = match program {
        Program::SkLookup(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => return Err(format!("{name} is of an unknown program type")),
    };
    loaded.map_err(|error| {
        tracing::debug!(program = name, error = error_chain(&error), "kernel refused a program");
        format!("the kernel refuses the {name} program: {}", complaint(&error_chain(&error)))
    })
}

/// Returns the verifier's complaint: the last line of its log before the statistics, or of the text if there
/// is no log.
fn complaint(text: &str) -> &str {
    let statistics = ["verification time", "stack depth", "processed "];
    let is_complaint = |line: &&str| !line.is_empty() && !statistics.iter().any(|s| line.starts_with(s));
    let log =
        statistics.iter().filter_map(|s| text.find(&format!("\n{s}"))).min().map_or(text, |end| &text[..end]);
    log.lines().map(str::trim).rfind(is_complaint).unwrap_or(text)
}

pub(super) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += ": ";
        text += &error.to_string();
        source = error.source();
    }
    text
}

/// Raises the limit on locked memory. Maps count against it before Linux 5.11; later it has no effect.
pub(super) fn raise_memlock() {
    let unlimited = Rlimit { current: None, maximum: None };
    if let Err(error) = setrlimit(Resource::Memlock, unlimited) {
        tracing::debug!(%error, "could not raise RLIMIT_MEMLOCK");
    }
}

/// Follows the log of a debug object; other objects do not log.
#[cfg(feature = "bpf-log")]
fn follow_log(object: &mut Ebpf) {
    use tokio::io::{Interest, unix::AsyncFd};

    let logger = aya_log::EbpfLogger::init(object).map_err(anyhow::Error::from);
    let polled = logger.and_then(|logger| {
        // SAFETY: the logger's descriptor stays the one that it is for as long as it lives.
        let polled = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        Ok(polled.map_err(std::io::Error::from)?)
    });
    match polled {
        Err(error) => tracing::debug!(error = format!("{error:#}"), "eBPF object does not log"),
        Ok(mut logger) => {
            tokio::spawn(async move {
                while let Ok(mut ready) = logger.readable_mut().await {
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::complaint;

    #[test]
    fn the_verifiers_complaint_is_found() {
        let log = "load failed: 0: R1=ctx() R10=fp0\n; let x\nback-edge from insn 302 to 303\n\n\
                   verification time 12 usec\nstack depth 368\nprocessed 0 insns (limit 1000000)\n\
                   : Invalid argument (os error 22)";
        assert_eq!(complaint(log), "back-edge from insn 302 to 303");
        assert_eq!(
            complaint("`bpf_prog_load` failed: Operation not permitted"),
            "`bpf_prog_load` failed: Operation not permitted"
        );
    }
}

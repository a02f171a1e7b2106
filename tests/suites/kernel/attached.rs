//! Tests of what stays attached, whatever becomes of the pins: links that somebody detaches come back, and no
//! program of an earlier daemon goes on to serve what was denied since.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::links::{self, Hook, Link, Program};
use lbridge_tests::harness::scene::{Scene, V4};
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::harness::udp::{self, Echo};
use lbridge_tests::harness::{client, kernel, patience, pins, sandbox};
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        links_detached_under_the_daemon_come_back,
        programs_replaced_under_the_daemon_come_back,
        pins_removed_under_the_daemon_come_back,
        a_folder_that_is_renamed_comes_back,
        nothing_of_a_renamed_folder_outlives_the_next_daemon,
        nothing_of_another_folder_outlives_the_next_daemon,
        what_is_unpinned_ends_while_the_daemon_runs,
        what_cannot_be_attached_again_is_told,
        pins_that_cannot_be_made_again_are_told,
        daemons_of_two_hosts_leave_each_other_alone,
        a_second_daemon_of_one_host_is_refused,
        programs_of_others_are_left_alone,
    ]
}

/// Every name that a program of lbridge has in the kernel, which cuts them off after 15 bytes.
const NAMES: [&str; 12] = [
    "steer",
    "steer_any_inter",
    "register",
    "announce",
    "peername4",
    "peername6",
    "sockname4",
    "sockname6",
    "redirect4",
    "redirect6",
    "reply4",
    "reply6",
];

/// A scene with rules that need every hook of this kernel.
struct Everything {
    scene: Scene,
    _service: Service,
    _dns: Echo,
    /// A process inside, which is how the container's namespace is found.
    occupant: Child,
}

impl Drop for Everything {
    fn drop(&mut self) {
        drop(self.occupant.kill());
        drop(self.occupant.wait());
    }
}

impl Everything {
    fn new(options: Options) -> Result<Everything> {
        let scene = Scene::with(V4, options)?;
        let occupant = scene.container.command("sleep").arg("1000000").spawn()?;
        let everything = Everything {
            _service: scene.service("service", "127.0.0.1:8080")?,
            _dns: Echo::start(scene.lab.host(), "dns", "127.0.0.1:53")?,
            occupant,
            scene,
        };
        everything.allow()?;
        everything.served()?;
        Ok(everything)
    }

    fn localhost() -> bool {
        kernel::version() >= (5, 14)
    }

    fn udp() -> bool {
        kernel::has_ingress_ifindex()
    }

    fn allow(&self) -> Result<()> {
        self.scene.allow(if Self::localhost() { &["8080", "--localhost"] } else { &["8080"] })?;
        self.scene.allow(&["81=8080", "--source", "loopback"])?;
        self.scene.allow(&["82=8082"])?;
        if Self::udp() {
            self.scene.allow(&["53/udp"])?;
        }
        Ok(())
    }

    fn deny(&self) -> Result<()> {
        self.scene.deny(&["8080", "81", "82"])?;
        if Self::udp() { self.scene.deny(&["53/udp"]) } else { Ok(()) }
    }

    /// Every hook does its work, after one look of the daemon at most.
    fn served(&self) -> Result<()> {
        let scene = &self.scene;
        scene.must_be(8080, "steered")?;
        scene.served(8080, "service").context("steer")?;
        let greeting = scene.served(81, "service")?;
        ensure!(
            greeting.accept.ip().is_loopback() && greeting.peer.ip().is_loopback(),
            "names: {greeting:?}"
        );
        if Self::localhost() {
            let localhost = "127.0.0.1:8080".parse()?;
            patience::until("localhost leads to the host", || {
                Ok(client::served_by(&scene.container, localhost, "service").ok())
            })
            .context("connect")?;
        }
        if Self::udp() {
            udp::served_by(&scene.container, scene.container_ip, scene.gateway(53), "dns")
                .context("replies")?;
        }
        // A listener that comes now is registered.
        let late = scene.service("late", "127.0.0.1:8082")?;
        scene.soon_served(82, "late").context("listeners")?;
        late.stop();
        Ok(())
    }

    fn refused(&self) -> Result<()> {
        self.scene.refused(8080)?;
        self.scene.refused(81)?;
        if Self::localhost() {
            client::refused(&self.scene.container, "127.0.0.1:8080".parse()?)?;
        }
        if Self::udp() {
            udp::refused(&self.scene.container, self.scene.gateway(53))?;
        }
        Ok(())
    }

    /// Programs of lbridge that are attached to this host.
    fn attached(&self) -> Result<BTreeSet<u32>> {
        links::attached(&NAMES, self.scene.lab.host(), Path::new(sandbox::CGROUP_ROOT))
    }

    /// The ids of the links that are pinned.
    fn pinned(&self) -> Result<BTreeSet<u32>> {
        pinned(&self.scene.daemon)?.iter().map(|link| Ok(Link::pinned(link)?.info()?.id)).collect()
    }
}

/// The links that a daemon has pinned.
fn pinned(daemon: &Daemon) -> Result<Vec<PathBuf>> {
    let is_link = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("link_"))
    };
    let links: Vec<_> = pins::files(daemon.bpffs())?.into_iter().filter(is_link).collect();
    ensure!(links.len() >= 2, "pinned: {links:?}");
    Ok(links)
}

fn options(bpffs: &str) -> Options {
    Options { bpffs: Path::new(sandbox::BPFFS).join(bpffs), ..Options::default() }
}

/// `bpftool link detach`, of each hook: the pin stays, but nothing runs any more.
fn links_detached_under_the_daemon_come_back() -> Result<()> {
    let everything = Everything::new(Options::default())?;
    let daemon = &everything.scene.daemon;
    for pin in pinned(daemon)? {
        Link::pinned(&pin)?.detach()?;
        everything.served().with_context(|| format!("{} was detached", pin.display()))?;
        ensure!(Link::pinned(&pin)?.info()?.is_attached(), "{} is attached", pin.display());
    }
    // All at once.
    for pin in pinned(daemon)? {
        Link::pinned(&pin)?.detach()?;
    }
    everything.served()?;
    ensure!(everything.attached()? == everything.pinned()?, "each once");
    everything.deny()?;
    everything.refused()
}

/// The link is where it was, with a program of somebody's under it.
fn programs_replaced_under_the_daemon_come_back() -> Result<()> {
    let everything = Everything::new(Options::default())?;
    for (name, hook) in [("link_steer", Hook::SkLookup), ("link_listeners", Hook::SockOps)] {
        let pins = pinned(&everything.scene.daemon)?;
        let pin = pins.iter().find(|pin| pin.ends_with(name)).context("a pin")?;
        let (link, program) = (Link::pinned(pin)?, Program::load("other", hook)?);
        let before = link.info()?;
        link.replace(&program)?;
        ensure!(link.info()?.program != before.program, "{name} is replaced");
        everything.served().with_context(|| name.to_owned())?;
        ensure!(link.info()? == before, "{name} is as it was");
    }
    Ok(())
}

/// A pin, the folder of the version, all folders: what is in force goes on, and is pinned again.
fn pins_removed_under_the_daemon_come_back() -> Result<()> {
    let mut everything = Everything::new(Options::default())?;
    let root = everything.scene.daemon.bpffs().to_owned();
    let (files, before) = (pins::files(&root)?, everything.pinned()?);
    let version = files[0].parent().context("a folder")?.to_owned();
    let mut connection = client::connect(&everything.scene.container, everything.scene.gateway(8080))?;
    for path in files.iter().chain([&version, &root]) {
        if path.is_dir() {
            fs::remove_dir_all(path)?;
        } else {
            fs::remove_file(path)?;
        }
        // Before the daemon has looked, too.
        everything.scene.served(8080, "service")?;
        everything.scene.must_be(8080, "steered")?;
        ensure!(pins::files(&root)? == files, "pinned again without {}", path.display());
        ensure!(everything.pinned()? == before, "the same links, without {}", path.display());
    }
    // They are of use: the next daemon adopts them.
    everything.scene.daemon.kill9()?;
    everything.scene.daemon.restart()?;
    ensure!(everything.pinned()? == before && everything.attached()? == before, "adopted");
    connection.echo(b"it does not notice")?;
    everything.served()?;
    everything.deny()?;
    everything.refused()
}

fn a_folder_that_is_renamed_comes_back() -> Result<()> {
    let mut everything = Everything::new(Options::default())?;
    let root = everything.scene.daemon.bpffs().to_owned();
    let (files, before) = (pins::files(&root)?, everything.pinned()?);
    fs::rename(&root, root.with_file_name("renamed"))?;
    everything.served()?;
    ensure!(pins::files(&root)? == files && everything.pinned()? == before, "pinned where they were");
    ensure!(everything.attached()? == before, "each once");
    everything.deny()?;
    everything.refused()?;
    everything.allow()?;
    // Nor does the other folder serve anything that the next daemon denies.
    everything.scene.daemon.kill9()?;
    everything.scene.daemon.restart()?;
    everything.served()?;
    everything.deny()?;
    everything.refused()
}

/// Nobody had a look in between: the folder is gone with all that it keeps attached.
fn nothing_of_a_renamed_folder_outlives_the_next_daemon() -> Result<()> {
    let mut everything = Everything::new(Options::default())?;
    let root = everything.scene.daemon.bpffs().to_owned();
    let before = everything.attached()?;
    everything.scene.daemon.kill9()?;
    fs::rename(&root, root.with_file_name("renamed"))?;
    everything.scene.daemon.restart()?;
    let now = everything.attached()?;
    ensure!(now == everything.pinned()?, "what is attached is pinned: {now:?}");
    ensure!(now.is_disjoint(&before), "of {before:?} some are left: {now:?}");
    // The log is written by a thread of its own.
    patience::until("each is told", || {
        let told = everything.scene.daemon.log().matches("no pin of this daemon names it").count();
        Ok((told == before.len()).then_some(()))
    })?;
    everything.served()?;
    everything.deny()?;
    everything.refused()
}

fn nothing_of_another_folder_outlives_the_next_daemon() -> Result<()> {
    let mut everything = Everything::new(options("one"))?;
    everything.scene.daemon.terminate()?;
    // Rules of its own: none.
    let other = Daemon::start_with(everything.scene.lab.host(), options("other"))?;
    everything.refused()?;
    let (attached, other_pins) = (everything.attached()?, pinned(&other)?);
    ensure!(attached.len() == other_pins.len(), "{attached:?}, pinned: {other_pins:?}");
    let steer = other_pins.iter().find(|pin| pin.ends_with("link_steer")).context("a pin")?;
    let steer = Link::pinned(steer)?;
    drop(other);
    // Back again: what the first has pinned is there, but attached nowhere.
    everything.scene.daemon.restart()?;
    everything.served()?;
    ensure!(!steer.info()?.is_attached(), "{steer:?}");
    // Without cookies it cannot be told whose the other program is, which serves nobody.
    let told = kernel::version() >= (5, 14);
    ensure!(!told || everything.attached()? == everything.pinned()?, "each once");
    Ok(())
}

/// Attached beside the daemon's own, as a daemon would do that looks for no other.
fn what_is_unpinned_ends_while_the_daemon_runs() -> Result<()> {
    let everything = Everything::new(Options::default())?;
    let cgroup = fs::File::open(sandbox::CGROUP_ROOT)?;
    let before = everything.attached()?;
    for pin in pinned(&everything.scene.daemon)? {
        let again = Link::pinned(&pin)?.attach_again(everything.scene.lab.host(), &cgroup)?;
        everything.served()?;
        ensure!(!again.info()?.is_attached(), "{}: {again:?}", pin.display());
        ensure!(everything.attached()? == before, "the daemon's own stay");
    }
    Ok(())
}

/// The kernel runs 64 `sk_lookup` programs in a namespace at most (`NETNS_BPF_MAX_PROGS`,
/// kernel/bpf/net_namespace.c).
fn what_cannot_be_attached_again_is_told() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let pins = pinned(&scene.daemon)?;
    let steer = pins.iter().find(|pin| pin.ends_with("link_steer")).context("a pin")?;
    let program = Program::load("other", Hook::SkLookup)?;
    let mut others: Vec<Link> = (0..63).map(|_| program.attach(scene.lab.host())).collect::<Result<_>>()?;
    // The daemon may look in between, and be the first to have the place.
    patience::until("there is no room for it", || {
        Link::pinned(steer)?.detach()?;
        Ok(program.attach(scene.lab.host()).ok().map(|last| others.push(last)))
    })?;
    let state = scene.must_be(8080, "blocked")?;
    state.must_be_because("detached")?;
    scene.daemon.wait_for_log("failed to attach the steer program")?;
    scene.refused(8080)?;
    others.into_iter().try_for_each(|other| other.detach())?;
    scene.must_be(8080, "steered")?;
    scene.served(8080, "service").map(drop)
}

/// A link that the daemon holds serves without a pin, and the log says for how long.
fn pins_that_cannot_be_made_again_are_told() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let root = scene.daemon.bpffs();
    fs::rename(root, root.with_file_name("renamed"))?;
    symlink("/nowhere", root)?;
    scene.must_be(8080, "steered")?;
    scene.served(8080, "service")?;
    let log = scene.daemon.log();
    ensure!(
        log.contains("they will end with the daemon") && log.contains(&root.display().to_string()),
        "{log}"
    );
    fs::remove_file(root)?;
    scene.must_be(8080, "steered")?;
    scene.daemon.wait_for_log("pinned again")?;
    scene.deny(&["8080"])?;
    scene.refused(8080)
}

/// Both watch the same cgroup.
fn daemons_of_two_hosts_leave_each_other_alone() -> Result<()> {
    let mut one = Everything::new(options("one"))?;
    let mut two = Everything::new(options("two"))?;
    let both = (one.pinned()?, two.pinned()?);
    ensure!(both.0.is_disjoint(&both.1), "{both:?}");
    for kill in [false, true] {
        for everything in [&mut one, &mut two] {
            if kill {
                everything.scene.daemon.kill9()?;
            }
            everything.scene.daemon.restart()?;
        }
        for everything in [&one, &two] {
            everything.served()?;
            let log = everything.scene.daemon.log();
            ensure!(!log.contains("no pin of this daemon") && !log.contains("adopt"), "{log}");
        }
        ensure!((one.pinned()?, two.pinned()?) == both, "the same links");
    }
    // Whatever one does with its pins.
    let root = one.scene.daemon.bpffs().to_owned();
    one.scene.daemon.kill9()?;
    fs::rename(&root, root.with_file_name("renamed"))?;
    one.scene.daemon.restart()?;
    one.served()?;
    two.served()?;
    ensure!(two.pinned()? == both.1, "the other's are the same");
    one.deny()?;
    one.refused()?;
    two.served()
}

/// Each would end what it does not know.
fn a_second_daemon_of_one_host_is_refused() -> Result<()> {
    let everything = Everything::new(options("one"))?;
    let before = everything.attached()?;
    let mut second = Daemon::prepare(everything.scene.lab.host(), options("two"))?;
    let output = second.start_refused()?;
    let pid = everything.scene.daemon.pid().context("a daemon")?;
    ensure!(output.status == 1, "{output:?}");
    ensure!(output.stderr.contains(&format!("another lbridge daemon (process {pid})")), "{output:?}");
    ensure!(!second.bpffs().exists(), "nothing is made");
    ensure!(everything.attached()? == before, "nothing is changed");
    everything.served()
}

/// A name alone makes nobody's program ours.
fn programs_of_others_are_left_alone() -> Result<()> {
    let lab = lbridge_tests::harness::lab::Lab::new()?;
    let cgroup = fs::File::open(sandbox::CGROUP_ROOT)?;
    let steer = Program::load("steer", Hook::SkLookup)?.attach(lab.host())?;
    let register = Program::load("register", Hook::SockOps)?.attach(&cgroup)?;
    let before = [steer.info()?, register.info()?];
    let daemon = Daemon::start(lab.host())?;
    let later = Program::load("steer_any_inter", Hook::SkLookup)?.attach(lab.host())?;
    let attached = later.info()?;
    daemon.status()?;
    ensure!([steer.info()?, register.info()?] == before && later.info()? == attached, "as they were");
    ensure!(!daemon.log().contains("WARN"), "{}", daemon.log());
    Ok(())
}

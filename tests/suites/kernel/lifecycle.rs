//! The daemon dies, restarts, is upgraded, meets another one; connections and rules in force do not notice.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client::{self, Attempt};
use lbridge_tests::harness::daemon::{Daemon, Options};
use lbridge_tests::harness::pins;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::pattern;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        kill_in_the_middle_of_a_transfer,
        restart_has_no_gap,
        restart_after_kill_has_no_gap,
        restart_adopts_what_is_pinned,
        pins_of_version_3_are_adopted,
        start_takes_listeners_that_run_already,
        changes_while_dead_are_caught_up_with,
        sigterm_leaves_steered_rules_in_force,
        second_daemon_is_refused,
        daemon_starts_where_pins_are_broken,
        links_removed_under_the_daemon_come_back,
    ]
}

/// Bytes of the transfer; the daemon is killed when half are sent.
const TRANSFER: usize = 32 << 20;

fn kill_in_the_middle_of_a_transfer() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let connection = client::connect(&scene.container, scene.gateway(8080))?;
    let (half_way, at_half) = std::sync::mpsc::channel();
    let (go_on, killed) = std::sync::mpsc::channel();
    let mut writer = connection.stream().try_clone()?;
    let sender = thread::spawn(move || -> Result<()> {
        for sent in (0..TRANSFER).step_by(1 << 16) {
            if sent == TRANSFER / 2 {
                half_way.send(())?;
                killed.recv()?;
            }
            writer.write_all(&pattern(sent, 1 << 16)).with_context(|| format!("send at {sent}"))?;
        }
        Ok(writer.shutdown(std::net::Shutdown::Write)?)
    });
    let mut reader = connection.stream().try_clone()?;
    let receiver = thread::spawn(move || -> Result<Vec<u8>> {
        let mut back = Vec::with_capacity(TRANSFER);
        reader.read_to_end(&mut back).with_context(|| format!("after {} bytes", back.len()))?;
        Ok(back)
    });
    at_half.recv()?;
    scene.daemon.kill9()?;
    go_on.send(())?;
    sender.join().map_err(|_| anyhow::anyhow!("the sender"))??;
    let back = receiver.join().map_err(|_| anyhow::anyhow!("the receiver"))??;
    ensure!(back.len() == TRANSFER, "{} of {TRANSFER} bytes came back", back.len());
    ensure!(back == pattern(0, TRANSFER), "the bytes differ");
    // Nobody runs, and new connections are still served, and still only what was allowed.
    for _ in 0..10 {
        scene.served(8080, "service")?;
    }
    scene.refused(8081)?;
    let output = scene.daemon.cli(&["status"])?;
    ensure!(output.status == 3, "no daemon to ask: {output:?}");
    Ok(())
}

/// Connects without a pause while `during` runs and until 1,000 are done; none may be refused.
fn connects_during(scene: &mut Scene, during: impl FnOnce(&mut Daemon) -> Result<()>) -> Result<()> {
    let (done, connects) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (container, gateway) = (scene.container.clone(), scene.gateway(8080));
    let (first, started) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let dialler = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::SeqCst) || connects.load(Ordering::SeqCst) < 1000 {
                let so_far = connects.fetch_add(1, Ordering::SeqCst);
                match client::attempt(&container, gateway) {
                    Attempt::Served(greeting) => ensure!(greeting.service == "service", "{greeting:?}"),
                    other => anyhow::bail!("connect {so_far}: {other:?}"),
                }
                if so_far == 0 {
                    first.send(())?;
                }
            }
            Ok(())
        });
        let begun = started.recv().context("the first connect");
        let outcome = begun.and_then(|()| during(&mut scene.daemon));
        done.store(true, Ordering::SeqCst);
        dialler.join().map_err(|_| anyhow::anyhow!("the dialler"))??;
        outcome
    })?;
    ensure!(connects.load(Ordering::SeqCst) >= 1000);
    Ok(())
}

fn restart_has_no_gap() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    connects_during(&mut scene, |daemon| (0..3).try_for_each(|_| daemon.restart()))?;
    scene.must_be(8080, "steered")?;
    Ok(())
}

fn restart_after_kill_has_no_gap() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    connects_during(&mut scene, |daemon| {
        (0..3).try_for_each(|_| {
            daemon.kill9()?;
            daemon.restart()
        })
    })?;
    scene.must_be(8080, "steered")?;
    Ok(())
}

fn restart_adopts_what_is_pinned() -> Result<()> {
    let mut scene = Scene::new()?;
    let service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.allow(&["8081", "--path", "relay"])?;
    let mut connection = client::connect(&scene.container, scene.gateway(8080))?;
    let files = pins::files(scene.daemon.bpffs())?;
    let entries = pins::entries(scene.daemon.bpffs())?;
    ensure!(!files.is_empty(), "pinned under {}", scene.daemon.bpffs().display());
    for kill in [false, true] {
        if kill {
            scene.daemon.kill9()?;
        }
        scene.daemon.restart()?;
        ensure!(pins::files(scene.daemon.bpffs())? == files, "the same pins, no more and no less");
        ensure!(pins::entries(scene.daemon.bpffs())? == entries, "{entries:?}");
        scene.must_be(8080, "steered")?;
        scene.must_be(8081, "waiting")?;
        scene.served(8080, "service")?;
        connection.echo(b"the connection does not notice")?;
    }
    // The adopted programs still work for the new daemon.
    service.stop();
    scene.refused(8080)?;
    let _service = scene.service("again", "127.0.0.1:8080")?;
    scene.soon_served(8080, "again")?;
    scene.deny(&["8080"])?;
    scene.refused(8080)
}

/// Whatever started before lbridge did, wildcards and groups included.
fn start_takes_listeners_that_run_already() -> Result<()> {
    use lbridge_tests::harness::lab::Lab;
    use lbridge_tests::harness::service::Service;

    let lab = Lab::new()?;
    let _loopback = Service::start(lab.host(), "loopback", "127.0.0.1:8080")?;
    let _wildcard = Service::start(lab.host(), "wildcard", "0.0.0.0:8081")?;
    let bridge = lab.add_bridge("lab0", "10.7.0.1/24")?;
    let container = lab.container(&bridge, "10.7.0.2/24")?;
    let daemon = Daemon::start(lab.host())?;
    daemon.allow(&["bridge:lab0", "8080", "82=8081"])?;
    client::served_by(&container, "10.7.0.1:8080".parse()?, "loopback")?;
    client::served_by(&container, "10.7.0.1:82".parse()?, "wildcard")?;
    Ok(())
}

/// While the daemon is dead the rules file, the listeners and the bridge change.
fn changes_while_dead_are_caught_up_with() -> Result<()> {
    let mut scene = Scene::new()?;
    let one = scene.service("one", "127.0.0.1:8080")?;
    let _two = scene.service("two", "127.0.0.1:8081")?;
    scene.allow(&["8080", "8081", "8082"])?;
    let saved = fs::read(scene.daemon.rules_file())?;
    scene.deny(&["8081"])?;
    scene.daemon.kill9()?;
    one.stop();
    let _three = scene.service("three", "127.0.0.1:8082")?;
    fs::write(scene.daemon.rules_file(), saved)?;
    scene.lab.host().ip("link del lab0")?;
    let bridge = scene.lab.add_bridge("lab0", "10.7.0.1/24")?;
    scene.container = scene.lab.container(&bridge, "10.7.0.2/24")?;
    scene.daemon.restart()?;
    scene.must_be(8080, "waiting")?;
    scene.must_be(8081, "steered")?;
    scene.must_be(8082, "steered")?;
    scene.refused(8080)?;
    scene.served(8081, "two")?;
    scene.served(8082, "three")?;
    Ok(())
}

fn sigterm_leaves_steered_rules_in_force() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let mut connection = client::connect(&scene.container, scene.gateway(8080))?;
    let status = scene.daemon.terminate()?;
    ensure!(status.success(), "SIGTERM is how it is stopped: {status}");
    connection.echo(b"still there")?;
    for _ in 0..10 {
        scene.served(8080, "service")?;
    }
    scene.refused(8081)
}

fn second_daemon_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let pinned = pins::files(scene.daemon.bpffs())?;
    let folder = scene.daemon.socket().parent().context("a folder")?.to_owned();
    let options = Options { folder: Some(folder), ..Options::default() };
    let mut same_paths = Daemon::prepare(scene.lab.host(), options)?;
    let output = same_paths.start_refused()?;
    ensure!(output.status == 1, "{output:?}");
    ensure!(output.stderr.contains("another lbridge"), "says that there is one: {output:?}");
    // Other socket and state, but the same pins: two would undo each other's work.
    let mut same_pins = Daemon::prepare(scene.lab.host(), Options::default())?;
    let output = same_pins.start_refused()?;
    ensure!(output.status == 1, "{output:?}");
    ensure!(output.stderr.contains("another lbridge"), "says that there is one: {output:?}");
    // The first one did not notice.
    ensure!(pins::files(scene.daemon.bpffs())? == pinned);
    scene.must_be(8080, "steered")?;
    scene.served(8080, "service")?;
    Ok(())
}

/// Pins that somebody removed in part: the daemon converges whatever it finds.
fn daemon_starts_where_pins_are_broken() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    let pinned = pins::files(scene.daemon.bpffs())?;
    for path in &pinned {
        scene.daemon.kill9()?;
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
        scene.daemon.restart().with_context(|| format!("start without {}", path.display()))?;
        scene.must_be(8080, "steered").with_context(|| format!("without {}", path.display()))?;
        scene.served(8080, "service").with_context(|| format!("without {}", path.display()))?;
        ensure!(pins::files(scene.daemon.bpffs())? == pinned, "whole again after {}", path.display());
    }
    Ok(())
}

fn links_removed_under_the_daemon_come_back() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    for link in ["link_steer", "link_listeners"] {
        let mut files = pins::files(scene.daemon.bpffs())?.into_iter();
        let path = files.find(|path| path.ends_with(link)).with_context(|| format!("no pin {link}"))?;
        fs::remove_file(&path)?;
        scene.must_be(8080, "steered")?;
        ensure!(path.exists(), "{link} is pinned again");
        scene.served(8080, "service")?;
    }
    Ok(())
}

/// Version 3 had the same maps and links, some under other names. Their contents, and what is stored in open
/// sockets, stay, also if a first start was interrupted.
fn pins_of_version_3_are_adopted() -> Result<()> {
    let mut scene = Scene::new()?;
    let _service = scene.service("service", "127.0.0.1:8080")?;
    scene.allow(&["8080", "--source", "loopback"])?;
    // Pins the connect hooks, too, where the kernel has them (Linux 5.14).
    scene.allow(&["8081=8080", "--localhost"])?;
    let mut open = client::connect(&scene.container, scene.gateway(8080))?;
    connects_during(&mut scene, |daemon| {
        for interrupted in [false, true] {
            let before = pins::ids(daemon.bpffs())?;
            daemon.terminate()?;
            name_as_version_3(daemon.bpffs(), interrupted)?;
            daemon.restart()?;
            ensure!(pins::ids(daemon.bpffs())? == before, "the same maps and links: {before:?}");
            ensure!(!daemon.bpffs().join("v3").exists());
        }
        Ok(())
    })?;
    open.echo(b"the connection does not notice")?;
    scene.must_be(8080, "steered")?;
    scene.deny(&["8080"])?;
    scene.refused(8080)
}

/// Moves the pins to where version 3 had them; half of them, if a start was interrupted as it moved them
/// back.
fn name_as_version_3(bpffs: &Path, interrupted: bool) -> Result<()> {
    const NAMES: [(&str, &str); 8] = [
        ("ENTRIES", "RULES"),
        ("REDIRECT_NETNS", "GUESTS"),
        ("REDIRECTS", "DIALS"),
        ("ORIGINAL_DST", "DIALLED"),
        ("NAME_OVERRIDES", "LOOPBACK_VIEWS"),
        ("REPLY_SOURCES", "REPLIES"),
        ("link_redirect4", "link_dial4"),
        ("link_redirect6", "link_dial6"),
    ];
    let (old, new) = (bpffs.join("v3"), bpffs.join("v4"));
    fs::create_dir(&old)?;
    for (position, pin) in pins::files(&new)?.iter().enumerate() {
        let name = pin.file_name().context("a pin")?.to_string_lossy();
        let then = NAMES.iter().find(|(now, _)| name == *now).map_or(&*name, |(_, then)| *then);
        if !interrupted || position % 2 == 0 {
            fs::rename(pin, old.join(then))?;
        }
    }
    if !interrupted {
        fs::remove_dir(new)?;
    }
    Ok(())
}

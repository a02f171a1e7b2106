//! Localhost inside containers: those that have no way to the host, whatever becomes of them.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::engine::{Container, Engine};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{IMAGE, Scene, WITHOUT_CONTAINERS};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_container_without_network_is_served,
        a_container_on_macvlan_is_served,
        the_service_sees_what_the_engine_says_of_the_container,
        a_container_that_restarts_is_followed,
        a_container_of_the_same_name_is_followed,
        the_beginning_of_an_id_is_not_a_container,
        containers_that_share_a_namespace_share_localhost,
        a_container_in_the_hosts_namespace_is_blocked,
        no_other_container_is_served,
        a_port_that_the_container_listens_on_is_its_own,
        a_container_is_waited_for,
        a_container_of_a_rule_that_is_reloaded_is_served_at_once,
        the_end_of_a_container_resets_its_connections,
        a_container_stays_served_while_the_engine_is_away,
        a_process_number_from_elsewhere_is_not_believed,
        what_was_known_of_an_engine_that_is_away_is_not_believed_for_ever,
    ]
}

const LOCALHOST: &str = "127.0.0.1:8080";

fn localhost() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}

fn named(scene: &Scene, network: &str, name: &str) -> Result<Container> {
    scene.engine.run(network, &["--name", name])
}

/// With the container's own program.
fn asks_localhost(scene: &Scene, container: &Container) -> Result<String> {
    let dial = "echo over and out | timeout 5 nc 127.0.0.1 8080";
    Ok(scene.engine.exec(container, &["sh", "-c", dial])?.stdout)
}

fn must_reach(scene: &Scene, container: &Container, service: &str) -> Result<()> {
    let said = asks_localhost(scene, container)?;
    ensure!(said.contains(service) && said.contains("over and out"), "{said:?}");
    Ok(())
}

fn a_container_without_network_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let alone = named(&scene, "none", "alone")?;
    let _service = scene.service("host's", LOCALHOST)?;
    ensure!(asks_localhost(&scene, &alone)?.is_empty(), "out of reach without a rule");
    let output = scene.daemon.allow(&["container:alone", "8080"])?;
    ensure!(output.stdout.contains("relayed (a namespace's localhost is always relayed)"), "{output:?}");
    must_reach(&scene, &alone, "host's")?;
    // Nothing but that port: there is no way to anywhere.
    scene.refused(&alone, "127.0.0.1:8081".parse()?)?;
    scene.daemon.deny(&["container:alone", "8080"])?;
    ensure!(asks_localhost(&scene, &alone)?.is_empty(), "out of reach again");
    Ok(())
}

fn a_container_of_a_rule_that_is_reloaded_is_served_at_once() -> Result<()> {
    let scene = Scene::new()?;
    let alone = named(&scene, "none", "alone")?;
    let _service = scene.service("host's", LOCALHOST)?;
    let output = scene.reload("[[rule]]\nnetwork = \"container:alone\"\nport = 8080\n")?;
    let told = "added    container:alone 8080: 127.0.0.1:8080 -> 127.0.0.1:8080 relayed";
    ensure!(output.stdout.contains(told), "{output:?}");
    must_reach(&scene, &alone, "host's")?;
    scene.reload("")?;
    ensure!(asks_localhost(&scene, &alone)?.is_empty(), "out of reach again");
    Ok(())
}

fn a_container_on_macvlan_is_served() -> Result<()> {
    let scene = Scene::new()?;
    scene.host.ip("link add uplink type veth peer name lan")?;
    scene.host.ip("link set uplink up")?;
    scene.host.ip("link set lan up")?;
    scene.engine.cli(&[
        "network",
        "create",
        "--driver",
        "macvlan",
        "--subnet",
        "192.0.2.0/24",
        "--opt",
        "parent=uplink",
        "vlan",
    ])?;
    let container = named(&scene, "vlan", "far")?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["vlan", "8080"])?;
    let state = scene.daemon.rule_state("vlan", 8080)?;
    state.must_be_because("driver_without_bridge")?;
    scene.daemon.allow(&["container:far", "8080"])?;
    must_reach(&scene, &container, "host's")?;
    scene.must_be("container:far", 8080, "relayed")
}

fn the_service_sees_what_the_engine_says_of_the_container() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &["--internal"])?;
    let container = named(&scene, "app", "inner")?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:inner", "8080"])?;
    let greeting = scene.served(&container, localhost(), "host's")?;
    ensure!(greeting.accept.ip().to_string() == scene.address(&container, &network)?, "{greeting:?}");
    ensure!(greeting.peer == greeting.accept, "{greeting:?}");

    let alone = named(&scene, "none", "alone")?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    let greeting = scene.served(&alone, localhost(), "host's")?;
    let std::net::IpAddr::V4(ip) = greeting.peer.ip() else { anyhow::bail!("{greeting:?}") };
    ensure!(ip.octets()[0] == 127 && ip.octets()[1] >= 128, "an address that stands for it: {greeting:?}");
    Ok(())
}

fn a_container_that_restarts_is_followed() -> Result<()> {
    let scene = Scene::new()?;
    let container = named(&scene, "none", "alone")?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    for _ in 0..3 {
        must_reach(&scene, &container, "host's")?;
        scene.engine.cli(&["restart", "--time", "0", "alone"])?;
        patience::until("the container is served again", || {
            Ok(asks_localhost(&scene, &container)?.contains("host's").then_some(()))
        })?;
    }
    scene.must_be("container:alone", 8080, "relayed")
}

fn a_container_of_the_same_name_is_followed() -> Result<()> {
    let scene = Scene::new()?;
    let first = named(&scene, "none", "alone")?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    let by_id = format!("container:{}", &first.id[..12]);
    scene.daemon.allow(&[&by_id, "8081=8080"])?;
    scene.engine.cli(&["rename", "alone", "other"])?;
    patience::until("the name is nobody's", || {
        Ok((scene.daemon.rule_state("container:alone", 8080)?.state == "waiting").then_some(()))
    })?;
    scene.refused(&first, localhost())?;
    scene.served(&first, "127.0.0.1:8081".parse()?, "host's")?;
    let second = named(&scene, "none", "alone")?;
    scene.daemon.wait_for_state("container:alone", 8080, "relayed")?;
    must_reach(&scene, &second, "host's")?;
    scene.refused(&first, localhost())
}

/// The engine takes any beginning of an id for a container: two digits are one of 256.
fn the_beginning_of_an_id_is_not_a_container() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", LOCALHOST)?;
    let stranger = named(&scene, "none", "stranger")?;
    let rule = format!("container:{}", &stranger.id[..2]);
    scene.daemon.allow(&[&rule, "8080"])?;
    scene.must_be(&rule, 8080, "waiting")?;
    scene.refused(&stranger, localhost())?;
    // Nor is a container whose name is the beginning of another's id.
    let short = &stranger.id[..12];
    let by_id = format!("container:{short}");
    scene.daemon.allow(&[&by_id, "8080"])?;
    scene.served(&stranger, localhost(), "host's")?;
    let impostor = named(&scene, "none", short)?;
    patience::until("the engine's answer is another", || {
        Ok((scene.daemon.rule_state(&by_id, 8080)?.state != "relayed").then_some(()))
    })?;
    scene.refused(&impostor, localhost())?;
    // The engine cannot tell containers by a digit: that is that rule's trouble, and nobody else's.
    for number in 0..17 {
        scene.engine.cli(&["create", "--name", &format!("c{number}"), IMAGE, "sleep", "1"])?;
    }
    for digit in "0123456789abcdef".chars() {
        scene.daemon.allow(&[&format!("container:{digit}"), "8080"])?;
    }
    ensure!(scene.engine_state()?.0 == "reachable", "the engine is not away for that");
    scene.engine.create_network("later", &[])?;
    scene.daemon.allow(&["later", "8080"])?;
    scene.daemon.wait_for_state("later", 8080, WITHOUT_CONTAINERS).map(drop)
}

fn containers_that_share_a_namespace_share_localhost() -> Result<()> {
    let scene = Scene::new()?;
    let first = named(&scene, "none", "first")?;
    let second = scene.engine.run("container:first", &["--name", "second"])?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:second", "8080"])?;
    must_reach(&scene, &second, "host's")?;
    must_reach(&scene, &first, "host's")?;
    // The same place, by another name: whoever has it keeps it, and the other takes over.
    scene.daemon.allow(&["container:first", "8080"])?;
    let states = ["first", "second"].map(|name| scene.daemon.rule_state(&format!("container:{name}"), 8080));
    let states = states.into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(states[0].state == "relayed" && states[1].state == "blocked", "{states:?}");
    scene.engine.cli(&["kill", "first"])?;
    scene.daemon.wait_for_state("container:second", 8080, "relayed")?;
    must_reach(&scene, &second, "host's")
}

fn a_container_in_the_hosts_namespace_is_blocked() -> Result<()> {
    let scene = Scene::new()?;
    named(&scene, "host", "beside")?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:beside", "8081=8080"])?;
    scene.must_be("container:beside", 8081, "blocked")?;
    client::refused(&scene.host, "127.0.0.1:8081".parse()?)
}

fn no_other_container_is_served() -> Result<()> {
    let scene = Scene::new()?;
    let network = scene.engine.create_network("app", &[])?;
    let inside = named(&scene, "app", "inside")?;
    let beside = named(&scene, "app", "beside")?;
    let service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:inside", "8080"])?;
    let address = scene.address(&inside, &network)?;
    for to in [LOCALHOST.to_owned(), format!("{address}:8080"), format!("{}:8080", network.gateway)] {
        client::not_served(&scene.engine.netns(&beside)?, None, to.parse()?)?;
    }
    client::not_served(&scene.host, None, format!("{address}:8080").parse()?)?;
    ensure!(service.accepted() == 0, "nobody got through");
    must_reach(&scene, &inside, "host's")
}

fn a_port_that_the_container_listens_on_is_its_own() -> Result<()> {
    let scene = Scene::new()?;
    let container = named(&scene, "none", "alone")?;
    let own = Service::start(&scene.engine.netns(&container)?, "its own", "0.0.0.0:8080")?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    let state = scene.daemon.rule_state("container:alone", 8080)?;
    ensure!(
        state.state == "blocked" && state.why.unwrap_or_default().starts_with("in use by "),
        "says by whom"
    );
    must_reach(&scene, &container, "its own")?;
    own.stop();
    scene.daemon.wait_for_state("container:alone", 8080, "relayed")?;
    must_reach(&scene, &container, "host's")
}

fn a_container_is_waited_for() -> Result<()> {
    let scene = Scene::new()?;
    let _service = scene.service("host's", LOCALHOST)?;
    let output = scene.daemon.allow(&["container:later", "8080"])?;
    ensure!(output.stdout.contains("waiting (no container later)"), "{output:?}");
    let container = named(&scene, "none", "later")?;
    scene.daemon.wait_for_state("container:later", 8080, "relayed")?;
    must_reach(&scene, &container, "host's")?;
    scene.engine.cli(&["kill", "later"])?;
    let state = scene.daemon.wait_for_state("container:later", 8080, "waiting")?;
    state.must_be_because("no_namespace")?;
    Ok(())
}

fn the_end_of_a_container_resets_its_connections() -> Result<()> {
    let scene = Scene::new()?;
    let container = named(&scene, "none", "alone")?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    let netns = scene.engine.netns(&container)?;
    let open = client::connect(&netns, localhost())?;
    drop(netns);
    scene.engine.cli(&["kill", "alone"])?;
    open.must_be_over()
}

fn a_container_stays_served_while_the_engine_is_away() -> Result<()> {
    let mut scene = Scene::lasting()?;
    let container = named(&scene, "none", "alone")?;
    let _service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    let netns = scene.engine.netns(&container)?;
    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    client::served_by(&netns, localhost(), "host's")?;
    scene.engine.up()?;
    scene.wait_for_engine("reachable")?;
    must_reach(&scene, &container, "host's")
}

/// An engine on another host, or in another pid namespace, tells numbers that mean other processes here. Its
/// containers are in no cgroup of this host.
fn a_process_number_from_elsewhere_is_not_believed() -> Result<()> {
    let scene = Scene::new()?;
    let container = named(&scene, "none", "alone")?;
    let _service = scene.service("host's", LOCALHOST)?;
    // The process is the right one here; so its cgroup is made the wrong one.
    let pid = scene.engine.pid(&container)?;
    fs::write("/sys/fs/cgroup/cgroup.procs", pid.to_string())
        .context("move the container out of its cgroup")?;
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(!cgroups.contains(&container.id), "the container is still in its cgroup: {cgroups}");
    scene.daemon.allow(&["container:alone", "8080"])?;
    let state = scene.daemon.rule_state("container:alone", 8080)?;
    ensure!(state.state == "blocked", "{state:?}");
    state.must_be_because("unsuitable_namespace")?;
    scene.refused(&container, localhost())
}

/// The engine is away, its container has ended, and a stranger has got the number: in a namespace of its own,
/// in a cgroup named after the container.
fn what_was_known_of_an_engine_that_is_away_is_not_believed_for_ever() -> Result<()> {
    let mut scene = Scene::lasting()?;
    let container = named(&scene, "none", "alone")?;
    let service = scene.service("host's", LOCALHOST)?;
    scene.daemon.allow(&["container:alone", "8080"])?;
    must_reach(&scene, &container, "host's")?;
    let pid = scene.engine.pid(&container)?;
    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL)?;
    patience::until("the container has ended", || {
        Ok((!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })?;

    let cgroup = format!("/sys/fs/cgroup/{}", container.id);
    fs::create_dir(&cgroup)?;
    let netns = NetNs::new()?;
    let before = service.accepted();
    let mut stranger = patience::until("the number is given again", || {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string())?;
        let mut child = netns.command("sleep").arg("1000").spawn()?;
        if child.id() == pid {
            return Ok(Some(child));
        }
        child.kill()?;
        child.wait()?;
        Ok(None)
    })?;
    fs::write(format!("{cgroup}/cgroup.procs"), pid.to_string())?;
    // Longer than the daemon takes to look.
    std::thread::sleep(patience::seconds(2));
    let refused = client::refused(&netns, localhost());
    let state = scene.daemon.rule_state("container:alone", 8080);
    stranger.kill()?;
    stranger.wait()?;
    fs::remove_dir(&cgroup)?;
    refused?;
    ensure!(state?.state == "waiting" && service.accepted() == before, "nobody came");
    Ok(())
}

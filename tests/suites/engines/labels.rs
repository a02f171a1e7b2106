//! Containers and networks that ask for rules by their labels.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::engine::{Container, Engine};
use lbridge_tests::harness::follow::Follow;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::pins::Map;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::harness::usage;
use lbridge_tests::tests;
use serde_json::Value;

use super::{IMAGE, Scene, Tested, WITHOUT_CONTAINERS};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_labelled_container_has_its_rule_while_it_runs,
        containers_of_one_label_share_a_rule,
        a_label_of_a_network_is_for_all_of_it,
        what_is_not_in_label_ports_stays_closed,
        a_label_does_not_take_what_others_are_sent,
        a_bad_label_stops_nothing_else,
        an_allow_wins_over_a_label,
        an_allow_does_not_interrupt_those_of_labels,
        labels_are_read_from_a_reload_to_another,
        labels_stay_in_force_while_the_engine_is_away,
        whoever_ends_while_the_engine_is_away_is_out,
        a_container_that_restarts_in_a_loop_costs_little,
        what_is_told_of_labels,
    ]
}

const ON: &str = "labels = true\nlabel_ports = [8080, \"8081-8085\"]\n";
const SERVICE: &str = "127.0.0.1:8080";

fn scene() -> Result<Scene> {
    Scene::configured(Tested::start()?, ON)
}

fn labelled(scene: &Scene, network: &str, name: &str, labels: &[&str]) -> Result<Container> {
    let labels: Vec<_> = labels.iter().map(|label| format!("--label=lbridge.{label}")).collect();
    let options: Vec<_> = ["--name", name].into_iter().chain(labels.iter().map(String::as_str)).collect();
    scene.engine.run(network, &options)
}

fn wait_until_gone(scene: &Scene, network: &str, port: u16) -> Result<()> {
    patience::until("the rule is gone", || Ok(scene.daemon.rule(network, port)?.is_none().then_some(())))
}

/// Once the rule is there, and in that state.
fn wait_for(scene: &Scene, network: &str, port: u16, state: &str) -> Result<Value> {
    patience::until(&format!("a label's rule {network} {port} {state}"), || {
        let rule = scene.daemon.rule(network, port)?;
        Ok(rule.filter(|rule| rule["origin"] == "label" && rule["state"] == state))
    })
}

fn from(rule: &Value) -> Vec<&str> {
    rule["from"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Returns the problems of labels, once there is one.
fn problems(scene: &Scene) -> Result<Vec<Value>> {
    patience::until("status tells of a label", || {
        let status = scene.daemon.status()?;
        let problems = status["labels"]["problems"].as_array().context("problems")?;
        Ok((!problems.is_empty()).then(|| problems.clone()))
    })
}

fn no_problems(scene: &Scene) -> Result<()> {
    let labels = &scene.daemon.status()?["labels"];
    ensure!(labels["problems"].as_array().is_some_and(Vec::is_empty), "{labels}");
    Ok(())
}

fn a_labelled_container_has_its_rule_while_it_runs() -> Result<()> {
    let scene = scene()?;
    let (app, db) = (scene.engine.create_network("app", &[])?, scene.engine.create_network("db", &[])?);
    let _service = scene.service("host's", SERVICE)?;
    let labels = ["--label=lbridge.allow=8080, 8081=8080", "--label=lbridge.localhost=true"];
    scene.engine.cli(
        &[&["create", "--name=web", "--network=app"], &labels[..], &[IMAGE, "sleep", "1000"]].concat(),
    )?;
    scene.engine.cli(&["network", "connect", "db", "web"])?;
    ensure!(scene.daemon.rule("app", 8080)?.is_none(), "one that does not run asks for nothing");
    scene.engine.cli(&["start", "web"])?;
    let web = Container { id: "web".to_owned() };
    for network in ["app", "db"] {
        let rule = wait_for(&scene, network, 8080, "steered")?;
        ensure!(
            from(&rule) == ["web"] && rule["localhost"] == true && rule["source"] == "container",
            "{rule}"
        );
        wait_for(&scene, network, 8081, "steered")?;
    }
    for network in [&app, &db] {
        scene.served(&web, network.at(8080), "host's")?;
        scene.served(&web, network.at(8081), "host's")?;
        scene.refused(&web, network.at(8082))?;
    }
    no_problems(&scene)?;
    scene.engine.cli(&["network", "disconnect", "db", "web"])?;
    wait_until_gone(&scene, "db", 8080)?;
    scene.served(&web, app.at(8080), "host's")?;
    scene.engine.cli(&["kill", "web"])?;
    wait_until_gone(&scene, "app", 8080)?;
    let other = scene.engine.run("app", &[])?;
    scene.refused(&other, app.at(8080))?;
    scene.engine.cli(&["start", "web"])?;
    wait_for(&scene, "app", 8080, "steered")?;
    scene.served(&web, app.at(8080), "host's").map(drop)
}

fn containers_of_one_label_share_a_rule() -> Result<()> {
    let scene = scene()?;
    let app = scene.engine.create_network("app", &[])?;
    let _service = scene.service("host's", SERVICE)?;
    let all = ["web_1", "web_2", "web_3"].map(|name| labelled(&scene, "app", name, &["allow=8080"]));
    let all = all.into_iter().collect::<Result<Vec<_>>>()?;
    let shared_by = |names: &[&str]| {
        patience::until(&format!("the rule is for {names:?}"), || {
            let Some(rule) = scene.daemon.rule("app", 8080)? else { return Ok(None) };
            // As soon as Docker has told of each.
            let served = rule["why"] == format!("for {}", names.join(", "));
            Ok((from(&rule) == names && served).then_some(()))
        })
    };
    shared_by(&["web_1", "web_2", "web_3"])?;
    for container in &all {
        scene.served(container, app.at(8080), "host's")?;
    }
    scene.engine.cli(&["rename", "web_2", "worker"])?;
    shared_by(&["web_1", "web_3", "worker"])?;
    scene.engine.remove(&all[0])?;
    shared_by(&["web_3", "worker"])?;
    scene.served(&all[1], app.at(8080), "host's")?;
    no_problems(&scene)
}

fn a_label_of_a_network_is_for_all_of_it() -> Result<()> {
    let scene = scene()?;
    let app = scene.engine.create_network("app", &["--label=lbridge.allow=8080"])?;
    let rule = wait_for(&scene, "app", 8080, "waiting")?;
    ensure!(from(&rule).is_empty(), "{rule}");
    let _service = scene.service("host's", SERVICE)?;
    let container = scene.engine.run("app", &[])?;
    scene.daemon.wait_for_state("app", 8080, "steered")?;
    scene.served(&container, app.at(8080), "host's")?;
    let verified = scene.daemon.cli(&["verify", "app", "8080"])?;
    ensure!(verified.status == 0 && verified.stdout.contains("all as they should be"), "{verified:?}");
    // A container's label adds nothing to it, and takes nothing away.
    labelled(&scene, "app", "web", &["allow=8080"])?;
    let other = labelled(&scene, "app", "other", &["allow=8080=8081"])?;
    let problems = problems(&scene)?;
    ensure!(problems.len() == 1 && problems[0]["object"] == "container other", "{problems:?}");
    ensure!(
        problems[0]["wrong"].as_str().is_some_and(|wrong| wrong.contains("by network app")),
        "{problems:?}"
    );
    ensure!(scene.daemon.rule("app", 8080)?.is_some_and(|rule| from(&rule).is_empty()));
    scene.served(&container, app.at(8080), "host's")?;
    scene.engine.remove(&container)?;
    scene.engine.remove(&other)?;
    scene.engine.cli(&["rm", "--force", "web"])?;
    scene.engine.remove_network("app")?;
    wait_until_gone(&scene, "app", 8080)
}

fn what_is_not_in_label_ports_stays_closed() -> Result<()> {
    let scene = scene()?;
    let app = scene.engine.create_network("app", &[])?;
    let secret = scene.service("secret", "127.0.0.1:9000")?;
    let _service = scene.service("host's", SERVICE)?;
    let web = labelled(&scene, "app", "web", &["allow=8082=9000,8083=8080"])?;
    wait_for(&scene, "app", 8083, "steered")?;
    scene.served(&web, app.at(8083), "host's")?;
    scene.refused(&web, app.at(8082))?;
    ensure!(secret.accepted() == 0);
    let problems = problems(&scene)?;
    ensure!(problems.len() == 1 && problems[0]["object"] == "container web", "{problems:?}");
    let wrong = problems[0]["wrong"].as_str().unwrap_or_default();
    ensure!(wrong.contains("9000") && wrong.contains("label_ports"), "{problems:?}");
    let told = scene.daemon.cli(&["status"])?.stdout;
    ensure!(told.contains("label    container web, lbridge.allow=8082=9000,8083=8080: "), "{told}");
    // The remedy, as it is told.
    scene.reload("labels = true\nlabel_ports = [\"8080-8085\", 9000]\n")?;
    wait_for(&scene, "app", 8082, "steered")?;
    scene.served(&web, app.at(8082), "secret")?;
    // No word but the administrator's has a container pass for the host.
    let trusted = labelled(&scene, "app", "trusted", &["allow=8081=8080", "source=loopback"])?;
    patience::until("status tells of label_sources", || {
        Ok(scene.daemon.cli(&["status"])?.stdout.contains("label_sources").then_some(()))
    })?;
    scene.refused(&trusted, app.at(8081))?;
    scene.reload(
        "labels = true\nlabel_ports = [\"8080-8085\", 9000]\nlabel_sources = [\"container\", \"loopback\"]\n",
    )?;
    wait_for(&scene, "app", 8081, "steered")?;
    let greeting = scene.served(&trusted, app.at(8081), "host's")?;
    ensure!(greeting.peer.ip().is_loopback(), "{greeting:?}");
    let greeting = scene.served(&web, app.at(8082), "secret")?;
    ensure!(!greeting.peer.ip().is_loopback(), "{greeting:?}");
    no_problems(&scene)
}

/// A service of the host that listens for everybody keeps its clients, whatever a network's label asks for.
fn a_label_does_not_take_what_others_are_sent() -> Result<()> {
    let scene = scene()?;
    let public = scene.service("public", "0.0.0.0:8090")?;
    let service = scene.service("host's", SERVICE)?;
    let app = scene.engine.create_network("app", &["--label=lbridge.allow=8090=8080,8081=8080"])?;
    let container = scene.engine.run("app", &[])?;
    wait_for(&scene, "app", 8081, "steered")?;
    scene.served(&container, app.at(8081), "host's")?;
    scene.served(&container, app.at(8090), "public")?;
    scene.engine.run(Tested::DEFAULT_NETWORK, &[])?;
    let elsewhere = scene.engine.network(Tested::DEFAULT_NETWORK)?.at(8090);
    scene.served(&container, elsewhere, "public")?;
    ensure!(scene.daemon.rule("app", 8090)?.is_none());
    ensure!((service.accepted(), public.accepted()) == (1, 2));
    let problems = problems(&scene)?;
    let told = problems[0].to_string();
    ensure!(problems.len() == 1 && told.contains("8090") && told.contains("label_dialled_ports"), "{told}");
    // The remedy, as it is told.
    scene.reload(&format!("{ON}label_dialled_ports = [8090]\n"))?;
    wait_for(&scene, "app", 8090, "steered")?;
    scene.served(&container, app.at(8090), "host's")?;
    no_problems(&scene)
}

fn a_bad_label_stops_nothing_else() -> Result<()> {
    let scene = scene()?;
    let app = scene.engine.create_network("app", &[])?;
    let _service = scene.service("host's", SERVICE)?;
    scene.daemon.allow(&["app", "8085=8080"])?;
    let ports: Vec<_> = (1..=20_000).map(|port: u32| port.to_string()).collect();
    let huge = format!("allow={}", ports.join(","));
    let mut bad = vec![];
    for (name, labels) in [
        ("none", &["allow=\u{1b}[2Jnonsense"][..]),
        ("unix", &["allow=8081=unix:/run/docker.sock"]),
        ("elsewhere", &["allow=8081=127.0.0.2:8080"]),
        ("range", &["allow=1-65535"]),
        ("huge", &[&huge]),
        ("flag", &["allow=8081", "localhost=perhaps"]),
        ("source", &["allow=8081", "source=host"]),
        ("typo", &["alow=8081", "allow=8083=8080"]),
    ] {
        bad.push(labelled(&scene, "app", name, labels)?);
    }
    let good = labelled(&scene, "app", "zgood", &["allow=8084=8080"])?;
    wait_for(&scene, "app", 8084, "steered")?;
    for port in [8084, 8085] {
        scene.served(&good, app.at(port), "host's")?;
    }
    let typo = bad.last().context("the last one")?;
    scene.served(typo, app.at(8083), "host's")?;
    scene.refused(&good, app.at(8081))?;
    let problems = problems(&scene)?;
    ensure!(problems.len() == 8, "{problems:#?}");
    for problem in &problems {
        let text = problem.to_string();
        ensure!(
            text.len() < 1000 && problem["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()),
            "{text}"
        );
    }
    let human = scene.daemon.cli(&["status"])?.stdout;
    ensure!(!human.contains('\u{1b}') && human.contains("container none, lbridge.allow="), "{human}");
    let told = |name: &str| {
        scene
            .daemon
            .log()
            .lines()
            .filter(|line| line.contains(&format!("label has a problem container={name} ")))
            .count()
    };
    scene.engine.cli(&["restart", "--time=0", "flag"])?;
    scene.engine.cli(&["restart", "--time=0", "unix"])?;
    labelled(&scene, "app", "later", &["allow=8082=8080"])?;
    wait_for(&scene, "app", 8082, "steered")?;
    ensure!(told("flag") == 1 && told("unix") == 1, "once: {}", scene.daemon.log());
    Ok(())
}

fn an_allow_wins_over_a_label() -> Result<()> {
    let scene = scene()?;
    let app = scene.engine.create_network("app", &[])?;
    let _service = scene.service("one", SERVICE)?;
    let _other = scene.service("other", "127.0.0.1:8081")?;
    let web = labelled(&scene, "app", "web", &["allow=8080"])?;
    wait_for(&scene, "app", 8080, "steered")?;
    // The label first.
    let output = scene.daemon.cli(&["deny", "app", "8080"])?;
    ensure!(
        output.status == 4 && output.stderr.contains("label") && !output.stderr.contains("file"),
        "{output:?}"
    );
    scene.served(&web, app.at(8080), "one")?;
    scene.daemon.allow(&["app", "8080=8081"])?;
    scene.served(&web, app.at(8080), "other")?;
    let problem = problems(&scene)?.remove(0);
    let (wrong, remedy) = (problem["wrong"].to_string(), problem["remedy"].to_string());
    ensure!(problem["object"] == "container web" && wrong.contains("lbridge allow"), "{problem}");
    ensure!(remedy.contains("lbridge deny app 8080"), "{problem}");
    ensure!(scene.daemon.rule("app", 8080)?.is_some_and(|rule| rule["origin"] == "cli"));
    // And the label's again.
    let output = scene.daemon.deny(&["app", "8080"])?;
    ensure!(
        output.stdout == "app 8080: denied; a label asks for it, too: see `lbridge list`\n",
        "{output:?}"
    );
    wait_for(&scene, "app", 8080, "steered")?;
    scene.served(&web, app.at(8080), "one")?;
    no_problems(&scene)?;
    // What a rule covers it has.
    scene.daemon.allow(&["app", "8080"])?;
    ensure!(
        scene.daemon.rule("app", 8080)?.is_some_and(|rule| rule["origin"] == "cli" && from(&rule).is_empty())
    );
    no_problems(&scene)?;
    // The rule first, of the file.
    scene.reload(&format!("{ON}[[rule]]\nnetwork = \"app\"\nport = \"8082=8081\"\n"))?;
    let second = labelled(&scene, "app", "second", &["allow=8082,8083=8080"])?;
    wait_for(&scene, "app", 8083, "steered")?;
    scene.served(&second, app.at(8082), "other")?;
    let problem = problems(&scene)?.remove(0);
    ensure!(problem["object"] == "container second", "{problem}");
    ensure!(problem["wrong"].as_str().is_some_and(|wrong| wrong.contains("lbridge.toml")), "{problem}");
    // Rules of labels are nobody's but theirs.
    let kept = fs::read_to_string(scene.daemon.rules_file())?;
    ensure!(kept.contains("8080") && !kept.contains("8083"), "{kept}");
    Ok(())
}

/// The daemon goes on following the containers of labels while it asks the engine about somebody else's.
fn an_allow_does_not_interrupt_those_of_labels() -> Result<()> {
    let scene = scene()?;
    scene.engine.create_network("app", &[])?;
    let _service = scene.service("host's", SERVICE)?;
    labelled(&scene, "app", "web", &["allow=8080"])?;
    wait_for(&scene, "app", 8080, "steered")?;
    let sources = Map::named(scene.daemon.bpffs(), "SOURCES")?;
    let done = AtomicBool::new(false);
    let (allowed, interrupted) = thread::scope(|scope| {
        let watch = scope.spawn(|| -> Result<bool> {
            while !done.load(Ordering::SeqCst) {
                if sources.is_empty()? {
                    return Ok(true);
                }
                thread::sleep(Duration::from_micros(200));
            }
            Ok(false)
        });
        // Of containers and networks that the engine has not told of.
        let allowed = (0..5).try_for_each(|n| {
            scene.daemon.allow(&["app", &format!("909{n}"), "--from", &format!("new{n}")])?;
            scene.daemon.allow(&[&format!("new{n}"), "9090"]).map(drop)
        });
        done.store(true, Ordering::SeqCst);
        (allowed, watch.join())
    });
    allowed?;
    ensure!(!interrupted.map_err(|_| anyhow::anyhow!("a thread panicked"))??, "its address was taken away");
    Ok(())
}

fn labels_are_read_from_a_reload_to_another() -> Result<()> {
    let scene = Scene::configured(Tested::start()?, "")?;
    let app = scene.engine.create_network("app", &["--label=lbridge.allow=8081=8080"])?;
    let _service = scene.service("host's", SERVICE)?;
    let web = labelled(&scene, "app", "web", &["allow=8080"])?;
    for _ in 0..2 {
        ensure!(scene.daemon.status()?["labels"]["enabled"] == false);
        ensure!(scene.daemon.rule("app", 8080)?.is_none() && scene.daemon.rule("app", 8081)?.is_none());
        scene.refused(&web, app.at(8080))?;
        let doctor = scene.daemon.cli(&["doctor"])?.stdout;
        ensure!(doctor.contains("labels are not read") && doctor.contains("container web"), "{doctor}");
        let output = scene.reload(ON)?;
        ensure!(output.stdout.contains("changed  labels: true, was false"), "{output:?}");
        // In force when it returns.
        scene.must_be("app", 8080, "steered")?;
        scene.served(&web, app.at(8080), "host's")?;
        scene.served(&web, app.at(8081), "host's")?;
        scene.reload("labels = true\nlabel_ports = []\n")?;
        scene.refused(&web, app.at(8080))?;
        ensure!(problems(&scene)?.len() == 2);
        scene.reload(ON)?;
        scene.served(&web, app.at(8080), "host's")?;
        scene.reload("")?;
    }
    Ok(())
}

fn labels_stay_in_force_while_the_engine_is_away() -> Result<()> {
    let mut scene = Scene::configured(Tested::start_lasting()?, ON)?;
    let app = scene.engine.create_network("app", &["--label=lbridge.allow=8081=8080"])?;
    let _service = scene.service("host's", SERVICE)?;
    let web = labelled(&scene, "app", "web", &["allow=8080"])?;
    wait_for(&scene, "app", 8080, "steered")?;
    let netns = scene.engine.netns(&web)?;
    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    let both = || {
        client::served_by(&netns, app.at(8080), "host's")?;
        client::served_by(&netns, app.at(8081), "host's").map(drop)
    };
    both()?;
    // A daemon that starts meanwhile has them from its last look.
    scene.daemon.restart()?;
    both()?;
    wait_for(&scene, "app", 8080, "steered")?;
    scene.engine.up()?;
    scene.wait_for_engine("reachable")?;
    both()?;
    scene.engine.cli(&["kill", "web"])?;
    wait_until_gone(&scene, "app", 8080)?;
    wait_for(&scene, "app", 8081, WITHOUT_CONTAINERS).map(drop)
}

fn whoever_ends_while_the_engine_is_away_is_out() -> Result<()> {
    let mut scene = Scene::configured(Tested::start_lasting()?, ON)?;
    let app = scene.engine.create_network("app", &[])?;
    let _service = scene.service("host's", SERVICE)?;
    let web = labelled(&scene, "app", "web", &["allow=8080"])?;
    wait_for(&scene, "app", 8080, "steered")?;
    let netns = scene.engine.netns(&web)?;
    let pid = scene.engine.pid(&web)?.cast_signed();
    scene.engine.down()?;
    scene.wait_for_engine("away")?;
    client::served_by(&netns, app.at(8080), "host's")?;
    // Nobody tells that it ends, and whose its address is then. That the engine is away is seen by now.
    thread::sleep(Duration::from_secs(1));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    // Not by way of status, for which the daemon looks.
    patience::until("it is out", || Ok(client::not_served(&netns, None, app.at(8080)).ok()))?;
    wait_for(&scene, "app", 8080, "waiting").map(drop)
}

fn a_container_that_restarts_in_a_loop_costs_little() -> Result<()> {
    let scene = scene()?;
    let app = scene.engine.create_network("app", &[])?;
    let _service = scene.service("host's", SERVICE)?;
    let web = labelled(&scene, "app", "web", &["allow=8080"])?;
    let pid = scene.daemon.pid().context("the daemon")?;
    // One that the engine restarts for ever, and one that is bad as well.
    for (name, label) in [("loop", "lbridge.allow=8081=8080"), ("bad", "lbridge.allow=none")] {
        let label = format!("--label={label}");
        scene.engine.cli(&[
            "run",
            "--detach",
            "--restart=always",
            "--name",
            name,
            "--network=app",
            &label,
            IMAGE,
            "sh",
            "-c",
            "exit 1",
        ])?;
    }
    wait_for(&scene, "app", 8080, "steered")?;
    let before = usage::Process(pid).ticks()?;
    let started = std::time::Instant::now();
    while started.elapsed() < patience::seconds(5) {
        scene.served(&web, app.at(8080), "host's")?;
        thread::sleep(Duration::from_millis(100));
    }
    let used = usage::Process(pid).ticks()? - before;
    // A quarter of the time, in hundredths of a second.
    let most = u64::try_from(started.elapsed().as_millis() / 40)?;
    ensure!(used < most, "{used} ticks, {most} are much");
    let told =
        scene.daemon.log().lines().filter(|line| line.contains("label has a problem container=bad")).count();
    let least = usize::from(Tested::LISTS_RESTARTING_CONTAINERS);
    ensure!((least..=1).contains(&told), "once, not {told} times");
    Ok(())
}

fn what_is_told_of_labels() -> Result<()> {
    let scene = scene()?;
    scene.engine.create_network("app", &[])?;
    let _service = scene.service("host's", SERVICE)?;
    let mut command = scene.daemon.command()?;
    command.args(["events", "--json"]);
    let mut events = Follow::start(command)?;
    let mut event = |what: &str, is_it: &dyn Fn(&Value) -> bool| {
        events.until(what, |line| {
            let event: Value = serde_json::from_str(line).ok()?;
            (event["event"] == what && is_it(&event)).then_some(())
        })
    };
    event("following", &|_| true)?;
    let web = labelled(&scene, "app", "web", &["allow=8080,9000"])?;
    event("labelled", &|event| event["port"] == 8080 && event["asked"] == true)?;
    event("bad_label", &|event| event["object"] == "container web")?;
    event("state", &|event| event["port"] == 8080 && event["state"] == "steered")?;
    let list = scene.daemon.cli(&["list"])?.stdout;
    let row = list.lines().find(|line| line.contains("8080")).unwrap_or_default();
    ensure!(row.contains(" label ") && row.contains("--from web"), "{list}");
    let explained = scene.daemon.cli(&["explain", "app", "8080"])?.stdout;
    ensure!(explained.contains("from the label of web") && explained.contains("are steered"), "{explained}");
    let doctor = scene.daemon.cli(&["doctor"])?.stdout;
    ensure!(doctor.contains("label of container web") && doctor.contains("label_ports"), "{doctor}");
    scene.engine.remove(&web)?;
    event("labelled", &|event| event["port"] == 8080 && event["asked"] == false)?;
    // Told first, done then.
    let done = "rule removed network=app port=8080 protocol=tcp origin=label";
    patience::until("the log says so, too", || Ok(scene.daemon.log().contains(done).then_some(())))
}

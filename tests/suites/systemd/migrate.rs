//! socat units: that the doctor finds them, and what `import` makes of them, while they run.

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::client;
use lbridge_tests::harness::doctor::Report;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;

use crate::Scene;
use lbridge_tests::harness::traffic::Traffic;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_healthy_host_is_told_so,
        a_unit_that_listens_with_mptcp_is_named: [Need::Program("socat"), Need::Mptcp],
        import_refuses_no_connection: [Need::Program("socat")],
        what_has_to_be_relayed_is_taken_from_socat: [Need::Program("socat")],
        what_cannot_be_turned_is_named,
        a_conflict_changes_nothing,
    ]
}

/// A unit that runs this, on every unit's usual terms.
fn unit(command: &str) -> String {
    format!("[Service]\nExecStart={command}\n\n[Install]\nWantedBy=multi-user.target\n")
}

const SOCAT_APP: &str = "/usr/bin/socat \\\n  # to the application\n  \
                         TCP-LISTEN:8080,bind=10.7.0.1,fork,reuseaddr \\\n  'TCP:127.0.0.1:8080'";

fn report(scene: &Scene) -> Result<Report> {
    Report::read(&scene.cli(&["doctor", "--json"])?)
}

fn a_healthy_host_is_told_so() -> Result<()> {
    let scene = Scene::new()?;
    scene.lbridge(&["allow", "bridge:lab0", "8080"])?;
    let _service = scene.service("loopback", "127.0.0.1:8080")?;
    scene.served(8080, "loopback")?;
    let report = report(&scene)?;
    ensure!(report.status == 0 && report.complaints().is_empty(), "{report:?}");
    ensure!(report.must("daemon", "ok")?.text.contains("lbridge.service"), "{report:?}");
    report.must_not("systemd")?;

    scene.systemd.must(&["stop", crate::UNIT])?;
    let finding = self::report(&scene)?.must("daemon", "problem")?;
    ensure!(finding.remedy == ["systemctl start lbridge.service"], "{finding:?}");
    scene.systemd.must(&["start", crate::UNIT])?;
    self::report(&scene)?.must("daemon", "ok").map(drop)
}

fn a_unit_that_listens_with_mptcp_is_named() -> Result<()> {
    let scene = Scene::new()?;
    // Family 2, protocol 262: MPTCP. Port 8080 of 127.0.0.1.
    let listen = "SOCKET-LISTEN:2:262:x1f907f0000010000000000000000,fork,reuseaddr";
    scene.systemd.install_unit("model.service", &unit(&format!("/usr/bin/socat {listen} EXEC:/bin/cat")))?;
    scene.systemd.must(&["start", "model.service"])?;
    scene.lbridge(&["allow", "bridge:lab0", "8080"])?;
    let found = patience::until("the doctor sees MPTCP", || {
        let report = report(&scene)?;
        Ok(report.of_check("mptcp").first().cloned())
    })?;
    ensure!(found.level == "note" && found.text.contains("model.service"), "{found:?}");
    let remedy: Vec<_> =
        found.remedy.iter().map(|line| line.split("    #").next().unwrap_or_default()).collect();
    let expected = [
        "systemctl edit model.service",
        "[Service]",
        "Environment=GODEBUG=multipathtcp=0",
        "systemctl restart model.service",
    ];
    ensure!(remedy == expected, "{found:?}");
    Ok(())
}

/// With connections all the while: sk_lookup comes before socat's socket.
fn import_refuses_no_connection() -> Result<()> {
    let scene = Scene::new()?;
    // The test's processes are not seen from inside; with a rule there already the kernel notes the socket
    // itself.
    scene.lbridge(&["allow", "bridge:lab0", "90=8080"])?;
    let _service = scene.service("application", "127.0.0.1:8080")?;
    scene.systemd.install_unit("socat-app.service", &unit(SOCAT_APP))?;
    scene.systemd.must(&["enable", "--now", "socat-app.service"])?;
    let before = patience::until("socat serves", || Ok(scene.served(8080, "application").ok()))?;
    ensure!(before.peer.ip().is_loopback(), "the service takes containers for local: {before:?}");
    let finding = report(&scene)?.must("socat", "warning")?;
    ensure!(
        finding.text.contains("socat-app.service") && finding.remedy == ["lbridge import"],
        "{finding:?}"
    );

    for arguments in [["import"].as_slice(), &["import", "--dry-run"]] {
        let said = scene.lbridge(arguments)?.stdout;
        let line = "bridge:lab0 8080: 10.7.0.1:8080 -> 127.0.0.1:8080, from socat-app.service";
        ensure!(said.lines().next() == Some(line) && said.contains("Nothing was changed"), "{said}");
        ensure!(scene.lbridge(&["list"])?.stdout.lines().count() == 2, "{said}");
    }
    let traffic = Traffic::start(&scene.container, scene.gateway(8080), "application");
    traffic.flows(20)?;
    let said = scene.lbridge(&["import", "--yes"])?.stdout;
    ensure!(said.contains("bridge:lab0 8080: 10.7.0.1:8080 -> 127.0.0.1:8080"), "{said}");
    let last = said.lines().find(|line| line.contains("systemctl disable --now")).context("what to type")?;
    traffic.flows(20)?;
    scene.systemd.shell(last)?;
    traffic.flows(20)?;
    traffic.all_served()?;
    let after = scene.served(8080, "application")?;
    ensure!(after.peer.ip().to_string() == "10.7.0.2", "the container: {after:?}");
    ensure!(scene.systemd.property("socat-app.service", "ActiveState")? != "active");

    let said = scene.lbridge(&["import"])?.stdout;
    ensure!(said.contains("there already"), "{said}");
    // The unit's file is the administrator's.
    let finding = report(&scene)?.must("socat", "note")?;
    scene.systemd.shell(&finding.remedy[0])?;
    let report = report(&scene)?;
    ensure!(report.complaints().is_empty(), "{report:?}");
    report.must_not("socat")
}

/// The kernel's entry leads to the relay, whoever has the port.
fn what_has_to_be_relayed_is_taken_from_socat() -> Result<()> {
    let scene = Scene::new()?;
    let echo = unit("/usr/bin/socat UNIX-LISTEN:/run/echo.sock,fork EXEC:/bin/cat");
    scene.systemd.install_unit("echo.service", &echo)?;
    let socat = unit("/usr/bin/socat TCP-LISTEN:81,bind=10.7.0.1,fork,reuseaddr UNIX-CONNECT:/run/echo.sock");
    scene.systemd.install_unit("socat-echo.service", &socat)?;
    scene.systemd.must(&["start", "echo.service", "socat-echo.service"])?;
    patience::until("socat listens", || Ok(scene.listens(81)?.then_some(())))?;
    let said = scene.lbridge(&["import", "--yes"])?.stdout;
    ensure!(said.contains("relayed") && said.contains("New connections go to lbridge"), "{said}");
    client::dial(&scene.container, None, scene.gateway(81), patience::seconds(5))?;
    let last = said.lines().find(|line| line.contains("systemctl disable --now")).context("what to type")?;
    scene.systemd.shell(last)?;
    client::dial(&scene.container, None, scene.gateway(81), patience::seconds(5))?;
    Ok(())
}

fn what_cannot_be_turned_is_named() -> Result<()> {
    let scene = Scene::new()?;
    let listen = "/usr/bin/socat TCP-LISTEN:80,fork";
    for (name, command, _) in &REFUSED {
        scene.systemd.install_unit(name, &unit(&command.replace("LISTEN", listen)))?;
    }
    scene.systemd.must(&["enable", "socat-range.service", "socat-far.service"])?;
    scene.systemd.install_unit("socat-good.service", &unit(SOCAT_APP))?;
    scene.systemd.install_unit("other.service", &unit("/bin/sleep 1"))?;
    let said = scene.lbridge(&["import", "--yes"])?.stdout;
    for (name, _, why) in &REFUSED {
        let line = said.lines().find(|line| line.starts_with(&format!("{name} stays: ")));
        ensure!(line.is_some_and(|line| line.contains(why)), "{name}: {said}");
    }
    ensure!(!said.contains("other.service"), "{said}");
    let rules = scene.lbridge(&["list"])?.stdout;
    ensure!(rules.lines().count() == 2 && rules.contains("was socat-good.service"), "{rules}");
    // Those with a socat before loopback are left-overs all the same.
    let found = report(&scene)?.of_check("socat");
    ensure!(found.iter().any(|finding| finding.text.contains("socat-range.service")), "{found:?}");
    ensure!(!found.iter().any(|finding| finding.text.contains("socat-far.service")), "{found:?}");
    Ok(())
}

/// Units, what they run, and why that is no rule.
const REFUSED: [(&str, &str, &str); 7] = [
    ("socat-everywhere.service", "LISTEN TCP:127.0.0.1:80", "no bind="),
    ("socat-range.service", "LISTEN,bind=10.7.0.1,range=10.7.0.0/24 TCP:127.0.0.1:80", "range="),
    ("socat-far.service", "LISTEN,bind=10.7.0.1 TCP:192.0.2.1:80", "192.0.2.1"),
    ("socat-nowhere.service", "LISTEN,bind=10.99.0.1 TCP:127.0.0.1:80", "no interface"),
    ("socat-port.service", "LISTEN,bind=10.7.0.1 TCP:127.0.0.1:${PORT}", "$PORT"),
    ("wrapped.service", "/bin/sh -c 'LISTEN,bind=10.7.0.1 TCP:127.0.0.1:80'", "another program"),
    ("socat-lo.service", "LISTEN,bind=127.0.0.1 TCP:127.0.0.1:81", "not on a bridge"),
];

fn a_conflict_changes_nothing() -> Result<()> {
    let scene = Scene::new()?;
    scene.lbridge(&["allow", "bridge:lab0", "8080=9090"])?;
    scene.systemd.install_unit("socat-app.service", &unit(SOCAT_APP))?;
    let other = "/usr/bin/socat TCP-LISTEN:81,bind=10.7.0.1 TCP:127.0.0.1:81";
    scene.systemd.install_unit("socat-other.service", &unit(other))?;
    let before = scene.lbridge(&["list"])?.stdout;
    let output = scene.cli(&["import", "--yes"])?;
    ensure!(output.status == 4 && output.stdout.is_empty(), "{output:?}");
    let line = output.stderr.trim_end();
    ensure!(line.contains("bridge:lab0 8080") && line.contains("deny"), "{line}");
    ensure!(scene.lbridge(&["list"])?.stdout == before, "{before}");
    let shown = scene.cli(&["import"])?;
    ensure!(shown.status == 4 && shown.stdout.contains("CONFLICT"), "{shown:?}");
    Ok(())
}

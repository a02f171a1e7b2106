//! PostgreSQL, with the client library that nearly everybody uses.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::suite::{Need, Test, postgres_folder};
use lbridge_tests::tests;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use lbridge_tests::harness::server::{self, Server, as_nobody, printed};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        trust_line_for_localhost_does_not_let_containers_in:
            [Need::Postgres, Need::Program("setpriv"), Need::Program("unshare")],
        pgbench_copies_and_cancels_through_the_relay:
            [Need::Postgres, Need::Program("setpriv"), Need::Program("unshare")],
    ]
}

struct Postgres {
    _server: Server,
    folder: TempDir,
    programs: PathBuf,
}

impl Postgres {
    /// A new cluster with `initdb`'s own pg_hba.conf, and what is to be added to it.
    fn start(host: &NetNs, more_access: &str) -> Result<Postgres> {
        let folder = server::folder()?;
        let programs = postgres_folder().context("no PostgreSQL")?;
        let data = folder.path().join("data");
        printed(
            as_nobody(host, programs.join("initdb"))
                .args(["--no-sync", "--no-locale", "--encoding=UTF8", "--username=postgres", "-D"])
                .arg(&data),
        )?;
        let access = data.join("pg_hba.conf");
        let lines = fs::read_to_string(&access)?;
        ensure!(
            lines
                .lines()
                .any(|line| line.split_whitespace().eq("host all all 127.0.0.1/32 trust".split(' '))),
            "initdb trusts 127.0.0.1: {lines}"
        );
        fs::write(&access, format!("{lines}{more_access}\n"))?;
        let mut command = as_nobody(host, programs.join("postgres"));
        command.arg("-D").arg(&data).arg("-k").arg(folder.path());
        for setting in [
            "listen_addresses=127.0.0.1",
            "fsync=off",
            "autovacuum=off",
            // Not in /dev/shm, which is the machine's.
            "dynamic_shared_memory_type=mmap",
        ] {
            command.args(["-c", setting]);
        }
        let server = Server::start("postgres", command, host, "127.0.0.1:5432".parse()?)?;
        let postgres = Postgres { _server: server, folder, programs };
        // It listens before it lets anybody in.
        patience::until("PostgreSQL is up", || {
            Ok(postgres.at_home(host, "select 1").is_ok_and(|answer| answer == "1").then_some(()))
        })?;
        Ok(postgres)
    }

    /// A query of an administrator on the host, over the Unix socket.
    fn at_home(&self, host: &NetNs, query: &str) -> Result<String> {
        let mut psql = host.command(self.programs.join("psql"));
        psql.arg("-h").arg(self.folder.path()).args(["-U", "postgres", "-XAtqc", query]);
        server::line(&mut psql)
    }

    /// A client program in the container that dials the gateway's port.
    fn client(&self, scene: &Scene, program: &str, port: u16) -> Command {
        let mut command = scene.container.command(self.programs.join(program));
        let gateway = scene.gateway(port);
        command.env("PGHOST", gateway.ip().to_string()).env("PGPORT", port.to_string());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres").env("PGCONNECT_TIMEOUT", "5");
        command
    }

    /// `psql` in the container, for queries that are each an argument.
    fn psql(&self, scene: &Scene, port: u16, queries: &[&str]) -> Command {
        let mut command = self.client(scene, "psql", port);
        command.args(["-XAtq", "-v", "ON_ERROR_STOP=1"]);
        for query in queries {
            command.args(["-c", query]);
        }
        command
    }
}

fn trust_line_for_localhost_does_not_let_containers_in() -> Result<()> {
    let scene = Scene::new()?;
    let postgres = Postgres::start(scene.lab.host(), "")?;
    scene.allow(&["5432", "--path", "relay"])?;
    scene.must_be(5432, "relayed")?;
    let refused = server::output(&mut postgres.psql(&scene, 5432, &["select 1"]))?;
    let said = String::from_utf8_lossy(&refused.stderr);
    let why = format!("no pg_hba.conf entry for host \"{}\"", scene.container_ip);
    ensure!(!refused.status.success() && said.contains(&why), "{refused:?}");

    scene.allow(&["15432=5432", "--path", "relay", "--source", "loopback"])?;
    let address = server::line(&mut postgres.psql(&scene, 15432, &["select inet_client_addr()"]))?;
    ensure!(address == "127.0.0.1", "{address}");
    // And the first rule still does not.
    ensure!(!server::output(&mut postgres.psql(&scene, 5432, &["select 1"]))?.status.success());
    Ok(())
}

fn pgbench_copies_and_cancels_through_the_relay() -> Result<()> {
    let scene = Scene::new()?;
    let postgres = Postgres::start(scene.lab.host(), "host all all 10.7.0.2/32 scram-sha-256")?;
    postgres.at_home(scene.lab.host(), "alter role postgres password 'secret'")?;
    scene.allow(&["5432", "--path", "relay"])?;

    let wrong = server::output(postgres.psql(&scene, 5432, &["select 1"]).env("PGPASSWORD", "guess"))?;
    ensure!(String::from_utf8_lossy(&wrong.stderr).contains("password authentication failed"), "{wrong:?}");
    let with_password = |mut command: Command| {
        command.env("PGPASSWORD", "secret");
        command
    };
    let psql = |queries: &[&str]| with_password(postgres.psql(&scene, 5432, queries));
    let address = server::line(&mut psql(&["select inet_client_addr()"]))?;
    ensure!(address == scene.container_ip.to_string(), "{address}");

    let pgbench = |arguments: &str| {
        let mut command = with_password(postgres.client(&scene, "pgbench", 5432));
        server::line(command.args(arguments.split(' ')))
    };
    pgbench("--initialize --quiet --scale=1")?;
    for protocol in ["simple", "prepared"] {
        let report =
            pgbench(&format!("--client=8 --jobs=2 --transactions=100 --no-vacuum --protocol={protocol}"))?;
        ensure!(report.contains("actually processed: 800/800"), "{protocol}: {report}");
    }

    copy_out_and_in(&postgres, &psql)?;
    cancel(&psql)
}

fn copy_out_and_in(postgres: &Postgres, psql: &dyn Fn(&[&str]) -> Command) -> Result<()> {
    const ROWS: usize = 52_000;
    let mut expected = String::new();
    for row in 1..=ROWS {
        let digits = format!("{row}-");
        let text = digits.repeat(1000 / digits.len() + 1);
        writeln!(expected, "{row}\t{}", &text[..1000])?;
    }
    ensure!(expected.len() > 50_000_000);
    let query = format!(
        "copy (select i, rpad('', 1000, i::text || '-') from generate_series(1, {ROWS}) i) to stdout"
    );
    let out = printed(&mut psql(&[&query]))?;
    ensure!(out == expected.as_bytes(), "{} bytes of {} came out", out.len(), expected.len());

    let file = server::file_of(postgres.folder.path(), "rows", expected.as_bytes())?;
    let copied = psql(&["create table rows (i int, text text)", "copy rows from stdin"])
        .stdin(fs::File::open(&file)?)
        .output()?;
    ensure!(copied.status.success(), "{copied:?}");
    // What the server has of it, told in a line.
    let same = "bool_and(text = rpad('', 1000, i::text || '-'))";
    let mut told = psql(&[&format!("select count(*) || ' ' || {same} || ' ' || sum(i) from rows")]);
    let sum = ROWS * (ROWS + 1) / 2;
    let told = server::line(&mut told)?;
    ensure!(told == format!("{ROWS} true {sum}"), "{told}");
    Ok(())
}

/// The request to cancel comes by a connection of its own, which carries 16 bytes and ends.
fn cancel(psql: &dyn Fn(&[&str]) -> Command) -> Result<()> {
    let sleeper = psql(&["select pg_sleep(50)"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let sleeps = "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and wait_event = \
                  'PgSleep'";
    patience::until("the query runs", || Ok((server::line(&mut psql(&[sleeps]))? == "1").then_some(())))?;
    let asked = Instant::now();
    kill(Pid::from_raw(sleeper.id().cast_signed()), Signal::SIGINT)?;
    let output = sleeper.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("canceling statement due to user request"), "{output:?}");
    ensure!(asked.elapsed() < patience::seconds(2), "only after {:?}", asked.elapsed());
    patience::until("the query is over", || Ok((server::line(&mut psql(&[sleeps]))? == "0").then_some(())))?;
    ensure!(asked.elapsed() < Duration::from_secs(20));
    Ok(())
}

//! The examples, as they are: compose, labels, and services on the host's loopback. PostgreSQL and Redis are
//! the real ones; plain HTTP servers stand in for Ollama and for an MCP server. The images are the harness'
//! busybox, since none can be pulled.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::Output;
use lbridge_tests::harness::engine::{Container, Engine};
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::patience;
use lbridge_tests::harness::server::{self, Server, as_nobody, printed};
use lbridge_tests::harness::suite::{Need, Test, postgres_folder};
use lbridge_tests::tests;
use serde_json::Value;

use super::{Scene, Tested};

const COMPOSE: Need = Need::Program("docker-compose");
/// Not the one that is first on the PATH, which may be a wrapper.
const PYTHON: &str = "/usr/bin/python3";
/// Debian's redis-tools has the server under this name; it goes by how it is called.
const REDIS: &str = "redis-check-rdb";

pub(crate) fn tests() -> Vec<Test> {
    tests![
        each_example_is_tried: [COMPOSE],
        ollama_for_a_web_ui: [COMPOSE, Need::File(PYTHON)],
        postgresql_trusts_no_container_unasked:
            [COMPOSE, Need::Postgres, Need::Program("setpriv"), Need::Program("unshare")],
        redis_for_as_many_workers_as_there_are: [COMPOSE, Need::Program(REDIS), Need::Program("redis-cli")],
        an_mcp_server_for_a_network: [COMPOSE, Need::File(PYTHON)],
    ]
}

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

/// An engine, a daemon, and an example.
struct Example {
    scene: Scene,
    folder: PathBuf,
}

impl Example {
    /// With an image that does nothing for as long as one likes.
    fn new(name: &str, config: &str) -> Result<Example> {
        let engine = Tested::start()?;
        engine.cli(&["create", "--name=still", "lab", "sh"])?;
        engine.cli(&["commit", "--change", r#"CMD ["sleep", "1000000"]"#, "still", "idle"])?;
        engine.cli(&["rm", "still"])?;
        let scene = Scene::configured(engine, config)?;
        Ok(Example { scene, folder: examples().join(name) })
    }

    fn compose(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
        let mut command = Command::new("docker-compose");
        command
            .args(["--no-ansi", "--project-name", "example", "--file"])
            .arg(self.folder.join("compose.yaml"));
        command.env("DOCKER_HOST", "unix:///run/docker.sock").env("IMAGE", "idle").env_remove("SOURCE");
        command.env("HOME", "/run").envs(environment.iter().copied()).args(arguments);
        let output: Output = server::output(&mut command)?.into();
        ensure!(output.status == 0, "docker-compose {arguments:?}: {output:?}");
        Ok(())
    }

    /// The service's containers.
    fn containers(&self, service: &str) -> Result<Vec<Container>> {
        let label = format!("label=com.docker.compose.service={service}");
        let ids = self.scene.engine.cli(&["ps", "--quiet", "--no-trunc", "--filter", &label])?;
        Ok(ids.lines().map(|id| Container { id: id.to_owned() }).collect())
    }

    fn container(&self, service: &str) -> Result<Container> {
        self.containers(service)?.pop().with_context(|| format!("no container of {service}"))
    }

    /// The label's rule, once it is there and served; what it is asked for by.
    fn served(&self, network: &str, port: u16) -> Result<Value> {
        patience::until(&format!("{network} {port} is served"), || {
            let rule = self.scene.daemon.rule(network, port)?;
            let is_served = |rule: &Value| rule["state"] == "steered" || rule["state"] == "relayed";
            Ok(rule.filter(|rule| rule["origin"] == "label" && is_served(rule)))
        })
    }

    /// Returns the address that containers dial, as `status` has it.
    fn gateway(&self, network: &str, port: u16) -> Result<String> {
        let rule = self.scene.daemon.rule(network, port)?.context("no rule")?;
        Ok(rule["gateways"][0]["address"].as_str().context("no gateway")?.to_owned())
    }

    /// Returns what an HTTP server says to a request of the container's own program.
    fn http(
        &self,
        container: &Container,
        host: &str,
        port: u16,
        request: &str,
        body: &str,
    ) -> Result<String> {
        let length = body.len();
        let head = format!(r"{request} HTTP/1.0\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n");
        let dial = format!("printf '{head}{body}' | timeout 5 nc {host} {port}");
        Ok(self.scene.engine.exec(container, &["sh", "-c", &dial])?.stdout)
    }

    /// Takes it back; nothing is left.
    fn down(self, network: &str, port: u16) -> Result<()> {
        self.compose(&["down", "--timeout", "0"], &[])?;
        patience::until("its rule is gone", || {
            Ok(self.scene.daemon.rule(network, port)?.is_none().then_some(()))
        })
    }

    fn no_problems(&self) -> Result<()> {
        let labels = &self.scene.daemon.status()?["labels"];
        ensure!(labels["problems"].as_array().is_some_and(Vec::is_empty), "{labels}");
        Ok(())
    }
}

fn each_example_is_tried() -> Result<()> {
    let mut names = vec![];
    for entry in fs::read_dir(examples())? {
        let folder = entry?.path();
        for file in ["compose.yaml", "README.md"] {
            ensure!(folder.join(file).is_file(), "{} has no {file}", folder.display());
        }
        names.push(folder.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }
    names.sort();
    // Each has a test below.
    ensure!(names == ["mcp-server", "ollama-web-ui", "postgresql", "redis"], "{names:?}");
    Ok(())
}

fn ollama_for_a_web_ui() -> Result<()> {
    let example = Example::new("ollama-web-ui", "labels = true\nlabel_ports = [11434]\n")?;
    let folder = tempfile::Builder::new().prefix("ollama.").tempdir_in("/run")?;
    fs::create_dir(folder.path().join("api"))?;
    fs::write(folder.path().join("api/version"), "{\"version\":\"0.9\"}")?;
    // Stands in for Ollama.
    let mut ollama = example.scene.host.command(PYTHON);
    ollama.args(["-m", "http.server", "--bind", "127.0.0.1", "11434", "--directory"]).arg(folder.path());
    let _ollama = Server::start("ollama", ollama, &example.scene.host, "127.0.0.1:11434".parse()?)?;

    example.compose(&["up", "-d"], &[])?;
    let rule = example.served("example_default", 11434)?;
    ensure!(rule["from"] == serde_json::json!(["example_web-ui_1"]) && rule["localhost"] == true, "{rule}");
    let ui = example.container("web-ui")?;
    let gateway = example.gateway("example_default", 11434)?;
    // The image dials its own localhost.
    for host in [&gateway, "localhost"] {
        let said = example.http(&ui, host, 11434, "GET /api/version", "")?;
        ensure!(said.contains(r#"{"version":"0.9"}"#), "{host}: {said:?}");
    }
    example.no_problems()?;
    example.down("example_default", 11434)
}

/// `initdb`'s own pg_hba.conf: whoever comes from 127.0.0.1 is trusted.
struct Postgres {
    _server: Server,
    folder: tempfile::TempDir,
    programs: PathBuf,
}

impl Postgres {
    fn start(host: &NetNs) -> Result<Postgres> {
        let folder = server::folder()?;
        let programs = postgres_folder().context("no PostgreSQL")?;
        let data = folder.path().join("data");
        let mut initdb = as_nobody(host, programs.join("initdb"));
        printed(initdb.args(["--no-sync", "--no-locale", "--username=postgres", "-D"]).arg(&data))?;
        let mut command = as_nobody(host, programs.join("postgres"));
        command.arg("-D").arg(&data).arg("-k").arg(folder.path());
        // Memory not in /dev/shm, which is the machine's.
        for setting in ["listen_addresses=127.0.0.1", "fsync=off", "dynamic_shared_memory_type=mmap"] {
            command.args(["-c", setting]);
        }
        let server = Server::start("postgres", command, host, "127.0.0.1:5432".parse()?)?;
        let postgres = Postgres { _server: server, folder, programs };
        patience::until("PostgreSQL is up", || {
            Ok(postgres.at_home(host, "select 1").is_ok_and(|answer| answer == "1").then_some(()))
        })?;
        Ok(postgres)
    }

    /// A query of an administrator on the host, over the Unix socket.
    fn at_home(&self, host: &NetNs, query: &str) -> Result<String> {
        let mut psql = host.command(self.programs.join("psql"));
        server::line(psql.arg("-h").arg(self.folder.path()).args(["-U", "postgres", "-XAtqc", query]))
    }

    /// With a line more in pg_hba.conf.
    fn admit(&self, host: &NetNs, line: &str) -> Result<()> {
        let access = self.folder.path().join("data/pg_hba.conf");
        fs::write(&access, format!("{}{line}\n", fs::read_to_string(&access)?))?;
        self.at_home(host, "select pg_reload_conf()").map(drop)
    }

    /// From the container's network, by the gateway in the example's subnet; what it says of the address that
    /// it sees, or why not.
    fn address_seen(&self, example: &Example, container: &Container, password: &str) -> Result<Output> {
        let mut psql = example.scene.engine.netns(container)?.command(self.programs.join("psql"));
        psql.env("PGHOST", "172.31.54.1").env("PGPASSWORD", password);
        psql.args(["-U", "postgres", "--no-password", "-XAtqc", "select host(inet_client_addr())"]);
        psql.env("PGCONNECT_TIMEOUT", "5");
        Ok(server::output(&mut psql)?.into())
    }
}

fn postgresql_trusts_no_container_unasked() -> Result<()> {
    const CONFIG: &str = "labels = true\nlabel_ports = [5432]\n";
    let example = Example::new("postgresql", CONFIG)?;
    let host = example.scene.host.clone();
    let postgres = Postgres::start(&host)?;
    example.compose(&["up", "-d"], &[])?;
    example.served("example_default", 5432)?;
    let app = example.container("app")?;
    let own = example.scene.engine.cli(&[
        "inspect",
        "--format",
        "{{.NetworkSettings.Networks.example_default.IPAddress}}",
        &app.id,
    ])?;
    let output = postgres.address_seen(&example, &app, "")?;
    let refused = format!("no pg_hba.conf entry for host \"{own}\"");
    ensure!(output.status != 0 && output.stderr.contains(&refused), "{output:?}");

    // As the README has it.
    postgres.at_home(&host, "alter role postgres password 'secret'")?;
    postgres.admit(&host, "host all all 172.31.54.0/24 scram-sha-256")?;
    let output = patience::until("PostgreSQL has read the line", || {
        let output = postgres.address_seen(&example, &app, "wrong")?;
        Ok((!output.stderr.contains("no pg_hba.conf entry")).then_some(output))
    })?;
    ensure!(output.status != 0 && output.stderr.contains("password authentication failed"), "{output:?}");
    let output = postgres.address_seen(&example, &app, "secret")?;
    ensure!(output.stdout.trim_end() == own, "{output:?}");
    example.no_problems()?;

    // To be taken for the host takes two: the label, and the administrator.
    let loopback = [("SOURCE", "loopback")];
    example.compose(&["up", "-d", "--timeout", "0"], &loopback)?;
    let app = example.container("app")?;
    let problem = patience::until("status tells of the label", || {
        let problem = example.scene.daemon.status()?["labels"]["problems"][0].clone();
        Ok(problem.is_object().then_some(problem))
    })?;
    ensure!(problem["label"] == "lbridge.source=loopback", "{problem}");
    let output = postgres.address_seen(&example, &app, "")?;
    ensure!(output.status != 0 && output.stderr.contains("Connection refused"), "{output:?}");
    example.scene.reload(&format!("{CONFIG}label_sources = [\"container\", \"loopback\"]\n"))?;
    example.served("example_default", 5432)?;
    let output = postgres.address_seen(&example, &app, "")?;
    ensure!(output.stdout.trim_end() == "127.0.0.1", "{output:?}");
    example.down("example_default", 5432)
}

fn redis_for_as_many_workers_as_there_are() -> Result<()> {
    let config = "labels = true\nlabel_ports = [6379]\nlabel_sources = [\"container\", \"loopback\"]\n";
    let example = Example::new("redis", config)?;
    let folder = server::folder()?;
    let mut redis = example.scene.host.command(REDIS);
    redis.arg0("redis-server").args(["--bind", "127.0.0.1", "--port", "6379", "--save", ""]);
    redis.arg("--dir").arg(folder.path());
    let _redis = Server::start("redis", redis, &example.scene.host, "127.0.0.1:6379".parse()?)?;
    let shared_by = |count: usize| {
        patience::until(&format!("the rule is for {count} workers"), || {
            let rule = example.scene.daemon.rule("example_default", 6379)?;
            let from = rule.and_then(|rule| Some(rule["from"].as_array()?.len()));
            Ok((from == Some(count)).then_some(()))
        })
    };
    let ping = |container: &Container| {
        let mut cli = example.scene.engine.netns(container)?.command("redis-cli");
        cli.args(["-h", &example.gateway("example_default", 6379)?, "ping"]);
        Ok::<_, anyhow::Error>(Output::from(server::output(&mut cli)?))
    };

    example.compose(&["up", "-d", "--scale", "worker=3"], &[])?;
    shared_by(3)?;
    example.served("example_default", 6379)?;
    for worker in example.containers("worker")? {
        let output = ping(&worker)?;
        // It says so and closes at once; the command that comes in meanwhile makes that a reset.
        let denied = output.stdout.contains("DENIED") || !output.stderr.is_empty();
        ensure!(denied && !output.stdout.contains("PONG"), "{output:?}");
    }
    example.compose(&["up", "-d", "--timeout", "0", "--scale", "worker=2"], &[])?;
    shared_by(2)?;
    example.compose(&["up", "-d", "--timeout", "0", "--scale", "worker=2"], &[("SOURCE", "loopback")])?;
    patience::until("the rule is for the new ones", || {
        let rule = example.scene.daemon.rule("example_default", 6379)?;
        let is_it = |rule: &Value| rule["source"] == "loopback" && rule["state"] == "steered";
        Ok(rule.is_some_and(|rule| is_it(&rule)).then_some(()))
    })?;
    shared_by(2)?;
    for worker in example.containers("worker")? {
        let output = ping(&worker)?;
        ensure!(output.stdout.trim_end() == "PONG", "{output:?}");
    }
    example.no_problems()?;
    example.down("example_default", 6379)
}

fn an_mcp_server_for_a_network() -> Result<()> {
    let example = Example::new("mcp-server", "labels = true\nlabel_ports = [8931]\n")?;
    let mut server = example.scene.host.command(PYTHON);
    server.arg(example.folder.join("server.py"));
    let _server = Server::start("mcp", server, &example.scene.host, "127.0.0.1:8931".parse()?)?;
    example.compose(&["up", "-d"], &[])?;
    let rule = example.served("example_tools", 8931)?;
    ensure!(rule["from"].as_array().is_some_and(Vec::is_empty), "for all of the network: {rule}");
    let agent = example.container("agent")?;
    let gateway = example.gateway("example_tools", 8931)?;
    for (method, answer) in
        [("initialize", "protocolVersion"), ("tools/list", "The host's time."), ("tools/call", "text")]
    {
        let request = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{method}"}}"#);
        for host in [&gateway, "localhost"] {
            let said = example.http(&agent, host, 8931, "POST /mcp", &request)?;
            ensure!(said.contains("200 OK") && said.contains(answer), "{host}: {said:?}");
        }
    }
    example.no_problems()?;
    example.down("example_tools", 8931)
}

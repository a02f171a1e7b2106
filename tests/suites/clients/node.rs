//! Node: a server on `localhost`, which is `[::1]` alone where the host's names say so first.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::daemon::Options;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;

use lbridge_tests::harness::server::{self, Server};

pub(crate) fn tests() -> Vec<Test> {
    tests![a_server_on_localhost_is_reached_from_both_families: [Need::Program("node")]]
}

const BOTH: (&str, &str) = ("10.7.0.1/24 fd07::1/64", "10.7.0.2/24 fd07::2/64");

fn a_server_on_localhost_is_reached_from_both_families() -> Result<()> {
    for listens in ["127.0.0.1:8080", "[::1]:8080"] {
        let scene = Scene::with(BOTH, Options::default())?;
        let listens: SocketAddr = listens.parse()?;
        let mut command = scene.lab.host().command("node");
        command.args([
            "--dns-result-order=ipv4first",
            "--eval",
            "require('http').createServer((request, response) => response.end(request.socket.remoteAddress))
                .listen(8080, process.argv[1])",
            // As the host's own /etc/hosts has it: of both families, or of one.
            if listens.is_ipv4() { "localhost" } else { "::1" },
        ]);
        let _server = Server::start("node", command, scene.lab.host(), listens)?;
        scene.allow(&["8080"])?;
        for (gateway, container) in [("10.7.0.1:8080", "10.7.0.2"), ("[fd07::1]:8080", "fd07::2")] {
            let dialled: SocketAddr = gateway.parse()?;
            let mut client = scene.container.command("node");
            client.args([
                "--eval",
                "fetch(process.argv[1]).then(answer => answer.text()).then(console.log)",
                &format!("http://{gateway}/"),
            ]);
            let output = server::output(&mut client)?;
            let seen = String::from_utf8(output.stdout)?;
            let seen = seen.trim();
            let status = scene.daemon.status()?;
            let gateways = status["rules"][0]["gateways"].as_array().context("gateways")?;
            let told = gateways.iter().find(|it| it["address"] == dialled.ip().to_string());
            let way = told.context("the gateway")?["state"].as_str().context("a state")?.to_owned();
            let same_family = dialled.is_ipv4() == listens.is_ipv4();
            ensure!(way == if same_family { "steered" } else { "relayed" }, "{gateway}: {status:#}");
            // What an IPv4 socket is shown of an IPv6 container is a stand-in.
            let stand_in = !same_family && listens.is_ipv4() && seen.starts_with("127.");
            let shown = seen == container || seen == format!("::ffff:{container}") || stand_in;
            ensure!(
                shown && seen != "127.0.0.1",
                "{gateway} to {listens}: {seen:?} {output:?}",
                output = output.status
            );
        }
    }
    Ok(())
}

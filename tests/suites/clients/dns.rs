//! DNS: dnsmasq on 127.0.0.1, asked by containers, by UDP and by TCP.

use anyhow::{Result, ensure};
use lbridge_tests::harness::patience;
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::harness::udp;
use lbridge_tests::tests;

use lbridge_tests::harness::server::Server;

pub(crate) fn tests() -> Vec<Test> {
    tests![dnsmasq_answers_containers: [Need::Program("dnsmasq"), Need::Program("busybox")]]
}

fn dnsmasq(scene: &Scene, (at, options): (&str, &[&str])) -> Result<Server> {
    let mut command = scene.lab.host().command("dnsmasq");
    command.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--pid-file=",
    ]);
    command.args(["--user=root", "--address=/lab.test/192.0.2.53"]).args(options);
    Server::start("dnsmasq", command, scene.lab.host(), at.parse()?)
}

/// Returns the output of `nslookup` in the container. Its socket is connected, so that an answer must come
/// from whom it has asked.
fn asked(scene: &Scene) -> Result<String> {
    let mut command = scene.container.command("timeout");
    command.args(["5", "busybox", "nslookup", "-type=a", "lab.test", &scene.gateway(53).ip().to_string()]);
    Ok(String::from_utf8_lossy(&command.output()?.stdout).into_owned())
}

fn dnsmasq_answers_containers() -> Result<()> {
    // The first tells of the source by bind(), the second asks for it with each answer (IP_PKTINFO).
    let bound = &["--listen-address=127.0.0.1", "--bind-interfaces"][..];
    for options in [("127.0.0.1:53", bound), ("0.0.0.0:53", &[])] {
        let scene = Scene::new()?;
        let server = dnsmasq(&scene, options)?;
        scene.allow(&["53/udp"])?;
        scene.must_be(53, "steered")?;
        let said = asked(&scene)?;
        ensure!(said.contains("192.0.2.53"), "{options:?}: {said}");
        drop(server);
        udp::refused(&scene.container, scene.gateway(53))?;
        let _server = dnsmasq(&scene, options)?;
        patience::until("answers after a restart", || {
            Ok(asked(&scene)?.contains("192.0.2.53").then_some(()))
        })?;
    }
    Ok(())
}

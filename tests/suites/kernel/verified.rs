//! `lbridge verify` knows what this kernel can do. What it finds has a suite of its own.

use anyhow::{Context, Result, ensure};
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::service::Service;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![rules_are_verified_on_this_kernel]
}

fn rules_are_verified_on_this_kernel() -> Result<()> {
    let scene = Scene::new()?;
    scene.lab.add_bridge("lab1", "10.8.0.1/24")?;
    let _plain = scene.service("plain", "127.0.0.1:8080")?;
    scene.allow(&["8080"])?;
    scene.allow(&["9090=8080", "--path", "relay"])?;
    scene.allow(&["7000"])?;
    scene.daemon.allow(&["bridge:lab1", "80=8080"])?;
    let output = scene.daemon.cli(&["verify"])?;
    ensure!(output.status == 0, "{}", output.stdout);
    ensure!(output.stdout.lines().last().context("no line")?.starts_with("Verified: "), "{output:?}");

    let _open = Service::start(scene.lab.host(), "open", "0.0.0.0:7000")?;
    let output = scene.daemon.cli(&["verify"])?;
    ensure!(output.status == 1 && output.stdout.contains("listens on all addresses: "), "{}", output.stdout);
    Ok(())
}

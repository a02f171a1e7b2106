//! What the host's other programs and sockets notice of lbridge: nothing.

use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lbridge_tests::harness::daemon::Daemon;
use lbridge_tests::harness::lab::Lab;
use lbridge_tests::harness::netns::NetNs;
use lbridge_tests::harness::suite::Test;
use lbridge_tests::harness::{pins, sandbox};
use lbridge_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        a_sock_ops_program_before_ours_is_heard,
        a_sock_ops_program_after_ours_is_heard,
        a_sock_ops_program_is_heard_when_the_daemon_is_dead,
    ]
}

/// An initial time-out of 50 jiffies, which is 50 to 500 ms. The default is a second.
const JIFFIES: u8 = 50;

/// Dials a neighbour that never answers; how long it took until the kernel gave up. One retry, so that it is three times the
/// initial time-out.
fn gives_up_after(host: &NetNs) -> Result<Duration> {
    host.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    let silent = "10.7.0.99";
    host.shell(&format!("ip neigh replace {silent} lladdr 02:00:00:00:00:99 dev lab0 nud permanent"))?;
    host.run(|| {
        let begun = Instant::now();
        let error = TcpStream::connect((silent, 80)).err().map(|error| error.kind());
        ensure!(error == Some(io::ErrorKind::TimedOut), "nobody answers: {error:?}");
        Ok(begun.elapsed())
    })
}

fn heard(host: &NetNs) -> Result<()> {
    let took = gives_up_after(host)?;
    ensure!(took < Duration::from_secs(2), "the other program's time-out is not in force: {took:?}");
    Ok(())
}

fn lab() -> Result<Lab> {
    let lab = Lab::new()?;
    let _container = lab.container(&lab.add_bridge("lab0", "10.7.0.1/24")?, "10.7.0.2/24")?;
    Ok(lab)
}

fn a_sock_ops_program_before_ours_is_heard() -> Result<()> {
    let lab = lab()?;
    let alone = gives_up_after(lab.host())?;
    ensure!(alone > Duration::from_secs(2), "the default: {alone:?}");
    pins::ask_for_timeout(sandbox::CGROUP_ROOT.as_ref(), JIFFIES)?;
    heard(lab.host())?;
    let daemon = Daemon::start(lab.host())?;
    heard(lab.host())?;
    daemon.allow(&["bridge:lab0", "8080"])?;
    heard(lab.host())
}

fn a_sock_ops_program_after_ours_is_heard() -> Result<()> {
    let lab = lab()?;
    let _daemon = Daemon::start(lab.host())?;
    pins::ask_for_timeout(sandbox::CGROUP_ROOT.as_ref(), JIFFIES)?;
    heard(lab.host())
}

fn a_sock_ops_program_is_heard_when_the_daemon_is_dead() -> Result<()> {
    let lab = lab()?;
    pins::ask_for_timeout(sandbox::CGROUP_ROOT.as_ref(), JIFFIES)?;
    let mut daemon = Daemon::start(lab.host())?;
    daemon.kill9()?;
    heard(lab.host())
}

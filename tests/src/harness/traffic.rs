//! traffic: clients that connect repeatedly, and record what went wrong.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use super::netns::NetNs;
use super::{client, patience};

const CLIENTS: usize = 4;
/// Pause between two connections of a client, so that others get the processor.
const PAUSE: Duration = Duration::from_millis(2);

/// The clients that run in the background.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Traffic {
    /// Starts clients, each with one connection at a time, that must be greeted by `service` and get back
    /// what they send.
    pub fn start(netns: &NetNs, to: SocketAddr, service: &'static str) -> Traffic {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = || {
            let (netns, stop, served) = (netns.clone(), Arc::clone(&stop), Arc::clone(&served));
            thread::spawn(move || {
                let mut failures = vec![];
                while !stop.load(Ordering::SeqCst) {
                    match client::served_by(&netns, to, service) {
                        Ok(_) => drop(served.fetch_add(1, Ordering::SeqCst)),
                        Err(error) => failures.push(format!("{error:#}")),
                    }
                    thread::sleep(PAUSE);
                }
                failures
            })
        };
        let clients = (0..CLIENTS).map(|_| client()).collect();
        Traffic { stop, served, clients }
    }

    /// Returns when `connections` more connections were served.
    pub fn flows(&self, connections: usize) -> Result<()> {
        let wanted = self.served.load(Ordering::SeqCst) + connections;
        patience::until("connections are served", || {
            Ok((self.served.load(Ordering::SeqCst) >= wanted).then_some(()))
        })
    }

    /// Stops the clients; returns the failures, one for each connection.
    pub fn failures(self) -> Result<Vec<String>> {
        self.stop.store(true, Ordering::SeqCst);
        let join = |client: JoinHandle<Vec<String>>| client.join().map_err(|_| anyhow!("a client panicked"));
        let failures = self.clients.into_iter().map(join).collect::<Result<Vec<_>>>()?;
        Ok(failures.concat())
    }

    /// Stops the clients; returns an error if anything failed.
    pub fn all_served(self) -> Result<()> {
        let served = Arc::clone(&self.served);
        let failures = self.failures()?;
        let (failed, served) = (failures.len(), served.load(Ordering::SeqCst));
        ensure!(failures.is_empty(), "{failed} failed, {served} were served; the first: {}", failures[0]);
        Ok(())
    }
}

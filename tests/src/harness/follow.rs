//! A program that goes on and on, line by line.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::patience;

/// A program whose standard output is read as it comes. Killed when this goes.
#[derive(Debug)]
pub struct Follow {
    child: Child,
    lines: Receiver<String>,
    /// What was read so far.
    seen: Vec<String>,
}

impl Follow {
    /// Starts it.
    pub fn start(mut command: Command) -> Result<Follow> {
        let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("{command:?}"))?;
        let output = BufReader::new(child.stdout.take().context("no pipe")?);
        let (sender, lines) = channel();
        thread::spawn(move || {
            // Whoever waited for them may have seen enough.
            output.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
        });
        Ok(Follow { child, lines, seen: Vec::new() })
    }

    /// Waits for a line of which `wanted` makes something; lines before it are passed over.
    pub fn until<T>(&mut self, what: &str, mut wanted: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let (lines, seen) = (&self.lines, &mut self.seen);
        patience::until(what, || {
            loop {
                match lines.try_recv() {
                    Ok(line) => {
                        let found = wanted(&line);
                        seen.push(line);
                        if found.is_some() {
                            return Ok(found);
                        }
                    }
                    Err(TryRecvError::Empty) => return Ok(None),
                    Err(TryRecvError::Disconnected) => bail!("it has ended"),
                }
            }
        })
        .with_context(|| format!("seen: {:#?}", self.seen))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Waits until it has ended by itself, or by a signal.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        patience::until("the program ends", || Ok(self.child.try_wait()?))
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

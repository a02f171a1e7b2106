//! follow: a long-running program, read line by line.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::patience;

/// A program whose standard output is read as it arrives. Dropping it kills the program.
#[derive(Debug)]
pub struct Follow {
    child: Child,
    lines: Receiver<String>,
    /// The lines read so far.
    seen: Vec<String>,
}

impl Follow {
    /// Starts the program.
    pub fn start(mut command: Command) -> Result<Follow> {
        let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("{command:?}"))?;
        let output = BufReader::new(child.stdout.take().context("no pipe")?);
        let (sender, lines) = channel();
        thread::spawn(move || {
            // The receiver may have seen enough and be gone.
            output.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
        });
        Ok(Follow { child, lines, seen: Vec::new() })
    }

    /// Waits for a line for which `wanted` returns a value; skips the lines before it.
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

    /// Sends a signal to the program.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Waits until the program has ended by itself or by a signal.
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

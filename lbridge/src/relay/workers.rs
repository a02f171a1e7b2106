//! Workers: the threads that relays run on. A relay and its connections stay on one thread: waking a task on
//! another thread costs more than a small message does. A flooded relay also does not keep the control API
//! from answering.

use std::{io, thread};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};

/// The most threads. More would not make relays faster, and each costs memory.
const MAX: usize = 4;

/// Threads with one event loop each. Dropping this ends everything that runs on them.
#[derive(Debug)]
pub(super) struct Workers {
    threads: Vec<Worker>,
    next: usize,
}

#[derive(Debug)]
struct Worker {
    handle: Handle,
    /// Dropping it ends the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Workers {
    /// Starts one thread for each CPU that this process may use, up to [`MAX`].
    pub(super) fn start() -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, usize::from).min(MAX);
        let threads = (0..count).map(|_| Worker::start()).collect::<io::Result<_>>()?;
        Ok(Self { threads, next: 0 })
    }

    /// Returns the event loop of the next thread, round robin.
    pub(super) fn next(&mut self) -> Handle {
        self.next = (self.next + 1) % self.threads.len();
        self.threads[self.next].handle.clone()
    }
}

impl Worker {
    fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new().name("relay".to_owned()).spawn(move || {
            let _ = runtime.block_on(stopped);
        })?;
        Ok(Self { handle, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The thread's connections are closed when this returns.
            let _ = thread.join();
        }
    }
}

//! logs: the output of a test's processes, kept to be printed if the test fails.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// The output of one process.
#[derive(Clone, Debug)]
pub struct Log {
    name: String,
    text: Arc<Mutex<String>>,
}

static ALL: Mutex<Vec<Log>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    /// Creates an empty log that [`dump`] will print.
    pub fn new(name: impl Into<String>) -> Log {
        let log = Log { name: name.into(), text: Arc::default() };
        lock(&ALL).push(log.clone());
        log
    }

    /// Copies everything from `source` into the log, on a thread of its own, until the source ends.
    pub fn follow(&self, source: impl Read + Send + 'static) {
        let text = Arc::clone(&self.text);
        thread::spawn(move || {
            let mut source = BufReader::new(source);
            let mut line = Vec::new();
            while source.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                lock(&text).push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
    }

    /// Adds a line from the test itself.
    pub fn note(&self, line: &str) {
        let mut text = lock(&self.text);
        text.push_str(line);
        text.push('\n');
    }

    /// Returns everything logged so far.
    pub fn text(&self) -> String {
        lock(&self.text).clone()
    }
}

/// Prints every log of this process to standard error.
pub fn dump() {
    for log in lock(&ALL).iter() {
        let text = log.text();
        if !text.is_empty() {
            eprintln!("---- {} ----\n{}", log.name, text.trim_end());
        }
    }
}

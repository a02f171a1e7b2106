//! events: the event bus. Each subscriber reads from one shared buffer of fixed length, and learns how many
//! events it has missed if it is too slow. The daemon never waits for a subscriber.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use jiff::Timestamp;
use tokio::sync::{
    OwnedSemaphorePermit, Semaphore,
    broadcast::{self, error::RecvError},
    mpsc,
};

use super::protocol::{Event, EventKind};

/// Maximum number of events that a slow subscriber may be behind.
const BUFFER: usize = 1024;
/// Maximum number of subscribers at the same time.
const SUBSCRIBERS: usize = 32;

/// The event bus, shared by everything in the daemon that publishes events.
#[derive(Debug, Clone)]
pub struct EventBus {
    /// The events as lines of JSON: serialized once, for all subscribers.
    lines: broadcast::Sender<Bytes>,
    places: Arc<Semaphore>,
    wake: mpsc::Sender<()>,
}

impl EventBus {
    /// Creates an event bus. `wake` gets a unit when a subscriber connects.
    pub fn new(wake: mpsc::Sender<()>) -> Self {
        let places = Arc::new(Semaphore::new(SUBSCRIBERS));
        Self { lines: broadcast::Sender::new(BUFFER), places, wake }
    }

    /// Returns true if at least one subscriber is connected: without one, the caller need not build an event.
    pub fn has_subscribers(&self) -> bool {
        self.lines.receiver_count() > 0
    }

    /// Publishes an event to all subscribers.
    pub fn publish(&self, what: EventKind) {
        if self.has_subscribers() {
            // The last subscriber may have left just now.
            let _ = self.lines.send(line(what));
        }
    }

    /// Subscribes to all events from now on, as lines of JSON; `None` if there are too many subscribers. The
    /// stream ends with the daemon.
    pub(super) fn subscribe(&self) -> Option<impl Stream<Item = Bytes> + Send + 'static> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let first = EventKind::Following { version: env!("CARGO_PKG_VERSION").to_owned() };
        let subscriber =
            Subscriber { lines: self.lines.subscribe(), first: Some(line(first)), _place: place };
        let _ = self.wake.try_send(());
        Some(stream::unfold(subscriber, async |mut subscriber| Some((subscriber.next().await?, subscriber))))
    }
}

struct Subscriber {
    lines: broadcast::Receiver<Bytes>,
    first: Option<Bytes>,
    _place: OwnedSemaphorePermit,
}

impl Subscriber {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        match self.lines.recv().await {
            Ok(line) => Some(line),
            Err(RecvError::Lagged(events)) => Some(line(EventKind::Missed { events })),
            Err(RecvError::Closed) => None,
        }
    }
}

fn line(what: EventKind) -> Bytes {
    let mut line = serde_json::to_vec(&Event { at: Timestamp::now(), what }).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;
    use crate::planning::inventory::EngineKind;

    fn missed(line: &Bytes) -> Option<u64> {
        match serde_json::from_slice::<Event>(line).unwrap().what {
            EventKind::Missed { events } => Some(events),
            _ => None,
        }
    }

    #[tokio::test]
    async fn a_slow_subscriber_loses_the_oldest_and_is_told_how_many() {
        let news = EventBus::new(mpsc::channel(1).0);
        assert!(!news.has_subscribers());
        let mut slow = Box::pin(news.subscribe().unwrap());
        let mut quick = Box::pin(news.subscribe().unwrap());
        assert!(quick.next().await.is_some(), "the first line");
        for count in 1..=BUFFER as u64 + 7 {
            news.publish(EventKind::Docker {
                engine: EngineKind::Docker,
                version: None,
                error: Some(count.to_string()),
            });
            assert_eq!(missed(&quick.next().await.unwrap()), None);
        }
        assert!(slow.next().await.is_some(), "the first line is its own");
        assert_eq!(missed(&slow.next().await.unwrap()), Some(7));
        let oldest = slow.next().await.unwrap();
        assert!(String::from_utf8_lossy(&oldest).contains("\"error\":\"8\""));
        drop(news);
        let rest = slow.count().await;
        assert_eq!((rest, quick.next().await), (BUFFER - 1, None), "it ends with the daemon");
    }

    #[test]
    fn events_of_later_versions_are_no_error() {
        let line = r#"{"at":"2026-01-01T00:00:00Z","event":"invented","port":5}"#;
        assert_eq!(serde_json::from_str::<Event>(line).unwrap().what, EventKind::Unknown);
    }

    #[tokio::test]
    async fn places_are_given_back() {
        let news = EventBus::new(mpsc::channel(1).0);
        let all: Vec<_> = (0..SUBSCRIBERS).map(|_| news.subscribe().unwrap()).collect();
        assert!(news.subscribe().is_none());
        drop(all);
        assert!(news.subscribe().is_some() && !news.has_subscribers());
    }
}

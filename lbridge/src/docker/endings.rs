//! Endings: applies the engine's events about containers that have ended or left a network, before
//! its lists show it.

use std::collections::{BTreeMap, HashMap};

use bollard::models::EventMessage;
use jiff::Timestamp;
use tokio::sync::watch;

use super::view::{Container, ContainerLookup, View};

/// The containers that have ended or left a network, according to the engine's events.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// Maps the id of an ended container to the process it had. The engine reports the end before its
    /// description of the container shows it, and gives the container's addresses to others in the meantime.
    processes: HashMap<String, u32>,
    /// The departures that were reported while a look was under way: the look may describe these containers
    /// as they were before.
    meanwhile: Vec<Departure>,
}

/// A container's end, or its departure from a network.
#[derive(Debug)]
struct Departure {
    container: String,
    /// The network's id; `None` if the container has ended, and so left all networks.
    network: Option<String>,
}

impl Departure {
    /// Removes what the container no longer has from its known state. Returns true if that changed anything.
    fn take_from(&self, its: &mut Container) -> bool {
        match &self.network {
            None => std::mem::take(&mut its.running),
            network => {
                let left = its.attachments.iter_mut().filter(|there| there.id == *network);
                left.fold(false, |other, there| other | !std::mem::take(&mut there.addresses).is_empty())
            }
        }
    }
}

impl Ended {
    /// Marks the start of a look, which will include all events that were reported before.
    pub(super) fn begin_look(&mut self) {
        self.meanwhile.clear();
    }

    /// Applies an event to the view at once, without another look. Ignores events from before the last look
    /// began, at `looked`: that look includes them.
    pub(super) fn hear(&mut self, event: &EventMessage, looked: Timestamp, view: &watch::Sender<View>) {
        let after = |time: i64| i128::from(time) > looked.as_nanosecond();
        let Some(id) = event.actor.as_ref().and_then(|actor| actor.id.as_ref()) else { return };
        // The process that was seen may belong to the start after the end, if a look took longer than both.
        if event.action.as_deref() == Some("start") {
            self.processes.remove(id);
        }
        if !event.time_nano.is_some_and(after) {
            return;
        }
        let container = event.actor.as_ref().and_then(|actor| actor.attributes.as_ref()?.get("container"));
        let departure = match (event.action.as_deref(), container) {
            (Some("disconnect"), Some(container)) => {
                Departure { container: container.clone(), network: Some(id.clone()) }
            }
            // Podman calls the event "died".
            (Some("die" | "died"), _) => Departure { container: id.clone(), network: None },
            _ => return,
        };
        change(view, &departure.container, |its| {
            if departure.network.is_none() {
                its.pid.and_then(|pid| self.processes.insert(its.id.clone(), pid));
            }
            departure.take_from(its)
        });
        self.meanwhile.push(departure);
    }

    /// Applies the known departures to the result of a look, until the engine reports them itself.
    pub(super) fn apply(&mut self, containers: &mut BTreeMap<String, ContainerLookup>) {
        let before = std::mem::take(&mut self.processes);
        for its in containers.values_mut().filter_map(ContainerLookup::found_mut) {
            if let Some(pid) = its.pid.filter(|pid| before.get(&its.id) == Some(pid)) {
                its.running = false;
                self.processes.insert(its.id.clone(), pid);
            }
            for departure in &self.meanwhile {
                if departure.container == its.id {
                    departure.take_from(its);
                }
            }
        }
    }
}

/// Applies `change` to the known state of a container, and notifies subscribers if it returns true.
fn change(view: &watch::Sender<View>, id: &str, mut change: impl FnMut(&mut Container) -> bool) {
    view.send_if_modified(|view| {
        let known = view.containers.values_mut().filter_map(ContainerLookup::found_mut);
        known.filter(|its| its.id == id).fold(false, |changed, its| change(its) | changed)
    });
}

#[cfg(test)]
mod tests {
    use bollard::models::EventActor;

    use super::*;
    use crate::{docker::view::EngineStatus, planning::inventory::Attachment};

    fn container(pid: u32) -> Container {
        let attachment = |network: &str, ip: &str| Attachment {
            network: network.to_owned(),
            id: Some(format!("id of {network}")),
            addresses: vec![ip.parse().unwrap()],
        };
        let attachments = vec![attachment("app", "172.18.0.2"), attachment("db", "172.19.0.2")];
        Container { id: "c".to_owned(), pid: Some(pid), running: true, attachments }
    }

    fn seen(pid: u32) -> BTreeMap<String, ContainerLookup> {
        [
            ("web".to_owned(), ContainerLookup::Found(container(pid))),
            ("gone".to_owned(), ContainerLookup::NotFound),
        ]
        .into()
    }

    fn event(action: &str, id: &str, seconds: i64) -> EventMessage {
        let attributes = [("container".to_owned(), "c".to_owned())].into();
        EventMessage {
            action: Some(action.to_owned()),
            actor: Some(EventActor { id: Some(id.to_owned()), attributes: Some(attributes) }),
            time_nano: Some(seconds * 1_000_000_000),
            ..EventMessage::default()
        }
    }

    /// Returns the known state after `event` was reported, with the last look at second 10, and whether it
    /// changed.
    fn heard(ended: &mut Ended, event: &EventMessage) -> (Container, bool) {
        let view = View {
            presence: EngineStatus::Unknown,
            networks: vec![],
            containers: seen(5),
            container_names: vec![],
            labelled: vec![],
            host_gateways: vec![],
        };
        let (sender, receiver) = watch::channel(view);
        ended.hear(event, Timestamp::from_second(10).unwrap(), &sender);
        let now = receiver.borrow().containers["web"].found().cloned().unwrap();
        (now, receiver.has_changed().unwrap())
    }

    #[test]
    fn who_has_ended_has_no_address_whatever_the_engine_says_of_the_container() {
        let mut ended = Ended::default();
        let (now, news) = heard(&mut ended, &event("die", "c", 11));
        assert!(news && !now.running);
        ended.begin_look();
        let mut looked = seen(5);
        ended.apply(&mut looked);
        assert!(!looked["web"].found().unwrap().running, "not yet");
        let mut looked = seen(6);
        ended.apply(&mut looked);
        assert_eq!(looked, seen(6), "it was started again");
        assert!(ended.processes.is_empty());
    }

    #[test]
    fn who_has_started_again_while_somebody_looked_runs() {
        let mut ended = Ended::default();
        // The view has the new process already.
        heard(&mut ended, &event("die", "c", 11));
        heard(&mut ended, &event("start", "c", 12));
        ended.begin_look();
        let mut looked = seen(5);
        ended.apply(&mut looked);
        assert_eq!(looked, seen(5));
    }

    #[test]
    fn a_look_does_not_bring_back_who_has_left_meanwhile() {
        let apply = |ended: &mut Ended, pid| {
            let mut looked = seen(pid);
            ended.apply(&mut looked);
            looked["web"].found().cloned().unwrap()
        };
        let mut ended = Ended::default();
        ended.begin_look();
        heard(&mut ended, &event("die", "c", 11));
        heard(&mut ended, &event("start", "c", 12));
        assert!(!apply(&mut ended, 5).running, "the list may be of before");
        ended.begin_look();
        assert!(apply(&mut ended, 6).running, "the next one is not");

        heard(&mut ended, &event("disconnect", "id of app", 13));
        assert!(apply(&mut ended, 6).attachments[0].addresses.is_empty(), "the list may be of before");
        ended.begin_look();
        assert_eq!(apply(&mut ended, 6), container(6), "it is there again");
    }

    #[test]
    fn who_leaves_a_network_has_no_address_there() {
        let (now, news) = heard(&mut Ended::default(), &event("disconnect", "id of app", 11));
        let addresses: Vec<_> = now.attachments.iter().map(|there| there.addresses.len()).collect();
        assert!(news && now.running && addresses == [0, 1], "{now:?}");
    }

    #[test]
    fn what_was_seen_since_is_newer_than_an_event() {
        for (action, id, seconds) in
            [("die", "c", 9), ("die", "another", 11), ("disconnect", "id of lan", 11), ("start", "c", 11)]
        {
            let (now, news) = heard(&mut Ended::default(), &event(action, id, seconds));
            assert!(!news && now == container(5), "{action} {id}");
        }
    }
}

//! Containers that have ended, or left a network, before the engine's lists say so.

use std::collections::{BTreeMap, HashMap};

use bollard::models::EventMessage;
use jiff::Timestamp;
use tokio::sync::watch;

use super::view::{Container, Sighting, View};

/// Containers that have ended, by id, with the process that they had: the engine tells of the end before it says so of the
/// container, and gives its addresses to others meanwhile.
#[derive(Debug, Default)]
pub(super) struct Ended(HashMap<String, u32>);

impl Ended {
    /// What is gone is gone at once, without another look. What happened before the last look is in there.
    pub(super) fn hear(&mut self, event: &EventMessage, looked: Timestamp, view: &watch::Sender<View>) {
        let after = |time: i64| i128::from(time) > looked.as_nanosecond();
        let Some(id) = event.actor.as_ref().and_then(|actor| actor.id.as_ref()) else { return };
        // The process that was seen may be that of the start which came after the end, if a look took longer than both.
        if event.action.as_deref() == Some("start") {
            self.0.remove(id);
        }
        if !event.time_nano.is_some_and(after) {
            return;
        }
        let container = event.actor.as_ref().and_then(|actor| actor.attributes.as_ref()?.get("container"));
        match (event.action.as_deref(), container) {
            (Some("disconnect"), Some(container)) => change(view, container, |its| {
                let left = its.attachments.iter_mut().filter(|there| there.id.as_ref() == Some(id));
                left.fold(false, |other, there| other | !std::mem::take(&mut there.addresses).is_empty())
            }),
            // Podman says "died".
            (Some("die" | "died"), _) => change(view, id, |its| {
                its.pid.and_then(|pid| self.0.insert(its.id.clone(), pid));
                std::mem::take(&mut its.running)
            }),
            _ => {}
        }
    }

    /// Tells the same of what was seen, until the engine does.
    pub(super) fn apply(&mut self, containers: &mut BTreeMap<String, Sighting>) {
        let before = std::mem::take(&mut self.0);
        for its in containers.values_mut().filter_map(|sighting| sighting.as_mut().ok()?.as_mut()) {
            if let Some(pid) = its.pid.filter(|pid| before.get(&its.id) == Some(pid)) {
                its.running = false;
                self.0.insert(its.id.clone(), pid);
            }
        }
    }
}

/// Changes what is known of a container.
fn change(view: &watch::Sender<View>, id: &str, mut change: impl FnMut(&mut Container) -> bool) {
    view.send_if_modified(|view| {
        let known = view.containers.values_mut().filter_map(|sighting| sighting.as_mut().ok()?.as_mut());
        known.filter(|its| its.id == id).fold(false, |changed, its| change(its) | changed)
    });
}

#[cfg(test)]
mod tests {
    use bollard::models::EventActor;

    use super::*;
    use crate::{docker::view::Presence, planning::inventory::Attachment};

    fn container(pid: u32) -> Container {
        let attachment = |network: &str, ip: &str| Attachment {
            network: network.to_owned(),
            id: Some(format!("id of {network}")),
            addresses: vec![ip.parse().unwrap()],
        };
        let attachments = vec![attachment("app", "172.18.0.2"), attachment("db", "172.19.0.2")];
        Container { id: "c".to_owned(), pid: Some(pid), running: true, attachments }
    }

    fn seen(pid: u32) -> BTreeMap<String, Sighting> {
        [("web".to_owned(), Ok(Some(container(pid)))), ("gone".to_owned(), Ok(None))].into()
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

    /// What is known once `event` has been heard, at second 10, and whether that is news.
    fn heard(ended: &mut Ended, event: &EventMessage) -> (Container, bool) {
        let view = View {
            presence: Presence::Unknown,
            networks: vec![],
            containers: seen(5),
            container_names: vec![],
            labelled: vec![],
            host_gateways: vec![],
        };
        let (sender, receiver) = watch::channel(view);
        ended.hear(event, Timestamp::from_second(10).unwrap(), &sender);
        let now = receiver.borrow().containers["web"].clone().unwrap().unwrap();
        (now, receiver.has_changed().unwrap())
    }

    #[test]
    fn who_has_ended_has_no_address_whatever_the_engine_says_of_the_container() {
        let mut ended = Ended::default();
        let (now, news) = heard(&mut ended, &event("die", "c", 11));
        assert!(news && !now.running);
        let mut looked = seen(5);
        ended.apply(&mut looked);
        assert!(!looked["web"].as_ref().unwrap().as_ref().unwrap().running, "not yet");
        let mut looked = seen(6);
        ended.apply(&mut looked);
        assert_eq!(looked, seen(6), "it was started again");
        assert!(ended.0.is_empty());
    }

    #[test]
    fn who_has_started_again_while_somebody_looked_runs() {
        let mut ended = Ended::default();
        // It has its new process already.
        heard(&mut ended, &event("die", "c", 11));
        heard(&mut ended, &event("start", "c", 12));
        let mut looked = seen(5);
        ended.apply(&mut looked);
        assert_eq!(looked, seen(5));
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

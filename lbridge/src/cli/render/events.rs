//! `events`: prints one line per event.

use nix::unistd::User;

use super::{described, print_on, shown, time};
use crate::{
    api::protocol::{Event, EventKind},
    cli::Failure,
    planning::rule::{Network, Protocol},
};

/// Prints an event in one line, with the local time; returns true if standard output still has a reader.
pub(in crate::cli) fn event(event: &Event) -> Result<bool, Failure> {
    let rule = |network: &Network, port: &u16, protocol: &Protocol| {
        format!("{} {port}{}", shown(&network.to_string()), protocol.suffix())
    };
    let by = |uid: &Option<u32>| {
        let name = |uid: u32| User::from_uid(uid.into()).ok().flatten().map(|user| shown(&user.name));
        uid.map_or_else(String::new, |uid| match name(uid) {
            Some(name) => format!(" by {name}"),
            None => format!(" by user {uid}"),
        })
    };
    let text = match &event.what {
        EventKind::Following { version } => format!("following lbridge {}", shown(version)),
        EventKind::Allowed { network, port, protocol, uid } => {
            format!("{}: allowed{}", rule(network, port, protocol), by(uid))
        }
        EventKind::Denied { network, port, protocol, uid } => {
            format!("{}: denied{}", rule(network, port, protocol), by(uid))
        }
        EventKind::Labelled { network, port, protocol, asked: true } => {
            format!("{}: a label asks for it", rule(network, port, protocol))
        }
        EventKind::Labelled { network, port, protocol, asked: false } => {
            format!("{}: no label asks for it any more", rule(network, port, protocol))
        }
        EventKind::BadLabel(problem) => format!("label of {}", shown(&problem.to_string())),
        EventKind::State { network, port, protocol, state, why, reasons: _ } => {
            format!("{}: {}", rule(network, port, protocol), described(*state, why.as_deref()))
        }
        EventKind::Listening { port } => format!("port {port}: a service listens"),
        EventKind::Unregistered { port, error } => {
            format!("port {port}: a service listens, but the kernel refused to register it: {}", shown(error))
        }
        EventKind::Closed { port } => format!("port {port}: a service stopped listening"),
        EventKind::Docker { engine, version: Some(version), .. } => {
            format!("{engine} {} answers", shown(version))
        }
        EventKind::Docker { engine, version: None, error } => {
            format!("{engine} is away ({})", shown(error.as_deref().unwrap_or_default()))
        }
        EventKind::Refused { network, port, protocol, connections } => {
            format!(
                "{}: {connections} connections over the limit were refused",
                rule(network, port, protocol)
            )
        }
        EventKind::Missed { events } => format!("{events} events were missed: the reader is too slow"),
        EventKind::Unknown => "an event that this version does not know; see --json".to_owned(),
    };
    print_on(&format!("{} {text}\n", time(event.at)))
}

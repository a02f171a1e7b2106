//! Users: looks up user names by uid.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
    time::Duration,
};

use nix::unistd::{Uid, User};
use tokio::{sync::oneshot, time::timeout};

/// The longest wait for a name. The name service may ask another host (LDAP), which may not answer.
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(250);

/// Returns the name of a user; `None` if the uid has none, or if the list of users cannot be read. May take
/// as long as the host's name service does.
pub fn name(uid: u32) -> Option<String> {
    Some(User::from_uid(Uid::from_raw(uid)).ok()??.name)
}

/// A cache of user names. Each is looked up once, and kept until [`Users::look`] drops it.
#[derive(Debug, Default)]
pub struct Users {
    names: BTreeMap<u32, Lookup>,
}

#[derive(Debug)]
enum Lookup {
    Done(Option<String>),
    UnderWay(oneshot::Receiver<Option<String>>),
}

impl Users {
    /// Looks up the uids that are not cached yet, and forgets all that are not in `uids`. A name that takes
    /// longer than a quarter of a second appears with a later call.
    pub async fn look(&mut self, uids: &BTreeSet<u32>) {
        self.names.retain(|uid, _| uids.contains(uid));
        self.look_too(uids).await;
    }

    /// Looks up names like [`Users::look`], but forgets none.
    pub async fn look_too(&mut self, uids: &BTreeSet<u32>) {
        for uid in uids {
            let begun = !self.names.contains_key(uid);
            let lookup = self.names.entry(*uid).or_insert_with(|| look_up(*uid));
            let Lookup::UnderWay(answer) = lookup else { continue };
            let answer = if begun {
                timeout(LOOKUP_TIMEOUT, answer).await.ok().map(Result::ok)
            } else {
                match answer.try_recv() {
                    Err(oneshot::error::TryRecvError::Empty) => None,
                    answered => Some(answered.ok()),
                }
            };
            if let Some(name) = answer {
                *lookup = Lookup::Done(name.flatten());
            }
        }
    }

    /// Returns the name of a user that was looked up; `None` if there is none, or none yet.
    pub fn name(&self, uid: u32) -> Option<&str> {
        match self.names.get(&uid)? {
            Lookup::Done(name) => name.as_deref(),
            Lookup::UnderWay(_) => None,
        }
    }
}

/// Starts a lookup on a thread of its own, so that ending the program does not wait for it.
fn look_up(uid: u32) -> Lookup {
    let (tell, told) = oneshot::channel();
    let thread = thread::Builder::new().name("user".to_owned()).spawn(move || drop(tell.send(name(uid))));
    if thread.is_ok() { Lookup::UnderWay(told) } else { Lookup::Done(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_looked_up() {
        // A uid that no list of users has.
        const STRANGER: u32 = 0xffff_fff0;
        let mut users = Users::default();
        users.look(&[0, STRANGER].into()).await;
        assert_eq!((users.name(0), users.name(STRANGER)), (Some("root"), None));
        users.look(&[STRANGER].into()).await;
        assert_eq!(users.name(0), None, "who is of no interest any more is forgotten");
    }
}

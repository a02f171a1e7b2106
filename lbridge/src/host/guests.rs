//! Guests: finds the network namespaces behind the ports of each bridge, by their cookies. Uses netlink
//! alone, so it does not matter which program made them. Reports them at once, since a container's first
//! connection follows within a fraction of a second.
//!
//! The kernel numbers the namespaces that this one has a link to (nsid), and reports for a veth port the
//! number of the namespace that its peer is in. A number can be resolved only in the other direction, by
//! asking for the number of a namespace that is open as a file. Runtimes keep such files in well-known
//! folders; a namespace without one has a process inside.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream::BoxStream};
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_ROUTE};
use rtnetlink::{Handle, MulticastGroup};

use super::netns;
use crate::planning::inventory::NamespaceId;

/// The folders with namespace files: the first is Docker's, the second is shared by Podman and `ip netns`.
const FOLDERS: [&str; 2] = ["/run/docker/netns", "/run/netns"];

/// A veth interface of this namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct BridgePort {
    /// Interface index of the bridge that it is a port of; `None` if it is on no bridge.
    bridge: Option<u32>,
    /// The nsid of the namespace that its peer is in; `None` if the peer is in this namespace.
    namespace: Option<i32>,
}

/// Tracks all veth interfaces of the host's namespace, and the namespaces behind them.
///
/// Meant for a thread of its own, which enters other namespaces briefly. Only changes are awaited: every
/// netlink request is answered before the call returns, so that no other task runs in between.
pub struct BridgePorts {
    home: File,
    handle: Handle,
    questions: Socket,
    changes: BoxStream<'static, NetlinkMessage<RouteNetlinkMessage>>,
    ends: BTreeMap<u32, BridgePort>,
    /// Maps an nsid to the namespace's cookie, for as long as the namespace has that nsid.
    cookies: HashMap<i32, u64>,
    /// The nsids of namespaces that were asked for, negative if the namespace has none. The kernel reuses a
    /// namespace's identity, so an entry is removed together with its nsid.
    known: HashMap<NamespaceId, i32>,
}

/// The guests that [`BridgePorts::guests`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Maps a namespace's cookie to the interface indexes of the bridges that it is on, in ascending order.
    pub bridges: BTreeMap<u64, BTreeSet<u32>>,
    /// The nsids of namespaces that are on one of the bridges and whose cookies are not known.
    pub unknown: BTreeSet<i32>,
}

impl BridgePorts {
    /// Subscribes to changes in `home`, the host's namespace, and lists the links.
    pub async fn follow(home: &File) -> anyhow::Result<Self> {
        let home = home.try_clone()?;
        netns::restore_netns(&home)?;
        let mut questions = Socket::new(NETLINK_ROUTE).context("cannot open a netlink socket")?;
        questions.bind_auto()?;
        questions.connect(&NetlinkAddr::new(0, 0))?;
        let groups = [MulticastGroup::Link, MulticastGroup::Nsid];
        let (task, handle, changes) =
            rtnetlink::new_multicast_connection(&groups).context("cannot listen for changes of links")?;
        tokio::spawn(task);
        let changes = changes.map(|(message, _)| message).boxed();
        let (ends, cookies, known) = (BTreeMap::new(), HashMap::new(), HashMap::new());
        let mut ports = Self { home, handle, questions, changes, ends, cookies, known };
        ports.list().await?;
        Ok(ports)
    }

    /// Resyncs: forgets everything and lists the links again.
    pub async fn list(&mut self) -> anyhow::Result<()> {
        self.ends.clear();
        self.cookies.clear();
        self.known.clear();
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links.try_next().await.context("cannot list links")? {
            self.ends.extend(port(&link));
        }
        Ok(())
    }

    /// Waits for a change and applies it, with all others that are pending. Cancel-safe. Fails if the kernel
    /// reports no more changes, or if a resync after lost messages fails.
    pub async fn changed(&mut self) -> anyhow::Result<()> {
        let mut message = Some(self.changes.next().await.context("the kernel's events of links ended")?);
        let mut is_lossy = false;
        while let Some(next) = message {
            is_lossy |= self.apply(next.payload);
            message = self.changes.next().now_or_never().flatten();
        }
        if is_lossy { self.list().await } else { Ok(()) }
    }

    /// Applies one change. Returns true if messages were lost.
    fn apply(&mut self, message: NetlinkPayload<RouteNetlinkMessage>) -> bool {
        let message = match message {
            NetlinkPayload::InnerMessage(message) => message,
            NetlinkPayload::Overrun(_) => return true,
            _ => return false,
        };
        match message {
            // A bridge reports its ports with messages of its own, which have fewer attributes.
            RouteNetlinkMessage::NewLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                match port(&link) {
                    Some((index, port)) => drop(self.ends.insert(index, port)),
                    None => drop(self.ends.remove(&link.header.index)),
                }
            }
            RouteNetlinkMessage::DelLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                self.ends.remove(&link.header.index);
                // When a veth leaves this namespace, this message comes before the veth is up in its new one:
                // it already names the peer that stays here.
                if let Some((other, namespace)) = moved(&link)
                    && let Some(port) = self.ends.get_mut(&other)
                {
                    port.namespace = Some(namespace);
                }
            }
            // A namespace that had no nsid when it was asked for may have this one.
            RouteNetlinkMessage::NewNsId(_) => self.known.retain(|_, number| *number >= 0),
            RouteNetlinkMessage::DelNsId(message) => {
                if let Some(gone) = number(&message) {
                    self.known.retain(|_, number| *number != gone);
                    self.cookies.remove(&gone);
                }
            }
            _ => {}
        }
        false
    }

    /// Finds the guests on these bridges. Namespaces that are not in the folders are looked for among all
    /// processes if `everywhere` is true.
    pub fn guests(&mut self, bridges: &BTreeSet<u32>, everywhere: bool) -> Found {
        let ports = self.ends.values().filter_map(|port| Some((port.bridge?, port.namespace?)));
        let plugged: BTreeSet<_> = ports.filter(|(bridge, _)| bridges.contains(bridge)).collect();
        let unknown = |cookies: &HashMap<i32, u64>| -> BTreeSet<i32> {
            plugged.iter().map(|(_, number)| *number).filter(|number| !cookies.contains_key(number)).collect()
        };
        let mut missing = unknown(&self.cookies);
        for folder in FOLDERS {
            if !missing.is_empty() {
                self.look_at(files(folder), &mut missing);
            }
        }
        if everywhere && !missing.is_empty() {
            self.look_at(processes(), &mut missing);
        }
        let mut guests = Found { unknown: missing, ..Found::default() };
        for (bridge, number) in plugged {
            if let Some(cookie) = self.cookies.get(&number) {
                guests.bridges.entry(*cookie).or_default().insert(bridge);
            }
        }
        guests
    }

    /// Looks among these files for the namespaces with the `missing` nsids, and removes those it finds from
    /// `missing`.
    fn look_at(&mut self, files: impl Iterator<Item = PathBuf>, missing: &mut BTreeSet<i32>) {
        for path in files {
            if missing.is_empty() {
                return;
            }
            let Ok(meta) = fs::metadata(&path) else { continue };
            let id = NamespaceId { device: meta.dev(), inode: meta.ino() };
            if self.known.get(&id).is_some_and(|number| !missing.contains(number)) {
                continue;
            }
            if let Err(error) = self.learn(&path, missing) {
                tracing::debug!(
                    path = %path.display(),
                    error = format!("{error:#}"),
                    "could not look at a network namespace"
                );
            }
        }
    }

    fn learn(&mut self, path: &Path, missing: &mut BTreeSet<i32>) -> anyhow::Result<()> {
        // Files that are not network namespaces are skipped.
        let Ok(file) = netns::at_path(path, netns::Follow::Any) else { return Ok(()) };
        let id = netns::id_of(&file)?;
        let number = self.number_of(file.as_raw_fd())?;
        self.known.insert(id, number);
        if missing.contains(&number) {
            self.cookies.insert(number, netns::cookie_of(&file, &self.home)?);
            missing.remove(&number);
        }
        Ok(())
    }

    /// Asks the kernel for the nsid of an open namespace; -1 if it has none.
    fn number_of(&self, file: i32) -> anyhow::Result<i32> {
        let mut question = NsidMessage::default();
        question.attributes.push(NsidAttribute::Fd(file.cast_unsigned()));
        let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
        message.header.flags = NLM_F_REQUEST;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.questions.send(&bytes, 0).context("failed to ask for a namespace's nsid")?;
        let (answer, _) = self.questions.recv_from_full().context("failed to read a namespace's nsid")?;
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)?.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(message)) => {
                number(&message).context("the answer has no nsid")
            }
            NetlinkPayload::Error(error) => Err(error.to_io().into()),
            _ => anyhow::bail!("the answer is of another kind"),
        }
    }
}

/// Returns a veth's interface index and its port; `None` for other kinds of links. Those have no peer, or one
/// that does not show who sends there.
fn port(link: &LinkMessage) -> Option<(u32, BridgePort)> {
    if !is_veth(link) {
        return None;
    }
    let mut port = BridgePort::default();
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Controller(bridge) => port.bridge = Some(*bridge),
            LinkAttribute::LinkNetNsId(number) => port.namespace = Some(*number),
            _ => {}
        }
    }
    Some((link.header.index, port))
}

fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
        _ => false,
    })
}

/// For a veth that leaves this namespace, returns the peer's interface index and the nsid of its new
/// namespace.
fn moved(link: &LinkMessage) -> Option<(u32, i32)> {
    let (mut other, mut namespace) = (None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Link(index) => other = Some(*index),
            LinkAttribute::NewNetnsId(number) => namespace = Some(*number),
            // The peer is in another namespace, and its index is only valid there.
            LinkAttribute::LinkNetNsId(_) => return None,
            _ => {}
        }
    }
    is_veth(link).then_some(())?;
    Some((other?, namespace?))
}

fn number(message: &NsidMessage) -> Option<i32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NsidAttribute::Id(number) => Some(*number),
        _ => None,
    })
}

fn files(folder: &str) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

fn processes() -> impl Iterator<Item = PathBuf> {
    let is_process = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    };
    files("/proc").filter(is_process).map(|path| path.join("ns/net"))
}

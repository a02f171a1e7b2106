//! nft monitor: the kernel's notifications that nftables' ruleset has changed, `iptables-nft`'s part
//! included. Their contents are not read.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use tokio::{io::unix::AsyncFd, sync::mpsc};
use tokio_util::task::AbortOnDropHandle;

/// `NFNLGRP_NFTABLES` (include/uapi/linux/netfilter/nfnetlink.h).
const NFTABLES: u32 = 7;

/// A subscription to notifications; ends when it is dropped.
#[derive(Debug)]
pub(super) struct Changes {
    happened: Arc<AtomicBool>,
    _following: AbortOnDropHandle<()>,
}

impl Changes {
    pub(super) fn follow(wake: mpsc::Sender<()>) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(NFTABLES)?;
        // SAFETY: the registration owns the socket, so nothing closes it before that ends.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        let happened = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&happened);
        let following = async move {
            loop {
                let Ok(mut ready) = socket.readable().await else { return };
                let _ = ready.try_io(|socket| drain(socket.get_ref()));
                flag.store(true, Ordering::Relaxed);
                // A wake-up that is under way covers this change, too.
                let _ = wake.try_send(());
            }
        };
        Ok(Self { happened, _following: AbortOnDropHandle::new(tokio::spawn(following)) })
    }

    /// Returns true if the ruleset has changed since [`Self::seen`].
    pub(super) fn any(&self) -> bool {
        self.happened.load(Ordering::Relaxed)
    }

    /// Marks all changes as seen. Call this before reading the ruleset: that read may miss a change made
    /// during it.
    pub(super) fn seen(&self) {
        self.happened.store(false, Ordering::Relaxed);
    }
}

/// Reads all messages that are there. If some were lost (ENOBUFS), that counts as having read them.
fn drain(socket: &Socket) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match nix::unistd::read(socket, &mut buffer) {
            Ok(_) | Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

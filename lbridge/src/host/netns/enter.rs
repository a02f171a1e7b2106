//! Entering: runs work in another network namespace, and makes namespaces.

use std::{fs::File, num::NonZeroU32, os::fd::AsFd, thread};

use anyhow::{Context as _, anyhow};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::LinkUnspec;

use super::identity::own_cookie;

/// Interface index of the loopback, the first interface of every namespace, whatever its name:
/// `LOOPBACK_IFINDEX` (include/net/flow.h).
pub const LOOPBACK: NonZeroU32 = NonZeroU32::MIN;

/// Returns the cookie of a network namespace. Enters it with the calling thread for a moment, so that thread
/// must have nothing else to do. A thread of its own for this would start too late on a busy machine.
pub(in crate::host) fn cookie_of(netns: impl AsFd, home: impl AsFd) -> anyhow::Result<u64> {
    setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
    let cookie = own_cookie();
    restore_netns(home)?;
    cookie?.context("this kernel does not report cookies of network namespaces (5.14 and later do)")
}

/// Moves this thread into the host's network namespace.
pub(in crate::host) fn restore_netns(home: impl AsFd) -> anyhow::Result<()> {
    setns(home, CloneFlags::CLONE_NEWNET).context("failed to return to the host's network namespace")
}

/// Runs `work` in a network namespace, on a thread of its own.
pub fn within<T: Send>(netns: impl AsFd + Send, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    on_a_thread(|| {
        // Fails with EINVAL on a namespace of another kind.
        setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
        Ok(work())
    })?
}

/// Runs `work` on a new thread that ends with it, so that `work` may change the thread's namespace.
pub(in crate::host) fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    thread::scope(|scope| {
        // The limit of threads may be reached.
        let inside = thread::Builder::new().name("inside".to_owned()).spawn_scoped(scope, work);
        let inside = inside.context("cannot start a thread to enter a network namespace")?;
        inside.join().map_err(|_| anyhow!("a thread in another network namespace panicked"))
    })
}

/// Makes a network namespace that has only the loopback interface, which is up. It ends when the file is
/// closed, or when this process ends.
pub fn throw_away() -> anyhow::Result<File> {
    let netns = on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        File::open("/proc/thread-self/ns/net").context("cannot open the new network namespace")
    })??;
    within(&netns, loopback_up)??;
    Ok(netns)
}

/// Brings up the loopback interface of this thread's network namespace.
fn loopback_up() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
        tokio::spawn(connection);
        let up = LinkUnspec::new_with_index(LOOPBACK.get()).up().build();
        handle.link().set(up).execute().await.context("cannot set the loopback interface up")
    })
}

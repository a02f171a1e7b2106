//! Hooks: sets of hooks that are attached while something needs them, and a value for each set.

use std::ops::{Index, IndexMut};

/// Hooks that are attached together, all of a set or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HookSet {
    /// getpeername and getsockname: the peer as seen by services, and by containers that dialled localhost.
    Names,
    /// connect: the gateway that a container's localhost leads to.
    Connect,
    /// sendmsg: the source of a UDP service's replies.
    Replies,
}

impl HookSet {
    /// Every set, in the order of their indices.
    pub const ALL: [Self; 3] = [Self::Names, Self::Connect, Self::Replies];
}

/// One `T` for each set of hooks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PerHookSet<T>([T; HookSet::ALL.len()]);

impl<T> PerHookSet<T> {
    /// Creates each value from its set with `make`.
    pub fn from_fn(make: impl FnMut(HookSet) -> T) -> Self {
        Self(HookSet::ALL.map(make))
    }

    /// Iterates over the sets and their values.
    pub fn iter(&self) -> impl Iterator<Item = (HookSet, &T)> {
        HookSet::ALL.into_iter().zip(&self.0)
    }
}

impl<T> Index<HookSet> for PerHookSet<T> {
    type Output = T;

    fn index(&self, set: HookSet) -> &T {
        &self.0[set as usize]
    }
}

impl<T> IndexMut<HookSet> for PerHookSet<T> {
    fn index_mut(&mut self, set: HookSet) -> &mut T {
        &mut self.0[set as usize]
    }
}

//! Sets of hooks that are attached while something needs them, and what is known of each.

use std::ops::{Index, IndexMut};

/// Hooks that are attached together, all of a set or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HookSet {
    /// getpeername and getsockname: the peer that services, and containers that dialled localhost, see.
    Names,
    /// connect: where a container's localhost leads.
    Connect,
    /// sendmsg: the source of a UDP service's replies.
    Replies,
}

impl HookSet {
    /// Every set.
    pub const ALL: [Self; 3] = [Self::Names, Self::Connect, Self::Replies];
}

/// One `T` for each set, by index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PerHookSet<T>([T; HookSet::ALL.len()]);

impl<T> PerHookSet<T> {
    /// Makes each from its set.
    pub fn from_fn(make: impl FnMut(HookSet) -> T) -> Self {
        Self(HookSet::ALL.map(make))
    }

    /// Each with its set.
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

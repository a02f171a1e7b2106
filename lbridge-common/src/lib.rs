//! What both sides of lbridge's kernel boundary say: the layout of map keys and values ([`wire`]), the decision that
//! the kernel program and the planner share ([`verdict`]), and the names under which the object's parts are found
//! ([`symbols`]).
//!
//! `no_std`, no I/O, no dependency on the kernel side. Imports nothing of lbridge's.
#![cfg_attr(not(test), no_std)]

#[cfg(feature = "user")]
mod pod;
pub mod symbols;
pub mod verdict;
pub mod wire;

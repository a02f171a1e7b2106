//! lbridge-common: the types that both sides of the kernel boundary share. It defines the layout of map keys
//! and values ([`wire`]), the decision that the kernel program and the planner share ([`verdict`]), and the
//! names of the object's maps and programs ([`symbols`]).
//!
//! `no_std`, no I/O, no dependency on the kernel side. Imports no other lbridge crate.
#![cfg_attr(not(test), no_std)]

#[cfg(feature = "user")]
mod pod;
pub mod symbols;
pub mod verdict;
pub mod wire;

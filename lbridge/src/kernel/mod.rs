//! Kernel half: loads the object, pins and adopts it, reads and writes its maps. The only module that knows
//! aya. Imports planning, the common types and `host/trusted`.
//!
//! - `object`: the committed object and its contents;
//! - `links`: the kernel's links and the programs under them, by raw bpf(2) commands;
//! - [`pins`]: the paths of pins, and whether what is pinned may be adopted;
//! - `hooks`: attaches programs, and replaces a program under a link that stays;
//! - [`strays`]: programs that are attached though no pin names their links;
//! - [`maps`]: typed access to the maps;
//! - [`loader`]: loads, adopts and attaches all of it in order, and reports what turned out to be possible;
//! - [`trial`]: loads the same without a trace, for commands that only test the kernel.

mod hooks;
mod links;
pub mod loader;
pub mod maps;
mod object;
pub mod pins;
pub mod strays;
pub mod trial;

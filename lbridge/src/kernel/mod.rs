//! The kernel half: loads the object, pins and adopts it, reads and writes its maps. The only room that knows aya.
//! Imports planning, the common types and `host/trusted`.
//!
//! - `object`: the committed object and what is in it;
//! - [`pins`]: where things are pinned, and whether what is there may be adopted;
//! - `links`: attaching, replacing a program under a link that stays, and what links say of themselves;
//! - [`strays`]: what is attached though no pin names it;
//! - [`maps`]: typed access;
//! - [`loader`]: all of it in order, and what turned out to be possible;
//! - [`trial`]: the same without a trace, for those who only want to know.

mod links;
pub mod loader;
pub mod maps;
mod object;
pub mod pins;
pub mod strays;
pub mod trial;

//! The engine: carries out what the cut protocol asks for on this host. It
//! starts workers, owns the holds, keeps the journal, and cleans up.
//!
//! ```text
//!  take ──► engine: leads ──► part: this host's ──► worker (one per member)
//!                               │  │  └───────────► holds (netlink)
//!                               │  └ journal: what would have to be undone
//!                               └─── guard: a process that undoes it should
//!                                    this one be killed
//! ```

pub mod conf;
pub mod engine;
pub mod files;
pub mod guard;
pub mod journal;
pub mod manifest;
mod part;
pub mod restore;
mod signals;
pub mod tls;
mod workers;

pub use workers::Program;

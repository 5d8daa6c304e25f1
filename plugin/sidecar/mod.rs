//! The engine: carries out what the cut protocol asks for. One host leads; each
//! has a side of its own that starts workers, owns the holds, keeps the journal,
//! and cleans up.
//!
//! ```text
//!  take ──► lead ──► acting: this host's side ──► worker (one per member)
//!            │         part │  │  └─────────────► holds (netlink)
//!            │              │  └ journal: what would have to be undone
//!            │              └─── guard: a process that undoes it should this
//!            │                   one be killed
//!            └ (vned) ─ mTLS ──► acting: another host's side ─► …
//! ```

mod acting;
pub mod conf;
mod error;
pub mod files;
pub mod guard;
pub mod journal;
pub mod lead;
pub mod manifest;
mod part;
pub mod restore;
mod signals;
mod take;
pub mod tls;
mod vote;
mod wire;
mod workers;

pub use error::Error;
pub use part::Place;
pub use take::take;
pub use workers::Program;

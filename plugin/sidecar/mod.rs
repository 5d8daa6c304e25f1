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
pub mod admin;
pub mod conf;
pub mod copy;
mod disks;
mod error;
pub mod files;
mod fit;
pub mod guard;
mod held;
pub mod journal;
pub mod lead;
pub mod manifest;
mod part;
mod peers;
pub mod restore;
pub mod rpc;
mod signals;
mod take;
pub mod tls;
pub mod vned;
mod vote;
mod wire;
mod workers;

pub use error::Error;
pub use part::{Place, FINAL_BUFFER_BYTES};
pub use take::take;
pub use workers::Program;

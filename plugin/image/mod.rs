//! The image store: snapshots on disk.
//!
//! ```text
//! ROOT/                              0700, default /var/lib/xen-vne
//!   snapshots/VNE/ID/                committed snapshots
//!     manifest.json                  written last, with a checksum of itself
//!     members/NAME/
//!       config.json                  the domain's configuration (libxl JSON)
//!       records                      everything of the stream that isn't pages
//!       index                        which page is where in which pack
//!   packs/ID                         pages, compressed, each one once
//!   tmp/take.VNE.ID/                 a snapshot being taken
//!   tmp/copy.VNE.ID/                 one that comes from another store
//!   tmp/removed.VNE.ID.N/            one being deleted
//! ```
//!
//! Field by field in `plugin/docs/snapshot-format.md`.
//!
//! # Who does what
//!
//! The engine that takes a snapshot calls [`Store::begin`] for a [`Take`], gives
//! its directory to one worker process per member, and [`Take::commit`]s the
//! manifest in the end: from that one rename on, the snapshot exists. A worker
//! feeds its domain's stream into a [`MemberWriter`]. Restore asks the
//! [`Catalogue`] for a [`Snapshot`] and each member's [`MemberReader`] for a
//! stream.
//!
//! # The way of a page
//!
//! ```text
//!            first version                  hash │ known? │ compress
//!  stream ─► writer ──────────────────────► packer ──────────────────► pack
//!              │ later ones: slots on disk ─┐ ▲
//!              │ guest suspended: memory ───┴─┘ when it runs again
//! ```
//!
//! What the store has already is found by its hash ([`known`]); a member's new
//! pages become one pack, published when its stream is over ([`publish`]). A
//! pack's pages keep their numbers; what no snapshot uses any more goes with
//! [`sweep`], by removing the pack or writing it anew without them.
//!
//! # Locks
//!
//! All are `flock`s, so that the kernel drops them with their owner. A directory
//! under `tmp/` is locked shared by everybody who works in it, and removed only
//! by who gets the exclusive lock. The same holds for a committed snapshot and its
//! readers, and for a pack and those who are about to refer to it ([`packs`]).
//! `tmp/` itself is locked while an entry is made or looked at, so that none is
//! seen between its `mkdir` and its lock.

mod arriving;
mod batch;
mod bits;
mod catalogue;
mod check;
mod codec;
mod complete;
mod diff;
mod ends;
mod error;
mod files;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod garbage;
mod held;
mod incoming;
mod index;
mod join;
mod key;
mod known;
mod manifest;
mod map;
mod memory;
mod name;
mod outgoing;
mod pack;
mod packer;
mod packs;
mod placing;
mod prune;
mod publish;
mod reader;
mod records;
mod replay;
mod rewrite;
mod seal;
mod sizes;
mod slots;
mod slotted;
mod store;
mod sweep;
mod table;
mod take;
mod timeline;
mod writer;

#[cfg(test)]
mod tests;

pub use catalogue::{Catalogue, Damaged, Listing, Names, Snapshot};
pub use check::{Checker, Progress};
pub use diff::{diff, MemberDiff};
pub use error::Error;
pub use garbage::Cleaned;
pub use incoming::{Incoming, IncomingLimits, Received};
pub use key::{find_host_key, host_key, FindKey, Key, KeySource};
pub use manifest::{
    Cut, DomainType, Downtime, FileFacts, Manifest, Member, MemberImage, MemberStats, RanOn,
    Recorded, FORMAT, FORMAT_MIN, MANIFEST_BYTES_MAX, MANIFEST_NAME,
};
pub use memory::MemoryShare;
pub use name::{Name, SnapshotId, StoreId, NAME_BYTES_MAX};
pub use outgoing::{Batch, OutgoingMember, SentFrame};
pub use pack::PackId;
pub use prune::Rule;
pub use reader::{MemberReader, ReplayError};
pub use sizes::Sizes;
pub use store::{free_bytes, Store, DEFAULT_ROOT};
pub use sweep::Swept;
pub use table::PFN_COUNT_MAX;
pub use take::Take;
pub use timeline::{few as few_rounds, Timeline, TimelineRound, ROUNDS_MAX};
pub use writer::{MemberHandle, MemberWriter, WriterOptions, RECORDS_BYTES_MAX};

/// What most of this module returns.
pub(crate) type Result<T> = std::result::Result<T, Error>;

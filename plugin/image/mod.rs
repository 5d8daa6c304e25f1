//! The image store: snapshots on disk, version 1.
//!
//! ```text
//! ROOT/                              0700, default /var/lib/xen-vne
//!   snapshots/VNE/ID/                committed snapshots
//!     manifest.json                  written last, with a checksum of itself
//!     members/NAME/
//!       config.json                  the domain's configuration (libxl JSON)
//!       records                      everything of the stream that isn't pages
//!       index                        which page is where, and each one's hash
//!       pages                        4 KiB slots
//!   tmp/take.VNE.ID/                 a snapshot being taken
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
//! # Locks
//!
//! All are `flock`s on directories, so that the kernel drops them with their
//! owner. A directory under `tmp/` is locked shared by everybody who works in
//! it, and removed only by who gets the exclusive lock. The same holds for a
//! committed snapshot and its readers. `tmp/` itself is locked while an entry
//! is made or looked at, so that none is seen between its `mkdir` and its lock.
//!
//! # Later
//!
//! Pages will move to compressed packs shared by all snapshots. What the rest
//! of the program sees stays: a [`crate::stream::Sink`] to write into, a
//! `replay` into a sink to read, the catalogue, the manifest. Format 1 stays
//! readable.

mod catalogue;
mod error;
mod files;
mod held;
mod index;
mod manifest;
mod name;
mod reader;
mod records;
mod slots;
mod store;
mod table;
mod timeline;
mod writer;

#[cfg(test)]
mod tests;

pub use catalogue::{Catalogue, Damaged, Listing, Snapshot};
pub use error::Error;
pub use manifest::{
    Cut, DomainType, Downtime, FileFacts, Manifest, Member, MemberImage, MemberStats, Recorded,
    FORMAT, MANIFEST_BYTES_MAX, MANIFEST_NAME,
};
pub use name::{Name, SnapshotId, StoreId, NAME_BYTES_MAX};
pub use reader::{MemberReader, ReplayError};
pub use store::{free_bytes, Cleaned, Store, Take, DEFAULT_ROOT};
pub use table::PFN_COUNT_MAX;
pub use timeline::{few as few_rounds, Timeline, TimelineRound, ROUNDS_MAX};
pub use writer::{MemberHandle, MemberWriter, WriterOptions, RECORDS_BYTES_MAX};

/// What most of this module returns.
pub(crate) type Result<T> = std::result::Result<T, Error>;

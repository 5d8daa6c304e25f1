//! What can go wrong with the image store.

use std::io;
use std::path::{Path, PathBuf};

use super::name::{Name, SnapshotId};

/// Why the store can't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused. [`Error::is_out_of_space`] tells the most
    /// likely cause.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// A verb: "write", "sync".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },

    /// A name that can't be part of a path in the store.
    #[error("{name:?} cannot name a VNE or a member: {problem}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },

    /// Not the name of a snapshot.
    #[error("{id:?} is no snapshot's name; they look like 20261121T023652Z")]
    BadId {
        /// What was given.
        id: String,
    },

    /// The store's directory can't be trusted with guests' memory.
    #[error("{} cannot hold snapshots: {problem}", path.display())]
    BadRoot {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// Nothing at this place has ever been a store.
    #[error("there is no store of snapshots in {}", path.display())]
    NoStore {
        /// The directory.
        path: PathBuf,
    },

    /// There is no such snapshot.
    #[error("there is no snapshot {id} of VNE {vne}")]
    NoSnapshot {
        /// The VNE.
        vne: Name,
        /// The snapshot.
        id: SnapshotId,
    },

    /// There is no snapshot at all.
    #[error("there is no complete snapshot of VNE {vne}")]
    NoSnapshots {
        /// The VNE.
        vne: Name,
    },

    /// The member is stored on another host.
    #[error("member '{member}' is stored on host '{host}': ask there")]
    Elsewhere {
        /// The member.
        member: Name,
        /// The host.
        host: Name,
    },

    /// A snapshot has no such member.
    #[error("snapshot {id} of VNE {vne} has no member {member}")]
    NoMember {
        /// The VNE.
        vne: Name,
        /// The snapshot.
        id: SnapshotId,
        /// The member.
        member: Name,
    },

    /// Somebody reads the snapshot, or works in the directory.
    #[error("{} is in use", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },

    /// The host's limit leaves the members too little.
    #[error("store_memory_mib = {limit_mib} in vne.conf is too little for {members} members: they need {needed_mib}")]
    TooLittleMemory {
        /// The limit.
        limit_mib: u64,
        /// How many there are.
        members: u64,
        /// What they need at least.
        needed_mib: u64,
    },

    /// A key that can't be used.
    #[error("{what} gives no key: {problem}")]
    BadKey {
        /// The file or command.
        what: String,
        /// Why.
        problem: String,
    },

    /// A file is encrypted, and can't be decrypted here.
    #[error("{} is {problem}", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },

    /// A file of a snapshot isn't what was written.
    #[error("{} is damaged: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it shows.
        problem: String,
    },

    /// Pages of a snapshot aren't what was written.
    #[error("member {member}: {} is damaged at pfn {first_pfn:#x} to {last_pfn:#x}: {problem}", path.display())]
    DamagedPages {
        /// The member.
        member: Name,
        /// The file.
        path: PathBuf,
        /// First damaged guest frame.
        first_pfn: u64,
        /// Last one of the same stretch.
        last_pfn: u64,
        /// How it shows.
        problem: String,
    },

    /// The snapshot was made by a later version of this program.
    #[error("{} has format {format}; this program reads formats {} to {}", path.display(), super::manifest::FORMAT_MIN, super::manifest::FORMAT)]
    Newer {
        /// The manifest.
        path: PathBuf,
        /// The format that it names.
        format: u32,
    },

    /// What was handed in doesn't make a snapshot.
    #[error("cannot store {what}: {problem}")]
    Unstorable {
        /// The thing: a member, a configuration, a manifest.
        what: String,
        /// What is wrong with it.
        problem: String,
    },

    /// Captured disks can't be used or removed.
    #[error("the disks of {}", path.display())]
    Disks {
        /// The snapshot's directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: crate::disk::Error,
    },

    /// The regenerated stream couldn't be built or written.
    #[error("cannot write member {member} as a stream")]
    Stream {
        /// The member.
        member: Name,
        /// What the stream's writer said.
        #[source]
        source: crate::stream::Error,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn damaged(path: &Path, problem: impl Into<String>) -> Self {
        Error::Damaged {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn disks(dir: &Path) -> impl FnOnce(crate::disk::Error) -> Self {
        let path = dir.to_owned();
        move |source| Error::Disks { path, source }
    }

    pub(crate) fn unstorable(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Unstorable {
            what: what.into(),
            problem: problem.into(),
        }
    }

    /// Whether something stored isn't what was written.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Error::Damaged { .. }
                | Error::DamagedPages { .. }
                | Error::Newer { .. }
                | Error::Disks { .. }
        )
    }

    /// Whether the cause is a full disk, a quota or a file size limit.
    pub fn is_out_of_space(&self) -> bool {
        let (Error::Io { source, .. }
        | Error::Stream {
            source: crate::stream::Error::Write { source },
            ..
        }) = self
        else {
            return false;
        };
        matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        )
    }
}

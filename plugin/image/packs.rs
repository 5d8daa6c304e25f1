//! The folder of packs, and who may not lose which.
//!
//! A pack is locked shared, by `flock` on its file, by whoever is about to refer
//! to it, until a durable index does. Who removes or rewrites packs locks each of
//! them exclusively first and looks at the indexes only then; so whatever refers
//! to a pack is either seen by its lock or by its index. Nobody who takes a
//! snapshot ever waits for who removes: a pack that can't be locked is as good as
//! not there.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation};

use super::error::Error;
use super::files::{self, Lock};
use super::pack::{Pack, PackId};
use super::seal::Vault;
use super::Result;

const PACKS_NAME: &str = "packs";
/// Held while a pack is compared with the others and put among them.
const PUBLISH_NAME: &str = ".publish";
/// Ends the name of a pack that is being rewritten.
const NEW_SUFFIX: &str = ".new";

/// The folder of packs of a store.
#[derive(Clone, Debug)]
pub(crate) struct Packs {
    dir: PathBuf,
    vault: Vault,
}

impl Packs {
    /// Those of the store at `root`.
    pub(crate) fn of(root: &Path, vault: &Vault) -> Self {
        Packs {
            dir: root.join(PACKS_NAME),
            vault: vault.clone(),
        }
    }

    /// How the store's files are kept.
    pub(crate) fn vault(&self) -> &Vault {
        &self.vault
    }

    /// Opens a pack and checks all but its frames.
    ///
    /// # Errors
    ///
    /// As [`Pack::open`].
    pub(crate) fn open(&self, id: &PackId) -> Result<Pack> {
        Pack::open(&self.path(id), Some(id), &self.vault)
    }

    /// Makes the folder.
    pub(crate) fn make(&self) -> Result<()> {
        files::ensure_dir(&self.dir)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a pack is.
    pub(crate) fn path(&self, id: &PackId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// Where a pack is rewritten.
    pub(crate) fn new_path(&self, id: &PackId) -> PathBuf {
        self.dir.join(format!("{id}{NEW_SUFFIX}"))
    }

    /// All packs, each with its length in bytes; the largest first, and those of
    /// the same length by name.
    pub(crate) fn list(&self) -> Result<Vec<(PackId, u64)>> {
        let mut found = Vec::new();
        for (name, path) in self.entries()? {
            let Ok(id) = PackId::try_from(name) else {
                continue;
            };
            match std::fs::symlink_metadata(&path) {
                Ok(facts) if facts.is_file() => found.push((id, facts.len())),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("look at", &path)(error)),
            }
        }
        found.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        Ok(found)
    }

    /// What rewriting left that was killed. For who has the folder locked.
    pub(crate) fn remove_unfinished(&self) -> Result<u64> {
        let mut bytes = 0;
        for (name, path) in self.entries()? {
            let stem = name.strip_suffix(NEW_SUFFIX).map(str::to_owned);
            if stem.is_some_and(|stem| PackId::try_from(stem).is_ok()) {
                bytes += std::fs::metadata(&path).map_or(0, |facts| facts.len());
                std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(bytes)
    }

    fn entries(&self) -> Result<Vec<(String, PathBuf)>> {
        let list = match std::fs::read_dir(&self.dir) {
            Ok(list) => list,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("read", &self.dir)(error)),
        };
        let mut entries = Vec::new();
        for entry in list {
            let entry = entry.map_err(Error::io("read", &self.dir))?;
            if let Ok(name) = entry.file_name().into_string() {
                entries.push((name, entry.path()));
            }
        }
        Ok(entries)
    }

    /// The lock of who removes and rewrites, one at a time; `None` if somebody
    /// does that and `wait` is false.
    pub(crate) fn lock(&self, wait: bool) -> Result<Option<File>> {
        if wait {
            return files::lock_dir_wait(&self.dir).map(Some);
        }
        files::try_lock_dir(&self.dir, Lock::Exclusive)
    }

    /// Waits until no other member is being published: so that of two with the
    /// same pages, the second sees the first one's.
    pub(crate) fn lock_publishing(&self) -> Result<File> {
        let path = self.dir.join(PUBLISH_NAME);
        files::ensure_dir(&path)?;
        files::lock_dir_wait(&path)
    }

    /// Moves a finished pack among the others and makes that last.
    pub(crate) fn publish(&self, from: &Path, id: &PackId) -> Result<()> {
        std::fs::rename(from, self.path(id)).map_err(Error::io("rename", from))?;
        files::sync_dir(&self.dir)
    }
}

/// Locks an open pack without waiting. `false` if that can't be had now, or the
/// file isn't what its name leads to any more.
pub(crate) fn try_lock_pack(file: &File, path: &Path, lock: Lock) -> Result<bool> {
    let operation = match lock {
        Lock::Shared => FlockOperation::NonBlockingLockShared,
        Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(file, operation) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
        Err(errno) => return Err(Error::io("lock", path)(errno.into())),
    }
    let locked = file.metadata().map_err(Error::io("look at", path))?;
    match std::fs::symlink_metadata(path) {
        Ok(named) => Ok((locked.dev(), locked.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("look at", path)(error)),
    }
}

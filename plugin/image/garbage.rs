//! What takes, copies and deletions leave behind, and how it goes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::Error;
use super::files::{self, Lock};
use super::name::{Name, SnapshotId};
use super::store::{
    is_not_found, remove_tree, rename_dir, Store, COPY_PREFIX, MEMBERS_NAME, PACK_NAME,
    REMOVED_PREFIX, SQUEEZED_NAME, TAKE_PREFIX, VOTE_NAME,
};
use super::sweep::{self, Effort};
use super::Result;
use crate::disk;
use crate::sentence::sentence;

/// How long what has arrived of a copy is kept for the copy to be repeated.
const COPY_KEPT: Duration = Duration::from_secs(24 * 3600);

/// What [`Store::clean_tmp`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Directories removed: takes and deletions whose process died.
    pub removed: u32,
    /// Directories left alone because their process lives.
    pub live: u32,
    /// Copies that have broken off, kept for a day: a repeated one goes on there.
    pub unfinished: u32,
}

impl Store {
    /// Removes what takes and deletions left behind whose processes died. What
    /// belongs to a living process stays, and so does anything in `tmp/` that
    /// isn't this program's.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn clean_tmp(&self) -> Result<Cleaned> {
        let mut cleaned = Cleaned::default();
        let garbage = self.lock_garbage(&mut cleaned)?;
        let dirs: Vec<PathBuf> = garbage.iter().map(|(path, _)| path.clone()).collect();
        self.remove_garbage(&dirs, Effort::Quick)?;
        for dir in dirs {
            match dir.exists() {
                true => cleaned.live += 1,
                false => cleaned.removed += 1,
            }
        }
        Ok(cleaned)
    }

    /// Whether disks are being captured for a snapshot, or were for one that isn't over:
    /// what was voted for doesn't count.
    pub fn has_captures(&self) -> bool {
        let entries = std::fs::read_dir(self.tmp());
        let mut dirs = entries.into_iter().flatten().flatten();
        dirs.any(|entry| {
            let dir = entry.path();
            dir.join(disk::LIST_NAME).exists() && !dir.join(VOTE_NAME).exists()
        })
    }

    /// Finds and locks the garbage in `tmp/`; nobody else will touch it then.
    fn lock_garbage(&self, cleaned: &mut Cleaned) -> Result<Vec<(PathBuf, File)>> {
        let tmp = self.tmp();
        let mut garbage = Vec::new();
        let _tmp = match files::lock_dir_wait(&tmp) {
            // Nobody has ever taken a snapshot into this store.
            Err(error) if is_not_found(&error) => return Ok(garbage),
            locked => locked?,
        };
        for entry in std::fs::read_dir(&tmp).map_err(Error::io("read", &tmp))? {
            let entry = entry.map_err(Error::io("read", &tmp))?;
            let name = entry.file_name();
            let begins = |prefix| name.to_str().is_some_and(|name| name.starts_with(prefix));
            let is_copy = begins(COPY_PREFIX);
            let ours = is_copy || begins(TAKE_PREFIX) || begins(REMOVED_PREFIX);
            if !ours || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            match files::try_lock_dir(&path, Lock::Exclusive) {
                // Waits to hear how it was decided, with or without a process.
                Ok(Some(_)) if path.join(VOTE_NAME).exists() => cleaned.live += 1,
                Ok(Some(lock)) if is_copy && is_recent(&lock) => cleaned.unfinished += 1,
                Ok(Some(lock)) => garbage.push((path, lock)),
                Ok(None) => cleaned.live += 1,
                // Its owner finished with it just now.
                Err(error) if is_not_found(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(garbage)
    }

    /// Deletes a committed snapshot that the caller has locked exclusively. It
    /// is out of the catalogue before its first file goes.
    pub(super) fn remove_snapshot(&self, vne: &Name, id: &SnapshotId) -> Result<()> {
        let from = self.snapshot_dir(vne, id);
        files::ensure_dir(&self.tmp())?;
        let pid = std::process::id();
        let to = self.tmp().join(format!("{REMOVED_PREFIX}{vne}.{id}.{pid}"));
        rename_dir(&from, &to)?;
        files::sync_dir(&self.vne_dir(vne))?;
        files::sync_dir(&self.tmp())?;
        self.remove_garbage(&[to], Effort::Thorough)
    }

    /// Removes directories that the caller has locked, and before them the packs
    /// that nobody uses then: for as long as a directory is there, the next one to
    /// clean up knows that there may be such packs.
    pub(super) fn remove_garbage(&self, dirs: &[PathBuf], effort: Effort) -> Result<()> {
        if dirs.iter().any(|dir| has_packs(dir)) {
            match sweep::sweep(self, dirs, effort) {
                Ok(Some(_)) => {}
                // Somebody else is at it, and may have looked already.
                Ok(None) => return Ok(()),
                // What can't be told apart stays. The rest needn't.
                Err(error) => log::warn!("packs stay: {}", sentence(&error)),
            }
        }
        let mut result = Ok(());
        for dir in dirs {
            // While there is one of its disks, so is the list of them.
            let disks = disk::remove_listed(dir).map_err(Error::disks(dir));
            let removed = disks.and_then(|()| remove_tree(dir));
            if removed.is_err() && result.is_ok() {
                result = removed;
            }
        }
        result
    }
}

/// Whether a copy has gone on in this directory lately.
fn is_recent(copy: &File) -> bool {
    let changed = copy.metadata().and_then(|facts| facts.modified());
    // A clock that was set back must not keep it for ever.
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < COPY_KEPT))
}

/// Whether a pack may have been published for a snapshot's directory. A member's
/// file is there until then.
fn has_packs(dir: &Path) -> bool {
    let Ok(members) = std::fs::read_dir(dir.join(MEMBERS_NAME)) else {
        return false;
    };
    let in_the_making = |member: &Path| {
        let names = [PACK_NAME, SQUEEZED_NAME];
        names.iter().any(|name| member.join(name).exists())
    };
    members
        .flatten()
        .any(|member| !in_the_making(&member.path()))
}

//! A snapshot in the making, until it's committed.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::complete::check_files;
use super::error::Error;
use super::files;
use super::manifest::{Cut, FileFacts, Manifest, FORMAT, MANIFEST_NAME};
use super::name::{Name, SnapshotId};
use super::store::{
    member_dir, rename_dir, Store, FRAMES_BYTES_MAX, FRAMES_NAME, MEMBERS_NAME, VOTE_BYTES_MAX,
    VOTE_NAME,
};
use super::sweep::Effort;
use super::Result;
use crate::disk::{self, Piece};

/// A snapshot in the making. Dropped without [`Take::commit`] or
/// [`Take::vote`], it goes away.
#[derive(Debug)]
pub struct Take {
    store: Store,
    vne: Name,
    id: SnapshotId,
    dir: PathBuf,
    /// Keeps [`Store::clean_tmp`] away.
    _lock: File,
    /// Committed, or voted for.
    stays: bool,
}

impl Take {
    /// One whose directory is there and locked; `stays` if it was voted for.
    pub(super) fn of(
        store: &Store,
        (vne, id): (&Name, &SnapshotId),
        dir: PathBuf,
        lock: File,
        stays: bool,
    ) -> Self {
        Take {
            store: store.clone(),
            vne: vne.clone(),
            id: id.clone(),
            dir,
            _lock: lock,
            stays,
        }
    }

    /// What the snapshot is going to be called.
    pub fn id(&self) -> &SnapshotId {
        &self.id
    }

    /// The directory that [`super::MemberWriter::create`] wants, also in other
    /// processes.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A manifest with what the store knows filled in, and the rest empty.
    pub fn manifest(&self, host: &Name) -> Manifest {
        Manifest {
            format: FORMAT,
            vne: self.vne.clone(),
            id: self.id.clone(),
            take: String::new(),
            created: self.id.created(),
            tool_version: String::new(),
            xen_version: String::new(),
            host: host.clone(),
            hosts: vec![host.clone()],
            label: None,
            cut: Cut::default(),
            stored: Vec::new(),
            members: Vec::new(),
        }
    }

    /// Which VNE's it is.
    pub fn vne(&self) -> &Name {
        &self.vne
    }

    /// Keeps recorded frames beside a member's files, durable when that member's
    /// writer finishes.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`], [`Error::Io`].
    pub fn add_frames(&self, member: &Name, bytes: &[u8]) -> Result<FileFacts> {
        let path = member_dir(&self.dir, member).join(FRAMES_NAME);
        if bytes.len() as u64 > FRAMES_BYTES_MAX {
            let problem = format!("they are more than {FRAMES_BYTES_MAX} bytes");
            return Err(Error::unstorable("recorded frames", problem));
        }
        let vault = self.store.vault();
        vault.write_file(&path, FRAMES_NAME, bytes)
    }

    /// Writes down which disks are going to be captured for it: from here on they
    /// go with it, whatever ends it.
    ///
    /// # Errors
    ///
    /// [`Error::Disks`].
    pub fn add_disks(&self, disks: &[Piece]) -> Result<()> {
        disk::write_list(&self.dir, disks).map_err(Error::disks(&self.dir))
    }

    /// What keeps it from being removed, for processes that may outlive this one.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn lock(&self) -> Result<File> {
        self._lock.try_clone().map_err(Error::io("lock", &self.dir))
    }

    /// Leaves it to [`Store::clean_tmp`], as another process still has its lock.
    pub fn leave(mut self) {
        self.stays = true;
    }

    /// Makes it last: whatever happens from here on, it stays as it is until
    /// [`Take::commit`] or [`Take::discard`]. `vote` is for whoever finds it
    /// with [`Store::in_doubt`]. The members' files are durable already.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]. It doesn't stay then.
    pub fn vote(&mut self, vote: &[u8]) -> Result<()> {
        if vote.len() as u64 > VOTE_BYTES_MAX {
            let problem = format!("it is longer than {VOTE_BYTES_MAX} bytes");
            return Err(Error::unstorable("the vote", problem));
        }
        files::sync_dir(&self.dir.join(MEMBERS_NAME))?;
        let vault = self.store.vault();
        vault.write_file(&self.dir.join(VOTE_NAME), VOTE_NAME, vote)?;
        files::sync_dir(&self.dir)?;
        files::sync_dir(&self.store.tmp())?;
        self.stays = true;
        Ok(())
    }

    /// Removes it, voted for or not.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: what is left of it has no vote and is garbage.
    pub fn discard(mut self) -> Result<()> {
        self.stays = true;
        match std::fs::remove_file(self.dir.join(VOTE_NAME)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &self.dir)(error));
            }
            _ => {}
        }
        self.remove()
    }

    fn remove(&self) -> Result<()> {
        self.store
            .remove_garbage(std::slice::from_ref(&self.dir), Effort::Quick)
    }

    /// Makes the snapshot exist: checks that all members' files are there,
    /// writes `manifest` as the last one, makes everything last, and moves the
    /// directory among the committed ones in a single step.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if the manifest isn't this take's or doesn't fit
    /// what is there; [`Error::Io`]. The snapshot doesn't exist then.
    pub fn commit(&mut self, manifest: &Manifest) -> Result<()> {
        self.check(manifest)?;
        let bytes = manifest.encode()?;
        files::sync_dir(&self.dir.join(MEMBERS_NAME))?;
        let vault = self.store.vault();
        vault.write_file(&self.dir.join(MANIFEST_NAME), MANIFEST_NAME, &bytes)?;
        files::sync_dir(&self.dir)?;
        let vne_dir = self.store.vne_dir(&self.vne);
        files::ensure_dir(&vne_dir)?;
        files::sync_dir(&self.store.snapshots())?;
        let place = self.store.snapshot_dir(&self.vne, &self.id);
        rename_dir(&self.dir, &place)?;
        let lasting = files::sync_dir(&vne_dir).and_then(|()| files::sync_dir(&self.store.tmp()));
        if lasting.is_err() {
            // Told to have failed, it should not be there either.
            return rename_dir(&place, &self.dir).and(lasting);
        }
        self.stays = true;
        // Its one use is over; beside a manifest it means nothing.
        let _ = std::fs::remove_file(place.join(VOTE_NAME));
        Ok(())
    }

    fn check(&self, manifest: &Manifest) -> Result<()> {
        let wrong = |problem: String| Error::unstorable("the manifest", problem);
        if manifest.format != FORMAT || manifest.vne != self.vne || manifest.id != self.id {
            return Err(wrong("it is another snapshot's".to_owned()));
        }
        if manifest.members.is_empty() {
            return Err(wrong("it has no members".to_owned()));
        }
        let mut names: Vec<_> = manifest.members.iter().map(|member| &member.name).collect();
        names.sort();
        if names.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err(wrong("it has the same member twice".to_owned()));
        }
        check_files(&self.dir, manifest, &self.store.packs())
    }
}

impl Drop for Take {
    fn drop(&mut self) {
        if !self.stays {
            // What can't be removed now, clean_tmp will find.
            let _ = self.remove();
        }
    }
}

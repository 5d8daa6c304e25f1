//! Makes what has arrived a snapshot of this store.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use super::complete;
use super::error::Error;
use super::files::{self, Lock};
use super::incoming::{remove_file, wrong, Incoming, Received, DONE_NAME, OF_NAME};
use super::manifest::{Manifest, Member, MANIFEST_NAME};
use super::name::Name;
use super::packs::try_lock_pack;
use super::store::{member_dir, remove_tree, rename_dir, MEMBERS_NAME, VOTE_NAME};
use super::Result;

/// How long a pack is waited for.
const LOCK_MAX: Duration = Duration::from_secs(30);

impl Incoming {
    /// All members have arrived: from here on the snapshot exists.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if a member is lacking, or a snapshot of that name has
    /// come meanwhile; [`Error::Io`]. What has arrived stays then.
    pub fn finish(self) -> Result<Received> {
        if let Some(name) = self.wanted().first() {
            return Err(wrong(format!("member {name} hasn't arrived")));
        }
        let (vne, id) = (&self.manifest.vne, &self.manifest.id);
        match self.store.catalogue().get(vne, id) {
            Err(Error::NoSnapshot { .. }) => self.become_snapshot()?,
            found => {
                // Locked, so that nobody removes it meanwhile.
                let there = found?;
                let manifest = self.merged(there.manifest())?;
                self.move_into(there.dir(), &manifest)?;
            }
        }
        let stats = || self.done.iter().map(|member| &member.image.stats);
        Ok(Received {
            members: self.done.iter().map(|member| member.name.clone()).collect(),
            pages_new: stats().map(|stats| stats.pages_new).sum(),
            bytes_new: stats().map(|stats| stats.bytes_new).sum(),
        })
    }

    /// A member's entry, with what is stored of it here.
    fn received(&self, member: &Member) -> Member {
        let done = self.done.iter().find(|done| done.name == member.name);
        done.unwrap_or(member).clone()
    }

    /// The hosts whose members have arrived.
    fn hosts(&self) -> Vec<Name> {
        let mut hosts: Vec<Name> = Vec::new();
        for member in self.manifest.members_here() {
            let is_done = self.done.iter().any(|done| done.name == member.name);
            if is_done && !hosts.contains(&member.host) {
                hosts.push(member.host.clone());
            }
        }
        hosts
    }

    fn become_snapshot(&self) -> Result<()> {
        let manifest = Manifest {
            host: self.here.clone(),
            stored: self.hosts(),
            members: self
                .manifest
                .members
                .iter()
                .map(|m| self.received(m))
                .collect(),
            ..self.manifest.clone()
        };
        complete::check_files(&self.dir, &manifest, &self.store.packs())?;
        let (vne, id) = (&manifest.vne, &manifest.id);
        let path = self.dir.join(MANIFEST_NAME);
        remove_file(&path)?;
        files::sync_dir(&self.dir.join(MEMBERS_NAME))?;
        let vault = self.store.vault();
        vault.write_file(&path, MANIFEST_NAME, &manifest.encode()?)?;
        let vne_dir = self.store.vne_dir(vne);
        files::ensure_dir(&vne_dir)?;
        files::sync_dir(&self.store.snapshots())?;
        // Of no more use, and no part of a snapshot.
        remove_tree(&self.dir.join(DONE_NAME))?;
        remove_file(&self.dir.join(OF_NAME))?;
        files::sync_dir(&self.dir)?;
        {
            // Nobody begins a part of the same name meanwhile.
            let _tmp = files::lock_dir_wait(&self.store.tmp())?;
            let take = self.store.take_dir(vne, id);
            if take.exists() {
                return Err(Error::InUse { path: take });
            }
            rename_dir(&self.dir, &self.store.snapshot_dir(vne, id))?;
        }
        files::sync_dir(&vne_dir)?;
        files::sync_dir(&self.store.tmp())
    }

    /// The manifest of the snapshot that is here, with what has arrived.
    fn merged(&self, there: &Manifest) -> Result<Manifest> {
        let names = |manifest: &Manifest| -> Vec<Name> {
            manifest.members.iter().map(|m| m.name.clone()).collect()
        };
        if there.take != self.manifest.take || names(there) != names(&self.manifest) {
            return Err(wrong("another snapshot of that name has come meanwhile"));
        }
        let mut merged = there.clone();
        if merged.stored.is_empty() {
            merged.stored.push(merged.host.clone());
        }
        for host in self.hosts() {
            if !merged.stored.contains(&host) {
                merged.stored.push(host);
            }
        }
        for member in &mut merged.members {
            if !there.has(member) {
                *member = self.received(member);
            }
        }
        Ok(merged)
    }

    /// Keeps the packs that have arrived from being removed.
    fn lock_packs(&self) -> Result<Vec<File>> {
        let packs = self.store.packs();
        let begun = Instant::now();
        let mut locked = Vec::new();
        for id in self.done.iter().flat_map(|member| &member.image.packs) {
            let path = packs.path(id);
            loop {
                let file = File::open(&path).map_err(Error::io("open", &path))?;
                if try_lock_pack(&file, &path, Lock::Shared)? {
                    locked.push(file);
                    break;
                }
                // Somebody frees space.
                if begun.elapsed() > LOCK_MAX {
                    return Err(Error::InUse { path });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(locked)
    }

    /// Moves the members beside those of a snapshot, and then replaces its manifest:
    /// until that is done they don't exist for anybody.
    fn move_into(&self, snapshot: &Path, manifest: &Manifest) -> Result<()> {
        // From the first rename to the new manifest no index says that they're used.
        let _packs = self.lock_packs()?;
        for Member { name, .. } in &self.done {
            let (from, to) = (member_dir(&self.dir, name), member_dir(snapshot, name));
            // What a killed one has left.
            remove_tree(&to)?;
            rename_dir(&from, &to)?;
        }
        files::sync_dir(&snapshot.join(MEMBERS_NAME))?;
        complete::check_files(snapshot, manifest, &self.store.packs())?;
        let aside = snapshot.join(format!("{MANIFEST_NAME}.new"));
        remove_file(&aside)?;
        let vault = self.store.vault();
        vault.write_file(&aside, MANIFEST_NAME, &manifest.encode()?)?;
        let place = snapshot.join(MANIFEST_NAME);
        std::fs::rename(&aside, &place).map_err(Error::io("rename", &aside))?;
        files::sync_dir(snapshot)?;
        // Means nothing beside a manifest; a killed commit may have left it.
        remove_file(&snapshot.join(VOTE_NAME))?;
        remove_tree(&self.dir)
    }
}

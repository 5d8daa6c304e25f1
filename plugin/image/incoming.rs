//! A snapshot that comes from another store.
//!
//! What has arrived is in `tmp/copy.VNE.ID/`, which nobody lists, and stays there
//! when the copy breaks off: a day long, for the next one to go on with. In the end
//! a rename makes it a snapshot of this store; or, where this store has one of that
//! name with other hosts' members, these are moved beside them and a new manifest
//! replaces the old one.
//!
//! Whoever sends is hostile until checked: every page, file and index is compared
//! with its hash or made here.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::arriving::{Arriving, LOG_NAME};
use super::catalogue::STARTING_MAX;
use super::complete;
use super::error::Error;
use super::files::{self, Lock};
use super::known::Known;
use super::manifest::{FileFacts, Manifest, Member, FORMAT, MANIFEST_BYTES_MAX};
use super::name::Name;
use super::publish;
use super::records::Records;
use super::store::{
    self, member_dir, remove_tree, Store, CONFIG_NAME, FRAMES_BYTES_MAX, FRAMES_NAME, INDEX_NAME,
    MEMBERS_NAME, RECORDS_NAME,
};
use super::writer::RECORDS_BYTES_MAX;
use super::Result;
use crate::stream::CONFIG_BYTES_MAX;

/// Says which snapshot it is that has begun to arrive.
pub(super) const OF_NAME: &str = "of";
/// What the manifest will say of members that are complete, a file each.
pub(super) const DONE_NAME: &str = "done";
/// Between two looks for free space.
const LOOK_BYTES: u64 = 16 << 20;

/// What the receiving store allows itself.
#[derive(Clone, Copy, Debug)]
pub struct IncomingLimits {
    /// Bytes that must stay free on the store's file system.
    pub free_bytes_min: u64,
    /// Bytes that the hashes of the store's pages may take in memory, at most.
    pub known_bytes_max: usize,
}

impl Default for IncomingLimits {
    /// 256 MiB each: takes that go on need a little room, too.
    fn default() -> Self {
        IncomingLimits {
            free_bytes_min: 256 << 20,
            known_bytes_max: 256 << 20,
        }
    }
}

/// What has come of a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// The members that are new in this store.
    pub members: Vec<Name>,
    /// Pages that it didn't have.
    pub pages_new: u64,
    /// Bytes that were stored for them.
    pub bytes_new: u64,
}

/// A snapshot that is being received.
#[derive(Debug)]
pub struct Incoming {
    pub(super) store: Store,
    pub(super) here: Name,
    pub(super) dir: PathBuf,
    /// Only one receives, and nobody removes it.
    pub(super) _lock: File,
    /// The sender's.
    pub(super) manifest: Manifest,
    wanted: Vec<Name>,
    /// Those that are whole, as the manifest will say it.
    pub(super) done: Vec<Member>,
    current: Option<Current>,
    limits: IncomingLimits,
    unlooked_bytes: u64,
}

/// The member at hand.
#[derive(Debug)]
struct Current {
    name: Name,
    pages: Arriving,
    /// Bytes of a file that isn't whole: they go to disk in one piece, as they may
    /// have to be encrypted.
    file: Vec<u8>,
    /// Files that are whole.
    files: Vec<FileFacts>,
}

impl Incoming {
    /// Begins to receive the members that `manifest` has beside it, or goes on; `None`
    /// if all of them are here. `here` is this host.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if the manifest makes no sense, or there is another
    /// snapshot of that name; [`Error::InUse`] while it's being received already, or
    /// this host's part of it is being taken; [`Error::Damaged`]; [`Error::Io`].
    pub fn begin(
        store: &Store,
        here: &Name,
        manifest: Manifest,
        limits: IncomingLimits,
    ) -> Result<Option<Self>> {
        check(&manifest)?;
        store.make()?;
        let wanted = wanted(store, &manifest)?;
        if wanted.is_empty() {
            return Ok(None);
        }
        let dir = store.copy_dir(&manifest.vne, &manifest.id);
        let lock = enter(store, &dir)?;
        let mut incoming = Incoming {
            store: store.clone(),
            here: here.clone(),
            _lock: lock,
            manifest,
            wanted,
            done: Vec::new(),
            current: None,
            limits,
            unlooked_bytes: LOOK_BYTES,
            dir,
        };
        incoming.look_at_space(0)?;
        incoming.take_over()?;
        Ok(Some(incoming))
    }

    /// The members that haven't arrived whole.
    pub fn wanted(&self) -> Vec<Name> {
        let lacks = |name: &&Name| !self.done.iter().any(|done| done.name == **name);
        self.wanted.iter().filter(lacks).cloned().collect()
    }

    /// Finds what an earlier copy has left of the same snapshot.
    fn take_over(&mut self) -> Result<()> {
        let hash = blake3::hash(&self.manifest.encode()?).to_hex();
        let path = self.dir.join(OF_NAME);
        let same = files::read_file(&path, 64).is_ok_and(|of| of == hash.as_bytes());
        if !same {
            for name in [MEMBERS_NAME, DONE_NAME] {
                remove_tree(&self.dir.join(name))?;
            }
            remove_file(&path)?;
            files::write_file(&path, OF_NAME, hash.as_bytes())?;
        }
        for name in [MEMBERS_NAME, DONE_NAME] {
            files::ensure_dir(&self.dir.join(name))?;
        }
        for name in self.wanted.clone() {
            let path = self.dir.join(DONE_NAME).join(name.as_str());
            let read = self.store.vault().read_file(&path, MANIFEST_BYTES_MAX);
            let member = match read {
                Ok(bytes) => serde_json::from_slice::<Member>(&bytes).ok(),
                Err(_) => None,
            };
            let Some(member) = member.filter(|member| member.name == name) else {
                continue;
            };
            // Its packs may have been freed since.
            let packs = self.store.packs();
            let is_whole = super::reader::read_map(packs.vault(), &self.dir, &member).is_ok()
                && complete::check_member(&self.dir, &member, FORMAT, &packs).is_ok();
            if is_whole {
                self.done.push(member);
            }
        }
        Ok(())
    }

    fn entry(&self, name: &Name) -> Result<&Member> {
        let mut members = self.manifest.members.iter();
        let found = members.find(|member| member.name == *name);
        found
            .filter(|member| self.wanted.contains(&member.name))
            .ok_or_else(|| Error::NoMember {
                vne: self.manifest.vne.clone(),
                id: self.manifest.id.clone(),
                member: name.clone(),
            })
    }

    /// Begins with a member, or goes on with what there is of it.
    ///
    /// # Errors
    ///
    /// [`Error::NoMember`], [`Error::Io`].
    pub fn begin_member(&mut self, name: &Name) -> Result<()> {
        self.entry(name)?;
        let dir = member_dir(&self.dir, name);
        files::ensure_dir(&dir)?;
        self.done.retain(|done| done.name != *name);
        let known = Known::new(&self.store.packs(), self.limits.known_bytes_max);
        self.current = Some(Current {
            name: name.clone(),
            pages: Arriving::open(&dir, known)?,
            file: Vec::new(),
            files: Vec::new(),
        });
        Ok(())
    }

    fn current(&mut self, name: &Name) -> Result<&mut Current> {
        match &mut self.current {
            Some(current) if current.name == *name => Ok(current),
            _ => Err(wrong(format!("member {name} wasn't begun"))),
        }
    }

    /// Takes in bytes of one of a member's files, from front to back, one file after
    /// the other. At its end it's compared with its hash, and made last.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if they belong nowhere; [`Error::Damaged`] if it isn't
    /// what the manifest says; [`Error::Io`].
    pub fn file(&mut self, name: &Name, file: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let facts = facts(self.entry(name)?, file)?.clone();
        self.look_at_space(bytes.len() as u64)?;
        let path = member_dir(&self.dir, name).join(file);
        let vault = self.store.vault().clone();
        let current = self.current(name)?;
        if offset != current.file.len() as u64 {
            return Err(wrong(format!("{file} doesn't go on at byte {offset}")));
        }
        if offset.saturating_add(bytes.len() as u64) > facts.length {
            return Err(wrong(format!("{file} is longer than the manifest says")));
        }
        current.file.extend_from_slice(bytes);
        if (current.file.len() as u64) < facts.length {
            return Ok(());
        }
        let whole = std::mem::take(&mut current.file);
        let hash = blake3::hash(&whole).to_hex();
        let problem = match file {
            _ if facts.blake3.as_deref() != Some(hash.as_str()) => {
                Some(String::from("its contents are not what was sent"))
            }
            CONFIG_NAME => std::str::from_utf8(&whole)
                .map_err(|_| String::from("it is no text"))
                .and_then(store::check_config)
                .err(),
            RECORDS_NAME => Records::decode(&whole).err(),
            _ => None,
        };
        if let Some(problem) = problem {
            return Err(Error::damaged(&path, problem));
        }
        remove_file(&path)?;
        let written = vault.write_file(&path, &facts.name, &whole)?;
        current.files.retain(|known| known.name != written.name);
        current.files.push(written);
        Ok(())
    }

    /// Takes in what a member's next guest frames are, as [`super::Batch`] says it;
    /// which of the pages this store lacks, a bit a page.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if it makes no sense.
    pub fn batch(&mut self, name: &Name, bytes: &[u8]) -> Result<Vec<u8>> {
        self.current(name)?.pages.batch(bytes)
    }

    /// Takes in pages: one zstd frame of up to 64.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if it's none, or there is too little space; [`Error::Io`].
    pub fn frame(&mut self, name: &Name, bytes: &[u8], count: u32) -> Result<()> {
        self.look_at_space(bytes.len() as u64)?;
        self.current(name)?.pages.frame(bytes, count as usize)
    }

    /// A member has come to its end: checks its files and publishes its pack. It may
    /// take a while.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if a file isn't what the manifest says;
    /// [`Error::Unstorable`] if pages are lacking; [`Error::Io`].
    pub fn end_member(&mut self, name: &Name) -> Result<()> {
        self.current(name)?;
        let Some(current) = self.current.take() else {
            return Ok(());
        };
        let mut entry = self.entry(name)?.clone();
        let dir = member_dir(&self.dir, name);
        let file = |name: &str| {
            let found = current.files.iter().find(|file| file.name == name);
            found.cloned().ok_or_else(|| {
                let member = &current.name;
                wrong(format!("{name} of {member} never came"))
            })
        };
        let mut files = vec![file(CONFIG_NAME)?, file(RECORDS_NAME)?];
        if let Some(recorded) = &mut entry.recorded {
            recorded.file = file(FRAMES_NAME)?;
        }
        let (packed, table) = current.pages.finish()?;
        let published = publish::publish(packed, &table, &self.store.packs(), &dir)?;
        let map = &published.map;
        map.check()
            .map_err(|problem| Error::damaged(&dir.join(INDEX_NAME), problem))?;
        let stats = &mut entry.image.stats;
        (stats.pages_unique, stats.pages_stored, stats.pages_zero) = (0, 0, 0);
        stats.count(map);
        (stats.pages_new, stats.bytes_new) = published.own;
        let vault = self.store.vault();
        let index = dir.join(INDEX_NAME);
        remove_file(&index)?;
        files.push(vault.write_file(&index, INDEX_NAME, &map.encode())?);
        entry.image.files = files;
        entry.image.packs = map.packs.iter().map(|(id, _)| *id).collect();
        remove_file(&dir.join(LOG_NAME))?;
        files::sync_dir(&dir)?;
        let done = self.dir.join(DONE_NAME).join(name.as_str());
        let text = serde_json::to_vec(&entry)
            .map_err(|error| wrong(format!("member {name} can't be written: {error}")))?;
        remove_file(&done)?;
        vault.write_file(&done, name.as_str(), &text)?;
        self.done.push(entry);
        Ok(())
    }

    /// Looks now and then whether so many bytes more leave enough free.
    fn look_at_space(&mut self, more: u64) -> Result<()> {
        self.unlooked_bytes += more;
        if self.unlooked_bytes < LOOK_BYTES {
            return Ok(());
        }
        self.unlooked_bytes = 0;
        let free = self.store.free_bytes()?;
        if free >= self.limits.free_bytes_min {
            return Ok(());
        }
        Err(wrong(format!(
            "only {} MiB are free in {}, and copies leave {} MiB (remove snapshots with 'xl \
             vne-snapshot remove')",
            free >> 20,
            self.store.root().display(),
            self.limits.free_bytes_min >> 20
        )))
    }

    /// Bytes of the member at hand that are here, from earlier copies too.
    pub fn arrived_bytes(&self) -> u64 {
        let current = self.current.as_ref();
        current.map_or(0, |current| current.pages.bytes())
    }
}

pub(super) fn wrong(problem: impl Into<String>) -> Error {
    Error::unstorable("the copy", problem)
}

/// Removes a file that may be there.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// What the manifest says of a member's file; only of those that are sent.
fn facts<'a>(member: &'a Member, file: &str) -> Result<&'a FileFacts> {
    let facts = match file {
        CONFIG_NAME | RECORDS_NAME => {
            let mut files = member.image.files.iter();
            files.find(|facts| facts.name == file)
        }
        FRAMES_NAME => member.recorded.as_ref().map(|recorded| &recorded.file),
        _ => None,
    };
    facts.ok_or_else(|| wrong(format!("member {} has no file {file}", member.name)))
}

/// Whether a manifest makes sense, whoever sent it.
fn check(manifest: &Manifest) -> Result<()> {
    if manifest.format != FORMAT {
        return Err(wrong(format!(
            "it is of format {}, and only {FORMAT} can be copied",
            manifest.format
        )));
    }
    let mut names: Vec<_> = manifest.members.iter().map(|member| &member.name).collect();
    names.sort();
    if names.windows(2).any(|pair| pair.first() == pair.last()) {
        return Err(wrong("its manifest has the same member twice"));
    }
    for member in manifest.members_here() {
        let limits = [
            (CONFIG_NAME, CONFIG_BYTES_MAX as u64),
            // Headers beside them.
            (RECORDS_NAME, 2 * RECORDS_BYTES_MAX as u64),
            (FRAMES_NAME, FRAMES_BYTES_MAX),
        ];
        for (name, bytes_max) in limits {
            if name == FRAMES_NAME && member.recorded.is_none() {
                continue;
            }
            let facts = facts(member, name)?;
            if facts.name != name || facts.length > bytes_max || facts.blake3.is_none() {
                let problem = format!("its manifest is wrong about {name} of {}", member.name);
                return Err(wrong(problem));
            }
        }
    }
    Ok(())
}

/// The members that this store lacks of those that the manifest has beside it.
fn wanted(store: &Store, manifest: &Manifest) -> Result<Vec<Name>> {
    let (vne, id) = (&manifest.vne, &manifest.id);
    if store.take_dir(vne, id).exists() {
        let path = store.take_dir(vne, id);
        return Err(Error::InUse { path });
    }
    let there = match store.catalogue().get(vne, id) {
        Ok(snapshot) => Some(snapshot),
        Err(Error::NoSnapshot { .. }) => None,
        Err(error) => return Err(error),
    };
    let there = there.as_ref().map(|snapshot| snapshot.manifest());
    if let Some(there) = there {
        let named = |manifest: &Manifest| -> Vec<(Name, Name)> {
            let members = manifest.members.iter();
            members.map(|m| (m.host.clone(), m.name.clone())).collect()
        };
        if there.format != FORMAT {
            let problem = "there is a part of it here that is of an earlier format";
            return Err(wrong(problem));
        }
        if there.take != manifest.take || named(there) != named(manifest) {
            return Err(wrong(format!(
                "there is another snapshot {vne}@{id} in {}",
                store.root().display()
            )));
        }
    }
    let lacks = |member: &&Member| !there.is_some_and(|there| there.has(member));
    let members = manifest.members_here().filter(lacks);
    Ok(members.map(|member| member.name.clone()).collect())
}

/// Makes the folder of what arrives, if there is none, and locks it.
fn enter(store: &Store, dir: &Path) -> Result<File> {
    let _tmp = files::lock_dir_wait(&store.tmp())?;
    files::ensure_dir(dir)?;
    let begun = Instant::now();
    let lock = loop {
        match files::try_lock_dir(dir, Lock::Exclusive)? {
            Some(lock) => break lock,
            // A process that is being started has all locks of ours for a moment.
            None if begun.elapsed() < STARTING_MAX => {
                std::thread::sleep(Duration::from_millis(5));
            }
            None => {
                let path = dir.to_owned();
                return Err(Error::InUse { path });
            }
        }
    };
    // From now on it's kept for another while.
    lock.set_modified(SystemTime::now())
        .map_err(Error::io("touch", dir))?;
    Ok(lock)
}

//! The committed snapshots.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::complete;
use super::error::Error;
use super::files::{self, Lock};
use super::manifest::{Manifest, Member, MANIFEST_BYTES_MAX, MANIFEST_NAME};
use super::name::{Name, SnapshotId};
use super::packs::Packs;
use super::reader::MemberReader;
use super::seal::FILE_BYTES;
use super::store::{self, is_not_found, Store};
use super::sweep::{self, Effort, Swept};
use super::Result;
use crate::disk::{self, Piece};
use crate::sentence::sentence;

/// How long a process may take from being forked to running its program.
pub(super) const STARTING_MAX: Duration = Duration::from_millis(300);

/// Lists, finds and removes snapshots.
#[derive(Clone, Debug)]
pub struct Catalogue {
    store: Store,
}

/// What [`Catalogue::list`] found.
#[derive(Debug, Default)]
pub struct Listing {
    /// Complete snapshots, by VNE and then by age, oldest first: the manifest's
    /// checksum is right and all files are there at their full length.
    pub snapshots: Vec<Manifest>,
    /// Everything else, for a warning.
    pub damaged: Vec<Damaged>,
}

/// What [`Catalogue::names`] found.
#[derive(Debug, Default)]
pub struct Names {
    /// Snapshots, by VNE and then by age, oldest first.
    pub snapshots: Vec<(Name, SnapshotId)>,
    /// What stands among them and can't be one.
    pub strange: Vec<Error>,
}

/// A directory among the snapshots that isn't a good one.
#[derive(Debug)]
pub struct Damaged {
    /// Where it is.
    pub path: PathBuf,
    /// What is wrong with it.
    pub error: Error,
}

impl Catalogue {
    pub(super) fn new(store: Store) -> Self {
        Catalogue { store }
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// All snapshots, or those of one VNE. One that is damaged or incomplete is
    /// reported as that and never among the good ones. Contents of files aren't
    /// read.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the store's directories can't be read.
    pub fn list(&self, vne: Option<&Name>) -> Result<Listing> {
        let mut listing = Listing::default();
        let vnes = match vne {
            Some(vne) => vec![vne.clone()],
            None => self.vnes(&mut listing)?,
        };
        for vne in vnes {
            self.list_vne(&vne, &mut listing)?;
        }
        Ok(listing)
    }

    /// The names of all snapshots, damaged or not, or of one VNE's.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the store's directories can't be read.
    pub fn names(&self, vne: Option<&Name>) -> Result<Names> {
        let mut listing = Listing::default();
        let vnes = match vne {
            Some(vne) => vec![vne.clone()],
            None => self.vnes(&mut listing)?,
        };
        let mut names = Names::default();
        for vne in vnes {
            let mut ids = Vec::new();
            for (path, name) in entries(&self.store.vne_dir(&vne))? {
                match name.parse::<SnapshotId>() {
                    Ok(id) => ids.push(id),
                    Err(error) => listing.damaged.push(Damaged { path, error }),
                }
            }
            ids.sort();
            names
                .snapshots
                .extend(ids.into_iter().map(|id| (vne.clone(), id)));
        }
        let strange = listing.damaged.into_iter();
        names.strange = strange
            .map(|damaged| Error::damaged(&damaged.path, sentence(&damaged.error)))
            .collect();
        Ok(names)
    }

    /// The newest complete snapshot of a VNE.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshots`], [`Error::Io`].
    pub fn newest(&self, vne: &Name) -> Result<Snapshot> {
        let listing = self.list(Some(vne))?;
        match listing.snapshots.last() {
            Some(manifest) => self.get(vne, &manifest.id),
            None => Err(Error::NoSnapshots { vne: vne.clone() }),
        }
    }

    /// One snapshot, checked as by [`Catalogue::list`] and protected from
    /// removal for as long as the result lives.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; [`Error::Damaged`], saying how; [`Error::Newer`];
    /// [`Error::Io`].
    pub fn get(&self, vne: &Name, id: &SnapshotId) -> Result<Snapshot> {
        let lock = self.lock(vne, id, Lock::Shared)?;
        let dir = self.store.snapshot_dir(vne, id);
        let manifest = read_manifest(&dir, vne, id, &self.store.packs())?;
        Ok(Snapshot {
            manifest,
            dir,
            packs: self.store.packs(),
            _lock: lock,
        })
    }

    /// Deletes a snapshot, damaged or not, and what [`Store::clean_tmp`] finds.
    /// It leaves the catalogue in one step before anything of it goes, so that
    /// a deletion that breaks off leaves only such garbage.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`]; [`Error::InUse`] while somebody has it open;
    /// [`Error::Io`].
    pub fn remove(&self, vne: &Name, id: &SnapshotId) -> Result<()> {
        let _lock = self.lock(vne, id, Lock::Exclusive)?;
        self.store.remove_snapshot(vne, id).map_err(|error| {
            if is_not_found(&error) && !self.store.snapshot_dir(vne, id).exists() {
                no_snapshot(vne, id) // somebody else was faster
            } else {
                error
            }
        })?;
        // Who removes wants space. What others left and can't go now doesn't
        // make this one fail.
        let _ = self.store.clean_tmp();
        Ok(())
    }

    /// Frees what no snapshot uses; waits for others that do.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if a snapshot doesn't say which packs it needs: nothing
    /// is freed then. [`Error::Io`].
    pub fn sweep(&self) -> Result<Swept> {
        let swept = sweep::sweep(&self.store, &[], Effort::Thorough)?;
        Ok(swept.unwrap_or_default())
    }

    fn lock(&self, vne: &Name, id: &SnapshotId, lock: Lock) -> Result<File> {
        let path = self.store.snapshot_dir(vne, id);
        let start = Instant::now();
        loop {
            match files::try_lock_dir(&path, lock) {
                Ok(Some(file)) => return Ok(file),
                // A process that is being started has all locks of ours until it
                // runs its program.
                Ok(None) if start.elapsed() < STARTING_MAX => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None) if lock == Lock::Shared => return Err(no_snapshot(vne, id)), // being removed
                Ok(None) => return Err(Error::InUse { path }),
                Err(error) if is_not_found(&error) => return Err(no_snapshot(vne, id)),
                Err(error) => return Err(error),
            }
        }
    }

    /// The VNEs that have a directory, in order.
    fn vnes(&self, listing: &mut Listing) -> Result<Vec<Name>> {
        let mut vnes = Vec::new();
        for (path, name) in entries(&self.store.snapshots())? {
            match Name::new(&name) {
                Ok(vne) => vnes.push(vne),
                Err(error) => listing.damaged.push(Damaged { path, error }),
            }
        }
        vnes.sort();
        Ok(vnes)
    }

    fn list_vne(&self, vne: &Name, listing: &mut Listing) -> Result<()> {
        let mut ids = Vec::new();
        for (path, name) in entries(&self.store.vne_dir(vne))? {
            match name.parse::<SnapshotId>() {
                Ok(id) => ids.push((id, path)),
                Err(error) => listing.damaged.push(Damaged { path, error }),
            }
        }
        ids.sort();
        for (id, path) in ids {
            match read_manifest(&path, vne, &id, &self.store.packs()) {
                Ok(manifest) => listing.snapshots.push(manifest),
                Err(_) if !path.exists() => {} // removed just now
                Err(error) => listing.damaged.push(Damaged { path, error }),
            }
        }
        Ok(())
    }
}

fn no_snapshot(vne: &Name, id: &SnapshotId) -> Error {
    Error::NoSnapshot {
        vne: vne.clone(),
        id: id.clone(),
    }
}

/// Paths and names in a directory; none if it doesn't exist. A name that isn't
/// text comes out with replacement characters, which no valid name has.
fn entries(dir: &Path) -> Result<Vec<(PathBuf, String)>> {
    let list = match std::fs::read_dir(dir) {
        Ok(list) => list,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", dir)(error)),
    };
    list.map(|entry| {
        let entry = entry.map_err(Error::io("read", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        Ok((entry.path(), name))
    })
    .collect()
}

/// Reads the manifest in `dir`, checks that it belongs there and that its files
/// are complete.
fn read_manifest(dir: &Path, vne: &Name, id: &SnapshotId, packs: &Packs) -> Result<Manifest> {
    let path = dir.join(MANIFEST_NAME);
    let bytes = match packs.vault().read_file(&path, MANIFEST_BYTES_MAX) {
        Err(error) if is_not_found(&error) => {
            return Err(Error::damaged(dir, "it has no manifest"));
        }
        bytes => bytes?,
    };
    let manifest = Manifest::decode(&bytes, &path)?;
    if manifest.vne != *vne || manifest.id != *id {
        let problem = format!(
            "it belongs to snapshot {} of VNE {}",
            manifest.id, manifest.vne
        );
        return Err(Error::damaged(&path, problem));
    }
    complete::check_files(dir, &manifest, packs)?;
    Ok(manifest)
}

/// A committed snapshot, open for reading. While it lives, nobody removes it.
#[derive(Debug)]
pub struct Snapshot {
    manifest: Manifest,
    dir: PathBuf,
    packs: Packs,
    _lock: File,
}

impl Snapshot {
    /// What it says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn packs(&self) -> &Packs {
        &self.packs
    }

    /// Opens a member, checking all but the pages' contents.
    ///
    /// # Errors
    ///
    /// [`Error::NoMember`], [`Error::Damaged`], [`Error::Io`].
    pub fn member(&self, name: &Name) -> Result<MemberReader> {
        let format = self.manifest.format;
        MemberReader::open(&self.dir, &self.packs, self.entry(name)?, format)
    }

    /// The entry of a member that is stored here.
    pub(super) fn entry(&self, name: &Name) -> Result<&Member> {
        let manifest = &self.manifest;
        let member = manifest.members.iter().find(|member| member.name == *name);
        match member {
            Some(member) if !manifest.has(member) => Err(Error::Elsewhere {
                member: name.clone(),
                host: member.host.clone(),
            }),
            Some(member) => Ok(member),
            None => Err(Error::NoMember {
                vne: manifest.vne.clone(),
                id: manifest.id.clone(),
                member: name.clone(),
            }),
        }
    }

    /// What a member had sent before its cut and nobody had seen, as pcapng,
    /// compared with its hash; none if there was nothing.
    ///
    /// # Errors
    ///
    /// [`Error::NoMember`], [`Error::Elsewhere`], [`Error::Damaged`],
    /// [`Error::Io`].
    pub fn recorded_frames(&self, name: &Name) -> Result<Option<Vec<u8>>> {
        let Some(recorded) = &self.entry(name)?.recorded else {
            return Ok(None);
        };
        let path = store::member_dir(&self.dir, name).join(store::FRAMES_NAME);
        if recorded.file.length > store::FRAMES_BYTES_MAX + FILE_BYTES {
            let problem = format!("it is longer than {} bytes", store::FRAMES_BYTES_MAX);
            return Err(Error::damaged(&path, problem));
        }
        self.packs
            .vault()
            .read_checked(&path, &recorded.file)
            .map(Some)
    }

    /// The captured disks of a member, all there.
    ///
    /// # Errors
    ///
    /// [`Error::NoMember`], [`Error::Elsewhere`]; [`Error::Disks`] if one is missing,
    /// as in a snapshot that was copied from elsewhere.
    pub fn disks(&self, name: &Name) -> Result<&[Piece]> {
        let disks = &self.entry(name)?.disks;
        if disks.is_empty() {
            return Ok(disks);
        }
        let failed = || Error::disks(&self.dir);
        let listed = disk::read_list(&self.dir).map_err(failed())?;
        let listed = listed.unwrap_or_default();
        for piece in disks {
            if !listed.contains(piece) {
                let why = format!(
                    "{} of {name} isn't kept with this copy of the snapshot (restore it where it \
                     was taken, or put the disk there yourself)",
                    piece.vdev
                );
                return Err(failed()(disk::Error::Unfit(why)));
            }
            piece.check().map_err(failed())?;
        }
        Ok(disks)
    }

    /// Whether the captured disks of a member that are kept with this copy of the
    /// snapshot are all there.
    pub(super) fn check_disks(&self, name: &Name) -> Result<()> {
        match disk::read_list(&self.dir).map_err(Error::disks(&self.dir))? {
            Some(_) => self.disks(name).map(drop),
            None => Ok(()),
        }
    }

    /// Reads everything and compares it with its hashes; disks have none, and are
    /// only looked for.
    ///
    /// # Errors
    ///
    /// The first [`Error::Damaged`], [`Error::DamagedPages`] or [`Error::Io`].
    pub fn verify(&self) -> Result<()> {
        for member in self.manifest.members_here() {
            self.member(&member.name)?.verify()?;
            self.recorded_frames(&member.name)?;
            self.check_disks(&member.name)?;
        }
        Ok(())
    }
}

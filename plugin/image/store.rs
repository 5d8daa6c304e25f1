//! The store's directories, and snapshots in the making.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::statvfs;

use super::catalogue::Catalogue;
use super::error::Error;
use super::files::{self, Lock};
use super::manifest::{
    Cut, FileFacts, Manifest, Member, FORMAT, MANIFEST_BYTES_MAX, MANIFEST_NAME,
};
use super::name::{Name, SnapshotId, StoreId};
use super::pack::Pack;
use super::packs::Packs;
use super::sweep::{self, Effort};
use super::Result;
use crate::sentence::sentence;
use crate::stream::CONFIG_BYTES_MAX;

/// Where snapshots are kept unless the admin says otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/xen-vne";

pub(crate) const CONFIG_NAME: &str = "config.json";
pub(crate) const RECORDS_NAME: &str = "records";
pub(crate) const INDEX_NAME: &str = "index";
/// In format 1.
pub(crate) const PAGES_NAME: &str = "pages";
/// What a member had sent and nobody had seen.
pub(crate) const FRAMES_NAME: &str = "frames.pcapng";
/// It's read in one piece.
pub(crate) const FRAMES_BYTES_MAX: u64 = 1 << 30;
/// The pack in the making.
pub(super) const PACK_NAME: &str = "pack";
/// The same without what turned out to be of no use.
pub(super) const SQUEEZED_NAME: &str = "pack.new";
pub(super) const MEMBERS_NAME: &str = "members";
const TMP_NAME: &str = "tmp";
const SNAPSHOTS_NAME: &str = "snapshots";
/// Tells this store from all others.
const ID_NAME: &str = "id";
const ID_BYTES_MAX: u64 = 64;
/// Snapshots in the making.
pub(super) const TAKE_PREFIX: &str = "take.";
/// Snapshots being deleted.
const REMOVED_PREFIX: &str = "removed.";

/// Says that a part waits for the outcome.
pub(super) const VOTE_NAME: &str = "vote.json";
/// A vote says of each member what the manifest will.
const VOTE_BYTES_MAX: u64 = MANIFEST_BYTES_MAX;

/// Snapshots of one VNE that begin in the same second, at most.
const SAME_SECOND_MAX: u32 = 1000;

/// A member's directory in that of a snapshot.
pub(crate) fn member_dir(snapshot: &Path, name: &Name) -> PathBuf {
    snapshot.join(MEMBERS_NAME).join(name.as_str())
}

/// The store that a take's directory is in.
pub(crate) fn root_of_take(take_dir: &Path) -> &Path {
    let root = take_dir.parent().and_then(Path::parent);
    root.unwrap_or(take_dir)
}

/// Checks a domain's configuration; `Err` says what is wrong with it.
pub(crate) fn check_config(json: &str) -> std::result::Result<(), String> {
    if json.len() > CONFIG_BYTES_MAX {
        return Err(format!("it is longer than {CONFIG_BYTES_MAX} bytes"));
    }
    serde_json::from_str::<serde::de::IgnoredAny>(json)
        .map(|_| ())
        .map_err(|error| format!("it is no JSON: {error}"))
}

/// Bytes that a program may still write to the file system that `path` is on,
/// or will be on once it's made.
///
/// # Errors
///
/// [`Error::Io`].
pub fn free_bytes(path: &Path) -> Result<u64> {
    let absolute = std::path::absolute(path).map_err(Error::io("find", path))?;
    let exists = |path: &&Path| path.exists();
    let there = absolute.ancestors().find(exists).unwrap_or(path);
    let space = statvfs(there).map_err(|errno| Error::io("look at", there)(errno.into()))?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

/// A store of snapshots.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// What [`Store::clean_tmp`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Directories removed: takes and deletions whose process died.
    pub removed: u32,
    /// Directories left alone because their process lives.
    pub live: u32,
}

impl Store {
    /// The store at `root`. It need not exist: then it has no snapshots, and
    /// the first [`Store::begin`] makes it. Nothing is made before.
    ///
    /// # Errors
    ///
    /// [`Error::BadRoot`] if the directory is another user's, or writable by
    /// others: they could exchange guests' memory. [`Error::Io`].
    pub fn open(root: &Path) -> Result<Self> {
        match std::fs::canonicalize(root) {
            Ok(root) => {
                check_root(&root)?;
                Ok(Store { root })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let root = std::path::absolute(root).map_err(Error::io("find", root))?;
                Ok(Store { root })
            }
            Err(error) => Err(Error::io("find", root)(error)),
        }
    }

    /// The store at `root`, for those who only look for what is there already.
    ///
    /// # Errors
    ///
    /// [`Error::NoStore`], and as [`Store::open`].
    pub fn open_existing(root: &Path) -> Result<Self> {
        let store = Self::open(root)?;
        if store.snapshots().is_dir() {
            Ok(store)
        } else {
            Err(Error::NoStore { path: store.root })
        }
    }

    fn make(&self) -> Result<StoreId> {
        files::ensure_dir(&self.root)?;
        check_root(&self.root)?;
        for name in [TMP_NAME, SNAPSHOTS_NAME] {
            files::ensure_dir(&self.root.join(name))?;
        }
        self.packs().make()?;
        match self.id() {
            Err(error) if is_not_found(&error) => self.name_it(),
            found => found,
        }
    }

    fn name_it(&self) -> Result<StoreId> {
        let _tmp = files::lock_dir_wait(&self.tmp())?;
        match self.id() {
            Err(error) if is_not_found(&error) => {}
            found => return found,
        }
        let id = StoreId::random().map_err(Error::io("make a number for", &self.root))?;
        // A torn one is never seen.
        let aside = self.root.join(format!("{ID_NAME}.new"));
        match std::fs::remove_file(&aside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &aside)(error));
            }
            _ => {}
        }
        files::write_file(&aside, ID_NAME, format!("{id}\n").as_bytes())?;
        let place = self.root.join(ID_NAME);
        std::fs::rename(&aside, &place).map_err(Error::io("make", &place))?;
        Ok(id)
    }

    /// What tells this store from all others, also after it was moved. Makes
    /// the store if it doesn't exist, and makes it last: a leader that comes back
    /// without it couldn't tell what it had decided.
    ///
    /// # Errors
    ///
    /// [`Error::BadRoot`], [`Error::Damaged`], [`Error::Io`].
    pub fn ensure_id(&self) -> Result<StoreId> {
        let id = self.make()?;
        // Also what another process has made and was killed before it synced.
        let root = std::fs::canonicalize(&self.root).map_err(Error::io("find", &self.root))?;
        for dir in root.ancestors() {
            match files::sync_dir(dir) {
                // Not a file system that keeps anything.
                Err(Error::Io { source, .. })
                    if source.kind() == std::io::ErrorKind::InvalidInput => {}
                synced => synced?,
            }
        }
        Ok(id)
    }

    /// What tells this store from all others.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if there is no such file, [`Error::Damaged`].
    pub fn id(&self) -> Result<StoreId> {
        let path = self.root.join(ID_NAME);
        let bytes = files::read_file(&path, ID_BYTES_MAX)?;
        let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        StoreId::try_from(text).map_err(|problem| Error::damaged(&path, problem.to_owned()))
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// [`free_bytes`] of the store.
    pub fn free_bytes(&self) -> Result<u64> {
        free_bytes(&self.root)
    }

    /// The committed snapshots.
    pub fn catalogue(&self) -> Catalogue {
        Catalogue::new(self.clone())
    }

    /// Begins a snapshot of `vne`, named after the present time. Makes the
    /// store if it doesn't exist.
    ///
    /// # Errors
    ///
    /// [`Error::BadRoot`], [`Error::Io`].
    pub fn begin(&self, vne: &Name) -> Result<Take> {
        self.begin_at(vne, SystemTime::now())
    }

    pub(super) fn begin_at(&self, vne: &Name, time: SystemTime) -> Result<Take> {
        loop {
            match self.begin_as(vne, &self.free_id(vne, time)?) {
                // Somebody else was faster.
                Err(Error::Unstorable { .. }) => {}
                other => return other,
            }
        }
    }

    /// A name for a snapshot that is begun at `time`, and that none here has.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if there are too many of this second.
    pub fn free_id(&self, vne: &Name, time: SystemTime) -> Result<SnapshotId> {
        (1..=SAME_SECOND_MAX)
            .map(|nth| SnapshotId::at(time, nth))
            .find(|id| !self.has(vne, id))
            .ok_or_else(|| {
                let problem = "too many snapshots were begun in this second";
                Error::unstorable(format!("a snapshot of VNE {vne}"), problem)
            })
    }

    /// Whether there is one of that name, or one is being made.
    fn has(&self, vne: &Name, id: &SnapshotId) -> bool {
        // First tmp, then snapshots: a commit moves the other way.
        self.take_dir(vne, id).exists() || self.snapshot_dir(vne, id).exists()
    }

    /// Begins a snapshot of `vne` with the name that all hosts give it. Makes
    /// the store if it doesn't exist.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if there is one of that name; [`Error::BadRoot`];
    /// [`Error::Io`].
    pub fn begin_as(&self, vne: &Name, id: &SnapshotId) -> Result<Take> {
        self.make()?;
        // Nobody else makes or judges entries of tmp/ while this is held.
        let _tmp = files::lock_dir_wait(&self.tmp())?;
        if self.has(vne, id) {
            let problem = "there is one of that name";
            return Err(Error::unstorable(format!("snapshot {vne}@{id}"), problem));
        }
        let dir = self.take_dir(vne, id);
        files::make_dir(&dir)?;
        let lock = files::try_lock_dir(&dir, Lock::Shared)?;
        let lock = lock.ok_or_else(|| Error::InUse { path: dir.clone() })?;
        let take = Take {
            store: self.clone(),
            vne: vne.clone(),
            id: id.clone(),
            dir,
            _lock: lock,
            stays: false,
        };
        files::make_dir(&take.dir.join(MEMBERS_NAME))?;
        Ok(take)
    }

    /// The parts that were voted for and whose process died before it heard
    /// how it was decided, each with what [`Take::vote`] was given.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn in_doubt(&self) -> Result<Vec<(Take, Vec<u8>)>> {
        let mut found = Vec::new();
        let tmp = self.tmp();
        let _tmp = match files::lock_dir_wait(&tmp) {
            Err(error) if is_not_found(&error) => return Ok(found),
            locked => locked?,
        };
        for entry in std::fs::read_dir(&tmp).map_err(Error::io("read", &tmp))? {
            let entry = entry.map_err(Error::io("read", &tmp))?;
            let dir = entry.path();
            let name = entry.file_name();
            let Some((vne, id)) = name.to_str().and_then(parse_take_dir) else {
                continue;
            };
            // A lock that others have too: an exclusive one shows that nobody
            // works on it, and is then made the usual one.
            match files::try_lock_dir(&dir, Lock::Exclusive) {
                Ok(Some(_)) => {}
                Ok(None) => continue,
                Err(error) if is_not_found(&error) => continue,
                Err(error) => return Err(error),
            }
            let vote = match files::read_file(&dir.join(VOTE_NAME), VOTE_BYTES_MAX) {
                Ok(vote) => vote,
                Err(error) => {
                    if !is_not_found(&error) {
                        // One that can't be read keeps no other from going on.
                        log::error!("{error}");
                    }
                    continue;
                }
            };
            let Some(lock) = files::try_lock_dir(&dir, Lock::Shared)? else {
                continue;
            };
            let take = Take {
                store: self.clone(),
                vne,
                id,
                dir,
                _lock: lock,
                stays: true,
            };
            found.push((take, vote));
        }
        Ok(found)
    }

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
            let ours = name.to_str().is_some_and(|name| {
                name.starts_with(TAKE_PREFIX) || name.starts_with(REMOVED_PREFIX)
            });
            if !ours || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            match files::try_lock_dir(&path, Lock::Exclusive) {
                // Waits to hear how it was decided, with or without a process.
                Ok(Some(_)) if path.join(VOTE_NAME).exists() => cleaned.live += 1,
                Ok(Some(lock)) => garbage.push((path, lock)),
                Ok(None) => cleaned.live += 1,
                // Its owner finished with it just now.
                Err(error) if is_not_found(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(garbage)
    }

    pub(super) fn packs(&self) -> Packs {
        Packs::of(&self.root)
    }

    pub(super) fn snapshots(&self) -> PathBuf {
        self.root.join(SNAPSHOTS_NAME)
    }

    pub(super) fn vne_dir(&self, vne: &Name) -> PathBuf {
        self.snapshots().join(vne.as_str())
    }

    pub(super) fn snapshot_dir(&self, vne: &Name, id: &SnapshotId) -> PathBuf {
        self.vne_dir(vne).join(id.to_string())
    }

    pub(super) fn tmp(&self) -> PathBuf {
        self.root.join(TMP_NAME)
    }

    fn take_dir(&self, vne: &Name, id: &SnapshotId) -> PathBuf {
        self.tmp().join(format!("{TAKE_PREFIX}{vne}.{id}"))
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
    fn remove_garbage(&self, dirs: &[PathBuf], effort: Effort) -> Result<()> {
        if dirs.iter().any(|dir| has_packs(dir)) {
            match sweep::sweep(self, dirs, effort) {
                Ok(Some(_)) => {}
                // Somebody else is at it, and may have looked already.
                Ok(None) => return Ok(()),
                // What can't be told apart stays. The rest needn't.
                Err(error) => log::warn!("packs stay: {}", sentence(&error)),
            }
        }
        dirs.iter().try_for_each(|dir| remove_tree(dir))
    }
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

fn check_root(root: &Path) -> Result<()> {
    let bad = |problem: String| Error::BadRoot {
        path: root.to_owned(),
        problem,
    };
    let facts = std::fs::metadata(root).map_err(Error::io("look at", root))?;
    if !facts.is_dir() {
        return Err(bad(String::from("it is no directory")));
    }
    let me = rustix::process::geteuid().as_raw();
    if facts.uid() != me && facts.uid() != 0 {
        return Err(bad(format!("it belongs to user {}", facts.uid())));
    }
    let mode = facts.permissions().mode();
    if mode & 0o022 != 0 {
        return Err(bad(format!(
            "others may write to it (mode {:o})",
            mode & 0o7777
        )));
    }
    Ok(())
}

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
        files::write_file(&path, FRAMES_NAME, bytes)
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
        files::write_file(&self.dir.join(VOTE_NAME), VOTE_NAME, vote)?;
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
        files::write_file(&self.dir.join(MANIFEST_NAME), MANIFEST_NAME, &bytes)?;
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

/// Whether all files and packs that the manifest names are there, files at their
/// lengths.
pub(super) fn check_files(snapshot: &Path, manifest: &Manifest, packs: &Packs) -> Result<()> {
    for member in manifest.members_here() {
        check_member_files(&member_dir(snapshot, &member.name), member, manifest.format)?;
        for id in &member.image.packs {
            Pack::glance(&packs.path(id))?;
        }
    }
    Ok(())
}

fn check_member_files(dir: &Path, member: &Member, format: u32) -> Result<()> {
    let pages = (format == 1).then_some(PAGES_NAME);
    for name in [CONFIG_NAME, RECORDS_NAME, INDEX_NAME]
        .into_iter()
        .chain(pages)
    {
        let path = dir.join(name);
        let facts = member.image.files.iter().find(|file| file.name == name);
        let Some(facts) = facts else {
            return Err(Error::damaged(&path, "the manifest doesn't name it"));
        };
        check_length(&path, facts)?;
    }
    match &member.recorded {
        Some(recorded) if recorded.file.name != FRAMES_NAME => Err(Error::damaged(
            dir,
            "its recorded frames are in no known file",
        )),
        Some(recorded) => check_length(&dir.join(FRAMES_NAME), &recorded.file),
        None => Ok(()),
    }
}

fn check_length(path: &Path, facts: &FileFacts) -> Result<()> {
    let length = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => found.len(),
        Ok(_) => return Err(Error::damaged(path, "it is no file")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::damaged(path, "it is missing"));
        }
        Err(error) => return Err(Error::io("look at", path)(error)),
    };
    if length != facts.length {
        let problem = format!("it has {length} bytes instead of {}", facts.length);
        return Err(Error::damaged(path, problem));
    }
    Ok(())
}

/// The VNE and the snapshot that a directory in `tmp/` is for. A VNE's name may
/// have dots, an id has none.
fn parse_take_dir(name: &str) -> Option<(Name, SnapshotId)> {
    let (vne, id) = name.strip_prefix(TAKE_PREFIX)?.rsplit_once('.')?;
    Some((Name::new(vne).ok()?, id.parse().ok()?))
}

/// Moves a directory. It can't replace anything: onto a directory with something
/// in it the system call fails, whatever the file system supports.
fn rename_dir(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(Error::io("rename", from))
}

/// Removes a directory and what is in it; that it's gone already is fine.
fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

pub(super) fn is_not_found(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

//! The store's directories, and snapshots in the making.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::statvfs;

use super::catalogue::Catalogue;
use super::error::Error;
use super::files::{self, Lock};
use super::key::{host_key, Key};
use super::manifest::MANIFEST_BYTES_MAX;
use super::name::{Name, SnapshotId, StoreId};
use super::packs::Packs;
use super::seal::Vault;
use super::take::Take;
use super::Result;
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
/// Snapshots that are being copied from another store.
pub(super) const COPY_PREFIX: &str = "copy.";
/// Snapshots being deleted.
pub(super) const REMOVED_PREFIX: &str = "removed.";

/// Says that a part waits for the outcome.
pub(super) const VOTE_NAME: &str = "vote.json";
/// A vote says of each member what the manifest will.
pub(super) const VOTE_BYTES_MAX: u64 = MANIFEST_BYTES_MAX;

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
    vault: Vault,
}

impl Store {
    /// The store at `root`. It need not exist: then it has no snapshots, and
    /// the first [`Store::begin`] makes it. Nothing is made before.
    ///
    /// # Errors
    ///
    /// [`Error::BadRoot`] if the directory is another user's, or writable by
    /// others: they could exchange guests' memory. [`Error::BadKey`] if the host has a
    /// key that can't be had. [`Error::Io`].
    pub fn open(root: &Path) -> Result<Self> {
        Self::with_key(root, host_key()?)
    }

    /// The same with another key than the host's, or none.
    ///
    /// # Errors
    ///
    /// As [`Store::open`].
    pub fn with_key(root: &Path, key: Option<Key>) -> Result<Self> {
        let vault = Vault::new(key);
        match std::fs::canonicalize(root) {
            Ok(root) => {
                check_root(&root)?;
                Ok(Store { root, vault })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let root = std::path::absolute(root).map_err(Error::io("find", root))?;
                Ok(Store { root, vault })
            }
            Err(error) => Err(Error::io("find", root)(error)),
        }
    }

    pub(super) fn vault(&self) -> &Vault {
        &self.vault
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

    pub(super) fn make(&self) -> Result<StoreId> {
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
        let take = Take::of(self, (vne, id), dir, lock, false);
        files::make_dir(&take.dir().join(MEMBERS_NAME))?;
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
            let vote = match self.vault.read_file(&dir.join(VOTE_NAME), VOTE_BYTES_MAX) {
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
            let take = Take::of(self, (&vne, &id), dir, lock, true);
            found.push((take, vote));
        }
        Ok(found)
    }

    pub(super) fn packs(&self) -> Packs {
        Packs::of(&self.root, &self.vault)
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

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root.join(TMP_NAME)
    }

    pub(super) fn copy_dir(&self, vne: &Name, id: &SnapshotId) -> PathBuf {
        self.tmp().join(format!("{COPY_PREFIX}{vne}.{id}"))
    }

    pub(super) fn take_dir(&self, vne: &Name, id: &SnapshotId) -> PathBuf {
        self.tmp().join(format!("{TAKE_PREFIX}{vne}.{id}"))
    }
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

/// The VNE and the snapshot that a directory in `tmp/` is for. A VNE's name may
/// have dots, an id has none.
fn parse_take_dir(name: &str) -> Option<(Name, SnapshotId)> {
    let (vne, id) = name.strip_prefix(TAKE_PREFIX)?.rsplit_once('.')?;
    Some((Name::new(vne).ok()?, id.parse().ok()?))
}

/// Moves a directory. It can't replace anything: onto a directory with something
/// in it the system call fails, whatever the file system supports.
pub(super) fn rename_dir(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(Error::io("rename", from))
}

/// Removes a directory and what is in it; that it's gone already is fine.
pub(super) fn remove_tree(path: &Path) -> Result<()> {
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

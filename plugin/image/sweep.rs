//! Frees the space of pages that no snapshot uses.
//!
//! 1. Lock each pack exclusively that can be. What is being referred to can't.
//! 2. Read all indexes: of takes first and then of snapshots, as a commit goes
//!    that way.
//! 3. Remove the packs that are locked and in no index, and write those anew of
//!    which much is unused.
//!
//! Whatever comes to refer to a pack after 2 has to lock it first, and can't.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::bits::Bits;
use super::error::Error;
use super::files::{self, Lock};
use super::manifest::{Manifest, MANIFEST_BYTES_MAX, MANIFEST_NAME};
use super::map::{PageMap, Where};
use super::name::SnapshotId;
use super::pack::{Pack, PackId};
use super::packs::{try_lock_pack, Packs};
use super::rewrite;
use super::seal::Vault;
use super::store::{self, Store, COPY_PREFIX, INDEX_NAME, MEMBERS_NAME, TAKE_PREFIX, VOTE_NAME};
use super::Result;

/// A pack stays as it is until so many of its pages in a hundred are unused.
const UNUSED_PERCENT_MAX: usize = 20;

/// Bytes of an index, at most: as many runs as there are frames.
pub(super) const INDEX_BYTES_MAX: u64 = 5 << 30;

/// How much time there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// Who frees space waits for others that do, and writes packs anew.
    Thorough,
    /// Who is about to do something else only removes what nobody uses at all.
    Quick,
}

/// What was freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Swept {
    /// Packs that nobody used.
    pub packs_removed: u64,
    /// Packs that were written anew, without what nobody used.
    pub packs_rewritten: u64,
    /// Bytes that are free now.
    pub bytes_freed: u64,
}

/// Which pages of each pack are used.
pub(super) type Used = HashMap<PackId, Bits>;

/// Frees what nobody uses but those in `dying`, which the caller removes. `None`
/// if somebody else does, and there is no time to wait.
///
/// # Errors
///
/// [`Error::Damaged`] if a snapshot doesn't say which packs it needs: nothing is
/// freed then. [`Error::Io`].
pub(super) fn sweep(store: &Store, dying: &[PathBuf], effort: Effort) -> Result<Option<Swept>> {
    let packs = store.packs();
    let sweeping = match packs.lock(effort == Effort::Thorough) {
        // A store of format 1.
        Err(error) if store::is_not_found(&error) => return Ok(Some(Swept::default())),
        locked => locked?,
    };
    let Some(_sweeping) = sweeping else {
        return Ok(None);
    };
    let mut swept = Swept {
        bytes_freed: packs.remove_unfinished()?,
        ..Swept::default()
    };
    let mut locked = Vec::new();
    for (id, length) in packs.list()? {
        if let Some(file) = lock_pack(&packs.path(&id))? {
            locked.push((id, length, file));
        }
    }
    let used = used(store, dying)?;
    for (id, length, file) in locked {
        let path = packs.path(&id);
        let Some(used) = used.get(&id) else {
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            swept.packs_removed += 1;
            swept.bytes_freed += length;
            continue;
        };
        if effort == Effort::Quick {
            continue;
        }
        match shrink(&packs, &id, file, used) {
            Ok(None) => {}
            Ok(Some(left)) => {
                swept.packs_rewritten += 1;
                swept.bytes_freed += length.saturating_sub(left);
            }
            // It's as it was; verify says what is wrong with it.
            Err(error) => log::warn!("{} stays as it is: {error}", path.display()),
        }
    }
    files::sync_dir(packs.dir())?;
    Ok(Some(swept))
}

fn lock_pack(path: &Path) -> Result<Option<File>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(Error::io("open", path))?,
    };
    Ok(try_lock_pack(&file, path, Lock::Exclusive)?.then_some(file))
}

/// Writes a pack anew if that's worth it; the bytes that it has then.
fn shrink(packs: &Packs, id: &PackId, file: File, used: &Bits) -> Result<Option<u64>> {
    let path = packs.path(id);
    let pack = Pack::of(file, &path, Some(id), packs.vault())?;
    let there = pack.table.present.count();
    let keep = pack.table.present.and(used).count();
    if (there - keep) * 100 <= there * UNUSED_PERCENT_MAX {
        return Ok(None);
    }
    let new = packs.new_path(id);
    let file = files::create_file(&new)?;
    let written = write_anew(&pack, used, packs.vault(), &file, &new);
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&new);
        return written.map(Some);
    }
    std::fs::rename(&new, &path).map_err(Error::io("rename", &new))?;
    files::sync_dir(packs.dir())?;
    written.map(Some)
}

fn write_anew(pack: &Pack, used: &Bits, vault: &Vault, file: &File, path: &Path) -> Result<u64> {
    use std::os::unix::fs::FileExt;
    // A pack stays as it was, plain or not; if not, with a key of its own again.
    let sealer = match pack.sealer {
        Some(_) => vault.new_sealer(path)?,
        None => None,
    };
    let (table, end) = rewrite::rewrite(pack, used, sealer.as_ref(), file, path)?;
    let bytes = table.encode(end, sealer.as_ref(), path)?;
    file.write_all_at(&bytes, end)
        .map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))?;
    Ok(end + bytes.len() as u64)
}

/// The pages that takes and snapshots use.
pub(super) fn used(store: &Store, dying: &[PathBuf]) -> Result<Used> {
    let mut used = Used::new();
    let vault = store.vault();
    for take in directories(&store.tmp())? {
        let name = take.file_name().unwrap_or_default().to_string_lossy();
        let is_made = name.starts_with(TAKE_PREFIX) || name.starts_with(COPY_PREFIX);
        if is_made && !dying.contains(&take) {
            use_of_take(&take, vault, &mut used)?;
        }
    }
    for vne in directories(&store.snapshots())? {
        for snapshot in directories(&vne)? {
            let name = snapshot.file_name().unwrap_or_default();
            if name.to_string_lossy().parse::<SnapshotId>().is_err() {
                continue; // nobody would find it
            }
            match use_of_snapshot(&snapshot, vault, &mut used) {
                Err(_) if !snapshot.exists() => {} // removed just now
                done => done?,
            }
        }
    }
    Ok(used)
}

/// A member without a whole index has all packs locked that it's going to name,
/// or its worker is dead. Where a vote was given they are whole.
fn use_of_take(take: &Path, vault: &Vault, used: &mut Used) -> Result<()> {
    let voted = take.join(VOTE_NAME).exists();
    for member in directories(&take.join(MEMBERS_NAME))? {
        let path = member.join(INDEX_NAME);
        let bytes = match vault.read_file(&path, INDEX_BYTES_MAX) {
            Err(error) if store::is_not_found(&error) => continue,
            // Of a worker that was killed.
            Err(error) if error.is_damage() && !voted => continue,
            bytes => bytes?,
        };
        match PageMap::decode(&bytes) {
            Ok(map) => mark(&map, used),
            Err(problem) if voted => return Err(Error::damaged(&path, problem)),
            Err(_) => {}
        }
    }
    Ok(())
}

fn use_of_snapshot(snapshot: &Path, vault: &Vault, used: &mut Used) -> Result<()> {
    let path = snapshot.join(MANIFEST_NAME);
    let bytes = match vault.read_file(&path, MANIFEST_BYTES_MAX) {
        Err(error) if store::is_not_found(&error) => {
            let problem = "it has no manifest, so which packs it needs can't be told (remove it)";
            return Err(Error::damaged(snapshot, problem));
        }
        bytes => bytes?,
    };
    let manifest = Manifest::decode(&bytes, &path)?;
    use_of_members(snapshot, &manifest, vault, used)
}

/// The pages that a snapshot's members use that are stored here.
pub(super) fn use_of_members(
    snapshot: &Path,
    manifest: &Manifest,
    vault: &Vault,
    used: &mut Used,
) -> Result<()> {
    if manifest.format < 2 {
        return Ok(());
    }
    for member in manifest.members_here() {
        mark(&super::reader::read_map(vault, snapshot, member)?, used);
    }
    Ok(())
}

fn mark(map: &PageMap, used: &mut Used) {
    for (id, pages) in &map.packs {
        used.entry(*id)
            .or_insert_with(|| Bits::none(*pages as usize));
    }
    for run in &map.runs {
        let Where::Pack { pack, page } = run.content else {
            continue;
        };
        let pack = map.packs.get(usize::from(pack));
        if let Some(bits) = pack.and_then(|(id, _)| used.get_mut(id)) {
            for page in page..page.saturating_add(run.count) {
                bits.set(page as usize);
            }
        }
    }
}

/// The directories in one; none if it doesn't exist.
fn directories(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = match std::fs::read_dir(dir) {
        Ok(list) => list,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", dir)(error)),
    };
    let mut found = Vec::new();
    for entry in list {
        let entry = entry.map_err(Error::io("read", dir))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

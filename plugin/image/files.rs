//! The few ways in which the store touches the file system.
//!
//! Files hold guests' memory: 0600 from their creation on, directories 0700.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{flock, FlockOperation};

use super::error::Error;
use super::manifest::FileFacts;
use super::Result;

/// Makes a directory that must not exist yet.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(Error::io("create", path))
}

/// Makes a directory, and those above it, if they don't exist.
pub(crate) fn ensure_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(Error::io("create", path))
}

/// Makes a file that must not exist yet, for reading and writing.
pub(crate) fn create_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("create", path))
}

/// Makes the names in a directory last.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    open_dir(path)?.sync_all().map_err(Error::io("sync", path))
}

pub(crate) fn open_dir(path: &Path) -> Result<File> {
    let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::NOFOLLOW;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)
        .map_err(Error::io("open", path))
}

/// Whether a lock is for one or for many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    Shared,
    Exclusive,
}

/// Opens the directory and locks it without waiting; the lock lasts as long as
/// the returned file. `None` if somebody else's lock forbids it.
///
/// If the lock came because its holder had just removed or moved the directory,
/// that counts as not found, also when a new one is in its place.
pub(crate) fn try_lock_dir(path: &Path, lock: Lock) -> Result<Option<File>> {
    let dir = open_dir(path)?;
    let operation = match lock {
        Lock::Shared => FlockOperation::NonBlockingLockShared,
        Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(&dir, operation) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(errno) => return Err(Error::io("lock", path)(errno.into())),
    }
    let locked = dir.metadata().map_err(Error::io("look at", path))?;
    let named = std::fs::symlink_metadata(path).map_err(Error::io("look at", path))?;
    if (locked.dev(), locked.ino()) != (named.dev(), named.ino()) {
        return Err(Error::io("open", path)(ErrorKind::NotFound.into()));
    }
    Ok(Some(dir))
}

/// Like [`try_lock_dir`], exclusively and waiting for as long as it takes. Only
/// for `tmp/`, which nobody locks for longer than a few system calls.
pub(crate) fn lock_dir_wait(path: &Path) -> Result<File> {
    let dir = open_dir(path)?;
    loop {
        match flock(&dir, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(dir),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::io("lock", path)(errno.into())),
        }
    }
}

/// Writes a new file, makes it last, and says what was written.
pub(crate) fn write_file(path: &Path, name: &str, bytes: &[u8]) -> Result<FileFacts> {
    let mut file = create_file(path)?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))?;
    Ok(FileFacts {
        name: name.to_owned(),
        length: bytes.len() as u64,
        blake3: Some(blake3::hash(bytes).to_hex().to_string()),
    })
}

/// Reads a file that should have at most `bytes_max` bytes.
pub(crate) fn read_file(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(bytes_max.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > bytes_max {
        let problem = format!("it is longer than {bytes_max} bytes");
        return Err(Error::damaged(path, problem));
    }
    Ok(bytes)
}

/// Reads a file and checks that it is what `facts` say was written.
pub(crate) fn read_checked(path: &Path, facts: &FileFacts) -> Result<Vec<u8>> {
    let bytes = read_file(path, facts.length)?;
    if bytes.len() as u64 != facts.length {
        let problem = format!("it has {} of {} bytes", bytes.len(), facts.length);
        return Err(Error::damaged(path, problem));
    }
    let hash = blake3::hash(&bytes).to_hex();
    if facts.blake3.as_deref() != Some(hash.as_str()) {
        return Err(Error::damaged(
            path,
            "its contents are not what was written",
        ));
    }
    Ok(bytes)
}

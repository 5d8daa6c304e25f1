//! Files that are there as a whole or not at all.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{fchown, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{renameat_with, RenameFlags, CWD};

/// Writes a file that must not exist yet; nobody else sees a part of it, and
/// those whom `mode` leaves out never see any of it.
///
/// # Errors
///
/// [`io::ErrorKind::AlreadyExists`] if it's there; else what the system said.
pub fn create(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    put(path, bytes, mode, None, |temporary| {
        let flags = RenameFlags::NOREPLACE;
        Ok(renameat_with(CWD, temporary, CWD, path, flags)?)
    })
}

/// Puts a file in another's place, or makes it. Owner and mode stay those of
/// the old one.
///
/// # Errors
///
/// What the system said; the old one is still there then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let old = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        other => Some(other?),
    };
    let mode = old.as_ref().map_or(0o644, |old| old.permissions().mode());
    put(path, bytes, mode & 0o7777, old.as_ref(), |temporary| {
        fs::rename(temporary, path)
    })
}

fn put(
    path: &Path,
    bytes: &[u8],
    mode: u32,
    owner: Option<&fs::Metadata>,
    rename: impl Fn(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{:016x}", crate::random::number()?));
    let temporary = path.with_file_name(hidden);
    // Only its owner's until it has the right one.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode & 0o600)
        .open(&temporary)?;
    let done = (|| {
        file.write_all(bytes)?;
        if let Some(owner) = owner {
            use std::os::unix::fs::MetadataExt;
            fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
        }
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        rename(&temporary)
    })();
    if done.is_err() {
        // What failed before is what matters.
        let _ = fs::remove_file(&temporary);
    }
    done?;
    // A path of one component is in the folder that is called "".
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> io::Result<u32> {
        Ok(fs::metadata(path)?.permissions().mode() & 0o7777)
    }

    #[test]
    fn a_file_that_exists_is_not_created_again() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("key");
        create(&path, b"one", 0o600)?;
        assert_eq!(mode(&path)?, 0o600);
        let again = create(&path, b"two", 0o600).map_err(|error| error.kind());
        assert_eq!(again, Err(io::ErrorKind::AlreadyExists));
        assert_eq!(fs::read(&path)?, b"one");
        assert_eq!(fs::read_dir(dir.path())?.count(), 1);
        Ok(())
    }

    #[test]
    fn a_replaced_file_keeps_its_mode() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("conf");
        replace(&path, b"one")?;
        assert_eq!(mode(&path)?, 0o644);
        fs::set_permissions(&path, Permissions::from_mode(0o640))?;
        replace(&path, b"two")?;
        assert_eq!((mode(&path)?, fs::read(&path)?), (0o640, b"two".to_vec()));
        assert_eq!(fs::read_dir(dir.path())?.count(), 1);
        Ok(())
    }
}

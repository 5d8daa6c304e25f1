//! Raw files on a file system that can share extents: a clone (`FICLONE`) is made
//! in the time that it takes to copy the list of extents, and costs what changes
//! later. Loop devices are taken for the file behind them.
//!
//! ```text
//! FOLDER/disk.img
//! FOLDER/.vne-snapshots/        0700
//!   vnesnap-TAKE-N              0600, one captured disk
//!   vneold-RESTORE-N            what a disk was before a restore that isn't over
//! ```
//!
//! `FICLONE` writes out what is cached of the original first, so that a clone has
//! all that a guest's back end has written, through whatever cache.
//!
//! At a restore the original itself is overwritten by a clone: it stays the same
//! file, with its owner, its links and the loop devices on it.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{ioctl_ficlone, OFlags};
use rustix::io::Errno;

use super::{remove_file, sync_parent, taken, unfit, Driver, Error, Moment, Piece, Source};

/// The folder of clones, beside the originals.
const FOLDER: &str = ".vne-snapshots";
/// The major number of loop devices.
const LOOP_MAJOR: u32 = 7;
/// How long what used a disk may take to close it. The qemu of a domain that was
/// destroyed ends a bit later.
const CLOSE_MAX: Duration = Duration::from_secs(3);
const CLOSE_INTERVAL: Duration = Duration::from_millis(50);
/// The end of a clone's name until it's whole.
const HALF: &str = "half";

/// The driver.
pub(super) struct Reflink;

impl Driver for Reflink {
    fn name(&self) -> &'static str {
        "reflink"
    }

    fn look(&self, source: &Source<'_>) -> Result<Option<(PathBuf, u64)>, Error> {
        let Some(file) = backing_file(Path::new(source.target))? else {
            return Ok(None);
        };
        let source = File::open(&file).map_err(Error::io("open", &file))?;
        let facts = source.metadata().map_err(Error::io("look at", &file))?;
        // A clone without a name, gone with its descriptor. It writes out what is
        // cached, which the one that counts needn't do then.
        let folder = file.parent().unwrap_or(&file);
        let nameless = OpenOptions::new()
            .write(true)
            .mode(0o600)
            .custom_flags(OFlags::TMPFILE.bits() as i32)
            .open(folder);
        let cloned = nameless.and_then(|to| Ok(ioctl_ficlone(&to, &source)?));
        match cloned {
            Ok(()) => Ok(Some((file, facts.len()))),
            Err(error) if is_unsupported(&error) => unfit(&format!(
                "{} is on a file system without reflinks (move it to xfs, btrfs or an LVM thin \
                 volume)",
                file.display()
            )),
            Err(error) => Err(Error::io("clone", &file)(error)),
        }
    }

    fn place(&self, origin: &Path, name: &str) -> PathBuf {
        origin.parent().unwrap_or(origin).join(FOLDER).join(name)
    }

    fn prepare(&self, piece: &Piece) -> Result<(), Error> {
        ensure_folder(&piece.kept)?;
        create(&piece.kept).map(drop)
    }

    fn capture(&self, piece: &Piece, _now: &Moment<'_>) -> Result<(), Error> {
        let to = OpenOptions::new()
            .write(true)
            .open(&piece.kept)
            .map_err(Error::io("open", &piece.kept))?;
        clone(&piece.origin, &to)
    }

    fn settle(&self, piece: &Piece) -> Result<(), Error> {
        let file = File::open(&piece.kept).map_err(Error::io("open", &piece.kept))?;
        file.sync_all().map_err(Error::io("sync", &piece.kept))?;
        sync_parent(&piece.kept)
    }

    fn check(&self, piece: &Piece) -> Result<(), Error> {
        let facts =
            std::fs::symlink_metadata(&piece.kept).map_err(Error::io("look at", &piece.kept))?;
        if facts.is_file() && facts.len() == piece.bytes {
            return Ok(());
        }
        unfit(&format!(
            "{} has {} bytes instead of {}",
            piece.kept.display(),
            facts.len(),
            piece.bytes
        ))
    }

    fn remove(&self, piece: &Piece) -> Result<(), Error> {
        remove_file(&piece.kept)?;
        leave_folder(&piece.kept);
        Ok(())
    }

    fn check_origin(&self, piece: &Piece) -> Result<(), Error> {
        self.check_same(piece)?;
        let facts = std::fs::metadata(&piece.origin).map_err(Error::io("find", &piece.origin))?;
        if facts.len() == piece.bytes {
            return Ok(());
        }
        unfit(&format!(
            "{} has {} bytes, and had {} when it was captured (give it its size again)",
            piece.origin.display(),
            facts.len(),
            piece.bytes
        ))
    }

    fn put_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        ensure_folder(aside)?;
        let half = aside.with_extension(HALF);
        let to = create(&half)?;
        clone(&piece.origin, &to)?;
        to.sync_all().map_err(Error::io("sync", &half))?;
        std::fs::rename(&half, aside).map_err(Error::io("make", aside))?;
        sync_parent(aside)?;
        overwrite(&piece.kept, &piece.origin)
    }

    fn take_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        if aside.exists() {
            overwrite(aside, &piece.origin)?;
        }
        self.forget(piece, aside)
    }

    fn forget(&self, _piece: &Piece, aside: &Path) -> Result<(), Error> {
        remove_file(&aside.with_extension(HALF))?;
        remove_file(aside)?;
        leave_folder(aside);
        Ok(())
    }

    fn make(&self, piece: &Piece, new: &Path) -> Result<(), Error> {
        let to = create(new)?;
        clone(&piece.kept, &to)?;
        let like = std::fs::metadata(&piece.origin).map_err(Error::io("find", &piece.origin))?;
        std::os::unix::fs::fchown(&to, Some(like.uid()), Some(like.gid()))
            .map_err(Error::io("change the owner of", new))?;
        to.sync_all().map_err(Error::io("sync", new))?;
        sync_parent(new)
    }

    fn unmake(&self, _piece: &Piece, new: &Path) -> Result<(), Error> {
        remove_file(new)
    }

    fn new_place(&self, piece: &Piece, name: &str) -> Result<PathBuf, Error> {
        let kind = std::fs::metadata(&piece.target).map_err(Error::io("find", &piece.target))?;
        if kind.file_type().is_block_device() {
            return unfit(&format!(
                "{} is a loop device, and a copy would need one of its own (name the file in the \
                 member's configuration)",
                piece.target.display()
            ));
        }
        let new = piece.origin.with_file_name(name);
        match std::fs::symlink_metadata(&new) {
            Ok(_) => Err(taken(&new)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(new),
            Err(error) => Err(Error::io("look for", &new)(error)),
        }
    }
}

impl Reflink {
    /// Whether a disk's target still is what was captured, and nobody uses it.
    pub(super) fn check_same(&self, piece: &Piece) -> Result<(), Error> {
        let found = backing_file(&piece.target)?;
        if found.as_ref() != Some(&piece.origin) {
            return unfit(&format!(
                "{} isn't {} any more, of which it was captured",
                piece.target.display(),
                piece.origin.display()
            ));
        }
        refuse_used(&piece.target)
    }
}

/// The file that holds a disk: itself, or what a loop device has all of.
fn backing_file(target: &Path) -> Result<Option<PathBuf>, Error> {
    let real = std::fs::canonicalize(target).map_err(Error::io("find", target))?;
    let facts = std::fs::metadata(&real).map_err(Error::io("look at", &real))?;
    if facts.is_file() {
        return Ok(Some(real));
    }
    let (major, minor) = (
        rustix::fs::major(facts.rdev()),
        rustix::fs::minor(facts.rdev()),
    );
    if !facts.file_type().is_block_device() || major != LOOP_MAJOR {
        return Ok(None);
    }
    let told = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/loop"));
    let read = |name: &str| {
        let path = told.join(name);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        Ok::<_, Error>(text.trim_end_matches('\n').to_owned())
    };
    if read("offset")? != "0" || read("sizelimit")? != "0" {
        return unfit(&format!(
            "{} has a part of a file only, and a clone has all of it (give the disk a file of \
             its own)",
            real.display()
        ));
    }
    let file = PathBuf::from(read("backing_file")?);
    std::fs::canonicalize(&file)
        .map(Some)
        .map_err(Error::io("find", &file))
}

/// A loop device that is mounted, or some domain's, is nobody else's; nor is a file that a
/// process has open. What the kernel alone has open can't be told.
fn refuse_used(target: &Path) -> Result<(), Error> {
    let facts = std::fs::metadata(target).map_err(Error::io("find", target))?;
    if !facts.file_type().is_block_device() {
        let start = Instant::now();
        while let Some(user) = user_of(&facts) {
            if start.elapsed() > CLOSE_MAX {
                return unfit(&format!(
                    "{} is in use by process {user} (end it)",
                    target.display()
                ));
            }
            std::thread::sleep(CLOSE_INTERVAL);
        }
        return Ok(());
    }
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(target);
    match opened {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => unfit(&format!(
            "{} is in use (end what has it open)",
            target.display()
        )),
        Err(error) => Err(Error::io("open", target)(error)),
    }
}

/// Some process, but this one, that has a file open.
fn user_of(file: &Metadata) -> Option<u32> {
    let numbered = |path: &Path| {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
    };
    let is_it = |facts: Metadata| (facts.dev(), facts.ino()) == (file.dev(), file.ino());
    let me = std::process::id();
    numbered(Path::new("/proc"))
        .filter(|pid| *pid != me)
        .find(|pid| {
            // Processes end, and close files, meanwhile.
            let open = PathBuf::from(format!("/proc/{pid}/fd"));
            numbered(&open).any(|fd| std::fs::metadata(open.join(fd.to_string())).is_ok_and(is_it))
        })
}

/// Makes the folder that a clone is in. One that is there already must be ours alone:
/// whoever owns the folder of a disk could have made it, or a link of its name.
fn ensure_folder(clone: &Path) -> Result<(), Error> {
    let folder = clone.parent().unwrap_or(clone);
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => return sync_parent(folder),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::io("create", folder)(error)),
    }
    let facts = std::fs::symlink_metadata(folder).map_err(Error::io("look at", folder))?;
    let me = rustix::process::geteuid().as_raw();
    if facts.is_dir() && facts.uid() == me && facts.mode() & 0o077 == 0 {
        return Ok(());
    }
    unfit(&format!(
        "{} isn't a folder that only root may use (remove it)",
        folder.display()
    ))
}

/// A new file for a guest's data.
fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("create", path))
}

fn clone(from: &Path, to: &File) -> Result<(), Error> {
    let source = File::open(from).map_err(Error::io("open", from))?;
    loop {
        match ioctl_ficlone(to, &source) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::io("clone", from)(errno.into())),
        }
    }
}

/// Gives a file the contents of another one, and its length, durably.
fn overwrite(from: &Path, origin: &Path) -> Result<(), Error> {
    let to = OpenOptions::new()
        .write(true)
        .open(origin)
        .map_err(Error::io("open", origin))?;
    // An image may have grown since, and a clone that ends within a block can't have
    // anything behind it.
    let facts = |path: &Path| std::fs::metadata(path).map_err(Error::io("look at", path));
    let wanted = facts(from)?.len();
    if facts(origin)?.len() > wanted {
        to.set_len(wanted).map_err(Error::io("write", origin))?;
    }
    clone(from, &to)?;
    to.sync_all().map_err(Error::io("sync", origin))
}

/// Removes the folder of clones if that was the last one.
fn leave_folder(clone: &Path) {
    if let Some(folder) = clone.parent() {
        if folder.file_name().is_some_and(|name| name == FOLDER) {
            // Usually there are others.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

fn is_unsupported(error: &std::io::Error) -> bool {
    let unsupported = [
        Errno::OPNOTSUPP,
        Errno::NOTTY,
        Errno::INVAL,
        Errno::ISDIR,
        Errno::XDEV,
        Errno::NOSYS,
    ];
    let raw = error.raw_os_error();
    unsupported
        .iter()
        .any(|errno| Some(errno.raw_os_error()) == raw)
}

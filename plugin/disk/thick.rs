//! LVM volumes with space of their own: they can't share blocks for long. At the
//! cut a snapshot by copy-on-write is made, which is quick; what it shows is copied into
//! a volume when the guest runs again, and the snapshot goes.
//!
//! ```text
//! /dev/VG/web                          what the domain uses
//! /dev/VG/vnecow-TAKE-N                the snapshot, until it's copied
//! /dev/VG/vnesnap-TAKE-N               one captured disk, as large as the original
//! /dev/VG/vneold-RESTORE-N             what a disk was before a restore that isn't over
//! ```
//!
//! The snapshot has room for what the guest changes meanwhile, an eighth of the disk and
//! 64 MiB at least. If that isn't enough the kernel makes it unreadable, and the
//! take fails.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::lvm::{self, Volume};
use super::{taken, unfit, Driver, Error, Moment, Piece, Source};

/// LVM's words for volumes that are a part of physical ones, and nothing more.
const KINDS: [&str; 2] = ["linear", "striped"];
/// Room for changes: this, or that part of the disk.
const ROOM_BYTES_MIN: u64 = 64 << 20;
const ROOM_SHARE: u64 = 8;
const TAG: &str = "xl-vne";
/// As much as is copied at a time.
const COPIED_BYTES: usize = 1 << 20;

/// The driver.
pub(super) struct Thick;

impl Driver for Thick {
    fn name(&self) -> &'static str {
        "lvm"
    }

    fn look(&self, source: &Source<'_>) -> Result<Option<(PathBuf, u64)>, Error> {
        let Some(volume) = lvm::volume_of(Path::new(source.target))? else {
            return Ok(None);
        };
        if !KINDS.contains(&volume.kind.as_str()) {
            return Ok(None);
        }
        let needed = volume.bytes.saturating_add(room(volume.bytes));
        let free = lvm::free_bytes(&volume.path)?;
        if free < needed {
            return unfit(&format!(
                "capturing {} needs {} MiB in its volume group, where {} MiB are free (add space, \
                 or copy the volume into a thin pool)",
                volume.path.display(),
                needed >> 20,
                free >> 20
            ));
        }
        Ok(Some((volume.path, volume.bytes)))
    }

    fn place(&self, origin: &Path, name: &str) -> PathBuf {
        origin.parent().unwrap_or(origin).join(name)
    }

    fn prepare(&self, piece: &Piece) -> Result<(), Error> {
        // Now, when no guest waits for it: there may be no space later.
        create(&piece.kept, piece.bytes)
    }

    fn capture(&self, piece: &Piece, now: &Moment<'_>) -> Result<(), Error> {
        let cow = cow(&piece.kept);
        let (_, name) = lvm::names(&cow)?;
        let origin = lvm::short(&piece.origin)?;
        let room = format!("{}b", room(piece.bytes));
        let arguments = [
            "lvcreate", "-qq", "-An", "--yes", "--addtag", TAG, "-s", "-L", &room, "-n", name,
            &origin,
        ];
        lvm::run(&arguments, Some(now.lock), now.deadline).map(drop)
    }

    fn settle(&self, piece: &Piece) -> Result<(), Error> {
        let cow = cow(&piece.kept);
        copy(&cow, &piece.kept, piece.bytes).map_err(|error| {
            let why = crate::sentence(&error);
            Error::Unfit(format!(
                "{why} (has the guest changed very much meanwhile?)"
            ))
        })?;
        lvm::remove(&cow)?;
        // What has it active keeps it from nothing, but shows it to whoever looks.
        lvm::patiently(&["lvchange", "-qq", "-An", "-an", &lvm::short(&piece.kept)?])
    }

    fn check(&self, piece: &Piece) -> Result<(), Error> {
        expect(&piece.kept, piece.bytes).map(drop)
    }

    fn remove(&self, piece: &Piece) -> Result<(), Error> {
        lvm::remove(&cow(&piece.kept))?;
        lvm::remove(&piece.kept)
    }

    fn check_origin(&self, piece: &Piece) -> Result<(), Error> {
        let found = lvm::volume_of(&piece.target)?;
        if found.is_none_or(|volume| volume.path != piece.origin) {
            return unfit(&format!(
                "{} isn't the volume {} any more, of which it was captured",
                piece.target.display(),
                piece.origin.display()
            ));
        }
        if expect(&piece.origin, piece.bytes)?.open {
            return unfit(&format!(
                "{} is in use (end what has it open)",
                piece.origin.display()
            ));
        }
        self.has_room(piece)
    }

    fn put_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        lvm::rename(&piece.origin, aside)?;
        self.make(piece, &piece.origin)
    }

    fn take_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        if lvm::volume(aside)?.is_none() {
            return Ok(());
        }
        // What has the name then is what put_back has made.
        lvm::remove(&piece.origin)?;
        lvm::rename(aside, &piece.origin)
    }

    fn forget(&self, _piece: &Piece, aside: &Path) -> Result<(), Error> {
        lvm::remove(aside)
    }

    fn make(&self, piece: &Piece, new: &Path) -> Result<(), Error> {
        create(new, piece.bytes)?;
        let kept = lvm::short(&piece.kept)?;
        lvm::patiently(&["lvchange", "-qq", "-An", "-ay", &kept])?;
        let copied = copy(&piece.kept, new, piece.bytes);
        lvm::patiently(&["lvchange", "-qq", "-An", "-an", &kept])?;
        copied
    }

    fn unmake(&self, _piece: &Piece, new: &Path) -> Result<(), Error> {
        lvm::remove(new)
    }

    fn new_place(&self, piece: &Piece, name: &str) -> Result<PathBuf, Error> {
        let new = piece.origin.with_file_name(name);
        match lvm::volume(&new)? {
            None => self.has_room(piece).map(|()| new),
            Some(_) => Err(taken(&new)),
        }
    }
}

impl Thick {
    /// Whether there is space for one more of it.
    fn has_room(&self, piece: &Piece) -> Result<(), Error> {
        let free = lvm::free_bytes(&piece.origin)?;
        if free >= piece.bytes {
            return Ok(());
        }
        unfit(&format!(
            "{} MiB are needed in the volume group of {}, and {} MiB are free",
            piece.bytes >> 20,
            piece.origin.display(),
            free >> 20
        ))
    }
}

/// Room for what a guest changes while its disk is copied.
fn room(bytes: u64) -> u64 {
    (bytes / ROOM_SHARE).max(ROOM_BYTES_MIN)
}

/// The snapshot that is copied into a captured disk.
fn cow(kept: &Path) -> PathBuf {
    let name = kept.file_name().unwrap_or_default().to_string_lossy();
    kept.with_file_name(name.replacen("vnesnap", "vnecow", 1))
}

/// Makes a volume, and activates it. All of it will be written.
fn create(path: &Path, bytes: u64) -> Result<(), Error> {
    let (group, name) = lvm::names(path)?;
    let size = format!("{bytes}b");
    lvm::patiently(&[
        "lvcreate", "-qq", "-An", "--yes", "--addtag", TAG, "-Wn", "-Zn", "-ay", "-L", &size, "-n",
        name, group,
    ])
}

/// Copies a device's `bytes` to another one, durably.
fn copy(from: &Path, to: &Path, bytes: u64) -> Result<(), Error> {
    let source = File::open(from).map_err(Error::io("open", from))?;
    let mut source = source.take(bytes);
    let mut target = OpenOptions::new()
        .write(true)
        .open(to)
        .map_err(Error::io("open", to))?;
    let mut block = vec![0; COPIED_BYTES];
    let mut copied = 0u64;
    while copied < bytes {
        let count = source.read(&mut block).map_err(Error::io("read", from))?;
        let Some(part) = block.get(..count).filter(|part| !part.is_empty()) else {
            return unfit(&format!("{} ends after {copied} bytes", from.display()));
        };
        target.write_all(part).map_err(Error::io("write", to))?;
        copied += count as u64;
    }
    target.sync_all().map_err(Error::io("sync", to))
}

fn expect(path: &Path, bytes: u64) -> Result<Volume, Error> {
    match lvm::volume(path)? {
        Some(volume) if KINDS.contains(&volume.kind.as_str()) && volume.bytes == bytes => {
            Ok(volume)
        }
        Some(volume) => unfit(&format!(
            "{} is a {} volume of {} bytes instead of a linear one of {bytes}",
            path.display(),
            volume.kind,
            volume.bytes
        )),
        None => unfit(&format!("there is no volume {}", path.display())),
    }
}

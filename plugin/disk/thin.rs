//! Volumes of LVM's thin pools: a thin snapshot shares all blocks with its origin,
//! and needs it no more.
//!
//! ```text
//! /dev/VG/web                          what the domain uses
//! /dev/VG/vnesnap-TAKE-N               one captured disk; not active
//! /dev/VG/vneold-RESTORE-N             what a disk was before a restore that isn't over
//! /dev/VG/vnenew-RESTORE-N             a disk in the making, for some milliseconds
//! ```
//!
//! At a restore the volume gets another one under its name: a snapshot of the
//! captured one, which can so be restored again.

use std::path::{Path, PathBuf};

use super::lvm::{self, Volume};
use super::{taken, unfit, Driver, Error, Moment, Piece, Source};

/// LVM's word for volumes of thin pools.
const KIND: &str = "thin";
/// So that an admin can list what is ours.
const TAG: &str = "xl-vne";

/// The driver.
pub(super) struct Thin;

impl Driver for Thin {
    fn name(&self) -> &'static str {
        "lvm-thin"
    }

    fn look(&self, source: &Source<'_>) -> Result<Option<(PathBuf, u64)>, Error> {
        match lvm::volume_of(Path::new(source.target))? {
            Some(volume) if volume.kind == KIND => Ok(Some((volume.path, volume.bytes))),
            _ => Ok(None),
        }
    }

    fn place(&self, origin: &Path, name: &str) -> PathBuf {
        origin.parent().unwrap_or(origin).join(name)
    }

    fn prepare(&self, piece: &Piece) -> Result<(), Error> {
        // What LVM reads for this it has in memory at the cut.
        refuse_there(&piece.kept)
    }

    fn capture(&self, piece: &Piece, now: &Moment<'_>) -> Result<(), Error> {
        let (_, kept) = lvm::names(&piece.kept)?;
        let origin = lvm::short(&piece.origin)?;
        let arguments = [
            "lvcreate", "-qq", "-An", "--addtag", TAG, "-s", "-n", kept, &origin,
        ];
        lvm::run(&arguments, Some(now.lock), now.deadline).map(drop)
    }

    fn settle(&self, _piece: &Piece) -> Result<(), Error> {
        // LVM and the pool have written their metadata before lvcreate returns.
        Ok(())
    }

    fn check(&self, piece: &Piece) -> Result<(), Error> {
        expect(&piece.kept, piece.bytes).map(drop)
    }

    fn remove(&self, piece: &Piece) -> Result<(), Error> {
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
        Ok(())
    }

    fn put_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        let new = in_the_making(aside);
        snapshot(&piece.kept, &new)?;
        lvm::rename(&piece.origin, aside)?;
        lvm::rename(&new, &piece.origin)
    }

    fn take_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error> {
        if lvm::volume(aside)?.is_some() {
            // What has the name then is what put_back has made.
            lvm::remove(&piece.origin)?;
            lvm::rename(aside, &piece.origin)?;
        }
        lvm::remove(&in_the_making(aside))
    }

    fn forget(&self, _piece: &Piece, aside: &Path) -> Result<(), Error> {
        lvm::remove(aside)
    }

    fn make(&self, piece: &Piece, new: &Path) -> Result<(), Error> {
        snapshot(&piece.kept, new)
    }

    fn unmake(&self, _piece: &Piece, new: &Path) -> Result<(), Error> {
        lvm::remove(new)
    }

    fn new_place(&self, piece: &Piece, name: &str) -> Result<PathBuf, Error> {
        let new = piece.origin.with_file_name(name);
        match lvm::volume(&new)? {
            None => Ok(new),
            Some(_) => Err(taken(&new)),
        }
    }
}

/// Makes a volume with the contents of a captured one, and activates it.
fn snapshot(kept: &Path, new: &Path) -> Result<(), Error> {
    let (_, name) = lvm::names(new)?;
    let kept = lvm::short(kept)?;
    // Snapshots aren't activated unless asked for; this one is a disk.
    lvm::patiently(&[
        "lvcreate", "-qq", "-An", "-kn", "-ay", "-s", "-n", name, &kept,
    ])
}

/// What is to have the name of a volume that goes aside.
fn in_the_making(aside: &Path) -> PathBuf {
    let name = aside.file_name().unwrap_or_default().to_string_lossy();
    let new = name.replacen("vneold", "vnenew", 1);
    aside.with_file_name(new)
}

fn expect(path: &Path, bytes: u64) -> Result<Volume, Error> {
    match lvm::volume(path)? {
        Some(volume) if volume.kind == KIND && volume.bytes == bytes => Ok(volume),
        Some(volume) => unfit(&format!(
            "{} is a {} volume of {} bytes instead of a thin one of {bytes}",
            path.display(),
            volume.kind,
            volume.bytes
        )),
        None => unfit(&format!("there is no volume {}", path.display())),
    }
}

fn refuse_there(path: &Path) -> Result<(), Error> {
    match lvm::volume(path)? {
        None => Ok(()),
        Some(_) => unfit(&format!("there is a volume {} already", path.display())),
    }
}

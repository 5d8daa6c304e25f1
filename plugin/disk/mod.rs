//! What is on members' disks: captured while the guest stands still, kept beside
//! the original, put back at a restore.
//!
//! ```text
//! prepare    look: which driver takes this disk?      nothing is touched
//!            list: what is going to be made           durable, in the take's directory
//!            prepare: what takes time
//! cut        capture                                  the guest stands still
//! finalise   settle: make it last
//! remove     remove: with the snapshot, or with the take that failed
//! ```
//!
//! Why nothing has to be drained first is in `plugin/ARCHITECTURE.md`, "Disks".
//!
//! A captured disk stays where its original is: neither a reflink nor a thin
//! snapshot can be in another place, and a copy would cost as much as the disk has.
//! So the list beside the snapshot's files ([`write_list`]) is what says that it has to be
//! removed, and is written before anything is made. Names have a take's random
//! number in them: what is on a list can't be somebody else's.
//!
//! Each driver is a file: `thin.rs` for volumes of LVM's thin pools, `thick.rs` for
//! LVM's other ones, `reflink.rs` for raw files on xfs, btrfs and others that can share
//! extents, `qcow2.rs` for qemu's images there.

pub mod exchange;
mod lvm;
mod qcow2;
mod reflink;
mod thick;
mod thin;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// The list's name in the directory of a take or snapshot.
pub const LIST_NAME: &str = "disks.json";
/// The version of the list, and of the one of an exchange.
const LIST_VERSION: u32 = 1;
/// A list has some 300 bytes a disk.
const LIST_BYTES_MAX: u64 = 4 << 20;
/// Disks of one host's members in a snapshot, at most.
pub const DISKS_MAX: usize = 4096;

/// What captured disks are called, followed by `-TAKE-N`.
const KEPT_PREFIX: &str = "vnesnap";

/// Why a disk can't be captured, put back or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It isn't fit for it: the reason, and the way out.
    #[error("{0}")]
    Unfit(String),
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// A verb: "write", "clone".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A tool failed.
    #[error("{tool}: {why}")]
    Tool {
        /// Which, with what it was to do.
        tool: String,
        /// What it said.
        why: String,
    },
    /// A tool that still works, and must not be killed, as it may have suspended a
    /// device.
    #[error("{tool} hasn't ended after {seconds} s")]
    Unfinished {
        /// Which.
        tool: String,
        /// How long it was waited for.
        seconds: u64,
    },
}

impl Error {
    /// For `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// A disk as a domain's configuration has it.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The guest's name for it.
    pub vdev: &'a str,
    /// What holds its data in dom0.
    pub target: &'a str,
    /// libxl's name of the format; empty for raw.
    pub format: &'a str,
    /// The block script, if it isn't the usual one.
    pub script: Option<&'a str>,
    /// Another domain serves it.
    pub elsewhere: bool,
    /// The number of the domain that has it.
    pub domid: u32,
    /// That domain has emulated devices.
    pub emulated: bool,
}

/// When a disk is captured: its guest waits.
#[derive(Clone, Copy, Debug)]
pub struct Moment<'a> {
    /// The guest.
    pub domid: u32,
    /// A tool that may outlive this process has this open.
    pub lock: &'a File,
    /// When it must be over.
    pub deadline: Instant,
}

/// What can be captured, and by whom.
#[derive(Clone, Copy)]
pub struct Found {
    /// Who captures it.
    pub driver: &'static dyn Driver,
}

/// A disk that is, or is going to be, captured. The manifest and the list have it
/// like this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The guest's name for the disk.
    pub vdev: String,
    /// The driver: `lvm-thin`, `reflink`.
    pub driver: String,
    /// What the domain's configuration names.
    pub target: PathBuf,
    /// What that was: `/dev/VG/LV`, or a file, with links and loop devices followed.
    pub origin: PathBuf,
    /// The disk's size in bytes.
    pub bytes: u64,
    /// What has its contents at the cut.
    pub kept: PathBuf,
}

/// One way to capture disks. All but `capture` may take their time.
pub trait Driver: Sync {
    /// What manifests call it. A driver that keeps disks in another way has another
    /// name.
    fn name(&self) -> &'static str;

    /// libxl's name of the format of the disks that it captures.
    fn format(&self) -> &'static str {
        "raw"
    }

    /// What a disk's target, an absolute path, is, and its size in bytes; `None` if
    /// it's nothing for this driver. Nothing is left of having looked.
    ///
    /// # Errors
    ///
    /// [`Error::Unfit`] if nobody else could take it either.
    fn look(&self, source: &Source<'_>) -> Result<Option<(PathBuf, u64)>, Error>;

    /// Where something called `name` is kept for `origin`.
    fn place(&self, origin: &Path, name: &str) -> PathBuf;

    /// Does beforehand what can be done beforehand.
    fn prepare(&self, piece: &Piece) -> Result<(), Error>;

    /// Captures the disk as it is now.
    fn capture(&self, piece: &Piece, now: &Moment<'_>) -> Result<(), Error>;

    /// Makes what was captured last.
    fn settle(&self, piece: &Piece) -> Result<(), Error>;

    /// Whether it's all there.
    fn check(&self, piece: &Piece) -> Result<(), Error>;

    /// Removes what was prepared or captured. What isn't there is fine.
    fn remove(&self, piece: &Piece) -> Result<(), Error>;

    /// Whether the original is there, of the same size, and nobody uses it.
    fn check_origin(&self, piece: &Piece) -> Result<(), Error>;

    /// Gives the original the contents that were captured; what it has now is
    /// `aside` before anything of it changes.
    fn put_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error>;

    /// Undoes [`Driver::put_back`], however far it has come. May be repeated.
    fn take_back(&self, piece: &Piece, aside: &Path) -> Result<(), Error>;

    /// Removes what is aside. May be repeated.
    fn forget(&self, piece: &Piece, aside: &Path) -> Result<(), Error>;

    /// Makes a new disk, `new`, with the contents that were captured.
    fn make(&self, piece: &Piece, new: &Path) -> Result<(), Error>;

    /// Removes a disk that [`Driver::make`] has made, whole or half.
    fn unmake(&self, piece: &Piece, new: &Path) -> Result<(), Error>;

    /// Where a copy's disk called `name` would be.
    ///
    /// # Errors
    ///
    /// [`Error::Unfit`] if there is something already, or the disk can't be copied.
    fn new_place(&self, piece: &Piece, name: &str) -> Result<PathBuf, Error>;
}

/// In the order of asking.
const DRIVERS: [&dyn Driver; 4] = [&thin::Thin, &thick::Thick, &reflink::Reflink, &qcow2::Qcow2];

/// Finds out who can capture a disk, and touches nothing.
///
/// # Errors
///
/// [`Error::Unfit`] if nobody can, with what would help.
pub fn look(source: &Source<'_>) -> Result<(Found, PathBuf, u64), Error> {
    if source.elsewhere {
        return unfit("it's served by a driver domain, where it can't be captured from here");
    }
    if let Some(script) = source.script {
        return unfit(&format!(
            "it's attached by the script {script}, which may mean anything by its target"
        ));
    }
    let format = match source.format {
        "" => "raw",
        named => named,
    };
    if DRIVERS.iter().all(|driver| driver.format() != format) {
        return unfit(&format!(
            "its format is {format}, and only raw and qcow2 disks are captured (convert it with \
             'qemu-img convert -O raw' to an LVM thin volume, or to a file on xfs or btrfs)"
        ));
    }
    if !Path::new(source.target).is_absolute() {
        return unfit("it isn't named by an absolute path");
    }
    let fitting = |driver: &&dyn Driver| driver.format() == format;
    for driver in DRIVERS.into_iter().filter(fitting) {
        if let Some((origin, bytes)) = driver.look(source)? {
            return Ok((Found { driver }, origin, bytes));
        }
    }
    unfit(
        "it's neither an LVM volume (thin, linear or striped) nor a file on xfs or btrfs (move it \
         to one)",
    )
}

fn unfit<T>(why: &str) -> Result<T, Error> {
    Err(Error::Unfit(why.to_owned()))
}

impl Piece {
    /// What will be made of a disk that was found: the `nth` of this host's part of the
    /// take with this number.
    pub fn planned(
        source: &Source<'_>,
        (found, origin, bytes): (Found, PathBuf, u64),
        take: u64,
        nth: usize,
    ) -> Self {
        let name = format!("{KEPT_PREFIX}-{take:016x}-{nth}");
        Self {
            vdev: source.vdev.to_owned(),
            driver: found.driver.name().to_owned(),
            target: PathBuf::from(source.target),
            kept: found.driver.place(&origin, &name),
            origin,
            bytes,
        }
    }

    /// Who knows how to handle it.
    ///
    /// # Errors
    ///
    /// [`Error::Unfit`] if that's a later version, or if it names something that no
    /// take can have made: lists are read by root, and removed are only things of ours.
    pub fn driver(&self) -> Result<&'static dyn Driver, Error> {
        let known = DRIVERS.iter().find(|driver| driver.name() == self.driver);
        let Some(driver) = known else {
            return unfit(&format!(
                "{} was captured by a driver called '{}', which this version hasn't got",
                self.vdev, self.driver
            ));
        };
        let name = self.kept.file_name().and_then(|name| name.to_str());
        let ours = name.is_some_and(|name| {
            is_numbered(name, KEPT_PREFIX) && driver.place(&self.origin, name) == self.kept
        });
        if !ours || !is_plain(&self.origin) {
            return unfit(&format!(
                "{} can't be a captured {}",
                self.kept.display(),
                self.origin.display()
            ));
        }
        Ok(*driver)
    }

    /// Whether its contents are all there.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), Error> {
        self.driver()?.check(self)
    }
}

/// What is said of a copy's disk whose place is taken.
fn taken(new: &Path) -> Error {
    Error::Unfit(format!(
        "the copy's disk would be {}, and that exists (remove it, or give the copy another name)",
        new.display()
    ))
}

/// `PREFIX-`, 16 hex digits, `-` and a number.
fn is_numbered(name: &str, prefix: &str) -> bool {
    let rest = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix('-'));
    let Some((number, nth)) = rest.and_then(|rest| rest.split_once('-')) else {
        return false;
    };
    is_number(number)
        && (1..=6).contains(&nth.len())
        && nth.bytes().all(|byte| byte.is_ascii_digit())
}

/// 16 hex digits.
fn is_number(text: &str) -> bool {
    let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.len() == 16 && text.bytes().all(hex)
}

fn is_plain(path: &Path) -> bool {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    path.is_absolute() && path.components().all(plain)
}

/// What is in [`LIST_NAME`].
#[derive(Serialize, Deserialize)]
struct List {
    version: u32,
    disks: Vec<Piece>,
}

/// Writes down what is going to be made, durably, in a take's directory.
///
/// # Errors
///
/// [`Error::Io`]; [`Error::Unfit`] if there are too many.
pub fn write_list(dir: &Path, pieces: &[Piece]) -> Result<(), Error> {
    if pieces.len() > DISKS_MAX {
        return unfit(&format!("there are more than {DISKS_MAX} disks"));
    }
    let list = List {
        version: LIST_VERSION,
        disks: pieces.to_vec(),
    };
    write_durably(&dir.join(LIST_NAME), &list)
}

/// What was made for the take or snapshot in `dir`; nothing if there is no list.
///
/// # Errors
///
/// [`Error::Io`]; [`Error::Unfit`] if it isn't a list of this version.
pub fn read_list(dir: &Path) -> Result<Option<Vec<Piece>>, Error> {
    let path = dir.join(LIST_NAME);
    let Some(list) = read_json::<List>(&path)? else {
        return Ok(None);
    };
    if list.version != LIST_VERSION {
        return unfit(&format!(
            "{} has version {}, and this program knows {LIST_VERSION} only",
            path.display(),
            list.version
        ));
    }
    Ok(Some(list.disks))
}

/// Removes all that was made for the take or snapshot in `dir`, whose list stays:
/// its directory may go then.
///
/// # Errors
///
/// The first thing that can't be removed; the others are.
pub fn remove_listed(dir: &Path) -> Result<(), Error> {
    let mut result = Ok(());
    for piece in read_list(dir)?.unwrap_or_default() {
        let removed = piece.driver().and_then(|driver| driver.remove(&piece));
        if removed.is_err() && result.is_ok() {
            result = removed;
        }
    }
    result
}

fn write_durably<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let write = |error: serde_json::Error| Error::io("write", path)(error.into());
    let text = serde_json::to_vec_pretty(value).map_err(write)?;
    let aside = path.with_extension("new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)
        .map_err(Error::io("create", &aside))?;
    file.write_all(&text).map_err(Error::io("write", &aside))?;
    file.sync_all().map_err(Error::io("sync", &aside))?;
    std::fs::rename(&aside, path).map_err(Error::io("make", path))?;
    sync_parent(path)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut text = Vec::new();
    file.take(LIST_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(Error::io("read", path))?;
    let read = |error: serde_json::Error| Error::io("read", path)(error.into());
    serde_json::from_slice(&text).map(Some).map_err(read)
}

/// Makes a name in a directory, or that it's gone, last.
fn sync_parent(path: &Path) -> Result<(), Error> {
    let dir = path.parent().unwrap_or(path);
    let opened = File::open(dir).map_err(Error::io("open", dir))?;
    opened.sync_all().map_err(Error::io("sync", dir))
}

/// Removes a file; that it's gone already is fine.
fn remove_file(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

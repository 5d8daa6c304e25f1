//! A restore's disks: put back in place of what members have now, or made anew for
//! a copy; all or none, whatever ends the restore.
//!
//! What is going to change is written down durably first, in a folder of the
//! store's `tmp/`, with the way out: back, until the members run, and forward from
//! then on. The restore's journal names that folder, so that the guard does the one
//! or the other. After a restart of the host nobody's journal does, and the next take or
//! restore does it ([`recover`]).

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    is_number, is_numbered, read_json, remove_file, sync_parent, unfit, write_durably, Error,
    Piece, LIST_VERSION,
};

/// What folders of exchanges are called, followed by the restore's random number.
const PREFIX: &str = "disks.";
const RECORD_NAME: &str = "exchange.json";
/// What a disk is called, followed by `-RESTORE-N`, while the restore isn't over.
const ASIDE_PREFIX: &str = "vneold";

/// One disk of a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// The original gets its contents back.
    PutBack {
        /// What was captured.
        piece: Piece,
        /// Where its present contents wait.
        aside: PathBuf,
    },
    /// A new disk for a copy.
    Make {
        /// What was captured.
        piece: Piece,
        /// The disk.
        new: PathBuf,
    },
}

/// Which way an exchange is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Way {
    /// All is as it was.
    Back,
    /// The members have what was captured.
    Forward,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    way: Way,
    changes: Vec<Change>,
}

/// An exchange under way.
#[derive(Debug)]
pub struct Exchange {
    dir: PathBuf,
    record: Record,
}

/// The folder of the exchange of the restore with this number; `tmp` is the
/// store's.
pub fn folder(tmp: &Path, number: u64) -> PathBuf {
    tmp.join(format!("{PREFIX}{number:016x}"))
}

impl Change {
    /// Puts a disk back: the `nth` of the restore with this number.
    ///
    /// # Errors
    ///
    /// Why it can't be: what was captured or the original isn't there, or is in use.
    pub fn put_back(piece: &Piece, number: u64, nth: usize) -> Result<Self, Error> {
        let driver = piece.driver()?;
        driver.check(piece)?;
        driver.check_origin(piece)?;
        let name = format!("{ASIDE_PREFIX}-{number:016x}-{nth}");
        Ok(Self::PutBack {
            aside: driver.place(&piece.origin, &name),
            piece: piece.clone(),
        })
    }

    /// Makes a disk for a copy called `copy`, beside the original.
    ///
    /// # Errors
    ///
    /// Why it can't be: what was captured isn't there, or something else is in the
    /// new disk's place.
    pub fn make(piece: &Piece, copy: &str) -> Result<Self, Error> {
        let driver = piece.driver()?;
        driver.check(piece)?;
        let name = piece.origin.file_name().unwrap_or_default();
        let name = format!("{copy}-{}", name.to_string_lossy());
        let new = driver.new_place(piece, &name)?;
        Ok(Self::Make {
            piece: piece.clone(),
            new,
        })
    }

    /// For a copy: the guest's name of the disk, and the new disk.
    pub fn made(&self) -> Option<(&str, &Path)> {
        match self {
            Self::Make { piece, new } => Some((&piece.vdev, new)),
            Self::PutBack { .. } => None,
        }
    }

    fn carry_out(&self) -> Result<(), Error> {
        match self {
            Self::PutBack { piece, aside } => piece.driver()?.put_back(piece, aside),
            Self::Make { piece, new } => piece.driver()?.make(piece, new),
        }
    }

    fn end(&self, way: Way) -> Result<(), Error> {
        match (self, way) {
            (Self::PutBack { piece, aside }, way) => {
                let driver = piece.driver()?;
                let name = aside.file_name().and_then(|name| name.to_str());
                let ours = name.is_some_and(|name| {
                    is_numbered(name, ASIDE_PREFIX) && driver.place(&piece.origin, name) == *aside
                });
                match way {
                    _ if !ours => unfit(&format!("{} was put aside by nobody", aside.display())),
                    Way::Back => driver.take_back(piece, aside),
                    Way::Forward => driver.forget(piece, aside),
                }
            }
            (Self::Make { piece, new }, Way::Back) => piece.driver()?.unmake(piece, new),
            (Self::Make { .. }, Way::Forward) => Ok(()),
        }
    }
}

impl Exchange {
    /// Writes down in the new folder `dir` what is going to change. Nothing has yet.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn begin(dir: &Path, changes: Vec<Change>) -> Result<Self, Error> {
        let exchange = Self {
            dir: dir.to_owned(),
            record: Record {
                version: LIST_VERSION,
                way: Way::Back,
                changes,
            },
        };
        let made = DirBuilder::new().mode(0o700).create(dir);
        made.map_err(Error::io("create", dir))?;
        exchange.write()?;
        sync_parent(dir)?;
        Ok(exchange)
    }

    /// The exchange in `dir`; `None` if it's over, or hadn't begun.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; [`Error::Unfit`] if it's a later version's.
    pub fn open(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(RECORD_NAME);
        let Some(record) = read_json::<Record>(&path)? else {
            return Ok(None);
        };
        if record.version != LIST_VERSION {
            return unfit(&format!(
                "{} has version {}, and this program knows {LIST_VERSION} only",
                path.display(),
                record.version
            ));
        }
        let dir = dir.to_owned();
        Ok(Some(Self { dir, record }))
    }

    /// Changes the disks, one after the other.
    ///
    /// # Errors
    ///
    /// The first failure; [`Exchange::back`] then undoes what was done.
    pub fn carry_out(&self) -> Result<(), Error> {
        self.record.changes.iter().try_for_each(Change::carry_out)
    }

    /// From here on there is no way back: the members are about to run.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: there still is one.
    pub fn keep(&mut self) -> Result<(), Error> {
        if self.record.way != Way::Forward {
            self.record.way = Way::Forward;
            self.write()?;
        }
        Ok(())
    }

    /// Undoes it: the restore has failed, and its members are gone. Every disk is tried.
    ///
    /// # Errors
    ///
    /// The first failure; the record stays, to try again.
    pub fn back(self) -> Result<(), Error> {
        self.end(Way::Back)
    }

    /// Removes what was put aside: the members have been set running. Every disk is
    /// tried.
    ///
    /// # Errors
    ///
    /// The first failure; the record stays, to try again.
    pub fn forward(mut self) -> Result<(), Error> {
        self.keep()?;
        self.end(Way::Forward)
    }

    fn end(self, way: Way) -> Result<(), Error> {
        let mut result = Ok(());
        // Back the way that it came.
        for change in self.record.changes.iter().rev() {
            let ended = change.end(way);
            if ended.is_err() && result.is_ok() {
                result = ended;
            }
        }
        result?;
        remove_file(&self.dir.join(RECORD_NAME))?;
        remove_folder(&self.dir)
    }

    fn write(&self) -> Result<(), Error> {
        write_durably(&self.dir.join(RECORD_NAME), &self.record)
    }
}

/// Ends the exchange in `dir`, if there is one, for a restore that was killed:
/// forward if its members run or are left to run, otherwise back.
///
/// # Errors
///
/// As [`Exchange::open`], [`Exchange::forward`] and [`Exchange::back`].
pub fn end(dir: &Path, forward: bool) -> Result<(), Error> {
    match (Exchange::open(dir)?, forward) {
        (Some(exchange), true) => exchange.forward(),
        (Some(exchange), false) => exchange.back(),
        (None, _) => remove_folder(dir),
    }
}

/// The folders of exchanges below the store's `tmp`. A restore that goes on is in a journal
/// before it makes its folder: who looks for that afterwards finds it.
///
/// # Errors
///
/// [`Error::Io`].
pub fn folders(tmp: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(tmp) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(Error::io("read", tmp)(error)),
    };
    for entry in entries {
        let dir = entry.map_err(Error::io("read", tmp))?.path();
        let name = dir.file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.strip_prefix(PREFIX));
        if number.is_some_and(is_number) {
            found.push(dir);
        }
    }
    Ok(found)
}

/// Ends the exchange in `dir` of which no journal knows, as its host was restarted, the
/// way that it was going.
///
/// # Errors
///
/// As [`Exchange::open`], [`Exchange::forward`] and [`Exchange::back`].
pub fn recover(dir: &Path) -> Result<(), Error> {
    log::warn!("{}: ending a restore's exchange of disks", dir.display());
    match Exchange::open(dir)? {
        Some(exchange) => {
            let way = exchange.record.way;
            exchange.end(way)
        }
        None => remove_folder(dir),
    }
}

fn remove_folder(dir: &Path) -> Result<(), Error> {
    // Half a record that was never made.
    remove_file(&dir.join(RECORD_NAME).with_extension("new"))?;
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

//! A member's pages as they come from another store.
//!
//! They go into a pack in the making, and a log beside it says where its frames
//! are. So what has arrived outlives whatever ends the copy: the next one reads the
//! log, makes the hashes of all that is as it was written, and goes on behind it.
//!
//! | a frame in the log, bytes | field |
//! |---|---|
//! | 4 | its length in the pack |
//! | 4 | how many pages |
//! | 16 | XXH3-128 of its bytes |

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::batch::{self, BatchContent, BATCH_HASHES_MAX};
use super::bits::Bits;
use super::codec::Unpacker;
use super::ends::Header;
use super::error::Error;
use super::known::{Fingerprints, Known, Location};
use super::pack::{
    check_of, hash_page, open_frame, seal_frame, Frame, Hash, Table, FRAME_LENGTH_MAX, FRAME_PAGES,
    HEADER_BYTES,
};
use super::packer::Packed;
use super::seal::{Sealer, SEALED_BYTES};
use super::store::PACK_NAME;
use super::table::{Content, PageTable, PFN_COUNT_MAX};
use super::Result;
use crate::random;
use crate::stream::PAGE_SIZE;

/// The log of the pack in the making.
pub(super) const LOG_NAME: &str = "pack.log";
const LOG_FRAME_BYTES: usize = 24;

/// Pages that were asked for and haven't come, at most: those of a few batches.
const PENDING_MAX: usize = 4 * BATCH_HASHES_MAX;

/// Bytes after which what has arrived is written out: who ends the copy needn't
/// wait for all of it then.
const SYNC_BYTES: u64 = 16 << 20;

/// A page that was asked for has this place until it comes.
const NOWHERE: Location = Location {
    pack: u32::MAX,
    page: u32::MAX,
};

/// A member that is being received.
#[derive(Debug)]
pub(super) struct Arriving {
    path: PathBuf,
    file: File,
    log_path: PathBuf,
    log: File,
    log_end: u64,
    end: u64,
    synced: u64,
    nonce: [u8; 16],
    sealer: Option<Sealer>,
    frames: Vec<Frame>,
    hashes: Vec<Hash>,
    prints: Fingerprints,
    known: Known,
    unpacker: Unpacker,
    table: PageTable,
    next_pfn: u64,
    /// Where each page with contents is, in the order of the frames.
    locations: Vec<Location>,
    /// Which of them wait for a page.
    pending: HashMap<Hash, Vec<u32>>,
}

/// Opens a file for reading and writing that may be there.
fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(path)
        .map_err(Error::io("open", path))
}

impl Arriving {
    /// Goes on with what an earlier copy has left in the member's directory.
    /// `known` are the store's pages; it may take a while.
    pub(super) fn open(dir: &Path, mut known: Known) -> Result<Self> {
        known.learn()?;
        let (path, log_path) = (dir.join(PACK_NAME), dir.join(LOG_NAME));
        let mut arriving = Arriving {
            file: open(&path)?,
            log: open(&log_path)?,
            log_end: 0,
            end: HEADER_BYTES,
            synced: HEADER_BYTES,
            nonce: [0; 16],
            sealer: None,
            frames: Vec::new(),
            hashes: Vec::new(),
            prints: Fingerprints::default(),
            known,
            unpacker: Unpacker::new(&path)?,
            table: PageTable::default(),
            next_pfn: 0,
            locations: Vec::new(),
            pending: HashMap::new(),
            path,
            log_path,
        };
        let mut header = [0; HEADER_BYTES as usize];
        let there = arriving.file.read_exact_at(&mut header, 0);
        match there.ok().and_then(|()| Header::decode(&header)) {
            Some(header) if arriving.is_of(&header) => arriving.take_over()?,
            _ => arriving.begin()?,
        }
        Ok(arriving)
    }

    /// Whether what is there can be gone on with: its key may be another one by now.
    fn is_of(&mut self, header: &Header) -> bool {
        let vault = self.known.folder().vault();
        match (header, header.sealer(vault, &self.path)) {
            (Header::Plain { nonce }, Ok(None)) if !vault.seals() => self.nonce = *nonce,
            // Its name isn't written yet.
            (Header::Sealed { .. }, Ok(Some(sealer))) => match random::bytes() {
                Ok(nonce) => (self.nonce, self.sealer) = (nonce, Some(sealer)),
                Err(_) => return false,
            },
            _ => return false,
        }
        true
    }

    fn begin(&mut self) -> Result<()> {
        self.nonce = random::bytes().map_err(Error::io("make a name for", &self.path))?;
        self.sealer = self.known.folder().vault().new_sealer(&self.path)?;
        self.cut()?;
        let header = Table::header(&self.nonce, self.sealer.as_ref());
        let written = self.file.write_all_at(&header, 0);
        written.map_err(Error::io("write", &self.path))
    }

    /// Forgets what is behind the last good frame.
    fn cut(&mut self) -> Result<()> {
        let cut = self.file.set_len(self.end);
        cut.map_err(Error::io("shorten", &self.path))?;
        let cut = self.log.set_len(self.log_end);
        cut.map_err(Error::io("shorten", &self.log_path))
    }

    /// Finds the frames that are as they were written.
    fn take_over(&mut self) -> Result<()> {
        let log = self.log.try_clone();
        let mut log = BufReader::new(log.map_err(Error::io("open", &self.log_path))?);
        let mut bytes = Vec::new();
        while let Some((length, count, check)) = read_entry(&mut log) {
            bytes.resize(length, 0);
            let read = self.file.read_exact_at(&mut bytes, self.end);
            let is_good = read.is_ok()
                && check_of(&bytes) == check
                && open_frame(&mut bytes, self.sealer.as_ref()).is_ok()
                && self.unpacker.unpack_bytes(&bytes, count).is_ok();
            if !is_good {
                break;
            }
            self.note(length, check);
        }
        self.cut()
    }

    /// Counts a frame that is in both files, and was unpacked just now.
    fn note(&mut self, length: usize, check: [u8; 16]) {
        let pages = self.unpacker.pages.chunks_exact(PAGE_SIZE);
        let hashes: Vec<Hash> = pages.map(hash_page).collect();
        let first = self.hashes.len() as u32; // within PFN_COUNT_MAX
        self.frames.push(Frame {
            offset: self.end,
            length: length as u32, // within FRAME_LENGTH_MAX
            first,
            count: hashes.len() as u32,
            check,
        });
        for (page, hash) in (first..).zip(&hashes) {
            self.prints.insert(hash, page);
            for number in self.pending.remove(hash).unwrap_or_default() {
                if let Some(location) = self.locations.get_mut(number as usize) {
                    *location = Location { pack: 0, page };
                }
            }
        }
        self.hashes.extend_from_slice(&hashes);
        self.end += length as u64;
        self.log_end += LOG_FRAME_BYTES as u64;
    }

    /// Bytes that have arrived, now or earlier.
    pub(super) fn bytes(&self) -> u64 {
        self.end - HEADER_BYTES
    }

    /// Takes a frame in, after a look at what is in it.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if it's no frame of so many pages; [`Error::Io`].
    pub(super) fn frame(&mut self, bytes: &[u8], count: usize) -> Result<()> {
        let wrong = |problem: &str| Error::unstorable("what arrives", problem);
        if count == 0 || count > FRAME_PAGES || bytes.len() > FRAME_LENGTH_MAX - SEALED_BYTES {
            return Err(wrong("a frame has an impossible size"));
        }
        if (self.hashes.len() + count) as u64 > PFN_COUNT_MAX {
            return Err(wrong("there are more pages than a pack can have"));
        }
        let unpacked = self.unpacker.unpack_bytes(bytes, count);
        unpacked.map_err(|_| wrong("a frame can't be unpacked"))?;
        let mut sealed = bytes.to_vec();
        seal_frame(&mut sealed, self.sealer.as_ref(), &self.path)?;
        let check = check_of(&sealed);
        let written = self.file.write_all_at(&sealed, self.end);
        written.map_err(Error::io("write", &self.path))?;
        let mut entry = Vec::with_capacity(LOG_FRAME_BYTES);
        entry.extend_from_slice(&(sealed.len() as u32).to_le_bytes());
        entry.extend_from_slice(&(count as u32).to_le_bytes());
        entry.extend_from_slice(&check);
        let written = self.log.write_all_at(&entry, self.log_end);
        written.map_err(Error::io("write", &self.log_path))?;
        self.note(sealed.len(), check);
        if self.end - self.synced >= SYNC_BYTES {
            let synced = self.file.sync_data();
            synced.map_err(Error::io("sync", &self.path))?;
            self.synced = self.end;
        }
        Ok(())
    }

    /// Takes in what the next guest frames are; which of the pages are lacking, a
    /// bit a page.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if it makes no sense.
    pub(super) fn batch(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let wrong = |problem: String| Error::unstorable("what arrives", problem);
        let runs = batch::decode(bytes, self.next_pfn).map_err(wrong)?;
        let mut lacking = Vec::new();
        for run in &runs {
            let first = u64::from(run.pfn);
            let pfns = first..first + u64::from(run.count);
            self.next_pfn = pfns.end;
            let plain = match &run.content {
                BatchContent::Nothing => Content::Nothing,
                BatchContent::Zero => Content::Zero,
                BatchContent::Pages(hashes) => {
                    for (pfn, hash) in pfns.zip(hashes) {
                        let number = self.locations.len() as u32; // below PFN_COUNT_MAX
                        lacking.push(self.place(hash, number));
                        self.table.set(pfn, run.page_type, Content::Packed(number));
                    }
                    continue;
                }
            };
            for pfn in pfns {
                self.table.set(pfn, run.page_type, plain);
            }
        }
        if self.pending.values().map(Vec::len).sum::<usize>() > PENDING_MAX {
            return Err(wrong(
                "too many pages were asked for and haven't come".into(),
            ));
        }
        let mut bits = Bits::none(lacking.len());
        let pages = lacking.iter().enumerate().filter(|(_, lacks)| **lacks);
        pages.for_each(|(nth, _)| bits.set(nth));
        Ok(bits.bytes().to_vec())
    }

    /// Notes where a page is; whether it has to come yet.
    fn place(&mut self, hash: &Hash, number: u32) -> bool {
        let own = self.prints.candidates(hash);
        let is_same = |&page: &u32| self.hashes.get(page as usize) == Some(hash);
        let own = own.into_iter().find(is_same);
        let found = match own {
            Some(page) => Some(Location { pack: 0, page }),
            None => self.known.find(hash),
        };
        self.locations.push(found.unwrap_or(NOWHERE));
        if found.is_none() {
            self.pending.entry(*hash).or_default().push(number);
        }
        found.is_none()
    }

    /// All that was said has arrived: what [`super::publish`] needs.
    ///
    /// # Errors
    ///
    /// [`Error::Unstorable`] if a page is lacking, [`Error::Io`].
    pub(super) fn finish(self) -> Result<(Packed, PageTable)> {
        if let Some(hash) = self.pending.keys().next() {
            let hash = blake3::Hash::from(*hash).to_hex();
            let problem = format!("the page with hash {hash} never came");
            return Err(Error::unstorable("what arrives", problem));
        }
        let packed = Packed {
            file: self.file,
            path: self.path,
            table: Table {
                nonce: self.nonce,
                frames: self.frames,
                present: Bits::all(self.hashes.len()),
                hashes: self.hashes,
            },
            end: self.end,
            locations: self.locations,
            known: self.known,
            sealer: self.sealer,
        };
        Ok((packed, self.table))
    }
}

/// A frame's entry in the log; none at its end, or where it makes no sense.
fn read_entry(log: &mut impl Read) -> Option<(usize, usize, [u8; 16])> {
    let mut head = [0; LOG_FRAME_BYTES];
    log.read_exact(&mut head).ok()?;
    let (numbers, check) = head.split_first_chunk::<8>()?;
    let [l0, l1, l2, l3, c0, c1, c2, c3] = *numbers;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let count = u32::from_le_bytes([c0, c1, c2, c3]) as usize;
    if length > FRAME_LENGTH_MAX || count == 0 || count > FRAME_PAGES {
        return None;
    }
    Some((length, count, *check.first_chunk()?))
}

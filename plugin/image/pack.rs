//! The pack file: pages that one member's take has stored, compressed.
//!
//! Layout in `plugin/docs/snapshot-format.md`, "A pack". A pack is named by a
//! hash of all its pages' hashes, so that whoever knows the name (an index, of
//! which the manifest has the hash) can check each page. Pages keep their
//! numbers for as long as the pack exists. Those that no snapshot uses any more
//! may be gone from it: the list of hashes stays whole, the frames and the bits
//! of the pages that are there are as they are found.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use super::bits::Bits;
use super::ends::{
    decode_frame, read_at, word_at, Broken, Ends, Header, END_MAGIC, FOOTER_BYTES, MAGIC, VERSION,
    VERSION_SEALED,
};
use super::error::Error;
use super::seal::{Sealer, Vault, SEALED_BYTES};
use super::Result;
use crate::stream::PAGE_SIZE;

/// What is encrypted as what.
const FRAME_ROLE: &[u8] = b"xl-vne frame";
const TABLE_ROLE: &[u8] = b"xl-vne table";

/// Bytes ahead of the first frame.
pub(crate) const HEADER_BYTES: u64 = 32;
pub(super) const FRAME_BYTES: usize = 40;
pub(super) const HASH_BYTES: usize = 32;

/// Pages that are compressed together, at most: 256 KiB. Fewer compress worse,
/// more make it dearer to get one of them, and to give one up.
pub(crate) const FRAME_PAGES: usize = 64;

/// Bytes of a compressed frame, at most: what zstd makes of noise, and to spare.
pub(crate) const FRAME_LENGTH_MAX: usize = FRAME_PAGES * PAGE_SIZE + 4096;

/// Pages in a pack, at most: as many as a member can have.
pub(crate) const PACK_PAGES_MAX: u64 = super::PFN_COUNT_MAX;

/// XXH3 with 128 bits of a frame's compressed bytes. That its pages are right their
/// own hashes say; this one finds what unpacking would hide, and keeps garbage
/// from being unpacked at all, for next to nothing.
pub(crate) type FrameCheck = [u8; 16];

/// Computes a frame's.
pub(crate) fn check_of(bytes: &[u8]) -> FrameCheck {
    XxHash3_128::oneshot(bytes).to_le_bytes()
}

/// BLAKE3 of a page's contents.
pub(crate) type Hash = [u8; HASH_BYTES];

/// A pack's name: BLAKE3 of its nonce and its pages' hashes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PackId(pub(crate) [u8; 32]);

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<PackId> for String {
    fn from(id: PackId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for PackId {
    type Error = &'static str;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        let mut id = [0; 32];
        let fits = text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !fits {
            return Err("64 hex digits are expected");
        }
        for (at, byte) in id.iter_mut().enumerate() {
            let digits = text.get(2 * at..2 * at + 2).unwrap_or_default();
            *byte = u8::from_str_radix(digits, 16).map_err(|_| "hex digits are expected")?;
        }
        Ok(PackId(id))
    }
}

/// Pages that are compressed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Where it begins in the file.
    pub offset: u64,
    /// Its bytes.
    pub length: u32,
    /// The number of its first page; the others are the next ones that are there.
    pub first: u32,
    /// How many pages, at least 1.
    pub count: u32,
    /// Of its bytes.
    pub check: FrameCheck,
}

/// What stands behind the frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// Makes the name differ from that of any other pack.
    pub nonce: [u8; 16],
    /// By page, upwards.
    pub frames: Vec<Frame>,
    /// Which pages are there.
    pub present: Bits,
    /// Of all pages, also of those that are gone.
    pub hashes: Vec<Hash>,
}

impl Table {
    /// The name of a pack with this table.
    pub(crate) fn id(&self) -> PackId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.nonce);
        for hash in &self.hashes {
            hasher.update(hash);
        }
        PackId(*hasher.finalize().as_bytes())
    }

    /// How many pages the pack has or had.
    pub(crate) fn pages(&self) -> u32 {
        self.hashes.len() as u32 // within PACK_PAGES_MAX
    }

    /// The frame that has a page, and the page's place in it.
    pub(crate) fn find(&self, page: u32) -> Option<(usize, usize)> {
        if !self.present.get(page as usize) {
            return None;
        }
        let after = self.frames.partition_point(|frame| frame.first <= page);
        let number = after.checked_sub(1)?;
        let frame = self.frames.get(number)?;
        let place = self
            .present
            .count_between(frame.first as usize, page as usize);
        (place < frame.count as usize).then_some((number, place))
    }

    /// The numbers of a frame's pages.
    pub(crate) fn pages_of(&self, frame: &Frame) -> impl Iterator<Item = u32> + '_ {
        let there = (frame.first..self.pages()).filter(|&page| self.present.get(page as usize));
        there.take(frame.count as usize)
    }

    /// The bytes of a pack file ahead of its frames; of one that is encrypted, with
    /// what it needs.
    pub(crate) fn header(nonce: &[u8; 16], sealer: Option<&Sealer>) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        match sealer {
            None => {
                bytes.extend_from_slice(&VERSION.to_le_bytes());
                bytes.extend_from_slice(&0_u32.to_le_bytes());
                bytes.extend_from_slice(nonce);
            }
            Some(sealer) => {
                bytes.extend_from_slice(&VERSION_SEALED.to_le_bytes());
                bytes.extend(sealer.key_id.0.iter().take(4));
                bytes.extend_from_slice(&sealer.salt);
            }
        }
        bytes
    }

    /// The bytes of a pack file behind its frames, which end at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if there are no random numbers.
    pub(crate) fn encode(
        &self,
        offset: u64,
        sealer: Option<&Sealer>,
        path: &Path,
    ) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.encoded_bytes());
        if sealer.is_some() {
            bytes.extend_from_slice(&self.nonce);
        }
        bytes.extend_from_slice(&self.pages().to_le_bytes());
        bytes.extend_from_slice(&(self.frames.len() as u32).to_le_bytes());
        for frame in &self.frames {
            bytes.extend_from_slice(&frame.offset.to_le_bytes());
            for number in [frame.length, frame.first, frame.count, 0] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&frame.check);
        }
        bytes.extend_from_slice(self.present.bytes());
        bytes.extend(self.hashes.iter().flatten());
        if let Some(sealer) = sealer {
            sealer.seal(&mut bytes, TABLE_ROLE, path)?;
        }
        let length = bytes.len() as u64;
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&0_u64.to_le_bytes());
        bytes.extend_from_slice(&END_MAGIC);
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        Ok(bytes)
    }

    fn encoded_bytes(&self) -> usize {
        16 + SEALED_BYTES
            + 8
            + self.frames.len() * FRAME_BYTES
            + self.present.bytes().len()
            + self.hashes.len() * HASH_BYTES
            + FOOTER_BYTES
    }

    /// Reads and checks the table of `file`, which must be named `id` if that is
    /// known; `Err` says what is wrong.
    fn read(
        file: &File,
        path: &Path,
        id: Option<&PackId>,
        vault: &Vault,
    ) -> std::result::Result<(Self, Option<Sealer>), Broken> {
        let length = file.metadata().map_err(Broken::Io)?.len();
        let Ends {
            header,
            offset,
            bytes,
            footer,
        } = Ends::read(file, length)?;
        let mut table = vec![0; bytes as usize];
        read_at(file, &mut table, offset)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&table);
        hasher.update(footer.get(..32).unwrap_or_default());
        if footer.get(32..) != Some(hasher.finalize().as_bytes()) {
            return Err("its table isn't what was written".into());
        }
        let sealer = header.sealer(vault, path).map_err(Broken::Other)?;
        let (table, sealer) = match (header, sealer) {
            (Header::Plain { nonce }, _) => (Self::decode(nonce, &table, offset)?, None),
            (Header::Sealed { .. }, sealer) => {
                let sealer = sealer.ok_or("it can't be decrypted")?;
                sealer.open(&mut table, TABLE_ROLE)?;
                let (nonce, table) = table
                    .split_first_chunk()
                    .ok_or_else(|| Broken::from("its table is cut short"))?;
                (Self::decode(*nonce, table, offset)?, Some(sealer))
            }
        };
        if id.is_some_and(|id| table.id() != *id) {
            return Err("it is another pack than its name says".into());
        }
        Ok((table, sealer))
    }

    fn decode(nonce: [u8; 16], bytes: &[u8], end: u64) -> std::result::Result<Self, Broken> {
        let (counts, rest) = bytes
            .split_at_checked(8)
            .ok_or_else(|| Broken::from("its table is cut short"))?;
        let (pages, frames) = (word_at(counts, 0) as usize, word_at(counts, 4) as usize);
        let expected = (frames as u64) * FRAME_BYTES as u64
            + Bits::bytes_for(pages) as u64
            + pages as u64 * HASH_BYTES as u64;
        if pages as u64 > PACK_PAGES_MAX || frames > pages || rest.len() as u64 != expected {
            return Err("its table's length isn't what its counts say".into());
        }
        let (frames, rest) = rest.split_at(frames * FRAME_BYTES);
        let (present, hashes) = rest.split_at(Bits::bytes_for(pages));
        let table = Table {
            nonce,
            frames: frames
                .chunks_exact(FRAME_BYTES)
                .map(decode_frame)
                .collect::<std::result::Result<_, _>>()?,
            present: Bits::from_bytes(present, pages)
                .ok_or("its table has bits of pages that it doesn't have")?,
            hashes: hashes
                .chunks_exact(HASH_BYTES)
                .filter_map(|hash| hash.first_chunk().copied())
                .collect(),
        };
        table.check(end)?;
        Ok(table)
    }

    /// Frames go upwards, have all the pages that are there and no others, and
    /// fill the file up to `end` without a gap.
    fn check(&self, end: u64) -> std::result::Result<(), Broken> {
        let firsts = self.frames.iter().map(|frame| frame.first as usize);
        let ends = firsts.skip(1).chain([self.hashes.len()]);
        let mut seen = 0;
        for (frame, next) in self.frames.iter().zip(ends) {
            let first = frame.first as usize;
            let there = first < next && self.present.get(first);
            let count = frame.count as usize;
            if !there
                || count > FRAME_PAGES
                || frame.length as usize > FRAME_LENGTH_MAX
                || self.present.count_between(first, next) != count
            {
                return Err(format!("its frame at page {first} is impossible").into());
            }
            seen += count;
        }
        if seen != self.present.count() {
            return Err("it has pages that are in no frame".into());
        }
        let mut order: Vec<&Frame> = self.frames.iter().collect();
        order.sort_by_key(|frame| frame.offset);
        let mut at = HEADER_BYTES;
        for frame in order {
            if frame.offset != at {
                return Err("its frames overlap, or leave gaps".into());
            }
            at = at.saturating_add(u64::from(frame.length));
        }
        if at != end {
            return Err("its frames don't end where its table begins".into());
        }
        Ok(())
    }
}

/// Encrypts a frame in place, if its pack is encrypted.
pub(crate) fn seal_frame(bytes: &mut Vec<u8>, sealer: Option<&Sealer>, path: &Path) -> Result<()> {
    match sealer {
        Some(sealer) => sealer.seal(bytes, FRAME_ROLE, path),
        None => Ok(()),
    }
}

/// Decrypts a frame in place; `Err` if it isn't what was encrypted.
pub(crate) fn open_frame(
    bytes: &mut Vec<u8>,
    sealer: Option<&Sealer>,
) -> std::result::Result<(), &'static str> {
    match sealer {
        Some(sealer) => sealer.open(bytes, FRAME_ROLE),
        None => Ok(()),
    }
}

/// The hash of a page.
pub(crate) fn hash_page(page: &[u8]) -> Hash {
    *blake3::hash(page).as_bytes()
}

/// A pack that is open for reading. It stays readable when the file is removed
/// or replaced meanwhile.
#[derive(Debug)]
pub(crate) struct Pack {
    pub path: PathBuf,
    pub file: File,
    pub table: Table,
    /// If it's encrypted.
    pub sealer: Option<Sealer>,
}

impl Pack {
    /// Opens the pack at `path` and checks all but its frames.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`], also if it is missing; [`Error::Io`].
    pub(crate) fn open(path: &Path, id: Option<&PackId>, vault: &Vault) -> Result<Self> {
        match File::open(path) {
            Ok(file) => Self::of(file, path, id, vault),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::damaged(path, "it is missing"))
            }
            Err(error) => Err(Error::io("open", path)(error)),
        }
    }

    /// Whether a pack is there from its beginning to its end, which is quickly seen.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`], [`Error::Io`].
    pub(crate) fn glance(path: &Path) -> Result<()> {
        let facts = match std::fs::symlink_metadata(path) {
            Ok(facts) if facts.is_file() => facts,
            Ok(_) => return Err(Error::damaged(path, "it is no file")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::damaged(path, "it is missing"));
            }
            Err(error) => return Err(Error::io("look at", path)(error)),
        };
        let file = File::open(path).map_err(Error::io("open", path))?;
        match Ends::read(&file, facts.len()) {
            Ok(_) => Ok(()),
            Err(broken) => Err(broken.of(path)),
        }
    }

    /// The pack in an open file; `path` is for errors.
    pub(crate) fn of(file: File, path: &Path, id: Option<&PackId>, vault: &Vault) -> Result<Self> {
        match Table::read(&file, path, id, vault) {
            Ok((table, sealer)) => Ok(Pack {
                path: path.to_owned(),
                file,
                table,
                sealer,
            }),
            Err(broken) => Err(broken.of(path)),
        }
    }

    /// Reads a frame's bytes into `buffer`, decrypted, and compares them with their check;
    /// `Ok(Err)` says what is wrong with them.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where it's not the contents that can't be had.
    pub(crate) fn frame_bytes(
        &self,
        frame: &Frame,
        buffer: &mut Vec<u8>,
    ) -> Result<std::result::Result<(), &'static str>> {
        buffer.resize(frame.length as usize, 0);
        match self.file.read_exact_at(buffer, frame.offset) {
            Ok(()) if check_of(buffer) == frame.check => {
                Ok(open_frame(buffer, self.sealer.as_ref()))
            }
            Ok(()) => Ok(Err("what it is packed in is not what was written")),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Ok(Err("the file ends before"))
            }
            Err(error) if is_unreadable(&error) => Ok(Err("the disk cannot read it")),
            Err(error) => Err(Error::io("read", &self.path)(error)),
        }
    }
}

/// A disk that can't read its own sector says EIO.
pub(crate) fn is_unreadable(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

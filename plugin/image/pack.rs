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
use super::error::Error;
use super::Result;
use crate::stream::PAGE_SIZE;

const MAGIC: [u8; 8] = *b"xlvnePAK";
const END_MAGIC: [u8; 8] = *b"xlvneEND";
const VERSION: u32 = 1;

/// Bytes ahead of the first frame.
pub(crate) const HEADER_BYTES: u64 = 32;
const FRAME_BYTES: usize = 40;
const HASH_BYTES: usize = 32;
const FOOTER_BYTES: usize = 64;

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

    /// The bytes of a pack file ahead of its frames.
    pub(crate) fn header(nonce: &[u8; 16]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&0_u32.to_le_bytes());
        bytes.extend_from_slice(nonce);
        bytes
    }

    /// The bytes of a pack file behind its frames, which end at `offset`.
    pub(crate) fn encode(&self, offset: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_bytes());
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
        let length = bytes.len() as u64;
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&0_u64.to_le_bytes());
        bytes.extend_from_slice(&END_MAGIC);
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes
    }

    fn encoded_bytes(&self) -> usize {
        8 + self.frames.len() * FRAME_BYTES
            + self.present.bytes().len()
            + self.hashes.len() * HASH_BYTES
            + FOOTER_BYTES
    }

    /// Reads and checks the table of `file`, which must be named `id` if that is
    /// known; `Err` says what is wrong.
    fn read(file: &File, id: Option<&PackId>) -> std::result::Result<Self, Broken> {
        let length = file.metadata().map_err(Broken::Io)?.len();
        let Ends {
            nonce,
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
        let table = Self::decode(nonce, &table, offset)?;
        if id.is_some_and(|id| table.id() != *id) {
            return Err("it is another pack than its name says".into());
        }
        Ok(table)
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

/// What stands at a file's beginning and end.
struct Ends {
    nonce: [u8; 16],
    /// Where the table begins.
    offset: u64,
    /// The table's bytes.
    bytes: u64,
    footer: [u8; FOOTER_BYTES],
}

impl Ends {
    fn read(file: &File, length: u64) -> std::result::Result<Self, Broken> {
        let mut header = [0; HEADER_BYTES as usize];
        let mut footer = [0; FOOTER_BYTES];
        let footer_at = length
            .checked_sub(FOOTER_BYTES as u64)
            .filter(|&at| at >= HEADER_BYTES)
            .ok_or(Broken::from("it is too short to be a pack"))?;
        read_at(file, &mut header, 0)?;
        read_at(file, &mut footer, footer_at)?;
        let (offset, bytes) = (number_at(&footer, 0), number_at(&footer, 8));
        let is_end = footer.get(24..32) == Some(&END_MAGIC) && number_at(&footer, 16) == 0;
        // As many pages as there may be, each in a frame of its own.
        let bytes_max = PACK_PAGES_MAX * (FRAME_BYTES + HASH_BYTES + 1) as u64;
        if !is_end || bytes > bytes_max || offset.checked_add(bytes) != Some(footer_at) {
            return Err("it doesn't end as a pack does".into());
        }
        Ok(Ends {
            nonce: check_header(&header)?,
            offset,
            bytes,
            footer,
        })
    }
}

/// Why a table can't be had.
enum Broken {
    Io(std::io::Error),
    Problem(String),
}

impl Broken {
    fn of(self, path: &Path) -> Error {
        match self {
            Broken::Problem(problem) => Error::damaged(path, problem),
            Broken::Io(error)
                if error.kind() == std::io::ErrorKind::UnexpectedEof || is_unreadable(&error) =>
            {
                Error::damaged(path, format!("it can't be read: {error}"))
            }
            Broken::Io(error) => Error::io("read", path)(error),
        }
    }
}

impl From<&str> for Broken {
    fn from(problem: &str) -> Self {
        Broken::Problem(problem.to_owned())
    }
}

impl From<String> for Broken {
    fn from(problem: String) -> Self {
        Broken::Problem(problem)
    }
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> std::result::Result<(), Broken> {
    file.read_exact_at(buffer, offset).map_err(Broken::Io)
}

fn check_header(header: &[u8]) -> std::result::Result<[u8; 16], Broken> {
    let is_ours = header.starts_with(&MAGIC) && word_at(header, 8) == VERSION;
    let nonce = header.get(16..).and_then(|nonce| nonce.first_chunk());
    match nonce {
        Some(nonce) if is_ours && word_at(header, 12) == 0 => Ok(*nonce),
        _ => Err("it is no pack of version 1".into()),
    }
}

fn decode_frame(bytes: &[u8]) -> std::result::Result<Frame, Broken> {
    let check = bytes.get(24..).and_then(|check| check.first_chunk());
    match check {
        Some(check) if word_at(bytes, 20) == 0 => Ok(Frame {
            offset: number_at(bytes, 0),
            length: word_at(bytes, 8),
            first: word_at(bytes, 12),
            count: word_at(bytes, 16),
            check: *check,
        }),
        _ => Err("its table has reserved bytes set".into()),
    }
}

fn word_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_le_bytes(*word))
}

fn number_at(bytes: &[u8], at: usize) -> u64 {
    let number = bytes.get(at..).and_then(|rest| rest.first_chunk());
    number.map_or(0, |number| u64::from_le_bytes(*number))
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
}

impl Pack {
    /// Opens the pack at `path` and checks all but its frames.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`], also if it is missing; [`Error::Io`].
    pub(crate) fn open(path: &Path, id: Option<&PackId>) -> Result<Self> {
        match File::open(path) {
            Ok(file) => Self::of(file, path, id),
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
    pub(crate) fn of(file: File, path: &Path, id: Option<&PackId>) -> Result<Self> {
        match Table::read(&file, id) {
            Ok(table) => Ok(Pack {
                path: path.to_owned(),
                file,
                table,
            }),
            Err(broken) => Err(broken.of(path)),
        }
    }

    /// Reads a frame's bytes into `buffer` and compares them with their check;
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
            Ok(()) if check_of(buffer) == frame.check => Ok(Ok(())),
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::image::codec::{Compressor, Unpacker};

    /// A pack of 70 pages, of which two are gone, and its table.
    fn sample(path: &Path) -> Table {
        let pages: Vec<Vec<u8>> = (0..70).map(|n| vec![n; PAGE_SIZE]).collect();
        let hashes: Vec<Hash> = pages.iter().map(|page| hash_page(page)).collect();
        let mut bytes = Table::header(&[7; 16]);
        let mut frames = Vec::new();
        let mut present = Bits::none(70);
        let left = (0..70).filter(|&n| n != 3 && n != 64);
        left.for_each(|n| present.set(n));
        let mut compressor = Compressor::new(path).unwrap();
        for numbers in [0..40, 40..70] {
            let there: Vec<usize> = numbers.filter(|&n| present.get(n)).collect();
            let contents: Vec<u8> = there.iter().flat_map(|&n| pages[n].clone()).collect();
            let mut packed = Vec::new();
            compressor.pack(&contents, &mut packed, path).unwrap();
            frames.push(Frame {
                offset: bytes.len() as u64,
                length: packed.len() as u32,
                first: there[0] as u32,
                count: there.len() as u32,
                check: check_of(&packed),
            });
            bytes.extend(packed);
        }
        let table = Table {
            nonce: [7; 16],
            frames,
            present,
            hashes,
        };
        let end = bytes.len() as u64;
        bytes.extend(table.encode(end));
        std::fs::write(path, bytes).unwrap();
        table
    }

    #[test]
    fn pages_that_are_there_are_found_in_their_frames() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pack");
        let table = sample(&path);
        let pack = Pack::open(&path, Some(&table.id())).unwrap();
        assert_eq!(pack.table, table);
        let mut unpacker = Unpacker::new(&path).unwrap();
        for page in 0..71_u32 {
            let Some((frame, place)) = pack.table.find(page) else {
                assert!([3, 64, 70].contains(&page), "{page}");
                continue;
            };
            let frame = pack.table.frames[frame];
            unpacker.unpack(&pack, &frame).unwrap().unwrap();
            assert_eq!(unpacker.pages[place * PAGE_SIZE], page as u8);
            let nth = pack.table.pages_of(&frame).nth(place);
            assert_eq!(nth, Some(page));
        }
        let other = PackId([0; 32]);
        assert!(matches!(
            Pack::open(&path, Some(&other)),
            Err(Error::Damaged { .. })
        ));
    }

    /// Its hash keeps accidents from being decoded at all; it's no proof of sense.
    #[test]
    fn no_table_is_a_panic_even_if_its_hash_is_right() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pack");
        let table = sample(&path);
        let good = std::fs::read(&path).unwrap();
        let end = good.len() - 32;
        let from = good.len() - table.encode(0).len();
        let (mut refused, mut read) = (0, 0);
        // All of it but for most of the hashes, which are all alike.
        let hashes = from + 100;
        let tail = (hashes..end - 40).step_by(97).chain(end - 40..end);
        for at in (0..HEADER_BYTES as usize).chain(from..hashes).chain(tail) {
            for value in [0, 1, 0x40, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let seal = blake3::hash(&bad[from..end]);
                bad[end..].copy_from_slice(seal.as_bytes());
                std::fs::write(&path, &bad).unwrap();
                let Ok(pack) = Pack::open(&path, None) else {
                    refused += 1;
                    continue;
                };
                read += 1;
                let mut unpacker = Unpacker::new(&path).unwrap();
                for frame in pack.table.frames.iter().take(2) {
                    let _ = unpacker.unpack(&pack, frame).unwrap();
                }
                let found = (0..80).filter_map(|page| pack.table.find(page));
                assert!(found.count() <= 80);
            }
        }
        // What is refused is nonsense; other hashes are only another pack.
        assert!(refused > 300 && read > 100, "{refused} {read}");
    }
}

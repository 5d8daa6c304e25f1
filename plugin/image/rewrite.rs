//! A pack without the pages that nobody uses.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::bits::Bits;
use super::codec::{Compressor, Unpacker};
use super::error::Error;
use super::pack::{check_of, hash_page, seal_frame, Frame, Pack, Table, FRAME_PAGES, HEADER_BYTES};
use super::packer::Packed;
use super::seal::Sealer;
use super::Result;
use crate::stream::PAGE_SIZE;

/// Writes what is left of `pack` into `file`, which is empty: its table, in which
/// all pages have the numbers that they had, and where the frames end.
///
/// Frames that lose nothing are copied as they are, but for their encryption: with
/// `sealer` each is encrypted anew, without it none is.
///
/// # Errors
///
/// [`Error::Damaged`] if what is to stay isn't what was written: damage isn't
/// passed on under a new hash. [`Error::Io`].
pub(crate) fn rewrite(
    pack: &Pack,
    keep: &Bits,
    sealer: Option<&Sealer>,
    file: &File,
    path: &Path,
) -> Result<(Table, u64)> {
    let mut output = Output {
        file,
        path,
        sealer,
        compressor: Compressor::new(path)?,
        packed: Vec::new(),
        end: HEADER_BYTES,
        frames: Vec::new(),
        open: Vec::new(),
        first: 0,
    };
    output.put(&Table::header(&pack.table.nonce, sealer), 0)?;
    let present = pack.table.present.and(keep);
    let mut unpacker = Unpacker::new(&pack.path)?;
    let mut bytes = Vec::new();
    for frame in &pack.table.frames {
        let pages: Vec<u32> = pack.table.pages_of(frame).collect();
        let kept = pages.iter().filter(|&&page| keep.get(page as usize));
        let kept = kept.count();
        if kept == 0 {
            continue;
        }
        let damaged = |problem: &str| {
            let what = format!("the frame at page {}: {problem}", frame.first);
            Error::damaged(&pack.path, what)
        };
        // A nearly empty frame had better grow.
        let may_close = output.open.is_empty() || output.open.len() > FRAME_PAGES / 2 * PAGE_SIZE;
        if kept == pages.len() && may_close {
            output.close_frame()?;
            pack.frame_bytes(frame, &mut bytes)?.map_err(damaged)?;
            output.copy(frame, &mut bytes)?;
            continue;
        }
        unpacker.unpack(pack, frame)?.map_err(damaged)?;
        for (&number, page) in pages.iter().zip(unpacker.pages.chunks_exact(PAGE_SIZE)) {
            if !keep.get(number as usize) {
                continue;
            }
            if pack.table.hashes.get(number as usize) != Some(&hash_page(page)) {
                return Err(damaged("a page is not what was written"));
            }
            output.add(number, page)?;
        }
    }
    output.close_frame()?;
    let table = Table {
        nonce: pack.table.nonce,
        frames: output.frames,
        present,
        hashes: pack.table.hashes.clone(),
    };
    Ok((table, output.end))
}

/// Of a pack that nobody knows yet: leaves nothing of what isn't to stay, also no
/// number. The new number of a page is how many stay that are below it.
///
/// # Errors
///
/// As [`rewrite`].
pub(crate) fn squeeze(packed: Packed, keep: &Bits, file: File, path: &Path) -> Result<Packed> {
    let sealer = packed.known.folder().vault().new_sealer(path)?;
    let (table, end) = rewrite(&packed.as_pack()?, keep, sealer.as_ref(), &file, path)?;
    let mut numbers = 0;
    let frames = table.frames.iter().map(|frame| {
        let first = numbers;
        numbers += frame.count;
        Frame { first, ..*frame }
    });
    let kept = table.hashes.iter().enumerate();
    let kept = kept.filter(|(page, _)| table.present.get(*page));
    let hashes: Vec<_> = kept.map(|(_, hash)| *hash).collect();
    let squeezed = Table {
        nonce: table.nonce,
        frames: frames.collect(),
        present: Bits::all(hashes.len()),
        hashes,
    };
    let mut ranks = Vec::new();
    let mut rank = 0;
    for page in 0..table.pages() {
        ranks.push(rank);
        rank += u32::from(table.present.get(page as usize));
    }
    let mut locations = packed.locations;
    for location in locations.iter_mut().filter(|location| location.pack == 0) {
        location.page = ranks.get(location.page as usize).copied().unwrap_or(0);
    }
    Ok(Packed {
        file,
        path: path.to_owned(),
        table: squeezed,
        end,
        locations,
        known: packed.known,
        sealer,
    })
}

struct Output<'a> {
    file: &'a File,
    path: &'a Path,
    /// If what is written is encrypted.
    sealer: Option<&'a Sealer>,
    compressor: Compressor,
    packed: Vec<u8>,
    end: u64,
    frames: Vec<Frame>,
    /// Pages of the frame that isn't full yet, and the first one's number.
    open: Vec<u8>,
    first: u32,
}

impl Output<'_> {
    fn put(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(Error::io("write", self.path))
    }

    /// Writes a frame, whose bytes are plain until then.
    fn copy(&mut self, frame: &Frame, bytes: &mut Vec<u8>) -> Result<()> {
        seal_frame(bytes, self.sealer, self.path)?;
        self.put(bytes, self.end)?;
        self.frames.push(Frame {
            offset: self.end,
            length: bytes.len() as u32, // within FRAME_LENGTH_MAX
            check: check_of(bytes),
            ..*frame
        });
        self.end += bytes.len() as u64;
        Ok(())
    }

    fn add(&mut self, number: u32, page: &[u8]) -> Result<()> {
        if self.open.is_empty() {
            self.first = number;
        }
        self.open.extend_from_slice(page);
        if self.open.len() >= FRAME_PAGES * PAGE_SIZE {
            self.close_frame()?;
        }
        Ok(())
    }

    fn close_frame(&mut self) -> Result<()> {
        if self.open.is_empty() {
            return Ok(());
        }
        let mut packed = std::mem::take(&mut self.packed);
        self.compressor.pack(&self.open, &mut packed, self.path)?;
        let frame = Frame {
            offset: self.end,
            length: 0,
            first: self.first,
            count: (self.open.len() / PAGE_SIZE) as u32,
            check: Default::default(),
        };
        self.copy(&frame, &mut packed)?;
        self.packed = packed;
        self.open.clear();
        Ok(())
    }
}

//! Packing and unpacking of frames.

use std::path::Path;

use super::error::Error;
use super::pack::{Frame, Pack, FRAME_LENGTH_MAX};
use super::Result;
use crate::stream::PAGE_SIZE;

/// Unpacks frames, with what that needs in memory.
pub(crate) struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
    packed: Vec<u8>,
    /// The pages of the frame that was unpacked last.
    pub pages: Vec<u8>,
}

impl Unpacker {
    /// # Errors
    ///
    /// [`Error::Io`] when memory is out.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        Ok(Unpacker {
            zstd: zstd::bulk::Decompressor::new().map_err(Error::io("unpack", path))?,
            packed: Vec::new(),
            pages: Vec::new(),
        })
    }

    /// Unpacks a frame into [`Unpacker::pages`]; `Ok(Err)` says what is wrong with
    /// it. The pages aren't compared with their hashes.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn unpack(
        &mut self,
        pack: &Pack,
        frame: &Frame,
    ) -> Result<std::result::Result<(), &'static str>> {
        let mut pages = std::mem::take(&mut self.pages);
        pages.resize(frame.count as usize * PAGE_SIZE, 0);
        let unpacked = self.unpack_into(pack, frame, &mut pages);
        self.pages = pages;
        unpacked
    }

    /// The same, to where it's wanted; it must have the room that it takes.
    pub(crate) fn unpack_into(
        &mut self,
        pack: &Pack,
        frame: &Frame,
        pages: &mut [u8],
    ) -> Result<std::result::Result<(), &'static str>> {
        if let Err(problem) = pack.frame_bytes(frame, &mut self.packed)? {
            return Ok(Err(problem));
        }
        let bytes = frame.count as usize * PAGE_SIZE;
        let unpacked = self.zstd.decompress_to_buffer(&self.packed, pages);
        Ok(match unpacked {
            Ok(count) if count == bytes => Ok(()),
            _ => Err("it can't be unpacked"),
        })
    }
}

impl Unpacker {
    /// Unpacks bytes that came from elsewhere into [`Unpacker::pages`]; `Err` says
    /// what is wrong with them. They must be `count` pages, and can't become more.
    pub(crate) fn unpack_bytes(
        &mut self,
        bytes: &[u8],
        count: usize,
    ) -> std::result::Result<(), &'static str> {
        self.pages.resize(count * PAGE_SIZE, 0);
        let unpacked = self.zstd.decompress_to_buffer(bytes, &mut self.pages);
        match unpacked {
            Ok(length) if length == self.pages.len() => Ok(()),
            _ => Err("it can't be unpacked"),
        }
    }
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpacker")
    }
}

/// Packs frames, with what that needs in memory.
pub(crate) struct Compressor(zstd::bulk::Compressor<'static>);

/// zstd's fastest of its usual levels: a take shouldn't cost dom0 more.
const LEVEL: i32 = 1;

impl Compressor {
    /// # Errors
    ///
    /// [`Error::Io`] when memory is out.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let zstd = zstd::bulk::Compressor::new(LEVEL).map_err(Error::io("compress", path))?;
        Ok(Compressor(zstd))
    }

    /// Compresses pages into `packed`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn pack(&mut self, pages: &[u8], packed: &mut Vec<u8>, path: &Path) -> Result<()> {
        packed.clear();
        packed.reserve(FRAME_LENGTH_MAX);
        let result = self.0.compress_to_buffer(pages, packed);
        result.map(drop).map_err(Error::io("compress", path))
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

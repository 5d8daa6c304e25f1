//! What stands at a pack's beginning and end, and the ways in which it may be wrong.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::error::Error;
use super::pack::{is_unreadable, Frame, FRAME_BYTES, HASH_BYTES, HEADER_BYTES, PACK_PAGES_MAX};
use super::seal::{Sealer, Vault, SEALED_BYTES};
use super::Result;

pub(super) const MAGIC: [u8; 8] = *b"xlvnePAK";
pub(super) const END_MAGIC: [u8; 8] = *b"xlvneEND";
pub(super) const VERSION: u32 = 1;
/// Of a pack that is encrypted.
pub(super) const VERSION_SEALED: u32 = 2;
pub(super) const FOOTER_BYTES: usize = 64;

/// What stands at a pack's beginning.
#[derive(Clone, Copy)]
pub(crate) enum Header {
    Plain { nonce: [u8; 16] },
    Sealed { key_id: [u8; 4], salt: [u8; 16] },
}

impl Header {
    /// What is in the bytes ahead of a pack's frames, if they are that.
    pub(crate) fn decode(header: &[u8]) -> Option<Self> {
        let (numbers, last) = header.split_at_checked(16)?;
        let last = *last.first_chunk()?;
        let (magic, numbers) = numbers.split_first_chunk::<8>()?;
        let key_id = *numbers.last_chunk::<4>()?;
        match word_at(numbers, 0) {
            _ if *magic != MAGIC => None,
            VERSION if key_id == [0; 4] => Some(Header::Plain { nonce: last }),
            VERSION_SEALED => Some(Header::Sealed { key_id, salt: last }),
            _ => None,
        }
    }

    /// What opens the pack, if it's encrypted.
    pub(crate) fn sealer(&self, vault: &Vault, path: &Path) -> Result<Option<Sealer>> {
        match self {
            Header::Plain { .. } => Ok(None),
            Header::Sealed { key_id, salt } => vault.sealer(key_id, *salt, path).map(Some),
        }
    }
}

/// What stands at a file's beginning and end.
pub(super) struct Ends {
    pub header: Header,
    /// Where the table begins.
    pub offset: u64,
    /// The table's bytes.
    pub bytes: u64,
    pub footer: [u8; FOOTER_BYTES],
}

impl Ends {
    pub(super) fn read(file: &File, length: u64) -> std::result::Result<Self, Broken> {
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
        let bytes_max =
            PACK_PAGES_MAX * (FRAME_BYTES + HASH_BYTES + 1) as u64 + (8 + 16 + SEALED_BYTES) as u64;
        if !is_end || bytes > bytes_max || offset.checked_add(bytes) != Some(footer_at) {
            return Err("it doesn't end as a pack does".into());
        }
        Ok(Ends {
            header: Header::decode(&header)
                .ok_or(Broken::from("it is no pack of version 1 or 2"))?,
            offset,
            bytes,
            footer,
        })
    }
}

/// Why a table can't be had.
pub(super) enum Broken {
    Io(std::io::Error),
    Problem(String),
    /// Already an error of the store's.
    Other(Error),
}

impl Broken {
    pub(super) fn of(self, path: &Path) -> Error {
        match self {
            Broken::Problem(problem) => Error::damaged(path, problem),
            Broken::Other(error) => error,
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

pub(super) fn read_at(
    file: &File,
    buffer: &mut [u8],
    offset: u64,
) -> std::result::Result<(), Broken> {
    file.read_exact_at(buffer, offset).map_err(Broken::Io)
}

pub(super) fn decode_frame(bytes: &[u8]) -> std::result::Result<Frame, Broken> {
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

pub(super) fn word_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_le_bytes(*word))
}

pub(super) fn number_at(bytes: &[u8], at: usize) -> u64 {
    let number = bytes.get(at..).and_then(|rest| rest.first_chunk());
    number.map_or(0, |number| u64::from_le_bytes(*number))
}

//! Tells what a file is from how it begins, for clear error messages.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

use super::format::{XC_MARKER, XL_IDENT};
use super::input::Input;
use super::savefile::SAVE_MAGIC;
use super::Error;

/// How an index file of a snapshot begins (`plugin/docs/snapshot-format.md`).
pub(crate) const INDEX_MAGIC: [u8; 8] = *b"xlvneIDX";
/// How a records file of a snapshot begins.
pub(crate) const RECORDS_MAGIC: [u8; 8] = *b"xlvneREC";
/// The file that makes a directory a snapshot.
const MANIFEST_NAME: &str = "manifest.json";

/// What a file or directory seems to be.
///
/// Displays as a noun phrase: "a plain xl save file".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A snapshot of ours, or a file out of one.
    Snapshot,
    /// Written by `xl save`.
    XlSave,
    /// A libxl stream without xl's header (`libxl_domain_suspend`, libvirt).
    LibxlStream,
    /// A libxc stream without libxl's around it (XenServer's tools).
    LibxcStream,
    /// A file without contents.
    Empty,
    /// A directory that isn't a snapshot.
    Directory,
    /// None of these.
    Other,
}

impl Kind {
    /// Bytes that [`Kind::of`] wants to see; fewer may leave it at
    /// [`Kind::Other`].
    pub const PREFIX_BYTES: usize = 64;

    /// What begins with `first`.
    pub fn of(first: &[u8]) -> Self {
        if first.is_empty() {
            Kind::Empty
        } else if first.starts_with(&SAVE_MAGIC) {
            Kind::XlSave
        } else if first.starts_with(&XL_IDENT.to_be_bytes()) {
            Kind::LibxlStream
        } else if first.starts_with(&XC_MARKER.to_be_bytes()) && first.get(8..12) == Some(b"XENF") {
            Kind::LibxcStream
        } else if first.starts_with(&INDEX_MAGIC)
            || first.starts_with(&RECORDS_MAGIC)
            || is_manifest(first)
        {
            Kind::Snapshot
        } else {
            Kind::Other
        }
    }

    /// What is at `path`.
    ///
    /// # Errors
    ///
    /// If it doesn't exist or can't be read.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        if std::fs::metadata(path)?.is_dir() {
            let manifest = path.join(MANIFEST_NAME);
            return Ok(match std::fs::metadata(manifest) {
                Ok(_) => Kind::Snapshot,
                Err(_) => Kind::Directory,
            });
        }
        let mut first = [0; Self::PREFIX_BYTES];
        let mut input = Input::unbuffered(File::open(path)?);
        if let Err(Error::Read { source, .. }) = input.exact(&mut first, "the beginning") {
            return Err(source);
        }
        let seen = input.offset() as usize; // at most 64
        Ok(Kind::of(first.get(..seen).unwrap_or_default()))
    }
}

/// A manifest is JSON text whose first field is its format version and whose
/// second is the VNE's name, as we lay it out.
fn is_manifest(first: &[u8]) -> bool {
    let text = String::from_utf8_lossy(first);
    let words: String = text.split_whitespace().collect();
    words.starts_with("{\"format\":") && words.contains(",\"vne\":")
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Snapshot => "a VNE snapshot",
            Kind::XlSave => "a plain xl save file",
            Kind::LibxlStream => "a bare libxl stream",
            Kind::LibxcStream => "a bare libxc stream",
            Kind::Empty => "an empty file",
            Kind::Directory => "a directory without a snapshot in it",
            Kind::Other => "something unknown",
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_told_from_the_others() {
        let save = b"Xen saved domain, xl format\n \0 \r\x04\x03\x02\x01";
        let cases: &[(&[u8], Kind)] = &[
            (b"", Kind::Empty),
            (save, Kind::XlSave),
            (b"LibxlFmt\0\0\0\x02", Kind::LibxlStream),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xffXENF\0\0\0\x03",
                Kind::LibxcStream,
            ),
            (b"\xff\xff\xff\xff\xff\xff\xff\xffQEMU", Kind::Other),
            (b"xlvneIDX....", Kind::Snapshot),
            (b"xlvneREC....", Kind::Snapshot),
            (b"{\n  \"format\": 1,\n  \"vne\": \"lab\",", Kind::Snapshot),
            (b"{\n  \"c_info\": {", Kind::Other),
            (b"Xen saved domain, xl", Kind::Other),
            (b"\x7fELF", Kind::Other),
        ];
        for (first, kind) in cases {
            assert_eq!(Kind::of(first), *kind, "{first:?}");
        }
    }

    #[test]
    fn a_short_file_and_a_plain_directory_are_no_errors() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Kind::of_path(dir.path()).unwrap(), Kind::Directory);
        let file = dir.path().join("manifest.json");
        std::fs::write(&file, "{\"format\": 1, \"vne\":").unwrap();
        assert_eq!(Kind::of_path(&file).unwrap(), Kind::Snapshot);
        assert_eq!(Kind::of_path(dir.path()).unwrap(), Kind::Snapshot);
        std::fs::write(&file, "").unwrap();
        assert_eq!(Kind::of_path(&file).unwrap(), Kind::Empty);
        assert!(Kind::of_path(&dir.path().join("absent")).is_err());
    }
}

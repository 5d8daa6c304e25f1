//! The store's readers, for `crate::fuzz`. Where a hash stands in front of a reader,
//! bytes get the right one here: else nothing would come as far as it.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use super::batch as batches;
use super::codec::Unpacker;
use super::index::Index;
use super::key::Key;
use super::manifest::Manifest;
use super::map::PageMap;
use super::pack::Pack;
use super::records::Records;
use super::seal::Vault;

/// Bytes in front of a pack's hash, and of the hash.
const FOOTER_BYTES: usize = 64;
const HASH_BYTES: usize = 32;

fn vault() -> Vault {
    Vault::new(Some(Key::new([7; 32])))
}

/// A pack, plain or not.
pub fn pack(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    rehash(&mut bytes);
    let Ok(fd) = rustix::fs::memfd_create("pack", rustix::fs::MemfdFlags::CLOEXEC) else {
        return;
    };
    let mut file = File::from(fd);
    if file.write_all(&bytes).is_err() {
        return;
    }
    let path = Path::new("pack");
    let Ok(pack) = Pack::of(file, path, None, &vault()) else {
        return;
    };
    let Ok(mut unpacker) = Unpacker::new(path) else {
        return;
    };
    for frame in pack.table.frames.iter().take(4) {
        let _ = unpacker.unpack(&pack, frame);
    }
    let pages = pack.table.pages();
    let found = (0..pages.saturating_add(1)).take(256);
    for page in found.filter(|&page| pack.table.find(page).is_some()) {
        assert!(page < pages, "page {page} of {pages}");
    }
}

/// Puts the hash of a pack's table where it belongs.
fn rehash(bytes: &mut [u8]) {
    let Some(footer) = bytes.len().checked_sub(FOOTER_BYTES) else {
        return;
    };
    let offset = bytes.get(footer..).and_then(|rest| rest.first_chunk::<8>());
    let offset = offset.map_or(u64::MAX, |offset| u64::from_le_bytes(*offset));
    let end = bytes.len() - HASH_BYTES;
    let from = usize::try_from(offset).ok().filter(|&from| from <= footer);
    let Some(table) = from.and_then(|from| bytes.get(from..end)) else {
        return;
    };
    let hash = blake3::hash(table);
    if let Some(place) = bytes.get_mut(end..) {
        place.copy_from_slice(hash.as_bytes());
    }
}

/// An index.
pub fn index(bytes: &[u8]) {
    if let Ok(map) = PageMap::decode(bytes) {
        assert!(map.check().is_ok());
        assert_eq!(map.encode(), bytes);
    }
}

/// An index of format 1.
pub fn index_1(bytes: &[u8]) {
    if let Ok(index) = Index::decode(bytes) {
        assert!(index.check().is_ok());
    }
}

/// Records.
pub fn records(bytes: &[u8]) {
    if let Ok(records) = Records::decode(bytes) {
        assert_eq!(Records::decode(&records.encode()), Ok(records));
    }
}

/// A manifest, from its beginning up to the checksum.
pub fn manifest(bytes: &[u8]) {
    let path = Path::new("manifest.json");
    let _ = Manifest::decode(bytes, path);
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let sealed = Manifest::with_checksum(text);
    if let Ok(manifest) = Manifest::decode(sealed.as_bytes(), path) {
        let here = manifest.members_here().count();
        assert!(manifest.members_of_host().count() <= here);
        let _ = manifest.encode();
    }
}

/// What a peer says of guest frames.
pub fn batch(bytes: &[u8]) {
    if let Ok(runs) = batches::decode(bytes, 0) {
        assert_eq!(batches::encode(&runs), bytes);
    }
}

/// A file that is encrypted.
pub fn sealed(bytes: &[u8]) {
    let path = Path::new("file");
    if let Ok(opened) = vault().open(bytes.to_vec(), path) {
        assert!(opened.len() <= bytes.len());
    }
}

/// What a corpus begins with: target, name, bytes.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let read = |format: &str, name: &str| {
        let below = format!("{format}/snapshots/lab/20261121T023652Z/{name}");
        std::fs::read(golden.join(below)).unwrap()
    };
    let manifest = |format: &str| {
        let whole = read(format, "manifest.json");
        whole.get(..whole.len() - 85).unwrap().to_vec()
    };
    let path = Path::new("file");
    let batch = {
        let mut bytes = vec![3, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0];
        bytes.extend([7; 64]);
        bytes.extend([9, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        bytes
    };
    vec![
        (
            "pack",
            "plain",
            super::tests::pack::small(&Vault::default()),
        ),
        ("pack", "sealed", super::tests::pack::small(&vault())),
        ("index", "golden", read("format-2", "members/web-1/index")),
        ("index-1", "golden", read("format-1", "members/web-1/index")),
        (
            "records",
            "golden",
            read("format-2", "members/web-1/records"),
        ),
        ("manifest", "format-1", manifest("format-1")),
        ("manifest", "format-2", manifest("format-2")),
        ("batch", "two", batch),
        ("sealed", "text", vault().close(b"some text", path).unwrap()),
        ("sealed", "plain", b"some text".to_vec()),
    ]
}

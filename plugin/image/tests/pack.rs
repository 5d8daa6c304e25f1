//! Packs and their tables.

use super::super::bits::Bits;
use super::super::codec::{Compressor, Unpacker};
use super::super::key::Key;
use super::super::pack::{
    check_of, hash_page, seal_frame, Frame, Hash, Pack, PackId, Table, HEADER_BYTES,
};
use super::super::seal::Vault;
use super::*;

/// A pack of 70 pages, of which two are gone, and its table.
fn sample(path: &Path, vault: &Vault) -> Table {
    let sealer = vault.new_sealer(path).unwrap();
    let pages: Vec<Vec<u8>> = (0..70).map(|n| vec![n; PAGE_SIZE]).collect();
    let hashes: Vec<Hash> = pages.iter().map(|page| hash_page(page)).collect();
    let mut bytes = Table::header(&[7; 16], sealer.as_ref());
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
        seal_frame(&mut packed, sealer.as_ref(), path).unwrap();
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
    bytes.extend(table.encode(end, sealer.as_ref(), path).unwrap());
    std::fs::write(path, bytes).unwrap();
    table
}

/// The bytes of such a pack, for fuzzers.
pub(crate) fn small(vault: &Vault) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pack");
    sample(&path, vault);
    std::fs::read(&path).unwrap()
}

#[test]
fn pages_that_are_there_are_found_in_their_frames() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pack");
    for vault in [Vault::default(), Vault::new(Some(Key::new([7; 32])))] {
        is_readable(&path, &vault);
    }
}

fn is_readable(path: &Path, vault: &Vault) {
    let table = sample(path, vault);
    let pack = Pack::open(path, Some(&table.id()), vault).unwrap();
    assert_eq!(pack.table, table);
    let mut unpacker = Unpacker::new(path).unwrap();
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
        Pack::open(path, Some(&other), vault),
        Err(Error::Damaged { .. })
    ));
}

/// Its hash keeps accidents from being decoded at all; it's no proof of sense.
#[test]
fn no_table_is_a_panic_even_if_its_hash_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pack");
    let plain = Vault::default();
    let table = sample(&path, &plain);
    let good = std::fs::read(&path).unwrap();
    let end = good.len() - 32;
    let from = good.len() - table.encode(0, None, &path).unwrap().len();
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
            let Ok(pack) = Pack::open(&path, None, &plain) else {
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

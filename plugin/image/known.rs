//! The pages that the store has already, found by their hashes.
//!
//! What is kept in memory of each page is 32 bits of its hash and its number;
//! the whole hash is read from the pack when those agree. So the memory that it
//! takes is at most 24 bytes a page, and bounded: the largest packs are known, and
//! pages of others are stored once more.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::error::Error;
use super::files::Lock;
use super::pack::{Hash, Pack, PackId};
use super::packs::{try_lock_pack, Packs};
use super::Result;

/// Packs that are known, at most: each is an open file.
const KNOWN_PACKS_MAX: usize = 500;

/// Hashes read with one system call: neighbours are mostly asked for next.
const READ_HASHES: u32 = 128;

/// Where a page is: a pack by its place in a list, and the number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    /// 0 is the pack that is being written, others are those of [`Known`].
    pub pack: u32,
    pub page: u32,
}

/// A hash table of hashes, without the hashes.
#[derive(Debug, Default)]
pub(crate) struct Fingerprints {
    /// 32 bits of the hash above a number that is one too large; 0 is empty.
    slots: Vec<u64>,
    count: usize,
}

impl Fingerprints {
    /// Bytes that `count` of them take.
    fn bytes_for(count: usize) -> usize {
        Self::slots_for(count) * 8
    }

    fn slots_for(count: usize) -> usize {
        (count + count / 2 + 1).next_power_of_two().max(64)
    }

    fn print(hash: &Hash) -> u64 {
        let [a, b, c, d, ..] = *hash;
        u64::from(u32::from_le_bytes([a, b, c, d])) << 32
    }

    /// Adds a page.
    pub(crate) fn insert(&mut self, hash: &Hash, number: u32) {
        self.reserve(1);
        self.put(Self::print(hash) | (u64::from(number) + 1));
        self.count += 1;
    }

    /// Makes room for so many more.
    pub(crate) fn reserve(&mut self, more: usize) {
        let slots = Self::slots_for(self.count + more);
        if slots <= self.slots.len() {
            return;
        }
        let old = std::mem::replace(&mut self.slots, vec![0; slots]);
        for entry in old.into_iter().filter(|&entry| entry != 0) {
            self.put(entry);
        }
    }

    fn put(&mut self, entry: u64) {
        let mask = self.slots.len() - 1;
        let mut at = spread(entry) & mask;
        while self.slots.get(at).is_some_and(|&slot| slot != 0) {
            at = (at + 1) & mask;
        }
        if let Some(slot) = self.slots.get_mut(at) {
            *slot = entry;
        }
    }

    /// The pages whose hash may be this one.
    pub(crate) fn candidates(&self, hash: &Hash) -> impl Iterator<Item = u32> + '_ {
        let print = Self::print(hash);
        let mask = self.slots.len().wrapping_sub(1);
        let mut at = spread(print) & mask;
        std::iter::from_fn(move || loop {
            let entry = self.slots.get(at).copied().filter(|&slot| slot != 0)?;
            at = (at + 1) & mask;
            if entry >> 32 << 32 == print {
                return Some((entry as u32).wrapping_sub(1));
            }
        })
    }
}

/// Where an entry begins to look, by its print alone.
fn spread(entry: u64) -> usize {
    ((entry >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize
}

/// A pack whose pages are known.
#[derive(Debug)]
pub(crate) struct KnownPack {
    pub id: PackId,
    pub pages: u32,
    /// The number that its first page has among all that are known.
    first: u32,
    /// Locked shared: it stays.
    file: File,
    hashes_offset: u64,
    /// Of a pack that is encrypted: its table can't be read in pieces.
    hashes: Option<Vec<Hash>>,
}

/// The store's pages.
#[derive(Debug)]
pub(crate) struct Known {
    packs: Packs,
    known: Vec<KnownPack>,
    prints: Fingerprints,
    /// Pages of all known packs.
    total: u32,
    bytes_max: usize,
    /// Bytes of hashes that are kept.
    hashes_bytes: usize,
    /// Hashes that were read last, and the number of the first.
    cache: (u32, Vec<Hash>),
}

impl Known {
    /// Knows nothing yet, and never takes more than about `bytes_max` bytes.
    pub(crate) fn new(packs: &Packs, bytes_max: usize) -> Self {
        Known {
            packs: packs.clone(),
            known: Vec::new(),
            prints: Fingerprints::default(),
            total: 0,
            bytes_max,
            hashes_bytes: 0,
            cache: (0, Vec::new()),
        }
    }

    /// Where the packs are.
    pub(crate) fn folder(&self) -> &Packs {
        &self.packs
    }

    /// The packs, in the order in which [`Location`]s count them, from 1.
    pub(crate) fn packs(&self) -> &[KnownPack] {
        &self.known
    }

    /// Gets to know the packs that it doesn't know. What can't be had is stored
    /// once more; that's no failure.
    pub(crate) fn learn(&mut self) -> Result<()> {
        for (id, _) in self.packs.list()? {
            if self.known.len() >= KNOWN_PACKS_MAX {
                break;
            }
            if self.known.iter().any(|known| known.id == id) || !self.has_room(1) {
                continue;
            }
            if let Err(error) = self.learn_pack(id) {
                log::info!("its pages are stored once more: {error}");
            }
        }
        Ok(())
    }

    fn has_room(&self, more: usize) -> bool {
        let each = if self.packs.vault().seals() { 32 } else { 0 };
        let hashes = self.hashes_bytes + each * more;
        Fingerprints::bytes_for(self.prints.count + more) + hashes <= self.bytes_max
    }

    fn learn_pack(&mut self, id: PackId) -> Result<()> {
        let path = self.packs.path(&id);
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        if !try_lock_pack(&file, &path, Lock::Shared)? {
            return Ok(());
        }
        let vault = self.packs.vault();
        let pack = Pack::of(file, &path, Some(&id), vault)?;
        // What is encrypted mustn't lean on what isn't, nor show by that what it has.
        if pack.sealer.is_some() != vault.seals() {
            return Ok(());
        }
        let table = pack.table;
        let last = self.total.checked_add(table.pages());
        let Some(total) = last.filter(|_| self.has_room(table.hashes.len())) else {
            return Ok(());
        };
        self.prints.reserve(table.hashes.len());
        for (number, hash) in (self.total..).zip(&table.hashes) {
            if table.present.get((number - self.total) as usize) {
                self.prints.insert(hash, number);
            }
        }
        let length = pack.file.metadata().map_err(Error::io("look at", &path))?;
        let pages = table.pages();
        let hashes = pack.sealer.is_some().then_some(table.hashes);
        self.hashes_bytes += hashes.as_ref().map_or(0, |hashes| hashes.len() * 32);
        self.known.push(KnownPack {
            id,
            pages,
            hashes,
            first: self.total,
            hashes_offset: hashes_offset(length.len(), pages),
            file: pack.file,
        });
        self.total = total;
        Ok(())
    }

    /// Where a page with this hash is.
    pub(crate) fn find(&mut self, hash: &Hash) -> Option<Location> {
        let candidates: Vec<u32> = self.prints.candidates(hash).collect();
        let number = candidates
            .into_iter()
            .find(|&number| self.hash_of(number).as_ref() == Some(hash))?;
        let (place, pack) = self.pack_of(number)?;
        Some(Location {
            pack: place as u32 + 1, // within KNOWN_PACKS_MAX
            page: number - pack.first,
        })
    }

    fn pack_of(&self, number: u32) -> Option<(usize, &KnownPack)> {
        let after = self.known.partition_point(|pack| pack.first <= number);
        let place = after.checked_sub(1)?;
        Some((place, self.known.get(place)?))
    }

    fn hash_of(&mut self, number: u32) -> Option<Hash> {
        let (first, cached) = &self.cache;
        if let Some(place) = number.checked_sub(*first) {
            if let Some(hash) = cached.get(place as usize) {
                return Some(*hash);
            }
        }
        let (_, pack) = self.pack_of(number)?;
        let page = number - pack.first;
        if let Some(hashes) = &pack.hashes {
            return hashes.get(page as usize).copied();
        }
        let count = READ_HASHES.min(pack.pages - page) as usize;
        let mut bytes = vec![0; count * 32];
        let offset = pack.hashes_offset + u64::from(page) * 32;
        pack.file.read_exact_at(&mut bytes, offset).ok()?;
        let hashes = bytes.chunks_exact(32);
        let hashes = hashes.filter_map(|hash| hash.first_chunk().copied());
        self.cache = (number, hashes.collect());
        self.cache.1.first().copied()
    }
}

/// Where the hashes begin in a pack of so many bytes: they are the last of its
/// table.
fn hashes_offset(length: u64, pages: u32) -> u64 {
    length.saturating_sub(64 + u64::from(pages) * 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_was_put_in_is_found_also_with_equal_prints() {
        let hash = |number: u32| {
            let mut hash = [0; 32];
            // Three of them in a row share their print.
            hash[..4].copy_from_slice(&(number / 3).to_le_bytes());
            hash
        };
        let mut prints = Fingerprints::default();
        assert_eq!(prints.candidates(&hash(1)).count(), 0);
        for number in 0..10_000 {
            prints.insert(&hash(number), number);
        }
        for number in 0..10_000 {
            let found: Vec<u32> = prints.candidates(&hash(number)).collect();
            assert!(found.contains(&number), "{number}: {found:?}");
            assert!(found.len() <= 3);
        }
        assert_eq!(prints.candidates(&hash(40_000)).count(), 0);
    }
}

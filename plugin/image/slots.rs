//! Pages that are staged on disk until their guest runs again: slots of one page
//! each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use chacha20::cipher::{KeyIvInit, StreamCipher};
use chacha20::ChaCha20;
use zeroize::Zeroizing;

use super::error::Error;
use super::index::{hash_page, PageHash};
use super::Result;
use crate::stream::{Page, PAGE_SIZE};

/// Neighbouring slots that are written with one system call: 1 MiB.
const STAGE_PAGES: usize = 256;

/// Slots on disk, with the hash of each and a list of unused ones.
///
/// Writes to neighbouring slots are staged and go out together, so a first
/// round, which comes in order, costs one system call per MiB.
#[derive(Debug)]
pub(crate) struct SlotFile {
    file: File,
    path: PathBuf,
    hashes: Vec<PageHash>,
    free: Vec<u32>,
    stage: Vec<u8>,
    /// The slot that the stage begins at.
    stage_first: usize,
    /// If the store is encrypted.
    scrambler: Option<Scrambler>,
}

/// Keeps what is staged from being read by anybody, the next run of this program
/// included: the key is nowhere but here. That a slot has what was written its
/// hash says.
pub(crate) struct Scrambler {
    key: Zeroizing<[u8; 32]>,
    /// How often something was written; no two writes have the same nonce.
    writes: u64,
    /// The number of the write that each slot has.
    of_slots: Vec<u64>,
}

impl std::fmt::Debug for Scrambler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scrambler")
    }
}

impl Scrambler {
    /// With a key of its own; `path` is for errors.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let key = crate::random::bytes().map_err(Error::io("scramble", path))?;
        Ok(Scrambler {
            key: Zeroizing::new(key),
            writes: 0,
            of_slots: Vec::new(),
        })
    }

    fn apply(&self, write: u64, bytes: &mut [u8]) {
        let mut nonce = [0; 12];
        nonce
            .iter_mut()
            .zip(write.to_le_bytes())
            .for_each(|(to, from)| *to = from);
        let key: &[u8; 32] = &self.key;
        ChaCha20::new(key.into(), &nonce.into()).apply_keystream(bytes);
    }

    /// Scrambles slots from `first` on that are about to be written together.
    fn hide(&mut self, first: usize, bytes: &mut [u8]) {
        for (slot, page) in (first..).zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
            self.writes += 1;
            self.apply(self.writes, page);
            if self.of_slots.len() <= slot {
                self.of_slots.resize(slot + 1, 0);
            }
            if let Some(of_slot) = self.of_slots.get_mut(slot) {
                *of_slot = self.writes;
            }
        }
    }

    fn show(&self, slot: usize, page: &mut Page) {
        if let Some(write) = self.of_slots.get(slot) {
            self.apply(*write, page);
        }
    }
}

impl SlotFile {
    #[cfg(test)]
    fn create(path: &Path) -> Result<Self> {
        Ok(Self::over(super::files::create_file(path)?, path, None))
    }

    /// Slots in `file`, which is empty; `path` is for errors.
    pub(crate) fn over(file: File, path: &Path, scrambler: Option<Scrambler>) -> Self {
        SlotFile {
            file,
            path: path.to_owned(),
            hashes: Vec::new(),
            free: Vec::new(),
            stage: Vec::with_capacity(STAGE_PAGES * PAGE_SIZE),
            stage_first: 0,
            scrambler,
        }
    }

    /// A slot that nobody uses. `None` when 2^32 are in use, which the bound on
    /// frame numbers rules out.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = u32::try_from(self.hashes.len()).ok()?;
        self.hashes.push(PageHash::default());
        Some(slot)
    }

    /// The slot may be used for another page.
    pub(crate) fn release(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Whether a page is what the slot was given.
    pub(crate) fn holds(&self, slot: u32, page: &Page) -> bool {
        self.hashes.get(slot as usize) == Some(&hash_page(page))
    }

    /// Puts a page into an allocated slot.
    pub(crate) fn write(&mut self, slot: u32, page: &Page) -> Result<()> {
        if let Some(hash) = self.hashes.get_mut(slot as usize) {
            *hash = hash_page(page);
        }
        let slot = slot as usize;
        let staged = self.stage.len() / PAGE_SIZE;
        let place = slot.checked_sub(self.stage_first);
        match place.filter(|&place| place < staged) {
            Some(place) => {
                let at = place * PAGE_SIZE;
                if let Some(staged) = self.stage.get_mut(at..at + PAGE_SIZE) {
                    staged.copy_from_slice(page);
                }
                return Ok(());
            }
            None if place != Some(staged) || staged >= STAGE_PAGES => {
                self.flush()?;
                self.stage_first = slot;
            }
            None => {}
        }
        self.stage.extend_from_slice(page);
        Ok(())
    }

    /// Writes out what is staged.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.stage.is_empty() {
            return Ok(());
        }
        if let Some(scrambler) = &mut self.scrambler {
            scrambler.hide(self.stage_first, &mut self.stage);
        }
        let result = self
            .file
            .write_all_at(&self.stage, offset(self.stage_first));
        self.stage.clear();
        result.map_err(Error::io("write", &self.path))
    }

    /// What a slot was given.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if the disk doesn't keep it, [`Error::Io`].
    pub(crate) fn read(&self, slot: u32) -> Result<Page> {
        let mut page = [0; PAGE_SIZE];
        self.file
            .read_exact_at(&mut page, offset(slot as usize))
            .map_err(Error::io("read", &self.path))?;
        if let Some(scrambler) = &self.scrambler {
            scrambler.show(slot as usize, &mut page);
        }
        if self.holds(slot, &page) {
            return Ok(page);
        }
        let problem = format!("slot {slot} did not keep what was written");
        Err(Error::damaged(&self.path, problem))
    }

    /// Removes the file.
    pub(crate) fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(Error::io("remove", &self.path))
    }
}

/// Where a slot begins in the file. Slots are below 2^32.
pub(crate) fn offset(slot: usize) -> u64 {
    slot as u64 * PAGE_SIZE as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn page(fill: u8) -> Page {
        [fill; PAGE_SIZE]
    }

    fn bytes_of(path: &Path) -> Vec<u8> {
        let bytes = std::fs::read(path).unwrap();
        bytes.chunks(PAGE_SIZE).map(|page| page[17]).collect()
    }

    #[test]
    fn a_page_written_twice_while_staged_keeps_its_last_version() {
        let dir = tempfile::tempdir().unwrap();
        let mut slots = SlotFile::create(&dir.path().join("staged")).unwrap();
        for fill in 0..4 {
            let slot = slots.allocate().unwrap();
            slots.write(slot, &page(fill)).unwrap();
        }
        slots.write(1, &page(11)).unwrap();
        slots.write(3, &page(13)).unwrap();
        slots.write(0, &page(10)).unwrap();
        slots.flush().unwrap();
        for (slot, fill) in [(0, 10), (1, 11), (2, 2), (3, 13)] {
            assert!(slots.read(slot).unwrap() == page(fill));
        }
    }

    #[test]
    fn stages_of_any_order_and_size_reach_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("staged");
        let mut slots = SlotFile::create(&path).unwrap();
        let count = 2 * STAGE_PAGES + 3;
        for _ in 0..count {
            slots.allocate().unwrap();
        }
        for slot in (0..count).filter(|slot| slot % 7 == 0) {
            slots.write(slot as u32, &page(1)).unwrap();
        }
        for slot in 0..count {
            slots.write(slot as u32, &page((slot % 251) as u8)).unwrap();
        }
        slots.flush().unwrap();
        let expected: Vec<u8> = (0..count).map(|slot| (slot % 251) as u8).collect();
        assert_eq!(bytes_of(&path), expected);
        slots.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_the_disk_has_not_kept_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("staged");
        let mut slots = SlotFile::create(&path).unwrap();
        let slot = slots.allocate().unwrap();
        slots.write(slot, &page(1)).unwrap();
        slots.flush().unwrap();
        std::fs::write(&path, page(2)).unwrap();
        assert!(matches!(slots.read(slot), Err(Error::Damaged { .. })));
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let path = Path::new("/dev/full");
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        let mut slots = SlotFile::over(file, path, None);
        let slot = slots.allocate().unwrap();
        slots.write(slot, &page(1)).unwrap();
        let error = slots.flush().unwrap_err();
        assert!(error.is_out_of_space(), "{error}");
    }
}
